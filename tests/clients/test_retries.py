"""What either client tries again, how long it waits, and the deadline of every call."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import monofacet
import pytest

from tests.clients.conftest import FAST, Call


def test_a_bad_input_is_not_tried_again(both: Call) -> None:
    client = both()
    with pytest.raises(monofacet.InvalidInputError):
        client.encode(b"not an image")
    assert len(client.channel.calls) == 1


def test_unavailable_is_tried_again(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, times=2)
    assert len(client.encode("a")) == 1
    assert len(client.channel.calls) == 3


def test_the_last_error_is_raised_when_the_tries_are_used_up(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, "down", times=5)
    with pytest.raises(monofacet.UnavailableError, match="down"):
        client.encode("a")
    assert len(client.channel.calls) == FAST.attempts


def test_resource_exhausted_is_tried_again_only_if_the_server_says_when(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=0.001)
    assert len(client.encode("a")) == 1
    client.channel.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL")
    with pytest.raises(monofacet.OverloadedError, match="QUEUE_FULL"):
        client.encode("a")
    assert len(client.channel.calls) == 3


def test_a_server_that_says_it_will_be_back_is_waited_for(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.001, times=3 * FAST.attempts)
    assert len(client.encode("a")) == 1
    assert len(client.channel.calls) == 3 * FAST.attempts + 1


def test_a_server_that_stays_overloaded_is_left_alone(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=0.001, times=9)
    with pytest.raises(monofacet.OverloadedError):
        client.encode("a")
    assert len(client.channel.calls) == FAST.attempts


def test_no_try_comes_earlier_than_the_server_asked(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.2, times=2)
    began = time.monotonic()
    client.encode("a")
    assert time.monotonic() - began >= 0.4


def test_one_attempt_means_one_try_whatever_the_server_says(both: Call) -> None:
    client = both(retry=monofacet.Retry(attempts=1))
    client.channel.fail(grpc.StatusCode.UNAVAILABLE, retry_after=0.001)
    with pytest.raises(monofacet.UnavailableError):
        client.encode("a")
    assert len(client.channel.calls) == 1


def test_a_wait_past_the_deadline_is_not_begun(both: Call) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=100)
    with pytest.raises(monofacet.OverloadedError) as caught:
        client.encode("a", timeout=2)
    assert caught.value.retry_after == 100


@pytest.mark.parametrize("code", ["INTERNAL", "DEADLINE_EXCEEDED", "NOT_FOUND", "UNKNOWN", "CANCELLED"])
def test_other_errors_are_not_tried_again(both: Call, code: str) -> None:
    client = both()
    client.channel.fail(grpc.StatusCode[code], retry_after=0.001)
    with pytest.raises(monofacet.CallError):
        client.encode("a")
    assert len(client.channel.calls) == 1


def test_every_call_has_a_deadline_and_the_token(both: Call, picture: Path) -> None:
    client = both(token="secret")
    client.encode("a")
    client.stream_encode(["a"])
    client.features()
    client.features_page()
    client.feature(1)
    client.classify_modality("a")
    client.score_modality([(picture, "red")])
    client.models()
    client.model()
    client.health()
    assert len(client.channel.timeouts) == 10
    assert all(timeout is not None and 0 < timeout <= 3600 for timeout in client.channel.timeouts)
    assert set(client.channel.metadata) == {(("authorization", "Bearer secret"),)}
    assert "secret" not in repr(client.client)


def test_timeouts_of_a_call_replace_those_of_the_client(both: Call) -> None:
    client = both(timeout=7.0)
    client.encode("a")
    client.encode("a", timeout=3.0)
    assert client.channel.timeouts == pytest.approx(
        [7.0, 3.0], abs=0.5
    )  # what passed before the call was made


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_refused(both: Call, timeout: float) -> None:
    with pytest.raises(monofacet.InputError):
        both().encode("a", timeout=timeout)
