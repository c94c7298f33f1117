"""From gRPC status to the client's exceptions. Pure: no channel is touched."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from monofacet import _exceptions as exceptions

# Where gRPC carries a serialised google.rpc.Status.
DETAILS_KEY = "grpc-status-details-bin"

KINDS: dict[str, type[exceptions.CallError]] = {
    "INVALID_ARGUMENT": exceptions.InvalidInputError,
    "FAILED_PRECONDITION": exceptions.InvalidInputError,
    "OUT_OF_RANGE": exceptions.InvalidInputError,
    "NOT_FOUND": exceptions.NotFoundError,
    "UNAUTHENTICATED": exceptions.AuthenticationError,
    "PERMISSION_DENIED": exceptions.AuthenticationError,
    "RESOURCE_EXHAUSTED": exceptions.OverloadedError,
    "UNAVAILABLE": exceptions.UnavailableError,
    "DEADLINE_EXCEEDED": exceptions.DeadlineError,
    "CANCELLED": exceptions.CallCancelledError,
    "ABORTED": exceptions.CallCancelledError,
    "UNIMPLEMENTED": exceptions.UnsupportedError,
}


def error_from_status(status: status_pb2.Status) -> exceptions.CallError:
    """Make the exception for a google.rpc.Status.

    Parameters
    ----------
    status
        Code, message and details. Details of unknown types are left out.

    Returns
    -------
    CallError
        Of the class that the code stands for.
    """
    known = status.code in code_pb2.Code.values()
    code = code_pb2.Code.Name(status.code) if known else "UNKNOWN"
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    has_retry = False
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
        elif detail.Is(retry.DESCRIPTOR):
            has_retry = detail.Unpack(retry)
    return KINDS.get(code, exceptions.ServerError)(
        status.message,
        code=code,
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=tuple(
            exceptions.Violation(violation.field, violation.description, violation.reason or info.reason)
            for violation in bad.field_violations
        ),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
    )


def error_from_rpc(error: grpc.RpcError) -> exceptions.CallError:
    """Make the exception for what gRPC raised.

    Parameters
    ----------
    error
        Of a synchronous or an asyncio call.

    Returns
    -------
    CallError
        Of the class that the code stands for, with the details of the trailing metadata.
    """
    call: Any = error
    # The future of a call that was cancelled raises an error without a code.
    without = "CANCELLED" if isinstance(error, grpc.FutureCancelledError) else "UNKNOWN"
    name = call.code().name if hasattr(call, "code") else without
    message = (call.details() if hasattr(call, "details") else str(error)) or ""
    status = status_pb2.Status(code=code_pb2.Code.Value(name), message=message)
    metadata = call.trailing_metadata() if hasattr(call, "trailing_metadata") else None
    for key, value in metadata or ():
        if key == DETAILS_KEY:
            try:
                rich = status_pb2.Status.FromString(value)
            except DecodeError:
                continue
            # A proxy may have changed the code on the way; then the details belong to another error.
            if rich.code == status.code:
                status = rich
    return error_from_status(status)


def shift_violations(error: exceptions.CallError, field: str, offset: int) -> exceptions.CallError:
    """Count a split batch's inputs from the start of what the caller gave.

    Parameters
    ----------
    error
        The failure of a part; changed in place.
    field
        The repeated field that was split.
    offset
        Items before the part.

    Returns
    -------
    CallError
        The same error, ``inputs[2]`` turned into ``inputs[2 + offset]``.
    """
    pattern = re.compile(rf"\b{re.escape(field)}\[(\d+)\]")

    def shift(text: str) -> str:
        return pattern.sub(lambda match: f"{field}[{int(match.group(1)) + offset}]", text)

    error.violations = tuple(
        replace(violation, field=shift(violation.field)) for violation in error.violations
    )
    error.message = shift(error.message)
    return error
