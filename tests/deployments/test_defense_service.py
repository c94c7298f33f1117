"""FilterAdversarial through a gateway and an encoder with real, tiny towers, in this process and without Ray."""

from __future__ import annotations

import asyncio
import io
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from monofacet.v1 import common_pb2, feature_service_pb2
from monofacet.v1 import defense_service_pb2 as pb
from PIL import Image

from services.bundle.load import Bundle
from tests.deployments.conftest import array, error_details, field_reasons
from tests.support.gateway import Open, Served, serve_here
from tests.support.tiny_bundle import draw
from tests.support.tiny_defense import LABELS, with_defense


def png(picture: Image.Image) -> common_pb2.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return common_pb2.Image(data=buffer.getvalue())


def clean(i: int = 0) -> common_pb2.Image:
    # At the tower's own size, so that no resampling blurs the flat ground.
    return png(draw(i).resize((32, 32), Image.Resampling.NEAREST))


def noisy(i: int = 0) -> common_pb2.Image:
    pixels = np.asarray(draw(i).resize((32, 32), Image.Resampling.NEAREST)).astype(np.int64)
    change = np.random.default_rng(i).integers(-8, 9, pixels.shape)
    return png(Image.fromarray((pixels + change).clip(0, 255).astype(np.uint8)))


@pytest.fixture(scope="module")
def defended(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_defense(tiny, tmp_path_factory.mktemp("defended") / "tiny")


@pytest.fixture
def opened(defended: Bundle) -> Open:
    return partial(serve_here, bundle=defended)


async def encoded(service: Served, images: list[common_pb2.Image]) -> np.ndarray:
    response = await service.features.Encode(
        feature_service_pb2.EncodeRequest(inputs=[common_pb2.Input(image=image) for image in images])
    )
    return array(response.embeddings)


async def test_noisy_pictures_are_called_adversarial_and_clean_ones_are_not(opened: Open) -> None:
    async with opened() as service:
        images = [clean(0), noisy(0), clean(1), noisy(1)]
        response = await service.defense.FilterAdversarial(pb.FilterAdversarialRequest(images=images))
        expected = await encoded(service, images)
        verdicts = [image.verdict for image in response.images]
        assert verdicts == [pb.VERDICT_CLEAN, pb.VERDICT_ADVERSARIAL] * 2
        for image in response.images:
            flagged = image.verdict == pb.VERDICT_ADVERSARIAL
            assert (image.score >= image.threshold) == flagged
            assert (image.p_value <= response.false_positive_rate) == flagged
            assert image.filtered == flagged
            assert not image.scores.HasField("instability")
        before, after = array(response.embeddings_before), array(response.embeddings_after)
        # The same forward as Encode's; a batch of another size may add in another order.
        np.testing.assert_allclose(before, expected, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, atol=1e-5)
        np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
        assert service.sample("monofacet_adversarial_total", verdict="adversarial") == 2
        assert service.sample("monofacet_adversarial_total", verdict="clean") == 2
        assert response.dictionary == "sae"
        assert (response.mode, response.keep_residual) == (pb.FILTER_MODE_DROP, True)


async def test_one_look_costs_one_forward_a_picture_and_a_second_look_two(opened: Open) -> None:
    async with opened() as service:
        images = [clean(i % 3) for i in range(8)]
        await service.defense.FilterAdversarial(pb.FilterAdversarialRequest(images=images))
        assert service.model.images == 8
        await service.defense.FilterAdversarial(
            pb.FilterAdversarialRequest(images=images, options=pb.FilterOptions(second_look=True))
        )
        assert service.model.images == 8 + 16


async def test_a_second_look_says_how_unstable_the_embedding_is(opened: Open) -> None:
    async with opened() as service:
        response = await service.defense.FilterAdversarial(
            pb.FilterAdversarialRequest(
                images=[clean(0), noisy(0)], options=pb.FilterOptions(second_look=True, filter_all=True)
            )
        )
        quiet, loud = (image.scores.instability for image in response.images)
        # Flat drawings hardly change when they are smoothed.
        assert quiet < 1e-3 < loud
        assert (response.mode, response.keep_residual) == (pb.FILTER_MODE_RESTORE, False)
        assert all(image.filtered for image in response.images)
        assert any(pb.SUSPICION_REASON_UNSTABLE in feature.reasons for feature in response.images[1].features)


async def test_suspicious_features_come_with_reasons_labels_and_names_the_largest_change_first(
    opened: Open,
) -> None:
    async with opened() as service:
        request = pb.FilterAdversarialRequest(
            images=[noisy(0)], options=pb.FilterOptions(mode=pb.FILTER_MODE_DROP, max_features=1000)
        )
        (image,) = (await service.defense.FilterAdversarial(request)).images
        assert len(image.features) == image.suspicious_features > 0
        changes = [abs(feature.activation - feature.filtered) for feature in image.features]
        assert changes == sorted(changes, reverse=True)
        for feature in image.features:
            assert feature.reasons
            dropped = {pb.SUSPICION_REASON_MOVED, pb.SUSPICION_REASON_TEXT} & set(feature.reasons)
            assert (feature.filtered == 0) == bool(dropped)
            assert (pb.SUSPICION_REASON_MOVED in feature.reasons) == (feature.feature % 4 == 0)
            assert (pb.SUSPICION_REASON_TEXT in feature.reasons) == (
                feature.label == common_pb2.MODALITY_LABEL_TEXT
            )
            assert feature.name == (
                "" if feature.label == common_pb2.MODALITY_LABEL_DEAD else f"word{feature.feature}"
            )
        request.options.max_features = 1
        (short,) = (await service.defense.FilterAdversarial(request)).images
        assert [feature.feature for feature in short.features] == [image.features[0].feature]
        assert short.suspicious_features == image.suspicious_features


async def test_labels_are_the_callers_or_the_bundles(opened: Open) -> None:
    async with opened() as service:
        own = ["red circle", "green square"]
        response = await service.defense.FilterAdversarial(
            pb.FilterAdversarialRequest(images=[clean(0), noisy(1)], labels=own)
        )
        texts = await service.features.Encode(
            feature_service_pb2.EncodeRequest(inputs=[common_pb2.Input(text=text) for text in own])
        )
        cosines = array(response.embeddings_after) @ array(texts.embeddings).T
        for image, row in zip(response.images, cosines, strict=True):
            assert image.label_after.text == own[int(np.argmax(row))] == own[image.label_after.index]
            # The same forward in a batch of another size.
            assert image.label_after.similarity == pytest.approx(row.max(), abs=1e-4)
            assert 0.5 <= image.label_after.probability <= 1
        bundled = await service.defense.FilterAdversarial(pb.FilterAdversarialRequest(images=[clean(0)]))
        assert bundled.images[0].label_before.text in LABELS


async def test_the_operating_point_is_a_setting_and_is_answered(opened: Open) -> None:
    thresholds = []
    for rate in (0.01, 0.2):
        async with opened(defense_false_positive_rate=rate) as service:
            response = await service.defense.FilterAdversarial(pb.FilterAdversarialRequest(images=[clean(0)]))
            assert response.false_positive_rate == pytest.approx(rate)
            thresholds.append(response.images[0].threshold)
    assert thresholds[0] > thresholds[1]


async def test_bad_images_and_labels_are_named_by_their_own_paths(opened: Open) -> None:
    async with opened() as service:
        bad = common_pb2.Image(data=b"no image")
        with pytest.raises(aio.AioRpcError) as caught:
            await service.defense.FilterAdversarial(
                pb.FilterAdversarialRequest(
                    images=[clean(0), bad], labels=["fine", "a very long label " * 20]
                )
            )
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        _, fields, _ = error_details(caught.value)
        assert fields == ["images[1].data", "labels[1]"]
        # Wrong in different ways, each tells its own.
        assert field_reasons(caught.value) == {
            "images[1].data": "IMAGE_FORMAT_UNSUPPORTED",
            "labels[1]": "TEXT_TOO_LONG",
        }
        assert service.sample("monofacet_adversarial_total", verdict="clean") == 0


@pytest.mark.parametrize(
    ("request_message", "code", "field"),
    [
        (
            pb.FilterAdversarialRequest(
                images=[common_pb2.Image(data=b"x")], options=pb.FilterOptions(mode=pb.FILTER_MODE_RESTORE)
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
            "options.mode",
        ),
        (
            pb.FilterAdversarialRequest(images=[common_pb2.Image(data=b"x")] * 3, labels=["a", "b"]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "images",
        ),
        (pb.FilterAdversarialRequest(), grpc.StatusCode.INVALID_ARGUMENT, "images"),
        (
            pb.FilterAdversarialRequest(images=[common_pb2.Image(data=b"x")], labels=["alone"]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "labels",
        ),
    ],
)
async def test_requests_that_cannot_be_answered_run_nothing(
    opened: Open, request_message: Any, code: grpc.StatusCode, field: str
) -> None:
    async with opened(max_items=4) as service:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.defense.FilterAdversarial(request_message)
        assert caught.value.code() == code
        assert error_details(caught.value)[1] == [field]
        assert service.model.images == 0


async def test_a_bundle_without_calibration_says_so(opened: Open, tiny: Bundle) -> None:
    async with opened(bundle=tiny) as service:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.defense.FilterAdversarial(pb.FilterAdversarialRequest(images=[clean(0)]))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert error_details(caught.value)[0] == "MODEL_NOT_CALIBRATED"


async def test_calls_with_and_without_looks_share_a_batch_and_get_their_own_answers(opened: Open) -> None:
    async with opened() as service:
        alone = [
            await service.defense.FilterAdversarial(
                pb.FilterAdversarialRequest(
                    images=[noisy(i)], options=pb.FilterOptions(second_look=i % 2 == 1)
                )
            )
            for i in range(3)
        ]
        together = await asyncio.gather(
            *(
                service.defense.FilterAdversarial(
                    pb.FilterAdversarialRequest(
                        images=[noisy(i)], options=pb.FilterOptions(second_look=i % 2 == 1)
                    )
                )
                for i in range(3)
            ),
            encoded(service, [clean(0), clean(1)]),
        )
        for a, b in zip(alone, together[:3], strict=True):
            np.testing.assert_allclose(array(a.embeddings_after), array(b.embeddings_after), atol=1e-4)
            assert a.images[0].scores.HasField("instability") == b.images[0].scores.HasField("instability")
