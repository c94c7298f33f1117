"""Requests are built and answers read without loss."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import monofacet
import numpy as np
import pytest
from monofacet import _requests as requests
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._convert import array, read
from monofacet._exceptions import CallError, InvalidInputError, Violation
from monofacet._score_requests import PairBatcher, score_settings
from monofacet._status import KINDS, error_from_rpc, error_from_status, shift_violations
from monofacet.testing import status_with_details
from monofacet.testing._calls import MockRpcError
from monofacet.v1 import (
    bias_service_pb2,
    common_pb2,
    defense_service_pb2,
    feature_service_pb2,
    modality_service_pb2,
    model_service_pb2,
)


def tensor(values: np.ndarray, **changes: object) -> common_pb2.Tensor:
    fields = {
        "dtype": common_pb2.DATA_TYPE_FLOAT32,
        "shape": values.shape,
        "data": values.astype("<f4").tobytes(),
    }
    return common_pb2.Tensor(**(fields | changes))


def test_a_tensor_becomes_a_writable_array_of_its_shape() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    made = array(tensor(values))
    assert np.array_equal(made, values)
    assert made.dtype == np.float32
    assert made.flags.writeable


@pytest.mark.parametrize(
    "changes", [{"dtype": 0}, {"dtype": 99}, {"shape": [2, 4]}, {"shape": [-2, -3]}, {"data": b"123"}]
)
def test_a_tensor_that_does_not_add_up_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(monofacet.ResponseError):
        array(tensor(np.zeros((2, 3)), **changes))


def answer(rows: int, bundle: str = "b@1") -> feature_service_pb2.EncodeResponse:
    return feature_service_pb2.EncodeResponse(
        embeddings=tensor(np.full((rows, 4), float(rows))), norms=[1.0] * rows, bundle=bundle
    )


def test_parts_are_joined_in_order() -> None:
    result = responses.encode([answer(2), answer(3)], [2, 3], True)
    assert result.embeddings[:, 0].tolist() == [2, 2, 3, 3, 3]
    assert len(result) == 5


def longer(bundle: str) -> feature_service_pb2.EncodeResponse:
    return feature_service_pb2.EncodeResponse(embeddings=tensor(np.ones((1, 8))), norms=[1.0], bundle=bundle)


def classified(bundle: str) -> modality_service_pb2.ClassifyModalityResponse:
    return modality_service_pb2.ClassifyModalityResponse(classifications=[{}], bundle=bundle)


def gendered(bundle: str) -> bias_service_pb2.ClassifyGenderResponse:
    return bias_service_pb2.ClassifyGenderResponse(classifications=[{}], bundle=bundle)


def filtered(bundle: str) -> defense_service_pb2.FilterAdversarialResponse:
    embedding = tensor(np.ones((1, 4)))
    return defense_service_pb2.FilterAdversarialResponse(
        images=[{"verdict": defense_service_pb2.VERDICT_CLEAN}],
        embeddings_before=embedding,
        embeddings_after=embedding,
        mode=defense_service_pb2.FILTER_MODE_DROP,
        bundle=bundle,
    )


@pytest.mark.parametrize(
    ("read", "parts"),
    [
        (partial(responses.encode, embeddings=True), [answer(1), answer(1, "b@2")]),
        (partial(responses.encode, embeddings=True), [answer(1), longer("b@2")]),
        (responses.classification, [classified("b@1"), classified("b@2")]),
        (responses.gender, [gendered("b@1"), gendered("b@2")]),
        (responses.filtered, [filtered("b@1"), filtered("b@2")]),
    ],
    ids=["encode", "encode to another length", "modality", "gender", "filter"],
)
def test_a_bundle_that_changes_between_parts_is_an_error(read: Callable[..., Any], parts: list[Any]) -> None:
    # A part of the answer would be of another model.
    with pytest.raises(monofacet.ResponseError, match="changed its bundle"):
        read(parts, [1, 1])


def test_an_answer_with_a_row_missing_is_an_error() -> None:
    with pytest.raises(monofacet.ResponseError, match="for 3 inputs"):
        responses.encode([answer(2)], [3], True)


def test_sparse_features_of_uneven_length_are_an_error() -> None:
    with pytest.raises(monofacet.ResponseError, match="2 indices for 1"):
        responses.encode(
            [
                feature_service_pb2.EncodeResponse(
                    norms=[1], features=[common_pb2.SparseFeatures(indices=[1, 2], values=[1])]
                )
            ],
            [1],
            False,
        )


def test_dense_features_are_zero_where_nothing_fired() -> None:
    features = types.SparseFeatures("d", np.array([3, 1]), np.array([2.0, 1.0], dtype=np.float32))
    assert features.dense(5).tolist() == [0, 1, 0, 2, 0]


def test_a_card_has_every_field_of_the_contract_by_the_same_name() -> None:
    contract = {field.name for field in modality_service_pb2.FeatureCard.DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(types.FeatureCard)} == contract


def test_limits_have_every_field_of_the_contract_by_the_same_name() -> None:
    contract = {field.name for field in model_service_pb2.Limits.DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(types.Limits)} == contract


def test_score_settings_have_every_field_of_the_contract_by_the_same_name() -> None:
    contract = {field.name for field in modality_service_pb2.ScoreSettings.DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(types.ScoreSettings)} == contract


def test_every_order_and_label_of_the_contract_can_be_asked_for() -> None:
    orders = [
        name.removeprefix("FEATURE_ORDER_").lower()
        for name in modality_service_pb2.FeatureOrder.DESCRIPTOR.values_by_name
    ]
    for order in orders[1:]:
        assert order in types.FeatureOrder.__args__  # type: ignore[attr-defined]
        assert requests.list_features({"order_by": order}, 10, "").order_by  # type: ignore[typeddict-item]
    labels = [
        name.removeprefix("MODALITY_LABEL_") for name in common_pb2.ModalityLabel.DESCRIPTOR.values_by_name
    ]
    assert labels[1:] == list(types.ModalityLabel)
    assert [requests.label_value(label.lower()) for label in labels[1:]] == [1, 2, 3, 4, 5]


def test_undefined_measures_are_none_and_zero_is_zero() -> None:
    message = modality_service_pb2.FeatureCard(
        feature=3, label=common_pb2.MODALITY_LABEL_TEXT, mds_energy=0.0
    )
    page = read(types.FeaturePage, modality_service_pb2.ListFeaturesResponse(cards=[message]))
    assert page.cards[0].mds_energy == 0.0
    assert page.cards[0].mds_paper is None
    assert page.cards[0].label == "TEXT"


def test_what_is_none_stays_unset_in_a_request() -> None:
    options = requests.encode_options(None, None, False, True)
    assert not options.ListFields()
    assert requests.encode_options("", None, False, True).HasField("dictionary")
    assert not score_settings(types.ScoreSettings()).settings.ListFields()


def test_an_unknown_condition_is_refused_by_name() -> None:
    with pytest.raises(monofacet.InputError, match="minimum_mds"):
        requests.list_features({"minimum_mds": 1}, 10, "")  # type: ignore[typeddict-unknown-key]


def test_pairs_are_gathered_and_none_is_lost() -> None:
    batcher = PairBatcher(batch_size=3)
    messages = [
        message for position in range(8) for message in batcher.add((b"x", str(position), f"g{position}"))
    ]
    messages += batcher.rest()
    assert [len(message.batch.pairs) for message in messages] == [3, 3, 2]
    assert [pair.text for message in messages for pair in message.batch.pairs] == [str(n) for n in range(8)]
    assert messages[0].batch.pairs[1].group == "g1"


def test_large_pairs_are_sent_apart() -> None:
    batcher = PairBatcher(max_bytes=1000)
    messages = [message for _ in range(3) for message in batcher.add((b"x" * 600, "t"))] + batcher.rest()
    assert [len(message.batch.pairs) for message in messages] == [1, 1, 1]


@pytest.mark.parametrize("pair", [(b"x",), b"xy", (b"x", "t", "g", "more"), (3, "t")])
def test_what_is_no_pair_is_named_by_its_place(pair: object) -> None:
    batcher = PairBatcher()
    batcher.add((b"x", "t"))
    with pytest.raises(monofacet.InputError, match=r"pairs\[1\]"):
        batcher.add(pair)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_code_has_an_exception(code: grpc.StatusCode) -> None:
    error = error_from_rpc(MockRpcError(code, "why"))
    assert error.code == code.name
    assert error.message == "why"
    assert type(error) is KINDS.get(code.name, monofacet.ServerError)


def test_details_of_an_error_are_read() -> None:
    status = status_with_details(
        grpc.StatusCode.INVALID_ARGUMENT,
        "2 bad inputs",
        reason="IMAGE_CORRUPT",
        violations={"inputs[0].image.data": "truncated", "inputs[3].image.data": "not an image"},
        retry_after=1.5,
    )
    error = error_from_status(status)
    assert isinstance(error, InvalidInputError)
    assert error.reason == "IMAGE_CORRUPT"
    assert error.violations[1] == Violation("inputs[3].image.data", "not an image", "IMAGE_CORRUPT")
    assert error.retry_after == 1.5
    assert str(error).splitlines()[0] == "INVALID_ARGUMENT IMAGE_CORRUPT: 2 bad inputs"


def test_broken_or_foreign_details_do_not_hide_the_error() -> None:
    for data in (b"\xff\xff\xff", status_with_details(grpc.StatusCode.INTERNAL, "other").SerializeToString()):
        error = error_from_rpc(
            MockRpcError(grpc.StatusCode.NOT_FOUND, "gone", (("grpc-status-details-bin", data),))
        )
        assert (error.code, error.message) == ("NOT_FOUND", "gone")


def test_field_paths_of_a_part_count_from_the_start_of_the_batch() -> None:
    error = CallError(
        "inputs[2] is bad", code="INVALID_ARGUMENT", violations=(Violation("inputs[2].text", "long"),)
    )
    shifted = shift_violations(error, "inputs", 256)
    assert shifted.violations[0].field == "inputs[258].text"
    assert shifted.message == "inputs[258] is bad"


def test_errors_survive_pickling() -> None:
    # They cross process borders in worker pools.
    error = monofacet.OverloadedError("full", code="RESOURCE_EXHAUSTED", retry_after=2.0)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is monofacet.OverloadedError
    assert (copy.code, copy.retry_after, str(copy)) == (error.code, 2.0, str(error))


def test_everything_that_is_raised_is_a_monofacet_error() -> None:
    kinds = [
        kind for kind in vars(monofacet).values() if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    assert len(kinds) == 14
    assert all(issubclass(kind, monofacet.MonofacetError) for kind in kinds)
    assert all(kind.__name__ in (monofacet.__doc__ or "") for kind in kinds)


def test_all_is_sorted_and_complete() -> None:
    assert len(set(monofacet.__all__)) == len(monofacet.__all__)
    assert all(hasattr(monofacet, name) for name in monofacet.__all__)
