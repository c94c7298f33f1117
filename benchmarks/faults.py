"""What callers see, and what is told, when parts of a running server fail: `python -m benchmarks.faults`.

One fault after another is put into a real server while an ordinary caller asks for an embedding (or an image) again and
again, health is watched, and the metrics are scraped every second. The alerts are those of the rule file, evaluated on
the samples by `promtool` where it is installed. Prints one table and writes out/bench/faults.json. A fault that cannot
be made here says why. Every case is bounded in time; nothing leaves loopback, and only processes of its own are harmed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import feature_service_pb2_grpc, imaging_service_pb2_grpc
from monofacet.v1 import imaging_service_pb2 as imaging_pb
from rich.console import Console
from rich.table import Table

from deployments.gateway.services import IMAGING
from deployments.operations.chart import RULES
from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import CLIP_WEIGHTS
from services.encoding.machine import usable_cores
from tests.support.ports import free_port
from tests.support.service import Service, descendants, start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
# Seconds that one fault may last, and that a call may take.
BOUND_S = 150.0
CALL_S = 30.0
# Seconds for which all must be well before a fault counts as over.
_WELL_S = 3.0
_STATES = health_pb2.HealthCheckResponse.ServingStatus


@dataclass
class Seen:
    """What was seen from the beginning of a fault on; times in seconds since it, in order.

    Attributes
    ----------
    calls
        When each call began and ended, and its status and reason.
    health
        When it changed, and to what.
    pages
        When each page of metrics was read, and the page.
    """

    calls: list[tuple[float, float, str]] = field(default_factory=list)
    health: list[tuple[float, str]] = field(default_factory=list)
    pages: list[tuple[float, str]] = field(default_factory=list)


class Observer:
    """Calls, asks for health and scrapes, each in a thread of its own, until it is stopped.

    Parameters
    ----------
    service
        Whom to ask.
    draws
        Ask for images instead of embeddings.
    """

    def __init__(self, service: Service, draws: bool) -> None:
        self._service = service
        self._draws = draws
        self._end = threading.Event()
        self.began = time.monotonic()
        self.seen = Seen()
        self._threads = [
            threading.Thread(target=self._again, args=(what, pause), daemon=True)
            for what, pause in ((self._call, 0.1), (self._ask, 0.25), (self._scrape, 1.0))
        ]

    def __enter__(self) -> Observer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(CALL_S + 10)

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def restart(self) -> None:
        """Begin now: what was seen before is forgotten."""
        self.began, self.seen = time.monotonic(), Seen(health=[(0.0, self.state)])

    @property
    def state(self) -> str:
        """What health said last."""
        return self.seen.health[-1][1] if self.seen.health else "?"

    @property
    def well(self) -> bool:
        """Whether calls that began in the last seconds were answered, and health says SERVING."""
        late = [call for call in self.seen.calls if call[1] > self.now - _WELL_S]
        return (
            self.state == "SERVING"
            and bool(late)
            and all(call[2] == "OK" for call in late)
            and self.seen.health[-1][0] < self.now - _WELL_S
        )

    def wait_well(self, seconds: float, least: float = 0.0) -> bool:
        """Wait until all is well, at least `least` and at most `seconds` seconds after the beginning."""
        while self.now < seconds:
            if self.now > least and self.well:
                return True
            time.sleep(0.2)
        return False

    def _again(self, what: Callable[[], None], pause: float) -> None:
        while not self._end.is_set():
            what()
            self._end.wait(pause)

    def _call(self) -> None:
        began, status = self.now, "OK"
        with grpc.insecure_channel(self._service.target) as channel:
            try:
                if self._draws:
                    request = imaging_pb.GenerateRequest(prompt="a red heart", num_inference_steps=2)
                    list(
                        imaging_service_pb2_grpc.ImagingServiceStub(channel).Generate(request, timeout=CALL_S)
                    )
                else:
                    text = pb.EncodeRequest(inputs=[common.Input(text="a red heart")])
                    feature_service_pb2_grpc.FeatureServiceStub(channel).Encode(text, timeout=CALL_S)
            except grpc.RpcError as error:
                status = error.code().name
        if self.now >= began:
            self.seen.calls.append((began, self.now, status))

    def _ask(self) -> None:
        state = "UNREACHABLE"
        with grpc.insecure_channel(self._service.target) as channel, suppress(grpc.RpcError):
            request = health_pb2.HealthCheckRequest(service=IMAGING if self._draws else "")
            state = _STATES.Name(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)
        if state != self.state:
            self.seen.health.append((self.now, state))

    def _scrape(self) -> None:
        with suppress(OSError, ValueError):
            page = urllib.request.urlopen(self._service.metrics_url, timeout=5).read().decode()
            self.seen.pages.append((self.now, page))


def process_of(service: Service, what: str) -> int:
    """Return the id of the process of the server whose command line contains `what`."""
    for pid in sorted(descendants(service.process.pid)):
        with suppress(OSError):
            if what in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(
                errors="replace"
            ):
                return pid
    raise LookupError(f"the server has no process {what!r}")


def replica(service: Service, deployment: str) -> int:
    """Return the process of a replica."""
    return process_of(service, f"ray::ServeReplica:monofacet:{deployment}")


def fired(seen: Seen, folder: Path) -> dict[str, float] | str:
    """Return the seconds after which each alert fired first, as promtool evaluates the rules on what was scraped."""
    promtool = shutil.which("promtool")
    if promtool is None:
        return "promtool is not installed: apt-get install prometheus"
    last = int(max((at for at, _ in seen.pages), default=0.0)) + 1
    series: dict[str, dict[int, str]] = {}
    for at, page in seen.pages:
        for line in page.splitlines():
            match = re.fullmatch(r"(monofacet_\w+)(?:\{(.*)\})? (\S+)", line)
            if match and not match[1].endswith(("_bucket", "_created")):
                name = f'{match[1]}{{job="monofacet",instance="a"{"," + match[2] if match[2] else ""}}}'
                series.setdefault(name, {})[int(at)] = match[3]
    rules = yaml.safe_load(RULES.read_text())
    # A minute of what was before, so that what grows has something to grow from.
    lead = 60
    inputs = [
        {"series": name, "values": _values(samples, lead, last)} for name, samples in sorted(series.items())
    ]
    for group in rules["groups"]:
        group["interval"] = "1s"
    rule_file, test_file = folder / "rules.yaml", folder / "test.yaml"
    rule_file.write_text(yaml.safe_dump(rules))
    # Each second must show no alert, so promtool complains of every one and says when.
    firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
    checks = [{"expr": firing, "eval_time": f"{at + lead}s", "exp_samples": []} for at in range(0, last + 1)]
    test = {"interval": "1s", "input_series": inputs, "promql_expr_test": checks}
    document = {"rule_files": [str(rule_file)], "evaluation_interval": "1s", "tests": [test]}
    test_file.write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [promtool, "test", "rules", str(test_file)], capture_output=True, text=True, timeout=60
    )
    found: dict[str, float] = {}
    for block in (done.stdout + done.stderr).split("expr: ")[1:]:
        when = re.search(r"time: (?:(\d+)m)?(?:(\d+)s)?,", block)
        if when is not None:
            at = 60 * int(when[1] or 0) + int(when[2] or 0) - lead
            for name in re.findall(r'alertname="(\w+)"', block):
                found.setdefault(name, float(at))
    return found


def _values(samples: dict[int, str], lead: int, last: int) -> str:
    """Return a series as promtool's tests write one, a value a second; what was not scraped stands as it was."""
    first = samples[min(samples)]
    values, value = [first] * lead, first if 0 in samples or min(samples) < 3 else "_"
    newest = 0
    for second in range(last + 1):
        if second in samples:
            value, newest = samples[second], second
        # As Prometheus does it where a scrape fails for long.
        values.append(value if second - newest < 15 else "_")
    return " ".join(values)


@dataclass(frozen=True)
class Fault:
    """One case.

    Attributes
    ----------
    name
        What fails.
    make
        Makes it, and returns what ends it (the operator's part, at `until_s`), or None where nobody has to.
    draws
        Look at images instead of embeddings.
    until_s
        Seconds that the fault lasts before the operator ends it.
    replicas
        Of the encoder.
    fresh
        The server cannot go on after it, and ends; whoever started it starts it again.
    small
        Sizes (MiB) of file systems that the server is given for its own: by where they lie.
    """

    name: str
    make: Callable[[Service, Path], Callable[[], None] | None]
    draws: bool = False
    until_s: float = 0.0
    replicas: int = 1
    fresh: bool = False
    small: dict[str, int] = field(default_factory=dict)


def _signalled(what: str, number: signal.Signals) -> Callable[[Service, Path], None]:
    def make(service: Service, _: Path) -> None:
        os.kill(process_of(service, what), number)

    return make


def _weights_changed(service: Service, bundle: Path) -> Callable[[], None]:
    weights = bundle / CLIP_WEIGHTS
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    os.kill(replica(service, "encoder"), signal.SIGKILL)
    return lambda: _replace(weights, kept)


def _replace(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _bundle_gone(service: Service, bundle: Path) -> Callable[[], None]:
    away = bundle.with_name("away")
    bundle.rename(away)
    os.kill(replica(service, "encoder"), signal.SIGKILL)
    return lambda: away.rename(bundle) and None


def _filled(where: str) -> Callable[[Service, Path], Callable[[], None]]:
    def make(service: Service, _: Path) -> Callable[[], None]:
        # The server's own view of its file systems.
        path = Path(f"/proc/{service.process.pid}/root{where}/filled")
        with path.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        return path.unlink

    return make


_REPLICA = "ray::ServeReplica:monofacet:"
FAULTS = (
    Fault("SIGSTOP of the only encoder", _signalled(f"{_REPLICA}encoder", signal.SIGSTOP)),
    Fault("SIGKILL of the only encoder", _signalled(f"{_REPLICA}encoder", signal.SIGKILL)),
    Fault("SIGSTOP of the generator", _signalled(f"{_REPLICA}generator", signal.SIGSTOP), draws=True),
    Fault("weights changed on disk, encoder killed", _weights_changed, until_s=30.0),
    Fault("bundle folder gone, encoder killed", _bundle_gone, until_s=30.0),
    Fault("SIGKILL of the gateway", _signalled(f"{_REPLICA}gateway", signal.SIGKILL)),
    Fault("SIGKILL of the raylet", _signalled("/raylet/raylet ", signal.SIGKILL), fresh=True),
    Fault("SIGSTOP of one of two encoders", _signalled(f"{_REPLICA}encoder", signal.SIGSTOP), replicas=2),
    Fault("SIGKILL of one of two encoders", _signalled(f"{_REPLICA}encoder", signal.SIGKILL), replicas=2),
    Fault("disk full", _filled("/tmp"), until_s=20.0, small={"/tmp": 300, "/dev/shm": 400}),
    Fault("/dev/shm full", _filled("/dev/shm"), until_s=20.0, small={"/tmp": 300, "/dev/shm": 400}),
)


def preview_raises() -> dict[str, Any]:
    """Let a preview raise in the embedded bundle's own pipeline, in this process; return what two calls saw."""
    import asyncio

    from deployments.generator.events import Failed, Finished, GenerateTask
    from deployments.generator.generator import Generator, PipelineModel
    from deployments.operations.settings import Settings
    from services.bundle.load import Bundle
    from services.imaging.edits import ImageRequest

    settings = Settings()
    model = PipelineModel(Bundle.load(EMBEDDED_BUNDLE), settings)

    def broken(sample: Any) -> Any:
        raise RuntimeError("no preview")

    async def run() -> tuple[list[str], list[str], float]:
        generator = Generator(settings, model)

        async def kinds(preview_every: int) -> list[str]:
            task = GenerateTask(
                ImageRequest("a red heart", num_inference_steps=4), (1,), False, preview_every
            )
            events = [
                e for message in [m async for m in generator.generate(task, 60.0)] for e in message.events
            ]
            return [type(e).__name__ for e in events if isinstance(e, Failed | Finished)]

        model.preview = broken  # type: ignore[method-assign]
        failed, other = await asyncio.gather(kinds(1), kinds(0))
        began = time.monotonic()
        after = await kinds(0)
        seconds = time.monotonic() - began
        await generator.close()
        return failed, [*other, *after], seconds

    failed, others, seconds = asyncio.run(run())
    assert failed == ["Failed"] and others == ["Finished", "Finished"]
    return {
        "fault": "preview that raises (in process)",
        "calls": "its own call INTERNAL; the one beside it and the next one OK",
        "health": "unchanged",
        "alerts": "none",
        "recovery_s": round(seconds, 1),
    }


@contextmanager
def served(bundle: Path, folder: Path, replicas: int, small: dict[str, int]) -> Iterator[Service]:
    """Start a server on its own copy of the bundle, on small file systems of its own where asked."""
    prefix: list[str] = []
    if small:
        mounts = "; ".join(f"mount -t tmpfs -o size={size}m tmpfs {where}" for where, size in small.items())
        prefix = ["unshare", "-m", "sh", "-ec", f'{mounts}; exec "$@"', "sh"]
    environment = {"MONOFACET_ENCODER_REPLICAS": str(replicas)}
    # Ports of its own, and not just any free ones: a gateway that starts again must be where it was.
    ports = [f"--{name}={free_port()}" for name in ("port", "metrics-port")]
    service = start_service(bundle, folder / "log", ports, environment, prefix=prefix)
    try:
        yield service
    finally:
        below = descendants(service.process.pid)
        service.stop()
        for pid in below & descendants(1):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def suffer(service: Service, fault: Fault, bundle: Path, folder: Path) -> dict[str, Any]:
    """Put a fault into a server that is well; return what was seen."""
    with Observer(service, fault.draws) as observer:
        if not observer.wait_well(BOUND_S):
            raise RuntimeError("the server was not well before the fault")
        observer.restart()
        end = fault.make(service, bundle)
        exited = _exit(service, observer) if fault.fresh else None
        if fault.until_s:
            time.sleep(fault.until_s)
        ended = observer.now
        if end is not None:
            end()
        recovered = not fault.fresh and observer.wait_well(BOUND_S, ended + _WELL_S)
    seen = observer.seen
    if exited:
        seen.health.append(exited)
    bad = [call for call in seen.calls if call[2] != "OK"]
    counts = Counter(call[2] for call in seen.calls)
    longest = max((call[1] - call[0] for call in seen.calls if call[2] == "OK"), default=0.0)
    back = max(
        [call[1] for call in bad] + [at for at, state in seen.health[1:] if state == "SERVING"], default=0.0
    )
    # A call that waited for the successor is no failure, but it tells how long that took.
    waited = max((call[1] for call in seen.calls if call[2] == "OK" and call[1] - call[0] > 2.0), default=0.0)
    return {
        "fault": fault.name,
        "calls": ", ".join(f"{count} {code}" for code, count in counts.most_common()) or "none ended",
        "longest_ok_s": round(longest, 1),
        "health": ", ".join(f"{state} at {at:.0f}" for at, state in seen.health[1:]) or "unchanged",
        "alerts": fired(seen, folder),
        "ended_by_operator_s": round(ended, 1) if fault.until_s else None,
        "recovery_s": round(max(back, waited), 1) if recovered else None,
    }


def _exit(service: Service, observer: Observer) -> tuple[float, str]:
    """Wait for the end of a server; return when it was, and its exit code as a state."""
    code = service.process.wait(BOUND_S)
    return observer.now, f"exit code {code}"


def main(
    only: Annotated[str, typer.Option(help="Only faults whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = OUT,
) -> None:
    """Put one fault after another into a server, and print what was seen."""
    chosen = [fault for fault in FAULTS if only in fault.name]
    results: list[dict[str, Any]] = [preview_raises()] if only in "preview that raises" else []
    groups: list[list[Fault]] = []
    for fault in chosen:
        alike = groups and (groups[-1][-1].replicas, groups[-1][-1].small) == (fault.replicas, fault.small)
        groups[-1].append(fault) if alike and not groups[-1][-1].fresh else groups.append([fault])
    with tempfile.TemporaryDirectory(prefix="mf-faults-", dir="/var/tmp") as name:
        folder = Path(name)
        for group in groups:
            bundle = Path(shutil.copytree(EMBEDDED_BUNDLE, folder / "bundle", dirs_exist_ok=True))
            why = ""
            if group[0].small and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
                why = "cannot be made here: it needs the right to mount a file system"
            if not why:
                try:
                    with served(bundle, folder, group[0].replicas, group[0].small) as service:
                        for fault in group:
                            typer.echo(f"{fault.name} ...", err=True)
                            results.append(suffer(service, fault, bundle, folder))
                            typer.echo(f"  {results[-1]}", err=True)
                except (RuntimeError, LookupError) as error:
                    why = str(error).splitlines()[0]
            done = {result["fault"] for result in results}
            results += [{"fault": fault.name, "calls": why} for fault in group if fault.name not in done]
    table = Table("fault", "calls", "health changed (s)", "alerts (s)", "recovered (s)")
    for result in results:
        alerts = result.get("alerts", "")
        if isinstance(alerts, dict):
            alerts = (
                ", ".join(f"{name.removeprefix('Monofacet')} {at:.0f}" for name, at in alerts.items())
                or "none"
            )
        ended = result.get("ended_by_operator_s")
        health = str(result.get("health", "")) + (f" (ended by the operator at {ended:.0f})" if ended else "")
        table.add_row(result["fault"], result["calls"], health, alerts, str(result.get("recovery_s") or ""))
    Console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    machine = {"cores": usable_cores(), "load": os.getloadavg()[0], "processor": platform.processor()}
    (out / "faults.json").write_text(json.dumps({"machine": machine, "faults": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
