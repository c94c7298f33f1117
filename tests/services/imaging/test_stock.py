"""A pipeline that leaves its prompts to the bundle's text tower: served, and written out for diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.bundle.load import Bundle, refresh_manifest
from services.errors import InvalidInput, ManifestError, NoPipeline
from services.imaging.generator import ImageRequest, Imaging
from services.imaging.pipeline import load_parts
from services.imaging.stock import write_stock_pipeline
from tests.services.imaging.conftest import Load

REQUEST = ImageRequest("red circle", seed=7)


def without_text_encoder(bundle: Bundle, path: Path) -> Bundle:
    """Return a copy of a bundle whose pipeline has neither text encoder nor tokenizer."""
    path = Path(shutil.copytree(bundle.path, path))
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(path / "diffusion" / name)
    file = path / "diffusion" / "model_index.json"
    index = json.loads(file.read_text()) | {"text_encoder": [None, None], "tokenizer": [None, None]}
    file.write_text(json.dumps(index))
    refresh_manifest(path)
    return Bundle.load(path)


@pytest.fixture
def lean(load_kind: Load, tmp_path: Path) -> Bundle:
    return without_text_encoder(load_kind("unclip")[0], tmp_path / "lean")


def test_pictures_are_the_same_byte_for_byte_as_with_a_text_encoder_of_its_own(
    load_kind: Load, lean: Bundle
) -> None:
    _, whole = load_kind("unclip")
    imaging = Imaging.load(lean, threads=1, max_batch=1)
    assert imaging.paths == whole.paths
    pictures = [one.generate([REQUEST], batch=1)[0].image.tobytes() for one in (whole, imaging)]
    assert pictures[0] == pictures[1]


def test_the_tower_of_other_embeddings_does_not_read_its_prompts(lean: Bundle) -> None:
    from dataclasses import replace

    assert lean.manifest.diffusion is not None
    other = replace(lean.manifest.diffusion, tower_fingerprint="0" * 64)
    for bundle in (lean, None):
        with pytest.raises(ManifestError, match="no text encoder"):
            load_parts(lean.path / "diffusion", other, bundle=bundle)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_runs_what_is_written_out_and_draws_what_is_served(lean: Bundle, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = write_stock_pipeline(lean, tmp_path / "out")
    pipe: Any = DiffusionPipeline.from_pretrained(folder, feature_extractor=None)
    tokens = pipe.tokenizer(REQUEST.prompt, padding="max_length", return_tensors="pt")
    embedding = pipe.image_encoder(**tokens).text_embeds
    imaging = Imaging.load(lean, threads=1, max_batch=1)
    own = imaging.embed_text(REQUEST.prompt)
    np.testing.assert_allclose(embedding[0].detach().numpy(), own.unit * own.norm, atol=1e-5)
    found = pipe(
        prompt=REQUEST.prompt,
        image_embeds=embedding,
        num_inference_steps=imaging.entry.num_inference_steps,
        guidance_scale=imaging.entry.guidance_scale,
        generator=torch.Generator().manual_seed(REQUEST.seed),
    ).images[0]
    (served,) = imaging.generate([REQUEST], batch=1)
    # One step of 255: rounding of numbers that differ in their last bits.
    assert np.abs(np.asarray(found).astype(int) - np.asarray(served.image).astype(int)).max() <= 1


def test_what_is_there_already_is_not_written_over(lean: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="already"):
        write_stock_pipeline(lean, tmp_path)


def test_a_bundle_without_a_pipeline_has_none_to_write(tiny: Bundle, tmp_path: Path) -> None:
    with pytest.raises(NoPipeline):
        write_stock_pipeline(tiny, tmp_path / "out")
