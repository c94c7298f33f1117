"""The two files of a calibration in a bundle: JSON with values, and safetensors with arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from services.errors import ManifestError
from services.weights import load_weights


@contextmanager
def read_files(
    config: Path, weights: Path, keys: set[str], what: str
) -> Iterator[tuple[dict[str, Any], dict[str, NDArray[Any]]]]:
    """Open both files for the length of a block.

    Parameters
    ----------
    config, weights : Path
        The JSON and the safetensors.
    keys : set of str
        The keys that the JSON has, no more and no fewer.
    what : str
        What they are, as "a bias calibration", for the message.

    Yields
    ------
    document : dict
        The JSON.
    tensors : dict of str to array
        The arrays by name.

    Raises
    ------
    ManifestError
        Where a file does not hold what it should, or the block finds that it does not.
    """
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
        tensors = load_weights(weights)
        if set(document) != keys:
            raise ManifestError(f"{config.name} must hold exactly the keys {sorted(keys)}")
        yield document, tensors
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ManifestError(f"{config.name} or {weights.name} is not {what}: {error}") from error


def write_files(
    config: Path, weights: Path, document: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Write both files, their folder with them."""
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    safetensors.numpy.save_file(contiguous, weights)
