"""Attributes over gRPC: listed with their cards, turned in previews, and absent from bundles without any."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from monofacet.v1 import imaging_service_pb2 as pb

from services.bundle.load import Bundle
from tests.deployments.conftest import error_details
from tests.deployments.imaging.conftest import Open, preview
from tests.support.tiny_attributes import MEASURES, add_attributes


@pytest.fixture
def attributed(tiny: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny.path, tmp_path / "copy")
    return add_attributes(replace(tiny, path=tmp_path / "copy"))


async def test_attributes_are_listed_with_what_they_do(open_gateway: Open, attributed: Bundle) -> None:
    async with open_gateway(pipeline=False, bundle=attributed) as gateway:
        answer = await gateway.imaging.ListAttributes(pb.ListAttributesRequest())
        assert [(a.name, a.group) for a in answer.attributes] == [("blue", "colour"), ("smile", "expression")]
        assert answer.unit_dose == 0.5
        assert answer.bundle == attributed.id
        blue, smile = answer.attributes
        assert blue.features.dictionary == "sae"
        assert list(blue.features.indices) == [1, 2]
        assert list(smile.features.values) == [-9.0, 0.5]
        assert (blue.measures.pictures, blue.measures.off_distribution) == (24, 0.75)
        assert blue.measures.hit.low == MEASURES.hit.low
        assert blue.measures.hit_before.high == MEASURES.hit_before.high
        assert not smile.HasField("measures")
        one = await gateway.imaging.GetAttribute(pb.GetAttributeRequest(name="smile"))
        assert one.attribute == smile


async def test_an_attribute_is_turned_beside_edits(open_gateway: Open, attributed: Bundle) -> None:
    async with open_gateway(pipeline=False, bundle=attributed) as gateway:
        doses = []
        for strength in (0.0, 0.5, 1.0, 2.0):
            turn = pb.SteeringAttribute(name="blue", strength=strength)
            answer = await gateway.imaging.PreviewSteering(preview(edits=[], attributes=[turn]))
            doses.append(answer.dose)
        assert doses[0] == 0.0
        assert np.all(np.diff(doses) > 0)
        both = await gateway.imaging.PreviewSteering(
            preview(attributes=[pb.SteeringAttribute(name="blue")], dose=0.3)
        )
        assert abs(both.dose - 0.3) < 1e-3


async def test_a_bundle_without_attributes_lists_none(open_gateway: Open) -> None:
    async with open_gateway(pipeline=False) as gateway:
        answer = await gateway.imaging.ListAttributes(pb.ListAttributesRequest())
        assert not answer.attributes
        assert not answer.HasField("unit_dose")
        plain = await gateway.imaging.PreviewSteering(preview())
        assert not plain.HasField("dose")
        for call, code in (
            (gateway.imaging.GetAttribute(pb.GetAttributeRequest(name="blue")), grpc.StatusCode.NOT_FOUND),
            (
                gateway.imaging.PreviewSteering(preview(attributes=[pb.SteeringAttribute(name="blue")])),
                grpc.StatusCode.FAILED_PRECONDITION,
            ),
        ):
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == code


async def test_an_unknown_attribute_is_named(open_gateway: Open, attributed: Bundle) -> None:
    async with open_gateway(pipeline=False, bundle=attributed) as gateway:
        steering: dict[str, Any] = {"attributes": [pb.SteeringAttribute(name="green")]}
        for call, field in (
            (gateway.imaging.PreviewSteering(preview(**steering)), "steering.attributes[0].name"),
            (gateway.imaging.GetAttribute(pb.GetAttributeRequest(name="green")), "name"),
        ):
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            reason, fields, _ = error_details(caught.value)
            assert (reason, fields) == ("UNKNOWN_ATTRIBUTE", [field])
