"""Every message that is read says in its dataclass what protobuf's own JSON says of it."""

from __future__ import annotations

import base64
import dataclasses
import io
import typing
from typing import Any

import numpy as np
import PIL.Image
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monofacet import ResponseError
from monofacet import _types as types
from monofacet._convert import WIRE, read
from monofacet._types.brief import Brief
from monofacet.v1 import (
    bias_service_pb2,
    common_pb2,
    defense_service_pb2,
    feature_service_pb2,
    imaging_service_pb2,
    modality_service_pb2,
    model_service_pb2,
)

ROWS = np.zeros(3, dtype=np.float32)
# What is read as a whole, and what the reader is given besides the message; all others are parts of these.
READ: list[tuple[type[Any], type[Message], dict[str, Any]]] = [
    (types.EncodeResult, feature_service_pb2.EncodeResponse, {}),
    (
        types.StreamResult,
        feature_service_pb2.Encoding,
        {"id": "0", "error": None, "timings": None, "bundle": "b@1"},
    ),
    (types.FeaturePage, modality_service_pb2.ListFeaturesResponse, {}),
    (types.FeatureDetail, modality_service_pb2.GetFeatureResponse, {}),
    (types.ClassificationResult, modality_service_pb2.ClassifyModalityResponse, {}),
    (types.ModalityTable, modality_service_pb2.ScoreModalityResponse, {}),
    (types.GenderResult, bias_service_pb2.ClassifyGenderResponse, {}),
    (types.AuditResult, bias_service_pb2.AuditGenderResponse, {}),
    (types.FilterResult, defense_service_pb2.FilterAdversarialResponse, {"images": ()}),
    (types.FilteredImage, defense_service_pb2.FilteredImage, {"before": ROWS, "after": ROWS}),
    (types.GenerationProgress, imaging_service_pb2.GenerateProgress, {}),
    (types.GenerationPreview, imaging_service_pb2.GeneratePreview, {}),
    (types.GeneratedImage, imaging_service_pb2.GeneratedImage, {"timings": None, "bundle": "b@1"}),
    (types.SteeringPreview, imaging_service_pb2.PreviewSteeringResponse, {}),
    (types.AttributeList, imaging_service_pb2.ListAttributesResponse, {}),
    (types.Model, model_service_pb2.Model, {"server_version": "1"}),
]
# Fields that say how they are read, since the message has them differently.
DECLARED = {
    "Ablation.features",
    "AblationAudit.curve",
    "AuditSettings.skip_bad_items",
    "GeneratedImage.data",
    "GeneratedImage.error",
    "GenerationPreview.image",
    "GenerationProgress.num_steps",
    "ImageExample.image",
    "ModalityClassification.shares",
    "Model.files",
    "SparseFeatures.values",
}
# What is sent only, and what is gathered from several events.
NOT_ANSWERED = {"GenerationResult", "SteeringAttribute", "SteeringEdit"}
# Timings of calls that run no model, and what the fields that are declared above, or given, are made from.
NOT_READ = {
    "AttributeList.timings",
    "AuditSettings.on_bad_item",
    "FeatureDetail.timings",
    "FeaturePage.timings",
    "FilterResult.embeddings_after",
    "FilterResult.embeddings_before",
    "GeneratedImage.finish_reason",
    "GeneratedImage.image",
    "GenerationProgress.num_inference_steps",
    "ImageExample.thumbnail",
}


def picture() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (2, 2), (9, 8, 7)).save(file, "PNG")
    return file.getvalue()


# Messages that a server may leave out, since the dataclass then has None.
UNSET = {
    "Attribute.measures",
    "GenderClassification.after",
    "ImageExample.thumbnail",
    "Model.pipeline",
    "Model.recommended_ablation",
}
LONG = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
# Messages that are no arbitrary bytes and numbers.
WHOLE: dict[str, st.SearchStrategy[Any]] = {
    "monofacet.v1.Image": st.just(common_pb2.Image(data=picture())),
    "monofacet.v1.Tensor": st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(
        lambda values: common_pb2.Tensor(
            dtype=common_pb2.DATA_TYPE_FLOAT32,
            shape=[len(values)],
            data=np.array(values, dtype="<f4").tobytes(),
        )
    ),
    "monofacet.v1.SparseFeatures": st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.floats(0, 10, width=32)), max_size=3
    ).map(
        lambda pairs: common_pb2.SparseFeatures(
            dictionary="d", indices=[index for index, _ in pairs], values=[value for _, value in pairs]
        )
    ),
    "google.protobuf.Duration": st.integers(0, 10**12).map(
        lambda nanos: {"seconds": nanos // 10**9, "nanos": nanos % 10**9}
    ),
    "google.rpc.Status": st.just({"code": 3, "message": "why"}),
}


def single(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type)
    if field.enum_type is not None:
        # 0 is of the tests below.
        return st.sampled_from([value.number for value in field.enum_type.values if value.number])
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return st.floats(width=32, allow_nan=False, allow_infinity=False)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return st.text(st.characters(codec="utf-8"), max_size=4)
    return st.integers(0, 2**63 if field.cpp_type in LONG else 2**31)


def messages(descriptor: Descriptor) -> st.SearchStrategy[Any]:
    """Make messages of any content."""
    if descriptor.full_name in WHOLE:
        return WHOLE[descriptor.full_name]
    must, may = {}, {}
    for field in descriptor.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            may[field.name] = st.dictionaries(st.sampled_from("abc"), st.floats(0, 1), max_size=2)
        elif field.is_repeated:
            may[field.name] = st.lists(single(field), max_size=2)
        elif field.has_presence and (
            field.message_type is None or f"{descriptor.name}.{field.name}" in UNSET
        ):
            may[field.name] = single(field)
        else:
            must[field.name] = single(field)
    return st.fixed_dictionaries(must, optional=may).map(lambda values: GetMessageClass(descriptor)(**values))


def names(kind: type[Any]) -> list[str]:
    """Return the fields of a dataclass that are those of its message."""
    return [field.name for field in dataclasses.fields(kind) if WIRE not in field.metadata]


def assert_agrees(record: Any, descriptor: Descriptor, said: dict[str, Any], besides: set[str]) -> None:
    for name in set(names(type(record))) - besides:
        field, value = descriptor.fields_by_name[name], getattr(record, name)
        if name not in said:
            assert value is None, name
        elif isinstance(value, dict):
            assert value == said[name]
        elif field.is_repeated and isinstance(value, np.ndarray):
            assert value.tolist() == np.array([float(one) for one in said[name]], dtype=value.dtype).tolist()
        elif field.is_repeated:
            assert isinstance(value, tuple)
            for one, told in zip(value, said[name], strict=True):
                assert_one(one, field, told)
        else:
            assert_one(value, field, said[name])


def assert_one(value: Any, field: FieldDescriptor, said: Any) -> None:
    if field.enum_type is not None:
        prefix = field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
        assert said == prefix + ("UNSPECIFIED" if value is None else value)
    elif field.message_type is None:
        assert type(value) in (int, float, str, bool)
        assert value == (
            type(value)(said) if field.cpp_type != FieldDescriptor.CPPTYPE_FLOAT else np.float32(said)
        )
    elif field.message_type.name == "Duration":
        # A nanosecond is what a duration holds, and less than that a float rounds.
        assert value == pytest.approx(float(said.removesuffix("s")), abs=1e-9)
    elif field.message_type.name == "Tensor":
        data = np.frombuffer(base64.b64decode(said["data"]), dtype="<f4")
        assert value.shape == tuple(int(side) for side in said["shape"])
        assert value.tobytes() == data.tobytes()
    else:
        assert_agrees(value, field.message_type, said, set())


@pytest.mark.parametrize(("kind", "message", "more"), READ, ids=[kind.__name__ for kind, _, _ in READ])
@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_read_is_what_the_message_says(
    kind: type[Any], message: type[Message], more: dict[str, Any], data: st.DataObject
) -> None:
    sent = data.draw(messages(message.DESCRIPTOR))
    said = json_format.MessageToDict(
        sent, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    assert_agrees(read(kind, sent, **more), message.DESCRIPTOR, said, set(more))


def parts(kind: type[Any], descriptor: Descriptor) -> dict[type[Any], Descriptor]:
    """Return a dataclass and all within it, with the messages that they are read from."""
    found = {kind: descriptor}
    hints = typing.get_type_hints(kind)
    for field in descriptor.fields:
        for choice in (hints.get(field.name), *typing.get_args(hints.get(field.name))):
            if isinstance(choice, type) and issubclass(choice, Brief) and field.message_type is not None:
                found |= parts(choice, field.message_type)
    return found


EVERY = {part: d for kind, message, _ in READ for part, d in parts(kind, message.DESCRIPTOR).items()}


def test_every_dataclass_of_an_answer_is_in_the_table() -> None:
    every = {getattr(types, name) for name in types.__all__}
    records = {kind for kind in every if isinstance(kind, type) and issubclass(kind, Brief)}
    assert {kind.__name__ for kind in records - EVERY.keys()} == NOT_ANSWERED


def test_every_field_of_an_answer_is_read_by_its_name_or_says_how() -> None:
    declared = {
        f"{kind.__name__}.{field.name}"
        for kind in EVERY
        for field in dataclasses.fields(kind)
        if WIRE in field.metadata
    }
    assert declared == DECLARED
    unread = {
        f"{kind.__name__}.{field.name}"
        for kind, descriptor in EVERY.items()
        for field in descriptor.fields
        if field.name not in {field.name for field in dataclasses.fields(kind)}
    }
    assert unread == NOT_READ


@pytest.mark.parametrize("number", [0, 99])
def test_a_word_that_is_not_known_is_none_only_where_there_may_be_none(number: int) -> None:
    message = modality_service_pb2.FeatureCard(label=1, paper_label=number)  # type: ignore[arg-type]
    assert read(types.FeatureCard, message).paper_label is None
    message.label = number  # type: ignore[assignment]
    shown = "MODALITY_LABEL_UNSPECIFIED" if number == 0 else "ModalityLabel 99"
    with pytest.raises(ResponseError, match=shown):
        read(types.FeatureCard, message)


def test_a_field_that_the_message_does_not_have_is_found_when_it_is_first_read() -> None:
    with pytest.raises(TypeError, match="no field 'server_version'"):
        read(types.Model, model_service_pb2.Model())
