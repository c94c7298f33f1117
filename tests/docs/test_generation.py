"""What docs/generation.md says of the embedded pipeline holds of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from benchmarks.generation_page import KEPT, block, collect, put_into
from deployments.bundle_command import commands
from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import Bundle
from services.imaging.edits import ImageRequest
from services.imaging.generator import Imaging
from tests.support.tiny_bundle import make_tiny_bundle
from tests.support.tiny_pipeline import add_tiny_pipeline
from training.diffusion.choose import RECORD

TEXT = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
PAGE = " ".join(TEXT.split())


def test_the_mean_of_the_embeddings_is_as_small_as_it_says() -> None:
    # A dictionary's pre-bias is the mean embedding of a modality, each of unit length.
    weights = load_file(EMBEDDED_BUNDLE / "dictionaries" / "sae.safetensors")
    shares = [float(np.sum(weights[f"pre_bias_{side}"] ** 2)) for side in ("image", "text")]
    (said,) = re.findall(r"the mean is small \((\d+)% of images', (\d+)% of captions'\)", PAGE)
    assert [round(100 * share) for share in shares] == [int(number) for number in said]


@pytest.fixture(params=["embedded", "tiny"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    if request.param == "embedded":
        return Bundle.load(EMBEDDED_BUNDLE)
    return add_tiny_pipeline(make_tiny_bundle(tmp_path / "tiny"))


@pytest.mark.filterwarnings("ignore")
def test_the_lines_of_the_page_run_in_stock_diffusers_and_draw_what_is_served(
    bundle: Bundle, tmp_path: Path
) -> None:
    from diffusers import StableUnCLIPImg2ImgPipeline

    (command,) = re.findall(r"`monofacet (bundle export-pipeline) bundles/emoji out/pipeline`", PAGE)
    folder = tmp_path / "pipeline"
    done = CliRunner().invoke(commands, [*command.split()[1:], str(bundle.path), str(folder)])
    assert done.exit_code == 0, done.output
    (lines,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(lines.strip().splitlines()) == 3
    # With a seed, to be compared: the page's lines draw another picture each time.
    seeded = lines.replace("guidance_scale=", "generator=seed, guidance_scale=")
    names: dict[str, Any] = {
        "StableUnCLIPImg2ImgPipeline": StableUnCLIPImg2ImgPipeline,
        "seed": torch.Generator().manual_seed(7),
    }
    exec(seeded.replace("out/pipeline", str(folder)), names)
    request = ImageRequest("sun", seed=7, num_inference_steps=8, guidance_scale=3.0)
    imaging = Imaging.load(bundle, device="cpu", threads=1, max_batch=1)
    (served,) = imaging.generate([request], batch=1)
    assert names["picture"].size == served.image.size
    # Rounding: pointwise convolutions add in another order.
    difference = np.asarray(names["picture"]).astype(int) - np.asarray(served.image).astype(int)
    assert np.abs(difference).max() <= 3


def test_the_page_draws_with_the_settings_of_the_embedded_pipeline() -> None:
    entry = Bundle.load(EMBEDDED_BUNDLE, verify=False).manifest.diffusion
    assert entry is not None
    (said,) = re.findall(r"num_inference_steps=(\d+), guidance_scale=([\d.]+)", PAGE)
    assert (int(said[0]), float(said[1])) == (entry.num_inference_steps, entry.guidance_scale)
    assert f"| UniPC, second order, {entry.num_inference_steps} steps |" in PAGE
    assert json.loads((EMBEDDED_BUNDLE / "diffusion" / RECORD).read_text())["chosen"]["solver"] == "unipc"
    assert f"{entry.height} px" in PAGE


def test_the_figures_of_the_page_are_those_kept_and_those_of_the_embedded_bundle() -> None:
    values = json.loads(KEPT.read_text())
    assert block(values) in TEXT, "run `make figures`"
    assert put_into(TEXT, values) == TEXT
    assert collect(values, EMBEDDED_BUNDLE, None) == values, "run `make figures`"
    assert values["generation"]["unet"] == values["unet"], "measure again: python -m benchmarks.generation"


def test_its_sizes_are_those_of_the_folder() -> None:
    folder = EMBEDDED_BUNDLE / "diffusion"
    (megabytes,) = re.findall(r"128 px, (\d+) MB in half precision", PAGE)
    assert round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6) == int(megabytes)
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (millions,) = re.findall(r"`UNet2DConditionModel`, ([\d.]+) M parameters", PAGE)
    assert round(sum(part.size for part in unet.values()) / 1e6, 1) == float(millions)
    assert {part.dtype for part in unet.values()} == {np.dtype(np.float16)}
