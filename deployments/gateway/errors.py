"""One table from exceptions to statuses; nothing else words an error for a caller.

Nothing that is not in the table is described: its caller reads INTERNAL and a reference that the log
repeats beside the stack trace, so that no trace, path or host leaves the process.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from deployments.access.tokens import ExpiredToken, UnknownToken
from deployments.batching import BatcherClosed, DeadlineExpired, QueueFull
from services.errors import (
    BundleError,
    GenerationFailed,
    InvalidInput,
    MonofacetError,
    NoPipeline,
    NotCalibrated,
    SteeringUnsupported,
    UnknownAttribute,
    UnknownDictionary,
    UnknownFeature,
    Violation,
)

DOMAIN = "monofacet"
STARTING = "the models are being loaded; try later"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
# Bytes of a serialised status. It travels in the trailing metadata, of which a receiver takes 8 KiB: above, gRPC's own
# library refuses it now and then, and always above 16 KiB, and the caller reads RESOURCE_EXHAUSTED without a reason.
# A peer that counts base64 finds 5.3 KiB here, and beside it the message again and the request's id.
MAX_STATUS_BYTES = 4 * 1024
# Bytes of UTF-8 of a status message; percent-encoded it may be three times as long.
MAX_MESSAGE_BYTES = 512
# Likewise of one field path: a name that the caller chose may be in it.
_MAX_FIELD_BYTES = 256
# Of what wraps a detail: its type's address, tags and lengths.
_WRAPPING_BYTES = 64

log = logging.getLogger("monofacet.gateway")


class GatewayError(Exception):
    """An error that the gateway itself finds; its message is fit for a caller."""


class RequestTooLarge(GatewayError):
    """The request message has more bytes than allowed."""


class MalformedRequest(GatewayError):
    """The request's bytes are not the message that the method takes."""


class TooManyCalls(GatewayError):
    """As many calls as allowed are in progress."""


class StreamIdle(GatewayError):
    """The stream sent nothing for so long that its place was given to others."""


class RequestSlow(GatewayError):
    """The request did not come in time, and others waited for the room that it takes."""


class StreamNeedsHttp2(GatewayError):
    """The call streams both ways and came over HTTP/1.1."""


class AnswerNotTaken(GatewayError):
    """The caller did not take an answer in time."""


class EncoderUnavailable(GatewayError):
    """No encoder answered: its replica died or is starting."""


class Starting(GatewayError):
    """The models are not warm yet."""


class TokenMissing(GatewayError):
    """The server has tokens and the call carries none."""


class ScopeMissing(GatewayError):
    """The token may not call this method."""


class TokenBusy(GatewayError):
    """As many calls of this token as allowed are in progress."""


class TokenRate(GatewayError):
    """The token began as many calls as it may.

    Parameters
    ----------
    message
        For the caller.
    retry_after_s
        Seconds until its next call fits.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(GatewayError):
    """The server is stopping and takes no new calls."""


class UnknownModel(MonofacetError):
    """The server does not serve that bundle."""

    default_reason = "UNKNOWN_MODEL"


@dataclass(frozen=True, slots=True)
class Answer:
    """How one kind of exception is answered.

    Attributes
    ----------
    code
        The gRPC status.
    reason
        ErrorInfo's reason; None takes the exception's own.
    message
        The status message; None takes the exception's own, which must be fit for a caller.
    retry
        Whether RetryInfo says that the same call may succeed soon.
    """

    code: grpc.StatusCode
    reason: str | None
    message: str | None = None
    retry: bool = False


_Code = grpc.StatusCode

# The first row whose type matches decides, so a subclass stands above its parent.
TABLE: tuple[tuple[type[BaseException], Answer], ...] = (
    (UnknownDictionary, Answer(_Code.NOT_FOUND, None)),
    (UnknownFeature, Answer(_Code.NOT_FOUND, None)),
    (UnknownAttribute, Answer(_Code.NOT_FOUND, None)),
    (UnknownModel, Answer(_Code.NOT_FOUND, None)),
    (InvalidInput, Answer(_Code.INVALID_ARGUMENT, None)),
    (NotCalibrated, Answer(_Code.FAILED_PRECONDITION, None)),
    (NoPipeline, Answer(_Code.UNIMPLEMENTED, None)),
    (SteeringUnsupported, Answer(_Code.FAILED_PRECONDITION, None)),
    (GenerationFailed, Answer(_Code.INTERNAL, None)),
    (BundleError, Answer(_Code.FAILED_PRECONDITION, None, "the bundle cannot be served")),
    (MalformedRequest, Answer(_Code.INVALID_ARGUMENT, "REQUEST_MALFORMED")),
    (RequestTooLarge, Answer(_Code.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE")),
    (TooManyCalls, Answer(_Code.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS", retry=True)),
    (StreamIdle, Answer(_Code.ABORTED, "STREAM_IDLE")),
    (RequestSlow, Answer(_Code.RESOURCE_EXHAUSTED, "REQUEST_SLOW", retry=True)),
    (StreamNeedsHttp2, Answer(_Code.UNIMPLEMENTED, "STREAM_NEEDS_HTTP2")),
    (AnswerNotTaken, Answer(_Code.ABORTED, "ANSWER_NOT_TAKEN")),
    (QueueFull, Answer(_Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full; try later", retry=True)),
    (DeadlineExpired, Answer(_Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the deadline passed")),
    (TimeoutError, Answer(_Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the deadline passed")),
    (EncoderUnavailable, Answer(_Code.UNAVAILABLE, "MODEL_UNAVAILABLE", retry=True)),
    (Starting, Answer(_Code.UNAVAILABLE, "MODEL_STARTING", retry=True)),
    (TokenMissing, Answer(_Code.UNAUTHENTICATED, "TOKEN_MISSING")),
    (UnknownToken, Answer(_Code.UNAUTHENTICATED, "TOKEN_UNKNOWN", "the token is not known")),
    (ExpiredToken, Answer(_Code.UNAUTHENTICATED, "TOKEN_EXPIRED", "the token has expired")),
    (ScopeMissing, Answer(_Code.PERMISSION_DENIED, "SCOPE_MISSING")),
    (TokenBusy, Answer(_Code.RESOURCE_EXHAUSTED, "TOKEN_BUSY", retry=True)),
    (TokenRate, Answer(_Code.RESOURCE_EXHAUSTED, "TOKEN_RATE", retry=True)),
    (Draining, Answer(_Code.UNAVAILABLE, "DRAINING", "the server is stopping", retry=True)),
    (BatcherClosed, Answer(_Code.UNAVAILABLE, "DRAINING", "the server is stopping", retry=True)),
    (asyncio.CancelledError, Answer(_Code.CANCELLED, "CANCELLED", "the call was cancelled")),
)

_INTERNAL = Answer(_Code.INTERNAL, "INTERNAL")


def answer_for(error: BaseException) -> Answer:
    """Return the row of the table for `error`, or the row of unexpected exceptions."""
    return next((answer for kind, answer in TABLE if isinstance(error, kind)), _INTERNAL)


def unwrapped(error: BaseException) -> BaseException:
    """Return what a replica raised where `error` is Ray's copy of it: that one's text is a stack trace with paths."""
    # Such an error exists only where Ray is imported, and what runs without Ray need not import it.
    ray_errors = sys.modules.get("ray.exceptions")
    while ray_errors is not None and isinstance(error, ray_errors.RayTaskError):
        error = error.cause
    return error


def _pack(status: status_pb2.Status, detail: object) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)  # type: ignore[arg-type]
    status.details.append(packed)


def _cut(text: str, max_bytes: int) -> str:
    """Return `text` with its end left out where it has more than `max_bytes` of UTF-8."""
    # JSON may hold half of a surrogate pair, which UTF-8 cannot encode.
    encoded = text.encode(errors="replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - 3].decode(errors="ignore") + "..."


def _bad_request(violations: Sequence[Violation], room: int, common: str) -> error_details_pb2.BadRequest:
    """Return the first violations, as many as `room` bytes hold; where not all are, a last one counts the others.

    A reason is told where it is not the `common` one.
    """
    bad = error_details_pb2.BadRequest()
    listed = bad.field_violations
    for field, description, reason in violations:
        listed.add(
            field=_cut(field, _MAX_FIELD_BYTES),
            description=_cut(description, MAX_MESSAGE_BYTES),
            reason="" if reason == common else reason,
        )
        if bad.ByteSize() > room:
            break
    while bad.ByteSize() > room:
        # What counts the others takes the place of a violation, and may need more room than it left.
        del listed[-2:]
        left = len(violations) - len(listed)
        field = _cut(violations[len(listed)].path, _MAX_FIELD_BYTES)
        listed.add(field=field, description=f"and {left} more like it")
    return bad


def describe(
    error: BaseException, retry_after_s: float, request_id: str = ""
) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """Word `error` for a caller, and log it when it is not in the table.

    Parameters
    ----------
    error
        What ended the call.
    retry_after_s
        Seconds that RetryInfo asks for, where the table says that a retry may help and the error does not
        know better.
    request_id
        The call's name, which ErrorInfo repeats; empty for none.

    Returns
    -------
    The status code, and the rich status of at most `MAX_STATUS_BYTES`: ErrorInfo always, BadRequest for fields at
    fault (the first of them where there are many), RetryInfo when the call may be repeated.
    """
    raised, error = error, unwrapped(error)
    answer = answer_for(error)
    if answer is _INTERNAL:
        reference = request_id or secrets.token_hex(4)
        # As Ray raised it: with the replica's own stack trace.
        log.error("internal error %s", reference, exc_info=raised)
        message = f"internal error; the server's log knows it as {reference}"
    else:
        message = answer.message or str(error)
    own = error.reason if isinstance(error, MonofacetError) else "INTERNAL"
    status = status_pb2.Status(code=answer.code.value[0], message=_cut(message, MAX_MESSAGE_BYTES))
    metadata = {"request_id": request_id} if request_id else {}
    _pack(status, error_details_pb2.ErrorInfo(reason=answer.reason or own, domain=DOMAIN, metadata=metadata))
    if isinstance(error, InvalidInput | UnknownModel) and error.violations:
        room = MAX_STATUS_BYTES - status.ByteSize() - _WRAPPING_BYTES
        _pack(status, _bad_request(error.violations, room, answer.reason or own))
    if answer.retry:
        retry_after_s = getattr(error, "retry_after_s", None) or retry_after_s
        delay = duration_pb2.Duration(nanos=round(retry_after_s % 1 * 1e9), seconds=int(retry_after_s))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return answer.code, status


def reason_of(status: status_pb2.Status) -> str:
    """Return the ErrorInfo reason of a status made by `describe`."""
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return str(info.reason)
