"""The fake's DefenseService."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf import duration_pb2

from monofacet.testing._model import BUNDLE, DICTIONARY, EMBED_DIM, FakeModel
from monofacet.testing._status import abort
from monofacet.v1 import common_pb2, defense_service_pb2, defense_service_pb2_grpc

# First bytes of the formats that the contract knows.
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
# Images whose first feature is active are the fake's adversarial ones.
THRESHOLD = 0.5
FALSE_POSITIVE_RATE = 0.01
BUNDLED_LABELS = ("cat", "dog", "house")


class FakeDefense(FakeModel, defense_service_pb2_grpc.DefenseServiceServicer):
    """Calls an image adversarial where feature 0 is active, and filters by dropping that feature."""

    def FilterAdversarial(self, request: defense_service_pb2.FilterAdversarialRequest, context: Any) -> Any:
        """Judge a batch; every bad image is named."""
        self.check_bundle(request.bundle, context)
        problems = {
            f"images[{i}].data": "not a PNG, JPEG or WebP image"
            for i, image in enumerate(request.images)
            if not image.data.startswith(SIGNATURES)
        }
        if problems:
            abort(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{len(problems)} bad images",
                reason="INVALID_IMAGE",
                violations=problems,
            )
        options = request.options
        texts = list(request.labels) or list(BUNDLED_LABELS)
        labels = np.stack([self._unit(common_pb2.Input(text=text)) for text in texts])
        before = [self._unit(common_pb2.Input(image=image)) for image in request.images]
        judged = [self._judge(unit, texts, labels, options) for unit in before]
        chosen = options.mode or defense_service_pb2.FILTER_MODE_DROP
        return defense_service_pb2.FilterAdversarialResponse(
            images=[image for image, _ in judged],
            embeddings_before=_tensor(before),
            embeddings_after=_tensor([after for _, after in judged]),
            false_positive_rate=FALSE_POSITIVE_RATE,
            mode=chosen,
            keep_residual=options.keep_residual if options.HasField("keep_residual") else True,
            dictionary=DICTIONARY,
            timings=common_pb2.Timings(
                queue=duration_pb2.Duration(nanos=1_000_000), inference=duration_pb2.Duration(nanos=2_000_000)
            ),
            bundle=BUNDLE,
        )

    def _unit(self, item: common_pb2.Input) -> npt.NDArray[np.float32]:
        embedding = self.embed(item)
        unit: npt.NDArray[np.float32] = embedding / np.float32(np.linalg.norm(embedding))
        return unit

    def _judge(
        self,
        unit: npt.NDArray[np.float32],
        texts: list[str],
        labels: npt.NDArray[np.float32],
        options: defense_service_pb2.FilterOptions,
    ) -> tuple[defense_service_pb2.FilteredImage, npt.NDArray[np.float32]]:
        activation = float(self.activations(unit)[0])
        adversarial = activation > 0
        filtered = adversarial or options.filter_all
        after = unit
        if filtered and activation > 0:
            moved = unit.copy()
            moved[0] = 0.0
            after = moved / np.float32(np.linalg.norm(moved))
        scores = defense_service_pb2.DetectionScores(
            reconstruction_error=0.1, text_share=0.0, moved_share=activation**2, noise=0.0
        )
        if options.second_look:
            scores.instability = activation
        image = defense_service_pb2.FilteredImage(
            verdict=defense_service_pb2.VERDICT_ADVERSARIAL
            if adversarial
            else defense_service_pb2.VERDICT_CLEAN,
            score=0.9 if adversarial else 0.1,
            threshold=THRESHOLD,
            p_value=0.005 if adversarial else 0.5,
            scores=scores,
            suspicious_features=int(adversarial),
            filtered=filtered,
            label_before=_nearest(unit, texts, labels),
            label_after=_nearest(after, texts, labels),
        )
        if adversarial and (not options.HasField("max_features") or options.max_features):
            card = self.card(0)
            image.features.add(
                feature=0,
                activation=activation,
                filtered=0.0,
                reasons=[defense_service_pb2.SUSPICION_REASON_MOVED],
                label=card.label,
                name=card.name,
            )
        return image, after


def _nearest(
    unit: npt.NDArray[np.float32], texts: list[str], labels: npt.NDArray[np.float32]
) -> defense_service_pb2.ZeroShotLabel:
    cosines = labels @ unit
    weights = np.exp(10.0 * cosines)
    best = int(np.argmax(cosines))
    return defense_service_pb2.ZeroShotLabel(
        text=texts[best],
        index=best,
        probability=float(weights[best] / weights.sum()),
        similarity=float(cosines[best]),
    )


def _tensor(rows: list[npt.NDArray[np.float32]]) -> common_pb2.Tensor:
    data = b"".join(row.astype("<f4").tobytes() for row in rows)
    return common_pb2.Tensor(dtype=common_pb2.DATA_TYPE_FLOAT32, shape=[len(rows), EMBED_DIM], data=data)
