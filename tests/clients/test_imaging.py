"""Generation by both clients and by the command, against the fake."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import monofacet
import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from monofacet import GeneratedImage, GenerationPreview, GenerationProgress, SteeringAttribute, SteeringEdit
from monofacet._imaging_requests import generate, request_of
from monofacet.cli._app import app
from monofacet.testing import FakeMonofacet, run_server
from monofacet.v1 import common_pb2, imaging_service_pb2
from typer.testing import CliRunner

from tests.clients.conftest import Both

PIXELS = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def both(request: pytest.FixtureRequest) -> Callable[..., Both]:
    return lambda **options: Both(request.param, **options)


def test_images_come_in_the_order_of_their_seeds_with_twins_beside_them(both: Callable[..., Both]) -> None:
    edit = SteeringEdit("image", quantile=0.9)
    result = both().generate("a cat", seeds=[3, 1, 2], edits=[edit], unsteered=True)
    assert [image.seed for image in result.images] == [3, 1, 2]
    assert [image.seed for image in result.twins] == [3, 1, 2]
    assert all(image.delta > 0 for image in result.images)
    assert all(image.delta == 0 for image in result.twins)
    assert result.images[0].image.size == (64, 64)
    assert len(result) == 3


def test_events_tell_every_step_and_the_previews_that_were_asked_for(both: Callable[..., Both]) -> None:
    events = both().generate_events("a cat", seeds=7, steps=4, preview_every=2)
    progress = [event for event in events if isinstance(event, GenerationProgress)]
    assert [event.steps for event in progress] == [(1,), (2,), (3,), (4,)]
    assert [event.fraction for event in progress] == [0.25, 0.5, 0.75, 1.0]
    assert [event.step for event in events if isinstance(event, GenerationPreview)] == [2]
    assert isinstance(events[-1], GeneratedImage)


def test_a_callback_sees_what_the_events_are(both: Callable[..., Both]) -> None:
    seen: list[Any] = []
    both().generate("a cat", seeds=7, steps=2, on_event=seen.append)
    assert [type(event) for event in seen] == [GenerationProgress, GenerationProgress, GeneratedImage]


def test_an_image_that_failed_says_why_and_the_others_are_there(both: Callable[..., Both]) -> None:
    result = both().generate("a broken image", seeds=[1, 2])
    assert [image.ok for image in result.images] == [True, False]
    with pytest.raises(monofacet.ServerError) as caught:
        _ = result.images[1].image
    assert caught.value.reason == "GENERATION_FAILED"


def test_an_image_is_made_again_from_itself(both: Callable[..., Both]) -> None:
    clients = both()
    edits = [SteeringEdit((1, 2), reference=PIXELS, strength=0.5), SteeringEdit("text", scale=0.0)]
    made = clients.generate("a cat", seeds=[5, 6], edits=edits, image=PIXELS, unsteered=True)
    for original in (*made.images, *made.twins):
        (again,) = clients.generate_like(original.data).images
        assert again.image.tobytes() == original.image.tobytes()
        assert again.seed == original.seed


def test_an_image_that_does_not_carry_its_request_is_refused(tmp_path: Path) -> None:
    PIL.Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    with pytest.raises(monofacet.InputError, match="does not say"):
        request_of(tmp_path / "plain.png")
    with pytest.raises(monofacet.InputError, match="cannot be read"):
        request_of(b"no picture")


def over_long() -> bytes:
    """A PNG with more text than Pillow takes."""
    file, chunks = io.BytesIO(), PIL.PngImagePlugin.PngInfo()
    chunks.add_itxt("monofacet.request", "x" * 2 * 1024 * 1024, zip=True)
    PIL.Image.fromarray(PIXELS).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def cut() -> bytes:
    file = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()[:1000]


class Damaged(FakeMonofacet):
    """Gives the same file for every image."""

    def __init__(self, file: bytes) -> None:
        self.file = file

    def _file(self, *_: Any) -> bytes:
        return self.file


@pytest.mark.parametrize("make", [over_long, cut, lambda: b"no picture"])
def test_an_image_that_cannot_be_decoded_is_an_error_of_this_client(
    both: Callable[..., Both], make: Callable[[], bytes]
) -> None:
    clients = both(service=Damaged(make()))
    (image,) = clients.generate("a cat", seeds=1).images
    with pytest.raises(monofacet.ResponseError, match="image 0 cannot be decoded"):
        _ = image.image
    with pytest.raises(monofacet.ResponseError, match="the preview of image 0"):
        clients.generate("a cat", seeds=1, preview_every=1)
    with pytest.raises(monofacet.InputError, match="cannot be read"):
        clients.generate_like(image.data)


def test_a_missing_file_to_make_again_is_named(both: Callable[..., Both], tmp_path: Path) -> None:
    with pytest.raises(monofacet.InputError, match=r"gone\.png: No such file"):
        both().generate_like(tmp_path / "gone.png")


def test_a_generation_is_tried_again_until_its_first_event(both: Callable[..., Both]) -> None:
    clients = both()
    clients.channel.fail(grpc.StatusCode.UNAVAILABLE, times=2)
    assert len(clients.generate("a cat", seeds=1).images) == 1
    assert len(clients.channel.calls) == 3


def test_a_full_queue_is_waited_out(both: Callable[..., Both]) -> None:
    clients = both()
    clients.channel.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_after=0.001)
    assert len(clients.generate("a cat", seeds=1).images) == 1


def test_a_server_without_a_pipeline_is_an_unsupported_call(both: Callable[..., Both]) -> None:
    clients = both()
    clients.channel.fail(grpc.StatusCode.UNIMPLEMENTED, reason="NO_PIPELINE")
    with pytest.raises(monofacet.UnsupportedError) as caught:
        clients.generate("a cat")
    assert caught.value.reason == "NO_PIPELINE"


def test_leaving_the_events_early_ends_the_call() -> None:
    class Endless(FakeMonofacet):
        active: Any = None

        def Generate(self, request: Any, context: Any) -> Any:
            Endless.active = context.is_active
            while context.is_active():
                yield imaging_service_pb2.GenerateResponse(
                    progress=imaging_service_pb2.GenerateProgress(steps=[1], num_inference_steps=9)
                )

    with run_server(Endless()) as target, monofacet.Client(target) as client:
        for _ in client.generate_events("a cat"):
            break
    assert Endless.active is not None
    assert not Endless.active()


def test_what_is_sent_is_what_was_asked() -> None:
    request = generate(
        "a cat",
        {
            "negative_prompt": "dog",
            "edits": [SteeringEdit(3, reference="a dog", strength=0.25)],
            "dictionary": "sae",
            "path": "prompt",
            "contrastive": True,
            "delta": 0.2,
            "attributes": ["smile", SteeringAttribute("blue", 1.5)],
            "dose": 0.75,
            "seeds": 9,
            "steps": 12,
            "guidance": 4.0,
            "height": 32,
            "format": "webp",
        },
    )
    (edit,) = request.steering.edits
    assert (list(edit.ids.ids), edit.reference.text, edit.strength) == ([3], "a dog", 0.25)
    assert request.steering.path == imaging_service_pb2.STEERING_PATH_PROMPT
    assert request.steering.guidance == imaging_service_pb2.STEERING_GUIDANCE_CONTRASTIVE
    assert round(request.steering.delta, 6) == 0.2
    assert (list(request.seeds), request.num_inference_steps, request.height) == ([9], 12, 32)
    assert request.steering.dose == 0.75
    turned = [(t.name, t.strength if t.HasField("strength") else None) for t in request.steering.attributes]
    assert turned == [("smile", None), ("blue", 1.5)]
    assert not generate("a cat", {}).HasField("steering")
    assert generate("a cat", {"attributes": "smile"}).steering.attributes[0].name == "smile"


def test_attributes_are_listed_and_turned(both: Callable[..., Both]) -> None:
    found = both().attributes()
    assert [one.name for one in found.attributes] == ["blue", "smile"]
    assert (len(found), found.unit_dose) == (2, 0.75)
    blue, smile = found.attributes
    assert blue.measures is not None
    assert (blue.measures.hit.low, blue.measures.concept_kept.value) == (0.5, 0.75)
    assert smile.measures is None
    assert smile.features.indices.tolist() == [3, 1]
    assert both().attribute("smile").group == "expression"
    preview = both().preview_steering("a cat", attributes="smile")
    assert preview.dose == pytest.approx(2 * preview.delta)
    (image,) = both().generate("a cat", attributes=[SteeringAttribute("smile", 0.5)], seeds=1).images
    assert (image.delta, image.dose) == (0.25, 0.5)
    with pytest.raises(monofacet.CallError) as caught:
        both().attribute("green")
    assert caught.value.reason == "UNKNOWN_ATTRIBUTE"


@pytest.mark.parametrize(
    "options",
    [
        {"edits": [SteeringEdit("image")]},
        {"edits": [SteeringEdit("image", scale=0.0, quantile=0.5)]},
        {"edits": [SteeringEdit((), scale=0.0)]},
        {"edits": [SteeringEdit("no label", scale=0.0)]},
        {"edits": [SteeringEdit(-1, scale=0.0)]},
        {"edits": [SteeringEdit(1, scale=0.0)], "path": "somewhere"},
        {"format": "gif"},
        {"seeds": -1},
        {"strenght": 1},
    ],
)
def test_what_cannot_be_sent_is_refused_here(options: Any) -> None:
    with pytest.raises(monofacet.InputError):
        generate("a cat", options)


def test_a_preview_tells_features_and_captions_before_and_after(both: Callable[..., Both]) -> None:
    edit = SteeringEdit(range(20), scale=2.0)
    preview = both().preview_steering("a cat", edit, max_captions=3, max_features=4)
    assert len(preview.captions) == len(preview.steered_captions) == 3
    assert preview.delta > 0
    np.testing.assert_allclose(preview.steered_features.values, 2 * preview.features.values, rtol=1e-6)
    assert len(preview.features) <= 4
    with pytest.raises(monofacet.InputError):
        both().preview_steering("a cat", edit, max_captions=101)


def test_a_model_tells_its_pipeline(both: Callable[..., Both]) -> None:
    pipeline = both().model().pipeline
    assert pipeline is not None
    assert pipeline.paths == ("embedding", "prompt")
    assert (pipeline.height, pipeline.num_inference_steps, pipeline.ready) == (64, 4, True)


def test_the_models_command_tells_what_draws_and_how_it_is_steered() -> None:
    with run_server(FakeMonofacet()) as target:
        result = CliRunner().invoke(app, ["models", "--target", target], env={"COLUMNS": "200"})
    assert "64 x 64 pixels in 4 steps" in result.output
    assert "steered by: embedding, prompt" in result.output


@pytest.fixture(scope="module")
def command() -> Any:
    runner = CliRunner()
    with run_server(FakeMonofacet()) as target:
        yield lambda *arguments: runner.invoke(app, ["generate", *map(str, arguments), "--target", target])


def test_the_command_writes_one_image_as_the_server_made_it(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    result = command("a cat", "--seed", 7, "--out", out)
    assert result.exit_code == 0, result.output
    assert list(request_of(out).seeds) == [7]
    again = tmp_path / "again.png"
    assert command("--like", out, "--out", again).exit_code == 0
    assert again.read_bytes() == out.read_bytes()


def test_the_command_puts_twins_below_their_images(command: Any, tmp_path: Path) -> None:
    PIL.Image.fromarray(PIXELS).save(tmp_path / "x.png")
    out = tmp_path / "grid.png"
    options = ("--from-image", tmp_path / "x.png", "--label", "image", "--strength", 0.6, "--twin")
    result = command(
        "woman firefighter", *options, "-n", 3, "--seed", 7, "--out", out, "--folder", tmp_path / "all"
    )
    assert result.exit_code == 0, result.output
    with PIL.Image.open(out) as sheet:
        assert sheet.size == (3 * 68 + 4, 2 * 68 + 4)
    files = sorted(file.name for file in (tmp_path / "all").iterdir())
    assert files[:2] == ["00-seed-7-unsteered.png", "00-seed-7.png"]
    assert len(files) == 6
    request = request_of(tmp_path / "all/01-seed-8.png")
    (edit,) = request.steering.edits
    assert edit.label == common_pb2.MODALITY_LABEL_IMAGE
    assert round(edit.strength, 6) == 0.6
    assert PIL.Image.open(io.BytesIO(edit.reference.image.data)).size == (8, 8)


def test_the_command_says_which_image_cannot_be_decoded(tmp_path: Path) -> None:
    with run_server(Damaged(over_long())) as target:
        arguments = ["generate", "a cat", "-n", "2", "--out", str(tmp_path / "x.png"), "--target", target]
        shown = CliRunner().invoke(app, arguments)
        as_json = CliRunner().invoke(app, [*arguments, "--json"])
    assert (shown.exit_code, as_json.exit_code) == (1, 1)
    assert "error: image 0 cannot be decoded" in shown.output
    assert "Traceback" not in shown.output
    assert json.loads(as_json.stderr)["error"]["kind"] == "ResponseError"


def test_the_command_prints_json_for_programs(command: Any, tmp_path: Path) -> None:
    result = command("a broken image", "--seed", 1, "--seed", 2, "--out", tmp_path / "x.png", "--json")
    assert result.exit_code == 1
    described = json.loads(result.stdout)
    assert [image["seed"] for image in described["images"]] == [1, 2]
    assert described["images"][1]["error"]["reason"] == "GENERATION_FAILED"


@pytest.mark.parametrize(
    "options",
    [
        ("--label", "image"),
        ("--quantile", 0.5),
        ("--label", "image", "--feature", 1, "--scale", 0),
        ("--label", "image", "--scale", 0, "--quantile", 0.5),
        ("--like", "nowhere.png"),
        ("--out", "nowhere/x.png"),
        ("--seed", 1, "--seed", 2, "-n", 3),
    ],
)
def test_the_command_says_what_is_wrong(command: Any, options: Any, tmp_path: Path) -> None:
    result = command("a cat", *(options if "--out" in options else (*options, "--out", tmp_path / "x.png")))
    assert result.exit_code == 3
    assert "error" in result.output


@pytest.fixture(scope="module")
def preview() -> Any:
    runner = CliRunner()
    with run_server(FakeMonofacet()) as target:
        yield lambda *arguments: runner.invoke(
            app, ["preview", *map(str, arguments), "--target", target], env={"COLUMNS": "200"}
        )


def test_the_preview_command_shows_features_and_captions_before_and_after(preview: Any) -> None:
    shown = preview("a cat", "--label", "image", "--quantile", 0.9)
    assert shown.exit_code == 0, shown.output
    assert "nearest captions before" in shown.output
    told = json.loads(preview("a cat", "--label", "image", "--quantile", 1, "--captions", 2, "--json").stdout)
    assert 0 < told["delta"] <= 2
    assert len(told["captions"]) == len(told["steered_captions"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give an edit"),
        (("--label", "image"), "an edit is one of"),
        (("--feature", 1, "--from-text", "a", "--from-image", "b.png"), "not both"),
    ],
)
def test_the_preview_command_says_what_an_edit_needs(preview: Any, arguments: Any, message: str) -> None:
    result = preview("a cat", *arguments)
    assert result.exit_code == 3
    assert message in result.output


def test_the_attributes_command_lists_cards_and_others_turn_them(preview: Any) -> None:
    runner = CliRunner()
    with run_server(FakeMonofacet()) as target:

        def command(*arguments: Any) -> Any:
            options = [*map(str, arguments), "--target", target]
            return runner.invoke(app, options, env={"COLUMNS": "200"})

        shown = command("attributes")
        assert shown.exit_code == 0, shown.output
        assert "75% [50%, 88%]" in shown.output
        assert "expression" in shown.output
        one = command("attributes", "smile")
        assert "-0.500" in one.output
        told = json.loads(command("attributes", "--json").stdout)
        assert told["attributes"][0]["measures"]["hit"]["low"] == 0.5
        missing = command("attributes", "green")
        assert missing.exit_code != 0
    assert preview("a cat", "--attribute", "smile").exit_code == 0
    halved = json.loads(preview("a cat", "--attribute", "smile=0.5", "--json").stdout)
    assert halved["dose"] > 0
    assert preview("a cat", "--attribute", "smile=much").exit_code == 3
