"""Walks the table of bad input against the real service: status, reason, field; and it goes on serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc

from tests.deployments.conftest import status_details
from tests.e2e import bad_images
from tests.support.jpeg_file import scans_jpeg
from tests.support.service import Service
from tests.support.waiting import PATIENCE_S

CODE = grpc.StatusCode
MIB = 2**20


def image(data: bytes) -> pb.EncodeRequest:
    """Return a request whose second input is the one at fault."""
    good = common.Input(text="good")
    return pb.EncodeRequest(inputs=[good, common.Input(image=common.Image(data=data))])


Row = tuple[Callable[[], pb.EncodeRequest], grpc.StatusCode, str, list[str]]
DATA = ["inputs[1].image.data"]
TABLE: dict[str, Row] = {
    "truncated PNG": (lambda: image(bad_images.TRUNCATED_PNG), CODE.INVALID_ARGUMENT, "IMAGE_CORRUPT", DATA),
    "1x1": (lambda: image(bad_images.ONE_PIXEL), CODE.INVALID_ARGUMENT, "IMAGE_TOO_SMALL", DATA),
    "PNG bomb": (lambda: image(bad_images.BOMB), CODE.INVALID_ARGUMENT, "IMAGE_TOO_LARGE", DATA),
    "JPEG of 400 scans": (
        lambda: image(scans_jpeg(400, 6_300, 6_300)), CODE.INVALID_ARGUMENT, "IMAGE_TOO_COSTLY", DATA,
    ),
    "SVG": (lambda: image(bad_images.SVG), CODE.INVALID_ARGUMENT, "IMAGE_FORMAT_UNSUPPORTED", DATA),
    "GIF": (lambda: image(bad_images.GIF), CODE.INVALID_ARGUMENT, "IMAGE_FORMAT_UNSUPPORTED", DATA),
    "text named .png": (
        lambda: image(bad_images.TEXT_NAMED_PNG), CODE.INVALID_ARGUMENT, "IMAGE_FORMAT_UNSUPPORTED", DATA,
    ),
    "no bytes": (lambda: image(b""), CODE.INVALID_ARGUMENT, "INVALID_INPUT", DATA),
    "image of 17 MiB": (lambda: image(bytes(17 * MIB)), CODE.INVALID_ARGUMENT, "INVALID_INPUT", DATA),
    "empty batch": (lambda: pb.EncodeRequest(), CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["inputs"]),
    "257 items": (
        lambda: pb.EncodeRequest(inputs=[common.Input(text="a")] * 257),
        CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["inputs"],
    ),
    "33 MiB message": (
        lambda: pb.EncodeRequest(inputs=[common.Input(image=common.Image(data=bytes(11 * MIB)))] * 3),
        CODE.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", [],
    ),
    "unknown dictionary": (
        lambda: pb.EncodeRequest(
            inputs=[common.Input(text="a")], options=pb.EncodeOptions(dictionary="no-such")
        ),
        CODE.NOT_FOUND, "UNKNOWN_DICTIONARY", ["options.dictionary"],
    ),
    "neither of the oneof": (
        lambda: pb.EncodeRequest(inputs=[common.Input(text="a"), common.Input()]),
        CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["inputs[1].input"],
    ),
    "text too long": (
        lambda: pb.EncodeRequest(inputs=[common.Input(text="a"), common.Input(text="word " * 100)]),
        CODE.INVALID_ARGUMENT, "TEXT_TOO_LONG", ["inputs[1].text"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def channel(running_service: Service) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running_service.target) as channel:
        yield channel


@pytest.fixture(scope="module")
def encode(channel: grpc.Channel) -> Any:
    return feature_service_pb2_grpc.FeatureServiceStub(channel).Encode


def refusal(encode: Any, request: pb.EncodeRequest) -> tuple[grpc.StatusCode, str, list[str]]:
    with pytest.raises(grpc.RpcError) as caught:
        encode(request, timeout=PATIENCE_S)
    error: Any = caught.value
    trailing = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    reason, fields, _ = status_details(status)
    for word in (b"Traceback", b"/work", b"/home", b"site-packages", b".py"):
        assert word not in status.SerializeToString()
    return error.code(), reason, fields


def serves(encode: Any) -> bool:
    answer = encode(pb.EncodeRequest(inputs=[common.Input(text="still here")]), timeout=PATIENCE_S)
    return bool(np.isfinite(answer.norms).all())


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_told_what_is_wrong_and_where(encode: Any, name: str) -> None:
    make, code, reason, fields = TABLE[name]
    assert refusal(encode, make()) == (code, reason, fields)
    assert serves(encode)


def test_both_of_the_oneof_is_the_last_of_them(channel: grpc.Channel, encode: Any) -> None:
    # On the wire both can be set; protobuf itself, in every language, keeps the last. No server sees the first.
    broken, text = common.Input(image=common.Image(data=b"broken")), common.Input(text="good")
    both = broken.SerializeToString() + text.SerializeToString()
    # Field 1 of EncodeRequest, length-delimited, with a length under 128.
    raw = b"\x0a" + bytes([len(both)]) + both
    answer = channel.unary_unary("/monofacet.v1.FeatureService/Encode")(raw, timeout=PATIENCE_S)
    expected = encode(pb.EncodeRequest(inputs=[text]), timeout=PATIENCE_S)
    assert pb.EncodeResponse.FromString(answer).embeddings == expected.embeddings


def test_an_expired_deadline_is_told_as_such(encode: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        encode(pb.EncodeRequest(inputs=[common.Input(text="a")] * 256), timeout=1e-4)
    assert caught.value.code() is CODE.DEADLINE_EXCEEDED
    assert serves(encode)


def resident_bytes(service: Service) -> int:
    """Return the private resident memory of the service's processes."""
    total = 0
    for pid in service.descendants():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        anonymous = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        total += int(anonymous[0].split()[1]) * 1024 if anonymous else 0
    return total


def test_memory_does_not_grow_with_bad_input(encode: Any, running_service: Service) -> None:
    def walk() -> None:
        for make, *_ in TABLE.values():
            refusal(encode, make())

    walk()
    before = resident_bytes(running_service)
    for _ in range(5):
        walk()
    grown = resident_bytes(running_service) - before
    # Five walks bring 250 MiB of messages and would decode 2 GB of pixels. An allocator may keep one message
    # of each of the two processes.
    assert grown < 80 * MIB
