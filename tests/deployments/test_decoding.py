"""What waits for whom at the encoder: texts for no picture, pictures for no costly one, nobody for one who left."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deployments.batching import DeadlineExpired
from deployments.encoder.decoding import Decoding, Prepared
from deployments.encoder.tasks import EncodeTask, TravelsAlone
from deployments.operations.settings import Settings
from services.check import Check
from services.encoding.formats.picture import Picture
from services.errors import CorruptImage
from tests.deployments.debug import DebugModel

# Generous: only a test that fails waits for so long.
LONG_S = 60


class SlowModel(DebugModel):
    """Decodes pictures called slow or costly until it is told to end, or the test lets it finish."""

    def __init__(self) -> None:
        super().__init__()
        self.began = threading.Semaphore(0)
        self.finish = threading.Event()
        self.ended = threading.Event()

    def decode(self, picture: Picture, check: Check) -> NDArray[Any]:
        if picture.data.startswith((b"slow", b"costly")):
            self.began.release()
            try:
                while not self.finish.wait(0.005):
                    check()
            except BaseException:
                self.ended.set()
                raise
        return super().decode(picture, check)


@pytest.fixture
def model():
    made = SlowModel()
    yield made
    made.finish.set()


@pytest.fixture
async def decoding(model):
    made = Decoding(Settings(decode_threads=2, threads=1), model)
    yield made
    model.finish.set()
    await asyncio.wait_for(made.close(), LONG_S)


async def begin(model: SlowModel) -> None:
    """Wait until one more picture is being decoded."""
    assert await asyncio.to_thread(model.began.acquire, timeout=LONG_S)


async def test_texts_wait_for_no_picture(model, decoding):
    held = []
    for _ in range(2):
        held.append(asyncio.create_task(decoding([EncodeTask((b"slow",))], [None])))
        await begin(model)
    (items,) = await asyncio.wait_for(decoding([EncodeTask(("a text",))], [None]), LONG_S)
    assert isinstance(items[0], Prepared)
    assert not any(task.done() for task in held)
    model.finish.set()
    answers = await asyncio.wait_for(asyncio.gather(*held), LONG_S)
    assert all(isinstance(items[0], Prepared) for (items,) in answers)


async def test_pictures_wait_for_no_costly_one(model, decoding):
    held = [asyncio.create_task(decoding([EncodeTask((b"costly",))], [None])) for _ in range(5)]
    await begin(model)
    (items,) = await asyncio.wait_for(decoding([EncodeTask((b"a picture", "and a text"))], [None]), LONG_S)
    assert [type(item) for item in items] == [Prepared, Prepared]
    assert not any(task.done() for task in held)


async def test_a_costly_picture_is_sent_away_from_the_others_of_its_message(model, decoding):
    tasks = [EncodeTask((b"a picture",)), EncodeTask(("text", b"costly")), EncodeTask(("text",))]
    answers = await asyncio.wait_for(decoding(tasks, [None] * 3), LONG_S)
    assert [type(items[0]) for items in answers] == [Prepared, TravelsAlone, Prepared]


async def test_items_keep_their_places(model, decoding):
    model.finish.set()
    task = EncodeTask((b"costly 1", "text", b"bad", b"picture", b"costly 2"), each=True)
    (items,) = await asyncio.wait_for(decoding([task], [None]), LONG_S)
    expected = [model.prepare(item, False) if item != b"bad" else None for item in task.items]
    for item, array in zip(items, expected, strict=True):
        if array is None:
            assert isinstance(item, CorruptImage)
            assert item.violations[0][0] == "[2].image.data"
        else:
            assert isinstance(item, Prepared)
            assert np.array_equal(item.array, array)


@pytest.mark.parametrize("name", [b"slow", b"costly"])
async def test_the_deadline_ends_the_decoding(model, decoding, name):
    deadline = asyncio.get_running_loop().time() + 0.2
    (items,) = await asyncio.wait_for(decoding([EncodeTask((name,))], [deadline]), LONG_S)
    assert isinstance(items[0], DeadlineExpired)
    assert model.ended.is_set()


@pytest.mark.parametrize("name", [b"slow", b"costly"])
async def test_a_caller_who_goes_ends_the_decoding(model, decoding, name):
    task = asyncio.create_task(decoding([EncodeTask((name, name))], [None]))
    await begin(model)
    task.cancel()
    assert await asyncio.to_thread(model.ended.wait, LONG_S)
    # The thread is free again.
    (items,) = await asyncio.wait_for(decoding([EncodeTask((b"a picture",))], [None]), LONG_S)
    assert isinstance(items[0], Prepared)
