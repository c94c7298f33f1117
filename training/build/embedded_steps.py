"""Everything from finished towers to a finished bundle, in one command.

``python -m training.build.embedded_steps --test`` runs each step as its own command, in order, and says how long each
took. A step whose result is there already for the same towers and settings returns at once, so that an interrupted run
goes on where it was. ``--clip`` and ``--work`` let a run on interim towers live beside the real one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from training.build.embedded import DEFAULT_OUT, WORK
from training.corpus.build import DEFAULT_DIR as CORPUS_DIR
from training.modality.judges import DEFAULT_OUT as JUDGES
from training.towers.embed import DEFAULT_CLIP


def steps(arguments: argparse.Namespace) -> list[list[str]]:
    """Return the commands of all steps, each without the interpreter."""
    work, corpus = arguments.work, ["--corpus", str(arguments.corpus)]
    embeddings = ["--embeddings", str(work / "embeddings.npz")]
    dictionaries = ["--dictionaries", str(work / "dictionaries")]
    modality = ["--modality", str(work / "modality")]
    test = ["--test"] if arguments.test else []
    clip = ["--clip", str(arguments.clip)]
    grid = work / "dictionary_grid.json"
    trial = ["--views", str(arguments.views), "--fit-limit", str(arguments.fit_limit)]
    embed = [*clip, *corpus, "--out", str(work / "embeddings.npz"), *trial]
    return [
        ["training.modality.judges", *corpus],
        ["training.towers.embed", *embed, *([] if arguments.test else ["--without-test"])],
        ["training.towers.evaluate", *embeddings, *corpus, "--out", str(work / "retrieval.json"), *test],
        [
            "training.dictionaries.grid", *embeddings, *corpus, "--out", str(grid),
            "--workers", str(arguments.workers), "--effort", str(arguments.effort),
        ],
        [
            "training.dictionaries.train", *embeddings, "--out", str(work / "dictionaries"), "--choice", str(grid),
            "--workers", str(arguments.workers), "--seeds", str(arguments.seeds),
            "--effort", str(arguments.effort),
        ],
        [
            "training.modality.score", *embeddings, *corpus, *dictionaries, "--judges", str(JUDGES),
            "--out", str(work / "modality"), "--summary", str(work / "modality.json"),
            "--workers", str(arguments.workers),
        ],
        [
            "training.dictionaries.choose", *embeddings, *corpus, *dictionaries, *modality,
            "--summary", str(work / "modality.json"), "--out", str(work / "dictionaries.json"), *test,
        ],
        ["training.modality.cards", *embeddings, *corpus, *dictionaries, "--out", str(work / "cards")],
        ["training.report.page", "--work", str(work)],
        ["training.build.embedded", "--work", str(work), *clip, *corpus, "--out", str(arguments.out)],
        # Studies measure a finished bundle, add what they learnt to it, and vouch for it anew.
        ["training.bias.run", "--bundle", str(arguments.out), *embeddings, *corpus, "--work", str(work), *test],
        ["training.defense.run", "--bundle", str(arguments.out), *corpus, *test],
        # Trained by itself, for it takes longest; without it the bundle is whole but draws no pictures.
        ["training.diffusion.export", "--bundle", str(arguments.out), *embeddings, *corpus, *clip, "--if-trained"],
        ["training.judging.train", *corpus, "--if-missing"],
        ["training.diffusion.choose", "--bundle", str(arguments.out), *corpus],
        # Doses and attributes are measured on pictures, by the judge.
        ["training.imaging.run", "--bundle", str(arguments.out), *embeddings, *corpus, *clip, "--if-possible"],
        ["training.report.page", "--work", str(work), "--bundle", str(arguments.out)],
    ]  # fmt: skip


def main() -> None:
    """Run all steps from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--clip", type=Path, default=DEFAULT_CLIP)
    parser.add_argument("--corpus", type=Path, default=CORPUS_DIR)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--fit-limit", type=int, default=0, help="drawings to fit on at most, for a trial")
    parser.add_argument("--effort", type=float, default=1.0, help="share of the training steps, for a trial")
    parser.add_argument("--test", action="store_true", help="report on the test artist too: at the very end")
    arguments = parser.parse_args()
    started = time.monotonic()
    for command in steps(arguments):
        begun = time.monotonic()
        print(f"== python -m {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True)
        print(f"== {command[0]} took {time.monotonic() - begun:.0f} s", flush=True)
    print(f"all steps took {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
