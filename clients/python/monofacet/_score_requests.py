"""The messages of ScoreModality: its settings, and pairs gathered into batches. Pure: no channel is touched."""

from __future__ import annotations

from monofacet import _exceptions as exceptions
from monofacet._inputs import MAX_REQUEST_BYTES, Pair, image_bytes, sendable
from monofacet._requests import set_given, settings_given
from monofacet._types import ScoreSettings
from monofacet.v1 import common_pb2, modality_service_pb2


@sendable("the settings")
def score_settings(settings: ScoreSettings) -> modality_service_pb2.ScoreModalityRequest:
    """Make the first message of ScoreModality.

    Parameters
    ----------
    settings
        What is None stays unset.

    Returns
    -------
    ScoreModalityRequest
        With the settings set.

    Raises
    ------
    InputError
        If a setting cannot be sent; the message says which.
    """
    message = modality_service_pb2.ScoreSettings()
    set_given(message, settings_given(settings))
    return modality_service_pb2.ScoreModalityRequest(settings=message)


class PairBatcher:
    """Gathers pairs into messages.

    Parameters
    ----------
    batch_size
        Pairs a message, at most 256.
    max_bytes
        Bytes a message; a message with one pair may be larger.
    """

    def __init__(self, batch_size: int = 32, max_bytes: int = MAX_REQUEST_BYTES // 4) -> None:
        self._batch_size = batch_size
        self._max_bytes = max_bytes
        self._batch = modality_service_pb2.PairBatch()
        self._bytes = 0
        self._taken = 0

    def add(self, pair: Pair) -> list[modality_service_pb2.ScoreModalityRequest]:
        """Take a pair.

        Parameters
        ----------
        pair
            An image and its text, and optionally a group.

        Returns
        -------
        list of ScoreModalityRequest
            The batch before it, if it is full; else nothing.

        Raises
        ------
        InputError
            If the pair cannot be sent; the message says which.
        """
        try:
            image, text, *rest = pair
            group = str(rest.pop()) if rest else ""
            if rest:
                raise exceptions.InputError("a pair is an image, a text and optionally a group")
            message = modality_service_pb2.ImageTextPair(
                image=common_pb2.Image(data=image_bytes(image)), text=text, group=group
            )
        except (TypeError, ValueError) as error:
            raise exceptions.InputError(f"pairs[{self._taken}]: {error}") from error
        self._taken += 1
        size = message.ByteSize()
        full = len(self._batch.pairs) == self._batch_size or self._bytes + size > self._max_bytes
        messages = self.rest() if full else []
        self._batch.pairs.append(message)
        self._bytes += size
        return messages

    def rest(self) -> list[modality_service_pb2.ScoreModalityRequest]:
        """Give what was gathered.

        Returns
        -------
        list of ScoreModalityRequest
            One message, or none if there is nothing.
        """
        batch, self._batch, self._bytes = self._batch, modality_service_pb2.PairBatch(), 0
        return [modality_service_pb2.ScoreModalityRequest(batch=batch)] if batch.pairs else []
