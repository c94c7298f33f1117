"""Renders the chart with Helm, and validates what comes out against the schemas of Kubernetes and of the CRDs."""

from __future__ import annotations

import copy
import functools
import gzip
import json
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import yaml

from deployments.operations.chart import CHART

CRDS = Path(__file__).parent / "crds"
RELEASE, NAMESPACE = "demo", "prod"
# Of the schemas; the newest that the package has.
KUBERNETES = kubernetes_validate.latest_version()
Values = dict[str, Any]
Manifest = dict[str, Any]

# The versions of KubeRay that the chart is for; Ray's tokens need the second.
KUBERAY = ("1.4", "1.5", "1.6", "1.7")
# The choice that every installation must make, made the simplest way.
PLAIN: Values = {"insecure": True}
# Whole files of values, for the common kinds of installation.
FILES: dict[str, Values] = {
    path.name.removesuffix("-values.yaml"): yaml.safe_load(path.read_text())
    for path in sorted((CHART / "ci").glob("*-values.yaml"))
}


def joined(*parts: Values) -> Values:
    """Return values of several parts; later ones replace whole top-level values."""
    made: Values = {}
    for part in parts:
        made |= copy.deepcopy(part)
    return made


def supported(values: Values) -> tuple[str, ...]:
    """Return the versions of KubeRay that can run what these values ask for."""
    return KUBERAY[1:] if values.get("ray", {}).get("authMode") == "token" else KUBERAY


@functools.cache
def chart() -> helm_python.Chart:
    """Return the chart, loaded once."""
    return helm_python.Chart.load(str(CHART))


def rendered(values: Values) -> dict[str, str]:
    """Return the text of each template, by its file's name. Helm checks the values against the schema first."""
    chart().validate_schema(values)
    files = chart().render(values=values, name=RELEASE, namespace=NAMESPACE)
    return {Path(name).name: text for name, text in files.items()}


def manifests(values: Values) -> list[Manifest]:
    """Return every object that the chart makes."""
    return _manifests(json.dumps(values))


@functools.cache
def _manifests(values: str) -> list[Manifest]:
    documents = [
        document
        for name, text in rendered(json.loads(values)).items()
        if name.endswith(".yaml")
        # Of the C parser, as fast as a matrix of values wants it.
        for document in yaml.load_all(text, yaml.CSafeLoader)
    ]
    return [document for document in documents if document is not None]


def of_kind(values: Values, kind: str) -> list[Manifest]:
    """Return the objects of one kind."""
    return [manifest for manifest in manifests(values) if manifest["kind"] == kind]


def strict(schema: Any) -> Any:
    """Return a CRD's schema as JSON schema: what it does not name is refused, as the API server would warn."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    # `properties` is also the name of a property's map; only a schema has a type beside it.
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        made["additionalProperties"] = False
    return made


@functools.cache
def crd(kind: str, version: str, kuberay: str) -> jsonschema.Draft202012Validator:
    """Return the validator of a custom resource; `kuberay` is the version of KubeRay, for its own."""
    if kind == "RayService":
        text = gzip.decompress((CRDS / f"ray.io_rayservices-{kuberay}.json.gz").read_bytes())
    else:
        text = (CRDS / f"monitoring.coreos.com_{kind.lower()}s.yaml").read_bytes()
    definition = yaml.load(text, yaml.CSafeLoader)
    assert definition["spec"]["names"]["kind"] == kind
    (found,) = [v for v in definition["spec"]["versions"] if v["name"] == version]
    schema = strict(found["schema"]["openAPIV3Schema"])
    # Kubernetes' own, which a CRD leaves open.
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def problems(manifest: Manifest, kuberay: str = KUBERAY[-1]) -> list[str]:
    """Return what the API server would refuse in an object, as lines."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    if group in ("ray.io", "monitoring.coreos.com"):
        errors = crd(manifest["kind"], version, kuberay).iter_errors(manifest)
        found = [f"{error.json_path}: {error.message}" for error in errors]
        return found + [line for pod in pods(manifest).values() for line in problems(pod)]
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def pods(service: Manifest) -> dict[str, Manifest]:
    """Return the pods of a RayService by component, as objects that Kubernetes' own schema describes."""
    cluster = service["spec"].get("rayClusterConfig")
    if cluster is None:
        return {}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    made = {}
    for group in groups:
        component = group["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        metadata = {"name": component, **group["template"]["metadata"]}
        made[component] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": group["template"]["spec"],
        }
    return made
