"""Validation rules in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from monofacet._rules import validate_pb2

# By pairs of rules that make a range, then rules that stand alone; {} is the rule's value.
_RANGES = (
    ("gte", "lte", "{} to {}"),
    ("min_len", "max_len", "{} to {} {unit}"),
    ("min_bytes", "max_bytes", "{} to {} bytes"),
    ("min_items", "max_items", "{} to {} items"),
)
_WORDS = {
    "gt": "> {}",
    "gte": "≥ {}",
    "lt": "< {}",
    "lte": "≤ {}",
    "min_len": "at least {} {unit}",
    "max_len": "at most {} {unit}",
    "min_bytes": "at least {} bytes",
    "max_bytes": "at most {} bytes",
    "min_items": "at least {} items",
    "max_items": "at most {} items",
    "finite": "finite",
    "unique": "no two alike",
    "defined_only": "a value of the enum",
    "in": "one of {}",
    "not_in": "not {}",
}
_NUMBERS = {"float", "double", "uint32", "uint64", "int32", "int64"}


def field_rules(options: Any, values: Mapping[int, str]) -> list[str]:
    """Say what a field's rules ask for.

    Parameters
    ----------
    options
        The field's FieldOptions.
    values
        The names of its enum's values; empty for another type.

    Returns
    -------
    list of str
        One phrase a rule.

    Raises
    ------
    RuntimeError
        For a rule that has no words yet: a rule must not be left out in silence.
    """
    return list(_field(options.Extensions[validate_pb2.field], values))


def message_rules(options: Any) -> list[str]:
    """Say what the rules of a whole message ask for, from its MessageOptions."""
    rules = options.Extensions[validate_pb2.message]
    return [rule.message for rule in rules.cel]


def oneof_required(options: Any) -> bool:
    """Return whether one of a oneof's fields must be set, from its OneofOptions."""
    return bool(options.Extensions[validate_pb2.oneof].required)


def _field(rules: Any, values: Mapping[int, str]) -> Iterator[str]:
    for descriptor, value in rules.ListFields():
        if descriptor.name == "required":
            yield "required"
        elif descriptor.name == "cel":
            yield from (rule.message for rule in value)
        elif descriptor.name in ("string", "bytes", "repeated", "enum") or descriptor.name in _NUMBERS:
            yield from _leaves(descriptor.name, value, values)
        else:
            raise RuntimeError(f"no words for the rule {descriptor.full_name}")


def _leaves(kind: str, rules: Any, values: Mapping[int, str]) -> Iterator[str]:
    found = {descriptor.name: value for descriptor, value in rules.ListFields()}
    unit = "bytes" if kind == "bytes" else "characters"
    for low, high, words in _RANGES:
        if low in found and high in found:
            yield words.format(_number(found.pop(low)), _number(found.pop(high)), unit=unit)
    items = found.pop("items", None)
    for name, words in _WORDS.items():
        if name in found:
            value = found.pop(name)
            number = isinstance(value, int | float)
            yield words.format(_number(value) if number else ", ".join(values[v] for v in value), unit=unit)
    if items is not None:
        yield "each " + ", ".join(_field(items, values))
    if found:
        raise RuntimeError(f"no words for the {kind} rules {', '.join(found)}")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
