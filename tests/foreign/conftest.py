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
def node_encode(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path, str], Any]:
    """Run ``encode.mjs TARGET IMAGE TEXT`` and read what it prints."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    installed, wanted = HERE / "node_modules" / ".package-lock.json", HERE / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < wanted.stat().st_mtime:
        install = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        # npm's own folder is in a home that may not be there.
        environment = {**os.environ, "npm_config_cache": str(tmp_path_factory.mktemp("npm"))}
        done = subprocess.run(install, cwd=HERE, env=environment, capture_output=True, text=True)
        # Without a network there is nothing to test with; in CI that must not pass unseen.
        if done.returncode != 0 and not os.environ.get("CI"):
            pytest.skip(f"npm ci failed: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr

    def run(target: str, image: Path, text: str) -> Any:
        done = subprocess.run(
            [node, HERE / "encode.mjs", target, image, text], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
