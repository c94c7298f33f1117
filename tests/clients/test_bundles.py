"""A client names its bundle in every request, and shares its connection with clients of other bundles."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any

import monofacet
import PIL.Image
import pytest
from monofacet.testing import FakeMonofacet, mock_async_client, mock_client

CALLS: dict[str, Callable[[Any], Any]] = {
    "Encode": lambda client: client.encode("a"),
    "StreamEncode": lambda client: client.stream_encode(["a", "b"]),
    "ListFeatures": lambda client: client.features_page(),
    "GetFeature": lambda client: client.feature(1),
    "ClassifyModality": lambda client: client.classify_modality("a"),
    "ScoreModality": lambda client: client.score_modality([(png(), "a"), (png(), "b")]),
    "ClassifyGender": lambda client: client.classify_gender("a"),
    # With settings, so that the model need not be asked first for what it recommends.
    "AuditGender": lambda client: client.audit_gender(
        [monofacet.LabelledItem("a", "woman")],
        monofacet.AuditSettings((monofacet.Ablation(top_gender_features=4),)),
    ),
    "FilterAdversarial": lambda client: client.filter_adversarial([png()]),
    "Generate": lambda client: client.generate("a"),
    "PreviewSteering": lambda client: client.preview_steering("a", monofacet.SteeringEdit([1], scale=0.0)),
    "GetModel": lambda client: client.model(),
}


def png() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


class Recording(FakeMonofacet):
    """Takes any bundle, and remembers each message's."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def check_bundle(self, bundle: str, context: Any) -> None:
        self.asked.append(bundle)


def run_sync(client: Any, call: Callable[[Any], Any]) -> None:
    value = call(client)
    if hasattr(value, "__next__"):
        list(value)


async def run_async(client: Any, call: Callable[[Any], Any]) -> None:
    value = call(client)
    if hasattr(value, "__anext__"):
        _ = [item async for item in value]
    else:
        await value


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_every_call_names_the_bundle_once(method: str, asynchronous: bool) -> None:
    service = Recording()
    if asynchronous:
        client, _ = mock_async_client(service, bundle="photos")
        asyncio.run(run_async(client, CALLS[method]))
    else:
        run_sync(mock_client(service, bundle="photos")[0], CALLS[method])
    # Of a stream the first message alone.
    assert service.asked[0] == "photos"
    assert set(service.asked[1:]) <= {""}


def test_a_client_of_another_bundle_shares_the_connection_and_leaves_it_open() -> None:
    service = Recording()
    client, _ = mock_client(service)
    with client.with_bundle("photos") as photos:
        assert photos.with_bundle("").bundle == ""
        photos.encode("a")
    client.encode("a")
    assert service.asked == ["photos", ""]
    assert (client.bundle, photos.bundle) == ("", "photos")
    assert "photos" in repr(photos)


def test_a_bundle_that_is_not_served_is_not_found() -> None:
    client, _ = mock_client(FakeMonofacet())
    assert client.with_bundle("fake").encode("a").bundle.startswith("fake@")
    with pytest.raises(monofacet.NotFoundError, match="no bundle 'other'") as caught:
        client.with_bundle("other").encode("a")
    assert caught.value.reason == "UNKNOWN_MODEL"
