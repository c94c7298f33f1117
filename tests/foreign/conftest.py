"""Installs the packages of the clients that run in node."""

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


Run = Callable[..., Any]


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a script of this folder with arguments and read what it prints, as JSON."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
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

    def run(script: str, *arguments: object) -> Any:
        command = [program, HERE / script, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
