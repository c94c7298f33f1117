"""Write a training checkpoint as the towers a bundle takes, before the training has ended.

``python -m training.export --out work/interim/clip`` lets everything after the towers be tried on interim weights;
the final ones are written by ``training.clip`` itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.clip import CONFIG
from training.embeddings import CONFIG_FILE, WEIGHTS_FILE


def export_checkpoint(checkpoint: Path, config: Path, out: Path, image_size: int | None = None) -> int:
    """Write open_clip's config and half-precision safetensors; returns the checkpoint's step.

    `image_size` replaces the config's: towers that have only trained at the low resolution so far work at that one.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    out.mkdir(parents=True, exist_ok=True)
    document = json.loads(config.read_text())
    if image_size:
        document["model_cfg"]["vision_cfg"]["image_size"] = image_size
    (out / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")
    weights = {
        name: tensor.contiguous().half() if tensor.is_floating_point() else tensor
        for name, tensor in state["model"].items()
    }
    save_file(weights, out / WEIGHTS_FILE)
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
