"""Same request, same bytes: alone, among strangers, and after everything was loaded anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from services.bundle.load import Bundle
from services.errors import GenerationFailed
from services.imaging.denoiser import Sample
from services.imaging.edits import Edit, FromReference, Scale, SetQuantile, Steering
from services.imaging.generator import ImageRequest, Imaging
from services.imaging.invariance import bucket, rows_agree
from services.imaging.pictures import Decoder
from services.modality.tables import Label
from tests.services.imaging.conftest import Load


def strangers(bundle: Bundle, count: int = 8) -> list[ImageRequest]:
    """Return requests that differ in all that may differ within a batch."""
    image = (bundle.path / "samples/1.png").read_bytes()
    reference = FromReference(image=image)
    return [
        ImageRequest(
            prompt=f"stranger number {i}",
            negative_prompt="blue" if i % 2 else "",
            image=image if i % 3 == 0 and bundle.manifest.diffusion.conditioning == "embedding" else None,  # type: ignore[union-attr]
            steering=Steering((Edit(Label.CROSS, reference, 0.1 * i),)) if i % 2 == 0 else Steering(),
            seed=100 + i,
            num_inference_steps=3 + i % 4,
            guidance_scale=1.0 if i == 3 else 1.5 + i,
        )
        for i in range(count)
    ]


def asked(bundle: Bundle) -> ImageRequest:
    return ImageRequest("red circle", steering=Steering((Edit(Label.IMAGE, SetQuantile(0.8), 0.7),)), seed=9)


@pytest.mark.parametrize("kind", ["unclip", "sd1"])
def test_a_request_gives_the_same_bytes_alone_and_in_a_batch_of_eight_strangers(
    load_kind: Load, kind: Any
) -> None:
    bundle, imaging = load_kind(kind)
    (alone,) = imaging.generate([asked(bundle)])
    for place in (0, 4, 8):
        others = strangers(bundle)
        mixed = imaging.generate([*others[:place], asked(bundle), *others[place:]], batch=9)
        assert mixed[place].image.tobytes() == alone.image.tobytes()


@pytest.mark.parametrize("batching", ["fixed", "single"])
def test_the_fallbacks_give_the_same_bytes_in_any_batch_too(load_kind: Load, batching: Any) -> None:
    bundle, imaging = load_kind("unclip")
    with forced(imaging, batching):
        (alone,) = imaging.generate([asked(bundle)])
        mixed = imaging.generate([*strangers(bundle), asked(bundle)], batch=9)
    assert mixed[8].image.tobytes() == alone.image.tobytes()


def test_a_request_gives_the_same_bytes_after_a_restart(load_kind: Load) -> None:
    bundle, imaging = load_kind("unclip")
    (first,) = imaging.generate([asked(bundle)])
    again = Imaging.load(Bundle.load(bundle.path), threads=1)
    (second,) = again.generate([asked(bundle)])
    assert first.image.tobytes() == second.image.tobytes()
    assert first.delta == second.delta


def test_free_batches_give_the_same_picture_and_on_some_processors_the_same_bytes(load_kind: Load) -> None:
    bundle, imaging = load_kind("unclip")
    with forced(imaging, "free"):
        (alone,) = imaging.generate([asked(bundle)])
        mixed = imaging.generate([*strangers(bundle), asked(bundle)], batch=9)
    # Where sums are added in another order, a value that lay between two of 255 may go to the other one.
    apart = np.abs(np.asarray(alone.image, int) - np.asarray(mixed[8].image, int))
    assert apart.max() <= 1


@pytest.mark.parametrize(
    ("agree", "largest", "expected"), [(True, 8, "free"), (False, 8, "single"), (False, 1, "single")]
)
def test_batches_are_free_where_their_size_does_not_show(
    load_kind: Load, monkeypatch: pytest.MonkeyPatch, agree: bool, largest: int, expected: str
) -> None:
    """Whatever this machine's processor does: others do otherwise."""
    _, imaging = load_kind("unclip")
    monkeypatch.setattr("services.imaging.denoiser.rows_agree", lambda run, rows: agree)
    sample = imaging.prepare(ImageRequest())
    with forced(imaging, "fixed"):
        assert imaging.denoiser.calibrate(sample, largest) == expected


def test_the_check_finds_a_model_whose_rows_depend_on_the_batch() -> None:
    rows = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    assert rows_agree(lambda chosen: rows[list(chosen)], 16)
    assert not rows_agree(lambda chosen: rows[list(chosen)] * (1 + 1e-6 * (len(chosen) < 8)), 16)
    assert not rows_agree(lambda chosen: rows[list(chosen)] + torch.arange(len(chosen))[:, None] * 1e-6, 16)


def test_rows_are_padded_to_powers_of_two() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 16)] == [2, 2, 4, 4, 8, 8, 16, 16]


@contextmanager
def forced(imaging: Imaging, batching: Any) -> Iterator[None]:
    """Form batches as on another processor."""
    denoiser = imaging.denoiser
    chosen = denoiser.batching, denoiser._fixed_rows
    denoiser.batching, denoiser._fixed_rows = batching, 32
    try:
        yield
    finally:
        denoiser.batching, denoiser._fixed_rows = chosen


def run(imaging: Imaging, samples: list[Sample]) -> None:
    while waiting := [sample for sample in samples if not sample.done]:
        imaging.step(waiting)


def test_an_image_joins_a_batch_that_is_under_way_and_neither_changes(load_kind: Load) -> None:
    bundle, imaging = load_kind("unclip")
    expected = [made.image.tobytes() for made in imaging.generate([asked(bundle), strangers(bundle)[5]], 1)]
    first = imaging.prepare(asked(bundle))
    imaging.step([first])
    second = imaging.prepare(strangers(bundle)[5])
    run(imaging, [first, second])
    assert [imaging.decode(sample).tobytes() for sample in (first, second)] == expected


def test_a_sample_that_breaks_fails_alone(load_kind: Load) -> None:
    bundle, imaging = load_kind("unclip")
    (expected,) = imaging.generate([asked(bundle)])
    good, nan, broken = (imaging.prepare(asked(bundle)) for _ in range(3))
    nan.latents = torch.full_like(nan.latents, torch.nan)
    broken.conditioning = replace(broken.conditioning, hidden=broken.conditioning.hidden[:, :, :-1])
    run(imaging, [nan, good, broken])
    assert imaging.decode(good).tobytes() == expected.image.tobytes()
    for sample in (nan, broken):
        assert isinstance(sample.error, GenerationFailed)
        with pytest.raises(GenerationFailed):
            imaging.decode(sample)


def test_steps_are_counted_and_not_shared(load_kind: Load) -> None:
    _, imaging = load_kind("unclip")
    samples = [imaging.prepare(ImageRequest("x", num_inference_steps=steps)) for steps in (3, 5)]
    before = imaging.denoiser.calls
    with forced(imaging, "free"):
        run(imaging, samples)
    assert [sample.index for sample in samples] == [3, 5]
    assert imaging.denoiser.calls - before == 5


def test_a_preview_is_the_picture_itself_where_the_autoencoder_is_linear(
    load_kind: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, imaging = load_kind("unclip")
    decoder = Decoder(imaging.parts)
    colours = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 0.2

    def pixels(latents: torch.Tensor) -> torch.Tensor:
        small = torch.einsum("bchw,ck->bkhw", latents, colours) + 0.1
        return small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    monkeypatch.setattr(decoder, "_pixels", pixels)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    preview, picture = decoder.preview(latents), decoder.decode(latents)
    assert preview.shape == (8, 8, 3)
    # One of 255 for rounding.
    assert np.abs(preview.astype(int) - picture[::2, ::2].astype(int)).max() <= 1


@pytest.mark.parametrize(("kind", "prediction"), [("sd1", "v_prediction"), ("sd1", "epsilon")])
def test_an_estimate_is_what_the_noise_was_added_to(load_kind: Load, kind: Any, prediction: str) -> None:
    _, imaging = load_kind(kind)
    sample = imaging.prepare(ImageRequest("x", num_inference_steps=6))
    sample.preview = True
    scheduler = sample.scheduler
    scheduler.register_to_config(prediction_type=prediction)
    clean, noise = torch.randn(2, *sample.latents.shape, generator=torch.Generator().manual_seed(0))
    timestep = sample.timesteps[2]
    level = scheduler.alphas_cumprod[int(timestep)]
    sample.latents = level.sqrt() * clean + (1 - level).sqrt() * noise
    velocity = level.sqrt() * noise - (1 - level).sqrt() * clean
    output = velocity if prediction == "v_prediction" else noise
    estimate = imaging.denoiser._finished(sample, output, timestep)
    assert estimate is not None
    # Division by a small sqrt(level) magnifies float32's rounding.
    torch.testing.assert_close(estimate, clean, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_an_edit_of_no_active_feature_changes_no_byte(load_kind: Load, factor: float) -> None:
    _, imaging = load_kind("unclip")
    z = imaging.condition(ImageRequest("red circle", steering=Steering((Edit((0,), Scale(1.0)),)))).steered
    assert z is not None
    silent = int((z.z == 0).nonzero()[0][0])
    plain, edited = (
        ImageRequest("red circle", seed=1, steering=steering)
        for steering in (Steering(), Steering((Edit((silent,), Scale(factor)),)))
    )
    first, second = imaging.generate([plain, edited])
    assert first.image.tobytes() == second.image.tobytes()
