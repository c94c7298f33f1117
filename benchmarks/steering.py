"""What steering by IMAGE, TEXT and CROSS features does to a picture, at one dose, beside four controls.

`python -m benchmarks.steering [--bundle bundles/emoji] [--pairs 60]`

Each pair is two validation drawings of different concepts: the base, whose embedding and caption condition the picture,
and a reference. Groups, each brought to the same dose, which is the length of the change as the generator sees it:

* IMAGE, TEXT, CROSS: the features of a label that differ most are moved to their value in the reference (its picture;
  its caption where they are TEXT). A pair counts where every label reaches the largest dose without going more than a
  quarter past the reference.
* random: as many features drawn from all that differ.
* low-level: a dense direction, the regression of embeddings on colours, ink and edges within concepts, applied to the
  difference of the two drawings.
* concept: the difference of the two concepts' mean embeddings.
* none: no edit, whose change is none by construction; strength 0 is compared with it byte for byte.

Both measures are signed and in shares of the way to the reference: semantic by the judge on grey pictures, from the
base's caption to the reference's; low-level along the difference of the two drawings' colours, ink and edges. The
contrast of the last two directions, which are known to be low-level and semantic, must come out at p < .001, or nothing
that this protocol says of labels counts, and its table says so. Then come sixteen pairs of pictures for a reader
(`benchmarks.steering_pairs`). Writes tables, out/bench/steering.json, a plot and sheets.
"""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.generation import OUT, grid
from benchmarks.steering_pairs import reader_pairs
from benchmarks.steering_statistics import Changes, dose_response, effects, interaction, plot
from services.bundle.load import Bundle
from services.dictionaries.base import Dictionary
from services.encoding.machine import usable_cores
from services.errors import InvalidInput
from services.imaging.conditioning import activations
from services.imaging.denoiser import Sample
from services.imaging.edits import Edit, FromReference, ImageRequest, Operation, Steering
from services.imaging.features import feature_space
from services.imaging.generator import Imaging
from services.imaging.steering import Embedding, FeatureSpace, Steered, dosed, steer
from services.modality.tables import Label
from training.corpus.build import DEFAULT_DIR
from training.imaging.colour import GROUND, lab
from training.imaging.study import draw, grey
from training.judging.train import DEFAULT_OUT as JUDGE
from training.judging.train import Judge
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS
from training.towers.embed import EmbeddingSet
from training.towers.pairs import Corpus

LABELS = ("IMAGE", "TEXT", "CROSS")
GROUPS = (*LABELS, "random", "low-level", "concept")
SHEET_PAIRS = 6
# Of the contrast that must come out.
LEVEL = 0.001
# A dose that is this near is reached.
REACHED = 0.95
# Of the within-concept regression, relative to the mean variance of the descriptors.
RIDGE = 1e-2


@dataclass(frozen=True)
class SteeringPair:
    """A drawing to steer and a reference: corpus rows, captions, and the features that each group's edit moves."""

    base: int
    reference: int
    caption: str
    reference_caption: str
    features: dict[str, tuple[int, ...]]


def png(pixels: np.ndarray) -> bytes:
    """Return uint8 [n, H, W, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def descriptors(pixels: np.ndarray) -> np.ndarray:
    """Return colours, ink and edges of pictures, uint8 [n, H, W, 3], float64 [n, 8].

    Mean and deviation of L*, a* and b* over the ink, its share of the picture, and the mean gradient of L* over it.
    """
    found = []
    for start in range(0, len(pixels), 128):
        part = pixels[start : start + 128]
        seen = lab(part)
        ink = (part < GROUND).any(-1)
        count = np.maximum(ink.sum((1, 2)), 1)[:, None]
        mean = (seen * ink[..., None]).sum((1, 2)) / count
        spread = np.sqrt((np.square(seen - mean[:, None, None]) * ink[..., None]).sum((1, 2)) / count)
        gy, gx = np.gradient(seen[..., 0], axis=(1, 2))
        edges = (np.hypot(gx, gy) * ink).sum((1, 2))[:, None] / count
        found.append(np.concatenate([mean, spread, ink.mean((1, 2))[:, None], edges], 1))
    return np.concatenate(found)


class Directions:
    """Dense directions with a known kind of effect, from training drawings.

    Parameters
    ----------
    corpus : Corpus
        Drawings.
    embeddings : EmbeddingSet
        Of them.
    whitening : np.ndarray
        W of the bundle's doses.
    """

    def __init__(self, corpus: Corpus, embeddings: EmbeddingSet, whitening: np.ndarray) -> None:
        index = embeddings.where("fit", "pool")
        rows = embeddings.rows[index]
        self.concept = corpus.columns["concept"][rows]
        self.raw = embeddings.images[index] * embeddings.image_norm[index, None]
        low_level = descriptors(corpus.plain[rows])
        self.mean, self.std = low_level.mean(0), low_level.std(0)
        _, group = np.unique(self.concept, return_inverse=True)
        x, y = (
            within(values, group) for values in ((low_level - self.mean) / self.std, self.raw @ whitening)
        )
        gram = x.T @ x
        gram += RIDGE * gram.diagonal().mean() * np.eye(len(gram))
        self.slope = np.linalg.solve(gram, x.T @ y) @ np.linalg.inv(whitening.astype(np.float64))

    def standard(self, pixels: np.ndarray) -> np.ndarray:
        """Return descriptors in deviations over the training drawings."""
        scaled: np.ndarray = (descriptors(pixels) - self.mean) / self.std
        return scaled

    def low_level(self, base: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Return the change of an embedding that goes with the difference of two drawings, each [H, W, 3]."""
        change: np.ndarray = (self.standard(reference[None]) - self.standard(base[None]))[0] @ self.slope
        return change

    def to_concept(self, base: str, reference: str) -> np.ndarray:
        """Return the difference of two concepts' mean embeddings."""
        own, other = (self.raw[self.concept == name].mean(0, dtype=np.float64) for name in (base, reference))
        change: np.ndarray = other - own
        return change


def within(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return rows minus the mean of their group, float64."""
    sums = np.zeros((group.max() + 1, values.shape[1]))
    np.add.at(sums, group, values)
    centred: np.ndarray = values - (sums / np.bincount(group)[:, None])[group]
    return centred


class PairMaker:
    """Draws pairs, and says what each group does to the embedding of one."""

    def __init__(
        self, imaging: Imaging, coder: Dictionary, space: FeatureSpace, corpus: Corpus, directions: Directions
    ) -> None:
        self.imaging, self.coder, self.space = imaging, coder, space
        self.corpus, self.directions = corpus, directions
        assert space.table is not None
        assert space.attributes is not None
        self.known = space.attributes
        labels = space.table.label
        self.members = {name: np.flatnonzero(labels == Label[name].value) for name in LABELS}
        self.alive = np.flatnonzero(labels != Label.DEAD.value)

    def source(self, pair: SteeringPair) -> Embedding:
        """Return the embedding of a pair's base."""
        return self.imaging.embed_image(png(self.corpus.plain[pair.base]))

    def operation(self, group: str, pair: SteeringPair) -> Operation:
        """Return where a group's features get their values from."""
        if group == "TEXT":
            return FromReference(text=pair.reference_caption)
        return FromReference(image=png(self.corpus.plain[pair.reference]))

    def steered(self, group: str, pair: SteeringPair, dose: float) -> Steered:
        """Return what a group does to the base's embedding, at a dose or as near to it as the reference allows."""
        source = self.source(pair)
        z = activations(self.coder, source)
        if group in ("low-level", "concept"):
            concept = self.corpus.columns["concept"]
            change = (
                self.directions.low_level(self.corpus.plain[pair.base], self.corpus.plain[pair.reference])
                if group == "low-level"
                else self.directions.to_concept(str(concept[pair.base]), str(concept[pair.reference]))
            )
            unit = source.unit.astype(np.float64)
            moved = unit + dosed(unit, change / source.norm, dose / source.norm, self.known.dose, np.inf)
            moved /= np.linalg.norm(moved)
            size, reached = float(np.linalg.norm(moved - unit)), self.known.dose(source.norm * (moved - unit))
            return Steered(moved.astype(np.float32), source.norm, z, z, size, reached)
        operation = self.operation(group, pair)

        def encode_reference(reference: FromReference) -> np.ndarray:
            found = self.imaging.embed_text(reference.text) if reference.text else None
            return activations(self.coder, found or self.imaging.embed_image(reference.image or b""))

        steering = Steering((Edit(pair.features[group], operation),), dose=dose)
        return steer(source, z, steering, self.space, encode_reference)

    def make(
        self, base: int, reference: int, count: int, largest: float, rng: np.random.Generator
    ) -> SteeringPair | None:
        """Return a pair, or None where some group cannot move the picture so far."""
        captions = self.corpus.columns["caption"]
        bare = SteeringPair(base, reference, str(captions[base]), str(captions[reference]), {})
        z = activations(self.coder, self.source(bare))
        targets = {
            "TEXT": self.imaging.embed_text(bare.reference_caption),
            "IMAGE": self.imaging.embed_image(png(self.corpus.plain[reference])),
        }
        change = {name: np.abs(activations(self.coder, target) - z) for name, target in targets.items()}
        moving = {
            name: ids[change["TEXT" if name == "TEXT" else "IMAGE"][ids] > 0]
            for name, ids in self.members.items()
        }
        k = min(count, *(len(ids) for ids in moving.values()))
        if not k:
            return None
        features = {
            name: ids[np.argsort(-change["TEXT" if name == "TEXT" else "IMAGE"][ids])[:k]]
            for name, ids in moving.items()
        }
        differing = self.alive[change["IMAGE"][self.alive] > 0]
        features["random"] = rng.permutation(differing)[:k]
        pair = SteeringPair(
            base, reference, bare.caption, bare.reference_caption,
            {name: tuple(int(i) for i in ids) for name, ids in features.items()},
        )  # fmt: skip
        try:
            reached = [
                self.steered(group, pair, largest).dose or 0.0 for group in GROUPS if group != "random"
            ]
        except InvalidInput:
            return None
        return pair if min(reached) >= REACHED * largest else None

    def draw(
        self, wanted: int, count: int, largest: float, seed: int, tries: int = 60
    ) -> tuple[list[SteeringPair], int]:
        """Return pairs of validation drawings of different concepts, and how many were tried for them."""
        rng = np.random.default_rng(seed)
        rows, concept = self.corpus.rows("validation"), self.corpus.columns["concept"]
        pairs: list[SteeringPair] = []
        tried = 0
        while len(pairs) < wanted and tried < tries * wanted:
            base, reference = rng.choice(rows, 2, replace=False)
            if concept[base] == concept[reference]:
                continue
            tried += 1
            pair = self.make(int(base), int(reference), count, largest, rng)
            pairs += [pair] if pair is not None else []
        return pairs, tried


def measure(
    judge: Judge,
    directions: Directions,
    corpus: Corpus,
    base: np.ndarray,
    made: np.ndarray,
    pairs: list[SteeringPair],
) -> Changes:
    """Return how far pictures went from `base`, both uint8 [n, H, W, 3], in shares of the way to the reference."""
    own, other = (judge.texts([getattr(p, name) for p in pairs]) for name in ("caption", "reference_caption"))
    references = corpus.plain[[p.reference for p in pairs]]
    semantic = [(judge.images(grey(some)) * (other - own)).sum(1) for some in (base, made, references)]
    low_level = [directions.standard(some) for some in (base, made, references)]
    way = low_level[2] - low_level[0]
    return {
        # The way between two drawings may be short: the mean way is the unit, so that no pair outweighs all others.
        "semantic": (semantic[1] - semantic[0]) / np.mean(semantic[2] - semantic[0]),
        "low-level": ((low_level[1] - low_level[0]) * way).sum(1)
        / np.linalg.norm(way, axis=1)
        / np.mean(np.linalg.norm(way, axis=1)),
    }


def main(
    bundle: Annotated[Path, typer.Option(help="with a pipeline and attributes")] = Path("bundles/emoji"),
    corpus: Annotated[Path, typer.Option()] = DEFAULT_DIR,
    embeddings: Annotated[Path, typer.Option()] = EMBEDDINGS,
    judge: Annotated[Path, typer.Option(help="what training.judging.train wrote")] = JUDGE,
    dictionary: Annotated[str, typer.Option(help="empty: the bundle's default")] = "",
    pairs: Annotated[int, typer.Option()] = 60,
    features: Annotated[int, typer.Option(help="features of an edit, at most")] = 16,
    doses: Annotated[str, typer.Option(help="ascending")] = "0.2,0.4,0.6",
    threads: Annotated[int, typer.Option()] = usable_cores(),
    out: Annotated[Path, typer.Option()] = OUT,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Steer, measure, print two tables and write steering.json."""
    started = time.monotonic()
    torch.set_num_threads(threads)
    loaded = Bundle.load(bundle)
    known = loaded.attributes()
    if known is None:
        raise typer.Exit("this bundle knows no doses: run python -m training.imaging.run")
    imaging = Imaging.load(loaded, device="cpu", threads=threads, max_batch=1)
    name = loaded.resolve(dictionary)
    coder = loaded.dictionary(name)
    space = feature_space(loaded, name, lambda modality: coder.decoder_rows(modality).numpy())
    data, critic = Corpus.load(corpus), Judge(judge)
    out.mkdir(parents=True, exist_ok=True)
    reader = reader_pairs(imaging, loaded, known, data, out / "steering-pairs", seed)
    directions = Directions(data, EmbeddingSet.load(embeddings), known.whitening)
    sizes = [float(dose) for dose in doses.split(",")]
    maker = PairMaker(imaging, coder, space, data, directions)
    chosen, tried = maker.draw(pairs, features, sizes[-1], seed)
    print(f"{len(chosen)} pairs of {tried} tried", flush=True)
    if not chosen:
        raise typer.Exit("no pair in which every group of features can move the picture so far")
    side = data.plain.shape[1]

    def prepare(item: tuple[int, Steered | None]) -> Sample:
        i, steered = item
        pair = chosen[i]
        request = ImageRequest(pair.caption, image=png(data.plain[pair.base]), seed=seed + i)
        return imaging.start(imaging.condition(request, steered), request)

    n = range(len(chosen))
    base = draw(imaging, [(i, None) for i in n], side, prepare=prepare)
    still = draw(
        imaging, [(i, maker.steered("CROSS", chosen[i], 0.0)) for i in n[:20]], side, prepare=prepare
    )
    same = bool((still == base[: len(still)]).all())
    found: dict[str, dict[float, Changes]] = {}
    shown: dict[str, list[np.ndarray]] = {}
    for group in GROUPS:
        for dose in sizes:
            items = [(i, maker.steered(group, chosen[i], dose)) for i in n]
            made = draw(imaging, items, side, prepare=prepare)
            found.setdefault(group, {})[dose] = measure(critic, directions, data, base, made, chosen)
            shown.setdefault(group, [base[:SHEET_PAIRS]]).append(made[:SHEET_PAIRS])
        print(f"{group}: {effects({group: found[group][sizes[-1]]})}", flush=True)
    last = sizes[-1]
    control = interaction(found["low-level"][last], found["concept"][last])
    holds = control["p"] < LEVEL and control["value"] > 0
    result: dict[str, Any] = {
        "bundle": loaded.id,
        "dictionary": name,
        "pairs": len(chosen),
        "tried": tried,
        "features_an_edit": float(np.mean([len(p.features["IMAGE"]) for p in chosen])),
        "doses": sizes,
        "strength_0_is_unsteered_byte_for_byte": same,
        "protocol": "holds" if holds else "is broken: what it says of labels does not count",
        "control": control,
        "effects": {dose: effects({g: found[g][dose] for g in GROUPS}) for dose in sizes},
        "interaction": {
            f"IMAGE against {other}": interaction(found["IMAGE"][last], found[other][last])
            for other in ("TEXT", "CROSS", "random")
        },
        "interaction_dose": last,
        "dose_response": {g: dose_response(found[g]) for g in GROUPS},
        "reader": reader,
        "minutes": (time.monotonic() - started) / 60,
    }
    (out / "steering.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(found, out / "steering-doses.png")
    for i in range(min(SHEET_PAIRS, len(chosen))):
        rows = np.concatenate([np.stack([step[i] for step in shown[g]]) for g in GROUPS])
        grid(rows, 1 + len(sizes), out / f"steering-sheet-{i}.png")
    print_tables(result)


def print_tables(result: dict[str, Any]) -> None:
    """Print the effects at the largest dose, and what follows from them."""
    console, dose = Console(width=150), result["interaction_dose"]
    show = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format
    measured = result["effects"][dose]
    table = Table(
        "share of the way", "none", *GROUPS, title=f"Steering at a dose of {dose:g}, {result['pairs']} pairs"
    )
    for name in ("semantic", "low-level"):
        table.add_row(name, "0", *(show(**measured[g][name]) for g in GROUPS))
    for name in ("semantic", "low-level"):
        shares = (f"{result['dose_response'][g][name]['monotone']:.0%}" for g in GROUPS)
        table.add_row(f"{name}: monotone pairs", "", *shares)
    console.print(table)
    table = Table("low-level minus semantic", "difference", "p", title=f"The protocol {result['protocol']}")
    for name, one in {
        "control: low-level against concept": result["control"],
        **result["interaction"],
    }.items():
        table.add_row(name, show(**{k: one[k] for k in ("value", "low", "high")}), f"{one['p']:.4f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
