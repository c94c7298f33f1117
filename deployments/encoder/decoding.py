"""From files and texts to the arrays that the towers take, in threads beside the model.

Three queues, so that none waits for what is dearer: texts, pictures, and costly pictures, those whose headers say that
they take long to decode. None takes longer than `max_decode_s`, by estimate, and each ends with its caller's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from deployments.batching import BatcherClosed, DeadlineExpired, GreedyBatcher, QueueFull
from deployments.encoder.tasks import EncodeTask, TravelsAlone
from deployments.operations.process import give_way
from deployments.operations.settings import Settings
from services.check import Check
from services.encoding.formats.picture import Picture
from services.errors import InvalidInput
from services.modality.modalities import Modality

log = logging.getLogger("monofacet.encoder")

Result = TypeVar("Result")

# Items that one thread decodes in one go: few, so that a large message does not hold back the next one's.
_TOGETHER = 4
# Seconds of decoding, by estimate, from which a picture is costly: a photograph of 12 megapixels takes half as long.
COSTLY_S = 0.25


class Decoder(Protocol):
    """What is needed of the model."""

    def tokenize(self, text: str, truncate: bool) -> NDArray[Any]:
        """Return a text's tokens, or raise TextTooLong."""
        ...

    def open(self, data: bytes) -> Picture:
        """Read what a file says of itself, or raise ImageError."""
        ...

    def decode(self, picture: Picture, check: Check) -> NDArray[Any]:
        """Return the pixels of what was opened, or raise ImageError; what `check` raises ends it."""
        ...


class EncoderFailed(Exception):
    """The encoder met an error that is no caller's fault; the log has it."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One item, ready for the towers."""

    modality: Modality
    array: NDArray[Any]
    dictionary: str | None
    max_features: int | None
    passes: int


# Why an item cannot go on, other than that it is bad.
Failed = EncoderFailed | DeadlineExpired | QueueFull | BatcherClosed | TravelsAlone
# What becomes of an item before it is queued for the towers.
Decoded = Prepared | InvalidInput | Failed


@dataclass(frozen=True, slots=True)
class _Item:
    """One item of a task, on its way to be decoded."""

    task: EncodeTask
    index: int
    check: Check
    picture: Picture | None = None


class _Lane:
    """A queue of items with its threads."""

    def __init__(
        self,
        name: str,
        threads: int,
        together: int,
        settings: Settings,
        run: Callable[[_Item], Decoded | _Item],
    ) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(
            threads, f"decode-{name}", initializer=give_way, initargs=(settings.compute_niceness,)
        )
        self._batcher: GreedyBatcher[_Item, Decoded | _Item] = GreedyBatcher(
            self._some, max_batch=together, max_queued=2 * settings.max_queued_items, concurrency=threads
        )

    async def __call__(
        self, items: Sequence[_Item], deadline: float | None, task: EncodeTask
    ) -> Sequence[Decoded | _Item]:
        outcome = await self._batcher.submit(
            items, deadline=deadline, request=task.stream or None, caller=task.caller
        )
        return outcome.results

    async def _some(self, items: Sequence[_Item]) -> list[Decoded | _Item]:
        def run() -> list[Decoded | _Item]:
            return [self._run(item) for item in items]

        return await asyncio.get_running_loop().run_in_executor(self._pool, run)

    async def close(self) -> None:
        await self._batcher.close()
        await asyncio.to_thread(self._pool.shutdown)


class Decoding:
    """Decodes the items of many callers; tasks of all messages share the threads item by item.

    Parameters
    ----------
    settings
        Threads and queues.
    model
        What opens, decodes and tokenizes.
    """

    def __init__(self, settings: Settings, model: Decoder) -> None:
        self._model = model
        threads = settings.decode_threads
        # One thread: tokenizing takes microseconds and holds the interpreter's lock.
        self._texts = _Lane("texts", 1, _TOGETHER, settings, self._tokenize)
        self._pictures = _Lane("pictures", threads, _TOGETHER, settings, self._open)
        self._costly = _Lane("costly", max(1, threads // 2), 1, settings, self._decode)

    async def __call__(
        self, tasks: Sequence[EncodeTask], deadlines: Sequence[float | None]
    ) -> list[Sequence[Decoded]]:
        """Decode every item of every task.

        A task of several that has a costly picture is not decoded but answered with TravelsAlone: the others, which
        are answered together with it, would wait for it.

        Parameters
        ----------
        tasks
            Of one message.
        deadlines
            Of each, by the event loop's clock; None for none.
        """
        alone = len(tasks) == 1
        return list(
            await asyncio.gather(
                *(self._one(task, deadline, alone) for task, deadline in zip(tasks, deadlines, strict=True))
            )
        )

    async def close(self) -> None:
        """Finish what is queued."""
        for lane in (self._texts, self._pictures, self._costly):
            await lane.close()

    async def _one(self, task: EncodeTask, deadline: float | None, alone: bool) -> Sequence[Decoded]:
        gone = threading.Event()
        # The event loop may have another clock than the threads.
        ends = None if deadline is None else time.monotonic() + deadline - asyncio.get_running_loop().time()
        check = partial(_check, gone, ends)
        items = [_Item(task, index, check) for index in range(len(task.items))]
        texts = [item for item in items if isinstance(task.items[item.index], str)]
        pictures = [item for item in items if not isinstance(task.items[item.index], str)]
        try:
            parts = await asyncio.gather(
                self._texts(texts, deadline, task), self._pictures(pictures, deadline, task)
            )
            decoded: dict[int, Decoded] = {}
            costly: list[_Item] = []
            for item, result in zip([*texts, *pictures], [*parts[0], *parts[1]], strict=True):
                if isinstance(result, _Item):
                    costly.append(result)
                else:
                    decoded[item.index] = result
            if costly and not alone:
                return [TravelsAlone()]
            for item, result in zip(costly, await self._costly(costly, deadline, task), strict=True):
                assert not isinstance(result, _Item)
                decoded[item.index] = result
            return [decoded[index] for index in range(len(items))]
        except (QueueFull, DeadlineExpired, BatcherClosed) as error:
            return [error]
        except Exception:  # one caller's failure must not fail the others of the message
            log.exception("items cannot be decoded")
            return [EncoderFailed("the encoder failed")]
        finally:
            # Ends what is decoded for a caller who has gone; nothing once it is done.
            gone.set()

    def _tokenize(self, item: _Item) -> Decoded:
        text = item.task.items[item.index]
        assert isinstance(text, str)
        return _attempt(
            item, ".text", lambda: _prepared(item, self._model.tokenize(text, item.task.truncate_text))
        )

    def _open(self, item: _Item) -> Decoded | _Item:
        """Decode a picture, or return it opened where it is costly."""
        data = item.task.items[item.index]
        assert isinstance(data, bytes)

        def run() -> Decoded | _Item:
            picture = self._model.open(data)
            if picture.seconds > COSTLY_S:
                return _Item(item.task, item.index, item.check, picture)
            return _prepared(item, self._model.decode(picture, item.check))

        return _attempt(item, ".image.data", run)

    def _decode(self, item: _Item) -> Decoded:
        picture = item.picture
        assert picture is not None
        return _attempt(item, ".image.data", lambda: _prepared(item, self._model.decode(picture, item.check)))


def _check(gone: threading.Event, ends: float | None) -> None:
    if gone.is_set() or (ends is not None and time.monotonic() >= ends):
        raise DeadlineExpired


def _prepared(item: _Item, array: NDArray[Any]) -> Prepared:
    task = item.task
    is_text = isinstance(task.items[item.index], str)
    modality = Modality.TEXT if is_text else Modality.IMAGE
    return Prepared(modality, array, task.dictionary, task.max_features, 0 if is_text else task.passes)


def _attempt(item: _Item, field: str, run: Callable[[], Result]) -> Result | Failed | InvalidInput:
    """Run one item's part; one item's surprise must not fail the others of the message."""
    try:
        item.check()
        return run()
    except InvalidInput as error:
        return error.at(f"[{item.index}]{field}")
    except DeadlineExpired as error:
        return error
    except BaseException:  # a Rust library's panic is no Exception
        log.exception("an item cannot be decoded")
        return EncoderFailed("the encoder failed")
