"""Let the judges look at a build's held-out pairs: what EmbSim and WinRate compare, whatever the towers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from training.build.selection import Selection
from training.build.settings import BuildSettings
from training.build.studies import Pictures, Skipped
from training.modality.judges import judge_images, judge_texts
from training.modality.score import HELD_OUT

# Images, and captions, that are judged: features are few beside them, and each image takes 15 ms.
JUDGED = 4_000
# Images that are in memory at once.
CHUNK = 256


def judge_pairs(
    selection: Selection, settings: BuildSettings, out: Path, tell: Callable[[float], None]
) -> list[Path]:
    """Judge images and captions of the held-out pairs, and write what `training.modality.judges.Judges` reads.

    Parameters
    ----------
    selection : Selection
        The pairs. Those whose image cannot be read again are left out; without `--pairs` all are, and texts alone are
        judged.
    settings : BuildSettings
        With the sources.
    out : Path
        The file.
    tell : callable
        Told the number of images after each chunk.
    """
    embeddings = selection.embeddings
    held_out = embeddings.where(*HELD_OUT)
    index = np.sort(np.random.default_rng(settings.seed).permutation(held_out)[:JUDGED])
    rows, images = [np.zeros(0, np.int64)], [np.zeros((0, 1), np.float16)]
    for found, pixels in _pictures(selection, settings, index):
        rows.append(embeddings.rows[found])
        images.append(judge_images(pixels))
        tell(len(found))
    captions = np.unique(embeddings.captions[embeddings.caption[held_out]].astype(str))
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(captions)[:JUDGED])
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        out,
        rows=np.concatenate(rows),
        images=np.concatenate(images[1:] or images),
        captions=chosen,
        texts=judge_texts(chosen),
    )
    return [out]


def _pictures(
    selection: Selection, settings: BuildSettings, index: np.ndarray
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield places among the embeddings and their images, float32 (B, 3, H, W) in [0, 1]."""
    if not settings.pairs:
        return
    pictures = Pictures(selection, settings)
    for start in range(0, len(index), CHUNK):
        try:
            pixels, found = pictures.read(index[start : start + CHUNK])
        except Skipped:
            continue
        yield found, pixels
