"""Training pairs: which drawing, in which style, with which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from training.compute import CPU
from training.towers.augment import Augment

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


def names_colour(concepts: np.ndarray) -> np.ndarray:
    """Return which concepts, str [n], name a colour: their drawings keep theirs."""
    return np.array([bool(_COLOUR_WORDS & set(c.split())) for c in concepts])


def may_flip(concepts: np.ndarray) -> np.ndarray:
    """Return which concepts, str [n], are the same from left to right: no sides, letters or digits."""
    words = [set(c.split()) for c in concepts]
    return np.array([not w & _SIDED_WORDS and not any(x.isdigit() or len(x) < 2 for x in w) for w in words])


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Parameters
    ----------
    images : Tensor
        float32 [batch, 3, size, size] in [0, 1], augmented.
    rows : np.ndarray
        Rows of the corpus, int64 [batch]; of the first `paired`, rows 2 i and 2 i + 1 are partners.
    captions : np.ndarray
        The caption of each image, without template; toneless where the picture lost its colour; str [batch].
    toneless : np.ndarray
        Whether the picture lost the colour that would tell its skin tone, bool [batch].
    paired : int
        How many images are in pairs; the rest is line art.
    """

    images: Tensor
    rows: np.ndarray
    captions: np.ndarray
    toneless: np.ndarray
    paired: int


class PartnerSampler:
    """Draw batches of emoji, in pairs of one concept by two artists, and of icons.

    Parameters
    ----------
    corpus : Corpus
        The pictures and their words.
    augment : Augment
        Its generator also drives the sampling.
    emoji_share : float
        Share of a batch that comes from the training artists; the rest is line art.
    without : Sequence[str]
        Artists to leave out.

    Raises
    ------
    ValueError
        Where one of these drew nothing of the training drawings.
    """

    def __init__(
        self, corpus: Corpus, augment: Augment, emoji_share: float, without: Sequence[str] = ()
    ) -> None:
        self.corpus, self.augment, self.emoji_share = corpus, augment, emoji_share
        columns = corpus.columns
        emoji, self.icons = corpus.rows("train"), corpus.rows("auxiliary")
        if unknown := set(without) - set(columns["set"][emoji].tolist()):
            raise ValueError(f"no artist of the training drawings: {', '.join(sorted(unknown))}")
        self.emoji = emoji[~np.isin(columns["set"][emoji], list(without))]
        # Square root: a concept in six tones is seen more often than one without, but not six times.
        self.emoji_weights = _inverse_count(columns["concept"][self.emoji]) ** 0.5
        self.icon_weights = _inverse_count(
            np.char.add(np.char.add(columns["set"][self.icons], "|"), columns["concept"][self.icons])
        )
        self.colour_matters = names_colour(columns["concept"])
        self.may_flip = may_flip(columns["concept"])
        self._by_artist: dict[str, dict[str, np.ndarray]] = {}
        order = self.emoji[np.lexsort((columns["set"][self.emoji], columns["concept"][self.emoji]))]
        key = np.char.add(np.char.add(columns["concept"][order], "|"), columns["set"][order])
        for drawings in np.split(order, np.flatnonzero(key[1:] != key[:-1]) + 1):
            concept, artist = (str(columns[name][drawings[0]]) for name in ("concept", "set"))
            self._by_artist.setdefault(concept, {})[artist] = drawings

    def partners(self, rows: np.ndarray) -> np.ndarray:
        """Return for each emoji a drawing of its concept by another artist; itself where no other drew it.

        It has the same caption, skin tone included, where that artist drew it.
        """
        columns = self.corpus.columns
        which, pick = self.augment.uniform(2 * len(rows)).view(2, -1).tolist()
        partners = []
        for row, u, v in zip(rows.tolist(), which, pick, strict=True):
            artists = self._by_artist[str(columns["concept"][row])]
            others = [drawings for artist, drawings in artists.items() if artist != columns["set"][row]]
            if not others:
                partners.append(row)
                continue
            drawings = others[int(u * len(others))]
            same = drawings[columns["caption"][drawings] == columns["caption"][row]]
            drawings = same if len(same) else drawings
            partners.append(int(drawings[int(v * len(drawings))]))
        return np.array(partners)

    def batch(self, size: int, pixels: int, device: torch.device = CPU) -> Batch:
        """Draw one batch of `size` drawings at `pixels` a side, augmented on `device`."""
        augment, columns = self.augment, self.corpus.columns
        paired = round(size * self.emoji_share / 2) * 2
        first = self._draw(self.emoji, self.emoji_weights, paired // 2)
        emoji = np.stack([first, self.partners(first)], 1).ravel()
        rows = np.concatenate([emoji, self._draw(self.icons, self.icon_weights, size - paired)])
        is_icon = np.arange(size) >= paired
        coin, share = augment.uniform(size).numpy(), augment.settings.restyle
        pen = np.where(coin >= share, 0, np.where(coin >= share / 2, 1, 2))
        # Line art has its pen; a drawing known by its colour keeps its fills.
        matters = self.colour_matters[rows]
        pen = np.where(is_icon, 0, np.where(matters & (pen == 2), 1, pen))
        images = torch.from_numpy(self._pixels(rows, pen)).to(device).permute(0, 3, 1, 2).float().div_(255)
        images = augment.geometry(images, pixels, torch.from_numpy(self.may_flip[rows]))
        images = augment.recolour_lines(images, torch.from_numpy(is_icon))
        toned = (columns["tone"][rows] != "") & (pen != 2)
        images, lost = augment.colour(images, torch.from_numpy(matters), torch.from_numpy(toned))
        images = augment.corrupt(images)
        toneless = lost.numpy() | (pen == 2)
        captions = np.where(toneless, columns["concept"][rows], columns["caption"][rows])
        return Batch(images, rows, captions, toneless, paired)

    def _draw(self, rows: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
        picked = torch.multinomial(torch.from_numpy(weights), count, generator=self.augment.generator)
        return rows[picked.numpy()]

    def _pixels(self, rows: np.ndarray, pen: np.ndarray) -> np.ndarray:
        restyled = self.corpus.columns["restyled"]
        sources = (self.corpus.plain, self.corpus.outlined, self.corpus.lines)
        return np.stack([sources[p][restyled[row] if p else row] for row, p in zip(rows, pen, strict=True)])


def _inverse_count(labels: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1.0 / counts[inverse]
