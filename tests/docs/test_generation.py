"""What docs/generation.md says of the embedded pipeline holds of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from deployments.settings import EMBEDDED_BUNDLE

PAGE = " ".join((Path(__file__).parents[2] / "docs" / "generation.md").read_text().split())


def test_the_mean_of_the_embeddings_is_as_small_as_it_says() -> None:
    # A dictionary's pre-bias is the mean embedding of a modality, each of unit length.
    weights = load_file(EMBEDDED_BUNDLE / "dictionaries" / "sae.safetensors")
    shares = [float(np.sum(weights[f"pre_bias_{side}"] ** 2)) for side in ("image", "text")]
    (said,) = re.findall(r"the mean is small \((\d+)% of images', (\d+)% of captions'\)", PAGE)
    assert [round(100 * share) for share in shares] == [int(number) for number in said]


@pytest.mark.filterwarnings("ignore")
def test_plain_diffusers_loads_it_and_cannot_run_it() -> None:
    from diffusers import StableUnCLIPImg2ImgPipeline

    (options,) = re.findall(r"`from_pretrained\(folder, ([^)]*)\)` and cannot run it", PAGE)
    assert options == "image_encoder=None, feature_extractor=None"
    folder = EMBEDDED_BUNDLE / "diffusion"
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(folder, image_encoder=None, feature_extractor=None)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'parameters'"):
        pipeline(
            prompt="a heart", image_embeds=torch.zeros(1, 256), num_inference_steps=1, height=64, width=64
        )


def test_its_sizes_are_those_of_the_folder() -> None:
    folder = EMBEDDED_BUNDLE / "diffusion"
    (megabytes,) = re.findall(r"64 px, (\d+) MB in half precision", PAGE)
    assert round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6) == int(megabytes)
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (millions,) = re.findall(r"`UNet2DConditionModel`, ([\d.]+) M parameters", PAGE)
    assert round(sum(part.size for part in unet.values()) / 1e6, 1) == float(millions)
    assert {part.dtype for part in unet.values()} == {np.dtype(np.float16)}
