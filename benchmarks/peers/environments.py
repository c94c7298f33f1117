"""Virtual environments of the peers: one command makes them, from pinned requirements beside this file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WHERE = ROOT / "out" / "peers"
# LitServe is built on FastAPI, so one environment holds both.
ENVIRONMENTS = ("litserve", "infinity")
_TOLD = {
    "litserve": ("litserve", "fastapi", "uvicorn", "torch", "open_clip_torch", "pillow"),
    "infinity": ("infinity_emb", "torch", "transformers", "optimum", "fastapi", "uvicorn", "pillow"),
}


def python(name: str) -> Path:
    """Return the interpreter of an environment."""
    return WHERE / name / "bin" / "python"


def requirements(name: str) -> Path:
    """Return the pinned requirements of an environment."""
    return HERE / f"{name}.txt"


def _stamp(name: str) -> Path:
    return WHERE / name / ".installed"


def ready(name: str) -> bool:
    """Return whether an environment holds what its requirements say now."""
    digest = hashlib.sha256(requirements(name).read_bytes()).hexdigest()
    return _stamp(name).exists() and _stamp(name).read_text() == digest


def make(name: str) -> None:
    """Make an environment, unless it is ready.

    Raises
    ------
    CalledProcessError
        Where pip cannot install it.
    """
    if ready(name):
        return
    if not python(name).exists():
        subprocess.run([sys.executable, "-m", "venv", str(WHERE / name)], check=True)
    install = [str(python(name)), "-m", "pip", "install", "--quiet", "--requirement", str(requirements(name))]
    subprocess.run(install, check=True)
    _stamp(name).write_text(hashlib.sha256(requirements(name).read_bytes()).hexdigest())


def versions(name: str) -> dict[str, str]:
    """Return the versions of the packages that matter, as installed."""
    code = (
        "import importlib.metadata as m, json, platform, sys;"
        "print(json.dumps({'python': platform.python_version(), **{p: m.version(p) for p in sys.argv[1:]}}))"
    )
    done = subprocess.run(
        [str(python(name)), "-c", code, *_TOLD[name]], check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found
