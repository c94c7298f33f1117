"""The autoencoder learns, resumes to the byte, and leaves a stock folder; in float32 and in bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from training.compute import CPU
from training.diffusion.autoencoder import AutoencoderSettings, AutoencoderTrainer, reconstruction_loss
from training.diffusion.drawings import Drawings, resized, to_pixels, to_tensor

SMALL = AutoencoderSettings(steps=60, batch=4, channels=(8, 8, 16, 16), latent=4)


@pytest.fixture
def drawings() -> Drawings:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 4, 4, generator=generator)
    pixels = to_pixels(F.interpolate(coarse, size=(32, 32), mode="bilinear") * 2 - 1)
    return Drawings(np.arange(24), {"split": np.array(["train"] * 16 + ["validation"] * 8)}, pixels)


def test_loss_is_zero_for_the_same_picture_and_counts_edges_at_three_scales() -> None:
    wanted = torch.zeros(1, 3, 8, 8)
    assert reconstruction_loss(wanted, wanted, 1.0) == 0
    # A constant error has no edges; a step of 1 down the middle has one of 7 differences a row at each scale: 1/7,
    # 1/3 and 1/1.
    assert reconstruction_loss(wanted + 0.5, wanted, 1.0) == pytest.approx(0.5)
    step = wanted.clone()
    step[..., 4:] = 1.0
    assert reconstruction_loss(step, wanted, 1.0) == pytest.approx(0.5 + 1 / 7 + 1 / 3 + 1)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss(tmp_path: Path, drawings: Drawings, precision: torch.dtype) -> None:
    trainer = AutoencoderTrainer(drawings, SMALL, tmp_path, CPU, precision)
    losses = [trainer.train_step() for _ in range(SMALL.steps)]
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, drawings: Drawings) -> None:
    straight = AutoencoderTrainer(drawings, SMALL, tmp_path / "a")
    for _ in range(4):
        straight.train_step()
    first = AutoencoderTrainer(drawings, SMALL, tmp_path / "b")
    first.train_step()
    first.train_step()
    first.save()
    second = AutoencoderTrainer(drawings, SMALL, tmp_path / "b")
    second.resume()
    second.train_step()
    second.train_step()
    for name, value in straight.average.items():
        torch.testing.assert_close(second.average[name], value, atol=0, rtol=0)


def test_export_is_a_stock_folder_whose_latents_have_unit_variance(
    tmp_path: Path, drawings: Drawings
) -> None:
    trainer = AutoencoderTrainer(drawings, SMALL, tmp_path)
    trainer.run(validate_every=100)
    stock = AutoencoderKL.from_pretrained(tmp_path / "vae")
    for name, value in trainer.average.items():
        torch.testing.assert_close(stock.state_dict()[name], value, atol=0, rtol=0)
    with torch.inference_mode():
        latents = (
            stock.encode(to_tensor(drawings.pixels[:16])).latent_dist.mode() * stock.config.scaling_factor
        )
    assert float(latents.std()) == pytest.approx(1.0, rel=1e-3)
    assert (tmp_path / "reconstructions.png").exists()


def test_resized_takes_means_over_areas() -> None:
    pixels = np.array([[[0, 100], [100, 200]]], np.uint8)[..., None].repeat(3, 3)
    # 99.6 in [-1, 1] and back: rounding to one step of 256.
    assert np.abs(resized(pixels, 1).astype(int) - 100).max() <= 1
    assert resized(pixels, 2) is pixels
