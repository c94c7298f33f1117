"""The server of one machine, as far as it can be had without Ray."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, cast

import pytest

from deployments.cluster import machine
from deployments.cluster.scratch import LOCK, Scratch
from deployments.cluster.supervisor import TRY_AGAIN
from deployments.operations.settings import Settings
from services.bundle.load import Bundle


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Scratch.make(os.environ)
    # What it does to the environment of its own process.
    monkeypatch.setattr(machine, "make_private", lambda environment: [])
    monkeypatch.setattr(machine, "watch_ray", lambda lost: None)
    monkeypatch.setattr(machine, "configure", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield made
    made.remove()


def test_when_ray_does_not_start_there_can_be_another_try_in_the_same_folder(
    tiny: Bundle, scratch: Scratch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_ray(directory: Path, object_store_bytes: int) -> None:
        (directory / "session").mkdir()
        raise TimeoutError("not today\nand more")

    monkeypatch.setattr(machine, "start_ray", no_ray)
    for _ in range(2):
        assert (
            machine.run(Settings(bundle=tiny.path), scratch, cast(Any, None), time.perf_counter())
            == TRY_AGAIN
        )
    told = capsys.readouterr().err.splitlines()
    assert told == ["monofacet: cannot start: Ray: not today"] * 2
    assert (scratch.path / LOCK).exists()


def test_a_long_start_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "_STILL_S", 0.01)
    progress = machine.Progress()
    progress.phase = "the moon rises"
    deadline = time.monotonic() + 60
    told = ""
    while "the moon rises" not in told and time.monotonic() < deadline:
        told += capsys.readouterr().err
        time.sleep(0.01)
    progress.done.set()
    assert "monofacet: starting for 0 s: the moon rises\n" in told
