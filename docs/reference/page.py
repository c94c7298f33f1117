"""The page: from the contract to Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from contract import Contract, Entry, Field, Section, short
from reasons import all_reasons, reasons_of
from rules import field_rules, message_rules, oneof_required

from deployments.access.scopes import SCOPES

INTRODUCTION = """\
# API reference

<!-- Made by `make docs` from protos/ and the gateway's tables; do not edit. -->

Package `monofacet.v1`, in `protos/monofacet/v1`. Any gRPC client works from the files, or by reflection; the Python
client (`clients/python`) wraps every call. A field's rules are checked before anything runs, and a breach is
INVALID_ARGUMENT with the field's path; an "optional" field that is not set can be told from a zero. Limits that
a server was set lower than the contract are in [Limits](#limits), by `GetModel`. `grpc.health.v1.Health` and reflection
are the standard ones. Access and overload are in [operations.md](operations.md).
"""

ERRORS = """\
Every error carries google.rpc.ErrorInfo (domain `monofacet`, a reason to branch on) and, where a field is at fault,
google.rpc.BadRequest with paths such as `inputs[2].image.data`; where fields are wrong in different ways the reason is
INVALID_INPUT, and each violation has a reason of its own. A status has at most 4 KiB, since gRPC refuses larger
ones: of many fields at fault the first few dozen are listed, and a last entry, "and N more like it", counts the others
and names the first of these. Where "again" is marked, RetryInfo says when the same call may succeed. Calls name below
only the reasons that are not common to all: those of UNAUTHENTICATED, PERMISSION_DENIED, RESOURCE_EXHAUSTED,
UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED and INTERNAL, and INVALID_INPUT and REQUEST_MALFORMED, can come from any.
"""

_FLOW = {
    (False, False): "unary",
    (True, False): "client stream",
    (False, True): "server stream",
    (True, True): "bidirectional stream",
}


def page(contract: Contract) -> str:
    """Write the whole page.

    Parameters
    ----------
    contract
        What it is about.

    Returns
    -------
    str
        Markdown.
    """
    blocks = [INTRODUCTION, *_overview(contract), *_errors()]
    for section in contract.sections:
        blocks += _section(section, contract)
    return "\n".join(blocks)


def _overview(contract: Contract) -> Iterator[str]:
    rows = [
        [
            f"[{method.name}](#{_anchor(method.name)})",
            service.name,
            _flow(method),
            f"`{_scope(service, method)}`",
            _prose(method.comment.split(". ")[0].rstrip(".")),
        ]
        for section in contract.sections
        for service in section.services
        for method in service.parts
    ]
    yield "## Calls\n"
    yield _table(["call", "service", "kind", "scope", ""], rows)


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield ERRORS
    rows = [
        [reason.status, f"`{reason.name}`", "again" if reason.retry else "", _prose(reason.when)]
        for reason in all_reasons()
    ]
    yield _table(["status", "reason", "", "when"], rows)


def _section(section: Section, contract: Contract) -> Iterator[str]:
    yield f"## {section.services[0].name if section.services else 'Shared types'}\n"
    for service in section.services:
        yield f"{_prose(service.comment)}\n"
        for method in service.parts:
            yield from _method(service, method, contract)
    for entry in section.types:
        yield from (
            _message(entry, contract) if entry.proto.DESCRIPTOR.name == "DescriptorProto" else _enum(entry)
        )


def _method(service: Entry, method: Entry, contract: Contract) -> Iterator[str]:
    request, response = short(method.proto.input_type), short(method.proto.output_type)
    arrow = f"{_stream(method.proto.client_streaming)}{_link(request, contract)} → "
    arrow += f"{_stream(method.proto.server_streaming)}{_link(response, contract)}"
    yield f"### {method.name}\n"
    yield f"{_flow(method).capitalize()}, scope `{_scope(service, method)}`: {arrow}\n"
    yield f"{_prose(method.comment)}\n"
    names = reasons_of(method.name, request, contract)
    if names:
        yield f"Refused for: {', '.join(f'`{name}`' for name in names)}.\n"


def _message(entry: Entry, contract: Contract) -> Iterator[str]:
    yield f"### {entry.name}\n"
    yield f"{_prose(entry.comment)}\n"
    for rule in message_rules(entry.proto.options):
        yield f"Rule: {_prose(rule)}.\n"
    for i, oneof in enumerate(entry.proto.oneof_decl):
        members = [part.name for part in entry.parts if _oneof(part.proto) == i]
        if members:
            number = "Exactly" if oneof_required(oneof.options) else "At most"
            # The comment of a oneof says the same where it says only that.
            comment = (
                entry.oneofs[i]
                .replace("Exactly one must be set.", "")
                .replace("Exactly one is set.", "")
                .strip()
            )
            names = ", ".join(f"`{name}`" for name in members)
            yield f"{number} one of {names}. {_prose(comment)}".rstrip() + "\n"
    if not entry.parts:
        yield "No fields.\n"
        return
    rows = [
        [
            f"`{part.name}`",
            _type(part.proto, entry, contract),
            _prose("; ".join(field_rules(part.proto.options, _values(part.proto, contract)))),
            _prose(part.comment),
        ]
        for part in entry.parts
    ]
    yield _table(["field", "type", "rules", ""], rows)


def _enum(entry: Entry) -> Iterator[str]:
    yield f"### {entry.name}\n"
    yield f"{_prose(entry.comment)}\n"
    rows = [[f"`{part.name}`", str(part.proto.number), _prose(part.comment)] for part in entry.parts]
    yield _table(["value", "number", ""], rows)


def _type(field: Field, message: Entry, contract: Contract) -> str:
    entry = next(
        (nested for nested in message.proto.nested_type if field.type_name.endswith(f".{nested.name}")), None
    )
    if entry is not None:
        key, value = (_plain(part, contract) for part in entry.field)
        return f"map of {key} to {value}"
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {_plain(field, contract)}"
    return f"optional {_plain(field, contract)}" if field.proto3_optional else _plain(field, contract)


def _plain(field: Field, contract: Contract) -> str:
    if field.type_name:
        return _link(short(field.type_name), contract)
    return Field.Type.Name(field.type).removeprefix("TYPE_").lower()


def _values(field: Field, contract: Contract) -> dict[int, str]:
    if field.type != Field.TYPE_ENUM:
        return {}
    return {value.proto.number: f"`{value.name}`" for value in contract.types[short(field.type_name)].parts}


def _oneof(field: Field) -> int | None:
    return field.oneof_index if field.HasField("oneof_index") and not field.proto3_optional else None


def _flow(method: Entry) -> str:
    return _FLOW[method.proto.client_streaming, method.proto.server_streaming]


def _stream(streams: bool) -> str:
    return "stream of " if streams else ""


def _scope(service: Entry, method: Entry) -> str:
    return SCOPES[f"monofacet.v1.{service.name}/{method.name}"].value


def _link(name: str, contract: Contract) -> str:
    return f"[{name}](#{_anchor(name)})" if name in contract.types else name


def _anchor(heading: str) -> str:
    return heading.lower()


def _prose(text: str) -> str:
    """Escape what Markdown would take for markup, but not within backticks."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*<\[\]])", r"\\\1", parts[i])
    return "`".join(parts)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
