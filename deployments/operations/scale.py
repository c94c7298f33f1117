"""The settings that say how many processes serve on a cluster, and what Ray reserves for each.

One machine needs none of it; on a cluster the chart sets it. Each has its unit, its default, and why that default.
"""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Scale(BaseSettings):
    """Replicas of each kind; `Settings` has them with everything else."""

    model_config = SettingsConfigDict(env_prefix="MONOFACET_", frozen=True, extra="ignore")

    gateway_replicas: int = Field(
        1, ge=1, description="Gateways, at most one a node: each has its own port. Fixed, not autoscaled."
    )
    gateway_resource: str = Field(
        "",
        description="Custom Ray resource of which a gateway takes one, so that it runs on the nodes that are "
        "meant for it; empty for any node.",
    )
    encoder_replicas: int = Field(
        1, ge=1, description="Replicas of the encoder, the fewest if autoscaled; each holds the towers."
    )
    encoder_max_replicas: int = Field(
        0, ge=0, description="Most replicas of the encoder; 0, or not more than the fewest: a fixed number."
    )
    encoder_target_ongoing: float = Field(
        1.5,
        gt=0,
        description="Messages in progress of one replica beyond which Serve adds another. A gateway sends a "
        "busy replica two, so 1.5 adds replicas once they are saturated.",
    )
    encoder_cpus: float = Field(
        0.0, ge=0, description="Cores that Ray reserves for one replica; 0 reserves none, for one machine."
    )
    encoder_gpus: float = Field(0.0, ge=0, description="GPUs of one replica; below 1 replicas share one.")
    encoder_resource: str = Field(
        "", description="Custom Ray resource of which an encoder takes one; empty for any node."
    )
    generator: bool = Field(
        True, description="Generate images, if the bundle has a pipeline; off for a cluster without the room."
    )
    generator_replicas: int = Field(
        1, ge=1, description="Replicas of the generator, the fewest if autoscaled; each holds the pipeline."
    )
    generator_max_replicas: int = Field(
        0, ge=0, description="Most replicas of the generator; 0, or not more than the fewest: a fixed number."
    )
    generator_target_ongoing: float = Field(
        2.0, gt=0, description="Generations in progress of one replica beyond which Serve adds another."
    )
    generator_cpus: float = Field(
        0.0, ge=0, description="Cores that Ray reserves for one replica; 0 reserves none, for one machine."
    )
    generator_threads: int = Field(
        0,
        ge=0,
        description="Threads of one denoising step; 0: as many as `threads`. The chart sets the cores of a generator's "
        "pod, which need not be those of an encoder's.",
    )
    generator_gpus: float = Field(0.0, ge=0, description="GPUs of one replica; below 1 replicas share one.")
    generator_resource: str = Field(
        "", description="Custom Ray resource of which a generator takes one; empty for any node."
    )
