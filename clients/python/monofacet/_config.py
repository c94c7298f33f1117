"""How a client connects, waits and tries again."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

from monofacet import _exceptions as exceptions
from monofacet._version import __version__

__all__ = ["TLS", "Retry", "Timeout"]

# A modality table of a large dictionary has tens of thousands of rows; gRPC's own 4 MiB would cut it off.
MAX_RESPONSE_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Timeout:
    """How long calls may take. There is always a limit, so that a lost server never hangs its callers.

    Attributes
    ----------
    call
        Seconds for a call with one answer, all its retries included. Default 60.
    stream
        Seconds for a whole stream (`stream_encode`, `score_modality`). Default 3,600.
    """

    call: float = 60.0
    stream: float = 3600.0

    def __post_init__(self) -> None:
        if not (0 < self.call < float("inf") and 0 < self.stream < float("inf")):
            raise exceptions.InputError("timeouts are positive, finite numbers of seconds")


@dataclass(frozen=True, slots=True)
class Retry:
    """When a call with one answer is tried again.

    Calls are tried again after UNAVAILABLE, and after RESOURCE_EXHAUSTED if the server says when to come
    back. All calls of the contract can be repeated safely. A stream is not tried again: part of it was
    answered.

    A server that says when to come back (RetryInfo) is never asked earlier. If it is UNAVAILABLE, because it
    starts, stops or has lost a model, the call goes on trying for as long as its timeout allows: such a
    server is about to be back. After any other failure `attempts` is the bound.

    Attributes
    ----------
    attempts
        Tries in all, at least 1; 1 turns retries off. Default 4.
    wait_initial
        Seconds before the second try, doubled with each further one, plus jitter. Default 0.1.
    wait_max
        The longest wait in seconds. Default 5.
    wait_jitter
        Up to this many seconds are added at random, so that callers do not come back together. Default 0.5.
    """

    attempts: int = 4
    wait_initial: float = 0.1
    wait_max: float = 5.0
    wait_jitter: float = 0.5

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.wait_initial, self.wait_max, self.wait_jitter) < 0:
            raise exceptions.InputError("a retry needs at least 1 attempt, and waits of 0 seconds or more")


@dataclass(frozen=True, slots=True)
class TLS:
    """Keys of an encrypted connection. Each may be a path to a PEM file or its content as bytes.

    Attributes
    ----------
    ca
        Certificates to trust. Default: the system's, as gRPC finds them.
    certificate
        The client's own certificate chain, for a server that asks for one (mTLS).
    key
        The private key of that certificate.
    server_name
        The name to expect in the server's certificate, if it is not the host of the target.
    """

    ca: str | Path | bytes | None = None
    certificate: str | Path | bytes | None = None
    key: str | Path | bytes | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Returns
        -------
        grpc.ChannelCredentials
            For a secure channel.

        Raises
        ------
        InputError
            If a file cannot be read, or only one of `certificate` and `key` is set.
        """
        if (self.certificate is None) != (self.key is None):
            raise exceptions.InputError(
                "a client certificate and its key belong together: set both or neither"
            )
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.certificate))


def _pem(source: str | Path | bytes | None) -> bytes | None:
    if source is None or isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise exceptions.InputError(f"cannot read {source}: {error.strerror}") from error


def is_loopback(target: str) -> bool:
    """Tell whether a target stays on this machine.

    Parameters
    ----------
    target
        ``host:port`` or a gRPC URI.

    Returns
    -------
    bool
        True for ``localhost``, loopback addresses and Unix sockets.
    """
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.rpartition("/")[2].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Connection:
    """All that a channel is made from.

    Attributes
    ----------
    target
        ``host:port`` or a gRPC URI.
    token
        Sent as ``authorization: Bearer ...`` with each call, without the whitespace around it.
    tls
        True for TLS with the system's certificates, a `TLS` for others. False and None are plain text.
    """

    target: str
    token: str | None = None
    tls: TLS | bool | None = None

    def __post_init__(self) -> None:
        if "://" in self.target and self.target.partition("://")[0] in ("http", "https", "grpc", "grpcs"):
            raise exceptions.InputError(f"the target is host:port without a scheme, not {self.target!r}")
        if not self.target:
            raise exceptions.InputError("the target is empty; it is host:port")
        if self.token:
            # A token that was read from a file ends with the file's last line break, which no header may hold.
            object.__setattr__(self, "token", self.token.strip())
        if self.token and not all("!" <= character <= "~" for character in self.token):
            # It stays out of the message: messages end up in logs.
            raise exceptions.InputError("a token is printable ASCII without spaces, which this one is not")
        if self.token and self.tls is None and not is_loopback(self.target):
            raise exceptions.InputError(
                "a token would travel unencrypted: pass tls=True or a TLS, or tls=False on a private network"
            )

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Make the channel's credentials.

        Returns
        -------
        grpc.ChannelCredentials or None
            None for plain text.
        """
        if not self.tls:
            return None
        return (TLS() if self.tls is True else self.tls).credentials()

    def options(self) -> list[tuple[str, str | int]]:
        """Choose the channel's options.

        Returns
        -------
        list of tuple
            For `grpc.insecure_channel` and its siblings.
        """
        options: list[tuple[str, str | int]] = [
            ("grpc.primary_user_agent", f"monofacet-python/{__version__}"),
            # A name with several addresses is several gateways: share the calls, and outlive one of them.
            ("grpc.lb_policy_name", "round_robin"),
            # The server's limit is the one that counts: its refusal says what the limit is.
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
        ]
        if isinstance(self.tls, TLS) and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Make what goes with each call.

        Returns
        -------
        tuple of tuple
            The authorization, or nothing.
        """
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()
