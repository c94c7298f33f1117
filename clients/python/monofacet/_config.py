"""How a client connects, waits and tries again."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from monofacet import _exceptions as exceptions
from monofacet._version import __version__

__all__ = ["TLS", "Retry", "Timeout"]

# Calls in progress of one client. Enough to fill the server's batches; more would only wait there.
MAX_IN_FLIGHT = 64

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
    """When a call with one answer is tried again. All calls of the contract can be repeated safely.

    A server that says when to come back (RetryInfo), because it sheds load, starts, stops or has lost a model, is
    asked again until the call's timeout ends, and never earlier than it said. A server that is UNAVAILABLE and says
    nothing, such as one that does not run, is asked `attempts` times. No other failure is tried again, and no stream
    of which a part was answered.

    Each further try is logged at DEBUG by the logger ``monofacet``.

    Attributes
    ----------
    attempts
        Tries in all of a server that says nothing, at least 1; 1 turns all retries off. Default 4.
    wait_initial
        Seconds before the second try, doubled with each further one. Default 0.1.
    wait_jitter
        Up to this many seconds are added at random, so that callers do not come back together; doubled in the same
        way. Default 0.5.
    wait_max
        What neither of the two grows past, in seconds. A server may ask for a longer wait. Default 5.
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
    key: str | Path | bytes | None = field(default=None, repr=False)
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
    # `dns:///host:port` has an authority between its slashes; `ipv4:` and `ipv6:` take several addresses.
    addresses = re.sub(r"^(dns:|ipv4:|ipv6:)?(//[^/]*/)?", "", target).split(",")
    return all(_is_loopback(address) for address in addresses)


def _is_loopback(address: str) -> bool:
    name, colon, port = address.rpartition(":")
    # The port may be left out, and an IPv6 address without one has colons of its own.
    host = name if colon and port.isdecimal() and (":" not in name or name.endswith("]")) else address
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
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
    token: str | None = field(default=None, repr=False)
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
        if is_loopback(self.target):
            # A proxy reaches its own machine by these names, not this one. gRPC asks none for a Unix socket; for
            # other hosts it reads http_proxy and no_proxy.
            options.append(("grpc.enable_http_proxy", 0))
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
