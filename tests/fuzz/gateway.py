"""A gateway with the tiny bundle's real towers, in this process, and what its answers must be."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from grpc import aio
from monofacet._async.transport import Ending
from monofacet.v1 import feature_service_pb2

from services.bundle.load import Bundle
from tests.fuzz.messages import Case
from tests.support.gateway import serve_here
from tests.support.tiny_bias import with_bias
from tests.support.tiny_defense import with_defense

CODE = grpc.StatusCode
# What a caller's request can be answered with. INTERNAL, UNKNOWN and UNAVAILABLE are never a request's fault.
MAPPED = {
    CODE.OK,
    CODE.INVALID_ARGUMENT,
    CODE.NOT_FOUND,
    CODE.FAILED_PRECONDITION,
    CODE.RESOURCE_EXHAUSTED,
    CODE.UNIMPLEMENTED,
}
_STREAM = "monofacet.v1.FeatureService/StreamEncode"
_AT_ONCE = 8
_TIMEOUT_S = 120.0


def calibrated(tiny: Bundle, folder: Path) -> Bundle:
    """Return a tiny bundle that every call but Generate can be answered with; otherwise they would only be refused."""
    return with_defense(with_bias(tiny, folder / "biased"), folder / "calibrated")


@asynccontextmanager
async def fuzzed_gateway(bundle: Bundle) -> AsyncIterator[aio.Channel]:
    """Open a gateway and a channel to it."""
    async with serve_here(bundle, log_level="error", max_queue_s=60) as served:
        yield served.channel


@dataclass
class Findings:
    """What came of many cases.

    Attributes
    ----------
    statuses
        How often each code and reason was answered.
    amiss
        The cases that were answered as no request may be, each with what was wrong.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    amiss: list[tuple[Case, str]] = field(default_factory=list)


async def send(channel: aio.Channel, case: Case) -> tuple[CODE, str, str]:
    """Send one case.

    Returns
    -------
    The code, the reason, and what is wrong with the answer (empty when nothing is).
    """
    call = channel.stream_stream(f"/{case.method}")(iter(case.messages), timeout=_TIMEOUT_S)
    ending = Ending(call)
    try:
        async for answer in call:
            wrong = _item_amiss(case.method, answer) or _not_finite(_parsed(case.method, answer))
            if wrong:
                return CODE.OK, "", wrong
    except aio.AioRpcError as error:
        return _judge(await ending.settle(error))
    return CODE.OK, "", ""


def _judge(error: Any) -> tuple[CODE, str, str]:
    trailing = dict(error.trailing_metadata() or ())
    if "grpc-status-details-bin" not in trailing:
        return error.code(), "", f"{error.code().name} without details: {error.details()}"
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    reason = status.details[0].value.decode(errors="replace") if status.details else ""
    if error.code() not in MAPPED:
        return error.code(), reason, f"{error.code().name}: {status.message}"
    return error.code(), reason, ""


def _parsed(method: str, answer: bytes) -> Message:
    found = descriptor_pool.Default().FindMethodByName(method.replace("/", "."))
    return message_factory.GetMessageClass(found.output_type).FromString(answer)


def _not_finite(message: Message) -> str:
    """Return the first field that holds no number: what is undefined is left unset in the contract."""
    for described, value in message.ListFields():
        if described.message_type is not None and described.message_type.GetOptions().map_entry:
            continue
        for one in value if described.is_repeated else [value]:
            if described.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                inner = _not_finite(one)
                if inner:
                    return f"{described.name}.{inner}"
            elif isinstance(one, float) and not math.isfinite(one):
                return f"{described.name} is {one}"
    return ""


def _item_amiss(method: str, answer: bytes) -> str:
    """Return what is wrong with one answer of a stream of items, which carries statuses of its own."""
    if method != _STREAM:
        return ""
    response = feature_service_pb2.StreamEncodeResponse.FromString(answer)
    if response.WhichOneof("result") != "error":
        return ""
    name = code_pb2.Code.Name(response.error.code)
    return "" if CODE[name] in MAPPED else f"item: {name}: {response.error.message}"


async def fuzz(
    channel: aio.Channel, make: Callable[[], Case], count: int, progress: Callable[[], None] = lambda: None
) -> Findings:
    """Send `count` cases, a few at a time."""
    findings = Findings()
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            case = make()
            code, _, wrong = await send(channel, case)
            findings.statuses[code.name] += 1
            if wrong:
                findings.amiss.append((case, wrong))
            progress()

    await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))
    return findings
