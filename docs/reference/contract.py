"""The contract as protoc reads it, comments included."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

# Registers the rules as options of fields; without it descriptors keep them as unknown bytes.
from monofacet import _rules  # noqa: F401

Field = descriptor_pb2.FieldDescriptorProto
File = descriptor_pb2.FileDescriptorProto
Message = descriptor_pb2.DescriptorProto

FOLDER = "monofacet/v1"
PACKAGE = ".monofacet.v1."

# Files in the order that a newcomer meets them; others come after.
ORDER = (
    "feature_service",
    "modality_service",
    "bias_service",
    "defense_service",
    "imaging_service",
    "model_service",
)

# Numbers of fields in FileDescriptorProto, DescriptorProto, EnumDescriptorProto and ServiceDescriptorProto, of which
# the paths of comments are made.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _ONEOFS, _VALUES, _METHODS = 2, 8, 2, 2


@dataclass(frozen=True)
class Entry:
    """Anything that has a name and a comment.

    Parameters
    ----------
    proto
        Its descriptor.
    comment
        In one line; empty without one.
    parts
        Its fields, values or methods, in order.
    oneofs
        The comments of a message's oneofs, in order; empty for a synthetic one.
    """

    proto: descriptor_pb2.DescriptorProto
    comment: str
    parts: tuple[Entry, ...] = ()
    oneofs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the contract writes it."""
        return str(self.proto.name)


@dataclass(frozen=True)
class Section:
    """One file of the contract."""

    name: str
    services: tuple[Entry, ...]
    types: tuple[Entry, ...]


@dataclass(frozen=True)
class Contract:
    """All files, in the order of the page: what services share comes last."""

    sections: tuple[Section, ...]

    @classmethod
    def compile(cls, protos: Path) -> Contract:
        """Read the contract.

        Parameters
        ----------
        protos
            The directory that imports start from.

        Raises
        ------
        RuntimeError
            If protoc fails; it has said why on standard error.
        """
        names = sorted(str(path.relative_to(protos)) for path in (protos / FOLDER).glob("*.proto"))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "descriptors"
            arguments = ["protoc", f"-I{protos}", f"-I{files('grpc_tools') / '_proto'}", *names]
            if protoc.main([*arguments, "--include_source_info", f"--descriptor_set_out={out}"]) != 0:
                raise RuntimeError("protoc failed")
            found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
        sections = [_section(file) for file in found.file]
        return cls(tuple(sorted(sections, key=_place)))

    @property
    def types(self) -> dict[str, Entry]:
        """Messages and enums by name."""
        return {entry.name: entry for section in self.sections for entry in section.types}

    def reached(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield every field below a message, as (name of the field, name of its type or nothing)."""
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            entry = self.types.get(waiting.pop())
            if entry is None or entry.name in seen:
                continue
            seen.add(entry.name)
            for part in entry.parts:
                kind = short(part.proto.type_name) if isinstance(part.proto, Field) else ""
                yield part.name, kind
                waiting.append(kind)


def short(type_name: str) -> str:
    """Return a type's name, without the package if it is ours and without the leading dot."""
    return type_name.removeprefix(PACKAGE).removeprefix(".")


def _place(section: Section) -> int:
    return ORDER.index(section.name) if section.name in ORDER else len(ORDER) + (not section.services)


def _section(file: File) -> Section:
    comments = {
        tuple(place.path): " ".join(place.leading_comments.split())
        for place in file.source_code_info.location
        if place.leading_comments
    }

    def parts(path: tuple[int, ...], protos: object) -> tuple[Entry, ...]:
        return tuple(
            Entry(proto, comments.get((*path, i), ""))
            for i, proto in enumerate(protos)  # type: ignore[arg-type]
        )

    def message(i: int, proto: Message) -> Entry:
        if proto.nested_type and not all(nested.options.map_entry for nested in proto.nested_type):
            raise RuntimeError(f"{proto.name}: the page has no place for nested messages")
        path = (_MESSAGES, i)
        oneofs = tuple(comments.get((*path, _ONEOFS, j), "") for j in range(len(proto.oneof_decl)))
        return Entry(proto, comments.get(path, ""), parts((*path, _FIELDS), proto.field), oneofs)

    services = tuple(
        Entry(proto, comments.get((_SERVICES, i), ""), parts((_SERVICES, i, _METHODS), proto.method))
        for i, proto in enumerate(file.service)
    )
    enums = [
        Entry(proto, comments.get((_ENUMS, i), ""), parts((_ENUMS, i, _VALUES), proto.value))
        for i, proto in enumerate(file.enum_type)
    ]
    messages = [message(i, proto) for i, proto in enumerate(file.message_type)]
    return Section(Path(file.name).stem, services, (*messages, *enums))
