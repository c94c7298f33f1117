"""What calls that add outputs to the encoder's one forward cost beside Encode: a table, out/bench/extra_outputs.json.

`python -m benchmarks.extra_outputs [--seconds 6] [--rounds 3] [--callers 32]`

The same pictures, one a call, in a closed loop; rounds of the calls are interleaved and medians reported, because a
machine's speed drifts. Cost is Encode's rate over the call's rate. A call that the bundle is not calibrated for is
left out.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer
from grpc import aio
from monofacet.v1 import bias_service_pb2 as bias
from monofacet.v1 import (
    bias_service_pb2_grpc,
    defense_service_pb2_grpc,
    feature_service_pb2_grpc,
    modality_service_pb2_grpc,
)
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import defense_service_pb2 as defense
from monofacet.v1 import feature_service_pb2 as feature
from monofacet.v1 import modality_service_pb2 as modality
from rich.console import Console
from rich.table import Table

from benchmarks.pictures import read_pictures, write_pictures
from benchmarks.samples import jpegs
from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bundle.load import Bundle
from services.encoding.machine import usable_cores
from tests.support.service import start_service

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"
TARGET = 1.15
ENCODE = "Encode"
ONE_FORWARD = (
    "Encode, with features",
    "ClassifyModality",
    "ClassifyGender",
    "ClassifyGender, top 32 zeroed",
    "FilterAdversarial",
)

Call = Callable[[bytes], Awaitable[Any]]


def calls(channel: aio.Channel) -> dict[str, Call]:
    """Return each call as a function of one picture."""
    encode = feature_service_pb2_grpc.FeatureServiceStub(channel).Encode
    classify = modality_service_pb2_grpc.ModalityServiceStub(channel).ClassifyModality
    gender = bias_service_pb2_grpc.BiasServiceStub(channel).ClassifyGender
    judge = defense_service_pb2_grpc.DefenseServiceStub(channel).FilterAdversarial
    ablation = bias.Ablation(top_gender_features=32, mode=bias.ABLATION_MODE_ZERO)
    sparse = feature.EncodeOptions(dictionary="")
    twice = defense.FilterOptions(second_look=True)

    def one(data: bytes) -> common.Input:
        return common.Input(image=common.Image(data=data))

    def filtering(options: defense.FilterOptions | None) -> Call:
        return lambda data: judge(
            defense.FilterAdversarialRequest(images=[common.Image(data=data)], options=options)
        )

    return {
        ENCODE: lambda data: encode(feature.EncodeRequest(inputs=[one(data)])),
        ONE_FORWARD[0]: lambda data: encode(feature.EncodeRequest(inputs=[one(data)], options=sparse)),
        ONE_FORWARD[1]: lambda data: classify(modality.ClassifyModalityRequest(inputs=[one(data)])),
        ONE_FORWARD[2]: lambda data: gender(bias.ClassifyGenderRequest(inputs=[one(data)])),
        ONE_FORWARD[3]: lambda data: gender(
            bias.ClassifyGenderRequest(inputs=[one(data)], ablation=ablation)
        ),
        ONE_FORWARD[4]: filtering(None),
        "FilterAdversarial, second look": filtering(twice),
    }


async def rate(call: Call, files: list[bytes], callers: int, seconds: float) -> float:
    """Return calls a second of `callers` closed loops."""
    finished: list[float] = []

    async def loop(number: int, until: float) -> None:
        turn = number
        while time.perf_counter() < until:
            await call(files[turn % len(files)])
            turn += callers
            finished.append(time.perf_counter())

    # One round that is not measured, until batches have found their size.
    await asyncio.gather(*(loop(n, time.perf_counter() + min(1.0, seconds / 4)) for n in range(callers)))
    finished.clear()
    began = time.perf_counter()
    await asyncio.gather(*(loop(n, began + seconds) for n in range(callers)))
    return len(finished) / (max(finished) - began)


async def measure(target: str, callers: int, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Return the rates of every call in every round."""
    files = read_pictures()
    async with aio.insecure_channel(target) as channel:
        kinds = calls(channel)
        for name in list(kinds):
            try:
                await kinds[name](files[0])
            except aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
                    raise
                del kinds[name]
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, call in kinds.items():
                rates[name].append(await rate(call, files, callers, seconds))
    return rates


def main(
    seconds: Annotated[float, typer.Option(help="Seconds of one call in one round.")] = 6.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    callers: Annotated[int, typer.Option(min=1)] = 32,
    bundle: Annotated[Path, typer.Option()] = EMBEDDED_BUNDLE,
) -> None:
    """Measure, print a table and write the JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    write_pictures(jpegs(64))
    service = start_service(bundle, OUT / "extra_outputs.log")
    try:
        rates = asyncio.run(measure(service.target, callers, seconds, rounds))
    finally:
        service.stop()
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    # The ratio within a round is steadier than that of medians: both sides met the same neighbours.
    costs = {
        name: float(np.median(np.array(rates[ENCODE]) / np.array(values))) for name, values in rates.items()
    }
    table = Table("call", "calls/s", "cost beside Encode", "target", title=f"{callers} callers, 224 px JPEG")
    for name, value in medians.items():
        target = f"<= {TARGET}" if name in ONE_FORWARD else ""
        table.add_row(name, f"{value:.0f}", f"{costs[name]:.2f}", target)
    Console().print(table)
    document = {
        "machine": platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "load": os.getloadavg()[0],
        "bundle": Bundle.load(bundle, verify=False).id,
        "callers": callers,
        "rounds": rounds,
        "calls_per_s": rates,
        "cost": costs,
        "target": TARGET,
        "met": all(costs[name] <= TARGET for name in ONE_FORWARD if name in costs),
    }
    (OUT / "extra_outputs.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
