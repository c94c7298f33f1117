"""Fit, choose and measure the attributes of a finished bundle.

``python -m training.imaging.run --bundle bundles/emoji`` writes ``attributes/`` and renews the manifest. It needs
the bundle's generator and the judge (``python -m training.judging.train``). Concepts with validation drawings are
new to the fit and to the probes; one half of them chooses doses, the other half is what the attributes' figures are
measured on. How is said in `training.imaging.study`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from services.bundle.load import Bundle, refresh_manifest
from training.corpus.build import DEFAULT_DIR
from training.imaging.study import FOLDER, Study
from training.judging.train import DEFAULT_OUT as JUDGE
from training.towers.embed import DEFAULT_CLIP, EmbeddingSet
from training.towers.embed import DEFAULT_OUT as EMBEDDINGS
from training.towers.pairs import Corpus

KEEP = Path("work/attributes.json")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("bundles/emoji"))
    parser.add_argument("--embeddings", type=Path, default=EMBEDDINGS)
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--clip", type=Path, default=DEFAULT_CLIP)
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument(
        "--steps", type=int, default=8, help="denoising steps of the pictures that are measured"
    )
    parser.add_argument("--choosing", type=int, default=12, help="pictures a dose, to choose it")
    parser.add_argument("--measuring", type=int, default=24, help="pictures an attribute, to measure it")
    parser.add_argument("--features", type=int, default=48, help="features that the unit is chosen on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", type=Path, default=KEEP, help="what an interrupted run had measured")
    parser.add_argument(
        "--if-possible", action="store_true", help="do nothing without a generator or a judge"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Run the study from the command line."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    bundle = Bundle.load(arguments.bundle)
    if bundle.manifest.diffusion is None or not (arguments.judge / "judge.json").exists():
        message = "steering is measured with a generator in the bundle, and a judge (python -m training.judging.train)"
        if arguments.if_possible:
            print(message)
            return
        raise SystemExit(message)
    embeddings = EmbeddingSet.load(arguments.embeddings)
    if embeddings.fingerprint != bundle.manifest.clip.fingerprint:
        raise SystemExit("the bundle holds other towers than made the embeddings")
    started = time.monotonic()
    study = Study(
        bundle, Corpus.load(arguments.corpus), embeddings, arguments.clip, arguments.judge, arguments.steps
    )
    known = study.run(
        embeddings.fingerprint, arguments.choosing, arguments.measuring, arguments.features, arguments.keep
    )
    known.write(bundle.path / FOLDER)
    refresh_manifest(bundle.path)
    minutes = (time.monotonic() - started) / 60
    print(f"{Bundle.load(bundle.path).id}: {len(known.attributes)} attributes, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
