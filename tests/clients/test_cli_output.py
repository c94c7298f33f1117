"""What the command line writes where: files to standard output, any encoding of a terminal, readers that leave."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from monofacet.cli import app
from monofacet.testing import FakeMonofacet, run_server
from typer.testing import CliRunner

BOUND = 300
ACCENTS = "un café 心 …"


class Accented(FakeMonofacet):
    """Names its features in words that ASCII and Latin-1 lack."""

    def card(self, feature: int) -> Any:
        card = super().card(feature)
        card.name = f"{ACCENTS} {feature}"
        return card


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with run_server(Accented()) as target:
        yield target


@pytest.fixture()
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "pairs.csv").write_text("image,text\nred.png,a red square\n")
    (tmp_path / "labels.csv").write_text("text,gender\n" + "a woman,woman\na man,man\n" * 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from monofacet.cli import main; main()", *arguments]


def run(target: str, *arguments: str, encoding: str = "utf-8") -> Any:
    environment = {"MONOFACET_TARGET": target, "COLUMNS": "200"}
    return CliRunner(charset=encoding).invoke(app, arguments, env=environment)


def run_alone(target: str, *arguments: str, stdout: int) -> subprocess.CompletedProcess[bytes]:
    """Run in a process of its own, which the system's streams take."""
    environment = {**os.environ, "MONOFACET_TARGET": target}
    return subprocess.run(
        command(*arguments),
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment,
        timeout=BOUND,
        check=False,
    )


# Every command that writes a file, and what reads it.
FILES: dict[str, tuple[tuple[str, ...], Any]] = {
    "generate": (("generate", "a heart", "--seed", "1", "--out", "-"), PIL.Image.open),
    "generate a grid": (("generate", "a heart", "-n", "3", "--folder", "each", "--out", "-"), PIL.Image.open),
    "encode": (("encode", "red.png", "a square", "--out", "-"), lambda file: dict(np.load(file))),
    "filter": (("filter", "red.png", "--out", "-"), lambda file: dict(np.load(file))),
    "modality": (("modality", "--pairs", "pairs.csv", "--out", "-"), lambda file: read_csv(file)),
    "gender audit": (("gender", "audit", "--csv", "labels.csv", "--html", "-"), lambda file: read_html(file)),
}


def read_csv(file: io.BytesIO) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8")))
    assert ACCENTS in rows[0]["name"]
    return rows


def read_html(file: io.BytesIO) -> None:
    assert file.getvalue().startswith(b"<!doctype html>")
    assert file.getvalue().endswith(b"</html>\n")


@pytest.mark.parametrize("name", FILES)
def test_a_file_may_go_to_standard_output_with_nothing_beside_it(target: str, here: Path, name: str) -> None:
    arguments, read = FILES[name]
    done = run(target, *arguments)
    assert done.exit_code == 0, done.stderr
    read(io.BytesIO(done.stdout_bytes))
    # What people are told goes elsewhere.
    assert done.stderr
    assert not (here / "-").exists()
    assert not (here / "-.npz").exists()
    refused = run(target, *arguments, "--json")
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert "both want standard output" in refused.stderr


@pytest.mark.parametrize("name", ["generate", "modality"])
def test_a_terminal_gets_no_file_that_it_cannot_show(target: str, here: Path, name: str) -> None:
    parent, child = pty.openpty()
    try:
        # What is written fits the terminal's buffer.
        done = run_alone(target, *FILES[name][0], stdout=child)
        os.set_blocking(parent, False)
        shown = os.read(parent, 4096) if select.select([parent], [], [], 0)[0] else b""
    finally:
        os.close(parent)
        os.close(child)
    if name == "modality":
        assert (done.returncode, shown[:14]) == (0, b"feature,label,")
    else:
        assert (done.returncode, shown) == (3, b"")
        assert b"a terminal cannot show the file" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("generate", "a", "--folder", "-"), ("features", "3", "--save-images", "-")]
)
def test_a_folder_cannot_be_standard_output(target: str, here: Path, arguments: tuple[str, ...]) -> None:
    done = run(target, *arguments)
    assert done.exit_code == 3
    assert "standard output takes one file" in done.stderr
    assert not (here / "-").exists()


def test_a_named_npz_file_gets_its_suffix_as_numpy_gives_it(target: str, here: Path) -> None:
    assert run(target, "encode", "a", "--out", "arrays").exit_code == 0
    with np.load(here / "arrays.npz") as arrays:
        assert arrays["ids"].tolist() == ["a"]


# Every command that prints JSON, with words that the encodings lack.
JSON = [
    ("encode", ACCENTS),
    ("features", "--limit", "2"),
    ("features", "3"),
    ("modality", ACCENTS),
    ("modality", "--pairs", "pairs.csv"),
    ("filter", "red.png", "--label", ACCENTS, "--label", "b"),
    ("gender", "classify", ACCENTS),
    ("gender", "audit", "--csv", "labels.csv"),
    ("generate", ACCENTS, "--seed", "1"),
    ("preview", ACCENTS, "--label", "image", "--scale", "2"),
    ("models",),
    ("health",),
]
ENCODINGS = ("ascii", "latin-1", "utf-8", "utf-16")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("arguments", JSON, ids=" ".join)
def test_json_is_json_whatever_the_terminal_speaks(
    target: str, here: Path, arguments: tuple[str, ...], encoding: str
) -> None:
    done = run(target, *arguments, "--json", encoding=encoding)
    assert done.exit_code == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout_bytes.decode(encoding).splitlines()]
    assert answers
    if arguments[0] == "encode" or arguments[:2] == ("gender", "classify"):
        assert answers[0]["id"] == ACCENTS
    if arguments[:2] == ("features", "--limit"):
        assert answers[0]["features"][0]["name"] == f"{ACCENTS} 0"


def test_the_json_of_an_error_is_json_too(target: str, here: Path) -> None:
    done = run(target, "features", "--dictionary", ACCENTS, "--json", encoding="latin-1")
    assert done.exit_code == 3
    assert ACCENTS in json.loads(done.stderr_bytes.decode("latin-1"))["error"]["message"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    "arguments", [*JSON, ("--help",), ("gender", "audit", "--help"), ("encode", "é.png")], ids=" ".join
)
def test_a_table_is_shown_on_any_terminal(
    target: str, here: Path, arguments: tuple[str, ...], encoding: str
) -> None:
    done = run(target, *arguments, encoding=encoding)
    assert done.exit_code == (3 if "é.png" in arguments else 0), done.stderr
    assert (done.stdout_bytes + done.stderr_bytes).decode(encoding)


def test_a_plain_environment_is_enough(target: str, here: Path) -> None:
    environment = {"LANG": "C", "LC_ALL": "C"}
    done = subprocess.run(
        command("modality", ACCENTS, "--target", target),
        env=environment,
        capture_output=True,
        timeout=BOUND,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "arguments",
    [("encode", "a", "b", "--json"), ("features",), ("models", "--json"), ("generate", "a", "--out", "-")],
    ids=" ".join,
)
def test_a_reader_that_leaves_ends_the_command_in_silence(
    target: str, here: Path, arguments: tuple[str, ...]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_alone(target, *arguments, stdout=writing)
    finally:
        os.close(writing)
    # A progress bar that is no more leaves an empty line.
    assert (done.returncode, done.stderr.strip()) == (141, b"")
