"""Images and bundles to measure with: drawn from a seed, so that every machine measures the same."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
from PIL import Image, ImageDraw

from services.bundle.load import (
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    DEFENSE,
    MODALITY,
    Bundle,
    refresh_manifest,
    write_manifest,
)
from services.bundle.manifest import Licence
from services.dictionaries import SAE, Neurons
from services.encoding.clip import build_clip, read_clip_config, tower_fingerprint
from services.errors import BundleError
from services.modality.tables import Label, ModalityTable
from services.strict_json import canonical_json
from tests.support.tiny_bias import write_bias
from tests.support.tiny_defense import tiny_calibration


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
    """Return a bundle of ViT-B-32 with random weights, made on the first call."""
    return random_clip(path, "ViT-B-32")


def random_clip(path: Path, name: str) -> Bundle:
    """Return a bundle of one of open_clip's models with random weights, made on the first call.

    It is saved in open_clip's format and loaded like any real one; speed does not depend on the weights.
    """
    try:
        return Bundle.load(path, verify=False)
    except BundleError:
        pass
    (path / "clip").mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (path / CLIP_CONFIG).write_bytes(canonical_json(config))
    read = read_clip_config(path / CLIP_CONFIG)
    torch.manual_seed(0)
    model = build_clip(read, None)
    half = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    safetensors.torch.save_file(half, str(path / CLIP_WEIGHTS))
    fingerprint = tower_fingerprint(path / CLIP_CONFIG, path / CLIP_WEIGHTS)
    Neurons(read.embed_dim).save(path / "dictionaries", "neurons", tower_fingerprint=fingerprint)
    write_manifest(
        path,
        name=f"{name.lower()}-random",
        description=f"{name} with random weights, for measuring.",
        licences=[Licence("Apache-2.0", "everything")],
        default_dictionary="neurons",
    )
    return Bundle.load(path)


def vit_b_32_with_features(path: Path, n_features: int, k: int = 32) -> Bundle:
    """Return ViT-B-32 with a TopK autoencoder, its modality table and both calibrations, all of random numbers.

    Made on the first call. What the numbers say is nothing; what they cost is what they would of a trained one.

    Parameters
    ----------
    path : Path
        Folder of the bundle.
    n_features : int
        Of the dictionary.
    k : int
        Features active in one embedding.
    """
    try:
        return Bundle.load(path, verify=False)
    except BundleError:
        pass
    plain = vit_b_32(path.parent / "vit-b-32")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(plain.path / "clip", path / "clip")
    torch.manual_seed(0)
    SAE(512, n_features, k).save(
        path / "dictionaries", "sae", tower_fingerprint=plain.manifest.clip.fingerprint
    )
    random_modality(n_features).write(path / MODALITY / "sae.parquet")
    write_manifest(
        path,
        name=f"vit-b-32-{n_features}",
        description=f"ViT-B-32 with {n_features:,} features, of random weights, for measuring.",
        licences=[Licence("Apache-2.0", "everything")],
        default_dictionary="sae",
    )
    bundle = Bundle.load(path, verify=False)
    write_bias(bundle, path)
    tiny_calibration(bundle).write(path / DEFENSE / "defense.json", path / DEFENSE / "defense.safetensors")
    refresh_manifest(path)
    return Bundle.load(path)


def random_modality(n: int) -> ModalityTable:
    """Return a modality table of `n` living features with labels in turn."""
    rng = np.random.default_rng(0)
    living = [label.value for label in Label if label is not Label.DEAD]
    labels = np.array(living)[np.arange(n) % len(living)]
    share = rng.uniform(0, 1, n)
    return ModalityTable.from_columns(
        {
            "label": labels,
            "mds_energy": share,
            "mds_energy_low": np.clip(share - 0.1, 0, 1),
            "mds_energy_high": np.clip(share + 0.1, 0, 1),
            "mds_paper": share,
            "paper_label": np.where(labels == Label.UNRESOLVED, Label.CROSS, labels),
            "paper_pairs": np.ones(n, np.int64),
            "coactivation": rng.uniform(-1, 1, n),
            "coactivation_p": share,
            "coactivation_q": share,
            "coactivation_significant": labels == Label.CROSS,
            "firing_rate_image": share,
            "firing_rate_text": share,
            "energy_image": share,
            "energy_text": share,
            "name": [f"word{j}" for j in range(n)],
            "name_npmi": share,
            "name_auc": share,
        },
        n,
    )
