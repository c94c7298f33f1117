"""`.ci/environment` with programs that only pretend: which Python it takes, what it installs, what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What the script uses of the system. Nothing else is found: no Python and no uv but those that a test puts there.
SYSTEM = (
    "bash", "cat", "chmod", "cksum", "cp", "cut", "dirname", "du", "env", "grep", "head", "mkdir", "printf", "rm",
    "sed", "touch",
)  # fmt: skip

UV = """\
#!/bin/bash
echo "uv $*" >>"$LOG"
case "$1 $2" in
    "--version ") echo "uv 1.0" ;;
    "python find") exit 2 ;;
    "pip install") exit "${UV_FAILS:-0}" ;;
    "venv "*) mkdir -p "${@: -1}/bin" && cp "$BIN/venv-python" "${@: -1}/bin/python" ;;
esac
"""
# The Python of an environment: it installs nothing, and what it is to compile is not there.
VENV_PYTHON = f"""\
#!/bin/bash
case "$*" in
    "-m pip"*) echo "pip ${{*:3}}" >>"$LOG" ;;
    *"import accelerate"*) echo compiled >>"$LOG" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


class Machine:
    """A clone with nothing installed, and the programs that are found there."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.bin, self.log = folder / "clone", folder / "bin", folder / "log"
        for name in (".ci/environment", "pyproject.toml", "clients/python/pyproject.toml", "constraints.txt"):
            (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.clone / name)
        self.bin.mkdir()
        for name in SYSTEM:
            found = shutil.which(name)
            assert found, name
            (self.bin / name).symlink_to(found)
        self.put("venv-python", VENV_PYTHON)

    def put(self, name: str, script: str) -> None:
        """Put a program onto the path."""
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)

    def python(self, name: str, version: str = "3.12.1", venv: bool = True) -> None:
        """Put a Python there that says it is of this version, with or without the module venv."""
        old = tuple(map(int, version.split("."))) < (3, 11)
        self.put(
            name,
            f"""#!/bin/bash
case "$*" in
    --version) echo "Python {version}" ;;
    *"sys.exit"*) exit {int(old)} ;;
    *"import venv"*) exit {int(not venv)} ;;
    *version_info*) echo "{" ".join(version.split(".")[:2])}" ;;
    "-m venv "*) echo "venv by {name}" >>"$LOG"; mkdir -p "$3/bin" && cp "$BIN/venv-python" "$3/bin/python" ;;
esac
""",
        )

    def run(self, level: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        known = {"PATH": str(self.bin), "LOG": str(self.log), "BIN": str(self.bin)}
        return subprocess.run(
            [self.bin / "bash", self.clone / ".ci/environment", level],
            env={**known, **environment}, capture_output=True, text=True,
        )  # fmt: skip

    def installs(self) -> list[str]:
        """Return the installers' calls of the last run."""
        return [
            line for line in self.log.read_text().splitlines() if "pip install" in line or "pip in" in line
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_shim_that_runs_nothing_is_passed_over(machine: Machine) -> None:
    machine.put("python3.11", "#!/bin/bash\necho 'pyenv: python3.11: command not found' >&2; exit 127\n")
    machine.python("python3.13", "3.13.0")
    done = machine.run("serve")
    assert done.returncode == 0, done.stderr
    assert "venv by python3.13" in machine.log.read_text()


def test_pyenvs_versions_are_found_though_none_is_chosen(machine: Machine) -> None:
    folder = machine.clone.parent / "pyenv/versions/3.12.1/bin"
    folder.mkdir(parents=True)
    machine.python("chosen")
    shutil.move(machine.bin / "chosen", folder / "python")
    done = machine.run("serve", PYENV_ROOT=str(folder.parents[2]))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version", "venv", "environment", "said"),
    [
        (None, True, {}, ["no Python 3.11, 3.12 or 3.13 here (no python3)", "apt-get install python3"]),
        ("3.9.2", True, {}, ["no Python 3.11, 3.12 or 3.13 here (Python 3.9.2)", "uv python install"]),
        ("3.9.2", True, {"PYTHON": "python3"}, ["PYTHON=python3 is Python 3.9.2"]),
        ("3.12.1", True, {"PYTHON": "python9"}, ["PYTHON=python9 is not found"]),
        ("3.12.1", False, {}, ["python3 has no venv module", "apt-get install python3-venv"]),
    ],
)
def test_where_it_cannot_one_line_says_what_is_missing(
    machine: Machine, version: str | None, venv: bool, environment: dict[str, str], said: list[str]
) -> None:
    if version:
        machine.python("python3", version, venv)
    done = machine.run("serve", **environment)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert all(words in done.stderr for words in said), done.stderr
    assert not (machine.clone / ".venv").exists()


def test_serving_gets_its_own_packages_and_the_tests_add_theirs(machine: Machine) -> None:
    machine.python("python3")
    machine.put("uv", UV)
    assert machine.run("serve").returncode == 0
    (call,) = machine.installs()
    assert call.startswith("uv ") and call.endswith(
        "--constraint constraints.txt --editable clients/python --editable .[server]"
    )
    assert machine.run("test").returncode == 0
    (call,) = machine.installs()
    assert call.endswith("--editable .[server,train,dev]")
    for level in ("serve", "test"):
        done = machine.run(level)
        assert (done.returncode, done.stdout, machine.installs()) == (0, "", [])


def test_a_changed_list_is_installed_with_all_that_was_there(machine: Machine) -> None:
    machine.python("python3")
    machine.run("test")
    with (machine.clone / "constraints.txt").open("a") as constraints:
        constraints.write("new==1.0\n")
    assert machine.run("serve").returncode == 0
    (call,) = machine.installs()
    assert call.endswith("--editable .[server,train,dev]")


@pytest.mark.parametrize("killed", ["uv venv", "pip install", "compiled"])
def test_an_interrupted_set_up_is_made_anew(machine: Machine, killed: str) -> None:
    machine.python("python3")
    # Each stops the script where it stands, as SIGKILL would.
    dies = f'case "uv $*" in *"{killed}"*) kill -9 $PPID; exit 1 ;; esac\n'
    machine.put("uv", UV.replace('echo "uv $*"', dies + 'echo "uv $*"'))
    if killed == "compiled":
        machine.put("venv-python", VENV_PYTHON.replace("echo compiled", "kill -9 $PPID; echo compiled"))
    assert machine.run("serve").returncode != 0
    machine.put("uv", UV)
    machine.put("venv-python", VENV_PYTHON)
    (machine.clone / ".venv/half").touch()
    done = machine.run("serve")
    assert done.returncode == 0, done.stderr
    assert "an earlier set-up was interrupted" in done.stdout
    assert not (machine.clone / ".venv/half").exists()
    assert len(machine.installs()) == 1


def test_an_environment_of_another_folder_or_python_is_made_anew(machine: Machine) -> None:
    # The environments of these tests are of the Python that runs them.
    other = "3.12" if sys.version_info[:2] == (3, 13) else "3.13"
    machine.python("python3")
    machine.run("serve")
    missing = machine.run("serve", PYTHON="nothing")
    assert missing.returncode == 1 and "PYTHON=nothing is not found" in missing.stderr
    assert (machine.clone / ".venv/.serve").exists(), "what was there is lost for a wrong name"
    machine.python(f"python{other}", f"{other}.0")
    assert "it is of another Python" in machine.run("serve", PYTHON=f"python{other}").stdout
    machine.clone = machine.clone.rename(machine.clone.with_name("moved"))
    assert "it was made in another folder" in machine.run("serve").stdout


def test_without_uv_and_where_uv_fails_pip_installs(machine: Machine) -> None:
    machine.python("python3")
    assert machine.run("serve").returncode == 0
    (call,) = machine.installs()
    assert call.startswith("pip install") and call.endswith("--editable .[server]")
    machine.put("uv", UV)
    done = machine.run("test", UV_FAILS="1")
    assert done.returncode == 0
    assert [call.split()[0] for call in machine.installs()] == ["uv", "pip"]
    assert "trying pip" in done.stdout


@pytest.mark.parametrize("uv", [True, False])
def test_the_index_of_cpu_wheels_is_asked_for_torch_alone_and_first(machine: Machine, uv: bool) -> None:
    machine.python("python3")
    if uv:
        machine.put("uv", UV)
    assert machine.run("serve", TORCH_INDEX="https://wheels.test/cpu").returncode == 0
    first, second = machine.installs()
    pins = [line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch")]
    assert "--no-deps" in first and "https://wheels.test/cpu" in first
    assert first.split()[-2:] == sorted(pins)
    assert "wheels.test" not in second
    assert "TORCH_INDEX has changed" in machine.run("serve").stdout


def test_every_pin_is_met_by_every_python() -> None:
    """A pin that only some Pythons have a wheel for would need a marker; there is none today."""
    assert [line for line in (ROOT / "constraints.txt").read_text().splitlines() if ";" in line] == []


def test_temporary_files_go_where_there_is_room(tmp_path: Path) -> None:
    run = [str(ROOT / ".ci/temporary"), "1"]
    given = subprocess.run(run, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert given.stdout.strip() == str(tmp_path)
    missing = {**os.environ, "TMPDIR": str(tmp_path / "missing")}
    refused = subprocess.run(run, env=missing, capture_output=True, text=True)
    assert refused.returncode == 1 and "set TMPDIR" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
