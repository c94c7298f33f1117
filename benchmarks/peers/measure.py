"""One contender at a time: start it, check that it serves the very model, load it, stop it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ceilings import image_flops, matmul_flops
from benchmarks.peers.environments import ROOT
from benchmarks.peers.servers import Contender, Running, started
from services.bundle.load import Bundle
from services.encoding.clip import ClipConfig, build_clip
from services.encoding.images import ImagePreprocess, load_pixels

# Two decoders of JPEG and two orders of adding up differ by less; bf16 by 6e-5 at most.
LEAST_COSINE = 0.999


@dataclass(frozen=True)
class Scenario:
    """A load: `callers` in a closed loop, each with `items` images a call."""

    name: str
    callers: int
    items: int


SCENARIOS = (Scenario("1x1", 1, 1), Scenario("32x1", 32, 1), Scenario("4x32", 4, 32))


def reference(bundle: Bundle, files: list[bytes]) -> np.ndarray[Any, Any]:
    """Return unit embeddings by open_clip itself, float32, shape (files, d)."""
    model: Any = build_clip(bundle.clip_config, bundle.clip_weights)
    pixels = torch.from_numpy(load_pixels(files, ImagePreprocess(bundle.clip_config)))
    with torch.inference_mode():
        embeddings: np.ndarray[Any, Any] = model.encode_image(pixels, normalize=True).numpy()
    return embeddings


def drive(
    contender: Contender, running: Running, scenario: Scenario, seconds: float, answers: bool = False
) -> dict[str, Any]:
    """Run the load generator in a process of its own; add the server's CPU seconds an image."""
    order = {
        "kind": contender.kind,
        "target": running.target,
        "callers": scenario.callers,
        "items": scenario.items,
        "seconds": seconds,
        "answers": answers,
    }
    before = running.cpu_s()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.traffic"],
        cwd=ROOT,
        check=True,
        input=json.dumps(order) + "\n",
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    result["server_cpu_s"] = running.cpu_s() - before
    return result


def cosine(first: list[list[float]], expected: np.ndarray[Any, Any]) -> float:
    """Return the least cosine of answers with what they should be."""
    found = np.array(first, np.float64)[: len(expected)]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return float(np.einsum("nd,nd->n", found, expected[: len(found)]).min())


def visit(
    contender: Contender,
    bundle: Bundle,
    expected: np.ndarray[Any, Any],
    scenarios: tuple[Scenario, ...],
    seconds: float,
    log: Path,
) -> dict[str, Any]:
    """Start a contender and measure it.

    Returns
    -------
    By scenario: rate (images/s), latencies (s), CPU seconds an image; `start_s`; the least `cosine` with open_clip.

    Raises
    ------
    RuntimeError
        Where it cannot be started or serves something else.
    """
    began = time.perf_counter()
    with started(contender, bundle, log) as running:
        result: dict[str, Any] = {"start_s": time.perf_counter() - began}
        try:
            check = drive(contender, running, Scenario("check", 1, len(expected)), 0.1, answers=True)
            result["cosine"] = cosine(check["first"], expected)
            if result["cosine"] < LEAST_COSINE:
                raise RuntimeError(f"{contender.name} serves another model: cosine {result['cosine']:.4f}")
            for scenario in scenarios:
                one = drive(contender, running, scenario, seconds)
                result[scenario.name] = {
                    "images_per_s": one["rate"],
                    "latencies": one["latencies"],
                    "cpu_ms_per_image": 1e3 * one["server_cpu_s"] / one["images"],
                }
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{contender.name}: {error.stderr[-1500:]}") from error
    return result


def ceiling(config: ClipConfig) -> dict[str, float]:
    """Return the machine's speed at float32 matrix products, and the images per second that it would allow.

    No float32 server of this tower can be faster, whatever its code.
    """
    flops, per_image = matmul_flops(), image_flops(config)
    return {"gflops": flops / 1e9, "gflop_per_image": per_image / 1e9, "images_per_s": flops / per_image}


def describe(contender: Contender, port: int = 0) -> dict[str, Any]:
    """Return a contender for the report, with its command line."""
    shown = {key: value for key, value in asdict(contender).items() if key != "command"}
    if contender.command is None:
        return {**shown, "command": ["monofacet", "serve", "--bundle", "vit-b-32"]}
    home = str(ROOT)
    return {**shown, "command": [part.replace(home + "/", "") for part in contender.command(port)]}
