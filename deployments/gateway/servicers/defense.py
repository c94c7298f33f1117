"""DefenseService: which images are adversarial, and their embeddings without what an attack moved."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from monofacet.v1 import defense_service_pb2 as pb
from monofacet.v1 import defense_service_pb2_grpc

from deployments.batching import GreedyBatcher
from deployments.encoder.tasks import Encoded, EncodeTask
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.compute.decoders import Decoders
from deployments.gateway.compute.defense import (
    MODES,
    FeatureLabels,
    LabelTexts,
    Question,
    Verdicts,
    filtered_images,
    judge,
    looks,
    mode_value,
    verdict_name,
)
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.messages import check_texts, relocated, tensor, timings
from deployments.operations.metrics import Metrics
from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from services.defense import DefenseCalibration, FilterChoice
from services.defense.screen import choose
from services.errors import InvalidInput, NotCalibrated
from services.modality.modalities import Modality

_FILTER = "monofacet.v1.DefenseService/FilterAdversarial"
_DEFAULT_FEATURES = 20
# Images that are worth a thread; fewer are done before a thread would have started.
_THREAD_ITEMS = 64
# Images that are judged in one go: as many as travel in one message.
_JUDGED_TOGETHER = 64


def read_calibration(bundle: Bundle) -> DefenseCalibration | None:
    """Read the bundle's defense calibration; None where it has none."""
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
        self._calibration = calibration = read_calibration(catalogue.bundle)
        self._labels = LabelTexts((), np.zeros((0, 0), np.float32), logit_scale)
        self._labels_of_features: FeatureLabels | None = None
        if calibration is not None:
            self._labels = LabelTexts(calibration.labels, calibration.label_units, logit_scale)
            table = catalogue.tables.get(calibration.dictionary)
            self._labels_of_features = None if table is None else FeatureLabels(table)
        # Requests that the encoder answered together are judged together.
        self._judging: GreedyBatcher[Question, Verdicts] = GreedyBatcher(
            self._judge,
            max_batch=_JUDGED_TOGETHER,
            # What waits here was admitted by the encoder's backlog.
            max_queued=2 * settings.max_queued_items,
            weigh=lambda question: len(question.looks),
        )

    async def FilterAdversarial(  # noqa: N802
        self, request: pb.FilterAdversarialRequest, context: Any
    ) -> pb.FilterAdversarialResponse:
        """Judge each image, and filter those that are called adversarial."""
        calibration = self._calibration
        if calibration is None:
            raise NotCalibrated("this bundle has no defense calibration")
        count, asked = len(request.images), request.options
        if count + len(request.labels) > self._settings.max_items:
            message = (
                f"{count + len(request.labels)} images and labels; {self._settings.max_items} are allowed"
            )
            raise InvalidInput(message, [("images", message)])
        keep = asked.keep_residual if asked.HasField("keep_residual") else None
        choice = choose(calibration, MODES[asked.mode], keep, asked.second_look)
        task = EncodeTask(
            (*(image.data for image in request.images), *request.labels),
            calibration.dictionary,
            truncate_text=request.truncate_text,
            passes=2 if asked.second_look else 1,
        )
        try:
            check_texts(task.items, self._settings.max_text_bytes, task.truncate_text)
            encoded = await self._encoder.encode(task, context.time_remaining())
        except InvalidInput as error:
            raise _blamed(error, count) from error
        judged = await self._judging.submit([self._question(request, encoded, calibration, choice)])
        (verdicts,) = judged.results
        self._metrics.items.labels(_FILTER).inc(len(task.items))
        for screened in verdicts.screened:
            self._metrics.adversarial.labels(verdict_name(screened)).inc()
        limit = asked.max_features if asked.HasField("max_features") else _DEFAULT_FEATURES
        return pb.FilterAdversarialResponse(
            images=filtered_images(verdicts, self._labels_of_features, limit),
            embeddings_before=tensor(encoded.unit[:count]),
            embeddings_after=tensor(np.stack([screened.unit for screened in verdicts.screened])),
            false_positive_rate=self._settings.defense_false_positive_rate,
            mode=mode_value(choice.mode),
            keep_residual=choice.keep_residual,
            dictionary=calibration.dictionary,
            timings=timings(encoded.queue_s, encoded.inference_s),
            bundle=self._bundle,
        )

    def _question(
        self,
        request: pb.FilterAdversarialRequest,
        encoded: Encoded,
        calibration: DefenseCalibration,
        choice: FilterChoice,
    ) -> Question:
        count, smoothed = len(request.images), encoded.smoothed
        return Question(
            looks(encoded.unit[:count], encoded.features[:count]),
            None if smoothed is None else looks(smoothed.unit[:count], smoothed.features[:count]),
            encoded.noise[:count],
            choice,
            request.options.filter_all,
            LabelTexts(request.labels, encoded.unit[count:], self._logit_scale)
            if request.labels
            else self._labels,
        )

    async def _judge(self, questions: list[Question]) -> list[Verdicts]:
        calibration = self._calibration
        if calibration is None:
            raise NotCalibrated("this bundle has no defense calibration")
        decoder = (await self._decoders.get(calibration.dictionary))[Modality.IMAGE]
        arguments = (questions, calibration, decoder, self._settings.defense_false_positive_rate)
        if sum(len(question.looks) for question in questions) < _THREAD_ITEMS:
            return judge(*arguments)
        return await asyncio.to_thread(judge, *arguments)


def _blamed(error: InvalidInput, images: int) -> InvalidInput:
    """Return the error with paths of this request: items from `images` on are labels."""
    moved = relocated(error, lambda i: f"images[{i}]" if i < images else f"labels[{i - images}]")
    return moved.moved(lambda path: path.replace("].image.data", "].data").removesuffix(".text"))
