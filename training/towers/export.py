"""Write towers as open_clip reads them: a config JSON and half-precision safetensors.

``python -m training.towers.export --out work/interim/clip`` does it with a checkpoint, before the training has ended,
so that everything after the towers can be tried on interim weights; ``training.towers.train`` writes the final ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE
from training.towers.image_tower import folded

CONFIG = Path(__file__).parent / "emoji_clip.json"


def write_towers(
    out: Path, config: dict[str, Any], model: Mapping[str, Tensor], tower: Mapping[str, Tensor]
) -> None:
    """Write a model into the folder `out`, with the image side of an `ImageTower`, its standardisation folded in."""
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    weights = {
        name: value.detach().cpu().contiguous().half() if value.is_floating_point() else value.detach().cpu()
        for name, value in folded(model, tower).items()
    }
    save_file(weights, out / WEIGHTS_FILE)


def export_checkpoint(checkpoint: Path, config: Path, out: Path, image_size: int | None = None) -> int:
    """Write the averaged weights of a checkpoint; returns its step.

    `image_size` replaces the config's: towers that have only trained at the low resolution so far work at that one.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    document = json.loads(config.read_text())
    if image_size:
        document["model_cfg"]["vision_cfg"]["image_size"] = image_size
    write_towers(out, document, state["model"], state["tower"] | (state["average"] or {}))
    return int(state["step"])


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("work/clip/checkpoint.pt"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--out", type=Path, default=Path("work/interim/clip"))
    parser.add_argument("--image-size", type=int)
    arguments = parser.parse_args()
    step = export_checkpoint(arguments.checkpoint, arguments.config, arguments.out, arguments.image_size)
    print(f"step {step} -> {arguments.out}")


if __name__ == "__main__":
    main()
