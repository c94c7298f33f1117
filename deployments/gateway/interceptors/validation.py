"""The contract's own rules, checked at the door: the same rules that a client can check."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import protovalidate

from deployments.gateway.interceptors.chain import Call
from services.errors import InvalidInput


def field_path(path: Any) -> str:
    """Return a violation's field path in the style of google.rpc.BadRequest: `inputs[2].image.data`.

    Parameters
    ----------
    path
        A `buf.validate.FieldPath`, or None for a rule of the whole message.
    """
    parts: list[str] = []
    for element in path.elements if path is not None else ():
        name = element.field_name or ""
        subscript = element.subscript
        if subscript is not None:
            name += f"[{subscript.value}]"
        parts.append(name)
    return ".".join(part for part in parts if part)


def validate(message: Any) -> None:
    """Raise InvalidInput, with every field at fault, unless `message` keeps the contract's rules."""
    violations = protovalidate.collect_violations(message)
    if not violations:
        return
    fields = [(field_path(v.proto.field), v.proto.message or "") for v in violations]
    first_path, first = fields[0]
    raise InvalidInput(f"{first_path}: {first}" if first_path else first, fields)


@asynccontextmanager
async def validation_layer(call: Call) -> AsyncIterator[None]:
    """Validate the request of a unary call; items of a stream are validated one by one by its servicer."""
    if call.request is not None:
        validate(call.request)
    yield
