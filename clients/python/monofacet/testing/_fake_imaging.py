"""The fake's ImagingService."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.PngImagePlugin
from google.protobuf import duration_pb2, json_format

from monofacet.testing._model import BUNDLE, DICTIONARY, N_FEATURES, FakeModel
from monofacet.testing._status import abort, status_with_details
from monofacet.v1 import common_pb2, imaging_service_pb2, imaging_service_pb2_grpc

STEPS = 4
SIDE = 64
# Names of the attributes, with their groups.
ATTRIBUTES = {"blue": "colour", "smile": "expression"}
# An image of this prompt fails; its neighbours do not.
BROKEN_PROMPT = "a broken image"


class FakeImaging(FakeModel, imaging_service_pb2_grpc.ImagingServiceServicer):
    """Draws one colour an image, by prompt, seed and edits; the prompt "a broken image" fails on even seeds."""

    def Generate(self, request: imaging_service_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
        """Tell every step, then give the images."""
        self.check_bundle(request.bundle, context)
        self._check_steering(request.steering, context)
        seeds = list(request.seeds) or list(range(request.num_images or 1))
        steps = request.num_inference_steps or STEPS
        numbers = [
            (i, unsteered)
            for unsteered in (False, True)[: 1 + request.include_unsteered]
            for i in range(len(seeds))
        ]
        for step in range(1, steps + 1):
            progress = imaging_service_pb2.GenerateProgress(
                steps=[step] * len(numbers), num_inference_steps=steps
            )
            yield imaging_service_pb2.GenerateResponse(progress=progress, bundle=BUNDLE)
            if request.preview_every and step % request.preview_every == 0 and step < steps:
                for i, unsteered in numbers:
                    preview = imaging_service_pb2.GeneratePreview(index=i, unsteered=unsteered, step=step)
                    preview.image.data = self._file(request, seeds[i], unsteered, 8)
                    yield imaging_service_pb2.GenerateResponse(preview=preview, bundle=BUNDLE)
        for i, unsteered in numbers:
            image = imaging_service_pb2.GeneratedImage(index=i, unsteered=unsteered, seed=seeds[i])
            if request.prompt == BROKEN_PROMPT and seeds[i] % 2 == 0:
                image.finish_reason = imaging_service_pb2.FINISH_REASON_FAILED
                image.error.CopyFrom(
                    status_with_details(
                        grpc.StatusCode.INTERNAL, "the image failed", reason="GENERATION_FAILED"
                    )
                )
            else:
                image.finish_reason = imaging_service_pb2.FINISH_REASON_COMPLETED
                image.image.data = self._file(request, seeds[i], unsteered, 0)
                steered = request.steering.edits or request.steering.attributes
                image.delta = 0.0 if unsteered or not steered else 0.25
                image.dose = 2 * image.delta
            yield imaging_service_pb2.GenerateResponse(image=image, timings=_timings(), bundle=BUNDLE)

    def PreviewSteering(
        self, request: imaging_service_pb2.PreviewSteeringRequest, context: Any
    ) -> imaging_service_pb2.PreviewSteeringResponse:
        """Multiply the edited activations by 1 + strength."""
        self.check_bundle(request.bundle, context)
        self._check_steering(request.steering, context)
        embedding = self.embed(request.input)
        z = self.activations(embedding / np.float32(np.linalg.norm(embedding)))
        steered = z.copy()
        for edit in request.steering.edits:
            ids = list(edit.ids.ids) or range(N_FEATURES)
            steered[ids] *= 1 + (edit.strength if edit.HasField("strength") else 1)
        for turn in request.steering.attributes:
            steered[0] += turn.strength if turn.HasField("strength") else 1
        limit = request.max_features if request.HasField("max_features") else 20
        count = request.max_captions if request.HasField("max_captions") else 5
        near = [
            imaging_service_pb2.NearCaption(text=f"caption {i}", similarity=1 - i / 10) for i in range(count)
        ]
        return imaging_service_pb2.PreviewSteeringResponse(
            features=_sparse(z, limit),
            steered_features=_sparse(steered, limit),
            steered_embedding=common_pb2.Tensor(
                dtype=common_pb2.DATA_TYPE_FLOAT32,
                shape=[len(embedding)],
                data=(embedding / np.linalg.norm(embedding)).astype("<f4").tobytes(),
            ),
            delta=float(np.linalg.norm(steered - z)),
            dose=2 * float(np.linalg.norm(steered - z)),
            captions=near,
            steered_captions=near,
            timings=_timings(),
            bundle=BUNDLE,
        )

    def _check_steering(self, steering: imaging_service_pb2.Steering, context: Any) -> None:
        if steering.dictionary not in ("", DICTIONARY):
            abort(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no dictionary {steering.dictionary!r}",
                reason="UNKNOWN_DICTIONARY",
            )
        for turn in steering.attributes:
            self._attribute(turn.name, context)

    def ListAttributes(
        self, request: imaging_service_pb2.ListAttributesRequest, context: Any
    ) -> imaging_service_pb2.ListAttributesResponse:
        """List two attributes, one of them not measured."""
        self.check_bundle(request.bundle, context)
        return imaging_service_pb2.ListAttributesResponse(
            attributes=[_attribute(name) for name in ATTRIBUTES],
            unit_dose=0.75,
            bundle=BUNDLE,
            timings=_timings(),
        )

    def GetAttribute(
        self, request: imaging_service_pb2.GetAttributeRequest, context: Any
    ) -> imaging_service_pb2.GetAttributeResponse:
        """Answer one of them."""
        self.check_bundle(request.bundle, context)
        found = self._attribute(request.name, context)
        return imaging_service_pb2.GetAttributeResponse(attribute=found, bundle=BUNDLE, timings=_timings())

    def _attribute(self, name: str, context: Any) -> imaging_service_pb2.Attribute:
        if name not in ATTRIBUTES:
            abort(context, grpc.StatusCode.NOT_FOUND, f"no attribute {name!r}", reason="UNKNOWN_ATTRIBUTE")
        return _attribute(name)

    def _file(
        self, request: imaging_service_pb2.GenerateRequest, seed: int, unsteered: bool, side: int
    ) -> bytes:
        alone = imaging_service_pb2.GenerateRequest()
        alone.CopyFrom(request)
        for field in ("seeds", "preview_every", "include_unsteered", "format"):
            alone.ClearField(field)
        alone.seeds.append(seed)
        alone.num_images = 1
        if unsteered:
            alone.ClearField("steering")
        told = json_format.MessageToJson(alone, indent=None)
        colour = tuple(hashlib.sha256(told.encode()).digest()[:3])
        size = (side or request.width or SIDE, side or request.height or SIDE)
        image = PIL.Image.new("RGB", size, colour)
        buffer = io.BytesIO()
        if request.format == imaging_service_pb2.IMAGE_FORMAT_WEBP:
            image.save(buffer, "WEBP", lossless=True)
            return buffer.getvalue()
        chunks = PIL.PngImagePlugin.PngInfo()
        if not side:
            chunks.add_itxt("monofacet.request", told, zip=True)
        image.save(buffer, "PNG", pnginfo=chunks)
        return buffer.getvalue()


def _attribute(name: str) -> imaging_service_pb2.Attribute:
    found = imaging_service_pb2.Attribute(name=name, group=ATTRIBUTES[name], dose=0.5, pairs=25)
    found.features.CopyFrom(
        common_pb2.SparseFeatures(dictionary=DICTIONARY, indices=[3, 1], values=[1.5, -0.5])
    )
    if name == "blue":
        for share in ("hit", "hit_before", "concept_kept", "concept_kept_before"):
            getattr(found.measures, share).CopyFrom(
                imaging_service_pb2.AttributeShare(value=0.75, low=0.5, high=0.875)
            )
        found.measures.pictures = 24
        found.measures.off_distribution, found.measures.off_distribution_before = 0.75, 0.5
    return found


def _sparse(z: npt.NDArray[np.float32], limit: int) -> common_pb2.SparseFeatures:
    active = [int(j) for j in np.argsort(-z, kind="stable") if z[j] > 0][:limit]
    return common_pb2.SparseFeatures(
        dictionary=DICTIONARY, indices=active, values=[float(z[j]) for j in active]
    )


def _timings() -> common_pb2.Timings:
    return common_pb2.Timings(
        queue=duration_pb2.Duration(nanos=1_000_000), inference=duration_pb2.Duration(nanos=2_000_000)
    )
