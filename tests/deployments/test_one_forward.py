"""Whatever is asked of an input, it goes through a tower once; and its decoding is timed apart from the towers."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from grpc import aio
from monofacet.v1 import (
    bias_service_pb2,
    bias_service_pb2_grpc,
    common_pb2,
    defense_service_pb2,
    defense_service_pb2_grpc,
    feature_service_pb2,
    feature_service_pb2_grpc,
    modality_service_pb2,
    modality_service_pb2_grpc,
)

from services.bundle.load import Bundle
from tests.support.gateway import Served, serve_here
from tests.support.tiny_bias import with_bias
from tests.support.tiny_bundle import draw
from tests.support.tiny_defense import with_defense


@pytest.fixture(scope="module")
def calibrated(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("calibrated")
    return with_defense(with_bias(tiny, folder / "biased"), folder / "both")


@pytest_asyncio.fixture
async def served(calibrated: Bundle) -> AsyncIterator[Served]:
    async with serve_here(calibrated, linger_s=0.0) as served:
        yield served


def image(i: int) -> common_pb2.Image:
    buffer = io.BytesIO()
    draw(i).save(buffer, "PNG")
    return common_pb2.Image(data=buffer.getvalue())


IMAGES = [image(i) for i in range(3)]
MIXED = [
    *(common_pb2.Input(image=one) for one in IMAGES),
    *(common_pb2.Input(text=t) for t in ("cat", "dog")),
]
ABLATION = bias_service_pb2.Ablation(top_gender_features=4, mode=bias_service_pb2.ABLATION_MODE_ZERO)

CALLS: dict[str, tuple[Callable[[aio.Channel], Any], int]] = {
    "features": (
        lambda channel: feature_service_pb2_grpc.FeatureServiceStub(channel).Encode(
            feature_service_pb2.EncodeRequest(
                inputs=MIXED, options=feature_service_pb2.EncodeOptions(dictionary="sae")
            )
        ),
        2,
    ),
    "modality": (
        lambda channel: modality_service_pb2_grpc.ModalityServiceStub(channel).ClassifyModality(
            modality_service_pb2.ClassifyModalityRequest(inputs=MIXED)
        ),
        2,
    ),
    "gender, before and after an ablation": (
        lambda channel: bias_service_pb2_grpc.BiasServiceStub(channel).ClassifyGender(
            bias_service_pb2.ClassifyGenderRequest(inputs=MIXED, ablation=ABLATION)
        ),
        2,
    ),
    "verdicts, with labels before and after": (
        lambda channel: defense_service_pb2_grpc.DefenseServiceStub(channel).FilterAdversarial(
            defense_service_pb2.FilterAdversarialRequest(images=IMAGES)
        ),
        0,
    ),
}


@pytest.mark.parametrize("asked", CALLS)
async def test_an_input_goes_through_a_tower_once_whatever_is_asked_of_it(served: Served, asked: str) -> None:
    call, texts = CALLS[asked]
    await call(served.channel)
    assert (served.model.images, served.model.texts) == (len(IMAGES), texts)


async def test_decoding_is_timed_apart_from_the_towers(served: Served) -> None:
    def sample(name: str) -> float:
        found = [
            value.value
            for metric in served.server.metrics.registry.collect()
            for value in metric.samples
            if value.name == name
        ]
        return sum(found)

    await CALLS["features"][0](served.channel)
    assert sample("monofacet_decode_duration_seconds_count") == 1
    assert 0 < sample("monofacet_decode_duration_seconds_sum") < 30
