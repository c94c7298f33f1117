"""ImagingService over gRPC, on a debug pipeline and a debug encoder, without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
from google.protobuf import json_format
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monofacet.v1 import common_pb2, imaging_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc
from monofacet.v1 import imaging_service_pb2 as pb

from deployments.encoder import Encoder
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.pictures import MAX_REFERENCES, REFERENCES_LEFT_OUT, picture
from deployments.gateway.server import IMAGING, GatewayServer
from deployments.generation_work import Events, Failed, GeneratorInfo
from deployments.generator import Generator
from deployments.model import TowerModel, load_dictionaries
from deployments.settings import Settings
from services.bundle import Bundle
from services.errors import SteeringUnsupported
from services.manifest import DiffusionEntry
from tests.deployments.conftest import error_details
from tests.deployments.debug_generation import DebugPipeline

ENTRY = DiffusionEntry("StableUnCLIPImg2ImgPipeline", "embedding", "f" * 64, 64, 64, 4, 3.0)
INFO = GeneratorInfo("cpu", "fp32", 1, ("embedding",), True, "free", 1)


@dataclass
class Gateway:
    """A gateway in this process."""

    model: DebugPipeline
    server: GatewayServer
    channel: aio.Channel
    bundle: Bundle

    @property
    def imaging(self) -> Any:
        return imaging_service_pb2_grpc.ImagingServiceStub(self.channel)

    def sample(self, name: str, **labels: str) -> float:
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


Open = Callable[..., AbstractAsyncContextManager[Gateway]]


@pytest.fixture(scope="module")
def encoder_parts(tiny: Bundle) -> tuple[Any, Any]:
    return TowerModel(tiny, Settings(backend="torch", threads=1)), load_dictionaries(tiny)


@pytest.fixture
def open_gateway(tiny: Bundle, encoder_parts: tuple[Any, Any]) -> Open:
    @asynccontextmanager
    async def opened(pipeline: bool = True, warm: bool = True, **overrides: Any) -> AsyncIterator[Gateway]:
        settings = Settings(
            **{"port": 0, "metrics_port": 0, "drain_s": 5.0, "max_queue_s": 60.0, **overrides}
        )
        manifest = dataclasses.replace(tiny.manifest, diffusion=ENTRY) if pipeline else tiny.manifest
        bundle = dataclasses.replace(tiny, manifest=manifest)
        model = DebugPipeline()
        generator = Generator(settings, model)
        encoder = Encoder(settings, *encoder_parts)

        async def stream(method: str, *args: Any) -> AsyncIterator[Events]:
            try:
                async for message in getattr(generator, method)(*args):
                    yield message
            except Exception as error:
                yield Events((Failed(error),))

        server = GatewayServer(settings, Catalogue.read(bundle))
        port, _ = await server.open()
        score: Any = encoder.score
        await server.serve(encoder.encode, score, encoder.info(), stream if pipeline else None)
        if pipeline and warm:
            await server.generate(INFO)
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                yield Gateway(model, server, channel, bundle)
            finally:
                model.release()
                await server.drain()

    return opened


async def events(call: Any) -> list[Any]:
    return [response async for response in call]


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


def test_references_too_large_to_carry_are_left_out_and_said_to_be() -> None:
    request = pb.GenerateRequest(prompt="a", image=common_pb2.Image(data=b"x" * (MAX_REFERENCES + 1)))
    data = picture(np.zeros((2, 2, 3), np.uint8), pb.IMAGE_FORMAT_PNG, request, "tiny@0")
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.text[REFERENCES_LEFT_OUT] == "true"  # type: ignore[attr-defined]
    assert not chunk(data).HasField("image")
    assert len(data) < 2000


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
        assert await asyncio.to_thread(gateway.model.entered.acquire, timeout=30)
        call.cancel()
        # A call that is started after it proves that the server has seen the cancellation's turn.
        for _ in range(200):
            if (
                gateway.sample("monofacet_requests_in_flight", method="monofacet.v1.ImagingService/Generate")
                == 0
            ):
                break
            await asyncio.sleep(0.02)
        gateway.model.release()
        await events(gateway.imaging.Generate(pb.GenerateRequest(prompt="next")))
        assert gateway.model.steps_of("leaving") <= 2


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
        assert await asyncio.to_thread(gateway.model.entered.acquire, timeout=30)
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


def preview(**steering: Any) -> pb.PreviewSteeringRequest:
    edit = pb.SteeringEdit(label=common_pb2.MODALITY_LABEL_TEXT, scale=3.0)
    return pb.PreviewSteeringRequest(
        input=common_pb2.Input(text="red circle"), steering=pb.Steering(**{"edits": [edit], **steering})
    )


async def test_a_preview_is_what_the_steering_maths_says(
    open_gateway: Open, tiny: Bundle, encoder_parts: tuple[Any, Any]
) -> None:
    import torch

    from services.modalities import Modality

    model, dictionaries = encoder_parts
    async with open_gateway(pipeline=False) as gateway:
        request = preview()
        request.max_features = 64
        answer = await gateway.imaging.PreviewSteering(request)
        unit, _ = model.encode_texts(model.prepare("red circle", False)[None])
        sae = dictionaries["sae"]
        z = sae.encode(torch.from_numpy(unit), Modality.TEXT)[0].numpy()
        text = tiny.modality("sae").label == "TEXT"
        wanted = np.where(text, 3 * z, z)
        got = np.zeros_like(z)
        got[list(answer.steered_features.indices)] = answer.steered_features.values
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        moved = unit[0] + (wanted - z) @ sae.decoder_rows(Modality.TEXT).numpy()
        moved /= np.linalg.norm(moved)
        steered = np.frombuffer(answer.steered_embedding.data, "<f4")
        # Float32 sums in another order.
        np.testing.assert_allclose(steered, moved, atol=1e-5)
        assert abs(answer.delta - np.linalg.norm(moved - unit[0])) < 1e-5
        captions = [caption.text for caption in answer.captions]
        assert captions[0] == "red circle"
        assert answer.captions[0].similarity > 0.999
        assert len(answer.steered_captions) == 4


async def test_a_preview_takes_references_and_a_wanted_size(open_gateway: Open, tiny: Bundle) -> None:
    async with open_gateway(pipeline=False) as gateway:
        data = (tiny.path / "samples/1.png").read_bytes()
        reference = common_pb2.Input(image=common_pb2.Image(data=data))
        edit = pb.SteeringEdit(label=common_pb2.MODALITY_LABEL_IMAGE, reference=reference)
        answer = await gateway.imaging.PreviewSteering(preview(edits=[edit], delta=0.25))
        assert abs(answer.delta - 0.25) < 1e-4


@pytest.mark.parametrize(
    ("steering", "field"),
    [
        ({"dictionary": "none"}, "steering.dictionary"),
        (
            {"edits": [pb.SteeringEdit(ids=pb.SteeredFeatures(ids=[64]), scale=0)]},
            "steering.edits[0].ids",
        ),
        (
            {
                "edits": [
                    pb.SteeringEdit(
                        label=common_pb2.MODALITY_LABEL_TEXT,
                        reference=common_pb2.Input(image=common_pb2.Image(data=b"no picture")),
                    )
                ]
            },
            "steering.edits[0].reference.image.data",
        ),
    ],
)
async def test_a_bad_preview_names_its_field(open_gateway: Open, steering: Any, field: str) -> None:
    async with open_gateway(pipeline=False) as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.imaging.PreviewSteering(preview(**steering))
        assert error_details(caught.value)[1] == [field]


async def test_quantiles_that_the_bundle_lacks_are_a_failed_precondition(open_gateway: Open) -> None:
    async with open_gateway(pipeline=False) as gateway:
        edit = pb.SteeringEdit(label=common_pb2.MODALITY_LABEL_TEXT, quantile=0.5)
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.imaging.PreviewSteering(preview(edits=[edit]))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_the_request_in_a_png_is_one_line_of_json() -> None:
    data = picture(
        np.zeros((2, 2, 3), np.uint8), pb.IMAGE_FORMAT_PNG, pb.GenerateRequest(prompt="é\nx"), "tiny@0"
    )
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.load()
        text: str = image.text["monofacet.request"]  # type: ignore[attr-defined]
    assert json.loads(text) == {"prompt": "é\nx"}
    assert "\n" not in text
