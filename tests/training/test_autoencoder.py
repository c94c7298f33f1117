"""The set encoder and the trained decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from training.autoencoder import (
    AutoencoderSettings,
    AutoencoderTrainer,
    build_autoencoder,
    principal_components,
    write_encoder,
)
from training.pairs import Corpus

SMALL = AutoencoderSettings(steps=4, batch=2, latent=8, channels=(12, 24, 28, 32))


def smooth_images(count: int, seed: int = 0) -> Tensor:
    """Return images in [-1, 1] with the spectrum of drawings: much more low than high frequencies."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    fine = torch.rand(count, 3, 32, 32, generator=generator)
    both = [F.interpolate(x, size=(64, 64), mode="bilinear") for x in (coarse, fine)]
    return (0.8 * both[0] + 0.2 * both[1]) * 2 - 1


@pytest.fixture
def corpus() -> Corpus:
    pixels = ((smooth_images(24) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    split = np.array(["train"] * 16 + ["validation"] * 8)
    empty = np.zeros((0, 64, 64, 3), np.uint8)
    return Corpus({"split": split}, pixels, empty, empty)


def test_encoder_computes_principal_components_of_patches() -> None:
    images = smooth_images(64)
    model = build_autoencoder(SMALL.channels, SMALL.latent)
    weight, bias = write_encoder(model, images, noise=0.1)
    found = model.encode(images).latent_dist
    expected = F.conv2d(images, weight, bias, stride=8)
    # What the 4x4 patches lose of 48 dimensions to 24, and the last norm's: some thousandths of the deviation.
    assert (found.mean - expected).std() < 0.01 * expected.std()
    assert torch.allclose(found.std, torch.full_like(found.std, 0.1), rtol=1e-4)


def test_latents_are_uncorrelated_with_mean_variance_one() -> None:
    images = smooth_images(256)
    model = build_autoencoder(SMALL.channels, SMALL.latent)
    write_encoder(model, images, noise=0.1)
    flat = model.encode(images).latent_dist.mean.transpose(0, 1).flatten(1)
    covariance = torch.cov(flat)
    assert covariance.diagonal().mean() == pytest.approx(1.0, abs=0.05)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    # 16,384 patches, the finest component a hundredth of the coarsest: what is left is the encoder's own error.
    assert correlation.abs().max() < 0.05


def test_principal_components_are_orthonormal_and_in_order() -> None:
    _, directions, variances = principal_components(smooth_images(64), 4, 10)
    flat = directions.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(10), atol=1e-5, rtol=0)
    assert (variances.diff() <= 0).all()


def test_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, corpus: Corpus) -> None:
    straight = AutoencoderTrainer(corpus, SMALL, tmp_path / "a")
    for _ in range(4):
        straight.train_step()
    first = AutoencoderTrainer(corpus, SMALL, tmp_path / "b")
    first.train_step()
    first.train_step()
    first.save()
    second = AutoencoderTrainer(corpus, SMALL, tmp_path / "b")
    second.resume()
    second.train_step()
    second.train_step()
    for name, value in straight.average.items():
        torch.testing.assert_close(second.average[name], value, atol=0, rtol=0)


def test_export_is_a_stock_folder_with_the_averaged_decoder(tmp_path: Path, corpus: Corpus) -> None:
    trainer = AutoencoderTrainer(corpus, SMALL, tmp_path)
    trainer.train_step()
    trainer.export()
    stock = AutoencoderKL.from_pretrained(tmp_path / "vae")
    for name, value in trainer.average.items():
        torch.testing.assert_close(stock.decoder.state_dict()[name], value, atol=0, rtol=0)
