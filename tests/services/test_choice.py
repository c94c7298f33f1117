"""How the towers run is measured, kept where it is set, and never changed for a hair."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from services.bundle.towers import choose_towers, load_towers
from services.encoding import machine
from services.encoding.choice import MARGIN, Candidate, candidates, choose
from services.encoding.machine import (
    cores_of,
    cpu_quota,
    thread_counts,
    usable_cores,
    usable_cpus,
)
from services.imaging import generator
from services.imaging.generator import Imaging

OPENVINO, TORCH = Candidate("openvino", 2), Candidate("torch", 2)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_is_read_from_either_version_of_cgroups(
    tmp_path: Path, files: dict[str, str], quota: int | None
) -> None:
    write(tmp_path, files)
    assert cpu_quota(tmp_path, tmp_path / "none") == quota
    assert usable_cores(tmp_path, tmp_path / "none") == min(len(usable_cpus()), quota or len(usable_cpus()))


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        # Version 2: the tightest of all groups above counts.
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        ("0::/a/b\n", {"cpu.max": "100000 100000", "a/b/cpu.max": "200000 100000"}, 1),
        # A container that sees its own group as the root, though the path says otherwise.
        ("0::/docker/7f\n", {"cpu.max": "200000 100000"}, 2),
        # Version 1, and the groups of other controllers beside it.
        (
            "5:memory:/c\n4:cpu,cpuacct:/a/b\n",
            {"cpu/a/b/cpu.cfs_quota_us": "250000", "cpu/a/b/cpu.cfs_period_us": "100000", "c/cpu.max": "1 1"},
            3,
        ),
        ("nonsense\n", {}, None),
    ],
)
def test_the_limits_of_all_groups_that_a_process_is_in_hold(
    tmp_path: Path, own: str, files: dict[str, str], quota: int | None
) -> None:
    write(tmp_path / "root", files)
    (tmp_path / "own").write_text(own)
    assert cpu_quota(tmp_path / "root", tmp_path / "own") == quota


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("field", ["threads", "decode_threads"])
def test_the_threads_of_the_settings_heed_a_containers_share(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(f"MONOFACET_{field.upper()}", raising=False)
    monkeypatch.setattr(machine, "usable_cpus", lambda: set(range(64)))
    monkeypatch.setattr(machine, "cpu_quota", lambda *_: 2)
    assert getattr(Settings(), field) == 2


def test_the_generator_heeds_a_containers_share(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cpus", lambda: set(range(64)))
    monkeypatch.setattr(machine, "cpu_quota", lambda *_: 2)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(generator, "load_parts", stop)
    monkeypatch.setattr(generator, "pipeline_folder", lambda *_: None)
    drawing = SimpleNamespace(path=tiny.path, manifest=SimpleNamespace(diffusion=object()))
    with pytest.raises(Stopped):
        Imaging.load(cast(Bundle, drawing), "cpu")
    assert set_to == [2]


class Stopped(Exception):
    """Nothing more is needed."""


def stop(*_: object) -> None:
    raise Stopped


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu in range(4):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert cores_of({0, 1, 2, 3}, tmp_path) == 2
    # Where nothing is known of a CPU it stands for itself.
    assert cores_of({0, 7}, tmp_path) == 2


@pytest.mark.parametrize(
    ("cpus", "cores", "quota", "counts"),
    [(2, 2, None, [2]), (8, 4, None, [4, 8]), (8, 4, 2, [2]), (8, 4, 6, [4, 6]), (1, 1, 4, [1])],
)
def test_threads_are_tried_by_core_and_by_cpu_within_the_quota(
    cpus: int, cores: int, quota: int | None, counts: list[int]
) -> None:
    assert thread_counts(cpus, cores, quota) == counts


def test_what_is_set_is_not_tried() -> None:
    assert candidates("torch", 3, "cpu", "openvino") == [Candidate("torch", 3)]
    assert candidates("auto", 2, "cpu", "openvino") == [OPENVINO, TORCH]
    assert candidates("auto", 2, "cpu", "torch") == [TORCH]
    assert candidates("auto", 2, "cuda:0", "torch") == [TORCH]


@pytest.mark.parametrize(
    ("ratio", "chosen"), [(MARGIN - 0.01, OPENVINO), (MARGIN + 0.01, TORCH), (0.2, OPENVINO)]
)
def test_another_is_taken_only_when_it_is_faster_by_the_margin(ratio: float, chosen: Candidate) -> None:
    choice = choose([OPENVINO, TORCH], {OPENVINO: 10.0, TORCH: 10.0 * ratio}.__getitem__)
    assert choice.candidate == chosen
    assert str(chosen) in choice.why
    assert set(choice.images_per_s) == {OPENVINO, TORCH}


def test_nothing_is_measured_where_nothing_is_open_and_nothing_begun_after_the_budget() -> None:
    assert choose([TORCH], lambda _: pytest.fail("measured")).candidate == TORCH
    seconds = iter([0.0, 5.0, 5.0])
    choice = choose([OPENVINO, TORCH], lambda _: 1.0, budget_s=1.0, clock=lambda: next(seconds))
    assert choice.candidate == OPENVINO
    assert list(choice.images_per_s) == [OPENVINO]
    assert f"not tried for want of time: {TORCH}" in choice.why


def test_the_chosen_towers_are_the_bundles(tiny: Bundle) -> None:
    towers, choice = choose_towers(tiny, device="cpu")
    assert towers.backend == choice.candidate.backend
    assert {candidate.backend for candidate in choice.images_per_s} == {"openvino", "torch"}
    assert choice.candidate.threads <= len(usable_cpus())
    pixels = np.random.default_rng(0).standard_normal((3, 3, *towers.image_size)).astype(np.float32)
    expected = load_towers(tiny, towers.backend, device="cpu", threads=choice.candidate.threads)
    # The same backend with as many threads: the same sums in the same order.
    assert np.array_equal(towers.encode_images(pixels).unit, expected.encode_images(pixels).unit)
    towers.close()
    expected.close()
