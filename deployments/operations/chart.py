"""Writes what the Helm chart holds of the code: `python -m deployments.operations.chart`.

Alert rules and the dashboard from the metrics table, the environment of Ray's processes, and the schema of the
settings. A test compares the files with what this module makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from deployments.operations.environment import ENVIRONMENT, REPLICA_ENVIRONMENT
from deployments.operations.monitoring.dashboard import dashboard
from deployments.operations.monitoring.rules import rules
from deployments.operations.settings import Settings

CHART = Path(__file__).resolve().parents[2] / "helm" / "monofacet"
RULES = CHART / "files" / "rules.yaml"
# Settings that follow from other values of the chart, or that make no sense on a cluster.
OWN = frozenset(
    {
        "bundle",
        "bundles",
        "host",
        "port",
        "http_port",
        "health_port",
        "metrics_host",
        "metrics_port",
        "loopback_only",
        "tls_certificate",
        "tls_key",
        "tls_client_ca",
        "insecure",
        "tokens_file",
        "tokens",
        "drain_file",
        "log_format",
        "threads",
        "decode_threads",
        "object_store_bytes",
        "gateway_replicas",
        "gateway_resource",
    }
)
_OWN_PREFIXES = ("encoder_", "generator")
_HEADER = "# Made by `python -m deployments.operations.chart`; do not edit.\n"


def owned(name: str) -> bool:
    """Return whether the chart sets a setting itself, so that `settings` of the values may not."""
    return name in OWN or name.startswith(_OWN_PREFIXES)


def settings_schema() -> dict[str, Any]:
    """Return the JSON schema of the chart's value `settings`."""
    schema = Settings.model_json_schema()
    properties = {name: value for name, value in schema["properties"].items() if not owned(name)}
    for value in properties.values():
        value.pop("title", None)
        # Some defaults are this machine's.
        value.pop("default", None)
    return {
        "type": "object",
        "description": "Settings of the server by their names in deployments/operations/settings.py.",
        "additionalProperties": False,
        "properties": properties,
    }


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, width=110, allow_unicode=True)
    return _HEADER + text


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def generated() -> dict[Path, str]:
    """Return the text of each file of the chart that holds what the code says."""
    schema = CHART / "values.schema.json"
    values = json.loads(schema.read_text())
    values["properties"]["settings"] = settings_schema()
    environment = {"all": ENVIRONMENT, "replicas": REPLICA_ENVIRONMENT}
    return {
        RULES: _yaml(rules()),
        CHART / "files" / "dashboard.json": _json(dashboard()),
        CHART / "files" / "environment.yaml": _yaml(environment),
        schema: _json(values),
    }


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(CHART)}")
