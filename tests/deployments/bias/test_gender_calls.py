"""BiasService.ClassifyGender over gRPC: every ablation by another road, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc import aio
from monofacet.v1 import bias_service_pb2 as pb
from monofacet.v1 import common_pb2, feature_service_pb2, model_service_pb2

from deployments.gateway.compute.ablation import ABLATION_NAME
from deployments.gateway.compute.decoders import read_decoders
from deployments.operations.settings import EMBEDDED_BUNDLE
from services.bias.ablation import FeatureAblation, Mode, Side
from services.bias.activations import Stacked
from services.bias.calibration import BiasCalibration
from services.bundle.load import Bundle
from services.dictionaries import sparse_rows
from services.modality.modalities import Modality
from tests.deployments.bias.conftest import CODE, words
from tests.deployments.conftest import array, error_details
from tests.support.gateway import Open
from tests.support.tiny_bias import THRESHOLDS, with_bias
from tests.support.tiny_bundle import draw

# float32 sums in another order; scores are products of unit vectors and a direction of length about 1.
CLOSE = 1e-5


def picture(i: int = 0, shade: int = 0) -> common_pb2.Input:
    image = draw(i % 4)
    image.paste((shade, shade, 200), (0, 0, 8, 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return common_pb2.Input(image=common_pb2.Image(data=buffer.getvalue()))


def ablated(bundle: Bundle, e: np.ndarray, modality: Modality, ablation: pb.Ablation) -> np.ndarray:
    """The same by another road: torch's dictionary and dense algebra."""
    name = ablation.dictionary or bundle.manifest.default_dictionary
    entry = bundle.manifest.bias
    calibration = BiasCalibration.read(bundle.path / entry.config, bundle.path / entry.weights)
    if ablation.mode == pb.ABLATION_MODE_LEACE:
        eraser = calibration.leace[modality]
        changed = e - ((e - eraser.mean) @ eraser.v)[:, None] * eraser.u
    else:
        dictionary, known = bundle.dictionary(name), calibration.dictionaries[name]
        selection = ablation.WhichOneof("selection")
        if selection == "label":
            label = common_pb2.ModalityLabel.Name(ablation.label).removeprefix("MODALITY_LABEL_")
            features = np.flatnonzero(bundle.modality(name).label == label)
        else:
            ids = (
                ablation.features.ids
                if selection == "features"
                else known.rank[: ablation.top_gender_features]
            )
            features = np.array(ids)
        z = dictionary.encode(torch.from_numpy(e), modality).numpy()
        rows = dictionary.decoder_rows(modality).numpy()
        if ablation.mode == pb.ABLATION_MODE_PROJECT:
            changed = e - e @ np.linalg.pinv(rows[features]) @ rows[features]
        else:
            target = (
                known.sides[modality].means if ablation.mode == pb.ABLATION_MODE_MEAN else np.zeros(len(rows))
            )
            changed = e + (target[features] - z[:, features]) @ rows[features]
    return changed / np.linalg.norm(changed, axis=1, keepdims=True)


ABLATIONS = [
    pb.Ablation(features=pb.FeatureIds(ids=[3, 1, 7])),
    pb.Ablation(label=common_pb2.MODALITY_LABEL_TEXT, mode=pb.ABLATION_MODE_ZERO),
    pb.Ablation(label=common_pb2.MODALITY_LABEL_IMAGE, mode=pb.ABLATION_MODE_MEAN, dictionary="sae-pair"),
    pb.Ablation(top_gender_features=5, mode=pb.ABLATION_MODE_PROJECT, dictionary="sae-group"),
    pb.Ablation(top_gender_features=4, mode=pb.ABLATION_MODE_MEAN, dictionary="neurons"),
    pb.Ablation(mode=pb.ABLATION_MODE_LEACE),
]


async def test_every_kind_of_ablation_is_the_definition(opened: Open, biased: Bundle) -> None:
    entry = biased.manifest.bias
    calibration = BiasCalibration.read(biased.path / entry.config, biased.path / entry.weights)
    inputs = [picture(0), words("a woman"), picture(1), words("a man at work")]
    async with opened() as service:
        scale = service.model.info().logit_scale
        encoded = await service.features.Encode(feature_service_pb2.EncodeRequest(inputs=inputs))
        plain = await service.bias.ClassifyGender(pb.ClassifyGenderRequest(inputs=inputs))
        answers = [
            await service.bias.ClassifyGender(pb.ClassifyGenderRequest(inputs=inputs, ablation=ablation))
            for ablation in ABLATIONS
        ]
    e = array(encoded.embeddings).copy()
    sides = [Modality.IMAGE, Modality.TEXT, Modality.IMAGE, Modality.TEXT]
    for i, (row, modality) in enumerate(zip(e, sides, strict=True)):
        before = plain.classifications[i].before
        score = row @ calibration.direction
        assert before.score == pytest.approx(score, abs=CLOSE)
        assert before.p_woman == pytest.approx(1 / (1 + np.exp(-scale * score)), abs=1e-4)
        shifted = 1 / (1 + np.exp(-scale * (score - THRESHOLDS[modality])))
        assert before.p_woman_calibrated == pytest.approx(shifted, abs=1e-4)
        assert not plain.classifications[i].HasField("after")
        for ablation, answer in zip(ABLATIONS, answers, strict=True):
            changed = ablated(biased, row[None], modality, ablation)[0]
            found = answer.classifications[i]
            assert found.before == before
            # Features and embeddings come from forwards of another batch: some units in the last place.
            assert found.after.score == pytest.approx(changed @ calibration.direction, abs=1e-4)
            assert found.kept == pytest.approx(changed @ row, abs=1e-4)
    assert [answer.set_size for answer in answers][0] == 3
    assert answers[0].ablation.mode == pb.ABLATION_MODE_ZERO and answers[0].ablation.dictionary == "sae"
    assert answers[-1].set_size == 0


async def test_an_item_costs_one_forward_whatever_is_removed(opened: Open) -> None:
    async with opened() as service:
        for ablation in ABLATIONS:
            before = service.model.items
            request = pb.ClassifyGenderRequest(inputs=[picture(0), words("a")], ablation=ablation)
            await service.bias.ClassifyGender(request)
            assert service.model.items == before + 2


@pytest.mark.parametrize(
    ("ablation", "code", "reason", "fields"),
    [
        (pb.Ablation(), CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["ablation"]),
        (
            pb.Ablation(top_gender_features=1, mode=pb.ABLATION_MODE_LEACE),
            CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["ablation.top_gender_features"],
        ),
        (
            pb.Ablation(features=pb.FeatureIds(ids=[0, 64])),
            CODE.NOT_FOUND, "UNKNOWN_FEATURE", ["ablation.features.ids[1]"],
        ),
        (
            pb.Ablation(top_gender_features=1, dictionary="x"),
            CODE.NOT_FOUND, "UNKNOWN_DICTIONARY", ["ablation.dictionary"],
        ),
        (
            pb.Ablation(label=common_pb2.MODALITY_LABEL_DEAD),
            CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["ablation.label"],
        ),
        (
            pb.Ablation(label=common_pb2.MODALITY_LABEL_TEXT, dictionary="neurons"),
            CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["ablation.label"],
        ),
        (
            pb.Ablation(top_gender_features=1, dictionary="ncl"),
            CODE.FAILED_PRECONDITION, "MODEL_NOT_CALIBRATED", [],
        ),
    ],
)  # fmt: skip
async def test_a_bad_ablation_gets_its_status_reason_and_field(
    opened: Open, ablation: pb.Ablation, code: grpc.StatusCode, reason: str, fields: list[str]
) -> None:
    async with opened() as service:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.ClassifyGender(
                pb.ClassifyGenderRequest(inputs=[words("a")], ablation=ablation)
            )
        assert service.model.items == 0
    assert caught.value.code() is code
    assert error_details(caught.value) == (reason, fields, None)


@pytest.mark.parametrize(
    ("chosen", "recommended"),
    [
        ("top 4, project", {"top_gender_features": 4, "mode": pb.ABLATION_MODE_PROJECT}),
        ("top 16, zero", {"top_gender_features": 16, "mode": pb.ABLATION_MODE_ZERO}),
        ("label CROSS, mean", {"label": common_pb2.MODALITY_LABEL_CROSS, "mode": pb.ABLATION_MODE_MEAN}),
        ("LEACE", {"mode": pb.ABLATION_MODE_LEACE}),
        # No request can ask for these.
        ("counterparts 1", None), ("nothing", None), ("top 0, zero", None), ("", None),
    ],
)  # fmt: skip
async def test_a_model_says_what_its_study_chose(
    opened: Open, tiny: Bundle, tmp_path: Path, chosen: str, recommended: dict[str, Any] | None
) -> None:
    metrics = {"dictionary": "sae", "chosen": chosen}
    async with opened(bundle=with_bias(tiny, tmp_path / "tiny", metrics=metrics)) as service:
        answer = await service.models.GetModel(model_service_pb2.GetModelRequest())
        (listed,) = (await service.models.ListModels(model_service_pb2.ListModelsRequest())).models
        assert listed.recommended_ablation == answer.model.recommended_ablation
        if recommended is None:
            assert not answer.model.HasField("recommended_ablation")
            return
        ablation = answer.model.recommended_ablation
        assert ablation == pb.Ablation(dictionary="sae", **recommended)
        # And the server takes it.
        asked = pb.ClassifyGenderRequest(inputs=[words("a")], ablation=ablation)
        assert (await service.bias.ClassifyGender(asked)).ablation == ablation


def test_the_bundle_that_is_shipped_recommends_an_ablation() -> None:
    metrics = json.loads((EMBEDDED_BUNDLE / "bias" / "bias.json").read_text())["figures"]
    assert ABLATION_NAME.fullmatch(metrics["chosen"])


async def test_a_bundle_without_calibration_says_so(opened: Open, tiny: Bundle) -> None:
    async with opened(bundle=tiny) as service:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.ClassifyGender(pb.ClassifyGenderRequest(inputs=[words("a")]))
    assert caught.value.code() is CODE.FAILED_PRECONDITION
    assert error_details(caught.value)[0] == "MODEL_NOT_CALIBRATED"


def test_the_gateways_decoders_are_the_dictionaries_own(biased: Bundle) -> None:
    rng = np.random.default_rng(0)
    for name in biased.dictionary_names:
        dictionary, decoders = biased.dictionary(name), read_decoders(biased, name)
        e = torch.nn.functional.normalize(
            torch.from_numpy(rng.normal(size=(3, 16)).astype(np.float32)), dim=1
        )
        for modality in Modality:
            with torch.no_grad():
                z = dictionary.encode(e, modality)
                expected = dictionary.decode(z, modality).numpy()
            decoder = decoders[modality]
            np.testing.assert_allclose(z.numpy() @ decoder.rows + decoder.origin, expected, atol=1e-5)
            # Gathered rows and the dense product are the same sum.
            side = Side(decoder.rows, np.zeros(len(decoder.rows), np.float32))
            ablation = FeatureAblation(side, np.arange(0, len(decoder.rows), 2), Mode.ZERO)
            part = ablation.part(Stacked.of(sparse_rows(z)))
            np.testing.assert_allclose(part, z.numpy()[:, ::2] @ decoder.rows[::2], atol=1e-5)
