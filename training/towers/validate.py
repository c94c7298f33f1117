"""What the log of a training says: figures on validation drawings, and on artists that were left out.

Every choice is made by these. `training.towers.evaluate` measures finished towers, beside baselines and with the test
artist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from training.towers.pairs import Corpus
from training.towers.retrieval import auc_interval, gender_score, participation_ratio, retrieval

EmbedImages = Callable[[np.ndarray], np.ndarray]
EmbedTexts = Callable[[list[str]], np.ndarray]


def on_validation(
    corpus: Corpus, without: Sequence[str], embed_images: EmbedImages, embed_texts: EmbedTexts
) -> dict[str, float]:
    """Return figures on the held-out drawings of the artists that were trained on, among their own captions.

    Parameters
    ----------
    corpus : Corpus
        The drawings.
    without : Sequence[str]
        Artists that were left out.
    embed_images : callable
        From corpus rows, int64 [n], to unit embeddings, float32 [n, d].
    embed_texts : callable
        From captions to unit embeddings, float32 [n, d].

    Returns
    -------
    dict[str, float]
        R@1 and R@5 of captions, R@1 without drawings whose sibling was trained on, R@1 of concepts whatever the tone,
        R@1 of drawings, AUC of woman against man, and the dimensions that the embeddings fill.
    """
    columns = corpus.columns
    rows = corpus.rows("validation")
    rows = rows[~np.isin(columns["set"][rows], list(without))]
    images, captions = embed_images(rows), columns["caption"][rows]
    distinct, first = np.unique(captions, return_index=True)
    texts, concepts = embed_texts(list(distinct)), columns["concept"][rows]
    found = retrieval(images, captions, texts, distinct)
    strict = ~columns["sibling"][rows].astype(bool)
    found_strict = retrieval(images[strict], captions[strict], texts, distinct)
    said = concepts[first][(images @ texts.T).argmax(1)]
    man, woman = embed_texts(["man", "woman"])
    gender = columns["gender"][rows]
    known = gender != ""
    auc = auc_interval(gender_score(images[known], man, woman), gender[known] == "woman")
    return {
        "r1": found.image_to_text[1].value,
        "r5": found.image_to_text[5].value,
        "r1_strict": found_strict.image_to_text[1].value,
        "r1_concept": float((said == concepts).mean()),
        "r1_text": found.text_to_image[1].value,
        "gender_auc": auc.value,
        "dimensions": participation_ratio(images),
    }


def on_artist(
    corpus: Corpus, artist: str, trained: np.ndarray, embed_images: EmbedImages, embed_texts: EmbedTexts
) -> dict[str, float]:
    """Return retrieval on an artist that was left out, as `training.towers.evaluate` tests on openmoji.

    Parameters
    ----------
    corpus, embed_images, embed_texts
        As for `on_validation`.
    artist : str
        Its drawings without skin tone whose caption was trained on, among their own captions.
    trained : np.ndarray
        Rows that were trained on, int64 [n].
    """
    columns = corpus.columns
    rows = np.flatnonzero((columns["set"] == artist) & (columns["tone"] == ""))
    rows = rows[np.isin(columns["caption"][rows], columns["caption"][trained])]
    captions = columns["caption"][rows]
    distinct = np.unique(captions)
    found = retrieval(embed_images(rows), captions, embed_texts(list(distinct)), distinct)
    return {
        f"{artist}_n": len(rows),
        f"{artist}_r1": found.image_to_text[1].value,
        f"{artist}_r5": found.image_to_text[5].value,
        f"{artist}_r1_text": found.text_to_image[1].value,
    }
