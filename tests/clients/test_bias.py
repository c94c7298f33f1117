"""The client's and the command line's gender calls, against the client's own fake."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import monofacet
import numpy as np
import PIL.Image
import pytest
from monofacet import Ablation, AblationMode, AuditSettings, AuditVerdict, Gender, LabelledItem
from monofacet.cli import app
from monofacet.cli._gender import chosen, compared, read_labels
from monofacet.cli._gender_page import page
from monofacet.testing import FakeMonofacet, mock_async_client, mock_client, run_server
from monofacet.v1 import bias_service_pb2, common_pb2
from typer.testing import CliRunner


def picture(shade: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (8, 8), (shade, 0, 0))


def client_of(service: FakeMonofacet | None = None) -> monofacet.Client:
    return mock_client(service)[0]


ITEMS = [
    LabelledItem(picture(1), Gender.WOMAN, "guard", "a", "first"),
    LabelledItem("a man", "man", "guard"),
    LabelledItem("a guard", None, "guard"),
]


def test_classifications_come_in_order_with_before_and_after() -> None:
    with client_of() as client:
        plain = client.classify_gender(["a woman", picture(3)])
        ablated = client.classify_gender(["a woman", picture(3)], ablation=Ablation(top_gender_features=4))
    assert len(plain) == 2 and plain.ablation is None
    assert all(item.after is None and item.kept is None for item in plain.classifications)
    assert ablated.ablation == Ablation(
        top_gender_features=4, mode=AblationMode.ZERO, dictionary=ablated.ablation.dictionary
    )
    assert ablated.set_size == 4
    for before, after in zip(plain.classifications, ablated.classifications, strict=True):
        assert after.before == before.before
        assert after.after is not None
        assert after.after.score == pytest.approx(before.before.score / 2)


@pytest.mark.parametrize(
    "ablation",
    [
        Ablation(),
        Ablation(features=[1], label="IMAGE"),
        Ablation(features=[1], mode="LEACE"),
        Ablation(features=[-1]),
        Ablation(label="sideways"),
        Ablation(top_gender_features=0),
        Ablation(features=[1], mode="halve"),
    ],
)
def test_an_ablation_that_cannot_be_meant_is_refused_before_anything_is_sent(ablation: Ablation) -> None:
    with client_of() as client, pytest.raises(monofacet.InputError):
        client.classify_gender("a", ablation=ablation)


@pytest.mark.parametrize("mode", list(AblationMode))
def test_every_mode_and_selection_reaches_the_server_and_comes_back(mode: AblationMode) -> None:
    selections = [
        {"features": (3, 1)}, {"label": monofacet.ModalityLabel.TEXT}, {"top_gender_features": 2},
    ]  # fmt: skip
    with client_of() as client:
        for selection in selections if mode is not AblationMode.LEACE else [{}]:
            asked = Ablation(mode=mode.lower(), **selection)
            answered = client.classify_gender("a", ablation=asked).ablation
            assert answered is not None
            assert answered.mode is mode
            assert {name: getattr(answered, name) for name in selection} == selection


def test_an_audit_counts_its_items_and_keeps_every_figure() -> None:
    ablations = [Ablation(label="IMAGE"), Ablation(mode="LEACE")]
    with client_of() as client:
        result = client.audit_gender(iter(ITEMS), AuditSettings(ablations, seed=3, min_group=2))
    assert (result.women, result.men, result.ungendered, result.skipped) == (1, 1, 1, 0)
    assert (result.settings.seed, result.settings.min_group, result.settings.null_sets) == (3, 2, 1000)
    first, leace = result.audits
    assert first.verdict is AuditVerdict.EFFECT
    assert first.raw.accuracy.difference.value == pytest.approx(-1 / 30)
    assert first.nulls[0].null.shape == (100,)
    assert first.curve.shape == (11, 5)
    assert leace.nulls == () and leace.null_energy_ratio is None
    (profession,) = first.professions
    assert (profession.profession, profession.women, profession.men, profession.ungendered) == (
        "guard",
        1,
        1,
        1,
    )
    # What the server could not define is None, not 0.
    assert profession.auc.before.value is None


async def test_the_asynchronous_client_answers_alike() -> None:
    async def items():
        for item in ITEMS:
            yield item

    with client_of() as client:
        expected = client.audit_gender(ITEMS)
    async with mock_async_client()[0] as client:
        found = await client.audit_gender(items())
        classes = await client.classify_gender(["a", "b"], ablation=Ablation(label="cross"))
    assert (found.women, found.men, found.ungendered) == (expected.women, expected.men, expected.ungendered)
    assert found.audits[0].raw == expected.audits[0].raw
    assert len(classes) == 2


def test_a_bad_item_fails_the_audit_or_is_named_and_skipped() -> None:
    items = [*ITEMS, LabelledItem(b"no picture", "woman", id="broken")]
    with client_of() as client:
        with pytest.raises(monofacet.InvalidInputError) as caught:
            client.audit_gender(items)
        skipped = client.audit_gender(items, AuditSettings(skip_bad_items=True))
    assert [violation.field for violation in caught.value.violations] == ["items[3].input.image.data"]
    (item,) = skipped.skipped_items
    assert (item.index, item.id, skipped.skipped, skipped.women) == (3, "broken", 1, 1)


def test_an_item_that_cannot_be_read_here_ends_the_call_and_is_named(tmp_path: Path) -> None:
    items = [ITEMS[0], LabelledItem(tmp_path / "missing.png", "man")]
    with client_of() as client, pytest.raises(monofacet.InputError, match=r"items\[1\].*missing\.png"):
        client.audit_gender(items)


def test_a_long_stream_is_cut_into_messages_of_bounded_size() -> None:
    sizes: list[int] = []

    class Counting(FakeMonofacet):
        def AuditGender(self, requests, context):  # noqa: N802
            def counted():
                for request in requests:
                    if request.WhichOneof("payload") == "batch":
                        sizes.append(len(request.batch.items))
                    yield request

            return super().AuditGender(counted(), context)

    with client_of(Counting()) as client:
        result = client.audit_gender(LabelledItem(f"a {i}", "man") for i in range(200))
    assert result.men == 200
    assert sum(sizes) == 200 and max(sizes) <= 256 and len(sizes) > 1


def write_csv(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "labels.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    rows = []
    for i, gender in enumerate(("woman", "man", "", "woman")):
        picture(i).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "gender": gender, "profession": "a <b> & c"})
    return write_csv(tmp_path, rows)


def test_paths_in_a_csv_are_relative_to_it(labels: Path) -> None:
    items = read_labels(labels)
    assert [item.input for item in items] == [labels.parent / f"{i}.png" for i in range(4)]
    assert [item.gender for item in items] == ["woman", "man", "", "woman"]


@pytest.mark.parametrize(
    ("columns", "sent"),
    [
        ({"cluster": "one"}, "one"),
        ({"group": "two"}, "two"),
        ({}, ""),
    ],
)
def test_items_of_one_group_or_cluster_are_sent_as_one(
    tmp_path: Path, columns: dict[str, str], sent: str
) -> None:
    rows = [{"text": f"{i}", "gender": "woman", **columns} for i in range(2)]
    client, channel = mock_client()
    with client:
        client.audit_gender(read_labels(write_csv(tmp_path, rows)))
    items = [
        item
        for name, request in channel.calls
        if name.endswith("/AuditGender")
        for item in request.batch.items
    ]
    assert [item.cluster for item in items] == [sent, sent]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.png", "age": "x"}], "no column gender"),
        ([{"gender": "man"}], "no column image"),
        ([{"image": "a.png", "gender": "neither"}], "line 2"),
        ([{"text": "", "gender": "man"}], "line 2"),
    ],
)
def test_a_csv_that_says_too_little_is_refused_by_line(
    tmp_path: Path, rows: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(monofacet.InputError, match=message):
        read_labels(write_csv(tmp_path, rows))


def test_the_command_line_audits_a_folder_and_writes_a_page_that_is_well_formed(
    labels: Path, tmp_path: Path
) -> None:
    out = tmp_path / "audit.html"
    with run_server() as target:
        arguments = ["gender", "audit", "--csv", str(labels), "--html", str(out), "--target", target]
        shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        as_json = CliRunner().invoke(app, [*arguments, "--compare", "--json"])
    assert shown.exit_code == 0, shown.output
    assert "2 women, 1 men, 1 ungendered" in shown.output and "EFFECT" in shown.output
    document = json.loads(as_json.stdout)
    assert len(document["audits"]) == 6
    assert document["audits"][0]["nulls"][0]["p"] == pytest.approx(1 / 101)
    text = out.read_text()
    # Names come from the caller's file: they are text, never markup.
    assert "a &lt;b&gt; &amp; c" in text
    for drawing in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")


def test_a_comparison_leaves_out_labels_that_no_feature_has_and_says_so(labels: Path) -> None:
    class NoText(FakeMonofacet):
        def card(self, feature):
            card = super().card(feature)
            if card.label == common_pb2.MODALITY_LABEL_TEXT:
                card.label = common_pb2.MODALITY_LABEL_UNRESOLVED
            return card

    with run_server(NoText()) as target:
        arguments = ["gender", "audit", "--csv", str(labels), "--compare", "--json", "--target", target]
        run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    audited = [found["ablation"]["label"] for found in json.loads(run.stdout)["audits"]]
    assert [label for label in audited if label] == ["IMAGE", "CROSS"]
    assert "left out: no feature is labelled TEXT" in run.stderr


def test_the_command_line_leaves_out_what_cannot_be_read_when_told_to(labels: Path) -> None:
    (labels.parent / "0.png").unlink()
    (labels.parent / "1.png").write_bytes(b"no picture")
    with run_server() as target:
        arguments = ["gender", "audit", "--csv", str(labels), "--target", target]
        failed = CliRunner().invoke(app, arguments)
        skipped = CliRunner().invoke(app, [*arguments, "--skip-bad"], env={"COLUMNS": "200"})
    assert failed.exit_code == 3
    assert skipped.exit_code == 0, skipped.output
    assert "1 women, 0 men, 1 ungendered, 1 left out" in skipped.output
    assert "0.png" in skipped.output and "INVALID_IMAGE" in skipped.output


def test_the_command_line_classifies_with_and_without_an_ablation(labels: Path) -> None:
    with run_server() as target:
        plain = CliRunner().invoke(
            app, ["gender", "classify", "a text", "--no-ablation", "--json", "--target", target]
        )
        ablated = CliRunner().invoke(
            app, ["gender", "classify", str(labels.parent / "0.png"), "--top", "8", "--target", target]
        )
    line = json.loads(plain.stdout)
    assert line["id"] == "a text" and line["after"] is None
    assert ablated.exit_code == 0 and "kept" in ablated.output


RECOMMENDED = Ablation(top_gender_features=4, mode=AblationMode.PROJECT, dictionary="fake-sae")


def test_what_the_bundle_recommends_is_removed_and_audited_by_default(labels: Path) -> None:
    client, _ = mock_client()
    assert client.model().recommended_ablation == RECOMMENDED
    assert client.audit_gender(ITEMS).settings.ablations == (RECOMMENDED,)
    with run_server() as target:

        def told(*arguments: str) -> str:
            return CliRunner().invoke(app, ["gender", *arguments, "--target", target]).stdout

        # A title is broken into lines as wide as its table.
        shown, by_hand = (
            " ".join(told("classify", "a", *options).split()) for options in ((), ("--top", "3"))
        )
        line = told("classify", "a", "--json")
        audited = told("audit", "--csv", str(labels), "--json")
    assert "without top 4, PROJECT of fake-sae (the bundle's recommendation): 4 features" in shown
    assert "without top 3, PROJECT of fake-sae: 3 features" in by_hand
    asked = {
        "top_gender_features": 4,
        "mode": "PROJECT",
        "dictionary": "fake-sae",
        "features": None,
        "label": None,
    }
    assert json.loads(line)["ablation"] == asked
    assert json.loads(audited)["settings"]["ablations"] == [asked]


def test_a_bundle_that_recommends_nothing_has_nothing_removed(labels: Path) -> None:
    class Silent(FakeMonofacet):
        def model(self):
            model = super().model()
            model.ClearField("recommended_ablation")
            return model

    client, _ = mock_client(Silent())
    assert client.model().recommended_ablation is None
    assert client.audit_gender(ITEMS).settings.ablations == (
        Ablation(top_gender_features=16, mode=AblationMode.ZERO, dictionary="fake-sae"),
    )
    with run_server(Silent()) as target:
        done = CliRunner().invoke(app, ["gender", "classify", "a", "--target", target])
    assert done.exit_code == 0
    assert "nothing removed" in done.output


@pytest.mark.parametrize(
    ("options", "recommended", "ablation"),
    [
        ((None, None, None, None, ""), RECOMMENDED, RECOMMENDED),
        ((None, None, None, None, "fake-sae"), RECOMMENDED, RECOMMENDED),
        ((None, None, None, "mean", ""), RECOMMENDED, dataclasses.replace(RECOMMENDED, mode="mean")),
        ((None, None, None, None, "other"), RECOMMENDED, None),
        ((None, None, None, None, ""), None, None),
        ((None, None, None, "zero", ""), None, None),
        ((None, None, 9, None, ""), RECOMMENDED, Ablation(top_gender_features=9, mode="PROJECT")),
        ((None, None, 9, None, ""), None, Ablation(top_gender_features=9, mode="ZERO")),
        (
            (None, None, 9, None, ""),
            Ablation(mode=AblationMode.LEACE),
            Ablation(top_gender_features=9, mode="ZERO"),
        ),
        ((None, None, None, None, ""), Ablation(mode=AblationMode.LEACE), Ablation(mode="LEACE")),
        ((None, None, None, "zero", ""), Ablation(mode=AblationMode.LEACE), None),
        ((None, "cross", None, "zero", ""), RECOMMENDED, Ablation(label="cross", mode="zero")),
        (("1,2", None, None, "mean", "d"), RECOMMENDED, Ablation([1, 2], None, None, "mean", "d")),
        ((None, None, None, "leace", ""), RECOMMENDED, Ablation(mode="leace")),
    ],
)
def test_the_options_of_an_ablation_add_up(
    options: tuple[Any, ...], recommended: Ablation | None, ablation: Ablation | None
) -> None:
    assert chosen(*options, recommended) == ablation


def test_feature_ids_are_numbers() -> None:
    with pytest.raises(monofacet.InputError, match="numbers"):
        chosen("1,b", None, None, "zero", "", None)
    assert len(compared("leace", "")) <= 8


def test_the_page_of_every_verdict_is_written(labels: Path) -> None:
    class Verdicts(FakeMonofacet):
        def AuditGender(self, requests, context):  # noqa: N802
            response = super().AuditGender(requests, context)
            response.audits[0].verdict = self.verdict
            response.audits[0].nulls[0].ClearField("null")
            return response

    for verdict in AuditVerdict:
        fake = Verdicts()
        fake.verdict = bias_service_pb2.AuditVerdict.Value(f"AUDIT_VERDICT_{verdict.value}")
        with client_of(fake) as client:
            result = client.audit_gender(ITEMS)
        assert verdict.value in page(result)
        assert np.isfinite(result.audits[0].kept)
