"""Installs the foreign client's two packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def node_encode() -> Callable[[str, Path, str], Any]:
    """Run ``encode.mjs TARGET IMAGE TEXT`` and read what it prints."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    if not (HERE / "node_modules" / "@grpc").is_dir():
        install = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(install, cwd=HERE, capture_output=True, text=True)
        # Without a network there is nothing to test with; in CI that must not pass unseen.
        if done.returncode != 0 and not os.environ.get("CI"):
            pytest.skip(f"npm ci failed: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr

    def run(target: str, image: Path, text: str) -> Any:
        done = subprocess.run(
            [node, HERE / "encode.mjs", target, image, text], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
