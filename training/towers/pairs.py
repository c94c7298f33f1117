"""Training pairs: which drawing, in which style, with which words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from training.augment import Augment

TEMPLATES = ("{}", "an emoji of {}", "a drawing of {}", "{} icon", "a picture that shows {}")

_COLOUR_WORDS = frozenset(
    [
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "brown",
        "black",
        "white",
        "pink",
        "grey",
        "flag",
        "rainbow",
    ]
)
_SIDED_WORDS = frozenset(
    [
        "left",
        "right",
        "leftwards",
        "rightwards",
        "facing",
        "clockwise",
        "counterclockwise",
        "clock",
        "oclock",
        "thirty",
        "flag",
        "input",
        "letters",
        "latin",
        "numbers",
        "digit",
        "keycap",
        "text",
        "abc",
        "sign",
        "symbol",
        "button",
    ]
)


@dataclass(frozen=True)
class Corpus:
    """The corpus in memory.

    Parameters
    ----------
    columns : dict[str, np.ndarray]
        The parquet's columns.
    plain, outlined, lines : np.ndarray
        RGB, uint8 [n, size, size, 3]; the last two only for the training drawings (`restyled` gives the row).
    """

    columns: dict[str, np.ndarray]
    plain: np.ndarray
    outlined: np.ndarray
    lines: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Map the arrays that ``training.corpus.build`` wrote."""
        table = pq.read_table(folder / "corpus.parquet")
        columns = {name: np.asarray(table[name].to_pylist()) for name in table.column_names}
        return cls(
            columns, *(np.load(folder / f"{s}.npy", mmap_mode="r") for s in ("plain", "outlined", "lines"))
        )

    def rows(self, split: str) -> np.ndarray:
        """Return the indices of a split, int64 [n]."""
        return np.flatnonzero(self.columns["split"] == split)


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Parameters
    ----------
    images : Tensor
        float32 [batch, 3, size, size] in [0, 1], augmented.
    captions : list[str]
        The caption of each image, without template; toneless where the picture lost its colour.
    concepts : np.ndarray
        The caption without skin tone, str [batch].
    toneless : np.ndarray
        Whether the picture lost the colour that would tell its skin tone, bool [batch].
    """

    images: Tensor
    captions: list[str]
    concepts: np.ndarray
    toneless: np.ndarray


class PairSampler:
    """Draw batches of emoji and icons.

    Parameters
    ----------
    corpus : Corpus
        The pictures and their words.
    augment : Augment
        Its generator also drives the sampling.
    emoji_share : float
        Share of a batch that comes from the training artists; the rest is line art.
    without : str
        A set to leave out (leave-one-artist-out runs), or empty.
    """

    def __init__(
        self, corpus: Corpus, augment: Augment, emoji_share: float = 0.65, without: str = ""
    ) -> None:
        self.corpus, self.augment, self.emoji_share = corpus, augment, emoji_share
        columns = corpus.columns
        emoji, icons = corpus.rows("train"), corpus.rows("auxiliary")
        self.emoji = emoji[columns["set"][emoji] != without]
        self.icons = icons
        # Square root: a concept in six tones is seen more often than one without, but not six times.
        self.emoji_weights = _inverse_count(columns["concept"][self.emoji]) ** 0.5
        self.icon_weights = _inverse_count(
            np.char.add(np.char.add(columns["set"][icons], "|"), columns["concept"][icons])
        )
        words = [frozenset(c.split()) for c in columns["concept"]]
        self.colour_matters = np.array([bool(w & _COLOUR_WORDS) for w in words])
        self.may_flip = np.array(
            [not w & _SIDED_WORDS and not any(x.isdigit() or len(x) < 2 for x in w) for w in words]
        )

    def _draw(self, rows: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
        picked = torch.multinomial(torch.from_numpy(weights), count, generator=self.augment.generator)
        return rows[picked.numpy()]

    def _pixels(self, rows: np.ndarray, restyle: np.ndarray) -> np.ndarray:
        restyled = self.corpus.columns["restyled"]
        sources = (self.corpus.plain, self.corpus.outlined, self.corpus.lines)
        return np.stack(
            [
                sources[style][restyled[row] if style else row]
                for row, style in zip(rows, restyle, strict=True)
            ]
        )

    def batch(self, size: int, pixels: int) -> Batch:
        """Draw one batch of `size` pairs at `pixels` a side."""
        augment, columns = self.augment, self.corpus.columns
        n_emoji = round(size * self.emoji_share)
        rows = np.concatenate(
            [
                self._draw(self.emoji, self.emoji_weights, n_emoji),
                self._draw(self.icons, self.icon_weights, size - n_emoji),
            ]
        )
        is_icon = torch.arange(size) >= n_emoji
        coin, share = augment.uniform(size).numpy(), augment.settings.restyle
        restyle = np.where(coin >= share, 0, np.where(coin >= share / 2, 1, 2))
        # Line art has its style; a drawing known by its colour keeps its fills.
        matters = self.colour_matters[rows]
        restyle = np.where(is_icon.numpy(), 0, np.where(matters & (restyle == 2), 1, restyle))
        images = torch.from_numpy(self._pixels(rows, restyle)).permute(0, 3, 1, 2).float().div_(255)
        images = augment.geometry(images, pixels, torch.from_numpy(self.may_flip[rows]))
        images = augment.recolour_lines(images, is_icon)
        images, recoloured = augment.colour(images, torch.from_numpy(matters))
        images = augment.corrupt(images)
        toneless = recoloured.numpy() | (restyle == 2)
        captions = np.where(toneless, columns["concept"][rows], columns["caption"][rows])
        return Batch(images, captions.tolist(), columns["concept"][rows], toneless)


def _inverse_count(labels: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1.0 / counts[inverse]
