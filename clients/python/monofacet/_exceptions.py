"""The client's exceptions.

::

    MonofacetError
    |-- InputError (also a ValueError)   a value cannot be sent: no such file, an array that is no image
    |-- ResponseError                    the answer does not fit the contract
    |-- ClosedError                      the client was closed
    `-- CallError                        the call failed: code, reason, violations, retry_after
        |-- InvalidInputError            INVALID_ARGUMENT, FAILED_PRECONDITION, OUT_OF_RANGE
        |-- NotFoundError                NOT_FOUND
        |-- AuthenticationError          UNAUTHENTICATED, PERMISSION_DENIED
        |-- OverloadedError              RESOURCE_EXHAUSTED
        |-- UnavailableError             UNAVAILABLE
        |-- DeadlineError                DEADLINE_EXCEEDED
        |-- CallCancelledError           CANCELLED, ABORTED
        |-- UnsupportedError             UNIMPLEMENTED
        `-- ServerError                  INTERNAL, UNKNOWN, DATA_LOSS and anything else
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "AuthenticationError",
    "CallCancelledError",
    "CallError",
    "ClosedError",
    "DeadlineError",
    "InputError",
    "InvalidInputError",
    "MonofacetError",
    "NotFoundError",
    "OverloadedError",
    "ResponseError",
    "ServerError",
    "UnavailableError",
    "UnsupportedError",
    "Violation",
]


@dataclass(frozen=True, slots=True)
class Violation:
    """What is wrong with one field of a request.

    Attributes
    ----------
    field
        Path of the field, such as ``inputs[2].image.data``.
    description
        What is wrong with it.
    reason
        A constant to branch on; that of the error, unless several fields are wrong in different ways.
    """

    field: str
    description: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class MonofacetError(Exception):
    """Anything that this client raises."""


class InputError(MonofacetError, ValueError):
    """A value that cannot be sent; no call was made for it."""


class ResponseError(MonofacetError):
    """An answer that does not fit the contract: another version of it, or not Monofacet."""


class ClosedError(MonofacetError):
    """A call of a client that was closed, before the call or while it ran."""

    def __init__(self, message: str = "the client is closed: make another one") -> None:
        super().__init__(message)


class CallError(MonofacetError):
    """A call that failed.

    Parameters
    ----------
    message
        What the server or the transport said.
    code
        Name of the gRPC status code, such as ``INVALID_ARGUMENT``.
    reason
        The server's machine-readable reason (UPPER_SNAKE), or an empty string.
    metadata
        What the server added to the reason.
    violations
        The fields that are wrong, each with a description.
    retry_after
        Seconds after which the server asks to try again, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from `args` alone, which would lose the keyword arguments between processes.
        return (_rebuild, (type(self), self.message, self.__dict__.copy()))

    def __str__(self) -> str:
        head = f"{self.code} {self.reason}".rstrip()
        lines = [f"{head}: {self.message}", *(f"  {violation}" for violation in self.violations)]
        return "\n".join(lines)


def _rebuild(kind: type[CallError], message: str, state: dict[str, object]) -> CallError:
    error = kind(message, code="")
    error.__dict__.update(state)
    return error


class InvalidInputError(CallError):
    """The server refused the request; `violations` names the fields."""


class NotFoundError(CallError):
    """There is no such dictionary, feature or bundle."""


class AuthenticationError(CallError):
    """The token is missing or wrong, or does not allow the call."""


class OverloadedError(CallError):
    """The server sheds load, or a limit was passed; `retry_after` says when to come back."""


class UnavailableError(CallError):
    """The server cannot be reached, or is not ready."""


class DeadlineError(CallError):
    """The call took longer than its timeout."""


class CallCancelledError(CallError):
    """The call was cancelled."""


class UnsupportedError(CallError):
    """The server cannot answer this call: an older version, not Monofacet, or a bundle without a pipeline.

    The last has the reason ``NO_PIPELINE``: every other call works.
    """


class ServerError(CallError):
    """The server failed."""
