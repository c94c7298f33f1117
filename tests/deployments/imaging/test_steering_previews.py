"""ImagingService.PreviewSteering over gRPC: what a steering does to an embedding, without a picture."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from monofacet.v1 import common_pb2
from monofacet.v1 import imaging_service_pb2 as pb

from deployments.encoder.tasks import Encoded, EncodeTask, Reply
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.compute import preview as previews
from deployments.gateway.compute.decoders import Decoders
from deployments.gateway.encoder_client import EncoderClient
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from tests.deployments.conftest import error_details
from tests.deployments.imaging.conftest import Open, preview


async def test_a_preview_is_what_the_steering_maths_says(
    open_gateway: Open, tiny: Bundle, encoder_parts: tuple[Any, Any]
) -> None:
    import torch

    from services.modality.modalities import Modality

    model, dictionaries = encoder_parts
    async with open_gateway(pipeline=False) as gateway:
        request = preview()
        request.max_features = 64
        answer = await gateway.imaging.PreviewSteering(request)
        unit, _ = model.encode_texts(model.tokenize("red circle", False)[None])
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


class SlowEncoder:
    """Answers messages until it is told to stop; counts their items."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.sent: list[int] = []
        self.going = asyncio.Event()
        self.answers = 0

    async def send(self, tasks: list[EncodeTask], remaining_s: list[float | None]) -> Reply:
        if not self.answers:
            await self.going.wait()
        self.answers -= 1
        (task,) = tasks
        count = len(task.items)
        self.sent.append(count)
        return Reply((Encoded(np.ones((count, self.dim), np.float32), np.ones(count, np.float32)),))


async def test_captions_that_are_encoded_stay_so_when_their_caller_leaves(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "captions", lambda _: [f"caption {n}" for n in range(150)])
    dim = tiny.clip_config.embed_dim
    slow = SlowEncoder(dim)
    encoder = EncoderClient(slow.send, Settings(), Metrics(), "debug")
    known = previews.SteeringPreviews(encoder, Catalogue.read(tiny), Decoders(tiny), Settings())
    for _ in range(2):
        slow.answers = 1
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await known._near(3, np.ones(dim, np.float32))
    assert slow.sent == [64, 64]
    slow.answers = 1
    (near,) = await known._near(3, np.ones(dim, np.float32))
    assert [text for text, _ in near] == ["caption 0", "caption 1", "caption 2"]
    # And never again.
    await known._near(3, np.ones(dim, np.float32))
    assert slow.sent == [64, 64, 22]


async def test_captions_wait_for_a_full_encoder_and_are_no_refused_call(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "captions", lambda _: [f"caption {n}" for n in range(20)])
    dim = tiny.clip_config.embed_dim
    slow = SlowEncoder(dim)
    slow.answers = 1
    encoder = EncoderClient(slow.send, Settings(max_queued_items=32), Metrics(), "debug")
    known = previews.SteeringPreviews(encoder, Catalogue.read(tiny), Decoders(tiny), Settings())
    with encoder._backlog.admitted(32):
        near = asyncio.ensure_future(known._near(3, np.ones(dim, np.float32)))
        await asyncio.sleep(0.1)
        assert not slow.sent and not near.done() and not encoder._backlog.overloaded
    assert len((await near)[0]) == 3
