"""The contract is linted, its stubs are the ones that are committed, and its rules are enforced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from monofacet.v1 import common_pb2, feature_service_pb2, modality_service_pb2, model_service_pb2

from deployments.access.scopes import SCOPES
from tests.clients.conftest import contract_files, contract_methods

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "clients" / "python" / "monofacet" / "v1"
BUF = Path(sys.executable).with_name("buf")


def test_generating_the_stubs_again_changes_nothing(tmp_path: Path) -> None:
    generator = ROOT / "clients" / "python" / "tools" / "generate.py"
    subprocess.run([sys.executable, generator, tmp_path], check=True, capture_output=True)
    made = {path.name: path.read_text() for path in (tmp_path / "monofacet" / "v1").iterdir()}
    committed = {path.name: path.read_text() for path in STUBS.glob("*_pb2*")}
    assert made.keys() == committed.keys()
    for name in made:
        assert made[name] == committed[name], f"{name} is not what protos/ say: run `make protos`"


def test_generating_the_synchronous_client_again_changes_nothing(tmp_path: Path) -> None:
    generator = ROOT / "clients" / "python" / "tools" / "sync_side.py"
    subprocess.run([sys.executable, generator, tmp_path], check=True, capture_output=True)
    side = ROOT / "clients" / "python" / "monofacet" / "_sync"
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in side.glob("*.py")}
    # The one module that is written by hand, on both sides.
    assert committed.keys() - made.keys() == {"transport.py"}
    for name in made:
        assert made[name] == committed[name], f"{name} is not what _async/{name} says: run `make protos`"


@pytest.mark.parametrize("arguments", [["lint"], ["format", "--diff", "--exit-code"]])
def test_buf_has_nothing_to_say(arguments: list[str], tmp_path: Path) -> None:
    # An empty cache and no proxy: whatever is needed is in the repository.
    done = subprocess.run(
        [BUF, *arguments], cwd=ROOT, capture_output=True, text=True, env={"BUF_CACHE_DIR": str(tmp_path)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_vendored_rules_are_those_that_the_validator_knows() -> None:
    from google.protobuf import descriptor_pb2

    gen = pytest.importorskip("protovalidate._gen.buf.validate.validate_pb")
    ours = descriptor_pb2.FileDescriptorProto()
    descriptor_pool.Default().FindFileByName("buf/validate/validate.proto").CopyToProto(ours)
    for rules, fields in (
        (gen.StringRules, "StringRules"),
        (gen.BytesRules, "BytesRules"),
        (gen.RepeatedRules, "RepeatedRules"),
        (gen.FieldRules, "FieldRules"),
    ):
        message = next(message for message in ours.message_type if message.name == fields)
        theirs = {field.name: field.number for field in rules.desc().fields}
        assert {field.name: field.number for field in message.field} == theirs


def fields_of(message: Any) -> set[str]:
    protovalidate = pytest.importorskip("protovalidate")
    return {
        ".".join(
            element.field_name + (f"[{element.subscript.value}]" if element.subscript else "")
            for element in violation.proto.field.elements
        )
        for violation in protovalidate.collect_violations(message)
    }


TEXT = common_pb2.Input(text="a")
IMAGE = common_pb2.Image(data=b"x")


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (feature_service_pb2.EncodeRequest(), {"inputs"}),
        (feature_service_pb2.EncodeRequest(inputs=[TEXT] * 256), set()),
        (feature_service_pb2.EncodeRequest(inputs=[TEXT] * 257), {"inputs"}),
        (
            feature_service_pb2.EncodeRequest(
                inputs=[TEXT, common_pb2.Input(), common_pb2.Input(image=common_pb2.Image())]
            ),
            {"inputs[1].input", "inputs[2].image.data"},
        ),
        (
            feature_service_pb2.EncodeRequest(
                inputs=[TEXT], options=feature_service_pb2.EncodeOptions(dictionary="d" * 129, max_features=0)
            ),
            {"options.dictionary", "options.max_features"},
        ),
        # Of any length: only a server that may not cut it refuses it.
        (feature_service_pb2.EncodeRequest(inputs=[common_pb2.Input(text="é" * 100_000)]), set()),
        (feature_service_pb2.StreamEncodeRequest(), {"payload"}),
        (
            feature_service_pb2.StreamEncodeRequest(item=feature_service_pb2.StreamItem(id="1")),
            {"item.input"},
        ),
        (
            modality_service_pb2.ListFeaturesRequest(
                page_size=1001,
                order_by=77,  # type: ignore[arg-type]
                filter=modality_service_pb2.FeatureFilter(
                    labels=[0], min_mds=float("nan"), max_firing_rate=1.1
                ),
            ),
            {"page_size", "order_by", "filter.labels[0]", "filter.min_mds", "filter.max_firing_rate"},
        ),
        (modality_service_pb2.GetFeatureRequest(max_images=101, max_texts=101), {"max_images", "max_texts"}),
        (modality_service_pb2.ClassifyModalityRequest(top_features=101), {"inputs", "top_features"}),
        (
            modality_service_pb2.ScoreModalityRequest(
                settings=modality_service_pb2.ScoreSettings(
                    delta=0.5, bootstrap_samples=99, shuffles=10_001, false_discovery_rate=1
                )
            ),
            {
                "settings.delta",
                "settings.bootstrap_samples",
                "settings.shuffles",
                "settings.false_discovery_rate",
            },
        ),
        (
            modality_service_pb2.ScoreModalityRequest(
                batch=modality_service_pb2.PairBatch(pairs=[modality_service_pb2.ImageTextPair(image=IMAGE)])
            ),
            {"batch.pairs[0].text"},
        ),
        (modality_service_pb2.ScoreModalityRequest(batch=modality_service_pb2.PairBatch()), {"batch.pairs"}),
        (model_service_pb2.GetModelRequest(bundle="b" * 257), {"bundle"}),
    ],
)
def test_each_rule_names_its_field(message: Any, fields: set[str]) -> None:
    assert fields_of(message) == fields


def test_every_file_of_the_contract_is_walked() -> None:
    written = {f"monofacet/v1/{path.name}" for path in (ROOT / "protos" / "monofacet" / "v1").glob("*.proto")}
    assert {file.name for file in contract_files()} == written


def test_every_answer_carries_timings_and_the_bundle() -> None:
    methods = contract_methods()
    # The table of scopes has a row for each, or the server does not start.
    assert methods.keys() == {f"/{name}" for name in SCOPES if name.startswith("monofacet.")}
    for name, method in methods.items():
        fields = method.output_type.fields_by_name
        # A stream of several kinds of messages has them in the last, or in the first.
        messages = [method.output_type, *(f.message_type for f in fields.values() if f.containing_oneof)]
        carry = [m for m in messages if m is not None and {"timings", "bundle"} <= set(m.fields_by_name)]
        assert carry, name
        for message in carry:
            assert message.fields_by_name["timings"].message_type.full_name == "monofacet.v1.Timings", name


def test_zero_of_every_enum_is_unspecified() -> None:
    enums = [
        enum
        for file in contract_files()
        for holder in (file, *messages_of(file))
        for enum in holder.enum_types_by_name.values()
    ]
    assert {enum.file.name.rpartition("/")[2] for enum in enums} >= {
        "bias_service.proto",
        "common.proto",
        "defense_service.proto",
        "imaging_service.proto",
    }
    for enum in enums:
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")


def messages_of(holder: Any) -> list[Any]:
    """Return the messages of a file, or of a message, and those within them."""
    direct = getattr(holder, "message_types_by_name", None) or getattr(holder, "nested_types_by_name", {})
    return [inner for message in direct.values() for inner in (message, *messages_of(message))]


def test_the_client_imports_nothing_of_the_server() -> None:
    # In a process of its own: here, the other tests have imported half of the world.
    code = (
        "import sys, monofacet.cli, monofacet.testing;"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'services', 'deployments', 'training', 'torch', 'ray', 'protovalidate', 'scipy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_installed_buf_validate_is_used_instead_of_ours(tmp_path: Path) -> None:
    # A second definition of the same file in one process is an error; the application's own must win.
    package = tmp_path / "buf" / "validate"
    package.mkdir(parents=True)
    (package / "validate_pb2.py").write_text((STUBS / "_validate_pb2.py").read_text() + "\nFOREIGN = True\n")
    code = (
        "import monofacet.v1.common_pb2, sys; from buf.validate import validate_pb2;"
        "print(validate_pb2.FOREIGN, 'monofacet.v1._validate_pb2' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout.strip() == "True False"
