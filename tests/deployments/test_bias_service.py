"""BiasService through a gateway and an encoder with real, tiny towers, in this process and without Ray."""

from __future__ import annotations

import asyncio
import io
import pickle
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc import aio
from monofacet.v1 import bias_service_pb2 as pb
from monofacet.v1 import bias_service_pb2_grpc, common_pb2, feature_service_pb2, feature_service_pb2_grpc

from deployments.encoder import Encoder
from deployments.gateway.audits import AuditItems
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.decoders import read_decoders
from deployments.gateway.server import GatewayServer
from deployments.model import TowerModel, load_dictionaries
from deployments.settings import Settings
from deployments.work import Encoded, Features
from services.bias.ablation import FeatureAblation, Mode, Side
from services.bias.activations import Stacked
from services.bias.calibration import BiasCalibration
from services.bundle import Bundle
from services.dictionaries import sparse_rows
from services.modalities import Modality
from tests.deployments.conftest import array, error_details
from tests.support.tiny_bias import THRESHOLDS, with_bias
from tests.support.tiny_bundle import draw

CODE = grpc.StatusCode
# float32 sums in another order; scores are products of unit vectors and a direction of length about 1.
CLOSE = 1e-5


def picture(i: int = 0, shade: int = 0) -> common_pb2.Input:
    image = draw(i % 4)
    image.paste((shade, shade, 200), (0, 0, 8, 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return common_pb2.Input(image=common_pb2.Image(data=buffer.getvalue()))


def words(text: str) -> common_pb2.Input:
    return common_pb2.Input(text=text)


class Counting:
    """A tower model that counts what it embeds."""

    def __init__(self, model: TowerModel) -> None:
        self.model = model
        self.items = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_images(self, pixels: np.ndarray) -> Any:
        self.items += len(pixels)
        return self.model.encode_images(pixels)

    def encode_texts(self, tokens: np.ndarray) -> Any:
        self.items += len(tokens)
        return self.model.encode_texts(tokens)


class Service:
    """Stubs, and what happened behind them."""

    def __init__(self, channel: aio.Channel, server: GatewayServer, model: Counting) -> None:
        self.bias: Any = bias_service_pb2_grpc.BiasServiceStub(channel)
        self.features: Any = feature_service_pb2_grpc.FeatureServiceStub(channel)
        self.server = server
        self.model = model


@pytest.fixture(scope="module")
def biased(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_bias(tiny, tmp_path_factory.mktemp("biased") / "tiny")


Open = Callable[..., Any]


@pytest.fixture
def opened(biased: Bundle) -> Open:
    @asynccontextmanager
    async def run(bundle: Bundle = biased, **overrides: Any) -> AsyncIterator[Service]:
        settings = Settings(
            **{"port": 0, "metrics_port": 0, "drain_s": 5.0, "backend": "torch", "threads": 1, **overrides}
        )
        model: Any = Counting(TowerModel(bundle, settings))
        encoder = Encoder(settings, model, load_dictionaries(bundle))

        async def score(request: Any) -> Any:
            # As between processes: whatever cannot be pickled fails here.
            answer = pickle.loads(pickle.dumps(await encoder.score(pickle.loads(pickle.dumps(request)))))
            if isinstance(answer, Exception):
                raise answer
            return answer

        server = GatewayServer(settings, Catalogue.read(bundle))
        port, _ = await server.start(encoder.encode, score, encoder.info())
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                yield Service(channel, server, model)
            finally:
                await server.drain()
                await encoder.close()

    return run


def ablated(bundle: Bundle, e: np.ndarray, modality: Modality, ablation: pb.Ablation) -> np.ndarray:
    """The same by another road: torch's dictionary and dense algebra."""
    name = ablation.dictionary or bundle.manifest.default_dictionary
    entry = bundle.manifest.bias
    calibration = BiasCalibration.read(bundle.path / entry.config, bundle.path / entry.weights)
    if ablation.mode == pb.ABLATION_MODE_LEACE:
        eraser = calibration.leace[modality]
        changed = e - ((e - eraser.mean) @ eraser.v)[:, None] * eraser.u
    else:
        dictionary, known = bundle.dictionary(name), calibration.dictionaries[name]
        selection = ablation.WhichOneof("selection")
        if selection == "label":
            label = common_pb2.ModalityLabel.Name(ablation.label).removeprefix("MODALITY_LABEL_")
            features = np.flatnonzero(bundle.modality(name).label == label)
        else:
            ids = (
                ablation.features.ids
                if selection == "features"
                else known.rank[: ablation.top_gender_features]
            )
            features = np.array(ids)
        z = dictionary.encode(torch.from_numpy(e), modality).numpy()
        rows = dictionary.decoder_rows(modality).numpy()
        if ablation.mode == pb.ABLATION_MODE_PROJECT:
            changed = e - e @ np.linalg.pinv(rows[features]) @ rows[features]
        else:
            target = (
                known.sides[modality].means if ablation.mode == pb.ABLATION_MODE_MEAN else np.zeros(len(rows))
            )
            changed = e + (target[features] - z[:, features]) @ rows[features]
    return changed / np.linalg.norm(changed, axis=1, keepdims=True)


ABLATIONS = [
    pb.Ablation(features=pb.FeatureIds(ids=[3, 1, 7])),
    pb.Ablation(label=common_pb2.MODALITY_LABEL_TEXT, mode=pb.ABLATION_MODE_ZERO),
    pb.Ablation(label=common_pb2.MODALITY_LABEL_IMAGE, mode=pb.ABLATION_MODE_MEAN, dictionary="sae-pair"),
    pb.Ablation(top_gender_features=5, mode=pb.ABLATION_MODE_PROJECT, dictionary="sae-group"),
    pb.Ablation(top_gender_features=4, mode=pb.ABLATION_MODE_MEAN, dictionary="neurons"),
    pb.Ablation(mode=pb.ABLATION_MODE_LEACE),
]


async def test_every_kind_of_ablation_is_the_definition(opened: Open, biased: Bundle) -> None:
    entry = biased.manifest.bias
    calibration = BiasCalibration.read(biased.path / entry.config, biased.path / entry.weights)
    inputs = [picture(0), words("a woman"), picture(1), words("a man at work")]
    async with opened() as service:
        scale = service.model.info().logit_scale
        encoded = await service.features.Encode(feature_service_pb2.EncodeRequest(inputs=inputs))
        plain = await service.bias.ClassifyGender(pb.ClassifyGenderRequest(inputs=inputs))
        answers = [
            await service.bias.ClassifyGender(pb.ClassifyGenderRequest(inputs=inputs, ablation=ablation))
            for ablation in ABLATIONS
        ]
    e = array(encoded.embeddings).copy()
    sides = [Modality.IMAGE, Modality.TEXT, Modality.IMAGE, Modality.TEXT]
    for i, (row, modality) in enumerate(zip(e, sides, strict=True)):
        before = plain.classifications[i].before
        score = row @ calibration.direction
        assert before.score == pytest.approx(score, abs=CLOSE)
        assert before.p_woman == pytest.approx(1 / (1 + np.exp(-scale * score)), abs=1e-4)
        shifted = 1 / (1 + np.exp(-scale * (score - THRESHOLDS[modality])))
        assert before.p_woman_calibrated == pytest.approx(shifted, abs=1e-4)
        assert not plain.classifications[i].HasField("after")
        for ablation, answer in zip(ABLATIONS, answers, strict=True):
            changed = ablated(biased, row[None], modality, ablation)[0]
            found = answer.classifications[i]
            assert found.before == before
            # Features and embeddings come from forwards of another batch: some units in the last place.
            assert found.after.score == pytest.approx(changed @ calibration.direction, abs=1e-4)
            assert found.kept == pytest.approx(changed @ row, abs=1e-4)
    assert [answer.set_size for answer in answers][0] == 3
    assert answers[0].ablation.mode == pb.ABLATION_MODE_ZERO and answers[0].ablation.dictionary == "sae"
    assert answers[-1].set_size == 0


async def test_an_item_costs_one_forward_whatever_is_removed(opened: Open) -> None:
    async with opened() as service:
        for ablation in ABLATIONS:
            before = service.model.items
            request = pb.ClassifyGenderRequest(inputs=[picture(0), words("a")], ablation=ablation)
            await service.bias.ClassifyGender(request)
            assert service.model.items == before + 2


@pytest.mark.parametrize(
    ("ablation", "code", "reason", "fields"),
    [
        (pb.Ablation(), CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["ablation"]),
        (
            pb.Ablation(top_gender_features=1, mode=pb.ABLATION_MODE_LEACE),
            CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["ablation.top_gender_features"],
        ),
        (
            pb.Ablation(features=pb.FeatureIds(ids=[0, 64])),
            CODE.NOT_FOUND, "UNKNOWN_FEATURE", ["ablation.features.ids[1]"],
        ),
        (
            pb.Ablation(top_gender_features=1, dictionary="x"),
            CODE.NOT_FOUND, "UNKNOWN_DICTIONARY", ["ablation.dictionary"],
        ),
        (
            pb.Ablation(label=common_pb2.MODALITY_LABEL_DEAD),
            CODE.INVALID_ARGUMENT, "INVALID_INPUT", ["ablation.label"],
        ),
        (
            pb.Ablation(top_gender_features=1, dictionary="ncl"),
            CODE.FAILED_PRECONDITION, "MODEL_NOT_CALIBRATED", [],
        ),
    ],
)  # fmt: skip
async def test_a_bad_ablation_gets_its_status_reason_and_field(
    opened: Open, ablation: pb.Ablation, code: grpc.StatusCode, reason: str, fields: list[str]
) -> None:
    async with opened() as service:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.ClassifyGender(
                pb.ClassifyGenderRequest(inputs=[words("a")], ablation=ablation)
            )
        assert service.model.items == 0
    assert caught.value.code() is code
    assert error_details(caught.value) == (reason, fields, None)


async def test_a_bundle_without_calibration_says_so(opened: Open, tiny: Bundle) -> None:
    async with opened(bundle=tiny) as service:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.ClassifyGender(pb.ClassifyGenderRequest(inputs=[words("a")]))
    assert caught.value.code() is CODE.FAILED_PRECONDITION
    assert error_details(caught.value)[0] == "MODEL_NOT_CALIBRATED"


def settings_message(**changes: Any) -> pb.AuditGenderRequest:
    values = {
        "ablations": [pb.Ablation(top_gender_features=4)], "bootstrap_samples": 100, "null_sets": 100, **changes,
    }  # fmt: skip
    return pb.AuditGenderRequest(settings=pb.AuditSettings(**values))


def batch(items: Iterable[pb.LabelledItem]) -> pb.AuditGenderRequest:
    return pb.AuditGenderRequest(batch=pb.LabelledBatch(items=items))


def people(count: int, start: int = 0) -> list[pb.LabelledItem]:
    genders = (pb.GENDER_WOMAN, pb.GENDER_MAN, pb.GENDER_UNSPECIFIED)
    return [
        pb.LabelledItem(
            id=f"item {i}",
            input=words(f"person {i}"),
            gender=genders[i % 3],
            profession=("cook", "pilot")[i % 2],
        )
        for i in range(start, start + count)
    ]


async def test_an_audit_answers_every_ablation_with_its_settings(opened: Open) -> None:
    ablations = [pb.Ablation(top_gender_features=4), pb.Ablation(mode=pb.ABLATION_MODE_LEACE)]
    async with opened() as service:
        stream = iter(
            [settings_message(ablations=ablations, seed=2), batch(people(20)), batch(people(16, 20))]
        )
        answer = await service.bias.AuditGender(stream)
        again = await service.bias.AuditGender(
            iter([settings_message(ablations=ablations, seed=2), batch(people(36))])
        )
        assert service.model.items == 72
    assert (answer.women, answer.men, answer.ungendered, answer.skipped) == (12, 12, 12, 0)
    assert (answer.settings.seed, answer.settings.min_group, answer.settings.null_sets) == (2, 5, 100)
    features, leace = answer.audits
    assert features.set_size == 4 and features.ablation.dictionary == "sae"
    assert {len(test.null) for test in features.nulls} == {100}
    assert all(0 < test.p <= 1 for test in features.nulls)
    assert not leace.nulls and not leace.HasField("null_energy_ratio")
    assert [found.profession for found in features.professions] == ["cook", "pilot"]
    assert len(features.curve) == 101
    for name in ("accuracy", "recall_woman", "skew"):
        change = getattr(features.raw, name)
        assert 0 <= change.before.low <= change.before.value <= change.before.high <= 1
    # The same items, settings and seed are the same audit, however they were cut into messages.
    again.timings.CopyFrom(answer.timings)
    for one, other in zip(answer.audits, again.audits, strict=True):
        assert one.auc.before.value == pytest.approx(other.auc.before.value, abs=1e-9)
        assert one.verdict == other.verdict


async def test_a_bad_item_fails_the_stream_and_is_named_by_its_place(opened: Open) -> None:
    bad = pb.LabelledItem(input=common_pb2.Input(image=common_pb2.Image(data=b"no picture")))
    async with opened() as service:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.AuditGender(
                iter([settings_message(), batch(people(40)), batch([people(1)[0], bad])])
            )
        with pytest.raises(aio.AioRpcError) as invalid:
            await service.bias.AuditGender(
                iter([settings_message(), batch(people(40)), batch([pb.LabelledItem(id="empty")])])
            )
    assert caught.value.code() is CODE.INVALID_ARGUMENT
    assert error_details(caught.value)[1] == ["items[41].input.image.data"]
    assert error_details(invalid.value)[1] == ["items[40].input"]


async def test_bad_items_are_skipped_and_named_when_the_caller_says_so(opened: Open) -> None:
    items = people(12)
    broken = common_pb2.Input(image=common_pb2.Image(data=b"no picture"))
    items[3] = pb.LabelledItem(id="broken", input=broken, gender=pb.GENDER_MAN)
    items[5] = pb.LabelledItem(id="empty")
    async with opened() as service:
        answer = await service.bias.AuditGender(
            iter([settings_message(on_bad_item=pb.BAD_ITEM_POLICY_SKIP), batch(items)])
        )
    assert answer.skipped == 2
    skipped = {item.index: (item.id, item.reason) for item in answer.skipped_items}
    assert skipped == {3: ("broken", "IMAGE_FORMAT_UNSUPPORTED"), 5: ("empty", "INVALID_INPUT")}
    assert answer.women + answer.men + answer.ungendered == 10


NEURONS = pb.Ablation(top_gender_features=1, dictionary="neurons")


@pytest.mark.parametrize(
    ("messages", "reason", "fields"),
    [
        ([], "INVALID_INPUT", ["settings"]),
        ([batch(people(3))], "INVALID_INPUT", ["settings"]),
        ([settings_message(), settings_message()], "INVALID_INPUT", ["settings"]),
        ([settings_message()], "NOT_ENOUGH_ITEMS", []),
        ([settings_message(), batch(people(3))], "NOT_ENOUGH_ITEMS", []),
        ([settings_message(), batch(people(9))], "TOO_MANY_ITEMS", ["items[8]"]),
        (
            [settings_message(ablations=[pb.Ablation(top_gender_features=1), NEURONS])],
            "INVALID_INPUT", ["settings.ablations[1].dictionary"],
        ),
    ],
)  # fmt: skip
async def test_a_stream_that_cannot_be_audited_is_told_why(
    opened: Open, messages: list[pb.AuditGenderRequest], reason: str, fields: list[str]
) -> None:
    async with opened(max_audit_items=8) as service:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.AuditGender(iter(messages))
    assert caught.value.code() is CODE.INVALID_ARGUMENT
    assert error_details(caught.value)[:2] == (reason, fields)


async def test_only_so_many_audits_run_at_once(opened: Open) -> None:
    async with opened(max_concurrent_audits=1) as service:
        first = service.bias.AuditGender()
        await first.write(settings_message())
        await first.write(batch(people(12)))
        while not service.model.items:
            await asyncio.sleep(0.01)
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.AuditGender(iter([settings_message(), batch(people(12))]))
        await first.done_writing()
        assert (await first).women == 4
        assert (await service.bias.AuditGender(iter([settings_message(), batch(people(12))]))).women == 4
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
    assert error_details(caught.value)[2] is not None


async def test_an_audit_ends_at_its_deadline_and_frees_its_place(opened: Open) -> None:
    async with opened(max_concurrent_audits=1) as service:
        long = settings_message(bootstrap_samples=10_000, null_sets=10_000)
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.AuditGender(iter([long, batch(people(120))]), timeout=1.5)
        assert caught.value.code() is CODE.DEADLINE_EXCEEDED
        # The thread that computes is one: the next audit is answered once the first has felt that its caller is gone.
        answer = await service.bias.AuditGender(iter([settings_message(), batch(people(12))]), timeout=60)
    assert answer.women == 4


def test_the_gateways_decoders_are_the_dictionaries_own(biased: Bundle) -> None:
    rng = np.random.default_rng(0)
    for name in biased.dictionary_names:
        dictionary, decoders = biased.dictionary(name), read_decoders(biased, name)
        e = torch.nn.functional.normalize(
            torch.from_numpy(rng.normal(size=(3, 16)).astype(np.float32)), dim=1
        )
        for modality in Modality:
            with torch.no_grad():
                z = dictionary.encode(e, modality)
                expected = dictionary.decode(z, modality).numpy()
            decoder = decoders[modality]
            np.testing.assert_allclose(z.numpy() @ decoder.rows + decoder.origin, expected, atol=1e-5)
            # Gathered rows and the dense product are the same sum.
            side = Side(decoder.rows, np.zeros(len(decoder.rows), np.float32))
            ablation = FeatureAblation(side, np.arange(0, len(decoder.rows), 2), Mode.ZERO)
            part = ablation.part(Stacked.of(sparse_rows(z)))
            np.testing.assert_allclose(part, z.numpy()[:, ::2] @ decoder.rows[::2], atol=1e-5)


def test_ten_thousand_items_take_the_memory_that_the_settings_say() -> None:
    count, dim, active = 10_000, 256, 32
    rng = np.random.default_rng(0)
    tracemalloc.start()
    items = AuditItems(pb.AuditSettings(), (), 20_000)
    for start in range(0, count, 64):
        size = min(64, count - start)
        labelled = [
            pb.LabelledItem(
                id=f"item {i}", input=common_pb2.Input(image=common_pb2.Image(data=bytes(20_000))),
                gender=pb.GENDER_MAN, profession=f"profession {i % 20}", cluster=f"cluster {i}",
            )
            for i in range(start, start + size)
        ]  # fmt: skip
        features = tuple(
            Features(rng.integers(0, 2048, active).astype(np.int32), np.ones(active, np.float32))
            for _ in labelled
        )
        items.add(labelled, Encoded(np.zeros((size, dim), np.float32), np.ones(size, np.float32), features))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The formula of Settings.max_audit_items: embedding, active features, labels and what Python adds. The pictures,
    # 200 MB of them, are gone.
    assert kept < count * (4 * dim + 8 * active + 600)
