"""ImagingService.Generate over gRPC, on a debug pipeline, without Ray."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
from google.protobuf import json_format
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet.v1 import common_pb2, model_service_pb2, model_service_pb2_grpc
from monofacet.v1 import imaging_service_pb2 as pb

from deployments.gateway.pictures import REFERENCES_LEFT_OUT, picture
from deployments.gateway.services import IMAGING
from services.errors import SteeringUnsupported
from tests.deployments.conftest import error_details
from tests.deployments.imaging.conftest import INFO, Gateway, Open, events, preview
from tests.support.waiting import PATIENCE_S, until


def chunk(data: bytes) -> pb.GenerateRequest:
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.load()
        text: str = image.text["monofacet.request"]  # type: ignore[attr-defined]
    return json_format.Parse(text, pb.GenerateRequest())


async def test_a_generation_tells_progress_and_ends_with_its_images(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        request = pb.GenerateRequest(prompt="a", seeds=[7, 8], include_unsteered=True, preview_every=2)
        responses = await events(gateway.imaging.Generate(request))
        assert {response.bundle for response in responses} == {gateway.bundle.id}
        progress = [r.progress for r in responses if r.WhichOneof("event") == "progress"]
        assert [list(p.steps) for p in progress] == [[step] * 4 for step in (1, 2, 3, 4)]
        previews = [r.preview for r in responses if r.WhichOneof("event") == "preview"]
        assert {(p.index, p.unsteered, p.step) for p in previews} == {
            (index, twin, 2) for index in (0, 1) for twin in (False, True)
        }
        images = [r.image for r in responses if r.WhichOneof("event") == "image"]
        assert sorted((i.index, i.unsteered, i.seed, i.delta) for i in images) == [
            (0, False, 7, 0.5), (0, True, 7, 0.0), (1, False, 8, 0.5), (1, True, 8, 0.0)
        ]  # fmt: skip
        assert all(i.finish_reason == pb.FINISH_REASON_COMPLETED for i in images)
        assert gateway.sample("monofacet_generation_steps_total") == 16
        assert gateway.sample("monofacet_batch_size_count", deployment="generator") == 4
        assert gateway.sample("monofacet_items_total", method="monofacet.v1.ImagingService/Generate") == 4


async def test_a_generation_keeps_the_limit_of_texts(open_gateway: Open) -> None:
    edit = pb.SteeringEdit(label=common_pb2.MODALITY_LABEL_TEXT, reference=common_pb2.Input(text="c" * 9))
    asked = pb.GenerateRequest(
        # Four characters of two bytes are within it, five are not.
        prompt="é" * 4, negative_prompt="é" * 5, steering=pb.Steering(edits=[edit])
    )  # fmt: skip
    async with open_gateway(max_text_bytes=8) as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await events(gateway.imaging.Generate(asked))
        assert not gateway.model.prepared
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    fields = ["negative_prompt", "steering.edits[0].reference.text"]
    assert error_details(caught.value)[:2] == ("TEXT_TOO_LONG", fields)


async def test_each_png_carries_the_request_that_makes_it_alone(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        edit = pb.SteeringEdit(label=common_pb2.MODALITY_LABEL_IMAGE, scale=0.0)
        asked = pb.GenerateRequest(
            prompt="a", seeds=[7, 8], include_unsteered=True, steering=pb.Steering(edits=[edit])
        )
        responses = await events(gateway.imaging.Generate(asked))
        for image in (r.image for r in responses if r.WhichOneof("event") == "image"):
            told = chunk(image.image.data)
            assert (list(told.seeds), told.num_images) == ([image.seed], 1)
            assert (told.height, told.width, told.num_inference_steps, told.guidance_scale) == (64, 64, 4, 3)
            assert bool(told.steering.edits) is not image.unsteered
            (again,) = [
                r.image
                for r in await events(gateway.imaging.Generate(told))
                if r.WhichOneof("event") == "image"
            ]
            assert again.image.data == image.image.data


def left_out(data: bytes) -> bool:
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.load()
        return REFERENCES_LEFT_OUT in image.text  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("size", "carries"),
    # As JSON 0.93, 1.07, 1.2, 1.4 and 2.7 MB, of which Pillow opens no more than 1.05 MB.
    [(700_000, True), (800_000, False), (900_000, False), (1024 * 1024, False), (2_000_000, False)],
)
def test_references_too_large_to_carry_are_left_out_and_said_to_be(size: int, carries: bool) -> None:
    request = pb.GenerateRequest(prompt="a", image=common_pb2.Image(data=b"x" * size))
    data = picture(np.zeros((2, 2, 3), np.uint8), pb.IMAGE_FORMAT_PNG, request, "tiny@0")
    assert left_out(data) is not carries
    assert chunk(data).HasField("image") is carries
    assert chunk(data).prompt == "a"
    assert len(data) < 3_000


def test_edits_too_large_to_carry_are_left_out_and_a_picture_with_the_longest_texts_opens() -> None:
    ids = pb.SteeredFeatures(ids=range(65_536))
    # JSON writes the character in six.
    texts = {"prompt": "\x01" * 65_536, "negative_prompt": "\x01" * 65_536}
    request = pb.GenerateRequest(**texts, steering=pb.Steering(edits=[pb.SteeringEdit(ids=ids, scale=0)] * 3))
    data = picture(np.zeros((2, 2, 3), np.uint8), pb.IMAGE_FORMAT_PNG, request, "tiny@0")
    assert left_out(data)
    assert chunk(data) == pb.GenerateRequest(**texts)


async def test_webp_has_the_same_pixels(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        pixels = []
        for image_format in (pb.IMAGE_FORMAT_PNG, pb.IMAGE_FORMAT_WEBP):
            request = pb.GenerateRequest(prompt="a", seeds=[9], format=image_format)
            data = (await events(gateway.imaging.Generate(request)))[-1].image.image.data
            pixels.append(PIL.Image.open(io.BytesIO(data)).convert("RGB").tobytes())
        assert pixels[0] == pixels[1]


async def test_seeds_that_were_not_given_are_drawn_and_told(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        seeds = set()
        for _ in range(2):
            responses = await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="a", num_images=2)))
            seeds |= {r.image.seed for r in responses if r.WhichOneof("event") == "image"}
        assert len(seeds) == 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_images": 2, "seeds": [1]}, ""),
        ({"num_images": 65}, "num_images"),
        ({"num_images": 9, "include_unsteered": True}, "num_images"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"seeds": [2**63]}, "seeds[0]"),
        ({"steering": pb.Steering(edits=[pb.SteeringEdit(scale=0)])}, "steering.edits[0].features"),
        (
            {"steering": pb.Steering(edits=[pb.SteeringEdit(label=common_pb2.MODALITY_LABEL_TEXT)])},
            "steering.edits[0].operation",
        ),
        (
            {
                "steering": pb.Steering(
                    edits=[pb.SteeringEdit(label=common_pb2.MODALITY_LABEL_TEXT, scale=0, strength=5)]
                )
            },
            "steering.edits[0].strength",
        ),
        ({"steering": pb.Steering(delta=3)}, "steering.delta"),
        ({"prompt": "bad"}, "prompt"),
    ],
)
async def test_a_bad_request_names_its_field(open_gateway: Open, change: Any, field: str) -> None:
    async with open_gateway() as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await events(gateway.imaging.Generate(pb.GenerateRequest(**{"prompt": "a", **change})))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error_details(caught.value)[1] in ([field], [])


async def test_a_bundle_without_a_pipeline_says_so_and_still_previews(open_gateway: Open) -> None:
    async with open_gateway(pipeline=False) as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="a")))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert error_details(caught.value)[0] == "NO_PIPELINE"
        assert (await health(gateway))[IMAGING] == "SERVING"
        answer = await gateway.imaging.PreviewSteering(preview())
        assert answer.features.dictionary == "sae"


async def test_steering_that_the_pipeline_cannot_do_is_a_failed_precondition(open_gateway: Open) -> None:
    async with open_gateway() as gateway:

        def refuse(work: Any) -> Any:
            raise SteeringUnsupported("penultimate layer", reason="STEERING_PATH_UNSUPPORTED")

        gateway.model.prepare = refuse  # type: ignore[method-assign]
        with pytest.raises(aio.AioRpcError) as caught:
            await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="a")))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "penultimate layer"
        assert error_details(caught.value)[0] == "STEERING_PATH_UNSUPPORTED"


async def test_an_image_that_fails_is_told_beside_those_that_did_not(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        good, bad = await asyncio.gather(
            events(gateway.imaging.Generate(pb.GenerateRequest(prompt="good", seeds=[1]))),
            events(gateway.imaging.Generate(pb.GenerateRequest(prompt="crash", seeds=[1]))),
        )
        assert good[-1].image.finish_reason == pb.FINISH_REASON_COMPLETED
        assert bad[-1].image.finish_reason == pb.FINISH_REASON_FAILED
        assert bad[-1].image.error.code == grpc.StatusCode.INTERNAL.value[0]
        assert not bad[-1].image.HasField("image")


async def test_a_cancelled_call_stops_its_steps(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        gateway.model.hold()
        call = gateway.imaging.Generate(pb.GenerateRequest(prompt="leaving", num_inference_steps=50))
        await asyncio.to_thread(gateway.model.let_one_step)
        await anext(aiter(call))
        assert await asyncio.to_thread(gateway.model.entered.acquire, timeout=PATIENCE_S)
        call.cancel()
        method = "monofacet.v1.ImagingService/Generate"
        await until(lambda: gateway.sample("monofacet_requests_in_flight", method=method) == 0)
        gateway.model.release()
        await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="next")))
        assert gateway.model.steps_of("leaving") <= 2


async def test_images_that_wait_are_counted_beside_what_may_wait(open_gateway: Open) -> None:
    async with open_gateway(max_queued_images=9) as gateway:

        def counted() -> tuple[float, float, float]:
            labels = {"limit": "max_queued_images", "deployment": "generator"}
            return (
                gateway.sample("monofacet_queue_items", deployment="generator"),
                gateway.sample("monofacet_limit_used", **labels),
                gateway.sample("monofacet_limit", **labels),
            )

        gateway.model.hold()
        call = gateway.imaging.Generate(pb.GenerateRequest(prompt="a", seeds=[1, 2, 3]))
        await asyncio.to_thread(gateway.model.let_one_step)
        assert counted() == (3, 3, 9)
        gateway.model.release()
        await events(call)
        assert counted() == (0, 0, 9)


async def test_a_preview_that_breaks_is_told_and_the_next_call_is_answered(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="blind", preview_every=1)))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in caught.value.details()
        (*_, last) = await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="next")))
        assert last.HasField("image")


async def test_a_deadline_is_kept(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        gateway.model.hold()
        with pytest.raises(aio.AioRpcError) as caught:
            await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="late"), timeout=0.3))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gateway.model.release()
        await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="next")))
        assert gateway.model.steps_of("late") <= 1


async def test_a_full_queue_says_when_to_come_back(open_gateway: Open) -> None:
    async with open_gateway(max_queued_images=1, max_batch_images=1) as gateway:
        gateway.model.hold()
        first = asyncio.ensure_future(events(gateway.imaging.Generate(pb.GenerateRequest(prompt="a"))))
        assert await asyncio.to_thread(gateway.model.entered.acquire, timeout=PATIENCE_S)
        second = asyncio.ensure_future(events(gateway.imaging.Generate(pb.GenerateRequest(prompt="b"))))
        while len(gateway.model.prepared) < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(aio.AioRpcError) as caught:
            await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="c")))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_details(caught.value)[0] == "QUEUE_FULL"
        assert error_details(caught.value)[2] is not None
        gateway.model.release()
        await asyncio.gather(first, second)


async def health(gateway: Gateway) -> dict[str, str]:
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    return {
        name: health_pb2.HealthCheckResponse.ServingStatus.Name(
            (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
        )
        for name in ("", IMAGING)
    }


async def test_only_images_wait_for_the_generator(open_gateway: Open) -> None:
    async with open_gateway(warm=False) as gateway:
        assert await health(gateway) == {"": "SERVING", IMAGING: "NOT_SERVING"}
        models = model_service_pb2_grpc.ModelServiceStub(gateway.channel)
        before = (await models.GetModel(model_service_pb2.GetModelRequest())).model.pipeline
        assert (before.ready, before.height, list(before.paths)) == (False, 64, [])
        await gateway.server.generate(INFO)
        assert await health(gateway) == {"": "SERVING", IMAGING: "SERVING"}
        after = (await models.GetModel(model_service_pb2.GetModelRequest())).model.pipeline
        assert (after.ready, list(after.paths)) == (True, ["embedding"])


def test_the_request_in_a_png_is_one_line_of_json() -> None:
    data = picture(
        np.zeros((2, 2, 3), np.uint8), pb.IMAGE_FORMAT_PNG, pb.GenerateRequest(prompt="é\nx"), "tiny@0"
    )
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.load()
        text: str = image.text["monofacet.request"]  # type: ignore[attr-defined]
    assert json.loads(text) == {"prompt": "é\nx"}
    assert "\n" not in text
