"""The probe of a bundle, recorded by open_clip's own code: its towers, its preprocessing and its tokenizer.

``python -m training.build.selfcheck FOLDER`` writes ``FOLDER/probe.safetensors`` for a folder with
``open_clip_config.json`` and weights. The service's towers are code of its own around open_clip's, so this is a second
opinion; a bundle whose two opinions differ is not served (`services.bundle.selfcheck`).
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from services.bundle.selfcheck import SelfCheck, record_selfcheck, write_selfcheck
from services.encoding.trimmed_open_clip import whole_open_clip

PROBE_FILE = "probe.safetensors"


def probe_of_folder(folder: Path) -> SelfCheck:
    """Return the probe of the model in a folder, as open_clip itself loads and uses it."""
    open_clip = whole_open_clip()
    name = f"local-dir:{folder.resolve()}"
    with warnings.catch_warnings():
        # It warns where weights and activation function do not go together, and goes on.
        warnings.filterwarnings("error", message=".*QuickGELU mismatch.*")
        model, _, preprocess = open_clip.create_model_and_transforms(name, precision="fp32", device="cpu")
    return probe_of_model(model.eval(), preprocess, open_clip.get_tokenizer(name))


@torch.no_grad()
def probe_of_model(model: Any, preprocess: Any, tokenizer: Any) -> SelfCheck:
    """Return the probe of a model in memory, with its own transform and tokenizer, as open_clip makes all three."""
    threads = torch.get_num_threads()
    # How a product is cut into threads changes its last bits, and with them the bundle's hash.
    torch.set_num_threads(1)
    try:
        return _recorded(model, preprocess, tokenizer)
    finally:
        torch.set_num_threads(threads)


def _recorded(model: Any, preprocess: Any, tokenizer: Any) -> SelfCheck:
    def raw(embed: Any, batch: NDArray[Any]) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = embed(torch.from_numpy(batch)).float().numpy()
        return embeddings

    return record_selfcheck(
        lambda picture: preprocess(picture).numpy(),
        lambda texts: tokenizer(list(texts)).numpy(),
        lambda pixels: raw(model.encode_image, pixels),
        lambda tokens: raw(model.encode_text, tokens),
    )


def main() -> None:
    """Record from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_selfcheck(arguments.folder / PROBE_FILE, probe_of_folder(arguments.folder))
    print(f"wrote {arguments.folder / PROBE_FILE}")


if __name__ == "__main__":
    main()
