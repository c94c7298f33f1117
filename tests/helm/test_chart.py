"""What the chart renders over a matrix of values: valid for Kubernetes, one with the settings, closed by default."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shlex
import subprocess
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.cluster.app import build, from_config
from deployments.operations.chart import CHART, RULES
from deployments.operations.environment import ENVIRONMENT, ONE_MACHINE, REPLICA_ENVIRONMENT
from deployments.operations.settings import Settings
from tests.helm.chart import (
    FILES,
    NAMESPACE,
    PLAIN,
    RELEASE,
    Manifest,
    Values,
    joined,
    manifests,
    of_kind,
    pods,
    problems,
    rendered,
    supported,
)
from tests.observability.tools import tool

TLS: Values = {"tls": {"secretName": "tls"}}
ACCESS: dict[str, Values] = {
    "plain": PLAIN,
    "tls and tokens": {**TLS, "tokens": {"secretName": "tokens", "key": "lines"}},
    "mutual tls": {"tls": {"secretName": "tls", "clientCASecretName": "ca"}},
}
GENERATOR: dict[str, Values] = {
    "no generator": {},
    "cpu generator": {"generator": {"enabled": True, "device": "cpu"}},
    "gpu generator": {"generator": {"enabled": True, "gpus": 2, "maxReplicas": 8}},
}
PLACEMENT = {
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "annotations": {"example.com/a": "b"},
}
ENCODER: dict[str, Values] = {
    "cpu encoder": {"encoder": {"minReplicas": 2, "maxReplicas": 2}},
    "gpu encoder": {"encoder": {"device": "gpu", **PLACEMENT}},
}
EXTRAS: dict[str, Values] = {
    "defaults": {},
    "everything": {
        "nameOverride": "features",
        "image": {"tag": "1.2.3", "pullSecrets": [{"name": "registry"}]},
        "settings": {"max_request_bytes": 33_554_432, "drain_s": 60, "log_level": "debug"},
        "bundle": {"existingClaim": "bundle"},
        "service": {"type": "LoadBalancer", "port": 443, "httpPort": 8443, "annotations": {"a": "b"}},
        "gateway": {"replicas": 3, **PLACEMENT, "affinity": {"nodeAffinity": {}}},
        "head": PLACEMENT,
        "ray": {"authMode": "token", "redis": {"address": "redis:6379", "passwordSecretName": "redis"}},
        "podMonitor": {"labels": {"release": "prometheus"}},
        "prometheusRule": {"disabled": ["MonofacetSlow"], "extraGroups": [{"name": "mine", "rules": []}]},
        "networkPolicy": {"extraEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
        "podDisruptionBudget": {"maxUnavailable": 2},
    },
    "nothing": {
        "fullnameOverride": "mf",
        "podMonitor": {"enabled": False},
        "prometheusRule": {"enabled": False},
        "dashboard": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
    },
}


# Every pair of choices, and every triple without access, which takes turns.
MATRIX = [
    pytest.param(joined(*(value for _, value in chosen)), id=", ".join(name for name, _ in chosen))
    for number, others in enumerate(itertools.product(GENERATOR.items(), ENCODER.items(), EXTRAS.items()))
    for chosen in [(list(ACCESS.items())[(number + number // 3) % 3], *others)]
]
FULL = joined(ACCESS["tls and tokens"], GENERATOR["gpu generator"])
WHOLE = [pytest.param(values, id=name) for name, values in FILES.items()]


def serve_config(values: Values) -> Any:
    (service,) = of_kind(values, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def arguments(values: Values) -> dict[str, Any]:
    (application,) = serve_config(values)["applications"]
    made: dict[str, Any] = application["args"]
    return made


def pods_of(values: Values) -> dict[str, Manifest]:
    (service,) = of_kind(values, "RayService")
    return pods(service)


@pytest.mark.parametrize("values", [*WHOLE, *MATRIX])
def test_everything_rendered_is_valid(values: Values) -> None:
    for kuberay in supported(values):
        found = {f"{m['kind']}/{m['metadata']['name']}": problems(m, kuberay) for m in manifests(values)}
        assert {name: lines for name, lines in found.items() if lines} == {}, kuberay
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests(values)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("values", [pytest.param({}, id="defaults"), *WHOLE, *MATRIX[::4]])
def test_helm_lint_is_green(values: Values) -> None:
    report = helm_python.lint(str(CHART), values)
    assert report["errors"] == []
    # 1 is information: a chart without an icon is one.
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayService", ["spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplica"], 1),
        ("RayService", ["spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers"], 1),
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0, "interval"], "15 seconds"),
        ("PrometheusRule", ["spec", "groups", 0, "rule"], []),
        ("NetworkPolicy", ["spec", "policyType"], []),
        ("Service", ["spec", "ports", 0, "port"], "grpc"),
    ],
)
def test_a_mistake_would_be_seen(kind: str, path: list[Any], value: Any) -> None:
    manifest = copy.deepcopy(of_kind(PLAIN, kind)[0])
    place: Any = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert problems(manifest) != []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "insecure=true"),
        ({"insecure": True, "tls": {"clientCASecretName": "ca"}}, "needs tls.secretName"),
        (joined(PLAIN, {"encoder": {"minReplicas": 3, "maxReplicas": 2}}), "is less than"),
        (joined(PLAIN, {"settings": {"max_requests": 1}}), "max_requests"),
        (joined(PLAIN, {"settings": {"max_items": 1_000}}), "max_items"),
        (joined(PLAIN, {"settings": {"tokens": "in the clear"}}), "tokens"),
        (joined(PLAIN, {"encoder": {"memory": "6 GB"}}), "memory"),
        (joined(PLAIN, {"encoder": {"device": "tpu"}}), "device"),
        (joined(PLAIN, {"gatway": {}}), "gatway"),
    ],
)
def test_values_that_cannot_work_are_refused_with_a_reason(values: Values, message: str) -> None:
    with pytest.raises(helm_python.HelmError, match=message):
        rendered(values)


@pytest.mark.parametrize("values", MATRIX[::4])
def test_the_serve_config_is_one_that_serve_takes_and_builds_the_application(values: Values) -> None:
    config = ServeDeploySchema.model_validate(serve_config(values))
    (application,) = config.applications
    assert application.import_path == f"{from_config.__module__}:{from_config.__name__}"
    # All but the bundle, which is on a volume that is not here.
    settings = Settings(**{name: value for name, value in arguments(values).items() if name != "bundle"})
    built = build(settings)
    gateway = built._bound_deployment
    assert gateway.num_replicas == settings.gateway_replicas
    assert gateway._replica_config.max_replicas_per_node == 1


def test_the_serve_config_says_what_the_values_say() -> None:
    values = joined(EXTRAS["everything"], FULL)
    made = arguments(values)
    assert {name: made[name] for name in values["settings"]} == values["settings"]
    assert made["tls_certificate"] == "/etc/monofacet/tls/tls.crt"
    assert made["tokens_file"] == "/etc/monofacet/tokens/lines"
    assert (made["insecure"], made["loopback_only"]) == (False, False)
    assert made["bundle"] == "/bundle"
    # A setting that only the chart knows would have stopped the server.
    assert set(made) <= set(Settings.model_fields)


def test_several_bundles_have_pods_for_each() -> None:
    paths = ["/models/photos", "/models/drawings"]
    values = joined(FULL, {"bundle": {"existingClaim": "models", "path": "/models", "paths": paths}})
    made = arguments(values)
    assert made["bundles"] == paths
    assert "bundle" not in made
    assert [str(path) for path in Settings(**made).served] == paths
    (one,), (two,) = (of_kind(chosen, "RayService") for chosen in (FULL, values))
    for before, after in zip(
        *(service["spec"]["rayClusterConfig"]["workerGroupSpecs"] for service in (one, two)), strict=True
    ):
        factor = 1 if after["groupName"] == "gateway" else 2
        for number in ("replicas", "minReplicas", "maxReplicas"):
            assert after[number] == factor * before[number]
        (container,) = after["template"]["spec"]["containers"]
        assert "/models" in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("values", [*MATRIX[::4], joined(FULL, {"generator": {"cpus": 7}})])
def test_each_replica_finds_the_one_kind_of_pod_that_is_meant_for_it(values: Values) -> None:
    (service,) = of_kind(values, "RayService")
    made = arguments(values)
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    offered = {
        group["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: (
            # KubeRay puts it on a shell's command line.
            json.loads(*shlex.split(group["rayStartParams"]["resources"])),
            group,
        )
        for group in groups
    }
    components = ["gateway", "encoder"] + ["generator"] * made["generator"]
    assert list(offered) == components
    for component, (resources, group) in offered.items():
        assert resources == {made[f"{component}_resource"]: 1}
        assert group["minReplicas"] == made[f"{component}_replicas"]
        if component == "gateway":
            continue
        assert group["maxReplicas"] == made[f"{component}_max_replicas"]
        assert float(group["rayStartParams"]["num-cpus"]) == made[f"{component}_cpus"]
        assert int(group["rayStartParams"].get("num-gpus", 0)) == made[f"{component}_gpus"]
        (container,) = group["template"]["spec"]["containers"]
        threads = made["threads" if component == "encoder" else "generator_threads"]
        assert container["resources"]["requests"]["cpu"] == made[f"{component}_cpus"] == threads
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == made[f"{component}_gpus"]
        assert container["image"].endswith("-cuda" if made[f"{component}_gpus"] else "-cpu")
    assert service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("values", [PLAIN, FULL])
def test_ray_is_told_the_same_as_by_the_command(values: Values) -> None:
    for component, pod in pods_of(values).items():
        told = {e["name"]: e["value"] for e in pod["spec"]["containers"][0]["env"]}
        expected = ENVIRONMENT if component == "head" else ENVIRONMENT | REPLICA_ENVIRONMENT
        assert {name: told.get(name) for name in expected} == expected
        # It would keep the nodes from each other.
        assert not (set(ONE_MACHINE) - set(ENVIRONMENT)) & set(told)


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())


@pytest.mark.parametrize("values", MATRIX[::5])
def test_services_monitors_and_budgets_select_the_pods_they_mean(values: Values) -> None:
    made = pods_of(values)
    gateway = made["gateway"]
    ports = {p["name"]: p["containerPort"] for p in gateway["spec"]["containers"][0]["ports"]}
    expected = arguments(values)
    assert ports == {
        "grpc": expected["port"],
        "http": expected["http_port"],
        "health": expected["health_port"],
        "metrics": expected["metrics_port"],
    }
    for service in of_kind(values, "Service"):
        chosen = [
            name
            for name, pod in made.items()
            if selects(service["spec"]["selector"], pod["metadata"]["labels"])
        ]
        assert chosen == ["gateway"]
        # Who balances calls itself calls over gRPC.
        named = ["grpc"] if service["spec"].get("clusterIP") == "None" else ["grpc", "http"]
        assert [port["targetPort"] for port in service["spec"]["ports"]] == named
    for monitor in of_kind(values, "PodMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        assert [n for n, pod in made.items() if selects(selector, pod["metadata"]["labels"])] == ["gateway"]
        assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    for budget in of_kind(values, "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        chosen = [n for n, pod in made.items() if selects(selector, pod["metadata"]["labels"])]
        assert chosen == [budget["metadata"]["labels"]["app.kubernetes.io/component"]]


def test_gateways_are_ready_by_the_health_service_and_drain_before_they_stop() -> None:
    values = joined(FULL, {"settings": {"drain_s": 40, "linger_s": 2.5}})
    spec = pods_of(values)["gateway"]["spec"]
    (container,) = spec["containers"]
    made = arguments(values)
    # Not the port with TLS: probes cannot speak it.
    assert container["readinessProbe"]["grpc"]["port"] == made["health_port"] != made["port"]
    hook = " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
    assert f"touch {made['drain_file']}" in hook
    assert "seq 43" in hook
    assert spec["terminationGracePeriodSeconds"] > 43
    subprocess.run(["bash", "-n", "-c", container["lifecycle"]["preStop"]["exec"]["command"][2]], check=True)


def test_without_settings_of_its_own_the_chart_waits_as_long_as_the_server_drains() -> None:
    (container,) = pods_of(PLAIN)["gateway"]["spec"]["containers"]
    settings = Settings()
    hook = " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
    assert f"seq {math.ceil(settings.linger_s + settings.drain_s)})" in hook


@pytest.mark.parametrize("values", MATRIX[::5])
def test_pods_run_without_rights(values: Values) -> None:
    for component, pod in pods_of(values).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is (component == "head")
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
            assert "memory" in container["resources"]["limits"]


def test_secrets_are_named_never_held_and_only_gateways_see_them() -> None:
    values = joined(FULL, {"tls": {"secretName": "tls", "clientCASecretName": "ca"}})
    assert of_kind(values, "Secret") == []
    for component, pod in pods_of(values).items():
        mounted = {v["secret"]["secretName"] for v in pod["spec"]["volumes"] if "secret" in v}
        assert mounted == ({"tls", "ca", "tokens"} if component == "gateway" else set())


def test_rules_and_dashboard_are_the_generated_files() -> None:
    (rule,) = of_kind(PLAIN, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES.read_text())
    (shown,) = of_kind(PLAIN, "ConfigMap")
    assert json.loads(shown["data"]["monofacet.json"]) == json.loads(
        (CHART / "files" / "dashboard.json").read_text()
    )


def test_alerts_can_be_left_out_and_added(tmp_path: Path) -> None:
    extra = {"name": "mine", "rules": [{"alert": "Mine", "expr": "vector(1)"}]}
    (rule,) = of_kind(
        joined(PLAIN, {"prometheusRule": {"disabled": ["MonofacetSlow"], "extraGroups": [extra]}}),
        "PrometheusRule",
    )
    names = {r.get("alert") for group in rule["spec"]["groups"] for r in group["rules"]}
    assert "MonofacetSlow" not in names
    assert {"Mine", "MonofacetAbsent"} <= names
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]))
    subprocess.run(
        [tool("promtool"), "check", "rules", tmp_path / "rules.yaml"], check=True, capture_output=True
    )


def described(schema: dict[str, Any], path: str) -> list[str]:
    missing = [] if schema.get("description") else [path]
    for name, value in schema.get("properties", {}).items():
        missing += described(value, f"{path}.{name}")
    return missing


def test_every_value_is_described_and_every_described_value_exists() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert described(schema, "") == []

    def compare(values: Any, part: dict[str, Any], path: str) -> None:
        names = set(part.get("properties", {})) - {"global"}
        if path != ".settings" and names:
            assert set(values) == names, path
            for name in names:
                compare(values[name], part["properties"][name], f"{path}.{name}")

    gateway = schema["properties"]["gateway"]["properties"]["resources"]["properties"]
    assert set(gateway) == {"requests", "limits"}
    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


def test_notes_tell_how_to_call_and_warn_of_what_is_open() -> None:
    notes = rendered(joined(PLAIN, {"networkPolicy": {"enabled": False}}))["NOTES.txt"]
    assert f"{RELEASE}-monofacet-grpc.{NAMESPACE}.svc:9000" in notes
    assert notes.count("WARNING") == 3
    assert "WARNING" not in rendered(FULL)["NOTES.txt"]
