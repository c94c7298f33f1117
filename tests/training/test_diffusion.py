"""The diffusion's data, its conditioning, its export, on towers and drawings made up here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from training.compute import CPU
from training.diffusion.data import Conditions, DiffusionData, held_out_combinations
from training.diffusion.model import DiffusionSettings
from training.diffusion.train import DiffusionTrainer

D, WIDTH, CONTEXT, LATENT, TEMPLATES = 8, 16, 6, 4, 3
SMALL = DiffusionSettings(steps=6, batch=4, channels=(16, 32), warm_up=2)


def conditions(count: int, seed: int) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    # A large mean and few directions: what a small CLIP gives.
    basis = torch.randn(3, D, generator=generator)
    raw = 20 * basis[0] + torch.randn(count, 3, generator=generator) @ basis
    texts = 20 * basis[0] + torch.randn(TEMPLATES, 5, 3, generator=generator) @ basis
    return Conditions(
        fingerprint="towers",
        text_fingerprint="texts",
        images=raw,
        caption=torch.arange(count) % 5,
        captions=np.array(["a", "b", "c", "d", "e"]),
        texts=texts,
        states=torch.randn(5, CONTEXT, WIDTH, generator=generator).half(),
        empty=torch.zeros(CONTEXT, WIDTH).half(),
    )


@pytest.fixture
def data() -> DiffusionData:
    generator = torch.Generator().manual_seed(5)
    return DiffusionData(
        torch.randn(40, LATENT, 8, 8, generator=generator),
        torch.ones(40),
        conditions(40, 1),
        torch.randn(8, LATENT, 8, 8, generator=generator),
        conditions(8, 1),
    )


def test_equalised_embeddings_have_an_even_second_moment_and_keep_zero(data: DiffusionData) -> None:
    made = data.conditions
    equal = torch.cat([made.images, made.texts[0]]) @ made.equaliser(shrink=1e-6)
    values = torch.linalg.eigvalsh(equal.T @ equal / len(equal))
    # Three directions carry everything; the rest are the float32 dust that shrinkage keeps down.
    torch.testing.assert_close(values[-3:], torch.ones(3), atol=1e-2, rtol=0)
    assert values[:-3].max() < 1e-2


def test_shares_of_the_conditioning_are_those_asked_for(tmp_path: Path, data: DiffusionData) -> None:
    trainer = DiffusionTrainer(data, SMALL, tmp_path)
    index = torch.randint(40, (8000,), generator=torch.Generator().manual_seed(0))
    states, labels = trainer.conditioning(trainer.conditions, index, torch.Generator().manual_seed(1))
    zero = (labels == 0).all(1)
    empty = (states == 0).all(2).all(1)
    # 4 standard deviations of a share of 8,000.
    for found, share in (
        (~zero & empty, SMALL.embedding_alone),
        (zero & ~empty, SMALL.prompt_alone),
        (zero & empty, SMALL.nothing),
    ):
        assert found.float().mean() == pytest.approx(share, abs=4 * (share * (1 - share) / 8000) ** 0.5)


def test_embeddings_are_the_drawings_a_siblings_or_the_captions(tmp_path: Path, data: DiffusionData) -> None:
    settings = replace(SMALL, embedding_alone=1.0, prompt_alone=0.0, nothing=0.0, noisy_share=0.0)
    trainer = DiffusionTrainer(data, settings, tmp_path)
    made, index = trainer.conditions, torch.randint(40, (4000,), generator=torch.Generator().manual_seed(0))
    _, labels = trainer.conditioning(made, index, torch.Generator().manual_seed(1))
    zeros = torch.zeros(1, dtype=torch.int64)
    told = labels[:, :D]

    def is_one_of(embeddings: torch.Tensor) -> torch.Tensor:
        known = torch.cat(
            [trainer.class_vector(e[None], zeros, torch.Generator())[:, :D] for e in embeddings]
        )
        return torch.cdist(told, known).min(1)

    own = torch.cat([trainer.class_vector(e[None], zeros, torch.Generator())[:, :D] for e in made.images])
    nearest = torch.cdist(told, own).min(1)
    # The conditioning goes through the noise scheduler's first level, which moves it a little.
    from_image = nearest.values < is_one_of(made.texts.flatten(0, 1)).values
    assert from_image.float().mean() == pytest.approx(settings.image_share, abs=0.032)
    same_caption = made.caption[nearest.indices] == made.caption[index]
    assert same_caption[from_image].all()
    # Of 8 drawings a caption, a sibling is the drawing itself in 1 of 8.
    other = nearest.indices[from_image] != index[from_image]
    assert other.float().mean() == pytest.approx(settings.sibling_share * 7 / 8, abs=0.032)


def test_exported_unet_on_raw_embeddings_equals_the_trained_one_on_equalised_ones(
    tmp_path: Path, data: DiffusionData
) -> None:
    trainer = DiffusionTrainer(data, SMALL, tmp_path)
    trainer.train_step()
    raw, levels = data.conditions.images[:4], torch.zeros(4, dtype=torch.int64)
    noised, sinusoids = trainer.noiser(raw, levels, torch.Generator().manual_seed(0))
    equalised = trainer.class_vector(raw, levels, torch.Generator().manual_seed(0))
    latents, times = data.latents[:4], torch.tensor([0, 100, 500, 999])
    states = data.conditions.states[:4].float()
    expected = trainer.averaged()(latents, times, states, class_labels=equalised).sample
    found = trainer.exported()(latents, times, states, class_labels=torch.cat([noised, sinusoids], 1)).sample
    # float32: embeddings twenty times their spread are multiplied in another order.
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, data: DiffusionData) -> None:
    straight = DiffusionTrainer(data, SMALL, tmp_path / "a")
    for _ in range(4):
        straight.train_step()
    first = DiffusionTrainer(data, SMALL, tmp_path / "b")
    first.train_step()
    first.train_step()
    first.save()
    second = DiffusionTrainer(data, SMALL, tmp_path / "b")
    second.resume()
    second.train_step()
    second.train_step()
    for name, value in straight.average.items():
        torch.testing.assert_close(second.average[name], value, atol=0, rtol=0)


def test_checkpoint_of_another_text_tower_is_refused(tmp_path: Path, data: DiffusionData) -> None:
    trainer = DiffusionTrainer(data, SMALL, tmp_path)
    trainer.save()
    other = Conditions(**{**vars(data.conditions), "text_fingerprint": "others"})
    again = DiffusionTrainer(replace(data, conditions=other, held_out=other), SMALL, tmp_path)
    with pytest.raises(ValueError, match="another text tower"):
        again.resume()


def test_a_tuned_image_tower_keeps_the_equaliser_that_the_weights_know(
    tmp_path: Path, data: DiffusionData
) -> None:
    trainer = DiffusionTrainer(data, SMALL, tmp_path)
    trainer.save()
    moved = {**vars(data.conditions), "fingerprint": "tuned", "images": data.conditions.images * 1.5}
    tuned = DiffusionTrainer(
        replace(data, conditions=Conditions(**moved)),
        SMALL,
        tmp_path,
    )
    assert not torch.equal(tuned.equaliser, trainer.equaliser)
    tuned.resume()
    assert torch.equal(tuned.equaliser, trainer.equaliser)
    tuned.save()
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["fingerprint"] == "tuned"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_on_a_batch(
    tmp_path: Path, data: DiffusionData, precision: torch.dtype
) -> None:
    one = replace(data, latents=data.latents[:1].expand(40, -1, -1, -1))
    trainer = DiffusionTrainer(
        one, DiffusionSettings(steps=60, batch=8, channels=(16, 32), warm_up=5), tmp_path, CPU, precision
    )
    losses = [trainer.train_step() for _ in range(60)]
    # One latent is learnt by heart; v of pure noise and no model at all has a loss of about 1.
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_samples_depend_on_their_caption(tmp_path: Path, data: DiffusionData) -> None:
    trainer = DiffusionTrainer(data, SMALL, tmp_path)
    # Every residual branch starts at zero: the first steps make it say something.
    for _ in range(SMALL.steps):
        trainer.train_step()
    first, again, other = (trainer.sample([c], steps=2) for c in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_held_out_combinations_keep_all_their_artists_out_and_their_parts_in() -> None:
    professions, genders, tones = ("cook", "pilot", "judge"), ("man", "woman"), ("light", "medium", "dark")
    rows = [(p, g, t) for p in professions for g in genders for t in tones for _ in range(3)]
    rows += [("", "man", "dark"), ("cook", "", "dark"), ("cook", "man", "")] * 3
    columns = dict(zip(("profession", "gender", "tone"), np.array(rows).T, strict=True))
    held = held_out_combinations(columns, share=0.3)
    combinations = {tuple(row) for row, out in zip(rows, held, strict=True) if out}
    kept = {tuple(row) for row, out in zip(rows, held, strict=True) if not out}
    assert combinations
    assert not combinations & kept
    assert all(all(c) for c in combinations)
    for column in range(3):
        assert {c[column] for c in combinations} <= {k[column] for k in kept}


def test_unet_is_what_unclip_pipelines_expect(tmp_path: Path, data: DiffusionData) -> None:
    trainer = DiffusionTrainer(data, SMALL, tmp_path)
    trainer.exported().save_pretrained(tmp_path / "unet")
    config = UNet2DConditionModel.load_config(tmp_path / "unet")
    assert config["class_embed_type"] == "projection"
    assert config["projection_class_embeddings_input_dim"] == 2 * D
    assert config["cross_attention_dim"] == WIDTH
