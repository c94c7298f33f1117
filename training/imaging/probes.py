"""Probes: whether a picture has an attribute, by models that saw other drawings and not the generator's CLIP.

Colour is read from the pixels: the named colour that most of the ink is nearest to. Gender, a matter of a few pixels of
hair, by a small convolutional network. All else by logistic regression on what the judge sees of a picture (ImageNet
features and a thumbnail). All learn from training drawings of concepts without validation drawings, half of them
softened as generated pictures are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from training.compute import CPU, mixed, pick_precision
from training.imaging.attributes import FROWNING, SMILING, TONES
from training.imaging.colour import NAMED, colour_shares
from training.judging.train import Backbone, as_batch, blur, thumbnails
from training.towers.pairs import Corpus

STYLES = ("outline", "line art")
# Drawings of a class that a probe learns from, at most.
A_CLASS = 800


def classes(group: str, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Return the class of each drawing in a group of attributes, str [n]; empty where it has none to tell."""
    if group == "skin tone":
        toned = np.isin(columns["concept"], columns["concept"][columns["tone"] == "dark"])
        names = {tone: f"{tone} skin" for tone in TONES} | {"": "no tone"}
        return np.array(
            [names.get(t, "") if own else "" for t, own in zip(columns["tone"], toned, strict=True)]
        )
    if group == "artist":
        return np.where(columns["role"] == "train", np.char.add(columns["family"], " style"), "")
    if group == "expression":
        words = [frozenset(caption.split()) for caption in columns["caption"]]
        faces = columns["category"] == "Smileys & Emotion"
        found = [
            ("smile" if w & SMILING else "frown" if w & FROWNING else "") if own else ""
            for w, own in zip(words, faces, strict=True)
        ]
        return np.where([bool(w & SMILING and w & FROWNING) for w in words], "", found)
    raise ValueError(f"no classes of {group}")


def inputs_of(pixels: np.ndarray, backbone: Backbone) -> Float[NDArray[np.float32], "n features"]:
    """Return what probes see of pictures, uint8 [n, H, W, 3]."""
    images = as_batch(pixels)
    seen: NDArray[np.float32] = torch.cat([backbone.pooled(images), thumbnails(images)], 1).numpy()
    return seen


@dataclass(frozen=True)
class Probes:
    """Fitted probes.

    Attributes
    ----------
    backbone : Backbone
        What looks at pictures.
    models : dict[str, Any]
        By group: scikit-learn's classifiers of `inputs_of` pictures, and for gender one of their pixels.
    accuracy : dict[str, float]
        Of each on validation drawings, mean over classes.
    """

    backbone: Backbone
    models: dict[str, Any]
    accuracy: dict[str, float]

    @classmethod
    def fit(cls, corpus: Corpus, seen: dict[str, np.ndarray], backbone: Backbone, seed: int = 0) -> Probes:
        """Fit every group's probe.

        Parameters
        ----------
        corpus : Corpus
            Drawings and words.
        seen : dict[str, np.ndarray]
            Of `training.judging.train.read_inputs`.
        backbone : Backbone
            The judge's.
        """
        columns = corpus.columns
        held_out = np.isin(columns["concept"], columns["concept"][columns["split"] == "validation"])
        rng = np.random.default_rng(seed)
        models, accuracy = {}, {}
        for group in ("skin tone", "artist", "expression"):
            label = classes(group, columns)
            x, y = [], []
            for part in ("train", "soft"):
                rows = seen[f"{part}_rows"]
                keep = np.flatnonzero((label[rows] != "") & ~held_out[rows])
                keep = np.concatenate(
                    [
                        rng.permutation(keep[label[rows[keep]] == c])[:A_CLASS]
                        for c in np.unique(label[rows[keep]])
                    ]
                )
                x.append(seen[f"{part}_images"][keep].astype(np.float32))
                y.append(label[rows[keep]])
            models[group] = _classifier().fit(np.concatenate(x), np.concatenate(y))
            rows = seen["validation_rows"]
            keep = np.flatnonzero(label[rows] != "")
            predicted = models[group].predict(seen["validation_images"][keep].astype(np.float32))
            accuracy[group] = _balanced(predicted, label[rows[keep]])
        label = columns["gender"]
        of_gender = np.flatnonzero((label != "") & ~held_out & (columns["split"] == "train"))
        models["gender"] = Pixels(corpus.plain[of_gender], label[of_gender])
        new = np.flatnonzero((label != "") & (columns["split"] == "validation"))
        accuracy["gender"] = _balanced(models["gender"].predict(corpus.plain[new]), label[new])
        models["ink"], accuracy["ink"] = _ink(corpus, held_out, backbone, rng)
        accuracy["colour"] = _colour(corpus)
        return cls(backbone, models, accuracy)

    def has(self, group: str, name: str, pictures: np.ndarray) -> Float[NDArray[np.float64], " n"]:
        """Return whether each picture, uint8 [n, H, W, 3], has an attribute."""
        if group == "colour":
            found = colour_shares(pictures).argmax(1) == list(NAMED).index(name)
        elif group == "gender":
            found = self.models[group].predict(pictures) == name
        else:
            found = self.models[group].predict(inputs_of(pictures, self.backbone)) == name
        return np.asarray(found, np.float64)


class Pixels:
    """A small convolutional network over pictures of the corpus's size, trained when it is made.

    Parameters
    ----------
    pixels : np.ndarray
        Drawings, uint8 [n, H, W, 3].
    labels : np.ndarray
        Theirs, str [n].
    epochs, batch : int
        Passes over them, and drawings a step.
    """

    def __init__(
        self, pixels: np.ndarray, labels: np.ndarray, epochs: int = 5, batch: int = 64, seed: int = 0
    ) -> None:
        self.names, number = np.unique(labels, return_inverse=True)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        parts: list[nn.Module] = []
        for wide, wider in ((3, 32), (32, 64), (64, 128), (128, 192)):
            parts += [nn.Conv2d(wide, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU(), nn.MaxPool2d(2)]
        parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(192, len(self.names))]
        self.model = nn.Sequential(*parts).to(memory_format=torch.channels_last)
        targets, counts = torch.from_numpy(number), torch.from_numpy(np.bincount(number))
        weights = (1 / counts) / (1 / counts).mean()
        steps = max(1, epochs * len(pixels) // batch)
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=4e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps + 1)
        for _ in range(steps):
            index = torch.randint(len(pixels), (batch,), generator=generator)
            with mixed(CPU, pick_precision(CPU)):
                predicted = self.model(self._augmented(as_batch(pixels[index.numpy()]), generator))
            loss = F.cross_entropy(predicted.float(), targets[index], weights.float(), label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        self.model.eval().requires_grad_(False)

    @staticmethod
    def _augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        scale, x, y, mirror, soft = torch.rand(5, generator=generator).tolist()
        size = 0.85 + 0.3 * scale
        move = torch.tensor([[size, 0, 0.2 * x - 0.1], [0, size, 0.2 * y - 0.1]]).expand(len(images), 2, 3)
        place = F.affine_grid(move, list(images.shape), align_corners=False)
        images = F.grid_sample(images, place, padding_mode="border", align_corners=False)
        images = images.flip(3) if mirror < 0.5 else images
        return (blur(images, generator) if soft < 0.5 else images) * 2 - 1

    @torch.inference_mode()
    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Return the name of each picture's class, uint8 [n, H, W, 3] to str [n]."""
        predicted = [self.model(part * 2 - 1).argmax(1) for part in as_batch(pixels).split(256)]
        return self.names[torch.cat(predicted).numpy()]


def _classifier() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200, class_weight="balanced"))


def _balanced(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean([(predicted[true == c] == c).mean() for c in np.unique(true)]))


def _ink(
    corpus: Corpus, held_out: np.ndarray, backbone: Backbone, rng: np.random.Generator
) -> tuple[Any, float]:
    rows = corpus.rows("train")
    x, y, test = [], [], []
    for new in (False, True):
        chosen = np.sort(rng.permutation(rows[held_out[rows] == new])[: 120 if new else 500])
        for name, pixels in (
            ("plain", corpus.plain),
            *zip(STYLES, (corpus.outlined, corpus.lines), strict=True),
        ):
            where = chosen if name == "plain" else corpus.columns["restyled"][chosen]
            images = as_batch(pixels[where])
            generator = torch.Generator().manual_seed(len(y))
            for side in (images, *(() if new else (blur(images, generator),))):
                x.append(torch.cat([backbone.pooled(side), thumbnails(side)], 1).numpy())
                y.append(np.full(len(chosen), name))
                test.append(np.full(len(chosen), new))
    inputs, label, new_ones = np.concatenate(x), np.concatenate(y), np.concatenate(test)
    model = _classifier().fit(inputs[~new_ones], label[~new_ones])
    return model, _balanced(model.predict(inputs[new_ones]), label[new_ones])


def _colour(corpus: Corpus) -> float:
    """Return how often the pixels of drawings that are named by one colour have that colour."""
    columns = corpus.columns
    words = [set(caption.split()) & set(NAMED) for caption in columns["caption"]]
    shapes = [
        bool(set(c.split()) & {"heart", "circle", "square", "book", "apple"}) for c in columns["caption"]
    ]
    rows = [i for i in corpus.rows("train") if len(words[i]) == 1 and shapes[i]]
    predicted = np.array(list(NAMED))[colour_shares(corpus.plain[rows]).argmax(1)]
    return _balanced(predicted, np.array([next(iter(words[i])) for i in rows]))
