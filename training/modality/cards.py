"""Feature cards: the drawings and captions that each feature fires on most.

``python -m training.modality.cards`` writes ``work/cards/<name>.parquet`` and the thumbnails they share. Cards show
drawings of the training artists that no dictionary trained on: the test artist's licence (share alike) keeps those
drawings out of a bundle, and what a feature fires on among unseen drawings is what a caller will meet.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from services.dictionaries import Dictionary, Modality
from services.modality.tables import write_cards, write_thumbnails
from training.corpus.build import DEFAULT_DIR as CORPUS_DIR
from training.dictionaries.train import DEFAULT_DIR, load_all
from training.modality.score import HELD_OUT, activations
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS
from training.towers.embed import EmbeddingSet
from training.towers.pairs import Corpus

DEFAULT_OUT = Path("work/cards")
PER_FEATURE = 5
THUMBNAIL_SIDE = 48
THUMBNAIL_QUALITY = 60


def top_distinct(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the largest positive values, one a group, strongest first.

    Parameters
    ----------
    values : np.ndarray
        Float [n].
    groups : np.ndarray
        Int [n]: several drawings of one concept would fill a card with the same thing.
    count : int
        At most so many.
    """
    order = np.argsort(-values, kind="stable")
    order = order[values[order] > 0]
    _, first = np.unique(groups[order], return_index=True)
    return order[np.sort(first)[:count]]


def card_rows(
    z: Any, modality: Modality, samples: list[str], texts: np.ndarray, groups: np.ndarray
) -> list[dict[str, Any]]:
    """Return the card rows of one modality for all features; see `services.modality.tables.CARDS_SCHEMA`."""
    columns = z.tocsc() if hasattr(z, "tocsc") else None
    rows = []
    for feature in range(z.shape[1]):
        if columns is None:
            where, values = np.arange(len(z)), z[:, feature]
        else:
            span = slice(columns.indptr[feature], columns.indptr[feature + 1])
            where, values = columns.indices[span], columns.data[span]
        for rank, i in enumerate(top_distinct(values, groups[where], PER_FEATURE)):
            sample = where[i]
            rows.append(
                {
                    "feature": feature,
                    "modality": modality.value,
                    "rank": rank,
                    "activation": float(values[i]),
                    "sample": samples[sample] if samples else "",
                    "text": str(texts[sample]),
                }
            )
    return rows


def thumbnail(pixels: np.ndarray) -> bytes:
    """Return a drawing, uint8 [H, W, 3], as a small WebP."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    image.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY, method=4)
    return buffer.getvalue()


def build_cards(
    dictionary: Dictionary, embeddings: EmbeddingSet, columns: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Return the card rows of one dictionary."""
    index = embeddings.where(*HELD_OUT)
    rows = embeddings.rows[index]
    samples = [f"{columns['set'][row]}/{columns['name'][row]}" for row in rows]
    _, concepts = np.unique(columns["concept"][rows], return_inverse=True)
    captions = embeddings.captions[embeddings.caption[index]]
    z_image = activations(dictionary, torch.from_numpy(embeddings.images[index]), Modality.IMAGE)
    distinct = np.unique(embeddings.caption[index])
    concept_of = dict(zip(captions, concepts, strict=True))
    texts = embeddings.captions[distinct]
    z_text = activations(dictionary, torch.from_numpy(embeddings.texts[0][distinct]), Modality.TEXT)
    groups = np.array([concept_of[text] for text in texts])
    return card_rows(z_image, Modality.IMAGE, samples, captions, concepts) + card_rows(
        z_text, Modality.TEXT, [], texts, groups
    )


def main() -> None:
    """Write the cards from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS)
    parser.add_argument("--corpus", type=Path, default=CORPUS_DIR)
    parser.add_argument("--dictionaries", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    embeddings, corpus = EmbeddingSet.load(arguments.embeddings), Corpus.load(arguments.corpus)
    used: set[str] = set()
    for name, dictionary in load_all(arguments.dictionaries).items():
        rows = build_cards(dictionary, embeddings, corpus.columns)
        write_cards(arguments.out / f"{name}.parquet", rows)
        used |= {row["sample"] for row in rows if row["sample"]}
        print(f"{name} {len(rows)} rows", flush=True)
    row_of = {
        f"{corpus.columns['set'][row]}/{corpus.columns['name'][row]}": row
        for row in embeddings.rows[embeddings.where(*HELD_OUT)]
    }
    thumbnails = {sample: thumbnail(corpus.plain[row_of[sample]]) for sample in used}
    write_thumbnails(arguments.out / "images.parquet", thumbnails)
    print(f"{len(thumbnails)} thumbnails, {sum(map(len, thumbnails.values())) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
