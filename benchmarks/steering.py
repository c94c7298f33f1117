"""What steering by IMAGE, TEXT and CROSS features does to a picture, at equal size of the change.

`python -m benchmarks.steering [--bundle bundles/emoji] [--pairs 200]`

Each pair is a drawing, whose embedding and caption condition the picture, and a reference of another concept. A group's
edit moves the same number of its features to their value in the reference (its picture; its caption where the
features are TEXT, which pictures hardly activate), and is rescaled so that ||e' - e|| / rho is the dose. Groups: IMAGE,
TEXT, CROSS, random features, none; the same seed throughout. Each steered picture is compared with its own unsteered
one: semantics by the judge (how its opinion of what is shown changes, and whether towards the reference), low-level
by colour, texture and perceptual distance, structure by edges, and a quality guard. Writes two tables,
out/bench/steering.json, the dose-response plot and a sheet.
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

from benchmarks.generation import OUT, generate, grid
from benchmarks.image_measures import Eye, colour_distance, structure_distance
from benchmarks.steering_statistics import dose_response, effects, interaction, plot
from services.bundle import Bundle
from services.dictionaries.base import Dictionary
from services.encoding.machine import usable_cores
from services.errors import InvalidInput
from services.imaging.conditioning import activations
from services.imaging.edits import Edit, FromReference, ImageRequest, Operation, Steering
from services.imaging.generator import Imaging
from services.imaging.spaces import feature_space
from services.imaging.steering import Embedding, FeatureSpace, steer
from services.tables import Label
from training.corpus.build import DEFAULT_DIR
from training.diffusion_data import held_out_combinations
from training.judge import DEFAULT_OUT as JUDGE
from training.judge import Judge
from training.pairs import Corpus

GROUPS = ("IMAGE", "TEXT", "CROSS", "random")
# Softness of the judge's opinion over captions: its own logit scale at the end of training.
SHEET_PAIRS = 6


@dataclass(frozen=True)
class Pair:
    """A drawing to steer and a reference.

    Attributes
    ----------
    base, reference : int
        Corpus rows.
    caption, reference_caption : str
        Theirs.
    features : dict[str, tuple[int, ...]]
        By group, the features that its edit moves.
    """

    base: int
    reference: int
    caption: str
    reference_caption: str
    features: dict[str, tuple[int, ...]]


def png(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class PairMaker:
    """Draws pairs for which every group has an edit that can reach the largest dose.

    Parameters
    ----------
    imaging : Imaging
        Its towers embed.
    dictionary : Dictionary
        Encodes embeddings.
    space : FeatureSpace
        Its labels.
    corpus : Corpus
        Drawings and captions.
    count : int
        Features of an edit, at most; fewer where a group has fewer that would move.
    largest : float
        Dose that must be in reach.
    """

    def __init__(
        self,
        imaging: Imaging,
        dictionary: Dictionary,
        space: FeatureSpace,
        corpus: Corpus,
        count: int,
        largest: float,
    ) -> None:
        self.imaging, self.dictionary, self.space, self.corpus = imaging, dictionary, space, corpus
        self.count, self.largest = count, largest
        assert space.table is not None
        labels = space.table.label
        self.members = {g: np.flatnonzero(labels == Label[g].value) for g in GROUPS[:3]}
        self.alive = np.flatnonzero(labels != Label.DEAD.value)

    def operation(self, group: str, pair: Pair) -> Operation:
        """Return where a group's features get their values from."""
        if group == "TEXT":
            return FromReference(text=pair.reference_caption)
        return FromReference(image=png(self.corpus.plain[pair.reference]))

    def steering(self, group: str, pair: Pair, dose: float) -> Steering:
        """Return a group's edit at a dose."""
        return Steering((Edit(pair.features[group], self.operation(group, pair)),), delta=dose)

    def make(self, base: int, reference: int, rng: np.random.Generator) -> Pair | None:
        """Return a pair, or None where some group cannot move the picture so far."""
        captions = self.corpus.columns["caption"]
        bare = Pair(base, reference, str(captions[base]), str(captions[reference]), {})
        source = self.imaging.embed_image(png(self.corpus.plain[base]))
        z = activations(self.dictionary, source)
        targets = {
            "TEXT": self.imaging.embed_text(bare.reference_caption),
            "IMAGE": self.imaging.embed_image(png(self.corpus.plain[reference])),
        }
        reached = {k: activations(self.dictionary, e) for k, e in targets.items()}
        change = {k: np.abs(target - z) for k, target in reached.items()}
        moving = {
            g: ids[change["TEXT" if g == "TEXT" else "IMAGE"][ids] > 0] for g, ids in self.members.items()
        }
        k = min(self.count, *(len(ids) for ids in moving.values()))
        if not k:
            return None
        features = {
            g: ids[np.argsort(-change["TEXT" if g == "TEXT" else "IMAGE"][ids])[:k]]
            for g, ids in moving.items()
        }
        candidates = np.flatnonzero(change["IMAGE"][self.alive] > 0)
        features["random"] = rng.permutation(self.alive[candidates])[:k]
        pair = Pair(
            base, reference, bare.caption, bare.reference_caption,
            {g: tuple(int(i) for i in ids) for g, ids in features.items()},
        )  # fmt: skip
        return pair if self._reachable(source, z, pair, reached) else None

    def _reachable(
        self, source: Embedding, z: np.ndarray, pair: Pair, reached: dict[str, np.ndarray]
    ) -> bool:
        for group in GROUPS:
            target = reached["TEXT" if group == "TEXT" else "IMAGE"]
            try:
                steer(source, z, self.steering(group, pair, self.largest), self.space, lambda _, t=target: t)
            except InvalidInput:
                return False
        return True


def draw_pairs(maker: PairMaker, wanted: int, seed: int, tries: int = 20) -> tuple[list[Pair], int]:
    """Return pairs of drawings of different concepts, and how many were tried for them."""
    columns, rng = maker.corpus.columns, np.random.default_rng(seed)
    rows = maker.corpus.rows("train")
    rows = rows[~held_out_combinations(columns)[rows]]
    pairs: list[Pair] = []
    tried = 0
    while len(pairs) < wanted and tried < tries * wanted:
        base, reference = rng.choice(rows, 2, replace=False)
        if columns["concept"][base] == columns["concept"][reference]:
            continue
        tried += 1
        pair = maker.make(int(base), int(reference), rng)
        pairs += [pair] if pair is not None else []
    return pairs, tried


def measure(
    judge: Judge, eye: Eye, base: np.ndarray, steered: np.ndarray, pairs: list[Pair]
) -> dict[str, np.ndarray]:
    """Return what changed from `base` to `steered`, one value a pair.

    Parameters
    ----------
    base, steered : np.ndarray
        Pictures, uint8 [n, H, W, 3].
    """
    own, other = [p.caption for p in pairs], [p.reference_caption for p in pairs]
    captions = np.unique(own + other)
    texts = judge.texts(list(captions))
    scale = float(judge.model.logit_scale.exp())
    seen = [judge.images(p) for p in (base, steered)]
    opinions = []
    for images in seen:
        logits = scale * images @ texts.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        opinions.append(p / p.sum(1, keepdims=True))
    middle = (opinions[0] + opinions[1]) / 2
    divergence = sum(
        (p * np.log(np.maximum(p, 1e-12) / np.maximum(middle, 1e-12))).sum(1) / 2 for p in opinions
    )
    to_own, to_other = (texts[np.searchsorted(captions, c)] for c in (own, other))
    lean = [(images * (to_other - to_own)).sum(1) for images in seen]
    texture, perceptual = eye.distances(base, steered)
    return {
        "opinion": divergence,
        "towards_reference": lean[1] - lean[0],
        "colour": colour_distance(base, steered),
        "texture": texture,
        "perceptual": perceptual,
        "structure": structure_distance(base, steered),
        "confidence": opinions[1].max(1) - opinions[0].max(1),
    }


def main(
    bundle: Annotated[Path, typer.Option(help="with a pipeline")] = Path("bundles/emoji"),
    corpus: Annotated[Path, typer.Option()] = DEFAULT_DIR,
    judge: Annotated[Path, typer.Option(help="what training.judge wrote")] = JUDGE,
    dictionary: Annotated[str, typer.Option(help="empty: the bundle's default")] = "",
    pairs: Annotated[int, typer.Option()] = 200,
    features: Annotated[int, typer.Option(help="features of an edit, at most")] = 16,
    doses: Annotated[str, typer.Option(help="sizes of the change, ascending")] = "0.2,0.4,0.6,0.8",
    batch: Annotated[int, typer.Option(help="pictures in a step")] = 16,
    threads: Annotated[int, typer.Option()] = usable_cores(),
    out: Annotated[Path, typer.Option()] = OUT,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Steer, measure, print two tables and write steering.json."""
    started = time.monotonic()
    torch.set_num_threads(threads)
    loaded = Bundle.load(bundle)
    imaging = Imaging.load(loaded, device="cpu", threads=threads)
    name = loaded.resolve(dictionary)
    coder = loaded.dictionary(name)
    space = feature_space(loaded, name, lambda modality: coder.decoder_rows(modality).numpy())
    data, critic, eye = Corpus.load(corpus), Judge(judge), Eye()
    sizes = [float(dose) for dose in doses.split(",")]
    maker = PairMaker(imaging, coder, space, data, features, sizes[-1])
    chosen, tried = draw_pairs(maker, pairs, seed)
    print(f"{len(chosen)} pairs of {tried} tried", flush=True)
    if not chosen:
        raise typer.Exit("no pair in which every group of features can move the picture so far")

    def request(i: int, steering: Steering) -> ImageRequest:
        pair = chosen[i]
        return ImageRequest(
            pair.caption, image=png(data.plain[pair.base]), steering=steering, seed=seed + i
        )  # fmt: skip

    n = range(len(chosen))
    base = generate(imaging, [request(i, Steering()) for i in n], batch)
    still = generate(imaging, [request(i, maker.steering("CROSS", chosen[i], 0.0)) for i in n[:20]], batch)
    same = bool((still == base[: len(still)]).all())
    found: dict[str, dict[float, dict[str, np.ndarray]]] = {}
    shown: dict[str, list[np.ndarray]] = {}
    for group in GROUPS:
        for dose in sizes:
            made = generate(imaging, [request(i, maker.steering(group, chosen[i], dose)) for i in n], batch)
            found.setdefault(group, {})[dose] = measure(critic, eye, base, made, chosen)
            shown.setdefault(group, [base[:SHEET_PAIRS]]).append(made[:SHEET_PAIRS])

    middle = sizes[len(sizes) // 2]
    result: dict[str, Any] = {
        "bundle": loaded.id,
        "dictionary": name,
        "pairs": len(chosen),
        "tried": tried,
        "features_an_edit": float(np.mean([len(p.features["IMAGE"]) for p in chosen])),
        "doses": sizes,
        "strength_0_is_unsteered_byte_for_byte": same,
        "effects": {dose: effects({g: found[g][dose] for g in GROUPS}) for dose in sizes},
        "interaction": {
            f"IMAGE against {other}": interaction(found["IMAGE"][middle], found[other][middle])
            for other in ("TEXT", "CROSS", "random")
        },
        "interaction_dose": middle,
        "dose_response": {g: dose_response(found[g]) for g in GROUPS},
        "minutes": (time.monotonic() - started) / 60,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "steering.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(found, out / "steering-doses.png")
    columns = 1 + len(sizes)
    for i in range(min(SHEET_PAIRS, len(chosen))):
        rows = np.concatenate([np.stack([step[i] for step in shown[g]]) for g in GROUPS])
        grid(rows, columns, out / f"steering-sheet-{i}.png")
    print_tables(result, middle)


def print_tables(result: dict[str, Any], dose: float) -> None:
    """Print the effects at one dose, and what follows from them."""
    console = Console()
    measured = result["effects"][dose]
    table = Table(
        "change", *GROUPS, title=f"Steering at ||delta e|| / rho = {dose:g}, {result['pairs']} pairs"
    )
    for name in next(iter(measured.values())):
        table.add_row(
            name, *("{value:.3f} [{low:.3f}, {high:.3f}]".format(**measured[g][name]) for g in GROUPS)
        )
    console.print(table)
    table = Table("group x kind of change", "interaction", "p")
    for name, one in result["interaction"].items():
        table.add_row(name, f"{one['value']:+.3f}", f"{one['p']:.4f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
