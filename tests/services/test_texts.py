from __future__ import annotations

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.encoding import texts as texts_module
from services.encoding.texts import TextLimits, Tokeniser
from services.errors import TextTooLong
from tests.services.test_images import config as clip_config
from tests.support.waiting import PATIENCE_S

START, END = 49406, 49407


def tokeniser(context_length: int = 16, **limits) -> Tokeniser:
    import dataclasses

    config = dataclasses.replace(clip_config(), model_cfg={"text_cfg": {}}, context_length=context_length)
    return Tokeniser(config, TextLimits(**limits)) if limits else Tokeniser(config)


@pytest.fixture(scope="module")
def tok() -> Tokeniser:
    return tokeniser()


@settings(max_examples=200)
@given(text=st.text(max_size=60))
def test_tokens_are_open_clips(text):
    if "_of_text>" in text.lower():
        return
    ours = TOK.tokenise([text], truncate=True)
    assert np.array_equal(ours, THEIRS([text]).numpy())


TOK = tokeniser()
THEIRS = open_clip.get_tokenizer("ViT-B-32", context_length=16)


def test_a_text_that_does_not_fit_is_refused_and_named(tok):
    with pytest.raises(TextTooLong) as caught:
        tok.tokenise(["a cat", "cat " * 15, "a dog", "dog " * 99])
    assert [path for path, *_ in caught.value.violations] == ["texts[1]", "texts[3]"]
    assert caught.value.reason == "TEXT_TOO_LONG"


def test_a_text_that_just_fits_is_taken(tok):
    tokens = tok.tokenise(["cat " * 14])
    assert tokens[0, -1] == END
    assert (tokens != 0).all()


def test_truncation_keeps_the_end_token(tok):
    tokens = tok.tokenise(["cat " * 99], truncate=True)
    assert tokens[0, 0] == START
    assert tokens[0, -1] == END
    assert np.array_equal(tokens, tok.tokenise(["cat " * 14]))


def test_an_empty_text_is_start_and_end(tok):
    assert tok.tokenise([""])[0, :3].tolist() == [START, END, 0]


@pytest.mark.parametrize("special", ["<end_of_text>", "<START_OF_TEXT>"])
def test_special_tokens_cannot_be_written_by_a_caller(tok, special):
    tokens = tok.tokenise([f"a {special} cat"])[0]
    assert np.count_nonzero(tokens == END) == 1
    assert np.count_nonzero(tokens == START) == 1


# Unbounded, one word of 60,000 letters takes minutes; bounded, all of it takes a part of a second.
@pytest.mark.timeout(PATIENCE_S)
def test_a_hostile_text_takes_no_time(tok):
    tok.tokenise(["x" * 60_000, "xyzzy" * 12_000, "a" * 5_000 + " b" * 20_000], truncate=True)


def test_without_truncation_a_very_long_text_is_refused_unread(tok):
    with pytest.raises(TextTooLong, match="characters"):
        tok.tokenise(["cat " * 5_000])


def test_the_memory_of_words_is_bounded(monkeypatch):
    monkeypatch.setattr(texts_module, "MAX_REMEMBERED_WORDS", 100)
    tok = tokeniser()
    for i in range(500):
        tok.tokenise([f"word{i} strange{i}x"], truncate=True)
    assert len(tok._tokenizer.cache) <= 110
    assert np.array_equal(tok.tokenise(["a cat"]), TOK.tokenise(["a cat"]))
