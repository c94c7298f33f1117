"""What is known of each dictionary: its modality table, its cards and its quantiles, and the table of all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.dictionaries import Modality, load_dictionary
from services.encoding.clip import ClipConfig
from services.encoding.images import ImagePreprocess, decode_image
from services.errors import ImageError
from services.imaging.statistics import ActivationStatistics
from services.modality.tables import write_cards, write_thumbnails
from training.build.assemble import without_nan
from training.build.dictionaries import features, training_pairs
from training.build.selection import Selection, select
from training.build.settings import BuildSettings
from training.dictionaries.choose import build_table
from training.modality.cards import build_cards, thumbnail
from training.modality.judges import Judges
from training.modality.score import HELD_OUT, HeldOutPairs, activations, describe
from training.towers.retrieval import auc_interval, gender_score, retrieval

# What the judges made of the held-out pairs, below the build's folder.
JUDGES = "judges.npz"
# Quantiles of so many inputs are known far better than anyone steers.
QUANTILE_INPUTS = 20_000
# With fewer of either gender an AUC is a coin's.
MIN_GENDERED = 5


def held_out_pairs(selection: Selection) -> HeldOutPairs:
    """Return the pairs that tables are made on; which of them the towers trained on nobody knows."""
    pairs = HeldOutPairs.of(selection.embeddings, selection.columns)
    return HeldOutPairs(**{**vars(pairs), "new_to_towers": np.zeros(len(pairs.index), bool)})


def describe_one(
    store: Path, settings: BuildSettings, name: str, work: Path, tell: Callable[[float], None]
) -> list[Path]:
    """Write table, summary, cards and quantiles of one dictionary, and return the files; a process's unit of work."""
    selection = select(store, settings)
    folder = work / "dictionaries"
    dictionary = load_dictionary(folder, name)
    concept = selection.columns["concept"].astype(str)
    judges = Judges.load(work / JUDGES)
    table, summary = describe(
        name, folder, selection.embeddings, held_out_pairs(selection), (judges, concept)
    )
    paths = [
        work / "modality" / f"{name}.parquet",
        work / "summaries" / f"{name}.json",
        work / "cards" / f"{name}.parquet",
        work / "steering" / f"{name}.safetensors",
    ]
    table.write(paths[0])
    write_json(paths[1], summary)
    write_cards(paths[2], build_cards(dictionary, selection.embeddings, selection.columns))
    embeddings, fit = selection.embeddings, selection.where("fit", "pool")[:QUANTILE_INPUTS]
    captions = np.unique(embeddings.caption[fit])
    z_image = activations(dictionary, torch.from_numpy(embeddings.images[fit]), Modality.IMAGE)
    z_text = activations(dictionary, torch.from_numpy(embeddings.mean_texts()[captions]), Modality.TEXT)
    ActivationStatistics.measure(z_image, z_text).write(
        paths[3], dictionary=name, tower_fingerprint=embeddings.fingerprint
    )
    tell(1.0)
    return paths


def measure(
    selection: Selection,
    settings: BuildSettings,
    work: Path,
    summaries: Mapping[str, Any],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Return the table of all dictionaries, the choice of the default among them; choices are made on validation."""
    n = features(settings, selection.embeddings.images.shape[1])
    return without_nan(
        build_table(
            selection.embeddings,
            selection.columns,
            work / "dictionaries",
            work / "modality",
            ["validation", "test"],
            summaries,
            training_pairs(selection),
            n_features=n,
            k=min(settings.k, selection.embeddings.images.shape[1]),
            other_artist=False,
            tell=tell,
        )
    )


def tower_metrics(selection: Selection) -> dict[str, Any]:
    """Return how well the towers match images and captions, and tell the genders, on validation and on test."""
    embeddings, columns = selection.embeddings, selection.columns
    texts = embeddings.mean_texts()
    woman, man = (texts[np.searchsorted(embeddings.captions, who)] for who in ("woman", "man"))
    result: dict[str, Any] = {"fingerprint": embeddings.fingerprint}
    for part in ("validation", "test"):
        index = selection.where(part)
        candidates = np.unique(embeddings.caption[index])
        found = retrieval(
            embeddings.images[index],
            embeddings.caption[index],
            texts[candidates],
            candidates,
            columns["concept"][index].astype(str),
        )
        result[part] = {"towers": asdict(found)}
        gendered = index[columns["gender"][index] != ""]
        women = columns["gender"][gendered] == "woman"
        if min(women.sum(), (~women).sum()) >= MIN_GENDERED:
            score = gender_score(embeddings.images[gendered], man, woman)
            auc = auc_interval(score, women, columns["concept"][gendered].astype(str))
            result[part]["gender"] = {"auc": asdict(auc), "n": len(gendered)}
    # As JSON has it: the keys of recall are texts.
    return json.loads(json.dumps(without_nan(result)))


def card_thumbnails(
    work: Path, names: Sequence[str], images: Mapping[str, bytes], config: ClipConfig
) -> Path:
    """Write the thumbnails that the cards of `names` show.

    Parameters
    ----------
    work : Path
        Of the build.
    names : sequence of str
        Dictionaries.
    images : mapping of str to bytes
        Encoded images by the cards' sample keys.
    config : ClipConfig
        Of the towers: a thumbnail shows what they see of an image.
    """
    fit = ImagePreprocess(config).fit
    thumbnails = {}
    for sample, data in images.items():
        try:
            thumbnails[sample] = thumbnail(np.asarray(fit(decode_image(data))))
        except ImageError:
            # It could be read when it was embedded, and was changed since; its card goes without.
            continue
    path = work / "cards" / "images.parquet"
    write_thumbnails(path, thumbnails)
    return path


def card_samples(work: Path, names: Sequence[str], selection: Selection) -> dict[str, tuple[str, int]]:
    """Return the images that the cards of `names` show: source and row by sample key."""
    import pyarrow.parquet as pq

    used = set()
    for name in names:
        used |= set(
            pq.read_table(work / "cards" / f"{name}.parquet", columns=["sample"])["sample"].to_pylist()
        )
    columns = selection.columns
    return {
        sample: (columns["source"][i], int(columns["row"][i]))
        for i in selection.where(*HELD_OUT)
        if (sample := f"{columns['set'][i]}/{columns['name'][i]}") in used
    }


def write_json(path: Path, document: Any) -> None:
    """Write JSON without NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(document), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
