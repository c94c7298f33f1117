"""What the client's records show of themselves."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import monofacet
import numpy as np
import pytest
from monofacet import TLS, Ablation, LabelledItem, SteeringEdit
from monofacet._config import Connection
from monofacet._types.brief import Brief, brief

from tests.clients.conftest import Call

PICTURE = np.zeros((8, 8, 3), np.uint8)
# Everything that a call returns.
RESULTS: dict[str, Any] = {
    "encode": lambda client: client.encode(["a"] * 200, dictionary=""),
    "stream_encode": lambda client: client.stream_encode(["a", b"bad"], dictionary=""),
    "features": lambda client: client.features(),
    "features_page": lambda client: client.features_page(),
    "feature": lambda client: client.feature(1),
    "classify_modality": lambda client: client.classify_modality(["a"] * 200),
    "score_modality": lambda client: client.score_modality([(PICTURE, "a")]),
    "classify_gender": lambda client: client.classify_gender(["a"] * 200, ablation=Ablation(range(1, 20))),
    "audit_gender": lambda client: client.audit_gender([LabelledItem("a woman", "woman")] * 8),
    "filter_adversarial": lambda client: client.filter_adversarial([PICTURE] * 9),
    "generate": lambda client: client.generate("a", num_images=9, unsteered=True),
    "generate_events": lambda client: client.generate_events("a", preview_every=1),
    "preview_steering": lambda client: client.preview_steering("a", SteeringEdit(1, scale=2)),
    "attributes": lambda client: client.attributes(),
    "attribute": lambda client: client.attribute("blue"),
    "model": lambda client: client.model(),
    "models": lambda client: client.models(),
}


def records(value: Any) -> list[Brief]:
    """All records in a value, at any depth."""
    if isinstance(value, Brief):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return [value, *records(inner)]
    return [record for item in value for record in records(item)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_shown_in_a_few_words_and_can_be_pickled(both: Call, name: str) -> None:
    found = records(RESULTS[name](both()))
    assert found
    for record in found:
        assert len(repr(record)) < 600, repr(record)
        assert repr(record).startswith(f"{type(record).__name__}(")
        assert repr(pickle.loads(pickle.dumps(record))) == repr(record)


def test_every_record_is_brief() -> None:
    kinds = [
        kind for kind in vars(monofacet).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]
    settings = {monofacet.TLS, monofacet.Retry, monofacet.Timeout, monofacet.Violation}
    assert {kind for kind in kinds if not issubclass(kind, Brief)} == settings


def test_arrays_are_shown_by_type_and_shape_and_lists_by_length(both: Call) -> None:
    shown = repr(both().encode(["a"] * 40, dictionary=""))
    assert "embeddings=float32[40, 8], norms=float32[40], features=<40 x SparseFeatures>" in shown
    assert "bundle='fake@000000000000'" in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"x" * 1234, "<1,234 bytes>"),
        ("x" * 100, "'" + "x" * 59 + "…'"),
        (monofacet.Gender.WOMAN, "WOMAN"),
        ((1, 2.123456789, None), "(1, 2.12346, None)"),
        ((), "()"),
        (range(100), "<100 x int>"),
        ({"a": 1}, "{'a': 1}"),
        (dict.fromkeys(range(9)), "<9 items>"),
        (Path("a"), repr(Path("a"))),
    ],
)
def test_values_are_shown_in_a_few_words(value: Any, shown: str) -> None:
    assert brief(value) == shown


def test_what_is_secret_is_not_shown() -> None:
    assert "secret" not in repr(TLS(ca=b"public", certificate=b"public", key=b"secret"))
    assert "secret" not in repr(Connection("localhost:1", token="secret"))
