"""Splits and restyling of the corpus, on rows and documents made here: no npm package is needed."""

from __future__ import annotations

from training.corpus.build import assign_splits
from training.corpus.svg import Style, document, rasterise

BLUE_SQUARE = {"body": '<rect x="4" y="4" width="8" height="8" fill="#00f"/>'}
DEFAULTS = {"width": 16, "height": 16}


def _rows(concepts=200, sets=("noto", "noto-v1", "twemoji")):
    families = {"noto-v1": "noto"}
    return [
        {
            "set": s,
            "family": families.get(s, s),
            "role": "train",
            "concept": f"concept {c}",
            "caption": f"concept {c}",
        }
        for c in range(concepts)
        for s in sets
    ]


def test_held_out_concepts_are_still_drawn_by_others():
    rows = _rows()
    assign_splits(rows, share=0.4)
    held = [r for r in rows if r["split"] == "validation"]
    trained = {r["concept"] for r in rows if r["split"] == "train"}
    assert held
    assert {r["concept"] for r in held} <= trained


def test_the_split_of_a_pair_does_not_depend_on_other_rows():
    few, many = _rows(50), _rows(400)
    assign_splits(few)
    assign_splits(many)
    by_pair = {(r["concept"], r["set"]): r["split"] for r in many}
    assert all(by_pair[r["concept"], r["set"]] == r["split"] for r in few)


def test_a_sibling_is_a_held_out_drawing_whose_family_was_trained_on():
    rows = _rows()
    assign_splits(rows, share=0.4)
    trained = {(r["concept"], r["family"]) for r in rows if r["split"] == "train"}
    for row in rows:
        expected = row["split"] == "validation" and (row["concept"], row["family"]) in trained
        assert row["sibling"] == expected


def test_test_and_auxiliary_rows_are_never_trained_on_as_emoji():
    rows = [{"set": "openmoji", "family": "openmoji", "role": "test", "concept": "x", "caption": "x"}]
    assign_splits(rows)
    assert rows[0]["split"] == "test"


def test_styles_draw_the_fill_an_outline_or_lines_only():
    plain, outlined, lines = (rasterise(document(BLUE_SQUARE, DEFAULTS, s, 0.1), 32) for s in Style)
    assert plain[16, 16].tolist() == outlined[16, 16].tolist() == [0, 0, 255]
    assert lines[16, 16].tolist() == [255, 255, 255]
    assert plain[16, 8].tolist() == [0, 0, 255]
    assert outlined[16, 8].tolist() == lines[16, 8].tolist() == [0, 0, 0]
    assert plain[1, 1].tolist() == [255, 255, 255]


def test_a_wide_drawing_is_centred_on_white():
    wide = rasterise(document({"body": BLUE_SQUARE["body"], "width": 32, "height": 16}, DEFAULTS), 32)
    assert wide.shape == (32, 32, 3)
    assert (wide[:8] == 255).all()
    assert (wide[-8:] == 255).all()
