"""Which processes pay for torch: only the encoder's, since importing it takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "open_clip", "transformers", "diffusers", "scipy")


@pytest.mark.parametrize(
    "modules",
    ["deployments.serve, services.bundle, deployments.app", "deployments.gateway.server, services.bundle"],
    ids=["command", "gateway"],
)
def test_only_the_encoder_imports_torch(modules: str) -> None:
    script = f"import sys, {modules}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
