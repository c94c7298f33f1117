"""The report's section on generated pictures: figures and sheets of ``benchmarks.generation`` and ``.steering``."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

# The benchmarks enlarge pictures without smoothing; the page does so itself.
ENLARGED = 2
SHEETS_SHOWN = 3


def picture_uri(path: Path, shrink: int = 1) -> str:
    """Return a PNG file, `shrink` times smaller, as an address that holds it (WebP)."""
    image = Image.open(path).convert("RGB")
    image = image.resize((image.width // shrink, image.height // shrink), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def generation_section(bench: Path) -> dict[str, Any]:
    """Return what the template shows; empty where neither benchmark was run.

    Parameters
    ----------
    bench : Path
        Folder that the benchmarks wrote to.
    """
    section: dict[str, Any] = {}
    for name in ("generation", "steering"):
        file = bench / f"{name}.json"
        if file.exists():
            section[name] = json.loads(file.read_text())
    if "generation" in section:
        for name in ("prompts", "samples", "nearest"):
            section[f"{name}_sheet"] = picture_uri(bench / f"generation-{name}.png", ENLARGED)
    if "steering" in section:
        section["plot"] = picture_uri(bench / "steering-doses.png")
        files = sorted(bench.glob("steering-sheet-*.png"))[:SHEETS_SHOWN]
        section["steering_sheets"] = [picture_uri(file, ENLARGED) for file in files]
        found = section["steering"]
        # JSON's keys are strings.
        section["dose"] = str(found["interaction_dose"])
    return section
