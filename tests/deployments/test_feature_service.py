"""FeatureService through a real gRPC server, with a debug model that counts what costs model time."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import feature_service_pb2 as pb
from monofacet.v1 import model_service_pb2 as model_pb

from deployments.gateway.admission.item_stream import Chunks, StreamItem, Window
from tests.deployments.conftest import Open, array, error_details, field_reasons, status_details
from tests.support.waiting import PATIENCE_S, until

CODE = grpc.StatusCode


def image(data: bytes) -> common.Input:
    return common.Input(image=common.Image(data=data))


def text(value: str) -> common.Input:
    return common.Input(text=value)


def item(name: str, value: common.Input) -> pb.StreamEncodeRequest:
    return pb.StreamEncodeRequest(item=pb.StreamItem(id=name, input=value))


async def test_a_batch_comes_back_in_order_with_unit_embeddings(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        inputs = [image(b"one"), text("two"), image(b"three")]
        together = await gateway.features.Encode(pb.EncodeRequest(inputs=inputs))
        alone = [await gateway.features.Encode(pb.EncodeRequest(inputs=[i])) for i in inputs]
    embeddings = array(together.embeddings)
    # The norm of a float32 vector of 8 values is 1 to a few units in the last place.
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(embeddings, np.concatenate([array(a.embeddings) for a in alone]))
    assert list(together.norms) == [a.norms[0] for a in alone]
    assert together.bundle.startswith("tiny@")
    assert not together.features


async def test_features_come_largest_first_and_only_when_asked_for(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        options = pb.EncodeOptions(dictionary="", include_embeddings=False)
        answer = await gateway.features.Encode(pb.EncodeRequest(inputs=[text("a")], options=options))
        options.max_features = 1
        first = await gateway.features.Encode(pb.EncodeRequest(inputs=[text("a")], options=options))
    (features,) = answer.features
    assert features.dictionary == "sae"
    assert list(features.values) == sorted(features.values, reverse=True)
    assert not answer.HasField("embeddings")
    assert list(first.features[0].indices) == list(features.indices)[:1]


async def test_one_bad_input_stops_the_whole_request_and_every_bad_one_is_named(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        inputs = [image(b"good"), image(b"bad"), text("good"), image(b"bad")]
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(pb.EncodeRequest(inputs=inputs))
        assert gateway.model.items == 0
        await gateway.features.Encode(pb.EncodeRequest(inputs=[image(b"good")]))
    assert caught.value.code() is CODE.INVALID_ARGUMENT
    assert error_details(caught.value) == (
        "IMAGE_CORRUPT", ["inputs[1].image.data", "inputs[3].image.data"], None
    )  # fmt: skip
    assert set(field_reasons(caught.value).values()) == {"IMAGE_CORRUPT"}


async def test_inputs_that_are_bad_in_different_ways_each_tell_their_own_reason(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        inputs = [image(b"bad"), text("good"), text("a" * 101)]
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(pb.EncodeRequest(inputs=inputs))
    assert error_details(caught.value)[0] == "INVALID_INPUT"
    assert field_reasons(caught.value) == {
        "inputs[0].image.data": "IMAGE_CORRUPT",
        "inputs[2].text": "TEXT_TOO_LONG",
    }


async def test_a_full_request_of_bad_inputs_is_told_why(open_gateway: Open) -> None:
    """A status of all of them has 17 kB, and gRPC gives its receiver RESOURCE_EXHAUSTED in its place."""
    captions = pb.EncodeRequest(inputs=[text("x" * 101)] * 256)
    async with open_gateway() as gateway:
        # gRPC refuses at random what is a little smaller.
        for _ in range(5):
            with pytest.raises(aio.AioRpcError) as caught:
                await gateway.features.Encode(captions)
            assert caught.value.code() is CODE.INVALID_ARGUMENT
            reason, fields, _ = error_details(caught.value)
            assert reason == "TEXT_TOO_LONG"
            assert fields == [f"inputs[{n}].text" for n in range(len(fields))]


@pytest.mark.parametrize(
    ("request_", "code", "reason", "field"),
    [
        (pb.EncodeRequest(), CODE.INVALID_ARGUMENT, "INVALID_INPUT", "inputs"),
        (pb.EncodeRequest(inputs=[text("a")] * 257), CODE.INVALID_ARGUMENT, "INVALID_INPUT", "inputs"),
        (
            pb.EncodeRequest(inputs=[text("a"), common.Input()]),
            CODE.INVALID_ARGUMENT, "INVALID_INPUT", "inputs[1].input",
        ),
        (pb.EncodeRequest(inputs=[image(b"")]), CODE.INVALID_ARGUMENT, "INVALID_INPUT", "inputs[0].image.data"),
        (
            pb.EncodeRequest(inputs=[text("a")], options=pb.EncodeOptions(dictionary="no-such")),
            CODE.NOT_FOUND, "UNKNOWN_DICTIONARY", "options.dictionary",
        ),
        (pb.EncodeRequest(inputs=[text("a" * 101)]), CODE.INVALID_ARGUMENT, "TEXT_TOO_LONG", "inputs[0].text"),
        (pb.EncodeRequest(inputs=[text("é" * 5000)]), CODE.INVALID_ARGUMENT, "TEXT_TOO_LONG", "inputs[0].text"),
    ],
    ids=["empty", "257", "neither", "no bytes", "dictionary", "long", "bytes"],
)  # fmt: skip
async def test_a_bad_request_gets_its_status_reason_and_field(
    open_gateway: Open, request_: pb.EncodeRequest, code: grpc.StatusCode, reason: str, field: str
) -> None:
    async with open_gateway() as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(request_)
        assert gateway.model.items == 0
        assert gateway.sample("monofacet_rejected_total", reason=reason) == 1
    assert caught.value.code() is code
    assert error_details(caught.value) == (reason, [field], None)


async def test_a_text_that_may_be_cut_is_too_long_for_nothing(open_gateway: Open) -> None:
    long, options = text("é" * 100_000), pb.EncodeOptions(truncate_text=True)
    async with open_gateway() as gateway:
        response = await gateway.features.Encode(pb.EncodeRequest(inputs=[long], options=options))
        assert list(response.embeddings.shape)[0] == 1
        messages = [pb.StreamEncodeRequest(options=options), item("a", long)]
        (answer,) = [answer async for answer in gateway.features.StreamEncode(iter(messages))]
        assert answer.WhichOneof("result") == "encoding"


async def test_a_message_over_the_limit_is_refused_before_it_is_decoded(open_gateway: Open) -> None:
    async with open_gateway(max_request_bytes=1000) as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(pb.EncodeRequest(inputs=[image(b"x" * 2000)]))
        assert gateway.model.prepared == 0
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
    assert error_details(caught.value)[0] == "REQUEST_TOO_LARGE"


async def test_bytes_that_are_no_message_are_the_callers_fault(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        call = gateway.channel.unary_unary("/monofacet.v1.FeatureService/Encode")
        with pytest.raises(aio.AioRpcError) as caught:
            await call(b"\xff\xff\xff")
    assert caught.value.code() is CODE.INVALID_ARGUMENT
    assert error_details(caught.value)[0] == "REQUEST_MALFORMED"


async def test_an_unforeseen_error_leaks_nothing(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(pb.EncodeRequest(inputs=[image(b"surprise")]))
    assert caught.value.code() is CODE.INTERNAL
    assert error_details(caught.value)[0] == "INTERNAL"
    everything = f"{caught.value.details()}{caught.value.trailing_metadata()}"
    assert "secret" not in everything and "Traceback" not in everything


async def test_small_requests_that_wait_together_share_a_forward(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        gateway.model.hold()
        calls = [
            asyncio.ensure_future(gateway.features.Encode(pb.EncodeRequest(inputs=[text(str(n))])))
            for n in range(20)
        ]
        await until(lambda: gateway.sample("monofacet_requests_in_flight",
                                           method="monofacet.v1.FeatureService/Encode") == 20)  # fmt: skip
        gateway.model.release()
        await asyncio.gather(*calls)
        forwards = len(gateway.model.forwards)
        observed = gateway.sample("monofacet_batch_size_sum", deployment="encoder")
    # The first message leaves at once, the second while it is computed, and the rest travel together.
    assert forwards <= 5
    assert observed == 20


async def test_a_deadline_that_passes_while_queued_costs_no_model_time(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        gateway.model.hold()
        first = asyncio.ensure_future(gateway.features.Encode(pb.EncodeRequest(inputs=[text("first")])))
        await asyncio.to_thread(gateway.model.entered.acquire)
        late = [
            gateway.features.Encode(pb.EncodeRequest(inputs=[text(f"late {n}")]), timeout=0.2)
            for n in range(5)
        ]
        large = gateway.features.Encode(pb.EncodeRequest(inputs=[text("large")] * 100), timeout=0.2)
        for call in [*late, large]:
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is CODE.DEADLINE_EXCEEDED
        await until(lambda: gateway.sample("monofacet_requests_in_flight",
                                           method="monofacet.v1.FeatureService/Encode") == 1)  # fmt: skip
        gateway.model.release()
        await first
        await gateway.features.Encode(pb.EncodeRequest(inputs=[text("after")]))
        assert gateway.model.items == 2


async def test_a_caller_without_a_deadline_gets_one(open_gateway: Open) -> None:
    async with open_gateway(default_deadline_s=0.1) as gateway:
        gateway.model.hold()
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(pb.EncodeRequest(inputs=[text("a")]))
    assert caught.value.code() is CODE.DEADLINE_EXCEEDED
    assert error_details(caught.value)[0] == "DEADLINE_EXCEEDED"


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(open_gateway: Open) -> None:
    async with open_gateway(max_queued_items=32) as gateway:
        gateway.model.hold()
        running = [asyncio.ensure_future(gateway.features.Encode(pb.EncodeRequest(inputs=[text("a")] * 32)))]
        await asyncio.to_thread(gateway.model.entered.acquire)
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(pb.EncodeRequest(inputs=[text("b")] * 32))
        gateway.model.release()
        await asyncio.gather(*running)
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
    assert error_details(caught.value) == ("QUEUE_FULL", [], 0.25)


async def test_too_many_calls_are_refused_with_retry_info(open_gateway: Open) -> None:
    async with open_gateway(max_concurrent_calls=1) as gateway:
        gateway.model.hold()
        running = asyncio.ensure_future(gateway.features.Encode(pb.EncodeRequest(inputs=[text("a")])))
        await asyncio.to_thread(gateway.model.entered.acquire)
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.features.Encode(pb.EncodeRequest(inputs=[text("b")]))
        gateway.model.release()
        await running
    assert error_details(caught.value) == ("TOO_MANY_CALLS", [], 0.25)


async def test_a_stream_keeps_its_order_and_a_bad_item_is_its_own_answer(open_gateway: Open) -> None:
    async with open_gateway(stream_window=8) as gateway:
        values = [image(b"bad") if n % 10 == 3 else text(str(n)) for n in range(100)]
        values[50] = common.Input()
        requests = [item(f"item {n}", value) for n, value in enumerate(values)]
        answers = [a async for a in gateway.features.StreamEncode(iter(requests))]
    assert [a.id for a in answers] == [f"item {n}" for n in range(100)]
    for n, answer in enumerate(answers):
        if n == 50:
            assert status_details(answer.error)[:2] == ("INVALID_INPUT", ["input.input"])
        elif n % 10 == 3:
            assert answer.error.code == CODE.INVALID_ARGUMENT.value[0]
            assert status_details(answer.error)[:2] == ("IMAGE_CORRUPT", ["input.image.data"])
        else:
            assert answer.WhichOneof("result") == "encoding"


async def test_stream_options_hold_for_every_item(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        options = pb.StreamEncodeRequest(options=pb.EncodeOptions(dictionary="ncl", include_embeddings=False))
        answers = [
            a
            async for a in gateway.features.StreamEncode(
                iter([options, item("a", text("a")), item("b", text("b"))])
            )
        ]
    assert [a.encoding.features.dictionary for a in answers] == ["ncl", "ncl"]
    assert not answers[0].encoding.HasField("embedding")


@pytest.mark.parametrize(
    ("requests", "code", "reason", "field"),
    [
        (
            [item("a", text("a")), pb.StreamEncodeRequest(options=pb.EncodeOptions())],
            CODE.INVALID_ARGUMENT, "INVALID_INPUT", "options",
        ),
        (
            [pb.StreamEncodeRequest(options=pb.EncodeOptions(dictionary="no-such"))],
            CODE.NOT_FOUND, "UNKNOWN_DICTIONARY", "options.dictionary",
        ),
        ([pb.StreamEncodeRequest()], CODE.INVALID_ARGUMENT, "INVALID_INPUT", "payload"),
    ],
    ids=["options twice", "dictionary", "nothing"],
)  # fmt: skip
async def test_a_broken_stream_ends_with_a_status(
    open_gateway: Open, requests: list[Any], code: grpc.StatusCode, reason: str, field: str
) -> None:
    async with open_gateway() as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in gateway.features.StreamEncode(iter(requests)):
                pass
    assert caught.value.code() is code
    assert error_details(caught.value) == (reason, [field], None)


async def test_a_stream_reads_ahead_only_by_its_window(open_gateway: Open) -> None:
    sent = 0

    async def requests() -> Any:
        nonlocal sent
        for n in range(2000):
            sent += 1
            yield item(str(n), image(bytes([n % 256]) * 10_000))

    async with open_gateway(stream_window=8) as gateway:
        gateway.model.hold()
        call = gateway.features.StreamEncode(requests())
        await asyncio.to_thread(gateway.model.entered.acquire)
        await asyncio.sleep(0.5)
        # What left the client is the window and what fits into HTTP/2's and the transport's own buffers.
        assert gateway.model.prepared <= 8
        assert sent < 1500
        call.cancel()


async def test_a_client_that_vanishes_mid_stream_costs_no_more_model_time(open_gateway: Open) -> None:
    async with open_gateway(stream_window=64) as gateway:
        gateway.model.hold()
        requests = [item(str(n), text(str(n))) for n in range(500)]
        call = gateway.features.StreamEncode(iter(requests))
        reading = asyncio.ensure_future(call.read())
        await asyncio.to_thread(gateway.model.entered.acquire)
        await asyncio.sleep(0.2)
        call.cancel()
        reading.cancel()
        await until(lambda: gateway.sample("monofacet_requests_in_flight",
                                           method="monofacet.v1.FeatureService/StreamEncode") == 0)  # fmt: skip
        gateway.model.release()
        await gateway.features.Encode(pb.EncodeRequest(inputs=[text("after")]))
        # One forward had begun; nothing of the other 63 in the window, nor of the rest, follows.
        assert len(gateway.model.forwards) == 2
        assert gateway.model.items <= gateway.settings.max_batch_items + 1


async def test_a_stream_waits_where_a_unary_call_is_refused(open_gateway: Open) -> None:
    async with open_gateway(max_queued_items=4, stream_window=32, coalesce_items=4) as gateway:
        requests = [item(str(n), text(str(n))) for n in range(100)]
        answers = [a async for a in gateway.features.StreamEncode(iter(requests))]
    assert all(a.WhichOneof("result") == "encoding" for a in answers)
    assert len(answers) == 100


async def test_a_stream_of_nothing_ends_well(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        assert [a async for a in gateway.features.StreamEncode(iter([]))] == []


async def test_a_streams_window_is_bounded_in_items_and_in_bytes() -> None:
    window = Window(max_items=2, max_bytes=100)

    async def fits(size: int) -> bool:
        try:
            await asyncio.wait_for(window.room(size), 0.05)
        except TimeoutError:
            return False
        return True

    # Larger than the whole window: alone, but not refused for ever.
    assert await fits(500)
    window.enter(500)
    assert not await fits(1)
    window.leave(500)
    window.enter(60)
    assert not await fits(50)
    assert await fits(40)
    window.enter(40)
    assert not await fits(0)
    waiting = asyncio.create_task(window.room(10))
    await asyncio.sleep(0)
    window.leave(60)
    await asyncio.wait_for(waiting, PATIENCE_S)


def numbered(count: int) -> list[StreamItem]:
    return [StreamItem(str(n), 1, str(n)) for n in range(count)]


async def test_what_arrives_while_chunks_are_encoded_is_the_next_chunk() -> None:
    chunks_run: list[list[str]] = []
    gate = asyncio.Semaphore(0)

    async def encode(items: Any) -> list[str]:
        chunks_run.append([item.id for item in items])
        await gate.acquire()
        return [item.id for item in items]

    chunks: Chunks[str] = Chunks(encode, max_items=4, at_once=1)
    items = numbered(8)
    chunks.add(items[0])
    await asyncio.sleep(0.01)
    for one in items[1:]:
        chunks.add(one)
    chunks.end()
    for _ in range(3):
        gate.release()
    answers = [answer async for _, answer in chunks.answers()]
    assert chunks_run == [["0"], ["1", "2", "3", "4"], ["5", "6", "7"]]
    assert answers == [str(n) for n in range(8)]


async def test_chunks_that_finish_out_of_order_are_answered_in_order() -> None:
    first = asyncio.Event()

    async def encode(items: Any) -> list[str]:
        if items[0].id == "0":
            await first.wait()
        else:
            first.set()
        return [item.id for item in items]

    chunks: Chunks[str] = Chunks(encode, max_items=2, at_once=2)
    for one in numbered(4):
        chunks.add(one)
    chunks.end()
    assert [answer async for _, answer in chunks.answers()] == ["0", "1", "2", "3"]


async def test_a_stream_costs_messages_by_chunks_and_not_by_items(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        sent: list[int] = []
        send = gateway.encoder.encode
        (client,) = gateway.server._encoders

        async def counted(tasks: Any, remaining_s: Any) -> Any:
            sent.append(sum(len(task.items) for task in tasks))
            return await send(tasks, remaining_s)

        client._send = counted
        gateway.model.hold()
        all_sent = asyncio.Event()

        async def requests() -> Any:
            for n in range(150):
                yield item(str(n), text(str(n)))
            all_sent.set()

        call = gateway.features.StreamEncode(requests())

        async def read() -> int:
            return len([answer async for answer in call])

        reading = asyncio.ensure_future(read())
        await all_sent.wait()
        await asyncio.sleep(0.1)
        gateway.model.release()
        assert await reading == 150
    assert sum(sent) == 150
    # Two chunks of whatever had come first, then of what came meanwhile: how much depends on the machine.
    assert len(sent) <= 75


def singles(gateway: Any, count: int) -> list[asyncio.Future[Any]]:
    """Send calls of one item each."""
    return [
        asyncio.ensure_future(gateway.features.Encode(pb.EncodeRequest(inputs=[text(str(n))])))
        for n in range(count)
    ]


# Three times its own work is what a single may wait for, beside the one that runs: four fill such a server.
SMALL = {"max_batch_items": 2, "max_queue_s": 0.001}


async def test_a_large_request_that_may_wait_is_let_in_where_a_single_is_refused(open_gateway: Open) -> None:
    async with open_gateway(**SMALL) as gateway:
        backlog = gateway.server._encoders[0]._backlog
        gateway.model.hold()
        running = singles(gateway, 4)
        await until(lambda: backlog.items == 4)
        assert backlog.full and not backlog.overloaded
        # Four items are before it, fewer than three times its own.
        many = pb.EncodeRequest(inputs=[text(f"large {n}") for n in range(4)])
        large = asyncio.ensure_future(gateway.features.Encode(many))
        await until(lambda: backlog.items == 8 or large.done())
        gateway.model.release()
        await asyncio.gather(*running)
        assert len((await large).norms) == 4
        assert gateway.sample("monofacet_rejected_total", reason="QUEUE_FULL") == 0


async def test_an_overloaded_server_refuses_at_the_door_whatever_the_request_holds(
    open_gateway: Open,
) -> None:
    encode = "/monofacet.v1.FeatureService/Encode"
    async with open_gateway(**SMALL) as gateway:
        gateway.model.hold()
        running = singles(gateway, 4)
        await until(lambda: gateway.server._encoders[0]._backlog.items == 4)
        # More than a fifth of all.
        for refused_call in singles(gateway, 4):
            with pytest.raises(aio.AioRpcError):
                await refused_call
        assert gateway.server._encoders[0].shut
        with pytest.raises(aio.AioRpcError) as caught:
            # Bytes that are no message: nobody looked at them.
            await gateway.channel.unary_unary(encode)(b"\xff" * 50)
        # What needs no forward is answered.
        await gateway.models.ListModels(model_pb.ListModelsRequest())
        gateway.model.release()
        await asyncio.gather(*running)
        assert (await gateway.features.Encode(pb.EncodeRequest(inputs=[text("again")]))).norms
        assert gateway.sample("monofacet_rejected_total", reason="QUEUE_FULL") == 5
        # Refused at the door, before the bundle is read, or by the queue of one.
        refused = sum(
            gateway.sample(
                "monofacet_request_duration_seconds_count",
                method=encode[1:],
                code="RESOURCE_EXHAUSTED",
                bundle=bundle,
            )
            for bundle in ("", gateway.server.bundle_id)
        )
    assert refused == 5
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
    assert error_details(caught.value) == ("QUEUE_FULL", [], 0.25)
    assert "x-request-id" in dict(caught.value.trailing_metadata())
