"""Walks the whole error table: every row's status, reason and details, and that nothing leaks."""

from __future__ import annotations

import asyncio
import inspect

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from ray.exceptions import RayTaskError

import services.errors
from deployments.access import tokens
from deployments.batching import BatcherClosed, DeadlineExpired, QueueFull
from deployments.gateway import errors
from deployments.gateway.errors import DOMAIN, MAX_MESSAGE_BYTES, MAX_STATUS_BYTES, TABLE, describe
from services.errors import BundleError, InvalidInput, MonofacetError

CODE = grpc.StatusCode


def details(status: status_pb2.Status) -> dict[str, object]:
    found: dict[str, object] = {}
    for packed in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if packed.Is(kind.DESCRIPTOR):
                packed.Unpack(message)
                found[kind.DESCRIPTOR.name] = message
    return found


def make(kind: type[BaseException]) -> BaseException:
    if issubclass(kind, MonofacetError):
        return kind("what is wrong", [("inputs[2].image.data", "what is wrong")])
    return kind("what is wrong")


EXPECTED = {
    services.errors.UnknownDictionary: (CODE.NOT_FOUND, "UNKNOWN_DICTIONARY"),
    services.errors.UnknownFeature: (CODE.NOT_FOUND, "UNKNOWN_FEATURE"),
    services.errors.UnknownAttribute: (CODE.NOT_FOUND, "UNKNOWN_ATTRIBUTE"),
    errors.UnknownModel: (CODE.NOT_FOUND, "UNKNOWN_MODEL"),
    InvalidInput: (CODE.INVALID_ARGUMENT, "INVALID_INPUT"),
    services.errors.NotCalibrated: (CODE.FAILED_PRECONDITION, "MODEL_NOT_CALIBRATED"),
    services.errors.NoPipeline: (CODE.UNIMPLEMENTED, "NO_PIPELINE"),
    services.errors.SteeringUnsupported: (CODE.FAILED_PRECONDITION, "STEERING_UNSUPPORTED"),
    services.errors.GenerationFailed: (CODE.INTERNAL, "GENERATION_FAILED"),
    BundleError: (CODE.FAILED_PRECONDITION, "BUNDLE_INVALID"),
    errors.MalformedRequest: (CODE.INVALID_ARGUMENT, "REQUEST_MALFORMED"),
    errors.RequestTooLarge: (CODE.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE"),
    errors.TooManyCalls: (CODE.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS"),
    QueueFull: (CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    DeadlineExpired: (CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    TimeoutError: (CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.StreamIdle: (CODE.ABORTED, "STREAM_IDLE"),
    errors.StreamNeedsHttp2: (CODE.UNIMPLEMENTED, "STREAM_NEEDS_HTTP2"),
    errors.RequestSlow: (CODE.RESOURCE_EXHAUSTED, "REQUEST_SLOW"),
    errors.AnswerNotTaken: (CODE.ABORTED, "ANSWER_NOT_TAKEN"),
    errors.EncoderUnavailable: (CODE.UNAVAILABLE, "MODEL_UNAVAILABLE"),
    errors.Starting: (CODE.UNAVAILABLE, "MODEL_STARTING"),
    errors.TokenMissing: (CODE.UNAUTHENTICATED, "TOKEN_MISSING"),
    tokens.UnknownToken: (CODE.UNAUTHENTICATED, "TOKEN_UNKNOWN"),
    tokens.ExpiredToken: (CODE.UNAUTHENTICATED, "TOKEN_EXPIRED"),
    errors.ScopeMissing: (CODE.PERMISSION_DENIED, "SCOPE_MISSING"),
    errors.TokenBusy: (CODE.RESOURCE_EXHAUSTED, "TOKEN_BUSY"),
    errors.TokenRate: (CODE.RESOURCE_EXHAUSTED, "TOKEN_RATE"),
    errors.Draining: (CODE.UNAVAILABLE, "DRAINING"),
    BatcherClosed: (CODE.UNAVAILABLE, "DRAINING"),
    asyncio.CancelledError: (CODE.CANCELLED, "CANCELLED"),
}


def test_the_walk_covers_the_table() -> None:
    assert {kind for kind, _ in TABLE} == set(EXPECTED)


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_each_row_gives_its_status_and_reason(kind: type[BaseException]) -> None:
    code, status = describe(make(kind), 0.5)
    info = details(status)["ErrorInfo"]
    assert (code, info.reason) == EXPECTED[kind]  # type: ignore[attr-defined]
    assert info.domain == DOMAIN  # type: ignore[attr-defined]
    assert status.code == code.value[0]
    assert status.message


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_retry_info_comes_with_shedding_and_with_nothing_else(kind: type[BaseException]) -> None:
    code, status = describe(make(kind), 1.25)
    retry = details(status).get("RetryInfo")
    may_retry = code is CODE.UNAVAILABLE or kind in (
        QueueFull,
        errors.RequestSlow,
        errors.TooManyCalls,
        errors.TokenBusy,
        errors.TokenRate,
    )
    assert (retry is not None) == may_retry
    if retry is not None:
        assert retry.retry_delay.ToTimedelta().total_seconds() == 1.25  # type: ignore[attr-defined]


def domain_errors() -> list[type[MonofacetError]]:
    return [
        kind
        for _, kind in inspect.getmembers(services.errors, inspect.isclass)
        if issubclass(kind, InvalidInput)
    ]


@pytest.mark.parametrize("kind", domain_errors(), ids=lambda kind: kind.__name__)
def test_every_error_of_input_names_its_field(kind: type[MonofacetError]) -> None:
    code, status = describe(make(kind), 0.5)
    found = details(status)
    assert code in (CODE.INVALID_ARGUMENT, CODE.NOT_FOUND)
    assert found["ErrorInfo"].reason == kind.default_reason  # type: ignore[attr-defined]
    (violation,) = found["BadRequest"].field_violations  # type: ignore[attr-defined]
    assert violation.field == "inputs[2].image.data"


def test_what_nobody_foresaw_leaves_no_trace_and_no_path(caplog: pytest.LogCaptureFixture) -> None:
    code, status = describe(OSError("/home/someone/secret.safetensors"), 0.5)
    assert code is CODE.INTERNAL
    assert b"secret" not in status.SerializeToString()
    assert "OSError" not in status.message
    reference = status.message.rsplit(" ", 1)[1]
    assert reference in caplog.text


@pytest.mark.parametrize(
    "cause",
    [errors.EncoderUnavailable("no model"), InvalidInput("bad", [("inputs[2]", "bad")]), OSError("disk")],
)
def test_what_a_replica_raised_is_told_without_rays_stack_trace(cause: Exception) -> None:
    wrapped = RayTaskError("score", 'File "/srv/secret.py", line 1', cause, "replica", 7, "10.9.8.7")
    code, status = describe(wrapped.as_instanceof_cause(), 0.5, "abc")
    expected_code, expected = describe(cause, 0.5, "abc")
    assert code is expected_code
    assert status == expected
    assert b"secret" not in status.SerializeToString() and b"10.9.8.7" not in status.SerializeToString()


def test_an_unservable_bundle_keeps_its_path_to_itself() -> None:
    _, status = describe(BundleError("/srv/bundles/emoji: wrong hash"), 0.5)
    assert b"/srv" not in status.SerializeToString()


def test_an_error_that_knows_when_to_come_back_says_so() -> None:
    _, status = describe(errors.TokenRate("slow down", 7.5), 0.5)
    assert details(status)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 7.5  # type: ignore[attr-defined]


def test_every_error_carries_its_request_id() -> None:
    _, status = describe(QueueFull(), 0.5, "abc")
    assert details(status)["ErrorInfo"].metadata["request_id"] == "abc"  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [1, 2, 40, 100, 256, 4_096])
@pytest.mark.parametrize("what", ["short", "101 tokens; the context holds 77", "long " * 200], ids=len)
def test_of_many_fields_at_fault_the_first_are_named_in_order_and_the_others_counted(
    count: int, what: str
) -> None:
    fields = [f"inputs[{n}].text" for n in range(count)]
    error = InvalidInput("m" * 2_000, [(field, what) for field in fields])
    _, status = describe(error, 0.5, "r" * 128)
    assert status.ByteSize() <= MAX_STATUS_BYTES
    named = details(status)["BadRequest"].field_violations  # type: ignore[attr-defined]
    assert [violation.field for violation in named] == fields[: len(named)]
    left = count - len(named) + 1
    assert named[-1].description == (f"and {left} more like it" if left > 1 else named[0].description)
    assert len(named) >= min(count, 4)


def test_an_overlong_message_and_field_are_cut_between_characters() -> None:
    _, status = describe(InvalidInput("é" * 5_000, [("é" * 5_000, "é" * 5_000)]), 0.5)
    (violation,) = details(status)["BadRequest"].field_violations  # type: ignore[attr-defined]
    for text in (status.message, violation.field, violation.description):
        assert text.endswith("é...")
        assert len(text.encode()) <= MAX_MESSAGE_BYTES
    assert status.ByteSize() <= MAX_STATUS_BYTES
