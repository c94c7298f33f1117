"""Write the rules and the dashboard into the chart: `python -m deployments.monitoring`."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from deployments.monitoring.dashboard import dashboard
from deployments.monitoring.rules import rules

FILES = Path(__file__).resolve().parents[2] / "helm" / "monofacet" / "files"
_HEADER = "# Made by `python -m deployments.monitoring` from deployments/metrics.py; do not edit.\n"


def generated() -> dict[str, str]:
    """Return the text of each file by its name in the chart's `files`."""
    return {
        "rules.yaml": _HEADER + yaml.safe_dump(rules(), sort_keys=False, width=110, allow_unicode=True),
        "dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
    }


if __name__ == "__main__":
    FILES.mkdir(parents=True, exist_ok=True)
    for name, text in generated().items():
        (FILES / name).write_text(text)
        print(f"wrote {name}")
