"""Denoising, one step at a time, over a batch of images that have nothing to do with each other.

Every image has a scheduler, a generator of noise and a place in its own timesteps; a step takes them all
through one call of the UNet, whose rows carry their own timestep. So images may join and leave between steps.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from services.errors import GenerationFailed, MonofacetError
from services.imaging.conditioning import Conditioning
from services.imaging.invariance import bucket, make_rowwise, rows_agree
from services.imaging.pipeline import STABLE_UNCLIP, Parts

log = logging.getLogger("monofacet.imaging")

Batching = Literal["free", "fixed", "single"]


@dataclass(eq=False)
class Sample:
    """An image that is being made.

    Attributes
    ----------
    conditioning : Conditioning
        Shared by the images of one request.
    latents : float32 tensor, shape (1, channels, height, width)
        As the scheduler wants them.
    class_labels : float32 tensor, shape (rows, 2 d), or None
        unCLIP: the noised embedding and its noise level; both are zeros for the null one.
    scheduler : SchedulerMixin
        Its own.
    timesteps : float tensor, shape (calls,)
        One a call of the UNet; some schedulers need more than one a step.
    generator : torch.Generator
        On the CPU, so that a seed means the same noise on any device.
    index : int
        Calls done.
    preview : bool
        Whether `estimate` is wanted.
    estimate : float32 tensor or None
        What the last call took the finished latents to be.
    error : MonofacetError or None
        Why it cannot go on.
    """

    conditioning: Conditioning
    latents: Float[Tensor, "1 c h w"]
    class_labels: Float[Tensor, "rows k"] | None
    scheduler: Any
    timesteps: Tensor
    generator: torch.Generator
    index: int = 0
    preview: bool = False
    estimate: Tensor | None = None
    error: MonofacetError | None = None
    step_options: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Calls of the UNet in all."""
        return len(self.timesteps)

    @property
    def done(self) -> bool:
        """Whether it needs no further step, for good or ill."""
        return self.index >= self.steps or self.error is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """What images must share to be in one call."""
        return tuple(self.latents.shape[1:])

    @property
    def rows(self) -> int:
        """Rows of the UNet's batch: 2 with guidance, else 1."""
        return len(self.conditioning.hidden)


class Denoiser:
    """Steps samples.

    Parameters
    ----------
    parts : Parts
        The pipeline; its UNet is changed in place (`make_rowwise`).

    Attributes
    ----------
    batching : {"free", "fixed", "single"}
        How a batch is kept from showing in its images: "free" where all sizes agree bit for bit; "fixed" pads
        every call to one size; "single" calls the UNet for one image at a time.
    calls : int
        Calls of the UNet so far.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        make_rowwise(parts.unet)
        self.batching: Batching = "single"
        self.calls = 0
        self._fixed_rows = 0

    def start(
        self, conditioning: Conditioning, seed: int, num_inference_steps: int, height: int, width: int
    ) -> Sample:
        """Return a sample at its first step; sizes in pixels.

        Noise is drawn in the order of the stock pipelines: for the embedding, then for the latents.
        """
        parts = self._parts
        generator = torch.Generator("cpu").manual_seed(seed)
        scheduler = parts.new_scheduler(num_inference_steps)
        class_labels = self._class_labels(conditioning, generator)
        scale = parts.pixels_per_latent
        shape = (1, parts.latent_channels, height // scale, width // scale)
        latents = torch.randn(shape, generator=generator).to(parts.device) * scheduler.init_noise_sigma
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = generator
        return Sample(
            conditioning,
            latents,
            class_labels,
            scheduler,
            scheduler.timesteps,
            generator,
            step_options=options,
        )

    def _class_labels(self, conditioning: Conditioning, generator: torch.Generator) -> Tensor | None:
        """Return unCLIP's class labels, as `noise_image_embeddings` of the stock pipeline makes them."""
        parts = self._parts
        if parts.entry.pipeline != STABLE_UNCLIP:
            return None
        from diffusers.models.embeddings import get_timestep_embedding

        embedding = conditioning.embedding
        if embedding is None:
            raise TypeError("an unCLIP pipeline needs an embedding")
        noise = torch.randn((1, embedding.shape[1]), generator=generator)
        level = torch.tensor([parts.entry.noise_level])
        normalizer = parts.image_normalizer
        mean, std = normalizer.mean.float().cpu(), normalizer.std.float().cpu()
        rows = []
        for row, present in zip(embedding, conditioning.has_embedding, strict=True):
            if not present:
                rows.append(torch.cat([row, torch.zeros(len(row))]))
                continue
            scaled = (row[None] - mean) / std
            noised = (
                parts.image_noising_scheduler.add_noise(scaled, timesteps=level, noise=noise) * std + mean
            )
            level_embedding = get_timestep_embedding(
                level, len(row), flip_sin_to_cos=True, downscale_freq_shift=0
            )
            rows.append(torch.cat([noised[0], level_embedding[0]]))
        return torch.stack(rows)

    @torch.inference_mode()
    def calibrate(self, sample: Sample, max_samples: int) -> Batching:
        """Choose how batches are formed, by measuring whether their size shows.

        Parameters
        ----------
        sample : Sample
            Of the default size; not changed.
        max_samples : int
            Images of the largest batch; 1 leaves nothing to choose.
        """
        if max_samples <= 1:
            self.batching = "single"
            return self.batching
        largest = bucket(2 * max_samples)
        noise = torch.Generator("cpu").manual_seed(0)

        def like(tensor: Tensor) -> Tensor:
            return torch.randn((largest, *tensor.shape[1:]), generator=noise)

        latents, hidden = like(sample.latents), like(sample.conditioning.hidden)
        labels = None if sample.class_labels is None else like(sample.class_labels)
        adapter = self._adapter(sample)
        adapter = None if adapter is None else like(adapter)
        times = torch.linspace(1, 999, largest)

        def run(rows: Sequence[int]) -> Tensor:
            index = torch.tensor(list(rows))
            return self._unet(
                latents[index],
                times[index],
                hidden[index],
                None if labels is None else labels[index],
                None if adapter is None else adapter[index],
            )

        if rows_agree(run, largest):
            self.batching = "free"
        else:
            self.batching = "single" if self._parts.device.type == "cpu" else "fixed"
            self._fixed_rows = largest
        return self.batching

    @torch.inference_mode()
    def step(self, samples: Sequence[Sample]) -> None:
        """Take every sample one call further.

        All must be of one `Sample.shape`. What goes wrong with one is kept in its `error`; the others go on.
        """
        try:
            outputs = self._outputs(samples)
        except (RuntimeError, ValueError, MemoryError):
            if len(samples) == 1:
                log.exception("a step failed")
                samples[0].error = GenerationFailed("a step of this image failed")
                return
            # One of them, or their number: each gets a call of its own.
            log.warning("a step of %d images failed; they are stepped one by one", len(samples))
            for sample in samples:
                self.step([sample])
            return
        for sample, output in zip(samples, outputs, strict=True):
            try:
                self._advance(sample, output)
            except (RuntimeError, ValueError, IndexError):
                log.exception("a scheduler failed")
                sample.error = GenerationFailed("the scheduler of this image failed")

    def _outputs(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Return the UNet's output for each sample, shape (rows, c, h, w)."""
        if self.batching == "single" and len(samples) > 1:
            return [self._outputs([sample])[0] for sample in samples]
        latents, times, hidden, labels, adapters = [], [], [], [], []
        for sample in samples:
            scaled = sample.scheduler.scale_model_input(sample.latents, sample.timesteps[sample.index])
            latents.append(scaled.expand(sample.rows, *sample.shape))
            times.append(sample.timesteps[sample.index].float().expand(sample.rows))
            hidden.append(sample.conditioning.hidden)
            labels.append(sample.class_labels)
            adapters.append(self._adapter(sample))
        rows = sum(sample.rows for sample in samples)
        size = max(self._fixed_rows, bucket(rows)) if self.batching == "fixed" else bucket(rows)

        def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            if not present:
                return None
            whole = torch.cat(present)
            return torch.cat([whole, whole[:1].expand(size - rows, *whole.shape[1:])])

        output = self._unet(joined(latents), joined(times), joined(hidden), joined(labels), joined(adapters))
        return list(torch.split(output[:rows], [sample.rows for sample in samples]))

    def _unet(
        self,
        latents: Tensor | None,
        times: Tensor | None,
        hidden: Tensor | None,
        labels: Tensor | None,
        adapter: Tensor | None,
    ) -> Tensor:
        parts = self._parts

        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(parts.device, parts.dtype)

        if latents is None or times is None:
            raise TypeError("latents and timesteps are always there")
        self.calls += 1
        added = None if adapter is None else {"image_embeds": [there(adapter)]}
        output: Tensor = parts.unet(
            there(latents),
            # Timesteps stay in float32: half floats do not hold all numbers to 1,000.
            times.to(parts.device),
            there(hidden),
            class_labels=there(labels),
            added_cond_kwargs=added,
        ).sample
        return output.float()

    def _adapter(self, sample: Sample) -> Tensor | None:
        """Return the IP-Adapter's input, shape (rows, 1, d); None without one."""
        embedding = sample.conditioning.embedding
        return None if self._parts.entry.ip_adapter is None or embedding is None else embedding[:, None]

    def _advance(self, sample: Sample, output: Tensor) -> None:
        if sample.rows == 2:
            unconditional, conditional = output.chunk(2)
            guided = unconditional + sample.conditioning.guidance_scale * (conditional - unconditional)
        else:
            guided = output
        timestep = sample.timesteps[sample.index]
        if sample.preview:
            sample.estimate = self._finished(sample, guided, timestep)
        sample.latents = sample.scheduler.step(
            guided, timestep, sample.latents, return_dict=False, **sample.step_options
        )[0]
        sample.index += 1
        if not torch.isfinite(sample.latents).all():
            sample.error = GenerationFailed("the numbers of this image are no longer finite")

    def _finished(self, sample: Sample, output: Tensor, timestep: Tensor) -> Tensor | None:
        """Return the finished latents that an output stands for; None for a scheduler without noise levels.

        x0 of a variance-preserving process, from epsilon or from v (Salimans and Ho 2022, eq. 11 and app. D).
        """
        scheduler = sample.scheduler
        levels = getattr(scheduler, "alphas_cumprod", None)
        kind = scheduler.config.get("prediction_type", "epsilon")
        if levels is None or kind not in ("epsilon", "v_prediction", "sample"):
            return None
        if kind == "sample":
            return output
        level = levels[int(timestep.round().clamp(0, len(levels) - 1))].to(output.device, torch.float32)
        noisy: Tensor = sample.scheduler.scale_model_input(sample.latents, timestep)
        finished: Tensor
        if kind == "v_prediction":
            finished = level.sqrt() * noisy - (1 - level).sqrt() * output
        else:
            finished = (noisy - (1 - level).sqrt() * output) / level.sqrt()
        return finished
