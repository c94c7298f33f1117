"""How long a build takes from embeddings that are there: 100,000 synthetic pairs of 512 numbers, on the cores at hand.

``python -m benchmarks.build`` makes tiny towers of that width, writes a store of embeddings made by a known model (an
image and its caption share a few of many directions, and have noise of their own), builds every dictionary, its tables
and the bundle by `monofacet bundle build --embeddings`, and prints the minutes of each stage. It leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from rich.console import Console

from services.encoding.clip import build_clip, read_clip_config
from services.encoding.machine import usable_cores
from training.build.embed import store_key
from training.build.progress import Reporter
from training.build.run import Build
from training.build.settings import KINDS, BuildSettings
from training.build.store import ShardEntry, Store
from training.build.workers import threads
from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE

OUT = Path("out/bench/build.json")
SHARD = 4096
# Of the model that makes the embeddings: directions, how many of them an image and its caption share, noise.
CONCEPTS, ACTIVE, NOISE = 2000, 12, 0.02
WORDS = ("red", "old", "small", "round", "wooden", "bright", "cold", "tall", "soft", "loud")


def write_towers(folder: Path, embed_dim: int) -> None:
    """Write random towers of the width that the embeddings have; nothing is embedded by them but a few prompts."""
    folder.mkdir(parents=True)
    config = {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    (folder / CONFIG_FILE).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    state = build_clip(read_clip_config(folder / CONFIG_FILE), None).state_dict()
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in state.items()}, str(folder / WEIGHTS_FILE)
    )


def write_store(folder: Path, clip: Path, pairs: int) -> None:
    """Write a finished store of synthetic pairs."""
    store = Store(folder, store_key(clip, ("{}",), "float16", "cpu"))
    d, rng = store.key.embed_dim, np.random.default_rng(0)
    concepts = rng.standard_normal((CONCEPTS, d)).astype(np.float32) / d**0.5
    offsets = rng.standard_normal((2, d)).astype(np.float32) / d**0.5
    names = []
    for number, start in enumerate(range(0, pairs, SHARD)):
        rows = min(SHARD, pairs - start)
        weights = np.zeros((rows, CONCEPTS), np.float32)
        chosen = rng.integers(0, CONCEPTS, (rows, ACTIVE))
        np.put_along_axis(weights, chosen, rng.gamma(2.0, 0.5, (rows, ACTIVE)).astype(np.float32), 1)
        shared = weights @ concepts
        sides = [
            shared + offset + NOISE * rng.standard_normal((rows, d), dtype=np.float32) for offset in offsets
        ]
        images, texts = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        captions = [
            f"{WORDS[c[0] % 10]} thing {c[1]} with {c[2]} number {start + i}" for i, c in enumerate(chosen)
        ]
        empty = [""] * rows
        columns = dict.fromkeys(("gender", "profession", "label", "group", "split"), empty) | {
            "source": ["synthetic"] * rows,
            "row": range(start, start + rows),
            "key": [str(start + i) for i in range(rows)],
            "caption": captions,
            "image_norm": [1.0] * rows,
        }
        names.append(f"000-{number:06d}")
        store.write(ShardEntry(names[-1], names[-1], rows, []), images, texts[None], columns)
    store.finish(names)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--features", type=int, default=0, help="n of the autoencoders; 0 is 8 d")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--kind", action="append", choices=KINDS, help="dictionaries; default: all")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="monofacet-build-"))
    try:
        write_towers(folder / "clip", arguments.embed_dim)
        write_store(folder / "store", folder / "clip", arguments.pairs)
        settings = BuildSettings(
            out=folder / "bundle",
            work=folder / "work",
            model=str(folder / "clip"),
            embeddings=folder / "store",
            features=arguments.features,
            workers=arguments.workers,
            kinds=tuple(arguments.kind or KINDS),
        )
        started = time.monotonic()
        with Reporter(Console(stderr=True)) as reporter, threads(1):
            bundle = Build(settings, reporter).run()
        minutes = (time.monotonic() - started) / 60
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    own, below = (
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    rows = bundle.manifest.metrics["dictionaries"]["validation"]
    result = {
        "pairs": arguments.pairs,
        "embed_dim": arguments.embed_dim,
        "features": {name: entry.n_features for name, entry in bundle.manifest.dictionaries.items()},
        "workers": arguments.workers,
        "minutes": round(minutes, 2),
        "stages_s": {title: round(seconds, 1) for title, seconds in reporter.times.items()},
        "fvu": {name: rows[name]["fvu"] for name in bundle.manifest.dictionaries},
        "main_process_gb": round(own / 2**20, 2),
        "largest_worker_gb": round(below / 2**20, 2),
    }
    for title, seconds in reporter.times.items():
        print(f"{title:24s} {seconds / 60:6.2f} min")
    print(f"{'in all':24s} {minutes:6.2f} min with {arguments.workers} workers")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
