"""Embed the corpus once, for everything that is fitted on embeddings.

``python -m training.towers.embed`` writes one npz: the drawings as drawn, augmented views of the training drawings,
and every caption in every template, with the fingerprint of the towers. A second run with the same towers and
settings does nothing.

Which pairs are for what (`Role`): a share of the training drawings is kept from the dictionaries, so that what is
said about their features is not said on the pairs that shaped them. The towers did train on those pairs; the
validation pairs are new to both.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from services.encoding.clip import ClipConfig, build_clip, read_clip_config, tower_fingerprint
from services.encoding.texts import Tokenizer
from services.encoding.torch_backend import TorchTowers
from training.corpus.build import DEFAULT_DIR
from training.towers.augment import Augment, AugmentSettings
from training.towers.pairs import TEMPLATES, Corpus, may_flip, names_colour

DEFAULT_CLIP = Path("work/clip")
DEFAULT_OUT = Path("work/embeddings.npz")
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
CHUNK = 512


@dataclass(frozen=True)
class EmbeddingSettings:
    """What to embed.

    Parameters
    ----------
    views : int
        Augmented views of each training drawing.
    held_out : float
        Share of the training drawings that no dictionary sees.
    fit_limit : int
        At most so many drawings of the fit part, drawn at random, for a quick trial; 0 takes all.
    test : bool
        Whether the test artist's drawings are embedded: not while designing.
    seed : int
        Of the augmentation and of the share.
    """

    views: int = 1
    held_out: float = 0.15
    fit_limit: int = 0
    test: bool = True
    seed: int = 0


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings of the corpus.

    Attributes
    ----------
    fingerprint : str
        Of the towers.
    logit_scale : float
        Of the towers.
    rows : np.ndarray
        Corpus row of each image, int64 [n].
    images : np.ndarray
        Unit embeddings, float32 [n, d].
    image_norm : np.ndarray
        Their lengths before, float32 [n].
    caption : np.ndarray
        Row of `texts` with the image's caption, int64 [n].
    part : np.ndarray
        "fit", "pool", "validation" or "test", str [n]; fit and pool are the training drawings that the dictionaries
        see and do not see.
    view_images : np.ndarray
        Augmented views of the fit drawings, float32 [v, d].
    view_caption : np.ndarray
        Row of `texts` for each view, int64 [v]: without skin tone where the view lost its colour.
    captions : np.ndarray
        Distinct captions, str [t].
    texts : np.ndarray
        Unit embeddings of the captions in each template, float32 [templates, t, d].
    text_norm : np.ndarray
        Their lengths before, float32 [templates, t].
    """

    fingerprint: str
    logit_scale: float
    rows: Int[np.ndarray, " n"]
    images: Float[np.ndarray, "n d"]
    image_norm: Float[np.ndarray, " n"]
    caption: Int[np.ndarray, " n"]
    part: np.ndarray
    view_images: Float[np.ndarray, "v d"]
    view_caption: Int[np.ndarray, " v"]
    captions: np.ndarray
    texts: Float[np.ndarray, "templates t d"]
    text_norm: Float[np.ndarray, "templates t"]

    @classmethod
    def load(cls, path: Path) -> EmbeddingSet:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "settings"}
        half = ("images", "view_images", "texts")
        arrays |= {name: _unit(arrays[name].astype(np.float32)) for name in half}
        arrays["fingerprint"], arrays["logit_scale"] = (
            str(arrays["fingerprint"]),
            float(arrays["logit_scale"]),
        )
        return cls(**arrays)

    def save(self, path: Path, settings: EmbeddingSettings) -> None:
        """Write an npz; embeddings as half floats, whose rounding is far below a dictionary's error."""
        arrays = {
            name: value.astype(np.float16) if name in ("images", "view_images", "texts") else value
            for name, value in vars(self).items()
        }
        part = path.with_suffix(".part.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, settings=repr(settings), **arrays)
        part.replace(path)

    def where(self, *parts: str) -> Int[np.ndarray, " m"]:
        """Return the indices of images in any of `parts`."""
        return np.flatnonzero(np.isin(self.part, parts))

    def mean_texts(self) -> Float[np.ndarray, "t d"]:
        """Return the captions' unit embeddings, averaged over templates: what retrieval compares to."""
        return _unit(self.texts.mean(0))

    def pair_texts(self, index: Int[np.ndarray, " m"], seed: int = 0) -> Float[np.ndarray, "m d"]:
        """Return for each image its caption in a template drawn at random."""
        template = np.random.default_rng(seed).integers(0, len(self.texts), len(index))
        return self.texts[template, self.caption[index]]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Embedder:
    """Runs the towers over the corpus with progress.

    Parameters
    ----------
    folder : Path
        Holds open_clip's config and safetensors.
    threads : int or None
        Of PyTorch.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.config: ClipConfig = read_clip_config(folder / CONFIG_FILE)
        self.fingerprint = tower_fingerprint(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        model = build_clip(self.config, folder / WEIGHTS_FILE)
        self.towers = TorchTowers(model, self.config, threads=threads)
        self.tokenizer = Tokenizer(self.config)

    def images(self, images: Float[torch.Tensor, "n 3 h w"]) -> tuple[np.ndarray, np.ndarray]:
        """Embed images in [0, 1]; returns unit embeddings and norms."""
        if images.shape[-2:] != self.config.image_size:
            images = F.interpolate(
                images, self.config.image_size, mode="bilinear", antialias=True, align_corners=False
            )
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.config.mean, self.config.std))
        result = self.towers.encode_images(((images - mean) / std).numpy())
        return result.unit, result.norm

    def drawings(self, corpus: Corpus, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embed drawings as their artists drew them."""
        parts = []
        for chunk in _chunks(rows, "drawings"):
            parts.append(self.images(as_images(corpus.plain[chunk])))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def views(self, corpus: Corpus, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Embed one augmented view of each drawing; returns unit embeddings and whether its colour was lost."""
        augment = Augment(AugmentSettings(), torch.Generator().manual_seed(seed))
        concepts = corpus.columns["concept"]
        size = self.config.image_size[0]
        embeddings, toneless = [], []
        for chunk in _chunks(rows, "views"):
            style = augment.uniform(len(chunk)).numpy()
            matters = names_colour(concepts[chunk])
            images = torch.stack(
                [
                    as_images(_styled(corpus, row, s, m))
                    for row, s, m in zip(chunk, style, matters, strict=True)
                ]
            )
            images = augment.geometry(images, size, torch.from_numpy(may_flip(concepts[chunk])))
            images, lost = augment.colour(images, torch.from_numpy(matters))
            embeddings.append(self.images(images)[0])
            toneless.append(lost.numpy() | ((style >= 0.75) & ~matters))
        return np.concatenate(embeddings), np.concatenate(toneless)

    def captions(self, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embed captions in each template; returns unit embeddings and norms."""
        units, norms = [], []
        for template in TEMPLATES:
            parts = [
                self.towers.encode_texts(self.tokenizer.tokenize([template.format(c) for c in chunk], True))
                for chunk in _chunks(captions, "captions")
            ]
            units.append(np.concatenate([p.unit for p in parts]))
            norms.append(np.concatenate([p.norm for p in parts]))
        return np.stack(units), np.stack(norms)


def as_images(pixels: np.ndarray) -> torch.Tensor:
    """Return uint8 [..., H, W, 3] as float32 [..., 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3))).float().div_(255)


def _styled(corpus: Corpus, row: int, coin: float, colour_matters: bool) -> np.ndarray:
    # The same mixture of styles as the towers saw: half as drawn, a quarter outlined, a quarter line art.
    if coin < 0.5:
        return corpus.plain[row]
    restyled = corpus.columns["restyled"][row]
    return corpus.outlined[restyled] if coin < 0.75 or colour_matters else corpus.lines[restyled]


def _chunks(items: np.ndarray, what: str):
    started = time.monotonic()
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]
        done = min(start + CHUNK, len(items))
        if done == len(items) or (start // CHUNK) % 8 == 7:
            print(f"{what} {done}/{len(items)} {done / (time.monotonic() - started):.0f}/s", flush=True)


def split_parts(split: np.ndarray, held_out: float, seed: int) -> np.ndarray:
    """Return the part of each row: training rows are dealt into "fit" and "pool" by the seed."""
    part = split.astype("<U10").copy()
    train = np.flatnonzero(split == "train")
    pool = np.random.default_rng(seed).permutation(train)[: round(held_out * len(train))]
    part[train] = "fit"
    part[pool] = "pool"
    return part


def embed_corpus(embedder: Embedder, corpus: Corpus, settings: EmbeddingSettings) -> EmbeddingSet:
    """Embed all drawings of the emoji sets and their captions."""
    columns = corpus.columns
    splits = ["train", "validation", "test"] if settings.test else ["train", "validation"]
    rows = np.flatnonzero(np.isin(columns["split"], splits))
    part = split_parts(columns["split"][rows], settings.held_out, settings.seed)
    if settings.fit_limit:
        fit = np.flatnonzero(part == "fit")
        dropped = np.random.default_rng(settings.seed).permutation(fit)[settings.fit_limit :]
        rows, part = np.delete(rows, dropped), np.delete(part, dropped)
    fit = rows[part == "fit"]
    people = np.array(["man", "woman"])
    captions = np.unique(np.concatenate([columns["caption"][rows], columns["concept"][rows], people]))
    views = [embedder.views(corpus, fit, settings.seed + 1 + v) for v in range(settings.views)]
    view_captions = [np.where(lost, columns["concept"][fit], columns["caption"][fit]) for _, lost in views]
    images, image_norm = embedder.drawings(corpus, rows)
    texts, text_norm = embedder.captions(captions)
    empty = np.zeros((0, images.shape[1]), np.float32)
    return EmbeddingSet(
        fingerprint=embedder.fingerprint,
        logit_scale=embedder.towers.logit_scale,
        rows=rows,
        images=images,
        image_norm=image_norm,
        caption=np.searchsorted(captions, columns["caption"][rows]),
        part=part,
        view_images=np.concatenate([empty, *(v for v, _ in views)]),
        view_caption=np.searchsorted(captions, np.concatenate([captions[:0], *view_captions])),
        captions=captions,
        texts=texts,
        text_norm=text_norm,
    )


def is_current(path: Path, fingerprint: str, settings: EmbeddingSettings) -> bool:
    """Return whether `path` holds the embeddings of these towers under these settings."""
    if not path.exists():
        return False
    with np.load(path, allow_pickle=False) as file:
        return str(file["fingerprint"]) == fingerprint and str(file["settings"]) == repr(settings)


def main() -> None:
    """Embed from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, default=DEFAULT_CLIP)
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--views", type=int, default=EmbeddingSettings.views)
    parser.add_argument("--fit-limit", type=int, default=EmbeddingSettings.fit_limit)
    parser.add_argument("--without-test", action="store_true")
    arguments = parser.parse_args()
    settings = EmbeddingSettings(
        views=arguments.views, fit_limit=arguments.fit_limit, test=not arguments.without_test
    )
    embedder = Embedder(arguments.clip, arguments.threads)
    if is_current(arguments.out, embedder.fingerprint, settings):
        print(f"{arguments.out} is current")
        return
    embed_corpus(embedder, Corpus.load(arguments.corpus), settings).save(arguments.out, settings)


if __name__ == "__main__":
    main()
