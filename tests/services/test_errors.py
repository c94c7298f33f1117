from __future__ import annotations

import pickle

import pytest

from services import errors
from services.errors import CorruptImage, ImageTooLarge, InvalidInput, MonofacetError, TextTooLong


def every_error() -> list[type[MonofacetError]]:
    def below(kind):
        return [kind, *(k for child in kind.__subclasses__() for k in below(child))]

    # What other packages derive from the tree is theirs to draw, and in memory only when they were imported.
    return [kind for kind in below(MonofacetError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", every_error())
def test_every_error_is_in_the_drawn_tree_and_has_a_reason_of_its_own(kind):
    assert kind.__name__ in (errors.__doc__ or "")
    assert kind.default_reason == kind.default_reason.upper()
    assert [k.default_reason for k in every_error()].count(kind.default_reason) == 1


@pytest.mark.parametrize("kind", every_error())
def test_every_error_survives_a_trip_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("what", [("a[0]", "why")], reason="SOME_REASON")))
    assert type(error) is kind
    assert (error.message, error.violations, error.reason, str(error)) == (
        "what",
        (("a[0]", "why", "SOME_REASON"),),
        "SOME_REASON",
        "what",
    )


def test_gathered_errors_keep_a_common_reason_and_name_every_field():
    gathered = InvalidInput.gather([CorruptImage("a").at("images[0]"), CorruptImage("b").at("images[2]")])
    assert isinstance(gathered, CorruptImage)
    assert gathered.reason == "IMAGE_CORRUPT"
    assert [(v.path, v.description) for v in gathered.violations] == [("images[0]", "a"), ("images[2]", "b")]


def test_gathered_errors_of_different_kinds_have_the_general_reason():
    gathered = InvalidInput.gather([ImageTooLarge("a").at("images[0]"), TextTooLong("b").at("texts[1]")])
    assert gathered.reason == "INVALID_INPUT"
    for error in (gathered, pickle.loads(pickle.dumps(gathered)), gathered.moved(str)):
        assert [v.reason for v in error.violations] == ["IMAGE_TOO_LARGE", "TEXT_TOO_LONG"]


def test_an_error_moves_with_all_that_it_says():
    moved = ImageTooLarge("a", [("image", "b")], reason="OTHER").moved(lambda path: f"inputs[3].{path}")
    assert type(moved) is ImageTooLarge
    assert (moved.message, moved.reason, moved.violations) == (
        "a",
        "OTHER",
        (("inputs[3].image", "b", "OTHER"),),
    )
