"""The training artists' drawings at the side that the text-to-image model draws, larger than the towers' 64 px."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.corpus.build import render
from training.corpus.svg import Style
from training.towers.pairs import Corpus

SIDE = 128


@dataclass(frozen=True)
class Drawings:
    """Pictures and words of the training and the validation split.

    Parameters
    ----------
    rows : np.ndarray
        The drawings' rows in the corpus, int64 [n].
    columns : dict[str, np.ndarray]
        The corpus's columns at those rows.
    pixels : np.ndarray
        RGB, uint8 [n, side, side, 3].
    """

    rows: NDArray[np.int64]
    columns: dict[str, np.ndarray]
    pixels: UInt8[NDArray[np.uint8], "n side side 3"]

    @classmethod
    def load(cls, corpus: Path, side: int = SIDE, workers: int = 2) -> Drawings:
        """Read the drawings of the corpus in folder `corpus`; they are rasterised on first use and kept there."""
        known = Corpus.load(corpus)
        rows = np.flatnonzero(np.isin(known.columns["split"], ["train", "validation"]))
        columns = {name: values[rows] for name, values in known.columns.items()}
        file = corpus / f"drawings-{side}.npy"
        if not file.exists():
            named = [{"set": s, "name": n} for s, n in zip(columns["set"], columns["name"], strict=True)]
            part = file.with_suffix(".part.npy")
            np.save(part, render(named, side, Style.PLAIN, 0, workers))
            part.replace(file)
        pixels = np.load(file, mmap_mode="r")
        if len(pixels) != len(rows):
            raise ValueError(f"{file} is of another corpus; delete it")
        return cls(rows, columns, pixels)

    def split(self, name: str) -> NDArray[np.int64]:
        """Return the positions here, not rows of the corpus, of a split, int64 [m]."""
        return np.flatnonzero(self.columns["split"] == name)


def to_tensor(pixels: np.ndarray) -> Float[Tensor, "batch 3 height width"]:
    """Return uint8 [n, H, W, 3] as float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_pixels(images: Float[Tensor, "batch 3 height width"]) -> UInt8[NDArray[np.uint8], "n height width 3"]:
    """Return images in [-1, 1] as uint8 [n, H, W, 3]."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def resized(pixels: np.ndarray, side: int) -> UInt8[NDArray[np.uint8], "n side side 3"]:
    """Return square pictures, uint8 [n, H, H, 3], as means over areas at another side."""
    if pixels.shape[1] == side:
        return pixels
    return to_pixels(F.interpolate(to_tensor(pixels), size=(side, side), mode="area"))


def sheet(rows: list[np.ndarray], path: Path) -> None:
    """Write rows of pictures, each uint8 [n, H, W, 3] of one n, as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows])).save(path)
