"""Hostile requests to a gateway with real towers: `python -m benchmarks.fuzz [--cases 10000] [--seed 0]`.

Prints a table of statuses by service and writes out/bench/fuzz.json. A case that is answered with a status that no
request may get, or with a number that is none, is written to tests/fuzz/corpus/, where the tests send it for ever
after. Exit code 1 when there was one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.table import Table

from deployments.gateway.services import DESCRIPTORS
from services.bundle.load import Bundle
from tests.fuzz.gateway import Findings, calibrated, fuzz, fuzzed_gateway
from tests.fuzz.messages import Maker
from tests.support.tiny_bundle import make_tiny_bundle

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "bench"
CORPUS = ROOT / "tests" / "fuzz" / "corpus"


def keep(findings: Findings) -> None:
    """Write the cases at fault into the corpus."""
    CORPUS.mkdir(parents=True, exist_ok=True)
    for case, _ in findings.amiss:
        data = case.to_bytes()
        name = f"{case.method.rpartition('/')[2]}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
        (CORPUS / name).write_bytes(data)


async def run(cases: int, seed: int, only: str, path: Path | None) -> dict[str, Any]:
    """Fuzz every service in turn; return what each answered."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        bundle = Bundle.load(path) if path else calibrated(make_tiny_bundle(folder / "tiny"), folder)
        for service in DESCRIPTORS:
            if only and service.name != only:
                continue
            began = time.perf_counter()
            async with fuzzed_gateway(bundle) as channel:
                findings = await fuzz(channel, Maker(service, seed).case, cases)
            keep(findings)
            report[service.name] = {
                "cases": findings.statuses.total(),
                "statuses": dict(findings.statuses.most_common()),
                "amiss": [f"{case.method}: {wrong}" for case, wrong in findings.amiss],
                "seconds": round(time.perf_counter() - began, 1),
            }
    return report


def main(
    cases: Annotated[int, typer.Option(help="Cases a service.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    only: Annotated[str, typer.Option(help="One service, such as FeatureService.")] = "",
    bundle: Annotated[Path | None, typer.Option(help="Default: a tiny one of random weights.")] = None,
) -> None:
    """Fuzz every service."""
    # A line a call would be most of the work.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    logging.getLogger("monofacet").setLevel(logging.CRITICAL)
    report = asyncio.run(run(cases, seed, only, bundle))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "fuzz.json").write_text(json.dumps({"seed": seed, "services": report}, indent=1) + "\n")
    table = Table("service", "cases", "statuses", "amiss", "s")
    for name, row in report.items():
        statuses = ", ".join(f"{code} {count}" for code, count in row["statuses"].items())
        table.add_row(name, str(row["cases"]), statuses, str(len(row["amiss"])), f"{row['seconds']:.0f}")
    Console(width=140).print(table)
    wrong = [line for row in report.values() for line in row["amiss"]]
    for line in sorted(set(wrong))[:20]:
        print(line)
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
