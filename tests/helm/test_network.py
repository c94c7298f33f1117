"""Who reaches what: the rendered network policies, evaluated as Kubernetes documents them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import helm_python
import pytest

from tests.helm.chart import NAMESPACE, PLAIN, Manifest, Values, of_kind, pods, rendered

VALUES: Values = {**PLAIN, "generator": {"enabled": True}}
# A port of Ray's that nobody named: workers listen on many.
RAY_WORKER = 10_002
GRPC, HTTP, HEALTH, METRICS, GCS, DASHBOARD, CLIENT = 9000, 8080, 9001, 9100, 6379, 8265, 10_001
COMPONENTS = ("head", "gateway", "encoder", "generator")


@dataclass(frozen=True)
class Peer:
    """A pod by its labels and those of its namespace; without, an address outside of the cluster."""

    labels: dict[str, str] | None
    namespace: str = NAMESPACE


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "the evaluation knows no expressions"
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())


def is_peer(rule: dict[str, Any], peer: Peer) -> bool:
    """Return whether one element of `from` or `to` means the peer."""
    if "ipBlock" in rule:
        raise NotImplementedError(rule)
    if peer.labels is None:
        return False
    if "namespaceSelector" in rule:
        if not matches(rule["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace}):
            return False
    elif peer.namespace != NAMESPACE:
        return False
    return matches(rule.get("podSelector", {}), peer.labels)


def named_ports(pod: Manifest) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for c in pod["spec"]["containers"] for p in c.get("ports", [])}


def allowed(
    direction: str,
    pod: Manifest,
    peer: Peer,
    port: int,
    target: Manifest | None = None,
    values: Values = VALUES,
) -> bool:
    """Return whether the policies let `peer` in to `pod` (Ingress), or `pod` out to `peer` (Egress)."""
    key, side = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    chosen = [
        policy["spec"]
        for policy in of_kind(values, "NetworkPolicy")
        if direction in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod["metadata"]["labels"])
    ]
    # A pod that no policy selects is open: there must be one.
    assert chosen
    names = named_ports(pod if target is None else target)
    for spec in chosen:
        for rule in spec.get(key, []):
            ports = [names.get(p["port"], p["port"]) for p in rule["ports"]] if "ports" in rule else [port]
            peers = rule.get(side)
            if port in ports and (peers is None or any(is_peer(element, peer) for element in peers)):
                return True
    return False


@pytest.fixture(scope="module")
def made() -> dict[str, Manifest]:
    (service,) = of_kind(VALUES, "RayService")
    return pods(service)


STRANGER = Peer({"app": "stranger"}, "elsewhere")
NEIGHBOUR = Peer({"app": "application"})
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, "monitoring")
# As both its chart and its kustomization label it.
OPERATOR = Peer({"app.kubernetes.io/component": "kuberay-operator"}, "kuberay-system")
DNS = Peer({"k8s-app": "kube-dns"}, "kube-system")
OUTSIDE = Peer(None)
PORTS = (GRPC, HTTP, HEALTH, METRICS, GCS, DASHBOARD, CLIENT, RAY_WORKER)


@pytest.mark.parametrize(
    ("peer", "reached"),
    [
        (STRANGER, set()),
        (OUTSIDE, set()),
        (NEIGHBOUR, {("gateway", GRPC), ("gateway", HTTP)}),
        (PROMETHEUS, {("gateway", METRICS)}),
        (OPERATOR, {("head", DASHBOARD)}),
    ],
    ids=["a stranger", "outside", "a neighbour", "prometheus", "the operator"],
)
def test_from_outside_of_the_release_only_what_is_meant_is_reached(
    made: dict[str, Manifest], peer: Peer, reached: set[tuple[str, int]]
) -> None:
    found = {(c, port) for c in COMPONENTS for port in PORTS if allowed("Ingress", made[c], peer, port)}
    assert found == reached


@pytest.mark.parametrize("peer", [PROMETHEUS, OPERATOR, DNS], ids=["prometheus", "the operator", "dns"])
def test_neither_the_label_nor_the_namespace_of_a_peer_is_enough(
    made: dict[str, Manifest], peer: Peer
) -> None:
    assert peer.labels is not None
    # What anyone who may make a pod in a namespace of his own, or beside the peer, can make.
    for other in (Peer(peer.labels, "elsewhere"), Peer({"app": "other"}, peer.namespace)):
        reached = [
            (c, port) for c in COMPONENTS for port in PORTS if allowed("Ingress", made[c], other, port)
        ]
        assert reached == []
        assert not any(allowed("Egress", made[c], other, port) for c in COMPONENTS for port in (53, *PORTS))


def selectors(rule: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether an element of `from` or `to` names a namespace, and labels."""
    names = "kubernetes.io/metadata.name" in rule.get("namespaceSelector", {}).get("matchLabels", {})
    return names, bool(rule.get("podSelector", {}).get("matchLabels"))


def test_every_peer_of_another_namespace_is_named_by_namespace_and_labels() -> None:
    peers = [
        element
        for policy in of_kind(VALUES, "NetworkPolicy")
        for side, key in (("ingress", "from"), ("egress", "to"))
        for rule in policy["spec"].get(side, [])
        for element in rule.get(key, [])
        if "namespaceSelector" in element
    ]
    assert [selectors(peer) for peer in peers] == [(True, True)] * 3


def test_the_head_reaches_its_redis_and_nobody_else_does(made: dict[str, Manifest]) -> None:
    values = {**VALUES, "ray": {"redis": {"address": "redis.elsewhere.svc:6380"}}}
    reached = [c for c in COMPONENTS if allowed("Egress", made[c], OUTSIDE, 6380, values=values)]
    assert reached == ["head"]
    assert not allowed("Egress", made["head"], OUTSIDE, 6380)


def test_peers_are_what_the_values_say() -> None:
    api = {"ipBlock": {"cidr": "10.0.0.1/32"}}
    values = {**VALUES, "networkPolicy": {"apiServer": [api], "dns": []}}
    policies = {p["metadata"]["name"]: p["spec"] for p in of_kind(values, "NetworkPolicy")}
    (egress,) = policies["demo-monofacet-head"]["egress"]
    assert egress["to"] == [api]
    assert len(policies["demo-monofacet-inside"]["egress"]) == 1
    with pytest.raises(helm_python.HelmError, match="operator"):
        rendered({**VALUES, "networkPolicy": {"operator": [{"namespace": "kuberay"}]}})


@pytest.mark.parametrize("source", COMPONENTS)
@pytest.mark.parametrize("target", COMPONENTS)
def test_inside_every_port_is_open_both_ways(made: dict[str, Manifest], source: str, target: str) -> None:
    for port in (GCS, DASHBOARD, RAY_WORKER):
        assert allowed("Ingress", made[target], Peer(made[source]["metadata"]["labels"]), port)
        assert allowed("Egress", made[source], Peer(made[target]["metadata"]["labels"]), port, made[target])


@pytest.mark.parametrize("component", COMPONENTS)
def test_out_go_names_and_the_autoscaler_s_calls_to_kubernetes_alone(
    made: dict[str, Manifest], component: str
) -> None:
    assert allowed("Egress", made[component], DNS, 53)
    assert not allowed("Egress", made[component], OUTSIDE, 80)
    assert not allowed("Egress", made[component], STRANGER, GRPC)
    assert allowed("Egress", made[component], OUTSIDE, 443) is (component == "head")
