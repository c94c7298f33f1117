"""Sixteen pairs of pictures for a reader: one steered, one not, in shuffled order, with the direction beside them.

`python -m benchmarks.steering_pairs [--bundle bundles/emoji] [--seed 0]`; `benchmarks.steering` writes them too.

Whoever reads looks at `sheet.png`, or at the single files, and names the steered one of each pair; `key.json` has the
answers and must not be opened before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from benchmarks.generation import OUT
from services.bundle.load import Bundle
from services.encoding.machine import usable_cores
from services.imaging.dose import Attributes
from services.imaging.edits import AttributeEdit, Edit, ImageRequest, SetQuantile, Steering
from services.imaging.generator import Imaging
from training.corpus.build import DEFAULT_DIR
from training.imaging.attributes import eligible
from training.imaging.study import FIRES, NAMED_AUC, draw
from training.towers.pairs import Corpus

PAIRS = 16
# Of them, so many by features; the rest by attributes, as many of each group as there are.
BY_FEATURES = 6
SCALE, MARGIN = 2, 24


@dataclass(frozen=True)
class Shown:
    """One pair: what is drawn, by what it is steered, and what stands beside it."""

    prompt: str
    steering: Steering
    direction: str


def chosen_pairs(bundle: Bundle, known: Attributes, corpus: Corpus, rng: np.random.Generator) -> list[Shown]:
    """Return pairs by rule: attributes in turn over their groups, and named features that change a text the most."""
    columns = corpus.columns
    concepts = np.unique(columns["concept"][columns["split"] == "validation"])
    table = bundle.modality(known.config.dictionary)
    named = np.flatnonzero((table.name_auc >= NAMED_AUC) & (table.firing_rate_image >= FIRES))
    # The most energetic of them: a feature of little energy is a shade of others.
    energy = np.fmax(table.energy_image, table.energy_text)[named]
    features = rng.permutation(named[np.argsort(-energy)][: 8 * BY_FEATURES])[:BY_FEATURES]
    groups: dict[str, list[str]] = {}
    for name, attribute in known.attributes.items():
        groups.setdefault(attribute.entry.group, []).append(name)
    order = [list(rng.permutation(names)) for names in groups.values()]
    turns = [names.pop() for _ in range(PAIRS) for names in order if names]
    shown = []
    for name in turns[: PAIRS - BY_FEATURES]:
        bases = eligible(known.attributes[name].entry.group, name, columns)
        shown.append(Shown(str(rng.choice(bases)), Steering(attributes=(AttributeEdit(name),)), name))
    for feature in features[: PAIRS - len(shown)]:
        edit = Edit((int(feature),), SetQuantile(0.95))
        shown.append(Shown(str(rng.choice(concepts)), Steering((edit,)), str(table.name[feature])))
    return [shown[i] for i in rng.permutation(len(shown))]


def reader_pairs(
    imaging: Imaging, bundle: Bundle, known: Attributes, corpus: Corpus, out: Path, seed: int
) -> dict[str, Any]:
    """Write the pairs, a sheet of all and the key into `out`; return what the key says of the whole."""
    rng = np.random.default_rng(seed)
    pairs = chosen_pairs(bundle, known, corpus, rng)
    requests = [
        ImageRequest(pair.prompt, seed=10_000 + seed + i, steering=steering)
        for i, pair in enumerate(pairs)
        for steering in (Steering(), pair.steering)
    ]
    made = draw(imaging, requests, imaging.entry.height)
    out.mkdir(parents=True, exist_ok=True)
    key, tiles = [], []
    for i, pair in enumerate(pairs):
        first = int(rng.integers(2))
        two = made[2 * i : 2 * i + 2][[1, 0] if first == 0 else [0, 1]]
        tile = labelled(two, f"{i + 1}. {pair.prompt}: more {pair.direction}?")
        tile.save(out / f"{i + 1:02d}.png")
        tiles.append(np.asarray(tile))
        key.append(
            {
                "pair": i + 1,
                "prompt": pair.prompt,
                "direction": pair.direction,
                "by": "attribute" if pair.steering.attributes else "feature",
                "steered": "left" if first == 0 else "right",
            }
        )
    columns = 4
    rows = [
        np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles) // columns * columns, columns)
    ]
    Image.fromarray(np.concatenate(rows)).save(out / "sheet.png")
    (out / "key.json").write_text(json.dumps(key, indent=1) + "\n")
    return {"pairs": len(key), "by_features": sum(one["by"] == "feature" for one in key)}


def labelled(two: np.ndarray, words: str) -> Image.Image:
    """Return two pictures, uint8 [2, H, W, 3], side by side under their words."""
    pixels = np.concatenate([two[0], np.full((two.shape[1], 8, 3), 200, np.uint8), two[1]], 1)
    pictures = Image.fromarray(pixels)
    pictures = pictures.resize((pictures.width * SCALE, pictures.height * SCALE), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (pictures.width + 16, pictures.height + MARGIN + 16), "white")
    page.paste(pictures, (8, MARGIN))
    ImageDraw.Draw(page).text((8, 4), words, "black", ImageFont.load_default(16))
    return page


def main(
    bundle: Annotated[Path, typer.Option(help="with a pipeline and attributes")] = Path("bundles/emoji"),
    corpus: Annotated[Path, typer.Option()] = DEFAULT_DIR,
    threads: Annotated[int, typer.Option()] = usable_cores(),
    out: Annotated[Path, typer.Option()] = OUT / "steering-pairs",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write the pairs."""
    loaded = Bundle.load(bundle)
    known = loaded.attributes()
    if known is None:
        raise typer.Exit("this bundle knows no doses: run python -m training.imaging.run")
    imaging = Imaging.load(loaded, device="cpu", threads=threads, max_batch=1)
    print(reader_pairs(imaging, loaded, known, Corpus.load(corpus), out, seed))


if __name__ == "__main__":
    typer.run(main)
