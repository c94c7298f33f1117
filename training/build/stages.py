"""Which stages of a build are finished: a stamp a stage, with what it was made from and what it made.

A stage counts as finished when its stamp names the same inputs and every file it made is still there with the same
bytes. A stamp is written last and at once, so that a run may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.bundle.verification import file_sha256
from services.strict_json import canonical_json

# Of the code: raised when a stage's results change, so that old ones are made again.
VERSION = 2


class Stages:
    """The stamps of one build.

    Parameters
    ----------
    work : Path
        The build's folder; outputs are named relative to it.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self._folder = work / "stages"

    def inputs_digest(self, name: str, inputs: Mapping[str, Any]) -> str:
        """Return a hash over a stage's inputs."""
        return hashlib.sha256(canonical_json([VERSION, name, dict(inputs)])).hexdigest()

    def is_done(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Return whether the stage need not run."""
        stamp = self._read(name)
        if stamp is None or stamp["inputs"] != self.inputs_digest(name, inputs):
            return False
        return all(
            (self.work / file).is_file() and file_sha256(self.work / file) == sha
            for file, sha in stamp["outputs"].items()
        )

    def finish(self, name: str, inputs: Mapping[str, Any], outputs: Sequence[Path]) -> None:
        """Stamp a stage that has written `outputs`, files below `work`."""
        files = sorted(outputs)
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        stamp = {
            "inputs": self.inputs_digest(name, inputs),
            "outputs": {file.relative_to(self.work).as_posix(): file_sha256(file) for file in files},
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{name}.{os.getpid()}.part"
        part.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
        part.replace(self._folder / f"{name}.json")

    def outputs(self, name: str) -> dict[str, str]:
        """Return what a finished stage made: SHA-256 by path."""
        stamp = self._read(name)
        return {} if stamp is None else dict(stamp["outputs"])

    def run(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Sequence[Path]]) -> bool:
        """Run `make`, which returns the files it wrote, unless the stage is finished; return whether it ran."""
        if self.is_done(name, inputs):
            return False
        self.finish(name, inputs, make())
        return True

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            stamp = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stamp if isinstance(stamp, dict) and {"inputs", "outputs"} <= set(stamp) else None
