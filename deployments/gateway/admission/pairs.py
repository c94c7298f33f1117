"""What one ScoreModality stream keeps, and where its pairs stand in the stream."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from monofacet.v1 import modality_service_pb2 as pb

from deployments.encoder.tasks import Encoded, Features, ScoreRequest
from deployments.gateway.interceptors.chain import current_caller
from services.errors import InvalidInput

_ITEM = re.compile(r"\[(\d+)\]\.(.*)")
_BATCH = re.compile(r"batch\.pairs\[(\d+)\](.*)")


def score_settings(asked: pb.ScoreSettings, dictionary: str) -> pb.ScoreSettings:
    """Return the settings with every field set: the contract's defaults where the caller set none."""
    used = pb.ScoreSettings(
        dictionary=dictionary,
        delta=0.25,
        bootstrap_samples=1_000,
        shuffles=1_000,
        false_discovery_rate=0.05,
        seed=0,
        truncate_text=asked.truncate_text,
    )
    for name in ("delta", "bootstrap_samples", "shuffles", "false_discovery_rate", "seed"):
        if asked.HasField(name):
            setattr(used, name, getattr(asked, name))
    return used


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch begins in the stream: pairs before it."""

    start: int

    def relocated(self, error: InvalidInput, pairs: int) -> InvalidInput:
        """Return `error` with paths that count the pairs over the stream: `pairs[41].image.data`.

        Parameters
        ----------
        error
            With paths of the work (`[2].image.data`, images first, then texts) or of the message
            (`batch.pairs[2].text`).
        pairs
            Pairs of the batch.
        """

        def move(path: str) -> str:
            if (match := _BATCH.fullmatch(path)) is not None:
                return f"pairs[{self.start + int(match.group(1))}]{match.group(2)}"
            if (match := _ITEM.fullmatch(path)) is not None:
                return f"pairs[{self.start + int(match.group(1)) % pairs}].{match.group(2)}"
            return path

        return error.moved(move)


@dataclass(slots=True)
class PairScores:
    """The active features of the pairs so far.

    Attributes
    ----------
    dictionary
        Name of the dictionary.
    settings
        As used.
    max_pairs
        Pairs that the stream may hold.
    queue_s, inference_s
        The longest wait and the sum of inference over the batches, seconds.
    stream
        Names it in the work for the encoder: a stream that waits is no call that is refused.
    """

    dictionary: str
    settings: pb.ScoreSettings
    max_pairs: int
    queue_s: float = 0.0
    inference_s: float = 0.0
    stream: str = field(default_factory=partial(secrets.token_hex, 8))
    _images: list[Features] = field(default_factory=list)
    _texts: list[Features] = field(default_factory=list)
    _groups: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        """Pairs so far."""
        return len(self._images)

    def place_of_next_batch(self) -> Place:
        """Return where the next batch begins."""
        return Place(self.pairs)

    def check_room(self, more: int) -> None:
        """Raise InvalidInput when `more` pairs would pass the limit; before anything of them is encoded."""
        if self.pairs + more > self.max_pairs:
            message = f"more than {self.max_pairs} pairs"
            raise InvalidInput(message, [(f"pairs[{self.max_pairs}]", message)], reason="TOO_MANY_PAIRS")

    def add(self, encoded: Encoded, groups: Iterable[str]) -> None:
        """Keep the features of one batch (images first, then texts) and the groups of its pairs."""
        half = len(encoded.features) // 2
        self._images.extend(encoded.features[:half])
        self._texts.extend(encoded.features[half:])
        self._groups.extend(groups)
        self.queue_s = max(self.queue_s, encoded.queue_s)
        self.inference_s += encoded.inference_s

    def request(self, remaining_s: float | None) -> ScoreRequest:
        """Return what is to be scored within `remaining_s` seconds."""
        s = self.settings
        return ScoreRequest(
            self.dictionary,
            tuple(self._images),
            tuple(self._texts),
            tuple(self._groups),
            s.delta,
            s.bootstrap_samples,
            s.shuffles,
            s.false_discovery_rate,
            s.seed,
            remaining_s,
            current_caller.get(),
        )
