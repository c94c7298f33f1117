"""One test for each way that an artist names drawings."""

from __future__ import annotations

import pytest

from training.corpus.names import (
    Canon,
    JoinedNames,
    Segmenter,
    counterpart,
    describe,
    gender_of,
    icon_caption,
    lengthen_tone,
    split_tone,
    spoken,
)

CANON = Canon(
    slugs=frozenset({"telephone", "rabbit-face", "flag-france", "man-cook", "alarm-clock", "eyes", "hand"}),
    by_codepoints={"260e": "telephone"},
    aliases={"bunny-face": "rabbit-face", "man-chef": "man-cook"},
)


@pytest.mark.parametrize(
    ("slug", "caption", "concept", "gender", "profession", "tone"),
    [
        ("woman-firefighter-medium-dark-skin-tone", "woman firefighter medium dark skin tone",
         "woman firefighter", "woman", "firefighter", "medium-dark"),
        ("police-officer", "police officer", "police officer", "", "police officer", ""),
        ("man-health-worker", "man health worker", "man health worker", "man", "health worker", ""),
        ("kiss-woman-man", "kiss woman man", "kiss woman man", "", "", ""),
        ("men-with-bunny-ears", "men with bunny ears", "men with bunny ears", "man", "", ""),
        ("artist-palette", "artist palette", "artist palette", "", "", ""),
        ("handshake-light-skin-tone-dark-skin-tone", "handshake light skin tone dark skin tone",
         "handshake", "", "", "light+dark"),
        ("snowman", "snowman", "snowman", "", "", ""),
    ],
)  # fmt: skip
def test_cldr_names_of_noto_twemoji_and_openmoji(slug, caption, concept, gender, profession, tone):
    said = describe(slug)
    assert (said.caption, said.concept, said.gender, said.profession, said.tone) == (
        caption,
        concept,
        gender,
        profession,
        tone,
    )


def test_fluent_short_tones_become_long_ones_only_beside_their_siblings():
    siblings = {"cook", "cook-light", "cook-medium-light", "cook-medium-dark", "traffic-light", "traffic"}
    assert lengthen_tone("cook-medium-light", siblings) == "cook-medium-light-skin-tone"
    assert lengthen_tone("cook-light", siblings) == "cook-light-skin-tone"
    assert lengthen_tone("traffic-light", siblings) == "traffic-light"


def test_emojione_older_words_and_flags_become_cldr_words():
    assert CANON.slug("bunny-face") == "rabbit-face"
    assert CANON.slug("flag-for-france") == "flag-france"
    assert CANON.slug("telephone") == "telephone"
    assert CANON.slug("unheard-of") == "unheard-of"


def test_noto_v1_aliases_keep_their_tone():
    assert CANON.slug("man-chef-medium-dark-skin-tone") == "man-cook-medium-dark-skin-tone"


def test_fxemoji_joined_words_are_found_or_cut():
    joined = JoinedNames(CANON, other_words=["black-touch", "tone"])
    assert joined.slug("alarmclock") == "alarm-clock"
    assert joined.slug("bunnyface") == "rabbit-face"
    assert joined.slug("blacktouchtonetelephone") == "black-touch-tone-telephone"
    assert joined.slug("clock3oclock") == "three-oclock"
    assert joined.slug("clock12thirty") == "twelve-thirty"


def test_segmenter_prefers_known_words_to_unknown_runs():
    segmenter = Segmenter.from_slugs(["left-hand", "write", "writing", "hand", "ring"])
    assert segmenter.split("leftwritinghand") == ["left", "writing", "hand"]


@pytest.mark.parametrize(
    ("slug", "caption"),
    [
        ("heart-filled", "heart"),
        ("address-book-duotone", "address book"),
        ("headache-outline-24px", "headache"),
        ("a-b-2", "a b 2"),
        ("outline", "outline"),
    ],
)
def test_icon_sets_lose_the_words_for_their_pen(slug, caption):
    assert icon_caption(slug) == caption


def test_both_genders_named_is_no_gender():
    assert gender_of(["woman", "and", "man"]) == ""
    assert gender_of(["mermaid"]) == "woman"


def test_split_tone_leaves_other_words_alone():
    assert split_tone("sun-light-skin-tone-care") == ("sun-care", "light")
    assert split_tone("traffic-light") == ("traffic-light", "")


def test_the_counterpart_names_the_other_gender_and_nothing_else():
    assert counterpart("woman firefighter dark skin tone") == "man firefighter dark skin tone"
    assert counterpart("men wrestling") == "women wrestling"
    assert counterpart("kiss woman man") == counterpart("snowman") == ""


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("woman red hair dark skin tone", "woman with red hair, dark skin tone"),
        ("man beard medium light skin tone", "man with beard, medium light skin tone"),
        ("kiss woman man light skin tone medium dark skin tone",
         "kiss: woman, man, light skin tone, medium dark skin tone"),
        ("family man woman boy", "family: man, woman, boy"),
        ("couple with heart", "couple with heart"),
        ("flag latvia", "flag of latvia"),
        ("flag in hole", "flag in hole"),
        ("man health worker medium skin tone", "man health worker, medium skin tone"),
        ("red heart", "red heart"),
        ("kiss mark", "kiss mark"),
    ],
)  # fmt: skip
def test_captions_are_said_as_people_say_them(caption, said):
    assert spoken(caption) == said
