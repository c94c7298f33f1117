"""The folder of one server: where it is made, and what becomes of it when its owner dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments.cluster import scratch
from deployments.cluster.scratch import LOCK, NoScratch, Scratch, marked, places, sweep
from deployments.operations.logs import SOCKET_VARIABLE

ROOT = Path(__file__).parents[2]
OWNER = """
import os, sys
from deployments.cluster.scratch import Scratch
made = Scratch.make({"TMPDIR": sys.argv[1]})
print(made.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short folder that alone is swept and written to."""
    folder = tmp_path_factory.mktemp("p")
    monkeypatch.setattr(scratch, "_LONGEST", 200)
    monkeypatch.setattr(scratch, "places", lambda environment: [Path(environment["TMPDIR"])])
    return folder


def owner(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that owns a folder; it ends when its standard input does."""
    code = f"import deployments.cluster.scratch as s; s._LONGEST = 200\n{OWNER}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_users_own_temporary_folder_comes_first() -> None:
    assert places({"TMPDIR": "/scratch/", "XDG_RUNTIME_DIR": "/run/user/1"}) == [
        Path("/scratch"),
        Path("/tmp"),
        Path("/run/user/1"),
        Path("/dev/shm"),
        Path("/var/tmp"),
    ]
    assert places({"TMPDIR": ""})[0] == Path("/tmp")


def test_rays_longest_socket_fits_a_unix_path_in_every_place_that_is_taken() -> None:
    longest = "/" + "p" * (scratch._LONGEST - 1)
    assert len(f"{longest}/{scratch.PREFIX}01234567{scratch._RAYS}") == 107


def test_a_place_that_is_too_long_missing_or_full_is_passed_over_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    good = Scratch.make({"TMPDIR": str(long)})
    try:
        assert good.path.parent != long
        assert str(long) in good.passed_over[0] and "too long" in good.passed_over[0]
        assert good.path.stat().st_mode & 0o777 == 0o700
    finally:
        good.remove()
    assert not good.path.exists()
    monkeypatch.setattr(scratch, "places", lambda _: [Path("/proc"), Path("/nowhere")])
    with pytest.raises(
        NoScratch, match=r"^no temporary folder can be used: /proc: .+; /nowhere: No such file"
    ):
        Scratch.make({})
    monkeypatch.setattr(scratch, "places", lambda _: [Path("/tmp")])
    monkeypatch.setattr(scratch, "_ROOM_BYTES", 2**62)
    with pytest.raises(NoScratch, match="MiB free"):
        Scratch.make({})


def test_what_a_killed_owner_left_is_swept_and_what_a_living_one_has_is_not(place: Path) -> None:
    (dead, abandoned), (living, kept) = owner(place), owner(place)
    try:
        dead.kill()
        dead.wait()
        assert sweep({"TMPDIR": str(place)}) == [abandoned]
        assert not abandoned.exists()
        assert kept.exists()
    finally:
        living.kill()
        living.wait()
    assert sweep({"TMPDIR": str(place)}) == [kept]


def test_folders_that_are_not_ours_are_not_touched(place: Path) -> None:
    (place / "mf-withoutl").mkdir()
    (place / "mf-starting").mkdir()
    (place / "mf-starting" / LOCK).touch()
    (place / "other").mkdir()
    (place / "other" / LOCK).write_text("1\n")
    (place / "mf-alinkto1").symlink_to(place / "other")
    (place / "mf-linklock").mkdir()
    (place / "mf-linklock" / LOCK).symlink_to(place / "other" / LOCK)
    if os.geteuid() == 0:
        (place / "mf-another1").mkdir()
        (place / "mf-another1" / LOCK).write_text("1\n")
        os.chown(place / "mf-another1", 12345, 0)
    before = sorted(place.rglob("*"))
    assert sweep({"TMPDIR": str(place)}) == []
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("inherits", [True, False], ids=["by what it inherited", "by its open files"])
def test_the_processes_of_a_dead_owner_end_with_its_folder(place: Path, inherits: bool) -> None:
    dead, abandoned = owner(place)
    dead.kill()
    dead.wait()
    variable = {SOCKET_VARIABLE: f"{abandoned}/log"} if inherits else {}
    with (abandoned / "log.txt").open("wb") as output:
        orphan = subprocess.Popen(
            [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"],
            stdout=None if inherits else output,
            env={**os.environ, **variable},
        )
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        until = time.monotonic() + 60
        while orphan.pid not in marked(abandoned) and time.monotonic() < until:
            time.sleep(0.01)
        # It is not ours to wait for in earnest: a zombie has no environment and no files.
        assert sweep({"TMPDIR": str(place)}) == [abandoned]
        assert orphan.wait(60) == -9
        assert bystander.poll() is None
    finally:
        orphan.kill()
        bystander.kill()
        orphan.wait()
        bystander.wait()
