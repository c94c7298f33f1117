"""A small deterministic model behind the contract: no weights, no files, the same answers everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from monofacet._base import SERVICES
from monofacet.testing._fake_bias import FakeBias
from monofacet.testing._fake_defense import FakeDefense
from monofacet.testing._fake_imaging import FakeImaging
from monofacet.testing._model import BUNDLE, DICTIONARY, EMBED_DIM, LABELS, N_FEATURES, THUMBNAIL
from monofacet.testing._status import abort, status_with_details
from monofacet.v1 import (
    bias_service_pb2_grpc,
    common_pb2,
    defense_service_pb2_grpc,
    feature_service_pb2,
    feature_service_pb2_grpc,
    imaging_service_pb2_grpc,
    modality_service_pb2,
    modality_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

# First bytes of the formats that the contract knows.
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


class FakeMonofacet(
    FakeBias,
    FakeDefense,
    FakeImaging,
    feature_service_pb2_grpc.FeatureServiceServicer,
    modality_service_pb2_grpc.ModalityServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
    health_pb2_grpc.HealthServicer,  # type: ignore[misc]
):
    """Answers every call of the contract.

    An embedding depends on the input's bytes alone; feature j's activation is the part of it that points
    along decoder row j; labels go round. A file that is no PNG, JPEG or WebP is refused, as is an unknown
    dictionary or feature. Override a method to change an answer.
    """

    def add_to_server(self, server: Any) -> None:
        """Add every service to a server.

        Parameters
        ----------
        server
            A `grpc.Server`.
        """
        feature_service_pb2_grpc.add_FeatureServiceServicer_to_server(self, server)
        modality_service_pb2_grpc.add_ModalityServiceServicer_to_server(self, server)
        bias_service_pb2_grpc.add_BiasServiceServicer_to_server(self, server)
        defense_service_pb2_grpc.add_DefenseServiceServicer_to_server(self, server)
        imaging_service_pb2_grpc.add_ImagingServiceServicer_to_server(self, server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def Encode(self, request: feature_service_pb2.EncodeRequest, context: Any) -> Any:
        """Encode a batch; every bad input is named."""
        self.check_bundle(request.bundle, context)
        self._check_inputs(request.inputs, context)
        encodings = [self._encoding(item, request.options, context) for item in request.inputs]
        response = feature_service_pb2.EncodeResponse(
            norms=[encoding.norm for encoding in encodings], timings=_timings(), bundle=BUNDLE
        )
        if _wants_embeddings(request.options):
            response.embeddings.CopyFrom(
                common_pb2.Tensor(
                    dtype=common_pb2.DATA_TYPE_FLOAT32,
                    shape=[len(encodings), EMBED_DIM],
                    data=b"".join(encoding.embedding.data for encoding in encodings),
                )
            )
        if request.options.HasField("dictionary"):
            response.features.extend(encoding.features for encoding in encodings)
        return response

    def StreamEncode(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        """Encode item by item; a bad item is its own answer."""
        options = feature_service_pb2.EncodeOptions()
        for position, request in enumerate(requests):
            self.check_bundle(request.bundle, context)
            if request.WhichOneof("payload") == "options":
                if position:
                    abort(
                        context,
                        grpc.StatusCode.INVALID_ARGUMENT,
                        "options come first",
                        reason="INVALID_STREAM",
                    )
                options = request.options
                continue
            response = feature_service_pb2.StreamEncodeResponse(id=request.item.id, bundle=BUNDLE)
            problems = _problems([request.item.input], lambda _: "input")
            if problems:
                response.error.CopyFrom(
                    status_with_details(
                        grpc.StatusCode.INVALID_ARGUMENT,
                        "the item is bad",
                        reason="INVALID_IMAGE",
                        violations=problems,
                    )
                )
            else:
                response.encoding.CopyFrom(self._encoding(request.item.input, options, context))
                response.timings.CopyFrom(_timings())
            yield response

    def _encoding(self, item: common_pb2.Input, options: Any, context: Any) -> feature_service_pb2.Encoding:
        embedding = self.embed(item)
        norm = float(np.linalg.norm(embedding))
        unit = embedding / norm
        encoding = feature_service_pb2.Encoding(norm=norm)
        if _wants_embeddings(options):
            encoding.embedding.CopyFrom(
                common_pb2.Tensor(
                    dtype=common_pb2.DATA_TYPE_FLOAT32, shape=[EMBED_DIM], data=unit.astype("<f4").tobytes()
                )
            )
        if options.HasField("dictionary"):
            name = self._check_dictionary(options.dictionary, context)
            z = self.activations(unit)
            active = [j for j in np.argsort(-z, kind="stable") if z[j] > 0]
            if options.HasField("max_features"):
                active = active[: options.max_features]
            encoding.features.CopyFrom(
                common_pb2.SparseFeatures(
                    dictionary=name, indices=active, values=[float(z[j]) for j in active]
                )
            )
        return encoding

    def ListFeatures(self, request: modality_service_pb2.ListFeaturesRequest, context: Any) -> Any:
        """List the cards that pass label and name, by feature id, in pages."""
        self.check_bundle(request.bundle, context)
        name = self._check_dictionary(request.dictionary, context)
        cards = [self.card(feature) for feature in range(N_FEATURES)]
        wanted = request.filter
        cards = [
            card
            for card in cards
            if (not wanted.labels or card.label in wanted.labels)
            and wanted.name_contains.lower() in card.name
        ]
        if request.descending:
            cards.reverse()
        start, size = int(request.page_token or 0), request.page_size or 50
        return modality_service_pb2.ListFeaturesResponse(
            cards=cards[start : start + size],
            next_page_token=str(start + size) if start + size < len(cards) else "",
            total=len(cards),
            dictionary=name,
            timings=common_pb2.Timings(),
            bundle=BUNDLE,
        )

    def GetFeature(self, request: modality_service_pb2.GetFeatureRequest, context: Any) -> Any:
        """Describe one feature, with one image and one text."""
        self.check_bundle(request.bundle, context)
        name = self._check_dictionary(request.dictionary, context)
        if request.feature >= N_FEATURES:
            abort(
                context, grpc.StatusCode.NOT_FOUND, f"no feature {request.feature}", reason="UNKNOWN_FEATURE"
            )
        response = modality_service_pb2.GetFeatureResponse(
            card=self.card(request.feature), dictionary=name, timings=common_pb2.Timings(), bundle=BUNDLE
        )
        if not request.HasField("max_images") or request.max_images:
            response.images.add(
                thumbnail=common_pb2.Image(data=THUMBNAIL),
                caption="a white dot",
                sample="dot",
                activation=0.9,
            )
        if not request.HasField("max_texts") or request.max_texts:
            response.texts.add(text="a white dot", sample="dot", activation=0.8)
        return response

    def ClassifyModality(self, request: modality_service_pb2.ClassifyModalityRequest, context: Any) -> Any:
        """Spread the energy of each input over the labels."""
        self.check_bundle(request.bundle, context)
        self._check_inputs(request.inputs, context)
        response = modality_service_pb2.ClassifyModalityResponse(
            dictionary=self._check_dictionary(request.dictionary, context), timings=_timings(), bundle=BUNDLE
        )
        count = request.top_features if request.HasField("top_features") else 10
        for item in request.inputs:
            embedding = self.embed(item)
            energy = self.activations(embedding / np.float32(np.linalg.norm(embedding))) ** 2
            shares = energy / max(float(energy.sum()), 1e-12)
            by_label = [float(shares[position :: len(LABELS)].sum()) for position in range(len(LABELS))]
            answer = response.classifications.add(
                active_features=int((energy > 0).sum()), dominant_label=LABELS[int(np.argmax(by_label))]
            )
            for label, share in zip(LABELS, by_label, strict=True):
                answer.shares.add(label=label, share=share)
            for j in np.argsort(-shares, kind="stable")[:count]:
                card = self.card(int(j))
                answer.top_features.add(
                    feature=int(j),
                    activation=float(np.sqrt(energy[j])),
                    share=float(shares[j]),
                    label=card.label,
                    name=card.name,
                )
        return response

    def ScoreModality(self, requests: Iterator[Any], context: Any) -> Any:
        """Count the pairs, and answer the cards."""
        settings = modality_service_pb2.ScoreSettings()
        pairs = 0
        for position, request in enumerate(requests):
            self.check_bundle(request.bundle, context)
            if request.WhichOneof("payload") == "settings":
                if position:
                    abort(
                        context,
                        grpc.StatusCode.INVALID_ARGUMENT,
                        "settings come first",
                        reason="INVALID_STREAM",
                    )
                settings = request.settings
                continue
            before = pairs
            problems = _problems(
                [common_pb2.Input(image=pair.image) for pair in request.batch.pairs],
                lambda index, start=before: f"pairs[{start + index}]",
            )
            if problems:
                abort(
                    context,
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "bad pairs",
                    reason="INVALID_IMAGE",
                    violations=problems,
                )
            pairs += len(request.batch.pairs)
        for field, default in {
            "delta": 0.25,
            "bootstrap_samples": 1000,
            "shuffles": 1000,
            "false_discovery_rate": 0.05,
            "seed": 0,
        }.items():
            if not settings.HasField(field):  # type: ignore[arg-type]
                setattr(settings, field, default)
        settings.dictionary = self._check_dictionary(settings.dictionary, context)
        return modality_service_pb2.ScoreModalityResponse(
            cards=[self.card(feature) for feature in range(N_FEATURES)],
            pairs=pairs,
            settings=settings,
            timings=_timings(),
            bundle=BUNDLE,
        )

    def GetModel(self, request: model_service_pb2.GetModelRequest, context: Any) -> Any:
        """Describe the bundle, with its files."""
        self.check_bundle(request.bundle, context)
        model = self.model()
        model.files.add(path="manifest.json", sha256="0" * 64, bytes=2)
        return model_service_pb2.GetModelResponse(
            model=model, server_version="0.1.0", timings=common_pb2.Timings(), bundle=BUNDLE
        )

    def ListModels(self, request: model_service_pb2.ListModelsRequest, context: Any) -> Any:
        """Describe the only bundle."""
        return model_service_pb2.ListModelsResponse(
            models=[self.model()], server_version="0.1.0", timings=common_pb2.Timings(), bundle=BUNDLE
        )

    def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        """Say that every service is ready."""
        if request.service not in SERVICES:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    def _check_inputs(self, inputs: Sequence[common_pb2.Input], context: Any) -> None:
        problems = _problems(inputs, lambda index: f"inputs[{index}]")
        if problems:
            abort(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{len(problems)} bad inputs",
                reason="INVALID_IMAGE",
                violations=problems,
            )

    def _check_dictionary(self, name: str, context: Any) -> str:
        if name not in ("", DICTIONARY):
            abort(context, grpc.StatusCode.NOT_FOUND, f"no dictionary {name!r}", reason="UNKNOWN_DICTIONARY")
        return DICTIONARY


def _problems(inputs: Sequence[common_pb2.Input], path: Any) -> dict[str, str]:
    problems = {}
    for index, item in enumerate(inputs):
        kind = item.WhichOneof("input")
        if kind is None:
            problems[path(index)] = "neither an image nor a text"
        elif kind == "image" and not item.image.data.startswith(SIGNATURES):
            problems[f"{path(index)}.image.data"] = "not a PNG, JPEG or WebP image"
    return problems


def _wants_embeddings(options: feature_service_pb2.EncodeOptions) -> bool:
    return not options.HasField("include_embeddings") or options.include_embeddings


def _timings() -> common_pb2.Timings:
    return common_pb2.Timings(
        queue=duration_pb2.Duration(nanos=1_000_000), inference=duration_pb2.Duration(nanos=2_000_000)
    )
