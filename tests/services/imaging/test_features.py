"""Which dictionaries an image costs."""

from __future__ import annotations

import pytest

from services.bundle.load import Bundle
from services.errors import UnknownDictionary
from services.imaging.features import Features


def test_a_dictionary_is_read_once_and_not_before_it_is_asked_for(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load = Bundle.dictionary

    def counted(bundle: Bundle, name: str = "") -> object:
        read.append(name)
        return load(bundle, name)

    monkeypatch.setattr(Bundle, "dictionary", counted)
    features = Features(tiny)
    assert read == []
    default = tiny.manifest.default_dictionary
    other = next(name for name in tiny.dictionary_names if name != default)
    dictionary, space = features.of("")
    assert (dictionary.name, space.name) == (default, default)
    assert features.of(default)[0] is dictionary
    assert features.of(other)[0].name == other
    assert read == [default, other]
    with pytest.raises(UnknownDictionary, match="nothing"):
        features.of("nothing")
    assert features.embed_dim == dictionary.embed_dim
