"""A complete, valid bundle of random weights, built in seconds: what server tests run on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageDraw

from services.bundle.load import CARD_IMAGES, CLIP_CONFIG, CLIP_WEIGHTS, SAMPLES, Bundle, write_manifest
from services.bundle.manifest import Licence
from services.dictionaries import NCL, SAE, Dictionary, Modality, Neurons, SAEPair
from services.encoding.clip import build_clip, read_clip_config, tower_fingerprint
from services.encoding.images import ImagePreprocess
from services.encoding.texts import Tokenizer
from services.encoding.torch_backend import TorchTowers
from services.modality.tables import Label, ModalityTable, write_cards, write_thumbnails

EMBED_DIM = 16
N_FEATURES = 64
K = 8

MODEL = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
CAPTIONS = ("red circle", "green square", "blue triangle", "yellow ring on a dark ground")


def make_tiny_bundle(path: Path | str, seed: int = 0, name: str = "tiny") -> Bundle:
    """Write a bundle under `path` and return it, loaded and verified.

    The towers are a random two-layer ViT at 32 pixels and a random text transformer; the dictionaries
    (`neurons`, `sae` (the default), `sae-group`, `sae-pair`, `ncl`) are random too, so every number is
    meaningless and stable.
    """
    path = Path(path)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    write_clip(path)
    fingerprint = tower_fingerprint(path / CLIP_CONFIG, path / CLIP_WEIGHTS)
    images = write_samples(path)
    config = read_clip_config(path / CLIP_CONFIG)
    towers = TorchTowers(build_clip(config, path / CLIP_WEIGHTS), config)
    pixels = np.stack([ImagePreprocess(config)(image) for image in images])
    e_image = torch.from_numpy(towers.encode_images(pixels).unit)
    e_text = torch.from_numpy(towers.encode_texts(Tokenizer(config).tokenize(CAPTIONS)).unit)
    for kind, dictionary in tiny_dictionaries(e_image, e_text).items():
        dictionary.save(path / "dictionaries", kind, tower_fingerprint=fingerprint, training={"seed": seed})
        write_tables(path, kind, dictionary, e_image, e_text, rng)
    write_thumbnails(path / CARD_IMAGES, {f"sample-{i}": webp(image) for i, image in enumerate(images)})
    write_manifest(
        path,
        name=name,
        description="Random weights for tests.",
        licences=[Licence("Apache-2.0", "everything")],
        default_dictionary="sae",
        provenance={"seed": seed},
        training_commands=["python -m tests.support.tiny_bundle"],
        metrics={"retrieval": {"r_at_1": None}},
    )
    return Bundle.load(path)


def write_clip(path: Path) -> None:
    config = path / CLIP_CONFIG
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}, indent=1))
    model = build_clip(read_clip_config(config), None)
    # open_clip's initial weights are so small that all images embed alike; larger ones make neighbours
    # differ.
    state = {key: value.half() for key, value in model.state_dict().items()}
    for key in state:
        if key.endswith(("proj", "text_projection", "conv1.weight", "in_proj_weight", "embedding.weight")):
            state[key] = state[key] * 4
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, str(path / CLIP_WEIGHTS))


def write_samples(path: Path) -> list[Image.Image]:
    folder = path / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    images = [draw(i) for i in range(len(CAPTIONS))]
    documents = []
    for i, (image, caption) in enumerate(zip(images, CAPTIONS, strict=True)):
        image.save(folder / f"{i}.png")
        documents.append({"path": f"samples/{i}.png", "caption": caption, "artist": "tests"})
    (path / SAMPLES).write_text(json.dumps(documents, indent=1))
    return images


def draw(i: int) -> Image.Image:
    image = Image.new("RGB", (48, 48), "black" if i == 3 else "white")
    pen = ImageDraw.Draw(image)
    if i == 0:
        pen.ellipse((8, 8, 40, 40), fill="red")
    elif i == 1:
        pen.rectangle((8, 8, 40, 40), fill="green")
    elif i == 2:
        pen.polygon(((24, 6), (6, 42), (42, 42)), fill="blue")
    else:
        pen.ellipse((8, 8, 40, 40), outline="yellow", width=5)
    return image


def webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def tiny_dictionaries(e_image: torch.Tensor, e_text: torch.Tensor) -> dict[str, Dictionary]:
    def sae() -> SAE:
        made = SAE(EMBED_DIM, N_FEATURES, K)
        with torch.no_grad():
            made.pre_bias_image.copy_(e_image.mean(0))
            made.pre_bias_text.copy_(e_text.mean(0))
        return made

    ncl = NCL(EMBED_DIM, N_FEATURES, 32)
    ncl.fit_decoder(e_image, e_text, penalty=1e-3)
    pair = SAEPair.matched(sae(), sae(), np.random.default_rng(0).permutation(N_FEATURES))
    return {"neurons": Neurons(EMBED_DIM), "sae": sae(), "sae-group": sae(), "sae-pair": pair, "ncl": ncl}


@torch.no_grad()
def write_tables(
    path: Path,
    name: str,
    dictionary: Dictionary,
    e_image: torch.Tensor,
    e_text: torch.Tensor,
    rng: np.random.Generator,
) -> None:
    n = dictionary.n_features
    # As in a trained bundle: no neuron is about one modality, so a label may have no feature.
    kinds = [Label.CROSS, Label.UNRESOLVED] if name == "neurons" else list(Label)
    labels = np.array([label.value for label in kinds])[np.arange(n) % len(kinds)]
    alive = labels != Label.DEAD
    mds = np.where(alive, rng.uniform(0, 1, n), np.nan)
    table = ModalityTable.from_columns(
        {
            "label": labels,
            "mds_energy": mds,
            "mds_energy_low": np.clip(mds - 0.1, 0, 1),
            "mds_energy_high": np.clip(mds + 0.1, 0, 1),
            "mds_paper": np.where(alive, rng.uniform(0, 1, n), np.nan),
            "paper_label": np.where(labels == Label.UNRESOLVED, Label.CROSS, labels),
            "paper_pairs": rng.integers(1, 5, n) * alive,
            "coactivation": np.where(alive, rng.uniform(-1, 1, n), np.nan),
            "coactivation_p": np.where(alive, rng.uniform(0, 1, n), np.nan),
            "coactivation_q": np.where(alive, rng.uniform(0, 1, n), np.nan),
            "coactivation_significant": labels == Label.CROSS,
            "firing_rate_image": rng.uniform(0, 1, n) * alive,
            "firing_rate_text": rng.uniform(0, 1, n) * alive,
            "energy_image": rng.uniform(0, 1, n) * alive,
            "energy_text": rng.uniform(0, 1, n) * alive,
            "name": [f"word{j}" if alive[j] else "" for j in range(n)],
            "name_npmi": np.where(alive, rng.uniform(0, 1, n), np.nan),
            "name_auc": (area := np.where(alive, rng.uniform(0.5, 1, n), np.nan)),
            "name_auc_low": area - 0.1,
            "name_auc_high": np.minimum(area + 0.1, 1),
            "name_count": rng.integers(5, 50, n) * alive,
        },
        n,
    )
    table.write(path / "modality" / f"{name}.parquet")
    rows = []
    for modality, e in ((Modality.IMAGE, e_image), (Modality.TEXT, e_text)):
        z = dictionary.encode(e, modality)
        for feature in range(n):
            for rank, i in enumerate(z[:, feature].argsort(descending=True)[:2].tolist()):
                rows.append(
                    {
                        "feature": feature,
                        "modality": modality.value,
                        "rank": rank,
                        "activation": float(z[i, feature]),
                        "sample": f"sample-{i}" if modality is Modality.IMAGE else "",
                        "text": CAPTIONS[i],
                    }
                )
    write_cards(path / "cards" / f"{name}.parquet", rows)


if __name__ == "__main__":
    import sys

    print(make_tiny_bundle(sys.argv[1]).id)
