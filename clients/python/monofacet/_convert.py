"""From the contract's messages to dataclasses, field by field of the same name. Pure: no channel is touched.

A message and its dataclass say each field once. What a field is follows from its type: a nested message is another
dataclass, a repeated field a tuple or an array, a tensor an array, an enum a `StrEnum` without the contract's prefix, a
map a dict, a duration a float of seconds. A field of type ``X | None`` is None where the message does not set it. Where
a field differs from its message's, the dataclass says how with `wire`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from monofacet import _exceptions as exceptions
from monofacet.v1 import common_pb2

Record = TypeVar("Record")
Reader = Callable[[Any], Any]

WIRE = "monofacet.wire"
DTYPES: dict[int, npt.DTypeLike] = {
    common_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    common_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}


def wire(source: str | Reader) -> dict[str, Any]:
    """Make the metadata of a field that is not simply the message's field of the same name.

    Parameters
    ----------
    source
        The message's name for it, or what makes the value from the whole message.

    Returns
    -------
    dict
        For `dataclasses.field`.
    """
    return {WIRE: source}


def read(kind: type[Record], message: Message, **given: Any) -> Record:
    """Read a message.

    Parameters
    ----------
    kind
        The dataclass of such a message.
    message
        What the server answered, or a part of it.
    **given
        Values of fields that the message does not have, or has differently this time.

    Returns
    -------
    Record
        A new one; its arrays are writable.

    Raises
    ------
    ResponseError
        If the message holds what this client does not know, or what does not add up.
    """
    # mypy takes classes for unhashable.
    record: Record = _reader(kind, message.DESCRIPTOR, tuple(given))(message, **given)  # type: ignore[arg-type]
    return record


@functools.cache
def _reader(kind: type[Any], descriptor: Descriptor, given: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Plan how a dataclass is read, once: after that, no type is looked at."""
    hints = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if field.name not in given]
    names: list[str] = []
    # By the position in `fields`: what is made from the whole message, what may be unset, what is converted.
    made: list[tuple[int, Reader]] = []
    optional: list[tuple[int, str]] = []
    converted: list[tuple[int, Reader]] = []
    for position, field in enumerate(fields):
        source = field.metadata.get(WIRE, field.name)
        if callable(source):
            made.append((position, source))
            continue
        wired = descriptor.fields_by_name.get(source)
        if wired is None:
            raise TypeError(f"{descriptor.full_name} has no field {source!r} to read {field.name!r} from")
        names.append(source)
        hint, may_be_none = _unwrapped(hints[field.name])
        if may_be_none and wired.has_presence:
            optional.append((position, source))
        convert = _values(hint, wired, may_be_none)
        if convert is not None:
            converted.append((position, convert))

    def values(message: Any) -> list[Any]:
        found = [getattr(message, name) for name in names]
        for position, make in made:
            found.insert(position, make(message))
        for position, name in optional:
            if not message.HasField(name):
                found[position] = None
        for position, convert in converted:
            if found[position] is not None:
                found[position] = convert(found[position])
        return found

    if not given:
        return lambda message: kind(*values(message))
    others = [field.name for field in fields]
    return lambda message, **more: kind(**dict(zip(others, values(message), strict=True)), **more)


def _unwrapped(hint: Any) -> tuple[Any, bool]:
    """Return the first choice of a type, and whether None is another."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return choices[0], types.NoneType in choices


def _values(hint: Any, wired: FieldDescriptor, optional: bool) -> Reader | None:
    """Plan how what a field holds is converted, be it one value or several; None if it stays as it is."""
    if not wired.is_repeated:
        return _value(hint, wired, optional)
    if wired.message_type is not None and wired.message_type.GetOptions().map_entry:
        return dict
    if typing.get_origin(hint) is np.ndarray:
        dtype = typing.get_args(typing.get_args(hint)[1])[0]
        return lambda values: np.array(values, dtype=dtype)
    each = _value(typing.get_args(hint)[0], wired, False)
    return tuple if each is None else lambda values: tuple([each(value) for value in values])


def _value(hint: Any, wired: FieldDescriptor, optional: bool) -> Reader | None:
    """Plan how one value is converted; None if it stays as it is."""
    if wired.enum_type is not None:
        return word(hint, wired.enum_type, optional)
    if wired.message_type is None:
        return None
    return PARTS.get(wired.message_type.full_name) or _reader(hint, wired.message_type)


def word(hint: type[str], values: EnumDescriptor, optional: bool = False) -> Reader:
    """Plan how a value of an enum is read.

    Parameters
    ----------
    hint
        A `StrEnum` with the names of the contract less their prefix, or str.
    values
        Of the contract.
    optional
        Whether a value that is unspecified, or not known here, is None.

    Returns
    -------
    callable
        From numbers to members, or to texts. It raises a `ResponseError` for a value that is not known.
    """
    names = {
        number: value.name.removeprefix(prefix(values)) for number, value in values.values_by_number.items()
    }
    known = hint.__members__ if issubclass(hint, enum.StrEnum) else {name: name for name in names.values()}
    words = {number: known[name] for number, name in names.items() if number and name in known}
    if optional:
        return words.get

    def known_word(number: int) -> Any:
        if number not in words:
            shown = values.values_by_number[number].name if number in names else f"{values.name} {number}"
            raise exceptions.ResponseError(f"the answer holds {shown}, which this client does not know")
        return words[number]

    return known_word


def prefix(values: EnumDescriptor) -> str:
    """Return what the contract puts before each name of an enum, such as ``MODALITY_LABEL_``."""
    return values.values_by_number[0].name.removesuffix("UNSPECIFIED")


def array(tensor: common_pb2.Tensor) -> npt.NDArray[Any]:
    """Read a tensor.

    Parameters
    ----------
    tensor
        Little-endian, row-major.

    Returns
    -------
    ndarray
        Of the tensor's shape and type, writable.

    Raises
    ------
    ResponseError
        If type, shape and data do not fit together.
    """
    dtype = DTYPES.get(tensor.dtype)
    shape = tuple(tensor.shape)
    if dtype is None or min(shape, default=0) < 0:
        raise exceptions.ResponseError(f"the answer holds a tensor of type {tensor.dtype} and shape {shape}")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(tensor.data):
        raise exceptions.ResponseError(
            f"the answer holds {len(tensor.data)} bytes for a tensor of shape {shape}"
        )
    # A copy: an array over the message's own bytes is read-only, which numpy's users do not expect.
    return np.frombuffer(tensor.data, dtype=dtype).reshape(shape).astype(np.dtype(dtype).newbyteorder("="))


def seconds(duration: Any) -> float:
    """Read a duration.

    Parameters
    ----------
    duration
        A google.protobuf.Duration.

    Returns
    -------
    float
        In seconds.
    """
    return float(duration.seconds + duration.nanos * 1e-9)


# Messages that are no dataclass here.
PARTS: dict[str, Reader] = {"google.protobuf.Duration": seconds, "monofacet.v1.Tensor": array}
