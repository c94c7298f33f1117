"""DefenseService: which images are adversarial, and their embeddings without what an attack moved."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from monofacet.v1 import defense_service_pb2 as pb
from monofacet.v1 import defense_service_pb2_grpc

from deployments.gateway.catalogue import Catalogue
from deployments.gateway.decoders import Decoder, Decoders
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.messages import check_texts, relocated, tensor, timings
from deployments.gateway.screening import MODES, LabelTexts, filtered_image, looks, mode_value, verdict_name
from deployments.metrics import Metrics
from deployments.settings import Settings
from deployments.work import Encoded, Work
from services.bundle import Bundle
from services.defense import DefenseCalibration, FilterChoice, Screened, screen
from services.defense.screen import choose
from services.errors import InvalidInput, NotCalibrated
from services.modalities import Modality

_FILTER = "monofacet.v1.DefenseService/FilterAdversarial"
_DEFAULT_FEATURES = 20
# Images that are worth a thread; fewer are done before a thread would have started.
_THREAD_ITEMS = 32


def read_calibration(bundle: Bundle) -> DefenseCalibration | None:
    """Read the bundle's defence calibration; None where it has none."""
    entry = bundle.manifest.defense
    return (
        None
        if entry is None
        else DefenseCalibration.read(bundle.path / entry.config, bundle.path / entry.weights)
    )


class DefenseServicer(defense_service_pb2_grpc.DefenseServiceServicer):
    """Answers DefenseService.

    Parameters
    ----------
    encoder
        Where images and labels are encoded.
    catalogue, decoders
        Labels and rows of the dictionaries.
    logit_scale
        Of the towers.
    settings, metrics
        Of the server.
    """

    def __init__(
        self,
        encoder: EncoderClient,
        catalogue: Catalogue,
        decoders: Decoders,
        logit_scale: float,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._encoder = encoder
        self._catalogue = catalogue
        self._decoders = decoders
        self._logit_scale = logit_scale
        self._settings = settings
        self._metrics = metrics
        self._bundle = catalogue.bundle.id
        self._calibration = read_calibration(catalogue.bundle)

    async def FilterAdversarial(  # noqa: N802
        self, request: pb.FilterAdversarialRequest, context: Any
    ) -> pb.FilterAdversarialResponse:
        """Judge each image, and filter those that are called adversarial."""
        calibration = self._calibration
        if calibration is None:
            raise NotCalibrated("this bundle has no defence calibration")
        count, asked = len(request.images), request.options
        if count + len(request.labels) > self._settings.max_items:
            message = (
                f"{count + len(request.labels)} images and labels; {self._settings.max_items} are allowed"
            )
            raise InvalidInput(message, [("images", message)])
        keep = asked.keep_residual if asked.HasField("keep_residual") else None
        choice = choose(calibration, MODES[asked.mode], keep, asked.second_look)
        work = Work(
            (*(image.data for image in request.images), *request.labels),
            calibration.dictionary,
            truncate_text=request.truncate_text,
            looks=2 if asked.second_look else 1,
        )
        try:
            check_texts(work.items, self._settings.max_text_bytes)
            encoded = await self._encoder.encode(work, context.time_remaining())
        except InvalidInput as error:
            raise _blamed(error, count) from error
        decoder = (await self._decoders.get(calibration.dictionary))[Modality.IMAGE]
        arguments = (request, encoded, calibration, decoder, choice)
        response, found = (
            self._answer(*arguments)
            if count < _THREAD_ITEMS
            else await asyncio.to_thread(self._answer, *arguments)
        )
        self._metrics.items.labels(_FILTER).inc(len(work.items))
        for screened in found:
            self._metrics.adversarial.labels(verdict_name(screened)).inc()
        return response

    def _answer(
        self,
        request: pb.FilterAdversarialRequest,
        encoded: Encoded,
        calibration: DefenseCalibration,
        decoder: Decoder,
        choice: FilterChoice,
    ) -> tuple[pb.FilterAdversarialResponse, list[Screened]]:
        count, asked = len(request.images), request.options
        first = looks(encoded.unit[:count], encoded.features[:count])
        twin = encoded.twin
        rate = self._settings.defense_false_positive_rate
        found = screen(
            first,
            encoded.noise[:count].tolist(),
            None if twin is None else looks(twin.unit[:count], twin.features[:count]),
            calibration,
            decoder.rows,
            decoder.origin,
            choice=choice,
            false_positive_rate=rate,
            filter_all=asked.filter_all,
        )
        labels = (
            LabelTexts(request.labels, encoded.unit[count:], self._logit_scale)
            if request.labels
            else LabelTexts(calibration.labels, calibration.label_units, self._logit_scale)
        )
        limit = asked.max_features if asked.HasField("max_features") else _DEFAULT_FEATURES
        table = self._catalogue.tables.get(calibration.dictionary)
        response = pb.FilterAdversarialResponse(
            images=[
                filtered_image(look, screened, table, labels, limit)
                for look, screened in zip(first, found, strict=True)
            ],
            embeddings_before=tensor(encoded.unit[:count]),
            embeddings_after=tensor(np.stack([screened.unit for screened in found])),
            false_positive_rate=rate,
            mode=mode_value(choice.mode),
            keep_residual=choice.keep_residual,
            dictionary=calibration.dictionary,
            timings=timings(encoded.queue_s, encoded.inference_s),
            bundle=self._bundle,
        )
        return response, found


def _blamed(error: InvalidInput, images: int) -> InvalidInput:
    """Return the error with paths of this request: items from `images` on are labels."""
    moved = relocated(error, lambda i: f"images[{i}]" if i < images else f"labels[{i - images}]")
    violations = [
        (path.replace("].image.data", "].data").removesuffix(".text"), what)
        for path, what in moved.violations
    ]
    return type(moved)(moved.message, violations, reason=moved.reason)
