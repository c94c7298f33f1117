"""Imaging: a bundle's pipeline with its steering, as a whole. What a deployment or a benchmark uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from services.bundle.load import Bundle
from services.bundle.manifest import DiffusionEntry
from services.encoding.images import DEFAULT_LIMITS, ImageLimits
from services.encoding.machine import usable_cores
from services.encoding.texts import DEFAULT_TEXT_LIMITS, TextLimits
from services.errors import InvalidInput, NoPipeline
from services.imaging.conditioning import Conditioner, Conditioning
from services.imaging.denoiser import Batching, Denoiser, Sample
from services.imaging.dose import Attributes
from services.imaging.edits import FromReference, ImageRequest, SteeringPath
from services.imaging.embedder import Embedder
from services.imaging.features import Features
from services.imaging.pictures import Decoder
from services.imaging.pipeline import Parts, load_parts
from services.imaging.reference import pipeline_folder
from services.imaging.steering import Embedding, Steered

__all__ = ["GeneratedImage", "ImageRequest", "Imaging"]


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image.

    Attributes
    ----------
    image : PIL.Image.Image
        RGB.
    seed : int
        Of its noise.
    steered : Steered or None
        What its edits did.
    """

    image: PIL.Image.Image
    seed: int
    steered: Steered | None

    @property
    def delta(self) -> float:
        """||e' - e|| / rho; 0 without edits."""
        return 0.0 if self.steered is None else self.steered.delta


class Imaging:
    """A pipeline, its towers and its dictionaries.

    Parameters
    ----------
    bundle : Bundle
        With a ``diffusion`` section.
    parts : Parts
        Its pipeline.
    embedder : Embedder
        Its towers.
    """

    def __init__(self, bundle: Bundle, parts: Parts, embedder: Embedder) -> None:
        self.parts = parts
        self.entry: DiffusionEntry = parts.entry
        self._embedder = embedder
        self._features = Features(bundle)
        # The default one at once: most edits go by it, and none should wait for it.
        self._features.of("")
        self._condition = Conditioner(parts, embedder, self._features)
        self.denoiser = Denoiser(parts)
        self._decoder = Decoder(parts)

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        device: str = "auto",
        threads: int | None = None,
        *,
        image_limits: ImageLimits = DEFAULT_LIMITS,
        text_limits: TextLimits = DEFAULT_TEXT_LIMITS,
        verify: bool = True,
        max_batch: int = 8,
    ) -> Imaging:
        """Load the pipeline of a bundle, and choose how its batches are formed.

        Parameters
        ----------
        bundle : Bundle
            Verified.
        device : str
            "auto", "cpu", "cuda" or "cuda:<i>".
        threads : int or None
            Threads of one step; None takes all the cores this process may use.
        image_limits, text_limits : ImageLimits, TextLimits
            Of reference pictures, and of texts.
        verify : bool
            Check the hash of weights that lie outside the bundle.
        max_batch : int
            Images of one step, at most.

        Raises
        ------
        NoPipeline
            Where the bundle has none.
        BundleError
            Where it cannot be served.
        """
        entry = bundle.manifest.diffusion
        if entry is None:
            raise NoPipeline("this bundle has no text-to-image pipeline")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(threads or usable_cores())
        # f32 means it: on a GPU convolutions would otherwise round their inputs to 10 bits (TF32).
        torch.backends.cudnn.allow_tf32 = False
        parts = load_parts(pipeline_folder(bundle.path, entry, verify), entry, device, bundle)
        imaging = cls(bundle, parts, Embedder(bundle, device, image_limits, text_limits))
        imaging.denoiser.calibrate(imaging.prepare(ImageRequest()), max_batch)
        return imaging

    @property
    def batching(self) -> Batching:
        """How batches are formed; see `Denoiser`."""
        return self.denoiser.batching

    @property
    def paths(self) -> tuple[SteeringPath, ...]:
        """The paths by which the pipeline can be steered."""
        return self._condition.paths

    @property
    def takes_image(self) -> bool:
        """Whether the pipeline takes reference pictures."""
        return self._condition.takes_embedding

    def embed_image(self, data: bytes) -> Embedding:
        """Embed an encoded image file, as references and base pictures are."""
        return self._embedder.image(data)

    def embed_text(self, text: str) -> Embedding:
        """Embed a text, as prompts are."""
        return self._embedder.reference(FromReference(text=text))

    def know(self, attributes: Attributes | None) -> None:
        """Steer by these doses and attributes instead of the bundle's: for a study that has not written them yet."""
        self._features.know(attributes)

    def condition(self, request: ImageRequest, steered: Steered | None = None) -> Conditioning:
        """Return what conditions the image of `request`; images that differ in their seed alone share it.

        A study may give what was done to the embedding itself, as `steered`, in place of edits.

        Raises
        ------
        InvalidInput
            Where the request cannot be carried out.
        SteeringUnsupported
            Where the pipeline cannot be steered like that.
        """
        self.check(request)
        return self._condition(request, steered)

    def dose(self, conditioning: Conditioning) -> float | None:
        """Return the dose of a conditioning's edits: 0 without any, None where the bundle knows no doses."""
        if self._features.attributes is None:
            return None
        return 0.0 if conditioning.steered is None else conditioning.steered.dose

    def start(self, conditioning: Conditioning, request: ImageRequest) -> Sample:
        """Return the image of `request`, before its first step."""
        entry = self.entry
        return self.denoiser.start(
            conditioning,
            request.seed,
            request.num_inference_steps or entry.num_inference_steps,
            request.height or entry.height,
            request.width or entry.width,
        )

    def prepare(self, request: ImageRequest) -> Sample:
        """Return the image of `request`, conditioned and before its first step."""
        return self.start(self.condition(request), request)

    def step(self, samples: Sequence[Sample]) -> None:
        """Take every sample, all of one size, one step further; see `Denoiser.step`."""
        self.denoiser.step(samples)

    def decode(self, sample: Sample) -> NDArray[np.uint8]:
        """Return the picture of a finished sample, uint8, shape (height, width, 3)."""
        if sample.error is not None:
            raise sample.error
        return self._decoder.decode(sample.latents)

    def preview(self, sample: Sample) -> NDArray[np.uint8]:
        """Return a rough picture of an unfinished sample, uint8, one pixel a latent."""
        return self._decoder.preview(sample.latents if sample.estimate is None else sample.estimate)

    def generate(self, requests: Sequence[ImageRequest], batch: int = 8) -> list[GeneratedImage]:
        """Make images in this process, `batch` at a time; each is what it would be alone.

        Raises
        ------
        MonofacetError
            What the first image that failed met.
        """
        waiting = list(enumerate(requests))
        waiting.reverse()
        active: list[tuple[int, Sample]] = []
        finished: dict[int, GeneratedImage] = {}
        while waiting or active:
            while waiting and len(active) < batch:
                number, request = waiting.pop()
                active.append((number, self.prepare(request)))
            shape = active[0][1].shape
            self.step([sample for _, sample in active if sample.shape == shape])
            for number, sample in [one for one in active if one[1].done]:
                picture = PIL.Image.fromarray(self.decode(sample))
                finished[number] = GeneratedImage(picture, requests[number].seed, sample.conditioning.steered)
            active = [one for one in active if not one[1].done]
        return [finished[number] for number in range(len(requests))]

    def check(self, request: ImageRequest) -> None:
        """Raise InvalidInput, naming every field, unless the pipeline can make an image of that size and length."""
        entry, problems = self.entry, list[tuple[str, str]]()
        multiple = self.parts.pixels_per_latent
        for name, value, largest in (
            ("height", request.height or entry.height, entry.max_height or entry.height),
            ("width", request.width or entry.width, entry.max_width or entry.width),
        ):
            if not multiple <= value <= largest or value % multiple:
                problems.append((name, f"{value}; must be a multiple of {multiple}, at most {largest}"))
        steps = request.num_inference_steps or entry.num_inference_steps
        if not 1 <= steps <= entry.max_inference_steps:
            problems.append(("num_inference_steps", f"{steps}; must be 1 to {entry.max_inference_steps}"))
        if not 0 <= request.seed < 2**63:
            problems.append(("seed", "must be 0 to 2^63 - 1"))
        if problems:
            raise InvalidInput(f"{problems[0][0]}: {problems[0][1]}", problems)

    @torch.inference_mode()
    def bytes_per_image(self) -> int:
        """Estimate the memory of one image of the default size in a step, bytes.

        What the down blocks keep for the up blocks, plus the largest activation six times over: about what an
        attention block holds at once. Measured on one call; it grows with the number of pixels.
        """
        kept = largest = 0

        def note(module: torch.nn.Module, arguments: object, output: object) -> None:
            nonlocal largest
            if isinstance(output, torch.Tensor):
                largest = max(largest, output.nbytes)

        def keep(
            module: torch.nn.Module, arguments: object, output: tuple[object, tuple[torch.Tensor, ...]]
        ) -> None:
            nonlocal kept
            kept += sum(tensor.nbytes for tensor in output[1])

        unet = self.parts.unet
        hooks = [
            module.register_forward_hook(note) for module in unet.modules() if not list(module.children())
        ]
        hooks += [block.register_forward_hook(keep) for block in unet.down_blocks]
        sample = self.prepare(ImageRequest(guidance_scale=2.0))
        try:
            self.step([sample])
        finally:
            for hook in hooks:
                hook.remove()
        return int(kept + 6 * largest)
