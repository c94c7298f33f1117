"""Images and bundles to measure with: drawn from a seed, so that every machine measures the same."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
from PIL import Image, ImageDraw

from services.bundle import CLIP_CONFIG, CLIP_WEIGHTS, Bundle, write_manifest
from services.dictionaries import Neurons
from services.encoding.clip import build_clip, read_clip_config, tower_fingerprint
from services.errors import BundleError
from services.manifest import Licence
from services.strict_json import canonical_json


def drawing(seed: int, side: int) -> Image.Image:
    """Return a picture of some shapes on a textured ground, `side` x `side` pixels."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(ground).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x0, y0, x1, y1 = np.sort(rng.integers(0, side, (2, 2)), axis=0).ravel().tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x0, y0, x1, y1), fill=colour)
    return image


def jpegs(count: int, side: int = 224) -> list[bytes]:
    """Return `count` different JPEG files of quality 90."""
    files = []
    for seed in range(count):
        buffer = io.BytesIO()
        drawing(seed, side).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def vit_b_32(path: Path) -> Bundle:
    """Return a bundle of ViT-B-32 with random weights, made on the first call.

    It is saved in open_clip's format and loaded like any real one; speed does not depend on the weights.
    """
    try:
        return Bundle.load(path, verify=False)
    except BundleError:
        pass
    (path / "clip").mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    (path / CLIP_CONFIG).write_bytes(canonical_json(config))
    torch.manual_seed(0)
    model = build_clip(read_clip_config(path / CLIP_CONFIG), None)
    half = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    safetensors.torch.save_file(half, str(path / CLIP_WEIGHTS))
    fingerprint = tower_fingerprint(path / CLIP_CONFIG, path / CLIP_WEIGHTS)
    Neurons(512).save(path / "dictionaries", "neurons", tower_fingerprint=fingerprint)
    write_manifest(
        path,
        name="vit-b-32-random",
        description="ViT-B-32 with random weights, for measuring.",
        licences=[Licence("Apache-2.0", "everything")],
        default_dictionary="neurons",
    )
    return Bundle.load(path)
