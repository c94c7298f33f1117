"""HTTP/2 frame by frame, for what no gRPC client would send."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import hpack


def message(size: int, content: bytes = b"") -> bytes:
    """Return the beginning of a gRPC message of `size` bytes: its prefix and what is sent of it."""
    return struct.pack(">BI", 0, size) + content


def headers(path: str, token: str = "") -> list[tuple[str, str]]:
    """Return the headers of a call."""
    own = [("authorization", f"Bearer {token}")] if token else []
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *own,
    ]


class Raw:
    """One connection; every call of it blocks at most for the given time.

    Parameters
    ----------
    port
        Of the server, on the loopback interface.
    source
        Address to call from; all of 127.0.0.0/8 is this machine.
    window
        Bytes that the server may send on each stream; None for HTTP/2's default.
    """

    def __init__(self, port: int, source: str = "127.0.0.1", window: int | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.connection = h2.connection.H2Connection(config)
        self.connection.initiate_connection()
        if window is not None:
            self.connection.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.events: list[Any] = []
        self._flush()
        self.pump(0.5)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _flush(self) -> None:
        if data := self.connection.data_to_send():
            self.socket.settimeout(30)
            self.socket.sendall(data)

    def pump(self, seconds: float = 0.0) -> bool:
        """Take what the server sends within that time; return whether the connection stands."""
        self.socket.settimeout(max(seconds, 1e-6))
        try:
            data = self.socket.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return True
        except OSError:
            return False
        if not data:
            return False
        try:
            self.events += self.connection.receive_data(data)
        except h2.exceptions.ProtocolError:
            # h2 takes nothing after GOAWAY, but a server that ends a connection gently sends a ping behind it.
            if not self.gone:
                raise
            return True
        self._flush()
        return True

    def open(self, path: str, token: str = "", end: bool = False) -> int:
        """Open a stream; return its id."""
        stream: int = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream, headers(path, token), end_stream=end)
        self._flush()
        return stream

    def send(self, stream: int, data: bytes, seconds: float = 0.5) -> int:
        """Send what the server takes, until it takes no more for that time; return the bytes sent."""
        sent, end = 0, time.monotonic() + seconds
        while sent < len(data) and time.monotonic() < end:
            try:
                window = self.connection.local_flow_control_window(stream)
                size = min(window, self.connection.max_outbound_frame_size, len(data) - sent)
                if size > 0:
                    self.connection.send_data(stream, data[sent : sent + size])
                    self._flush()
                    sent, end = sent + size, time.monotonic() + seconds
            except (h2.exceptions.H2Error, OSError):
                return sent
            if not self.pump(0.0 if size > 0 else 0.02):
                return sent
        return sent

    def ping(self) -> None:
        """Send a ping."""
        self.connection.ping(b"12345678")
        self._flush()

    def status(self, stream: int, seconds: float = 10.0) -> dict[str, str]:
        """Return the trailers of a stream, or its headers where it has no others; empty when none come in time."""
        end = time.monotonic() + seconds
        kinds = (h2.events.TrailersReceived, h2.events.ResponseReceived)
        while time.monotonic() < end:
            for event in self.events:
                if isinstance(event, kinds) and event.stream_id == stream:
                    found = dict(event.headers)
                    if "grpc-status" in found:
                        return found
            if not self.pump(0.05):
                break
        return {}

    @property
    def gone(self) -> bool:
        """Whether the server has said that it ends the connection."""
        closed = h2.connection.ConnectionState.CLOSED
        return self.connection.state_machine.state is closed

    def reset_many(self, path: str, count: int, token: str = "") -> int:
        """Open streams and reset each at once, without a look at what the server says; return how many."""
        encoder, stream, sent = hpack.Encoder(), 1, bytearray()
        for done in range(count):
            block = encoder.encode(headers(path, token))
            sent += _frame(1, 4, stream, block) + _frame(3, 0, stream, struct.pack(">I", 8))
            stream += 2
            if len(sent) > 16_384 or done == count - 1:
                try:
                    self.socket.settimeout(30)
                    self.socket.sendall(bytes(sent))
                except OSError:
                    return done
                sent.clear()
        return count


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
