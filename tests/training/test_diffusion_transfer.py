"""Bringing the text-to-image model over to towers whose outputs are linear in the old ones' loses nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.test_diffusion import SMALL, WIDTH, D, data  # noqa: F401 (a fixture)
from training.compute import CPU
from training.diffusion.data import Conditions, DiffusionData
from training.diffusion.train import DiffusionTrainer
from training.diffusion.transfer import TransferTrainer, least_squares

SETTINGS = replace(SMALL, noisy_share=0.0, mixed_share=0.3, steps=30, batch=16, lr=1e-3)


def turned(known: Conditions) -> Conditions:
    """The same drawings through towers that are the old ones turned and scaled."""
    generator = torch.Generator().manual_seed(3)
    turn = 0.7 * torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    turn_states = 1.3 * torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    return replace(
        known,
        images=known.images @ turn,
        texts=known.texts @ turn,
        states=(known.states.float() @ turn_states).half(),
        empty=(known.empty.float() @ turn_states).half(),
    )


@pytest.fixture
def trainer(data: DiffusionData, tmp_path: Path) -> TransferTrainer:  # noqa: F811
    teacher = DiffusionTrainer(data, SETTINGS, tmp_path / "teacher")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in teacher.unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    teacher.unet.eval().requires_grad_(False)
    teacher.equaliser = torch.eye(D)
    new = replace(data, conditions=turned(data.conditions), held_out=turned(data.held_out))
    return TransferTrainer(new, teacher, SETTINGS, tmp_path, CPU, torch.float32)


def test_least_squares_finds_a_linear_map() -> None:
    rng = np.random.default_rng(0)
    x, through = torch.from_numpy(rng.normal(size=(200, 5))), torch.from_numpy(rng.normal(size=(5, 3)))
    torch.testing.assert_close(least_squares(x, x @ through, 1e-9), through.float(), atol=1e-5, rtol=0)


def test_weights_fitted_to_turned_towers_predict_what_the_teacher_predicts(trainer: TransferTrainer) -> None:
    index = torch.arange(16)
    trainer.unet.load_state_dict(trainer.teacher.unet.state_dict())
    with torch.no_grad():
        unfitted = float(trainer.batch_loss(index))
    trainer.copy_weights()
    assert float(trainer.batch_loss(index)) < 1e-3 * unfitted


def test_the_class_embedding_learns_what_least_squares_cannot(trainer: TransferTrainer) -> None:
    trainer.copy_weights()
    with torch.no_grad():
        trainer.unet.class_embedding.linear_2.weight.mul_(0.5)
    before, after = trainer.fit_class_embedding(300, batch=32)
    assert after < 0.5 * before


def test_training_brings_the_prediction_nearer_to_the_teachers_and_goes_on_after_a_break(
    trainer: TransferTrainer,
) -> None:
    index = torch.arange(40)

    def distance() -> float:
        trainer.generator.manual_seed(11)
        with torch.no_grad():
            return float(trainer.batch_loss(index))

    trainer.copy_weights()
    with torch.no_grad():
        trainer.unet.class_embedding.linear_2.weight.mul_(0.5)
    drawing = trainer.unet.conv_in.weight.clone()
    before = distance()
    for _ in range(SETTINGS.steps):
        trainer.train_step()
    assert distance() < 0.5 * before
    # How things are drawn stays as it was.
    torch.testing.assert_close(trainer.unet.conv_in.weight, drawing, atol=0, rtol=0)
    trainer.save()
    kept = {k: v.clone() for k, v in trainer.unet.state_dict().items()}
    trainer.copy_weights()
    trainer.resume()
    assert trainer.step == SETTINGS.steps
    for name, value in trainer.unet.state_dict().items():
        torch.testing.assert_close(value, kept[name])


def test_a_pipeline_of_the_new_towers_is_gone_on_from_with_every_layer(
    trainer: TransferTrainer,
    data: DiffusionData,  # noqa: F811
    tmp_path: Path,
) -> None:
    trainer.copy_weights()
    trainer.average = {k: v.clone() for k, v in trainer.unet.state_dict().items()}
    folder = tmp_path / "bundle" / "diffusion"
    trainer.exported().save_pretrained(folder / "unet")
    entry = folder / "monofacet.json"
    entry.write_text(json.dumps({"tower_fingerprint": trainer.conditions.fingerprint}))
    new = replace(data, conditions=trainer.conditions, held_out=trainer.held_out)
    other = TransferTrainer(new, trainer.teacher, SETTINGS, tmp_path, CPU, torch.float32, ("",))
    other.start_from(tmp_path / "bundle")
    for name, value in trainer.unet.state_dict().items():
        torch.testing.assert_close(other.unet.state_dict()[name], value, atol=2e-4, rtol=2e-3)
    drawing = other.unet.conv_in.weight.clone()
    other.train_step()
    assert not torch.equal(other.unet.conv_in.weight, drawing)
    entry.write_text(json.dumps({"tower_fingerprint": "of others"}))
    with pytest.raises(ValueError, match="not trained on these towers"):
        other.start_from(tmp_path / "bundle")


def test_embeddings_of_other_captions_are_refused(data: DiffusionData, tmp_path: Path) -> None:  # noqa: F811
    teacher = DiffusionTrainer(data, SETTINGS, tmp_path)
    other = replace(data.conditions, captions=np.array(["a", "b", "c", "d", "f"]))
    with pytest.raises(ValueError, match="same captions"):
        TransferTrainer(replace(data, conditions=other), teacher, SETTINGS, tmp_path, CPU, torch.float32)
