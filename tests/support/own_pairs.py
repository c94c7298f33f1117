"""Folders of images with a CSV, as a user would bring them to `monofacet bundle build`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from services.bundle.load import Bundle

COLUMNS = ("path", "caption", "gender", "profession", "label")
WOMEN, MEN = frozenset({"woman", "women", "girl"}), frozenset({"man", "men", "boy"})


def write_table(folder: Path, rows: Sequence[tuple[str, ...]]) -> None:
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def said_gender(caption: str) -> str:
    words = set(caption.split())
    return "woman" if words & WOMEN else "man" if words & MEN else ""


def from_cards(bundle: Bundle, folder: Path, count: int) -> Path:
    """Write pictures that the embedded bundle ships on its cards, people and things in turn, with their captions."""
    captions: dict[str, str] = {}
    for name in bundle.dictionary_names:
        table = bundle.cards(name).table
        for sample, text in zip(table["sample"].to_pylist(), table["text"].to_pylist(), strict=True):
            if sample:
                captions[sample] = text
    # As many women as men, whatever the bundle's cards show most: a study of gender needs enough of both.
    women, men, things = (
        sorted(sample for sample, caption in captions.items() if said_gender(caption) == who)
        for who in ("woman", "man", "")
    )
    chosen = women[: count // 4] + men[: count // 4]
    chosen += things[: count - len(chosen)]
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, sample in enumerate(chosen):
        path = f"images/{number:05d}.webp"
        (folder / path).write_bytes(bundle.thumbnails[sample])
        caption = captions[sample]
        gender = said_gender(caption)
        profession = " ".join(word for word in caption.split() if word not in WOMEN | MEN) if gender else ""
        rows.append((path, caption, gender, profession, ""))
    write_table(folder, rows)
    return folder


def from_corpus(corpus: Path, folder: Path, count: int, artist: str = "openmoji") -> Path:
    """Write drawings of one artist of the corpus, drawn at random by a fixed seed, with their labels."""
    table = pq.read_table(corpus / "corpus.parquet")
    columns = {name: np.asarray(table[name].to_pylist()) for name in table.column_names}
    pictures = np.load(corpus / "plain.npy", mmap_mode="r")
    rows = np.random.default_rng(0).permutation(np.flatnonzero(columns["set"] == artist))[:count]
    (folder / "images").mkdir(parents=True)
    written = []
    for row in np.sort(rows):
        path = f"images/{columns['slug'][row]}.png"
        Image.fromarray(pictures[row]).save(folder / path)
        labels = (columns[name][row] for name in ("caption", "gender", "profession", "concept"))
        written.append((path, *map(str, labels)))
    write_table(folder, written)
    return folder
