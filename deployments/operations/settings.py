"""Every setting of the server but those of `limits` and `scale`: its unit, its default, and why that default.

Each field is read from an environment variable, `MONOFACET_` and the field's name in capitals
(`MONOFACET_PORT=9001`). `monofacet serve` has flags for the few that change from one start to the next.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import limits
from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from deployments.operations.addresses import is_loopback
from deployments.operations.limits import MIB, Limits
from deployments.operations.scale import Scale
from services.encoding.machine import usable_cores

EMBEDDED_BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "emoji"

Backend = Literal["auto", "torch", "openvino"]
# What Kubernetes sets MONOFACET_PORT to in every pod beside a Service named monofacet.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://.+:\d+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,]+")
_BUNDLE_ID = re.compile(r"[^@\s]+@[0-9a-f]{12,64}")


def service_links(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that would be settings, were they not Kubernetes' own.

    In each pod it sets NAME_PORT=tcp://ADDRESS:PORT for each Service of the namespace: MONOFACET_PORT for one that is
    called `monofacet`, MONOFACET_METRICS_PORT for `monofacet-metrics`.
    """
    names = (f"MONOFACET_{field.upper()}" for field in Settings.model_fields)
    return [name for name in names if _SERVICE_LINK.fullmatch(environment.get(name, ""))]


class Settings(Limits, Scale):
    """Settings of one server; immutable, and pickled to every replica so that all of them agree."""

    # What is served.
    bundle: Path = Field(
        EMBEDDED_BUNDLE,
        description="Directory of the bundle. Default: the small real one that ships with the repository.",
    )
    # Not decoded by pydantic-settings, which would take nothing but JSON.
    bundles: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="Directories of all bundles to serve, each with an encoder of its own; the first answers requests "
        "that name no bundle. In the environment separated by `:`, or a JSON list. Empty: `bundle` alone.",
    )
    bundle_ids: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Ids of the only bundles that may be served, each `name@` and at least the first 12 hex digits of "
        "its SHA-256, up to all 64. In the environment separated by commas, or a JSON list. Another ends the start "
        "with one line. Empty: any may be served. Whatever is set, a replica that starts again serves only the bundle "
        "that the server started with.",
    )
    backend: Backend = Field(
        "auto",
        description="What runs the towers. auto: torch on a GPU, OpenVINO on a CPU where it is installed, unless "
        "`tune` finds torch faster.",
    )
    precision: Literal["auto", "f32", "bf16", "f16"] = Field(
        "auto",
        description="Arithmetic of the towers. auto: bf16 on a GPU, and for OpenVINO on a CPU that has it; else f32.",
    )
    threads: int = Field(
        default_factory=usable_cores,
        ge=1,
        description="Threads of one tower forward. Default: the usable cores; Ray by itself would set 1.",
    )
    tune: bool = Field(
        True,
        description="Measure at the start, for about a second, which backend and how many threads run the towers "
        "fastest, of what `backend` and `threads` leave open: a value that is set is kept. The log says why. Off takes "
        "the defaults unmeasured.",
    )
    decode_threads: int = Field(
        default_factory=lambda: max(1, min(4, usable_cores())),
        ge=1,
        description="Threads that decode images beside the model; Pillow releases the interpreter lock. Half as many "
        "more, at least one, decode those that take long, and one reads texts, which wait for neither.",
    )

    # Where it listens.
    host: str = Field(
        "127.0.0.1",
        description="Address of the gRPC port. Loopback by default: nothing listens to a network before "
        "someone asks for it, and then only with TLS or with `insecure`.",
    )
    port: int = Field(9000, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    health_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port on `host` of a second, plain-text server that answers health checks alone; 0 for "
        "none. Kubernetes' probes speak neither TLS nor tokens.",
    )
    http: bool = Field(
        True,
        description="Also serve HTTP on `host`: Connect, gRPC-Web and JSON for every call, and OpenAI's routes.",
    )
    http_port: int = Field(
        8080,
        ge=0,
        le=65535,
        description="HTTP port; 0 takes a free one, as does no setting where `port` is 0 or 8080 is taken.",
    )
    # Not decoded by pydantic-settings, which would take nothing but JSON.
    http_cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may call over HTTP, as `https://app.example`, or `*` for any. In the "
        "environment separated by commas, or a JSON list. Empty: none but the server's own.",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        description="Address of the metrics port, which is plain HTTP: counts and durations, no payload.",
    )
    metrics_port: int = Field(9100, ge=0, le=65535, description="Prometheus port; 0 takes a free one.")
    loopback_only: bool = Field(
        True,
        description="Keep Ray's own ports on loopback. Off on a cluster, whose nodes must reach each other.",
    )

    # Who may call.
    tls_certificate: Path | None = Field(
        None, description="PEM file of the server's certificate chain; read again when it changes."
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's unencrypted key.")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of the authorities whose certificates a client must show (mutual TLS).",
    )
    insecure: bool = Field(
        False,
        description="Allow plain text on an address that is not loopback: tokens and images travel in the clear.",
    )
    tokens_file: Path | None = Field(
        None,
        description="File of bearer tokens, hashed, one a line; read again when it changes. Without any "
        "token every caller may do everything.",
    )
    tokens: str = Field(
        "", description="More lines of tokens, joined by newlines or `;`, for a secret in the environment."
    )
    token_calls: int = Field(
        64, ge=1, description="Calls in progress of one token, unless its line says otherwise."
    )
    token_rate: str = Field(
        "",
        description="Calls that one token may begin, as `600/minute`, unless its line says otherwise; empty "
        "for no limit.",
    )
    reflection: bool = Field(
        True,
        description="Describe the services to grpcurl and friends; where there are tokens, to admins only.",
    )

    # What it tells.
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="Form of the log on standard error. auto: console on a terminal, else JSON."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level that is logged; calls are logged at info."
    )
    otlp_endpoint: str = Field(
        "",
        description="URL of an OpenTelemetry collector (OTLP over gRPC), as `http://localhost:4317`; empty "
        "for no traces.",
    )

    # Verdicts.
    defense_false_positive_rate: float = Field(
        0.01,
        ge=0.001,
        le=0.5,
        description="Operating point of FilterAdversarial: the share of clean images that may be called "
        "adversarial, as measured on the bundle's calibration images. Bundles are studied at 0.01 and 0.05; the "
        "lower is the default, because most of what a service is shown is clean.",
    )

    # Generation.
    max_images: int = Field(
        16, ge=1, le=64, description="Images of one Generate call, their unsteered twins counted."
    )
    max_queued_images: int = Field(
        64,
        ge=1,
        description="Images that may wait for one replica of the generator; a call that would pass it is refused "
        "at once.",
    )
    max_batch_images: int = Field(
        8,
        ge=1,
        description="Images of one denoising step; the others wait. Where a batch changes no bits, a step of eight "
        "costs less than eight steps; elsewhere on a CPU as much.",
    )
    generation_bytes: int = Field(
        1024 * MIB,
        ge=1,
        description="Memory for the activations of one step, by estimate; images that would pass it wait. One "
        "image is always let in.",
    )

    # Batching.
    max_batch_items: int = Field(
        32,
        ge=1,
        description="Items of one tower forward. On a CPU larger batches add latency and no throughput.",
    )
    max_batch_s: float = Field(
        0.05,
        gt=0,
        description="Seconds that one forward may take, by the speed of the last ones, as long as it holds 8 items: a "
        "single image waits for the forward that runs when it comes, so a bulk caller's must not be long. A CPU is as "
        "fast with 8 as with 32; a GPU runs 32 in this time.",
    )
    stream_window: int = Field(
        192,
        ge=1,
        description="Items of one stream in progress at once, together no larger than one request may be: "
        "two messages on their way to the encoder and one that gathers, so that batches are full.",
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
        description="Gathered messages on their way to one replica of the encoder at once: one is computed "
        "while the next is decoded. More would only make them smaller.",
    )
    compute_niceness: int = Field(
        10,
        ge=0,
        le=19,
        description="Niceness of the threads that decode and compute, so that on busy cores calls are accepted, "
        "refused and answered first; 0 for none.",
    )

    # Ray on one machine.
    object_store_bytes: int = Field(
        128 * MIB,
        ge=80 * MIB,
        description="Ray's shared memory. Only messages over 100 KB pass through it, and none stays.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_service_links(cls, values: Any) -> Any:
        """Leave out addresses of Services where a port is meant: nobody has set them."""
        return {
            name: value
            for name, value in values.items()
            if not (name.endswith("port") and isinstance(value, str) and _SERVICE_LINK.fullmatch(value))
        }

    @model_validator(mode="before")
    @classmethod
    def _free_ports(cls, values: Any) -> Any:
        """Take a free port for HTTP where gRPC's is free, too, or another port is HTTP's default."""
        default = str(cls.model_fields["http_port"].default)
        others = {str(values.get(name, "")) for name in ("metrics_port", "health_port")}
        if str(values.get("port", "")) in ("0", default) or default in others:
            return {"http_port": 0, **values}
        return values

    @field_validator("host", "metrics_host")
    @classmethod
    def _bare(cls, value: str) -> str:
        """Take an IPv6 address with and without brackets; `joined` puts them where they belong."""
        if not (bare := value.strip().removeprefix("[").removesuffix("]")):
            raise ValueError("an address is missing: 0.0.0.0 is every IPv4 one, :: every one")
        return bare

    @field_validator("bundles", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Read a list from the environment."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return tuple(path for path in value.split(os.pathsep) if path)

    @field_validator("bundle_ids", "http_cors_origins", mode="before")
    @classmethod
    def _listed_ids(cls, value: Any) -> Any:
        """Read a list from the environment."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return tuple(id.strip() for id in value.split(",") if id.strip())

    @field_validator("http_cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what no browser sends as its origin."""
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: `https://host` or `https://host:port`, without a path"
                )
        return value

    @field_validator("bundle_ids")
    @classmethod
    def _ids(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what could never be the id of a bundle."""
        for id in value:
            if not _BUNDLE_ID.fullmatch(id):
                raise ValueError(f"{id!r} is no id of a bundle: `name@` and 12 to 64 hex digits")
        return value

    @property
    def served(self) -> tuple[Path, ...]:
        """Directories of all bundles to serve, the default first."""
        return self.bundles or (self.bundle,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse settings that contradict each other, before anything starts."""
        if self.bundles and "bundle" in self.model_fields_set and self.bundle != self.bundles[0]:
            raise ValueError(
                f"bundle is {self.bundle} and bundles begins with {self.bundles[0]}: set one of the two, or the same"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.tls_certificate is None and not self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"will not listen on {self.host} in plain text: set tls_certificate and tls_key, or insecure"
            )
        listening = [
            ("port", self.host, self.port),
            ("http_port", self.host, self.http_port if self.http else 0),
            ("health_port", self.host, self.health_port),
            ("metrics_port", self.metrics_host, self.metrics_port),
        ]
        for (one, at, number), (other, there, same) in itertools.combinations(listening, 2):
            if number and number == same and (at == there or not {at, there}.isdisjoint({"0.0.0.0", "::"})):
                raise ValueError(f"{one} and {other} are both {number}")
        if self.token_rate:
            try:
                limits.parse(self.token_rate)
            except ValueError:
                raise ValueError(f"token_rate is like `600/minute`, not {self.token_rate!r}") from None
        return self
