"""The image tower as the documentation of open_clip loads it; for the peers' own programs.

Runs in a peer's environment, so nothing of this project is imported.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image


class ImageTower:
    """open_clip's model and its inference transform, from a local folder.

    Parameters
    ----------
    folder : Path
        With `open_clip_config.json` and `open_clip_model.safetensors`.
    threads : int
        Of one forward.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        # A name that is built in takes the weights of a file as they are.
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            "ViT-B-32", pretrained=str(folder / "open_clip_model.safetensors"), precision="fp32", device="cpu"
        )
        if config["embed_dim"] != 512:
            raise ValueError("not ViT-B-32")
        self.model.eval()

    def decode(self, images: list[str]) -> torch.Tensor:
        """Return base64 image files as the tower takes them, float32, shape (B, 3, 224, 224)."""
        opened = (Image.open(io.BytesIO(base64.b64decode(image))) for image in images)
        return torch.stack([self.preprocess(image) for image in opened])

    @torch.inference_mode()
    def embed(self, pixels: torch.Tensor, largest: int = 32) -> np.ndarray[Any, Any]:
        """Return unit embeddings, float32, shape (B, 512), in forwards of at most `largest`."""
        parts = [self.model.encode_image(part, normalize=True) for part in pixels.split(largest)]
        return torch.cat(parts).float().numpy()


def to_base64(embeddings: np.ndarray[Any, Any]) -> str:
    """Return the rows as base64 of their float32 bytes: the cheapest form in JSON."""
    return base64.b64encode(np.ascontiguousarray(embeddings, "<f4").tobytes()).decode()
