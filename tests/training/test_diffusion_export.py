"""The exported folder is a stock pipeline that the service loads and that says what the trained model says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from safetensors.torch import save_file

from services.bundle.manifest import DiffusionEntry
from services.encoding.clip import build_clip
from services.imaging.pipeline import load_parts
from services.strict_json import parse_dataclass
from tests.services.imaging.test_text_encoder import CONTEXT, clip_config
from tests.training.test_diffusion import SMALL, conditions
from training.diffusion.autoencoder import build_autoencoder
from training.diffusion.data import DiffusionData
from training.diffusion.export import assemble_pipeline, trained_on, write_pipeline
from training.diffusion.train import DiffusionTrainer

LATENT = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionTrainer, Path]:
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    vae = build_autoencoder((8, 8, 16, 16), LATENT, 64)
    vae.save_pretrained(folder / "vae")
    made = replace(conditions(40, 1), states=torch.randn(5, CONTEXT, 16), empty=torch.zeros(CONTEXT, 16))
    latents = torch.randn(40, LATENT, 8, 8)
    trainer = DiffusionTrainer(DiffusionData(latents, torch.ones(40), made, latents[:8], made), SMALL, folder)
    trainer.train_step()
    pipeline = assemble_pipeline(trainer, folder / "vae")
    write_pipeline(pipeline, folder / "diffusion", made.fingerprint, steps=3, guidance=2.0)
    return trainer, folder / "diffusion"


def test_the_folder_is_a_pipeline_of_diffusers_without_what_the_bundle_holds_already(
    exported: tuple[DiffusionTrainer, Path],
) -> None:
    encoders = ("image_encoder", "feature_extractor", "text_encoder", "tokenizer")
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(exported[1], **dict.fromkeys(encoders))
    assert pipeline.vae_scale_factor == 8
    assert not any((exported[1] / name).exists() for name in encoders)
    files = {path.suffix for path in exported[1].rglob("*") if path.is_file()}
    assert files <= {".json", ".safetensors", ".txt", ".jinja"}


def test_service_loads_the_folder_and_its_unet_says_what_was_trained(
    exported: tuple[DiffusionTrainer, Path],
) -> None:
    trainer, folder = exported
    clip, config = folder / "clip.safetensors", clip_config()
    model = build_clip(config, None)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, clip)
    manifest = SimpleNamespace(clip=SimpleNamespace(fingerprint=trainer.conditions.fingerprint))
    bundle: Any = SimpleNamespace(manifest=manifest, clip_config=config, clip_weights=clip)
    entry = parse_dataclass(DiffusionEntry, json.loads((folder / "monofacet.json").read_text()), "diffusion")
    parts = load_parts(folder, entry, bundle=bundle)
    assert parts.tokenizer.model_max_length == CONTEXT
    raw = trainer.conditions.images[:3]
    labels = torch.cat(
        trainer.noiser(raw, torch.zeros(3, dtype=torch.int64), torch.Generator().manual_seed(0)), 1
    )
    states, latents = trainer.conditions.states[:3].float(), trainer.latents[:3]
    with torch.inference_mode():
        expected = trainer.exported()(latents, 500, states, class_labels=labels).sample
        found = parts.unet(latents, 500, states, class_labels=labels).sample
    # Weights were rounded to half precision, 0.05% each; embeddings are twenty times their spread.
    assert (found - expected).norm() < 0.02 * expected.norm()
    torch.testing.assert_close(parts.image_normalizer.mean, trainer.noiser.normaliser.mean)


def test_only_a_model_of_the_same_towers_counts_as_trained(
    exported: tuple[DiffusionTrainer, Path], tmp_path: Path
) -> None:
    trainer, _ = exported
    for name in ("towers", "others"):
        np.savez(tmp_path / f"{name}.npz", fingerprint=name)
    assert not trained_on(tmp_path, tmp_path / "towers.npz")
    trainer.folder = tmp_path
    trainer.save()
    assert trained_on(tmp_path, tmp_path / "towers.npz")
    assert not trained_on(tmp_path, tmp_path / "others.npz")
