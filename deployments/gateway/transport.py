"""What gRPC's own library is told to bound, before a call reaches Python."""

from __future__ import annotations

from deployments.operations.settings import Settings

# Calls that have arrived and that nobody has looked at yet: seconds of them at the rate at which they are refused.
_PENDING = 10_000
# Milliseconds between two pings of a caller; more often, three times, ends its connection.
PING_INTERVAL_MS = 5_000


def options(settings: Settings, largest_bytes: int) -> list[tuple[str, int]]:
    """Return the options of a server.

    Parameters
    ----------
    settings
        Of the server.
    largest_bytes
        Of one message.
    """
    return [
        ("grpc.max_receive_message_length", largest_bytes),
        ("grpc.max_send_message_length", settings.max_response_bytes),
        # Two servers on one port would share its callers between them without a word.
        ("grpc.so_reuseport", 0),
        # Beyond, gRPC itself drops calls with a bare CANCELLED; we refuse them with a reason.
        ("grpc.server.max_pending_requests", _PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _PENDING),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.max_connection_calls),
        ("grpc.server_handshake_timeout_ms", round(settings.handshake_s * 1e3)),
        ("grpc.max_connection_idle_ms", round(settings.connection_idle_s * 1e3)),
        ("grpc.max_connection_age_ms", round(settings.connection_age_s * 1e3)),
        ("grpc.max_connection_age_grace_ms", round(settings.connection_age_grace_s * 1e3)),
        # Probing a connection's speed, gRPC would read megabytes ahead of a call that nobody reads; without it, 64 KiB.
        # A message that is asked for may come at full speed all the same.
        ("grpc.http2.bdp_probe", 0),
        # What balancers and services send to see whether the other side is there, mostly once in 10 s or more. gRPC's
        # own limit is once in 5 minutes; after three that come sooner it ends the connection with all its calls.
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # The same the other way: a peer that has gone without a word is found out, and what it holds is given up.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
