"""How good generated pictures are: they follow their prompts, look like drawings, and are not copies.

`python -m benchmarks.generation [--bundle bundles/emoji] [--captions 400]`

The captions are of validation drawings, which nothing was trained on, without those that `training.diffusion.choose`
chose settings by. The judge (`python -m training.judging.train`) picks the right caption among 100 for a generated
picture, for the validation drawing itself, and for that drawing through the autoencoder, which bounds what the
generator can reach. Then the same for professions, genders and skin tones that the generator never saw together; the
kernel inception distance to real drawings; and how near the nearest training drawing is, beside how near it is to
drawings that were held out. All is judged at the corpus's 64 px, which is what the judge was trained on. Writes one
table, out/bench/generation.json and two sheets of pictures.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.image_measures import Eye, nearest
from benchmarks.readme import UNET
from services.bundle.load import Bundle
from services.encoding.machine import usable_cores
from services.imaging.edits import ImageRequest
from services.imaging.generator import Imaging
from training.corpus.build import DEFAULT_DIR
from training.diffusion.choose import for_choosing
from training.diffusion.data import held_out_combinations
from training.diffusion.drawings import Drawings, resized, to_pixels, to_tensor
from training.diffusion.train import SHEET_PROMPTS
from training.judging.kid import kid
from training.judging.train import DEFAULT_OUT as JUDGE
from training.judging.train import POOLED, Judge, pick_among, read_inputs
from training.towers.pairs import Corpus
from training.towers.retrieval import bootstrap_mean

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"


def generate(imaging: Imaging, requests: list[ImageRequest], batch: int) -> np.ndarray:
    """Return pictures of requests, uint8 [n, H, W, 3], with progress."""
    pictures, started = [], time.monotonic()
    for start in range(0, len(requests), 8 * batch):
        made = imaging.generate(requests[start : start + 8 * batch], batch)
        pictures += [np.asarray(one.image) for one in made]
        rate = len(pictures) / (time.monotonic() - started)
        print(f"pictures {len(pictures)}/{len(requests)} {rate:.1f}/s", flush=True)
    return np.stack(pictures)


def grid(pictures: np.ndarray, columns: int, path: Path, scale: int = 2) -> None:
    """Write pictures, uint8 [n, H, W, 3], row by row as one PNG; n a multiple of `columns`."""
    n, height, width, _ = pictures.shape
    rows = pictures.reshape(n // columns, columns, height, width, 3)
    image = Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(n // columns * height, columns * width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


@torch.inference_mode()
def through_autoencoder(imaging: Imaging, pixels: np.ndarray) -> np.ndarray:
    """Return drawings encoded and decoded, uint8 [n, H, W, 3]."""
    vae: Any = imaging.parts.vae
    found = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in to_tensor(pixels).split(32)]
    return to_pixels(torch.cat(found))


def one_row_a_caption(captions: np.ndarray, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return `count` of `rows`, no two of one caption."""
    shuffled = np.random.default_rng(seed).permutation(rows)
    _, first = np.unique(captions[shuffled], return_index=True)
    return shuffled[np.random.default_rng(seed + 1).permutation(first)[:count]]


def following(
    judge: Judge, sets: dict[str, np.ndarray], captions: np.ndarray, others: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return how often the judge picks each picture's caption among 100, by set of pictures.

    Parameters
    ----------
    sets : dict[str, np.ndarray]
        Pictures of the same captions, each uint8 [n, H, W, 3].
    captions : np.ndarray
        Of the pictures, str [n].
    others : np.ndarray
        Captions to choose from, str [t]; those of the pictures join them.
    """
    distinct = np.unique(np.concatenate([captions, others]))
    texts, right = judge.texts(list(distinct)), np.searchsorted(distinct, captions)
    return {
        name: asdict(bootstrap_mean(pick_among(judge.images(pictures), texts, right)))
        for name, pictures in sets.items()
    }


def main(
    bundle: Annotated[Path, typer.Option(help="with a pipeline")] = Path("bundles/emoji"),
    corpus: Annotated[Path, typer.Option()] = DEFAULT_DIR,
    judge: Annotated[Path, typer.Option(help="what training.judging.train wrote")] = JUDGE,
    captions: Annotated[int, typer.Option(help="captions to follow, at most")] = 400,
    combined: Annotated[int, typer.Option(help="pictures of combinations never seen together")] = 200,
    batch: Annotated[int, typer.Option(help="pictures in a step")] = 16,
    threads: Annotated[int, typer.Option()] = usable_cores(),
    out: Annotated[Path, typer.Option()] = OUT,
) -> None:
    """Generate, judge, print one table and write generation.json."""
    started = time.monotonic()
    torch.set_num_threads(threads)
    data, critic, eye = Corpus.load(corpus), Judge(judge), Eye()
    loaded = Bundle.load(bundle)
    imaging = Imaging.load(loaded, device="cpu", threads=threads)
    columns, seen = data.columns, data.rows("train")
    drawings, side = Drawings.load(corpus, imaging.entry.height), data.plain.shape[1]

    def autoencoded(rows: np.ndarray) -> np.ndarray:
        """Return training or validation drawings, by row of the corpus, as the autoencoder gives them back."""
        return through_autoencoder(imaging, drawings.pixels[np.searchsorted(drawings.rows, rows)])

    unseen = held_out_combinations(columns)
    known = seen[~unseen[seen]]
    caption = columns["caption"]

    held_out = data.rows("validation")
    rows = held_out[~unseen[held_out] & ~for_choosing(caption[held_out])]
    rows = one_row_a_caption(caption, rows, captions, 0)
    drawn = generate(imaging, [ImageRequest(str(caption[r]), seed=i) for i, r in enumerate(rows)], batch)
    made = resized(drawn, side)
    real = np.stack([data.plain[r] for r in rows])
    whole = autoencoded(rows)
    errors = (whole.astype(float) - drawings.pixels[np.searchsorted(drawings.rows, rows)]) / 255
    coded = resized(whole, side)
    follow = following(
        critic, {"generated": made, "real": real, "autoencoded": coded}, caption[rows], caption[known]
    )

    new_rows = np.flatnonzero(unseen & np.isin(columns["role"], ["train"]))
    names = np.unique(caption[new_rows])
    wanted = np.resize(names, combined)
    new = generate(imaging, [ImageRequest(str(c), seed=1000 + i) for i, c in enumerate(wanted)], batch)
    shown = np.array(
        [np.random.default_rng(i).choice(new_rows[caption[new_rows] == c]) for i, c in enumerate(wanted)]
    )
    people = np.unique(caption[columns["profession"] != ""])
    combination = following(
        critic, {"generated": resized(new, side), "real": data.plain[shown]}, wanted, people
    )

    pool = one_row_a_caption(caption, np.setdiff1d(known, rows), captions, 7)
    features = {name: eye.features(p) for name, p in (("made", made), ("real", real), ("coded", coded))}
    other = eye.features(data.plain[pool])
    kids = {
        "generated": asdict(kid(features["made"], other)),
        "autoencoded": asdict(kid(features["coded"], other)),
        "real": asdict(kid(features["real"], other)),
    }
    # Both sides through the autoencoder, whose softness alone would keep a copy away from the drawing it copies. The
    # judge has looked at all training drawings already.
    looked = read_inputs(data, judge, critic.settings.seed)
    keep = np.isin(looked["train_rows"], known)
    sample, bank = looked["train_rows"][keep], looked["train_images"][keep, :POOLED].astype(np.float32)
    probe = one_row_a_caption(caption, held_out, captions, 9)
    made_near, which = nearest(features["made"], bank)
    real_near, _ = nearest(eye.features(resized(autoencoded(probe), side)), bank)
    quantiles = [0.01, 0.05, 0.25, 0.5, 0.75]
    copies = {
        "quantiles": quantiles,
        "generated": np.quantile(made_near, quantiles).tolist(),
        "held_out_real": np.quantile(real_near, quantiles).tolist(),
        "generated_below_real_1%": float((made_near < np.quantile(real_near, 0.01)).mean()),
    }

    grid(drawn[:64], 8, out / "generation-samples.png", 1)
    nearest_first = np.argsort(made_near)[:16]
    beside = np.stack([made[nearest_first], data.plain[sample[which[nearest_first]]]], 1).reshape(
        -1, *made.shape[1:]
    )
    grid(beside, 8, out / "generation-nearest.png")
    sheet = generate(imaging, [ImageRequest(p, seed=s) for s in (0, 1) for p in SHEET_PROMPTS], batch)
    grid(sheet, len(SHEET_PROMPTS) // 2, out / "generation-prompts.png", 1)

    result = {
        "bundle": loaded.id,
        # The report that these figures go into changes the bundle's id, and not what was measured.
        "unet": loaded.manifest.files[UNET].sha256 if UNET in loaded.manifest.files else "",
        "following": follow,
        "following_share_of_real": follow["generated"]["value"] / follow["real"]["value"],
        "combinations": {"count": len(names), "candidates": "captions with a profession", **combination},
        "kid": {"features": "EfficientNet-Lite0 (ImageNet), pooled, 96 px", "times": 1000, **kids},
        "copies": copies,
        "autoencoder": {"psnr": asdict(bootstrap_mean(-10 * np.log10(np.square(errors).mean((1, 2, 3)))))},
        "pictures": {
            "captions": len(rows),
            "side": imaging.entry.height,
            "steps": imaging.entry.num_inference_steps,
            "guidance": imaging.entry.guidance_scale,
        },
        "judge": json.loads((judge / "judge.json").read_text())["figures"],
        "sheet_prompts": list(SHEET_PROMPTS),
        "minutes": (time.monotonic() - started) / 60,
    }
    (out / "generation.json").write_text(json.dumps(result, indent=1) + "\n")
    table = Table("figure", "generated", "real", "autoencoded", title=f"Generation, {loaded.id}")
    show = "{value:.3f} [{low:.3f}, {high:.3f}]".format
    table.add_row(
        "right caption among 100", *(show(**follow[k]) for k in ("generated", "real", "autoencoded"))
    )
    table.add_row("same, unseen combinations", *(show(**combination[k]) for k in ("generated", "real")), "")
    table.add_row(
        "KID x 1,000 to other drawings", *(show(**kids[k]) for k in ("generated", "real", "autoencoded"))
    )
    near = [f"{copies[k][3]:.3f}" for k in ("generated", "held_out_real")]
    table.add_row("distance to nearest training drawing, median", *near, "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
