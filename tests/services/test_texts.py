from __future__ import annotations

import functools

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.encoding import texts as texts_module
from services.encoding.merges import merge
from services.encoding.texts import TextLimits, Tokenizer
from services.errors import TextTooLong
from tests.services.test_images import config as clip_config
from tests.support.waiting import PATIENCE_S

START, END = 49406, 49407


def tokenizer(context_length: int = 16, **limits) -> Tokenizer:
    import dataclasses

    config = dataclasses.replace(clip_config(), model_cfg={"text_cfg": {}}, context_length=context_length)
    return Tokenizer(config, TextLimits(**limits)) if limits else Tokenizer(config)


@functools.cache
def tokenizer_of(limit: int) -> Tokenizer:
    """A tokenizer that reads so far and no further, so that short texts are long ones."""
    made = tokenizer(16)
    made.limits = TextLimits(limit)
    return made


@pytest.fixture(autouse=True)
def _no_further(monkeypatch, request):
    if "wherever" in request.node.name:
        monkeypatch.setattr(texts_module, "FURTHER", 0)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer()


@settings(max_examples=200)
@given(text=st.text(max_size=60))
def test_tokens_are_open_clips(text):
    if "_of_text>" in text.lower():
        return
    ours = TOK.tokenize([text], truncate=True)
    assert np.array_equal(ours, THEIRS([text]).numpy())


TOK = tokenizer()
THEIRS = open_clip.get_tokenizer("ViT-B-32", context_length=16)


def test_a_text_that_does_not_fit_is_refused_and_named(tok):
    with pytest.raises(TextTooLong) as caught:
        tok.tokenize(["a cat", "cat " * 15, "a dog", "dog " * 99])
    assert [path for path, *_ in caught.value.violations] == ["texts[1]", "texts[3]"]
    assert caught.value.reason == "TEXT_TOO_LONG"


def test_a_text_that_just_fits_is_taken(tok):
    tokens = tok.tokenize(["cat " * 14])
    assert tokens[0, -1] == END
    assert (tokens != 0).all()


def test_truncation_keeps_the_end_token(tok):
    tokens = tok.tokenize(["cat " * 99], truncate=True)
    assert tokens[0, 0] == START
    assert tokens[0, -1] == END
    assert np.array_equal(tokens, tok.tokenize(["cat " * 14]))


def test_an_empty_text_is_start_and_end(tok):
    assert tok.tokenize([""])[0, :3].tolist() == [START, END, 0]


@pytest.mark.parametrize("special", ["<end_of_text>", "<START_OF_TEXT>"])
def test_special_tokens_cannot_be_written_by_a_caller(tok, special):
    tokens = tok.tokenize([f"a {special} cat"])[0]
    assert np.count_nonzero(tokens == END) == 1
    assert np.count_nonzero(tokens == START) == 1


WORDS = st.lists(
    st.one_of(
        # Few letters, so that one pair occurs often and beside itself.
        st.text("ab", max_size=60),
        st.text("aeinost", max_size=60),
        st.text("!-.=", max_size=60),
        st.sampled_from(["😂", "❤️", "中", "é", "wow", "the", "ing", "ß"]).flatmap(
            lambda part: st.integers(1, 40).map(lambda times: part * times)
        ),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(word=WORDS)
def test_a_word_of_any_length_is_merged_as_open_clip_merges_it(word):
    tokenizer = THEIRS
    symbols = [tokenizer.byte_encoder[byte] for byte in word.encode()]
    if symbols:
        theirs = tokenizer.bpe("".join(symbols)).split(" ")
        assert merge([*symbols[:-1], symbols[-1] + "</w>"], tokenizer.bpe_ranks) == theirs


def test_a_pair_made_by_a_merge_waits_until_all_occurrences_are_merged():
    # "b c" is learned last, after what "abc" merges with: taken one by one, the second "a" would go to the first "abc".
    ranks = {("ab", "c"): 0, ("abc", "a"): 1, ("b", "c"): 2, ("a", "bc"): 3}
    assert merge(list("abcabc"), ranks) == ["abc", "abc"]
    assert merge(["a", "bc", "a"], ranks) == ["abca"]


@pytest.mark.parametrize(
    "text",
    ["-" * 250, "=" * 300, "wow" + "!" * 250, "https://example.com/" + "a" * 240, "red" * 80, "😂" * 220,
     "a" * 3_000, "xyzzy" * 500, "-" * 250 + " a red heart", "Donaudampfschifffahrtsgesellschaft" * 20],
)  # fmt: skip
def test_long_words_get_open_clips_tokens(text):
    assert np.array_equal(LONG.tokenize([text], truncate=True), THEIRS([text], context_length=77).numpy())


LONG = tokenizer(77)
PIECES = st.sampled_from(
    ["a red heart ", "don't! ", "cafÃ© ", "â€œquotedâ€\x9d ", "&amp;amp; ", "&#128512;", "<b>",
     "中文，", "naïve — ", "\n",
     "\t\t", "\u200b", "e\u0301", "😂👨‍👩‍👧", "=" * 70, "\x1b[0m", "\u00a0", "İ", "ΟΔΟΣ ", "…", "ﬁ", "1234 "]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(PIECES, min_size=20, max_size=60), limit=st.integers(150, 900))
def test_a_text_is_cut_where_open_clip_cuts_it_wherever_the_reading_stops(pieces, limit):
    text = ("".join(pieces) + "and so on ") * 12
    try:
        ours = tokenizer_of(limit).tokenize([text], truncate=True)
    except TextTooLong:
        # Less than the context lies in what is read, which is refused and never answered otherwise.
        assert len(text) > limit
        return
    assert np.array_equal(ours, THEIRS([text], context_length=16).numpy())


def test_a_document_is_cut_as_open_clip_cuts_it():
    lines = [
        "A red heart on a white ground; the artist's own drawing.",
        "",
        "Çok güzel — naïve café.",
    ] * 3_000
    for text in ("\n".join(lines), " ".join(lines), " \n" * 50_000 + "a red heart", "紅い心，" * 20_000):
        theirs = THEIRS([text], context_length=77).numpy()
        assert np.array_equal(LONG.tokenize([text], truncate=True), theirs)


@pytest.mark.parametrize("text", ["x" * 60_000, "\x01\n" * 30_000])
def test_what_does_not_fill_the_context_within_reach_is_refused(text):
    with pytest.raises(TextTooLong, match="do not fill the context"):
        LONG.tokenize([text], truncate=True)


# In the square of a word's length these would take minutes; they take a part of a second.
@pytest.mark.timeout(PATIENCE_S)
def test_a_hostile_text_takes_no_time():
    words = [
        "x" * 16_000,
        "xyzzy" * 3_000,
        "\U00011000" * 8_000,
        "a" * 5_000 + " b" * 20_000,
        "e" + "\u0301\u0316" * 4_000,
    ]
    LONG.tokenize(words, truncate=True)


def test_without_truncation_a_very_long_text_is_refused_unread(tok):
    with pytest.raises(TextTooLong, match="characters"):
        tok.tokenize(["cat " * 5_000])


def test_the_memory_of_words_is_bounded(monkeypatch):
    monkeypatch.setattr(texts_module, "MAX_REMEMBERED_WORDS", 100)
    tok = tokenizer()
    for i in range(500):
        tok.tokenize([f"word{i} strange{i}x {'long' * i}"], truncate=True)
    assert len(tok._remembered) <= 100
    assert max(map(len, tok._remembered)) <= texts_module.MAX_REMEMBERED_BYTES
    assert np.array_equal(tok.tokenize(["a cat"]), TOK.tokenize(["a cat"]))
