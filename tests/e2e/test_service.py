"""The real service, as a process of its own: answers, streams, health, metrics, and that it stays in its box."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import (
    feature_service_pb2_grpc,
    modality_service_pb2,
    modality_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from PIL import Image

from deployments.encoder.model import TowerModel
from deployments.gateway.services import SERVICES
from deployments.operations.settings import Settings
from services.bundle.load import Bundle
from tests.support.service import Service, metric
from tests.support.tiny_bundle import CAPTIONS
from tests.support.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def channel(running_service: Service) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running_service.target) as channel:
        yield channel


@pytest.fixture(scope="module")
def features(channel: grpc.Channel) -> Any:
    return feature_service_pb2_grpc.FeatureServiceStub(channel)


@pytest.fixture(scope="module")
def images(tiny: Bundle) -> list[bytes]:
    return [(tiny.path / sample.path).read_bytes() for sample in tiny.manifest.samples]


def inputs(images: list[bytes]) -> list[common.Input]:
    return [common.Input(image=common.Image(data=data)) for data in images] + [
        common.Input(text=caption) for caption in CAPTIONS
    ]


def array(tensor: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))


def settled_items(service: Service) -> float:
    """Return the items that have cost model time, once no call is in progress and the count stands still."""
    before = -1.0
    while True:
        now = metric(service, "monofacet_batch_size_sum")
        if now == before and metric(service, "monofacet_requests_in_flight") == 0:
            return now
        before = now
        time.sleep(1)


def test_the_answer_is_what_the_towers_say_in_process(
    features: Any, channel: grpc.Channel, served: Bundle, images: list[bytes]
) -> None:
    answer = features.Encode(
        pb.EncodeRequest(inputs=inputs(images), options=pb.EncodeOptions(dictionary="")), timeout=PATIENCE_S
    )
    # What it measured as fastest at its start, this process might not.
    models = model_service_pb2_grpc.ModelServiceStub(channel)
    backend = models.GetModel(model_service_pb2.GetModelRequest(), timeout=PATIENCE_S).model.runtime.backend
    model = TowerModel(served, Settings(backend=backend, precision="f32"))
    unit_image, norm_image = model.encode_images(np.stack([model.decode(model.open(i)) for i in images]))
    unit_text, norm_text = model.encode_texts(np.stack([model.tokenize(t, False) for t in CAPTIONS]))
    answered = array(answer.embeddings)
    assert np.isfinite(answered).all() and np.isfinite(answer.norms).all()
    # The same kernels on the same chunks; threads may add in another order, a few units of 6e-8.
    np.testing.assert_allclose(answered, np.concatenate([unit_image, unit_text]), atol=1e-6)
    np.testing.assert_allclose(answer.norms, np.concatenate([norm_image, norm_text]), rtol=1e-5)
    assert [f.dictionary for f in answer.features] == ["sae"] * len(answered)
    assert answer.bundle == served.id


def test_a_stream_says_the_same_as_a_batch(features: Any, images: list[bytes]) -> None:
    batch = features.Encode(pb.EncodeRequest(inputs=inputs(images)), timeout=PATIENCE_S)
    requests = [
        pb.StreamEncodeRequest(item=pb.StreamItem(id=str(n), input=value))
        for n, value in enumerate(inputs(images) * 20)
    ]
    answers = list(features.StreamEncode(iter(requests), timeout=PATIENCE_S))
    assert [a.id for a in answers] == [str(n) for n in range(len(requests))]
    served = np.stack([array(a.encoding.embedding) for a in answers])
    # Batches of other sizes may use other kernels; tests/services/test_towers.py measures their difference.
    np.testing.assert_allclose(served, np.tile(array(batch.embeddings), (20, 1)), atol=1e-5)


def test_pairs_are_scored_over_the_stream(channel: grpc.Channel, images: list[bytes]) -> None:
    stub = modality_service_pb2_grpc.ModalityServiceStub(channel)

    def requests() -> Iterator[modality_service_pb2.ScoreModalityRequest]:
        settings = modality_service_pb2.ScoreSettings(bootstrap_samples=100, shuffles=100)
        yield modality_service_pb2.ScoreModalityRequest(settings=settings)
        for start in range(5):
            pairs = [
                modality_service_pb2.ImageTextPair(
                    image=common.Image(data=images[n % len(images)]), text=f"{CAPTIONS[n % 4]} {start}"
                )
                for n in range(8)
            ]
            yield modality_service_pb2.ScoreModalityRequest(batch=modality_service_pb2.PairBatch(pairs=pairs))

    answer = stub.ScoreModality(requests(), timeout=PATIENCE_S)
    assert answer.pairs == 40
    assert [card.feature for card in answer.cards] == list(range(64))
    for card in answer.cards:
        if card.HasField("mds_energy"):
            assert card.mds_energy_low <= card.mds_energy <= card.mds_energy_high


def test_features_are_listed_and_inputs_classified(channel: grpc.Channel, images: list[bytes]) -> None:
    stub = modality_service_pb2_grpc.ModalityServiceStub(channel)
    page = stub.ListFeatures(modality_service_pb2.ListFeaturesRequest(page_size=5), timeout=PATIENCE_S)
    assert (len(page.cards), page.total) == (5, 64)
    card = stub.GetFeature(modality_service_pb2.GetFeatureRequest(feature=3), timeout=PATIENCE_S)
    assert card.card.feature == 3
    answer = stub.ClassifyModality(
        modality_service_pb2.ClassifyModalityRequest(inputs=inputs(images)), timeout=PATIENCE_S
    )
    for one in answer.classifications:
        assert sum(share.share for share in one.shares) == pytest.approx(1, abs=1e-6)


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", *SERVICES):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE_S)
    assert set(SERVICES) <= {s.name for s in listed.list_services_response.service}


def test_the_model_says_what_it_runs_on(channel: grpc.Channel, served: Bundle) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    model = stub.GetModel(model_service_pb2.GetModelRequest(), timeout=PATIENCE_S).model
    assert model.bundle == served.id
    assert model.runtime.backend in ("torch", "openvino")
    assert (model.tower.embed_dim, model.tower.image_size, model.tower.context_length) == (16, 32, 16)
    assert model.tower.parameters > 1_000_000


def test_metrics_count_what_was_asked(features: Any, running_service: Service) -> None:
    method = "monofacet.v1.FeatureService/Encode"
    before = metric(running_service, "monofacet_items_total", method=method)
    features.Encode(pb.EncodeRequest(inputs=[common.Input(text="a")] * 7), timeout=PATIENCE_S)
    assert metric(running_service, "monofacet_items_total", method=method) == before + 7
    assert metric(running_service, "monofacet_model_info", bundle=running_service.bundle) == 1
    assert metric(running_service, "monofacet_inference_duration_seconds_count", deployment="encoder") > 0


def noise(seed: int) -> bytes:
    """Return a large PNG that takes long to decode."""
    pixels = np.random.default_rng(seed).integers(0, 256, (512, 512, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def test_a_client_that_vanishes_mid_stream_costs_no_more_model_time(
    features: Any, running_service: Service
) -> None:
    before = settled_items(running_service)
    data = noise(0)
    requests = (
        pb.StreamEncodeRequest(item=pb.StreamItem(input=common.Input(image=common.Image(data=data))))
        for _ in range(5_000)
    )
    call = features.StreamEncode(requests)
    next(call)
    call.cancel()
    # The next reply carries the count of what ran for the one who left.
    features.Encode(pb.EncodeRequest(inputs=[common.Input(text="after")]), timeout=PATIENCE_S)
    features.Encode(pb.EncodeRequest(inputs=[common.Input(text="after")]), timeout=PATIENCE_S)
    ran = settled_items(running_service) - before - 2
    # What had been answered, and what was in the model or decoded beside it: messages in flight, no more.
    settings = Settings()
    assert ran <= settings.coalesce_items * settings.messages_in_flight + settings.max_batch_items


def test_expired_calls_cost_no_model_time(features: Any, running_service: Service) -> None:
    before = settled_items(running_service)
    for _ in range(20):
        with pytest.raises(grpc.RpcError) as caught:
            features.Encode(pb.EncodeRequest(inputs=[common.Input(text="late")] * 20), timeout=1e-4)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    features.Encode(pb.EncodeRequest(inputs=[common.Input(text="after")]), timeout=PATIENCE_S)
    # A deadline of 0.1 ms is over before a message can have crossed to the encoder.
    assert settled_items(running_service) - before == 1


def listening(pids: set[int]) -> dict[str, str]:
    """Return the TCP sockets on which these processes listen: inode to hexadecimal address."""
    inodes = set()
    for pid in pids:
        try:
            links = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue
        for link in links:
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                found[columns[9]] = columns[1].rsplit(":", 1)[0]
    return found


def test_nothing_listens_outside_loopback(running_service: Service) -> None:
    pids = running_service.descendants() | {running_service.process.pid}
    sockets = listening(pids)
    assert len(sockets) >= 2
    # 127.0.0.1, the same mapped into IPv6, and ::1, in the kernel's byte order.
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(sockets.values()) <= loopback
