"""What can be told of the image without building it: rights, targets, and what goes in."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from monofacet.testing import run_server

from deployments.operations.settings import Settings, is_loopback
from tests.helm.chart import PLAIN, Manifest, of_kind, pods

ROOT = Path(__file__).parents[2]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage by its name, those of the stage it is made from before its own."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "FROM":
            origin, _, name = rest.partition(" AS ")
            current = found[name] = list(found.get(origin, []))
        current.append((keyword, rest.strip()))
    return found


def copied() -> set[str]:
    """Return every path of the repository that some stage copies."""
    return {
        source
        for instructions in stages().values()
        for keyword, rest in instructions
        if keyword == "COPY"
        for source in shlex.split(rest)[:-1]
    }


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_both_targets_run_as_the_user_of_the_chart(target: str) -> None:
    users = [rest for keyword, rest in stages()[target] if keyword == "USER"]
    (service,) = of_kind(PLAIN, "RayService")
    made: dict[str, Manifest] = pods(service)
    context = made["gateway"]["spec"]["securityContext"]
    assert users == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    # Nothing is made as root after that.
    assert [keyword for keyword, _ in stages()[target]].index("USER") > max(
        i for i, (keyword, _) in enumerate(stages()[target]) if keyword in ("RUN", "COPY")
    )


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_everything_that_is_installed_is_pinned(target: str) -> None:
    installs = [
        command
        for keyword, rest in stages()[target]
        if keyword == "RUN"
        for command in rest.replace(";", "&&").split("&&")
        if "pip install" in command
    ]
    assert installs
    assert all("--constraint constraints.txt" in c or "--no-deps" in c for c in installs), installs


def test_only_what_is_copied_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert allowed == {source.split("/")[0] for source in copied()}
    assert [source for source in copied() if not (ROOT / source).exists()] == []


def test_what_is_copied_is_in_the_repository() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", *copied()], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for source in copied():
        assert any(path == source or path.startswith(f"{source}/") for path in tracked), source


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_health_check_reaches_the_server_whatever_proxy_the_host_has(target: str) -> None:
    (check,) = [rest for keyword, rest in stages()[target] if keyword == "HEALTHCHECK"]
    options, _, words = check.partition(" CMD ")
    assert json.loads(words) == ["monofacet", "health"]
    limits = {name: float(seconds) for name, seconds in re.findall(r"--([a-z-]+)=(\d+)s", options)}
    assert limits["timeout"] <= limits["interval"] < limits["start-period"]
    code = "from monofacet.cli import main; main()"
    # Docker hands a host's proxy to every container.
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY"), "http://127.0.0.1:1")
    with run_server() as address:
        done = subprocess.run(
            [sys.executable, "-c", code, *json.loads(words)[1:]],
            env={**os.environ, **proxy, "MONOFACET_TARGET": address.replace("localhost", "127.0.0.1")},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
    assert (done.returncode, "SERVING" in done.stdout) == (0, True), done.stderr


def test_the_documented_run_opens_the_ports_that_it_publishes() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"^docker run (.*?)^```", page, re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    given = dict(b.split("=", 1) for a, b in pairwise(words) if a == "--env")
    # The client's own variable, for the health check; all others are the server's.
    assert given.pop("MONOFACET_TARGET") == f"127.0.0.1:{given['MONOFACET_HEALTH_PORT']}"
    settings = Settings(**{name.removeprefix("MONOFACET_").lower(): value for name, value in given.items()})
    assert {name.removeprefix("MONOFACET_").lower() for name in given} <= set(Settings.model_fields)
    assert not is_loopback(settings.host) and not is_loopback(settings.metrics_host)
    published = {int(b.rpartition(":")[2]) for a, b in pairwise(words) if a == "--publish"}
    assert published == {settings.port, settings.metrics_port}
