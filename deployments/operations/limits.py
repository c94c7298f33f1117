"""The settings that bound what one request and all of them together may cost: memory, places and seconds.

Each has its unit, its default, and why that default; `deployments.operations.settings` says how they are set.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.encoding.images import MAX_PIXELS, ImageLimits

MIB = 1024 * 1024


class Limits(BaseSettings):
    """The limits of one server; `Settings` has them with everything else."""

    model_config = SettingsConfigDict(env_prefix="MONOFACET_", frozen=True, extra="ignore")

    # Of one request. GetModel answers all of them.
    max_request_bytes: int = Field(
        32 * MIB, ge=1, description="Bytes of one request message: 256 photographs of 128 KiB."
    )
    max_response_bytes: int = Field(
        64 * MIB, ge=1, description="Bytes of one response message: dense features of a full request."
    )
    max_items: int = Field(
        256, ge=1, le=256, description="Items of one unary request. More is what the streams are for."
    )
    max_image_bytes: int = Field(16 * MIB, ge=1, le=16 * MIB, description="Encoded bytes of one image.")
    max_image_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=MAX_PIXELS,
        description="Pixels of one image, checked in its header before it is decoded: a small file can "
        "unpack to gigabytes.",
    )
    min_image_side: int = Field(4, ge=1, description="Pixels of the shorter side of one image, at least.")
    max_image_aspect_ratio: int = Field(
        32,
        ge=1,
        description="Longer side of one image over its shorter one: resizing a sliver by its short side "
        "would make its long side enormous.",
    )
    max_decode_s: float = Field(
        4.0,
        gt=0,
        description="Seconds of one core that decoding one image may take, by an estimate from its size, depth and "
        "scans, made before it is decoded; on a slow core it may take twice that. A progressive JPEG of 100 KB can ask "
        "for minutes. 40 megapixels take 1 to 3.8, so only what asks for more scans than any camera is refused.",
    )
    max_image_parts: int = Field(
        16_384,
        ge=256,
        description="Chunks of one PNG or WebP, markers of one JPEG: each takes microseconds to step over, and 16 MiB "
        "hold millions. Files have a few dozen, those written in small pieces 2,000.",
    )
    max_text_bytes: int = Field(
        8 * 1024,
        ge=1,
        le=64 * 1024,
        description="UTF-8 bytes of one text that may not be cut. CLIP reads 77 tokens, about 400 bytes; the tail of a "
        "longer text changes nothing and costs time to read. Where `truncate_text` allows it, a text of any length is "
        "read so far, and up to 16,384 characters if that holds fewer than 77 tokens.",
    )
    max_score_pairs: int = Field(
        4_096,
        ge=2,
        description="Pairs of one ScoreModality stream. Bounds the dense activations that are scored: twice "
        "128 MiB for 8,192 features.",
    )
    max_audit_items: int = Field(
        20_000,
        ge=4,
        description="Items of one AuditGender stream. Of each its embedding, active features and labels are kept, "
        "about 4 x embed_dim + 8 x active features + 600 bytes: 40 MB for 20,000 of the embedded bundle.",
    )
    max_page_size: int = Field(1_000, ge=1, le=1_000, description="Feature cards of one page.")

    # Overload and time.
    max_concurrent_calls: int = Field(
        512, ge=1, description="RPCs in progress at once; one more is refused, so that memory is bounded."
    )
    max_held_bytes: int = Field(
        512 * MIB,
        ge=1,
        description="Memory for unary requests, from before they are read until they are answered. gRPC says how "
        "large a message is only once it has it, so each that is being read counts as `max_request_bytes`: 15 at once, "
        "7 of one caller, each for milliseconds unless it is sent slowly. Others wait.",
    )
    read_s: float = Field(
        60.0,
        gt=0,
        description="Seconds in which a unary request must have come: 32 MiB at 4.5 Mbit/s.",
    )
    read_patience_s: float = Field(
        5.0,
        gt=0,
        description="The same while others wait for the room that it takes. An image of 3 MiB takes 5 s at 5 Mbit/s.",
    )
    max_streams: int = Field(
        64,
        ge=1,
        description="Client streams (StreamEncode, AuditGender, ScoreModality) at once, half of them of one caller. "
        "Each may hold a message that has half come and a window of items: `max_request_bytes` each.",
    )
    stream_idle_s: float = Field(
        600.0,
        gt=0,
        description="Seconds that a client stream may send nothing before it is ended: some wait for a person.",
    )
    stream_patience_s: float = Field(
        30.0, gt=0, description="The same while another caller waits for its place."
    )
    untaken_s: float = Field(
        60.0,
        gt=0,
        description="Seconds in which the caller of a stream must take an answer, or its call is ended.",
    )
    max_watchers: int = Field(
        64, ge=2, description="Watch calls of the health service at once, half of them from one address."
    )
    max_connections: int = Field(
        1_000,
        ge=1,
        description="Connections to the gRPC port; one more is closed. Each costs about 100 KB, and a file descriptor, "
        "of which a process often has 1,024.",
    )
    max_connection_calls: int = Field(
        512,
        ge=1,
        description="Calls of one connection at once. 10,000 streams that are opened and reset at once held up others "
        "for 0.3 s with 512, 0.8 s with 1,024 and 6 s without it; a client that has more in progress sees some fail.",
    )
    handshake_s: float = Field(
        10.0, gt=0, description="Seconds in which a new connection must have said who it is (TLS, HTTP/2)."
    )
    connection_idle_s: float = Field(
        900.0,
        gt=0,
        description="Seconds without a call after which a connection is closed; clients reconnect.",
    )
    connection_age_s: float = Field(
        3_600.0,
        gt=0,
        description="Seconds after which a connection takes no new calls, so that clients come back through their "
        "balancer; those in progress go on.",
    )
    connection_age_grace_s: float = Field(
        86_400.0,
        gt=0,
        description="Seconds that calls may go on after that: a corpus takes hours. Then the connection is closed, "
        "which also frees what a caller holds that takes no answers.",
    )
    max_client_streams: int = Field(
        4,
        ge=1,
        description="AuditGender and ScoreModality streams at once on one gateway. What they keep stays until they are "
        "answered, so this bounds the memory of all of them; one more is refused.",
    )
    client_stream_idle_s: float = Field(
        60.0,
        gt=0,
        description="Seconds that an AuditGender or ScoreModality stream may send nothing before it is ended: it has "
        "one of `max_client_streams` places, which others wait for.",
    )
    max_queued_items: int = Field(
        1_024,
        ge=1,
        description="Items at the encoder, waiting or running; one more is refused at once. Bounds memory; of "
        "it streams, which can be made to wait, take at most half.",
    )
    max_queue_s: float = Field(
        0.2,
        gt=0,
        description="Seconds that a request of a burst may be expected to wait for the work before it, by the speed at "
        "which items were answered; one that would wait longer is refused at once. What fits one forward is not "
        "refused, nor is a request that waits for three times its own work.",
    )
    overload_queue_s: float = Field(
        0.1,
        gt=0,
        description="The same while more than a fifth of all requests has to be refused: a standing queue delays every "
        "answer. Simulated: 0.06 kept half of the throughput of full batches, 0.1 three quarters, 0.15 nine tenths.",
    )
    retry_after_s: float = Field(
        0.5, gt=0, description="Seconds that RetryInfo asks a refused caller to wait."
    )
    default_deadline_s: float = Field(
        60.0, gt=0, description="Seconds a unary call may take when its caller set no deadline."
    )
    max_call_s: float = Field(
        0.0, ge=0, description="Seconds that any call may take; 0 sets no limit, since a corpus takes hours."
    )
    linger_s: float = Field(
        1.0,
        ge=0,
        description="Seconds that new calls are still taken once the server is stopping and says so: those "
        "that were sent before their callers could know.",
    )
    drain_s: float = Field(
        30.0, ge=0, description="Seconds that calls in flight may take to finish once the server is stopping."
    )
    drain_file: Path | None = Field(
        None,
        description="A gateway drains once this file exists: what a Kubernetes preStop hook can do. One that is "
        "left over from before is removed at the start.",
    )

    @property
    def image_limits(self) -> ImageLimits:
        """What an image may be."""
        return ImageLimits(
            self.max_image_bytes,
            self.max_image_pixels,
            self.min_image_side,
            self.max_image_aspect_ratio,
            self.max_decode_s,
            self.max_image_parts,
        )
