"""The figures every dictionary is judged by: reconstruction, sparsity, and what retrieval and gender keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import roc_auc_score
from torch import Tensor

from services.dictionaries import Dictionary, Modality
from services.intervals import group_bootstrap
from services.modality.coactivation import coactivation
from services.modality.scores import energies, energy_mds
from training.towers.embed import EmbeddingSet
from training.towers.retrieval import gender_score, ranks, recall

IMAGE, TEXT = Modality.IMAGE, Modality.TEXT
# Beyond these a feature is all but blind to one modality.
SPLIT_LOW, SPLIT_HIGH = 1 / 8, 7 / 8


@dataclass(frozen=True)
class EvaluationSet:
    """One part of the corpus, ready for retrieval.

    Attributes
    ----------
    images : Tensor
        Unit embeddings, float32 [n, d].
    captions : np.ndarray
        Of each image, str [n].
    texts : Tensor
        Unit embeddings of the distinct captions, averaged over templates, float32 [m, d].
    text_captions : np.ndarray
        The distinct captions, str [m].
    people : tuple of Tensor
        Unit embeddings of "man" and "woman", [1, d] each.
    gender : np.ndarray
        Of each image, "" where unknown, str [n].
    concepts : np.ndarray
        Of each image, by which intervals are made, str [n].
    fit_mean : dict
        Mean embedding of the fit part by modality, [d]: FVU is relative to it.
    """

    images: Tensor
    captions: np.ndarray
    texts: Tensor
    text_captions: np.ndarray
    people: tuple[Tensor, Tensor]
    gender: np.ndarray
    concepts: np.ndarray
    fit_mean: dict[Modality, Tensor]

    @classmethod
    def of(
        cls, embeddings: EmbeddingSet, columns: dict[str, np.ndarray], part: str, other_artist: bool = True
    ) -> EvaluationSet:
        """Collect one part.

        Where test is by another artist than was trained on (`other_artist`), only its captions without skin tone that
        were trained on count.
        """
        index = embeddings.where(part)
        if part == "test" and other_artist:
            seen = np.isin(embeddings.caption[index], embeddings.caption[embeddings.where("fit", "pool")])
            index = index[seen & (columns["tone"][embeddings.rows[index]] == "")]
        texts = embeddings.mean_texts()
        distinct = np.unique(embeddings.caption[index])
        people = [texts[np.searchsorted(embeddings.captions, [word])] for word in ("man", "woman")]
        fit = embeddings.where("fit")
        return cls(
            images=torch.from_numpy(embeddings.images[index]),
            captions=embeddings.captions[embeddings.caption[index]],
            texts=torch.from_numpy(texts[distinct]),
            text_captions=embeddings.captions[distinct],
            people=(torch.from_numpy(people[0]), torch.from_numpy(people[1])),
            gender=columns["gender"][embeddings.rows[index]],
            concepts=columns["concept"][embeddings.rows[index]].astype(str),
            fit_mean={
                IMAGE: torch.from_numpy(embeddings.images[fit].mean(0)),
                TEXT: torch.from_numpy(texts[embeddings.caption[fit]].mean(0)),
            },
        )

    def sides(self) -> tuple[tuple[Modality, Tensor], tuple[Modality, Tensor]]:
        """Return both modalities with their embeddings."""
        return (IMAGE, self.images), (TEXT, self.texts)

    def pair_texts(self) -> np.ndarray:
        """Return the row of `texts` that belongs to each image, int64 [n]."""
        return np.searchsorted(self.text_captions, self.captions)

    def hits(self, images: Tensor, texts: Tensor) -> Bool[np.ndarray, " n"]:
        """Return for each image whether its caption comes first."""
        return recall(ranks(_unit(images), _unit(texts), self.captions, self.text_captions), 1)

    def r1(self, images: Tensor, texts: Tensor) -> float:
        """Return R@1, image to caption."""
        return float(self.hits(images, texts).mean())

    def gender_auc(self, images: Tensor, man: Tensor, woman: Tensor) -> float:
        """Return the AUC of woman against man on images whose caption says which; NaN without such images."""
        known = self.gender != ""
        positive = self.gender[known] == "woman"
        if positive.all() or not positive.any():
            return float("nan")
        score = gender_score(_unit(images)[known], _unit(man)[0], _unit(woman)[0])
        return float(roc_auc_score(positive, score))


@dataclass(frozen=True)
class DictionaryMetrics:
    """Figures of one dictionary on one part; ratios are kept / without the dictionary.

    Attributes
    ----------
    fvu_image, fvu_text : float
        Fraction of variance unexplained, ||e - e_hat||^2 / ||e - mean||^2.
    cosine_image, cosine_text : float
        Mean cosine of e and e_hat.
    l0_image, l0_text : float
        Mean number of active features.
    dead : float
        Share of features that never fire on the given part or on the fit part.
    r1, r1_round_trip, r1_codes : float
        R@1, image to caption: without the dictionary, on reconstructions, on activations alone.
    auc, auc_round_trip, auc_codes : float
        Zero-shot man/woman, likewise.
    coactivation : float
        Median over live features of the correlation over true pairs.
    split : float
        Share of live features with an energy MDS under 1/8 or over 7/8.
    """

    fvu_image: float
    fvu_text: float
    cosine_image: float
    cosine_text: float
    l0_image: float
    l0_text: float
    dead: float
    r1: float
    r1_round_trip: float
    r1_codes: float
    auc: float
    auc_round_trip: float
    auc_codes: float
    coactivation: float
    split: float

    @property
    def fvu(self) -> float:
        """The mean of the two modalities' FVU."""
        return (self.fvu_image + self.fvu_text) / 2

    def as_dict(self) -> dict[str, float]:
        """Return all figures, with the ratios, rounded to five places."""
        ratios = {
            "fvu": self.fvu,
            "r1_round_trip_kept": self.r1_round_trip / max(self.r1, 1e-9),
            "r1_codes_kept": self.r1_codes / max(self.r1, 1e-9),
        }
        return {key: round(float(value), 5) for key, value in (asdict(self) | ratios).items()}


@torch.no_grad()
def measure(
    dictionary: Dictionary, evaluation: EvaluationSet, alive: Tensor | None = None
) -> DictionaryMetrics:
    """Judge a dictionary.

    Parameters
    ----------
    dictionary : Dictionary
        In eval mode.
    evaluation : EvaluationSet
        The part to judge on.
    alive : Tensor or None
        Features known to fire elsewhere (on the fit part), bool [n].
    """
    z = {modality: dictionary.encode(e, modality) for modality, e in evaluation.sides()}
    back = {modality: dictionary.decode(z[modality], modality) for modality in z}
    man, woman = evaluation.people
    z_man, z_woman = dictionary.encode(man, TEXT), dictionary.encode(woman, TEXT)
    fvu, cosine, l0 = {}, {}, {}
    for modality, e in evaluation.sides():
        error, spread = e - back[modality], e - evaluation.fit_mean[modality]
        fvu[modality] = float((error**2).sum() / (spread**2).sum())
        cosine[modality] = float(torch.cosine_similarity(e, back[modality]).mean())
        l0[modality] = float((z[modality] != 0).sum(1).float().mean())
    fires = (z[IMAGE] != 0).any(0) | (z[TEXT] != 0).any(0)
    z_image, z_text = z[IMAGE].numpy(), z[TEXT].numpy()[evaluation.pair_texts()]
    correlation, _ = coactivation(z_image, z_text, shuffles=1)
    mds = energy_mds(energies(z_image), energies(z_text))
    live = ~np.isnan(mds)
    return DictionaryMetrics(
        fvu_image=fvu[IMAGE],
        fvu_text=fvu[TEXT],
        cosine_image=cosine[IMAGE],
        cosine_text=cosine[TEXT],
        l0_image=l0[IMAGE],
        l0_text=l0[TEXT],
        dead=float((~(fires if alive is None else fires | alive)).float().mean()),
        r1=evaluation.r1(evaluation.images, evaluation.texts),
        r1_round_trip=evaluation.r1(back[IMAGE], back[TEXT]),
        r1_codes=evaluation.r1(z[IMAGE], z[TEXT]),
        auc=evaluation.gender_auc(evaluation.images, man, woman),
        auc_round_trip=evaluation.gender_auc(
            back[IMAGE], dictionary.decode(z_man, TEXT), dictionary.decode(z_woman, TEXT)
        ),
        auc_codes=evaluation.gender_auc(z[IMAGE], z_man, z_woman),
        # A feature silent on a side of every pair has no correlation; it co-activates with nothing.
        coactivation=float(np.median(np.nan_to_num(correlation[live]))) if live.any() else float("nan"),
        split=float(((mds[live] < SPLIT_LOW) | (mds[live] > SPLIT_HIGH)).mean()) if live.any() else 0.0,
    )


@torch.no_grad()
def retained(
    dictionary: Dictionary, evaluation: EvaluationSet, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return the share of R@1 that a dictionary keeps, with its 95% bootstrap interval over concepts.

    Returns
    -------
    dict of str to dict
        "r1_round_trip" and "r1_codes", each with "value", "low" and "high".
    """
    z = {modality: dictionary.encode(e, modality) for modality, e in evaluation.sides()}
    back = {modality: dictionary.decode(z[modality], modality) for modality in z}
    hits = np.stack(
        [
            evaluation.hits(evaluation.images, evaluation.texts),
            evaluation.hits(back[IMAGE], back[TEXT]),
            evaluation.hits(z[IMAGE], z[TEXT]),
        ]
    )
    drawn = group_bootstrap(hits.T.astype(np.float64), evaluation.concepts, resamples, seed)
    found = {}
    for place, name in ((1, "r1_round_trip"), (2, "r1_codes")):
        ratio = drawn[:, place] / np.maximum(drawn[:, 0], 1e-9)
        low, high = np.quantile(ratio, [0.025, 0.975])
        value = hits[place].sum() / max(hits[0].sum(), 1e-9)
        found[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return found


def stability(dictionaries: list[Dictionary]) -> float:
    """Return the mean cosine of decoder rows matched between every two seeds, averaged over modalities.

    Hungarian assignment on the cosine of decoder rows; both modalities' rows of a feature are matched together.
    """
    rows = [_rows(d) for d in dictionaries]
    scores = []
    for i in range(len(rows)):
        for j in range(i):
            cosine = (rows[i] @ rows[j].T).numpy() / 2
            a, b = linear_sum_assignment(cosine, maximize=True)
            scores.append(cosine[a, b].mean())
    return float(np.mean(scores)) if scores else float("nan")


@torch.no_grad()
def _rows(dictionary: Dictionary) -> Float[Tensor, "n two_d"]:
    sides = [torch.nn.functional.normalize(dictionary.decoder_rows(m), dim=-1) for m in (IMAGE, TEXT)]
    return torch.cat(sides, dim=1)


def _unit(x: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x, dim=-1).numpy()
