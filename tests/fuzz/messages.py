"""Hostile requests: messages by their descriptors, damaged pictures, damaged bytes. All from one seed."""

from __future__ import annotations

import io
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf import descriptor as pb_descriptor
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from PIL import Image

INTEGERS = (0, 1, 2, 3, 5, 8, 31, 63, 64, 65, 100, 255, 256, 257, 1_000, 2**31 - 1, 2**32 - 1, 2**63 - 1)
NEGATIVE = (-1, -2, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, 1.0, 0.5, 0.05, -1.0, 1e-45, 1e38, 1e300, -1e300, math.inf, -math.inf, math.nan)
TEXTS = (
    "", "a", "red heart", "sae", "neurons", "ncl", "no such dictionary", "\x00", "\n", "é", "\u202e", "🫠" * 40,
    "<start_of_text><end_of_text>", "a" * 201, "x " * 400, "‍" * 100, "../../etc/passwd", "http://x/", "%s%n{}",
    "'; --", "\ufffd", "İ" * 60,
)  # fmt: skip
# Kinds that protobuf keeps as whole numbers, and the bits that they hold; negative ones are signed.
_WHOLE = {
    FieldDescriptor.TYPE_INT32: -32, FieldDescriptor.TYPE_SINT32: -32, FieldDescriptor.TYPE_SFIXED32: -32,
    FieldDescriptor.TYPE_INT64: -64, FieldDescriptor.TYPE_SINT64: -64, FieldDescriptor.TYPE_SFIXED64: -64,
    FieldDescriptor.TYPE_UINT32: 32, FieldDescriptor.TYPE_FIXED32: 32,
    FieldDescriptor.TYPE_UINT64: 64, FieldDescriptor.TYPE_FIXED64: 64,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes
    ----------
    method
        Full name: `monofacet.v1.FeatureService/Encode`.
    messages
        What is sent, on the wire.
    """

    method: str
    messages: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """Return the case as a file of the corpus: the method, then each message after its length."""
        lines = [self.method.encode(), b"\n"]
        for message in self.messages:
            lines += [struct.pack("<I", len(message)), message]
        return b"".join(lines)

    @classmethod
    def from_bytes(cls, data: bytes) -> Case:
        """Read a file of the corpus."""
        head, _, rest = data.partition(b"\n")
        messages = []
        while rest:
            (size,) = struct.unpack("<I", rest[:4])
            messages.append(rest[4 : 4 + size])
            rest = rest[4 + size :]
        return cls(head.decode(), tuple(messages))


@cache
def pictures() -> tuple[bytes, ...]:
    """Return small valid pictures of every format, and some that are odd."""
    made = []
    for mode, size in (
        ("RGB", (32, 32)),
        ("RGBA", (40, 20)),
        ("L", (7, 9)),
        ("P", (33, 31)),
        ("1", (16, 16)),
    ):
        image = Image.effect_noise(size, 60).convert(mode)
        for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
            try:
                buffer = io.BytesIO()
                image.save(buffer, form)
            except OSError:
                continue
            made.append(buffer.getvalue())
    wide, sixteen = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (2_000, 1)).save(wide, "PNG")
    Image.new("I;16", (20, 20), 40_000).save(sixteen, "PNG")
    return (
        *made,
        wide.getvalue(),
        sixteen.getvalue(),
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"RIFF\0\0\0\0WEBP",
    )


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with a few bytes changed, cut, doubled or inserted."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[place % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[place % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del out[place : place + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            out[place:place] = rng.randbytes(rng.choice((1, 4, 16)))
        elif kind == 4:
            out[place:place] = out[max(0, place - 16) : place]
        else:
            del out[place:]
    return bytes(out)


class Maker:
    """Makes cases for one service.

    Parameters
    ----------
    service
        Its descriptor.
    seed
        Of everything that is drawn.
    """

    def __init__(self, service: ServiceDescriptor, seed: int) -> None:
        self._service = service
        self._rng = random.Random(f"{service.full_name}/{seed}")

    def case(self) -> Case:
        """Return the next case: usually well-formed messages, sometimes damaged bytes or noise."""
        rng = self._rng
        method: MethodDescriptor = rng.choice(list(self._service.methods))
        count = rng.choice((0, 1, 1, 2, 3, 5)) if method.client_streaming else 1
        messages = [self.message(method.input_type).SerializeToString() for _ in range(count)]
        kind = rng.random()
        if kind < 0.2:
            messages = [damaged(message, rng) for message in messages]
        elif kind < 0.25:
            messages = [rng.randbytes(rng.choice((1, 10, 100))) for _ in messages]
        return Case(f"{self._service.full_name}/{method.name}", tuple(messages))

    def message(self, kind: Descriptor, depth: int = 0) -> Message:
        """Return a message of `kind` with some of its fields set to something."""
        rng = self._rng
        message = message_factory.GetMessageClass(kind)()
        # Half of the time nearly every field is set: what is only sometimes allowed must be reached, too.
        share = rng.choice((0.3, 0.95))
        for oneof in kind.oneofs:
            synthetic = len(oneof.fields) == 1 and oneof.fields[0].has_presence
            if rng.random() < (share if synthetic else 0.95):
                self._set(message, rng.choice(list(oneof.fields)), depth)
        for field in kind.fields:
            if field.containing_oneof is None and rng.random() < share:
                self._set(message, field, depth)
        return message

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        rng = self._rng
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return
        if field.is_repeated:
            values = getattr(message, field.name)
            for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
                if field.message_type is not None:
                    values.add().CopyFrom(self._value(field, depth))
                else:
                    values.append(self._value(field, depth))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(self._value(field, depth))
        else:
            setattr(message, field.name, self._value(field, depth))

    def _value(self, field: FieldDescriptor, depth: int) -> Any:
        rng = self._rng
        if field.message_type is not None:
            if depth > 5:
                return message_factory.GetMessageClass(field.message_type)()
            return self.message(field.message_type, depth + 1)
        if field.type in _WHOLE:
            bits = _WHOLE[field.type]
            known = [n for n in INTEGERS if n < 2 ** (-bits - 1 if bits < 0 else bits)]
            # Small numbers most of the time: large ones are refused by their rule and reach nothing else.
            known = known[:6] if rng.random() < 0.8 else known
            if bits < 0 and rng.random() < 0.1:
                known = [n for n in NEGATIVE if n >= -(2 ** (-bits - 1))]
            return rng.choice(known)
        if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
            return rng.random() if rng.random() < 0.6 else rng.choice(FLOATS)
        if field.type == FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        if field.type == FieldDescriptor.TYPE_ENUM:
            values = [value.number for value in field.enum_type.values]
            return rng.choice([*values, *values, 77])
        if field.type == FieldDescriptor.TYPE_BYTES:
            picture = rng.choice(pictures())
            return picture if rng.random() < 0.5 else damaged(picture, rng)
        text: str = rng.choice(TEXTS)
        return text if rng.random() < 0.9 else text * rng.choice((2, 50))


def services(
    descriptors: Sequence[pb_descriptor.ServiceDescriptor], seed: int
) -> dict[str, Callable[[], Case]]:
    """Return what makes cases, by the service's full name."""
    return {service.full_name: Maker(service, seed).case for service in descriptors}
