"""Images from a running service: the bytes of this process, and stopped when nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psutil
import pytest
from monofacet import Client, GeneratedImage, SteeringEdit

from services.bundle.load import Bundle
from services.imaging.edits import Edit, ImageRequest, SetQuantile, Steering
from services.imaging.generator import Imaging
from services.modality.tables import Label
from tests.support.service import Service
from tests.support.waiting import CALL_S

EDIT = SteeringEdit("image", quantile=0.8)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with Client(service.target, timeout=CALL_S) as client:
        yield client


def test_a_served_image_has_the_bytes_of_this_process_alone_and_among_strangers(
    client: Client, bundle: Bundle
) -> None:
    steering = Steering((Edit(Label.IMAGE, SetQuantile(0.8)),))
    (expected,) = Imaging.load(bundle).generate([ImageRequest("red circle", seed=5, steering=steering)])
    (alone,) = client.generate("red circle", seeds=5, edits=[EDIT]).images
    assert alone.image.tobytes() == expected.image.tobytes()
    assert alone.delta == pytest.approx(expected.delta)
    with ThreadPoolExecutor(9) as callers:
        strangers = [callers.submit(client.generate, f"stranger {i}", seeds=i, steps=3 + i) for i in range(8)]
        mixed = callers.submit(client.generate, "red circle", seeds=5, edits=[EDIT])
        assert all(stranger.result().images[0].ok for stranger in strangers)
        assert mixed.result().images[0].data == alone.data


def processor_time(service: Service) -> float:
    """Return the processor time (s) that the generator has taken; what else the machine does is not in it."""
    found = [psutil.Process(pid) for pid in service.descendants()]
    (generator,) = (process for process in found if "monofacet:generator" in " ".join(process.cmdline()))
    return sum(generator.cpu_times()[:2])


def test_leaving_stops_the_work(client: Client, service: Service) -> None:
    begun = processor_time(service)
    list(client.generate_events("red circle", seeds=range(8), steps=50))
    whole = processor_time(service) - begun
    with closing(client.generate_events("red circle", seeds=range(8), steps=50)) as events:
        next(iter(events))
    (image,) = client.generate("red circle", seeds=1, steps=4).images
    assert image.ok
    # The next image shares its steps with what still runs of the eight, so that is behind us; half is generous.
    assert processor_time(service) - begun < 1.5 * whole


def test_twins_and_previews_come_over_the_wire(client: Client) -> None:
    events = list(
        client.generate_events("red circle", seeds=[1, 2], edits=[EDIT], unsteered=True, preview_every=2)
    )
    images = [event for event in events if isinstance(event, GeneratedImage)]
    assert len(images) == 4
    plain = client.generate("red circle", seeds=[1, 2])
    twins = {image.index: image for image in images if image.unsteered}
    assert [twins[i].image.tobytes() for i in (0, 1)] == [image.image.tobytes() for image in plain.images]


def test_the_model_tells_its_pipeline_once_it_is_warm(client: Client) -> None:
    client.generate("red circle", seeds=1)
    pipeline = client.model().pipeline
    assert pipeline is not None
    assert pipeline.ready
    assert pipeline.paths == ("embedding", "prompt")
    assert client.preview_steering("red circle", EDIT).delta > 0
