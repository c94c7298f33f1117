"""No body, however broken, is answered with a server's fault."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections import Counter
from typing import Any

import pytest

from tests.deployments.http.conftest import ENCODE, GENERATE, SCORE, Opened, enveloped

CASES = 200
PNG = base64.b64encode(b"png").decode()
EMBED = {"input": ["a", {"text": "b"}, {"image": PNG}], "model": "", "encoding_format": "float"}
DRAW = {"prompt": "a", "n": 2, "size": "64x64", "seed": 3, "steering": {"edits": [{"label": 2, "scale": 3}]}}
ENCODING = {
    "inputs": [{"text": "a"}, {"image": {"data": PNG}}],
    "options": {"maxFeatures": 3, "dictionary": ""},
}
STREAM = "application/connect+json"
# In place of any part of a JSON value.
ODD = (
    None, True, -1, 0, 1e308, 2**70, "", "a", "\ud800", "\x00", "NaN", "-Infinity", "%", "data:image/png;base64,",
    [], [[]], {}, {"": {}}, {"a": 1}, [None], ["a"] * 300, "é" * 5_000, {"image": {}}, {"text": None},
)  # fmt: skip

ROUTES: list[tuple[str, str, Any]] = [
    ("/v1/embeddings", "application/json", EMBED),
    ("/v1/images/generations", "application/json", DRAW),
    (ENCODE, "application/json", ENCODING),
    (ENCODE, "application/proto", b"\n\x03\x12\x01a\n\x07\n\x05\n\x03png"),
    (ENCODE, "application/grpc-web+proto", struct.pack(">BI", 0, 5) + b"\n\x03\x12\x01a"),
    (GENERATE, STREAM, {"prompt": "a", "numImages": 1}),
    (SCORE, STREAM, {"options": {"dictionary": ""}}),
]


def changed(value: Any, chance: random.Random) -> Any:
    """Return a JSON value with something in it that does not belong there."""
    if chance.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return chance.choice(ODD)
    if isinstance(value, list):
        i = chance.randrange(len(value))
        return [*value[:i], changed(value[i], chance), *value[i + 1 :]]
    name = chance.choice(list(value))
    if chance.random() < 0.2:
        return {**value, chance.choice(["", "x", "\ud800", name + name]): chance.choice(ODD)}
    return {**value, name: changed(value[name], chance)}


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with some changed, left out or put in."""
    for _ in range(chance.randint(1, 4)):
        i = chance.randint(0, len(data))
        kind = chance.randrange(3)
        new = b"" if kind == 0 else chance.randbytes(chance.randint(1, 4))
        data = data[:i] + new + data[i + chance.randint(0, 4) * (kind != 2) :]
    return data


def body_of(kind: str, value: Any, chance: random.Random) -> bytes:
    if isinstance(value, bytes):
        return damaged(value, chance)
    for _ in range(chance.randint(0, 2)):
        value = changed(value, chance)
    body = enveloped(value) if kind == STREAM else json.dumps(value).encode()
    return damaged(body, chance) if chance.random() < 0.4 else body


@pytest.mark.parametrize(
    ("path", "kind", "value"), ROUTES, ids=lambda value: value if isinstance(value, str) else ""
)
async def test_no_body_is_answered_with_a_fault_of_the_server(
    open_http: Opened, path: str, kind: str, value: Any
) -> None:
    chance, statuses, codes = random.Random(1), Counter[int](), Counter[str]()
    async with open_http(log_level="error", max_queue_s=60) as (gateway, client):
        for number in range(CASES):
            body = body_of(kind, value, chance)
            response = await client.post(path, content=body, headers={"content-type": kind})
            statuses[response.status_code] += 1
            # 501: the small bundle has no pipeline.
            assert response.status_code < 500 or response.status_code == 501, (number, body, response.text)
            for said in ("internal", "unknown", "grpc-status: 13", "grpc-status: 2\r"):
                assert f'"code":"{said}"' not in response.text.replace(" ", "").lower(), (body, response.text)
        # Nothing is left over, and nothing was a fault that only the log knows.
        assert gateway.sample("monofacet_requests_in_flight", method=path[1:]) == 0
        assert gateway.sample("monofacet_rejected_total", reason="INTERNAL") == 0
        for sample in counts(gateway):
            codes[sample.labels["code"]] += int(sample.value)
    assert not codes.keys() & {"INTERNAL", "UNKNOWN"}
    # Both what is right and what is wrong was reached, or the cases say nothing.
    assert codes["INVALID_ARGUMENT"] > 10
    assert codes["OK"] + codes["UNIMPLEMENTED"] > 0 or path == SCORE


def counts(gateway: Any) -> list[Any]:
    return [
        sample
        for metric in gateway.server.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "monofacet_request_duration_seconds_count"
    ]
