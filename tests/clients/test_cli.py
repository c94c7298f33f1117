"""The command line, against a fake server on a loopback port."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import typer
from monofacet import FeatureCard
from monofacet._convert import read
from monofacet.cli import _features as cli_features
from monofacet.cli import app
from monofacet.cli._plugins import add_plugins
from monofacet.testing import FakeMonofacet, run_server
from monofacet.testing._model import FakeModel
from typer.testing import CliRunner

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with run_server() as target:
        yield target


@pytest.fixture()
def run(target: str) -> Run:
    def run(*arguments: str | Path, where: str = target, **options: Any) -> Any:
        # Wide enough that no table wraps.
        environment = {"MONOFACET_TARGET": where, "COLUMNS": "200", "NO_COLOR": "1"}
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment, **options)

    return run


@pytest.fixture()
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    PIL.Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_encode_shows_every_input_and_their_similarity(run: Run, picture: Path) -> None:
    done = run("encode", picture, "a [red] square", "--dictionary", "")
    assert done.exit_code == 0
    assert "a [red] square" in done.output
    assert "cosine" in done.output


def test_encode_as_json_prints_a_line_an_input(run: Run, picture: Path) -> None:
    done = run("encode", picture, "a square", "--json", "--dictionary", "", "--top", "2")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == [str(picture), "a square"]
    assert np.linalg.norm(lines[0]["embedding"]) == pytest.approx(1, abs=1e-6)  # float32
    assert len(lines[1]["features"]["indices"]) == 2


@pytest.mark.parametrize("written", ["one\n\ntwo\n", "\ufeffone\r\ntwo\r\n"], ids=["Linux", "Windows"])
def test_encode_takes_folders_and_standard_input(run: Run, picture: Path, written: str) -> None:
    done = run("encode", picture.parent, "-", "--json", input=written)
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [str(picture), "one", "two"]


def test_encode_writes_arrays(run: Run, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    assert run("encode", picture, "a", "--dictionary", "", "--out", out).exit_code == 0
    with np.load(out) as arrays:
        assert arrays["embeddings"].shape == (2, 8)
        assert arrays["ids"].tolist() == [str(picture), "a"]
        assert arrays["indptr"][-1] == len(arrays["indices"]) == len(arrays["values"])


def test_a_bad_input_does_not_stop_the_others(run: Run, picture: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    done = run("encode", bad, picture, "--json")
    assert done.exit_code == 3
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["error"]["violations"][0]["field"] == "input.image.data"
    assert "embedding" in second
    assert "not a PNG, JPEG or WebP image" in run("encode", bad, picture).output


def test_an_argument_that_is_no_utf_8_is_a_bad_input_like_any_other(run: Run) -> None:
    # As Python takes the byte FF from the command line.
    done = run("encode", "\udcff", "a square", "--json")
    assert done.exit_code == 3
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["id"], first["error"]["kind"]) == ("\udcff", "InputError")
    assert "embedding" in second
    assert "the text cannot be sent" in run("encode", "\udcff").output


def test_a_misspelt_image_is_an_error_and_not_a_text(run: Run) -> None:
    done = run("encode", "missing.png")
    assert done.exit_code == 3
    assert "no such file: missing.png" in done.output
    assert run("encode", "--text", "missing.png").exit_code == 0


def test_a_text_may_be_longer_than_a_file_name_or_an_id(run: Run) -> None:
    assert run("encode", "word " * 1000).exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [("encode", ""), ("encode", "a", ""), ("modality", ""), ("gender", "classify", ""), ("filter", "")],
)
def test_a_variable_that_is_not_set_does_not_mean_all_images_here(
    run: Run, picture: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(picture.parent)
    done = run(*arguments)
    assert done.exit_code == 3
    assert done.output == "error: an input is empty\n"


def test_nothing_to_encode_is_said(run: Run) -> None:
    assert "nothing to do" in run("encode").output


def test_features_are_listed_filtered_and_limited(run: Run) -> None:
    done = run("features", "--label", "cross", "--limit", "2", "--json")
    answer = json.loads(done.stdout)
    assert answer["total"] == 4
    assert [card["feature"] for card in answer["features"]] == [2, 7]
    table = run("features", "--label", "image")
    assert "concept 15" in table.output
    assert "concept 2 " not in table.output


def test_one_feature_is_shown_with_its_pictures(run: Run, tmp_path: Path) -> None:
    done = run("features", "3", "--save-images", tmp_path / "out")
    assert "a white dot" in done.output
    assert (tmp_path / "out" / "feature-3-00.png").exists()
    card = json.loads(run("features", "3", "--json").stdout)["card"]
    assert card["name"] == "concept 3"
    # Why it has its label, and what its name rests on, in words.
    assert card["label_reason"] in done.output
    assert "Name: concept 3, AUC 0.90 [0.80, 0.95] on 12 held-out samples with the phrase." in done.output


def test_a_feature_without_a_name_says_so(run: Run) -> None:
    model = FakeModel()
    card = model.card(2)
    card.name = ""
    shown = cli_features._about_the_name(read(FeatureCard, card))
    assert shown == "No name: the phrase it detects best has an AUC of 0.90."
    card.ClearField("name_auc")
    shown = cli_features._about_the_name(read(FeatureCard, card))
    assert shown == "No name: no phrase of the captions goes with it."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["features", "99"], "UNKNOWN_FEATURE"),
        (["features", "--order-by", "size"], "cannot be ordered by 'size'"),
        (["features", "--label", "audio"], "'audio' is no label"),
        (["encode", "a", "--dictionary", "other"], "UNKNOWN_DICTIONARY"),
        (["models", "other"], "UNKNOWN_MODEL"),
        (["encode", "a", "--bundle", "other"], "UNKNOWN_MODEL"),
        (["modality", "a", "--pairs", "p.csv"], "either inputs or --pairs"),
        (["modality", "--pairs", "gone.csv"], "cannot read gone.csv"),
        (["encode", "a", "--out", "/nowhere/at/all.npz"], "no folder"),
        (["health", "--timeout", "inf"], "timeouts are positive"),
        (["models", "--token", "two words"], "printable ASCII"),
    ],
)
def test_a_bad_name_or_value_ends_with_3_and_a_reason(run: Run, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 3, done.output
    assert message in done.output


def test_modality_shows_where_the_energy_is(run: Run, picture: Path) -> None:
    answer = json.loads(run("modality", picture, "a square", "--top", "2", "--json").stdout)
    first = answer["result"]["classifications"][0]
    assert sum(first["shares"].values()) == pytest.approx(1, abs=1e-5)  # float32
    assert len(first["top_features"]) == 2
    assert "energy by label" in run("modality", picture).output


def test_modality_scores_pairs_from_a_file(run: Run, picture: Path, tmp_path: Path) -> None:
    pairs, out = tmp_path / "pairs.csv", tmp_path / "table.csv"
    pairs.write_text("image,text,group\nred.png,a red square,red\nred.png,un carré rouge,red\n")
    done = run("modality", "--pairs", pairs, "--seed", "3", "--out", out, "--json")
    answer = json.loads(done.stdout)
    assert (answer["pairs"], answer["settings"]["seed"], len(answer["cards"])) == (2, 3, 20)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows[:3]] == ["IMAGE", "TEXT", "CROSS"]
    assert "2 pairs" in run("modality", "--pairs", pairs).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("modality", "--pairs", "pairs.csv", "--bootstrap", "-1"), "bootstrap_samples cannot be sent"),
        (("gender", "audit", "--csv", "pairs.csv", "--seed", str(2**64)), "seed cannot be sent"),
    ],
)
def test_a_setting_out_of_range_is_one_line_and_no_traceback(
    run: Run, picture: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(picture.parent)
    Path("pairs.csv").write_text("image,text,gender\nred.png,a red square,woman\n")
    done = run(*arguments)
    assert done.exit_code == 3
    assert done.output.startswith(f"error: {message}")
    assert done.output.count("\n") == 1


def test_a_pair_file_without_a_column_is_refused(run: Run, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("picture,text\n")
    assert "no column image" in run("modality", "--pairs", pairs).output


def test_a_pair_file_may_begin_with_a_byte_order_mark(run: Run, picture: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image,text\nred.png,a red square\nred.png,\n", encoding="utf-8-sig")
    assert "2 pairs" in run("modality", "--pairs", pairs).output


@pytest.mark.parametrize(("row", "missing"), [("red.png", "text"), (",a red square", "image")])
def test_a_pair_without_image_or_text_is_refused_by_its_line(
    run: Run, tmp_path: Path, row: str, missing: str
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(f"image,text\nred.png,a red square\n{row}\n")
    done = run("modality", "--pairs", pairs)
    assert done.exit_code == 3
    assert f"line 3: no {missing}" in " ".join(done.output.split())


def test_models_show_dictionaries_and_limits(run: Run) -> None:
    done = run("models")
    assert all(word in done.output for word in ("fake@000000000000", "fake-sae", "max_inputs", "256"))
    assert json.loads(run("models", "fake", "--json").stdout)["models"][0]["files"]["manifest.json"]


def test_health_is_0_when_all_services_serve_and_4_when_one_does_not(run: Run) -> None:
    assert json.loads(run("health", "--json").stdout)["monofacet.v1.FeatureService"] == "SERVING"
    done = run("health", "other.Service")
    assert done.exit_code == 4
    assert "SERVICE_UNKNOWN" in done.output


def test_health_waits_for_as_long_as_it_was_asked_to(run: Run) -> None:
    class Watched(FakeMonofacet):
        left: float = 0.0

        def Check(self, request: Any, context: Any) -> Any:
            self.left = context.time_remaining()
            return super().Check(request, context)

    service = Watched()
    with run_server(service) as target:
        assert run("health", where=target).exit_code == 0
        assert 0 < service.left < 10
        assert run("health", "--timeout", "60", where=target).exit_code == 0
        assert 10 < service.left < 70


def test_no_server_ends_with_4_and_says_what_to_do(run: Run) -> None:
    done = run("health", where="localhost:1")
    assert done.exit_code == 4
    assert "monofacet serve" in done.output
    error = json.loads(run("health", "--json", where="localhost:1").stderr)["error"]
    assert error["code"] == "UNAVAILABLE"


def test_a_refused_token_ends_with_5(run: Run) -> None:
    import grpc

    class Guarded(FakeMonofacet):
        def ListModels(self, request: Any, context: Any) -> Any:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")

    with run_server(Guarded()) as guarded:
        done = run("models", where=guarded)
    assert done.exit_code == 5
    assert "MONOFACET_TOKEN" in done.output


def test_a_token_does_not_leave_this_machine_unencrypted(run: Run) -> None:
    done = run("models", "--token", "secret", where="example.org:9000")
    assert done.exit_code == 3
    assert "unencrypted" in done.output
    assert "secret" not in done.output


def plugin(**options: Any) -> Any:
    """An entry point that gives what the test made."""
    name, loaded = options["name"], options["loaded"]

    class Entry(EntryPoint):
        def load(self) -> Any:
            if isinstance(loaded, Exception):
                raise loaded
            return loaded

    return Entry(name, "some.module:thing", "monofacet.commands")


def with_plugins(monkeypatch: pytest.MonkeyPatch, *plugins: Any, nested: Sequence[Any] = ()) -> typer.Typer:
    groups = {"monofacet.commands": list(plugins), "monofacet.commands.extra": list(nested)}
    monkeypatch.setattr("monofacet.cli._plugins.entry_points", lambda group: groups.get(group, []))
    fresh = typer.Typer()
    fresh.command("encode")(lambda: typer.echo("ours"))
    add_plugins(fresh)
    return fresh


def test_serve_says_how_to_install_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(with_plugins(monkeypatch), ["serve"])
    assert done.exit_code == 1
    assert "pip install" in done.output


def test_a_plugin_gets_its_own_arguments_and_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(port: int = 9000, quiet: bool = False) -> None:
        """Start it."""
        typer.echo(f"port {port} quiet {quiet}")

    fresh = with_plugins(monkeypatch, plugin(name="serve", loaded=serve))
    assert CliRunner().invoke(fresh, ["serve", "--port", "7", "--quiet"]).output == "port 7 quiet True\n"
    assert "--port" in CliRunner().invoke(fresh, ["serve", "--help"]).output
    assert CliRunner().invoke(fresh, ["serve", "--prot", "7"]).exit_code == 2


def test_a_plugin_may_be_a_typer_with_commands_and_its_exit_code_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = typer.Typer()

    @group.command()
    def one() -> None:
        raise typer.Exit(7)

    @group.command()
    def two() -> None:
        typer.echo("two")

    fresh = with_plugins(monkeypatch, plugin(name="extra", loaded=group))
    assert CliRunner().invoke(fresh, ["extra", "two"]).output == "two\n"
    assert CliRunner().invoke(fresh, ["extra", "one"]).exit_code == 7


def test_a_plugin_is_not_loaded_before_it_is_called_and_does_not_replace_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = ImportError("No module named 'ray'")
    fresh = with_plugins(
        monkeypatch, plugin(name="serve", loaded=broken), plugin(name="encode", loaded=broken)
    )
    assert CliRunner().invoke(fresh, ["encode"]).output == "ours\n"
    done = CliRunner().invoke(fresh, ["serve"])
    assert done.exit_code == 1
    assert "No module named 'ray'" in done.output


def test_a_group_has_the_commands_of_other_packages_and_says_what_one_needs_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = typer.Typer()
    group.command("one")(lambda: typer.echo("one"))

    def two(times: int = 1) -> None:
        typer.echo("two" * times)

    def late() -> None:
        raise ModuleNotFoundError("No module named 'sklearn'")

    fresh = with_plugins(
        monkeypatch,
        plugin(name="extra", loaded=group),
        plugin(name="late", loaded=late),
        nested=[
            plugin(name="two", loaded=two),
            plugin(name="three", loaded=ImportError("No module named 'training'")),
        ],
    )
    assert CliRunner().invoke(fresh, ["extra", "one"]).output == "one\n"
    assert CliRunner().invoke(fresh, ["extra", "two", "--times", "2"]).output == "twotwo\n"
    for command, module in ((["extra", "three", "--any", "thing"], "training"), (["late"], "sklearn")):
        done = CliRunner().invoke(fresh, command)
        assert done.exit_code == 1
        assert len(done.output.splitlines()) == 1
        assert module in done.output and "make setup" in done.output
