"""BiasService.AuditGender over gRPC: what it answers, leaves out, refuses and remembers."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from grpc import aio
from monofacet.v1 import bias_service_pb2 as pb
from monofacet.v1 import common_pb2

from deployments.encoder.tasks import Encoded, Features
from deployments.gateway.compute.audit import AuditItems
from tests.deployments.bias.conftest import CODE, words
from tests.deployments.conftest import error_details, field_reasons
from tests.support.gateway import Open
from tests.support.waiting import PATIENCE_S


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
    items = people(18)
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
    assert answer.skipped_items[0].message == "input: value is required"
    assert answer.women + answer.men + answer.ungendered == 16


async def test_each_bad_item_of_a_batch_keeps_its_own_reason(opened: Open) -> None:
    items = people(18)
    broken = common_pb2.Input(image=common_pb2.Image(data=b"no picture"))
    items[3] = pb.LabelledItem(id="broken", input=broken)
    items[7] = pb.LabelledItem(id="long", input=common_pb2.Input(text="word " * 500))
    async with opened() as service:
        answer = await service.bias.AuditGender(
            iter([settings_message(on_bad_item=pb.BAD_ITEM_POLICY_SKIP), batch(items)])
        )
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.AuditGender(iter([settings_message(), batch(items)]))
    skipped = {item.index: (item.id, item.reason) for item in answer.skipped_items}
    assert skipped == {3: ("broken", "IMAGE_FORMAT_UNSUPPORTED"), 7: ("long", "TEXT_TOO_LONG")}
    told = field_reasons(caught.value)
    assert told == {
        "items[3].input.image.data": "IMAGE_FORMAT_UNSUPPORTED",
        "items[7].input.text": "TEXT_TOO_LONG",
    }


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (batch(people(257)), "batch.items"),
        (batch([]), "batch.items"),
        (pb.AuditGenderRequest(), "payload"),
    ],
    ids=["too many", "none", "neither"],
)
async def test_skipping_bad_items_lets_no_bad_message_through(
    opened: Open, message: pb.AuditGenderRequest, field: str
) -> None:
    skip = settings_message(on_bad_item=pb.BAD_ITEM_POLICY_SKIP)
    async with opened() as service:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.AuditGender(iter([skip, batch(people(15)), message]))
    assert caught.value.code() is CODE.INVALID_ARGUMENT
    assert error_details(caught.value)[:2] == ("INVALID_INPUT", [field])


NEURONS = pb.Ablation(top_gender_features=1, dictionary="neurons")
NO_FEATURE = pb.Ablation(label=common_pb2.MODALITY_LABEL_TEXT, dictionary="neurons")


@pytest.mark.parametrize(
    ("messages", "reason", "fields"),
    [
        ([], "INVALID_INPUT", ["settings"]),
        ([batch(people(3))], "INVALID_INPUT", ["settings"]),
        ([settings_message(), settings_message()], "INVALID_INPUT", ["settings"]),
        ([settings_message()], "NOT_ENOUGH_ITEMS", []),
        ([settings_message(), batch(people(3))], "NOT_ENOUGH_ITEMS", []),
        ([settings_message(), batch(people(8))], "NOT_ENOUGH_ITEMS", []),
        ([settings_message(), batch(people(9))], "TOO_MANY_ITEMS", ["items[8]"]),
        (
            [settings_message(ablations=[pb.Ablation(top_gender_features=1), NEURONS])],
            "INVALID_INPUT", ["settings.ablations[1].dictionary"],
        ),
        (
            [settings_message(ablations=[NO_FEATURE]), batch(people(6))],
            "INVALID_INPUT", ["settings.ablations[0].label"],
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
    async with opened(max_client_streams=1) as service:
        first = service.bias.AuditGender()
        await first.write(settings_message())
        await first.write(batch(people(15)))
        while not service.model.items:
            await asyncio.sleep(0.01)
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.AuditGender(iter([settings_message(), batch(people(15))]))
        await first.done_writing()
        assert (await first).women == 5
        assert (await service.bias.AuditGender(iter([settings_message(), batch(people(15))]))).women == 5
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
    assert error_details(caught.value)[2] is not None


async def test_an_idle_audit_gives_up_its_place(opened: Open) -> None:
    async with opened(max_client_streams=1, client_stream_idle_s=0.2) as service:
        idle = service.bias.AuditGender()
        await idle.write(settings_message())
        with pytest.raises(aio.AioRpcError) as caught:
            await idle
        answer = await service.bias.AuditGender(iter([settings_message(), batch(people(15))]))
    assert caught.value.code() is CODE.ABORTED
    assert error_details(caught.value)[0] == "STREAM_IDLE"
    assert answer.women == 5


async def test_an_audit_ends_at_its_deadline_and_frees_its_place(opened: Open) -> None:
    async with opened(max_client_streams=1) as service:
        long = settings_message(bootstrap_samples=10_000, null_sets=10_000)
        with pytest.raises(aio.AioRpcError) as caught:
            await service.bias.AuditGender(iter([long, batch(people(120))]), timeout=1.5)
        assert caught.value.code() is CODE.DEADLINE_EXCEEDED
        # The thread that computes is one: the next audit is answered once the first has felt that its caller is gone.
        answer = await service.bias.AuditGender(
            iter([settings_message(), batch(people(15))]), timeout=PATIENCE_S
        )
    assert answer.women == 5


async def test_an_audit_that_waits_for_the_encoder_is_no_refused_call(opened: Open) -> None:
    async with opened(max_queued_items=16) as service:
        backlog = service.server._encoders[0]._backlog
        with backlog.admitted(12):
            audit = asyncio.ensure_future(
                service.bias.AuditGender(iter([settings_message(), batch(people(15))]))
            )
            # As long as ten of its questions whether there is room.
            await asyncio.sleep(0.2)
            assert not service.model.items and not backlog.overloaded
        assert (await audit).women == 5


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
