"""Choose solver, steps and guidance of the embedded pipeline by the judge, on captions of validation drawings.

``python -m training.diffusion.choose --bundle bundles/emoji`` draws the same captions with the same seeds by each
setting, has the judge (``python -m training.judging.train``) pick each picture's caption among 100, and writes what it
chose into the bundle's pipeline, with the table as ``diffusion/choice.json``. First guidance, then the solver, then the
number of steps, each with what was chosen before. Settings whose judgement is not worse than the best one's (95% paired
bootstrap interval) are equals: of them the one nearest to real drawings is taken (KID), or the one of fewest steps.

Half of the captions of validation drawings are for choosing; `benchmarks.generation` reports on the other half.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from services.bundle.load import Bundle, refresh_manifest
from services.imaging.edits import ImageRequest
from services.imaging.embedder import Embedder
from services.imaging.generator import Imaging
from services.imaging.pipeline import load_parts
from services.imaging.reference import pipeline_folder
from training.compute import mixed, pick_device, pick_precision
from training.corpus.build import DEFAULT_DIR
from training.diffusion.data import held_out_combinations
from training.diffusion.drawings import resized
from training.diffusion.model import SCHEDULE
from training.judging.kid import kid
from training.judging.train import DEFAULT_OUT as JUDGE
from training.judging.train import Judge, as_batch, pick_among
from training.towers.pairs import Corpus
from training.towers.retrieval import bootstrap_mean

RECORD = "choice.json"
SPACING = {"timestep_spacing": "trailing"}
SOLVERS: dict[str, Callable[[], Any]] = {
    # DPM-Solver++ of second order (Lu et al., 2022), UniPC (Zhao et al., 2023), DDIM (Song et al., 2021).
    "dpm++": lambda: DPMSolverMultistepScheduler(**SCHEDULE, **SPACING, solver_order=2),
    "unipc": lambda: UniPCMultistepScheduler(**SCHEDULE, **SPACING, solver_order=2),
    "ddim": lambda: DDIMScheduler(**SCHEDULE, **SPACING, clip_sample=False),
}
GUIDANCES = (2.0, 3.0, 4.0, 6.0)
STEPS = (8, 10, 12, 16)


@dataclass(frozen=True)
class Setting:
    """How pictures are made: a key of `SOLVERS`, calls of the UNet, and the scale of guidance."""

    solver: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class Measured:
    """What a setting is worth.

    Parameters
    ----------
    setting : Setting
        How the pictures were made.
    found : np.ndarray
        Whether the judge picks each picture's caption, bool [n].
    kid : float
        Kernel inception distance to real drawings, times 1,000.
    """

    setting: Setting
    found: np.ndarray
    kid: float


def for_choosing(captions: np.ndarray) -> np.ndarray:
    """Return which captions settings are chosen on, by a hash of each; the others are for figures. bool [n]."""
    return np.array([hashlib.sha256(c.encode()).digest()[0] % 2 == 0 for c in captions], dtype=bool)


def not_worse(found: Sequence[np.ndarray]) -> np.ndarray:
    """Return which rows of judgements on the same captions are not worse than the best one's, bool [settings].

    By the 95% paired bootstrap interval of the difference of means.
    """
    rows = np.asarray(found, float)
    best = rows[rows.mean(1).argmax()]
    return np.array([bootstrap_mean(row - best).high >= 0 for row in rows])


def pick(stage: Sequence[Measured], fewest: bool) -> Setting:
    """Return the setting to take: of those not worse than the best one, that of fewest steps or of the least KID."""
    equal = [one for one, kept in zip(stage, not_worse([m.found for m in stage]), strict=True) if kept]
    return min(equal, key=lambda m: (m.setting.steps if fewest else 0, m.kid)).setting


def choose(start: Setting, measure: Callable[[Setting], Measured]) -> tuple[Setting, list[dict[str, Any]]]:
    """Return the chosen setting and the table of all that were measured, stage by stage."""
    chosen, table = start, []
    known: dict[Setting, Measured] = {}
    for name, values in (("guidance", GUIDANCES), ("solver", tuple(SOLVERS)), ("steps", STEPS)):
        settings = [replace(chosen, **{name: value}) for value in values]
        for setting in settings:
            if setting not in known:
                known[setting] = measure(setting)
        stage = [known[setting] for setting in settings]
        chosen = pick(stage, fewest=name == "steps")
        equal = not_worse([one.found for one in stage])
        table += [
            {
                "stage": name,
                **asdict(one.setting),
                "judge": asdict(bootstrap_mean(one.found)),
                "kid_1000": one.kid,
                "not_worse_than_the_best": bool(same),
                "chosen": one.setting == chosen,
            }
            for one, same in zip(stage, equal, strict=True)
        ]
    return chosen, table


def write_choice(folder: Path, chosen: Setting, record: dict[str, Any]) -> None:
    """Write a setting into a pipeline's folder, with how it was chosen."""
    solver = SOLVERS[chosen.solver]()
    solver.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(solver).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    entry = json.loads((folder / "monofacet.json").read_text())
    entry |= {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance}
    (folder / "monofacet.json").write_text(json.dumps(entry, indent=2) + "\n")
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Choose from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("bundles/emoji"))
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("auto", "bf16", "f32"), default="auto")
    arguments = parser.parse_args()
    bundle = Bundle.load(arguments.bundle, verify=False)
    entry = bundle.manifest.diffusion
    if entry is None:
        print("the bundle has no text-to-image pipeline")
        return
    torch.set_num_threads(arguments.threads)
    device = pick_device()
    precision = pick_precision(device, arguments.precision)
    parts = load_parts(pipeline_folder(bundle.path, entry), entry, str(device), bundle)
    embedder = Embedder(bundle, str(device))

    data, judge = Corpus.load(arguments.corpus), Judge(arguments.judge)
    caption, known = data.columns["caption"], data.rows("train")
    unseen = held_out_combinations(data.columns)
    known = known[~unseen[known]]
    validation = data.rows("validation")
    candidates = np.unique(caption[validation[~unseen[validation]]])
    rng = np.random.default_rng(0)
    prompts = rng.permutation(candidates[for_choosing(candidates)])[: arguments.captions]
    distinct = np.unique(np.concatenate([prompts, caption[known]]))
    texts, right = judge.texts(list(distinct)), np.searchsorted(distinct, prompts)
    others = rng.permutation(known[~np.isin(caption[known], prompts)])[:500]
    real = judge.backbone.pooled(as_batch(data.plain[np.sort(others)])).numpy()

    def measure(setting: Setting) -> Measured:
        began = time.monotonic()
        imaging = Imaging(bundle, replace(parts, scheduler=SOLVERS[setting.solver]()), embedder)
        # Together, though bits may then depend on the batch: it is the quality that is measured.
        imaging.denoiser.batching = "free"
        requests = [
            ImageRequest(str(p), seed=i, num_inference_steps=setting.steps, guidance_scale=setting.guidance)
            for i, p in enumerate(prompts)
        ]
        with mixed(device, precision):
            made = np.stack([np.asarray(one.image) for one in imaging.generate(requests, arguments.batch)])
        small = resized(made, data.plain.shape[1])
        found = pick_among(judge.images(small), texts, right)
        distance = kid(judge.backbone.pooled(as_batch(small)).numpy(), real).value
        print(
            f"{setting}: {found.mean():.3f}, KID {distance:.0f}, {time.monotonic() - began:.0f} s", flush=True
        )
        return Measured(setting, found, distance)

    chosen, table = choose(Setting("dpm++", 12, 3.0), measure)
    record = {"captions": len(prompts), "of": "validation drawings", "chosen": asdict(chosen), "table": table}
    write_choice(pipeline_folder(bundle.path, entry), chosen, record)
    refresh_manifest(bundle.path)
    print(f"{Bundle.load(bundle.path).id}: {chosen}")


if __name__ == "__main__":
    main()
