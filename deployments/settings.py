"""Every knob of the server: its unit, its default, and why that default.

Each field is read from an environment variable, `MONOFACET_` and the field's name in capitals
(`MONOFACET_PORT=9001`). `monofacet serve` has flags for the few that change from one start to the next.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024
EMBEDDED_BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "emoji"

Backend = Literal["auto", "torch", "openvino"]


def _usable_cores() -> int:
    """Count the cores this process may run on, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Settings(BaseSettings):
    """Settings of one server; immutable, and pickled to every replica so that all of them agree."""

    model_config = SettingsConfigDict(env_prefix="MONOFACET_", frozen=True, extra="ignore")

    # What is served.
    bundle: Path = Field(
        EMBEDDED_BUNDLE,
        description="Directory of the bundle. Default: the small real one that ships with the repository.",
    )
    backend: Backend = Field(
        "auto",
        description="What runs the towers. auto: torch on a GPU, OpenVINO on a CPU where it is installed.",
    )
    precision: Literal["auto", "f32", "bf16", "f16"] = Field(
        "auto",
        description="Arithmetic of the towers. auto: bf16 for OpenVINO on a CPU that has it, else f32.",
    )
    threads: int = Field(
        default_factory=_usable_cores,
        ge=1,
        description="Threads of one tower forward. Default: the usable cores; Ray by itself would set 1.",
    )
    decode_threads: int = Field(
        default_factory=lambda: max(1, min(4, _usable_cores())),
        ge=1,
        description="Threads that decode images beside the model; Pillow releases the interpreter lock.",
    )

    # Where it listens.
    host: str = Field(
        "127.0.0.1",
        description="Address of the gRPC and metrics ports. Loopback by default: nothing listens to a "
        "network before someone asks for it.",
    )
    port: int = Field(9000, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int = Field(9100, ge=0, le=65535, description="Prometheus port; 0 takes a free one.")
    loopback_only: bool = Field(
        True,
        description="Keep Ray's own ports on loopback. Off on a cluster, whose nodes must reach each other.",
    )

    # Limits of one request. GetModel answers all of them.
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
        40_000_000,
        ge=1,
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
    max_text_bytes: int = Field(
        8 * 1024,
        ge=1,
        le=64 * 1024,
        description="UTF-8 bytes of one text. CLIP reads 77 tokens, about 400 bytes; the tail of a longer "
        "text changes nothing and costs time to read.",
    )
    max_score_pairs: int = Field(
        4_096,
        ge=2,
        description="Pairs of one ScoreModality stream. Bounds the dense activations that are scored: twice "
        "128 MiB for 8,192 features.",
    )
    max_page_size: int = Field(1_000, ge=1, le=1_000, description="Feature cards of one page.")

    # Overload and time.
    max_concurrent_calls: int = Field(
        512, ge=1, description="RPCs in progress at once; one more is refused, so that memory is bounded."
    )
    max_queued_items: int = Field(
        1_024,
        ge=1,
        description="Items waiting for the encoder; one more is refused at once, since an answer that comes "
        "after its deadline helps nobody.",
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
    drain_s: float = Field(
        30.0, ge=0, description="Seconds that calls in flight may take to finish once the server is stopping."
    )

    # Batching.
    max_batch_items: int = Field(
        32,
        ge=1,
        description="Items of one tower forward. On a CPU larger batches add latency and no throughput.",
    )
    stream_window: int = Field(
        64,
        ge=1,
        description="Items of one stream in progress at once: two full batches, so that the model never "
        "waits for the stream and memory stays bounded.",
    )
    coalesce_items: int = Field(
        64,
        ge=1,
        description="Items that the gateway sends to the encoder in one message. A message costs 2-3 ms of "
        "CPU whatever it holds, so what waits together travels together.",
    )
    direct_items: int = Field(
        16,
        ge=1,
        description="A request of at least this many items travels alone: it is worth its message, and it "
        "cannot hold back the small ones.",
    )
    messages_in_flight: int = Field(
        2,
        ge=1,
        description="Gathered messages on their way to the encoder at once: one is computed while the next "
        "is decoded. More would only make them smaller.",
    )

    # Scale.
    encoder_replicas: int = Field(1, ge=1, description="Replicas of the encoder; each holds the towers.")
    object_store_bytes: int = Field(
        128 * MIB,
        ge=80 * MIB,
        description="Ray's shared memory. Only messages over 100 KB pass through it, and none stays.",
    )
