"""What KubeRay's reconcile needs of the chart before it says Ready, from 1.4 to 1.7, read from its own source.

Each test is one need; the function of KubeRay's that has it is named there (`ray-operator/controllers/ray`). In order:

- the API server takes every field: the CRD of each version (`test_chart.test_everything_rendered_is_valid`);
- the names are short enough and begin with a letter: `ValidateRayServiceMetadata`, `ValidateRayClusterMetadata`;
- no two ways of saying one thing: `ValidateRayServiceSpec`, `ValidateRayClusterSpec`;
- the first container is Ray's, and its command is KubeRay's: `BuildPod`;
- labels and variables that KubeRay selects by and sets itself are left to it: `labelPod`, `setContainerEnvVars`;
- resources can be read by KubeRay, by the shell and by Ray's autoscaler: `getResourcesMap`, `generateRayStartCommand`;
- the head has ports named `dashboard` and `serve`: `FetchHeadServiceURL`, `BuildServeService`;
- workers are ready without an HTTP proxy: `initLivenessAndReadinessProbe`;
- the head is ready by the probes that KubeRay makes, which need wget up to 1.5 and Ray's agent on its own port;
- the head is not asked for its HTTP proxy: `updateHeadPodServeLabel`;
- there is an application and all are RUNNING: `getAndCheckServeStatus` (run for real in `tests/e2e/test_kuberay.py`);
- a pod that is ready counts as an endpoint of KubeRay's Service: `calculateStatus`;
- an old cluster is deleted whole, 60 s after the new one serves: `cleanUpRayClusterInstance`.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from deployments.operations.chart import CHART
from tests.helm.chart import FILES, KUBERAY, NAMESPACE, PLAIN, Manifest, Values, of_kind, pods
from tests.helm.test_chart import MATRIX
from tests.helm.test_image import stages

EVERY = pytest.mark.parametrize(
    "values", [*(pytest.param(values, id=name) for name, values in FILES.items()), *MATRIX]
)
# utils/constant.go; a cluster's name is the service's with six characters more.
LONGEST_NAME, LONGEST_CLUSTER_NAME = 47, 53
DNS1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DASHBOARD, AGENT, GCS = 8265, 52365, 6379


def service_of(values: Values) -> Manifest:
    (service,) = of_kind(values, "RayService")
    return service


def cluster_of(values: Values) -> dict[str, Any]:
    cluster: dict[str, Any] = service_of(values)["spec"]["rayClusterConfig"]
    return cluster


def groups_of(values: Values) -> list[dict[str, Any]]:
    cluster = cluster_of(values)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def ray_container(group: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return container


def ports_of(group: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in ray_container(group).get("ports", [])}


@EVERY
def test_names_are_such_as_kuberay_takes(values: Values) -> None:
    name = service_of(values)["metadata"]["name"]
    assert DNS1035.fullmatch(name) and len(name) <= LONGEST_NAME
    assert len(f"{name}-abcde") <= LONGEST_CLUSTER_NAME


@pytest.mark.parametrize("release", ["3d", "a.b", "a" * 53, f"{'a' * 39}-b"])
def test_a_release_whose_name_a_service_cannot_have_is_refused_with_the_remedy(release: str) -> None:
    import helm_python

    chart = helm_python.Chart.load(str(CHART))
    try:
        made = chart.render(values=PLAIN, name=release, namespace=NAMESPACE)
    except helm_python.HelmError as error:
        assert "fullnameOverride" in str(error)
        assert not DNS1035.fullmatch(release)
    else:
        (text,) = [text for path, text in made.items() if path.endswith("rayservice.yaml")]
        name = yaml.safe_load(text)["metadata"]["name"]
        assert DNS1035.fullmatch(name) and len(name) <= LONGEST_NAME


@EVERY
def test_nothing_is_said_in_two_ways(values: Values) -> None:
    service, cluster = service_of(values), cluster_of(values)
    assert "annotations" not in service["metadata"]
    assert "upgradeStrategy" not in cluster and "headService" not in cluster["headGroupSpec"]
    for group in groups_of(values):
        assert len(group["template"]["spec"]["containers"]) == 1
        # Resources and labels of a group are either its own or those of `ray start`.
        assert not {"resources", "labels", "suspend"} & set(group)
        assert not {"labels", "redis-password", "redis-username"} & set(group["rayStartParams"])
        # The autoscaler's choice of version would want them to be Never.
        assert "restartPolicy" not in group["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if "authOptions" in cluster:
        assert cluster["authOptions"] == {"mode": "token"}
        assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)


@EVERY
def test_rays_container_is_the_first_and_its_command_is_kuberays(values: Values) -> None:
    for group in groups_of(values):
        assert ray_container(group)["name"].startswith("ray-")
        # KubeRay puts `ray start` behind a command, and mounts shared memory and the autoscaler's logs.
        assert not {"command", "args"} & set(ray_container(group))
        mounted = {mount["mountPath"] for mount in ray_container(group)["volumeMounts"]}
        assert not {"/dev/shm", "/tmp/ray"} & mounted
        assert "serviceAccountName" not in group["template"]["spec"]


@EVERY
def test_labels_and_variables_of_kuberays_are_left_to_it(values: Values) -> None:
    # By these the head's Service finds the head; KubeRay lets a template override them.
    selected_by = {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}
    own = {"FQ_RAY_IP", "RAY_IP", "RAY_PORT", "RAY_ADDRESS", "RAY_CLUSTER_NAME", "RAY_CLOUD_INSTANCE_ID"}
    own |= {"RAY_NODE_TYPE_NAME", "RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_AUTH_MODE"}
    own |= {"RAY_AUTH_TOKEN", "RAY_enable_autoscaler_v2", "RAY_external_storage_namespace"}
    for group in groups_of(values):
        labels = group["template"]["metadata"]["labels"]
        assert not selected_by & set(labels)
        assert not [name for name in labels if name.startswith("ray.io/")]
        assert not own & {variable["name"] for variable in ray_container(group)["env"]}
        assert not [
            name for name in group["template"]["metadata"].get("annotations", {}) if "ray.io/" in name
        ]


@EVERY
def test_services_of_kubernetes_set_no_variables(values: Values) -> None:
    # A Service named monofacet would make MONOFACET_PORT=tcp://10.0.0.1:9000, which is no port.
    for group in groups_of(values):
        assert group["template"]["spec"]["enableServiceLinks"] is False


@EVERY
def test_resources_are_read_alike_by_kuberay_the_shell_and_the_autoscaler(values: Values) -> None:
    cluster = cluster_of(values)
    derived = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "a", "namespace": NAMESPACE}, "spec": cluster}
    )["available_node_types"]
    for group in cluster["workerGroupSpecs"]:
        params = group["rayStartParams"]
        assert all(isinstance(value, str) for value in params.values())
        # As convertParamMap writes them, and as bash splits them.
        (word,) = shlex.split(f"--resources={params['resources']}")
        by_shell = json.loads(word.removeprefix("--resources="))
        assert by_shell == json.loads(params["resources"].strip("'\"` "))
        node = derived[group["groupName"]]
        assert {name: node["resources"][name] for name in by_shell} == by_shell
        assert node["resources"]["CPU"] == int(params["num-cpus"])
        assert node["resources"].get("GPU", 0) == int(params.get("num-gpus", 0))
        assert (node["min_workers"], node["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
    assert derived["headgroup"]["resources"]["CPU"] == 0


@EVERY
def test_the_head_has_the_ports_that_kuberay_looks_for_by_name(values: Values) -> None:
    head = cluster_of(values)["headGroupSpec"]
    # Once a container names any port, KubeRay adds none of its own but the metrics'.
    ports = ports_of(head)
    assert ports["dashboard"] == DASHBOARD and ports["gcs-server"] == GCS
    assert "serve" in ports
    assert head["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert not {"dashboard-port", "port"} & set(head["rayStartParams"])
    # KubeRay 1.4 and 1.5 take the head's number, 1.6 and 1.7 the whole port of that name, and so its target.
    (port,) = service_of(values)["spec"]["serveService"]["spec"]["ports"]
    assert port == {"name": "serve", "port": ports["serve"], "targetPort": "grpc"}


@EVERY
def test_a_ready_gateway_is_an_endpoint_of_kuberays_service(values: Values) -> None:
    (port,) = service_of(values)["spec"]["serveService"]["spec"]["ports"]
    workers = cluster_of(values)["workerGroupSpecs"]
    # KubeRay labels every worker for that Service; by the target's name only gateways have its port.
    assert [g["groupName"] for g in workers if port["targetPort"] in ports_of(g)] == ["gateway"]
    assert {g["groupName"]: ports_of(g) for g in workers}["gateway"]["grpc"] == port["port"]


@EVERY
def test_workers_are_ready_without_an_http_proxy(values: Values) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(service_of(values)["spec"]["serveConfigV2"]))
    assert config.proxy_location == "Disabled"
    for group in cluster_of(values)["workerGroupSpecs"]:
        # To a worker without a probe of its own, every version adds the proxy's /-/healthz.
        probe = ray_container(group)["readinessProbe"]
        assert "healthz" not in json.dumps(probe) or f":{AGENT}/api/local_raylet_healthz" in json.dumps(probe)
        assert "/-/" not in json.dumps(probe)
        assert "livenessProbe" not in ray_container(group)
        assert "dashboard-agent-listen-port" not in group["rayStartParams"]
    assert service_of(values)["spec"]["excludeHeadPodFromServeSvc"] is True


@EVERY
def test_the_head_is_ready_by_kuberays_own_probes(values: Values) -> None:
    head = cluster_of(values)["headGroupSpec"]
    assert not {"readinessProbe", "livenessProbe"} & set(ray_container(head))
    assert "dashboard-agent-listen-port" not in head["rayStartParams"]
    # Up to 1.5 they are `bash -c "wget ... | grep success"`; from 1.6 on HTTP, for Ray 2.53 and newer.
    for target in ("cpu", "cuda"):
        installed = " ".join(rest for keyword, rest in stages()[target] if keyword == "RUN")
        assert re.search(r"apt-get install [^&]*\bwget\b", installed)


@EVERY
def test_one_application_is_deployed_and_its_config_is_what_kuberay_sends(values: Values) -> None:
    text = service_of(values)["spec"]["serveConfigV2"]
    config = yaml.safe_load(text)
    # KubeRay sends it as JSON.
    assert json.loads(json.dumps(config)) == config
    assert [application["name"] for application in config["applications"]] == ["monofacet"]
    # It compares the text to see whether to send it again: a second rendering must not differ.
    assert text == service_of(json.loads(json.dumps(values)))["spec"]["serveConfigV2"]


@EVERY
def test_all_of_an_old_cluster_outlive_what_its_gateways_have_in_flight(values: Values) -> None:
    made = pods(service_of(values))
    hooks = {
        name: pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        for name, pod in made.items()
    }
    (longest,) = map(int, re.findall(r"seq (\d+)", hooks.pop("gateway")[-1]))
    for name, command in hooks.items():
        assert command == ["sleep", str(longest)], name
    for pod in made.values():
        assert pod["spec"]["terminationGracePeriodSeconds"] > longest
    # Not a field of 1.4's, whose API server would refuse it.
    assert "rayClusterDeletionDelaySeconds" not in service_of(values)["spec"]


@EVERY
def test_a_drained_node_may_take_pods_of_a_cluster(values: Values) -> None:
    # RayCluster has no scale subresource: of its pods Kubernetes computes only budgets that count those that stay, and
    # under any other it evicts none, for ever.
    fewest = {
        group["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: group["minReplicas"]
        for group in cluster_of(values)["workerGroupSpecs"]
    }
    away = values.get("podDisruptionBudget", {}).get("maxUnavailable", 1)
    for budget in of_kind(values, "PodDisruptionBudget"):
        component = budget["metadata"]["labels"]["app.kubernetes.io/component"]
        assert "maxUnavailable" not in budget["spec"]
        assert budget["spec"]["minAvailable"] == max(0, fewest[component] - away)


def test_the_versions_are_those_that_the_page_names() -> None:
    page = (CHART.parents[1] / "docs" / "kubernetes.md").read_text()
    assert f"KubeRay {KUBERAY[0]} to {KUBERAY[-1]}" in page
