"""filter_adversarial of both clients and of the command line, against the fake."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import monofacet
import numpy as np
import PIL.Image
import pytest
from monofacet import FilterMode, SuspicionReason, Verdict
from monofacet.cli import app
from monofacet.testing import FakeMonofacet, mock_async_client, mock_client, run_server
from monofacet.v1 import common_pb2, defense_service_pb2, model_service_pb2
from typer.testing import CliRunner

protovalidate = pytest.importorskip("protovalidate")

Filter = Callable[..., monofacet.FilterResult]


def picture(colour: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (8, 8), (colour, 10, 20))


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def filtering(request: pytest.FixtureRequest) -> Callable[..., Filter]:
    """Return a function from a service to `filter_adversarial` of one of the clients."""

    def make(service: FakeMonofacet | None = None) -> Filter:
        client: Any = (mock_async_client if request.param else mock_client)(service)[0]

        def call(*args: Any, **kwargs: Any) -> monofacet.FilterResult:
            value = client.filter_adversarial(*args, **kwargs)

            async def wait() -> monofacet.FilterResult:
                result: monofacet.FilterResult = await value
                return result

            return asyncio.run(wait()) if inspect.isawaitable(value) else value

        return call

    return make


class Recording(FakeMonofacet):
    """Keeps the requests, and says that it takes few items."""

    def __init__(self, max_inputs: int = 256) -> None:
        super().__init__()
        self.requests: list[defense_service_pb2.FilterAdversarialRequest] = []
        self.max_inputs = max_inputs

    def FilterAdversarial(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return super().FilterAdversarial(request, context)

    def GetModel(self, request: model_service_pb2.GetModelRequest, context: Any) -> Any:
        response = super().GetModel(request, context)
        response.model.limits.max_inputs = self.max_inputs
        return response


def test_each_image_gets_its_own_verdict_and_embeddings(filtering: Callable[..., Filter]) -> None:
    result = filtering()([picture(c) for c in range(0, 240, 12)], second_look=True)
    assert {image.verdict for image in result.images} == {Verdict.CLEAN, Verdict.ADVERSARIAL}
    for image in result.images:
        assert image.before.shape == image.after.shape == (8,)
        assert image.filtered == image.adversarial
        # The fake drops feature 0, which the embedding's first coordinate is.
        assert np.array_equal(image.before, image.after) != image.adversarial
        assert image.scores.instability is not None
        if image.adversarial:
            assert image.features[0].reasons == (SuspicionReason.MOVED,)
            assert image.features[0].filtered == 0
            assert image.suspicious_features == 1
    assert (result.mode, result.dictionary, len(result)) == (FilterMode.DROP, "fake-sae", 20)


def test_without_a_second_look_there_is_no_instability(filtering: Callable[..., Filter]) -> None:
    assert filtering()(picture(1)).images[0].scores.instability is None


def test_labels_are_the_callers_or_the_bundles(filtering: Callable[..., Filter]) -> None:
    assert filtering()(picture(1), labels=["lamp", "tree"]).images[0].label_before.text in {"lamp", "tree"}
    assert filtering()(picture(1)).images[0].label_before.text in {"cat", "dog", "house"}


def test_options_are_sent_and_defaults_stay_unset(filtering: Callable[..., Filter]) -> None:
    service = Recording()
    call = filtering(service)
    call(picture(1))
    call(picture(1), mode="keep_normal", keep_residual=False, filter_all=True, max_features=0)
    plain, full = (request.options for request in service.requests)
    assert (plain.mode, plain.HasField("keep_residual"), plain.max_features) == (0, False, 20)
    assert full.mode == defense_service_pb2.FILTER_MODE_KEEP_NORMAL
    assert (full.keep_residual, full.HasField("keep_residual"), full.filter_all) == (False, True, True)


def test_labels_take_room_from_the_images_of_a_call(filtering: Callable[..., Filter]) -> None:
    service = Recording(max_inputs=10)
    images = [picture(c) for c in range(31)]
    result = filtering(service)(images, labels=["a", "b", "c", "d"])
    assert len(result) == 31
    assert [len(request.images) for request in service.requests] == [6, 6, 6, 6, 6, 1]
    for request in service.requests:
        protovalidate.validate(request)


def test_a_bad_image_of_a_later_part_is_named_by_its_place_in_the_batch(
    filtering: Callable[..., Filter],
) -> None:
    images = [picture(c) for c in range(33)]
    with pytest.raises(monofacet.InvalidInputError) as caught:
        filtering(Recording(max_inputs=16))([*images[:20], b"no image", *images[20:]])
    assert [violation.field for violation in caught.value.violations] == ["images[20].data"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"labels": ["alone"]},
        {"labels": "one text"},
        {"labels": [str(i) for i in range(256)]},
        {"mode": "guess"},
        {"max_features": 1001},
        {"max_features": -1},
    ],
)
def test_what_cannot_be_sent_is_refused_here(
    filtering: Callable[..., Filter], arguments: dict[str, Any]
) -> None:
    service = Recording()
    with pytest.raises(monofacet.InputError):
        filtering(service)(picture(1), **arguments)
    assert service.requests == []


def test_texts_are_refused(filtering: Callable[..., Filter]) -> None:
    with pytest.raises(monofacet.InputError, match="only images"):
        filtering()(["a text"])


def test_an_answer_of_the_wrong_size_is_an_error(filtering: Callable[..., Filter]) -> None:
    class Short(FakeMonofacet):
        def FilterAdversarial(self, request: Any, context: Any) -> Any:
            response = super().FilterAdversarial(request, context)
            del response.images[-1]
            return response

    with pytest.raises(monofacet.ResponseError, match="1 verdicts"):
        filtering(Short())([picture(1), picture(2)])


def test_a_word_of_a_newer_contract_is_an_error_and_not_a_guess(filtering: Callable[..., Filter]) -> None:
    class Vague(FakeMonofacet):
        def FilterAdversarial(self, request: Any, context: Any) -> Any:
            response = super().FilterAdversarial(request, context)
            response.images[0].verdict = defense_service_pb2.VERDICT_UNSPECIFIED
            return response

    with pytest.raises(monofacet.ResponseError, match="VERDICT_UNSPECIFIED"):
        filtering(Vague())(picture(1))


@pytest.mark.parametrize(
    ("request_message", "fields"),
    [
        (defense_service_pb2.FilterAdversarialRequest(), ["images"]),
        (
            defense_service_pb2.FilterAdversarialRequest(images=[common_pb2.Image(data=b"x")] * 257),
            ["images"],
        ),
        (
            defense_service_pb2.FilterAdversarialRequest(images=[common_pb2.Image(data=b"x")], labels=["a"]),
            ["labels"],
        ),
        (
            defense_service_pb2.FilterAdversarialRequest(
                images=[common_pb2.Image(data=b"x")],
                options=defense_service_pb2.FilterOptions(mode=9, max_features=1001),  # type: ignore[arg-type]
            ),
            ["options", "options"],
        ),
        (
            defense_service_pb2.FilterAdversarialRequest(
                images=[common_pb2.Image(data=b"x")] * 256, labels=["a", "b"]
            ),
            [],
        ),
    ],
)
def test_the_contracts_rules_hold(request_message: Any, fields: list[str]) -> None:
    violations = protovalidate.collect_violations(request_message)
    assert [v.proto.field.elements[0].field_name for v in violations] == fields


def run(target: str, *arguments: Any) -> Any:
    environment = {"MONOFACET_TARGET": target, "COLUMNS": "250", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["filter", *map(str, arguments)], env=environment)


def test_the_command_shows_verdicts_and_writes_arrays(tmp_path: Path) -> None:
    for colour in range(0, 240, 24):
        picture(colour).save(tmp_path / f"{colour:03}.png")
    out = tmp_path / "out.npz"
    with run_server() as target:
        done = run(target, tmp_path, "--second-look", "--out", out)
        as_json = run(target, tmp_path, "--json", "--label", "lamp", "--label", "tree")
        missing = run(target, "missing.png")
        text = run(target, "a text")
        bad_mode = run(target, tmp_path / "000.png", "--mode", "guess")
    assert done.exit_code == 0, done.output
    with np.load(out) as arrays:
        flagged = int(arrays["adversarial"].sum())
        assert arrays["before"].shape == arrays["after"].shape == (10, 8)
    assert f"{flagged} of 10 images are called adversarial" in done.output
    answer = json.loads(as_json.stdout)
    assert sum(image["verdict"] == "ADVERSARIAL" for image in answer["result"]["images"]) == flagged
    assert {image["label_before"]["text"] for image in answer["result"]["images"]} <= {"lamp", "tree"}
    assert [item.exit_code for item in (missing, text, bad_mode)] == [3, 3, 3]


def test_an_unavailable_method_is_said_to_be_so() -> None:
    class Old(FakeMonofacet):
        def FilterAdversarial(self, request: Any, context: Any) -> Any:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")

    client, _ = mock_client(Old())
    with pytest.raises(monofacet.UnsupportedError):
        client.filter_adversarial(picture(1))
