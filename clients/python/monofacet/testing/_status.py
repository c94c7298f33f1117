"""Errors as Monofacet's server makes them."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from monofacet._status import DETAILS_KEY


def status_with_details(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    violations: dict[str, str] | None = None,
    retry_after: float | None = None,
) -> status_pb2.Status:
    """Make a status as Monofacet's server makes them.

    Parameters
    ----------
    code
        The status code.
    message
        The message.
    reason
        Of the ErrorInfo; empty for none.
    violations
        Descriptions by field path, for a BadRequest.
    retry_after
        Seconds, for a RetryInfo.

    Returns
    -------
    google.rpc.Status
        With those details.
    """
    details: list[Any] = []
    if reason:
        details.append(error_details_pb2.ErrorInfo(reason=reason, domain="monofacet"))
    if violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
            for field, description in violations.items()
        ]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        container = any_pb2.Any()
        container.Pack(detail)
        packed.append(container)
    return status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message, details=packed)


class _Status(grpc.Status):  # type: ignore[misc]
    def __init__(self, status: status_pb2.Status) -> None:
        self.code = grpc.StatusCode[code_pb2.Code.Name(status.code)]
        self.details = status.message
        self.trailing_metadata = ((DETAILS_KEY, status.SerializeToString()),)


def abort(context: Any, code: grpc.StatusCode, message: str, **details: Any) -> NoReturn:
    """End a call as Monofacet's server does.

    Parameters
    ----------
    context
        Of the call.
    code, message, **details
        As for `status_with_details`.
    """
    context.abort_with_status(_Status(status_with_details(code, message, **details)))
    raise AssertionError("abort_with_status returned")
