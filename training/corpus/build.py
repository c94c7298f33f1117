"""Build the corpus: one parquet of captions and attributes, one array of pixels a style.

Run ``python -m training.corpus.build`` after ``npm ci`` in this folder. Everything is derived from the pinned
packages and the seed, so that two builds give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.corpus.names import (
    Canon,
    JoinedNames,
    Name,
    describe,
    icon_caption,
    lengthen_tone,
)
from training.corpus.sets import ALL_SETS, EMOJI_SETS, ICON_SETS, IconSet, Role
from training.corpus.svg import Style, document, rasterise

DEFAULT_DIR = Path("work/corpus")
VALIDATION_SHARE = 0.05
# Widths of an added line, share of the drawing's width: from a fine pen to a felt tip.
STROKES = (0.012, 0.035)


def _visible(icon_set: IconSet) -> list[str]:
    return [slug for slug, icon in icon_set.read("icons")["icons"].items() if not icon.get("hidden")]


def build_canon() -> Canon:
    """Collect CLDR's slugs by code point, and the other names that training sets give them.

    Only training sets are read: the test artist's words must not shape the captions.
    """
    by_name = {s.name: s for s in EMOJI_SETS}
    by_codepoints = {**by_name["twemoji"].read("chars"), **by_name["noto"].read("chars")}
    slugs = frozenset(by_codepoints.values())
    aliases: dict[str, str] = {}
    for name in ("noto", "twemoji", "noto-v1", "emojione"):
        for alias, entry in by_name[name].read("icons").get("aliases", {}).items():
            parent = entry["parent"]
            if set(entry) == {"parent"} and parent in slugs and alias not in slugs:
                aliases.setdefault(alias, parent)
            elif set(entry) == {"parent"} and alias in slugs and parent not in slugs:
                aliases.setdefault(parent, alias)
    return Canon(slugs, by_codepoints, aliases)


def canonical_slugs(icon_set: IconSet, canon: Canon) -> dict[str, str]:
    """Return the canonical slug of every visible drawing of an emoji set."""
    names = _visible(icon_set)
    if icon_set.name == "fxemoji":
        joined = JoinedNames(canon, (slug for icons in ICON_SETS for slug in _visible(icons)))
        return {name: joined.slug(name) for name in names}
    # Both fluent sets name their drawings alike, but only the flat one lists code points.
    chars_of = (
        next(s for s in EMOJI_SETS if s.name == "fluent-emoji-flat")
        if icon_set.family == "fluent-emoji"
        else icon_set
    )
    chars = chars_of.read("chars")
    by_name = {name: canon.by_codepoints[cp] for cp, name in chars.items() if cp in canon.by_codepoints}
    siblings = frozenset(names)
    return {name: by_name.get(name) or canon.slug(lengthen_tone(name, siblings)) for name in names}


def _categories(canon: Canon) -> dict[str, str]:
    """Return the CLDR category of every canonical slug that a training set lists one for."""
    categories: dict[str, str] = {}
    for icon_set in EMOJI_SETS:
        if icon_set.name in {"noto", "twemoji"}:
            for category, names in icon_set.read("metadata").get("categories", {}).items():
                for name in names:
                    categories.setdefault(canon.slug(name), category)
    return categories


def describe_corpus() -> list[dict[str, object]]:
    """Return one row a drawing: set, family, role, name, caption, concept, attributes, category."""
    canon = build_canon()
    categories = _categories(canon)
    rows: list[dict[str, object]] = []
    for icon_set in ALL_SETS:
        if icon_set.role is Role.AUXILIARY:
            parsed = {
                slug: Name(icon_caption(slug), icon_caption(slug), "", "", "") for slug in _visible(icon_set)
            }
            slugs = dict.fromkeys(parsed, "")
        else:
            slugs = canonical_slugs(icon_set, canon)
            parsed = {name: describe(slug) for name, slug in slugs.items()}
        for name, said in parsed.items():
            rows.append(
                {
                    "set": icon_set.name,
                    "family": icon_set.family,
                    "role": icon_set.role.value,
                    "name": name,
                    "slug": slugs[name],
                    "caption": said.caption,
                    "concept": said.concept,
                    "gender": said.gender,
                    "profession": said.profession,
                    "tone": said.tone,
                    "category": categories.get(slugs[name], ""),
                }
            )
    return rows


def assign_splits(rows: list[dict[str, object]], share: float = VALIDATION_SHARE) -> None:
    """Hold out a share of the (concept, set) pairs of the training sets, in place.

    A pair is held out with all its skin tones, and only when another set goes on drawing the concept, so that
    validation asks for a seen concept by a seen artist in an unseen drawing. The choice is a hash of a pair:
    other rows that come or go do not change it. ``sibling`` marks a held-out drawing whose family (the flat
    and the shaded version of one picture) was trained on.
    """
    trained = [r for r in rows if r["role"] == Role.TRAIN.value]
    drawn_by: dict[object, list[str]] = {}
    for concept, set_name in sorted({(str(r["concept"]), str(r["set"])) for r in trained}):
        drawn_by.setdefault(concept, []).append(set_name)
    held_out = set()
    for concept, set_names in drawn_by.items():
        ranked = sorted(
            (int(hashlib.sha256(f"{concept}|{s}".encode()).hexdigest()[:8], 16), s) for s in set_names
        )
        chosen = [s for value, s in ranked if value / 0xFFFFFFFF < share]
        held_out.update((concept, s) for s in chosen[: len(set_names) - 1])
    kept_families = {(r["concept"], r["family"]) for r in trained if (r["concept"], r["set"]) not in held_out}
    for row in rows:
        is_held_out = row["role"] == Role.TRAIN.value and (row["concept"], row["set"]) in held_out
        row["split"] = "validation" if is_held_out else row["role"]
        row["sibling"] = is_held_out and (row["concept"], row["family"]) in kept_families


def _render(job: tuple[str, list[str], int, Style, int]) -> np.ndarray:
    set_name, names, size, style, seed = job
    icons = next(s for s in ALL_SETS if s.name == set_name).read("icons")
    rng = np.random.default_rng(seed)
    pixels = np.empty((len(names), size, size, 3), dtype=np.uint8)
    for i, name in enumerate(names):
        svg = document(icons["icons"][name], icons, style, stroke=float(rng.uniform(*STROKES)))
        pixels[i] = rasterise(svg, size)
    return pixels


def render(rows: list[dict[str, object]], size: int, style: Style, seed: int, workers: int) -> np.ndarray:
    """Rasterise rows, in order.

    Returns
    -------
    np.ndarray
        RGB, uint8 [len(rows), size, size, 3].
    """
    jobs = []
    for start in range(0, len(rows), 256):
        chunk = rows[start : start + 256]
        for set_name in dict.fromkeys(str(r["set"]) for r in chunk):
            names = [str(r["name"]) for r in chunk if r["set"] == set_name]
            jobs.append((set_name, names, size, style, seed + len(jobs)))
    with ProcessPoolExecutor(workers) as pool:
        parts = []
        for done, part in enumerate(pool.map(_render, jobs), start=1):
            parts.append(part)
            print(f"\r{style.value}: {done}/{len(jobs)} chunks", end="", flush=True)
    print()
    return np.concatenate(parts)


def main() -> None:
    """Build the corpus into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--size", type=int, default=64, help="side of a picture, pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the line widths")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    rows = describe_corpus()
    assign_splits(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    np.save(
        arguments.out / "plain.npy",
        render(rows, arguments.size, Style.PLAIN, arguments.seed, arguments.workers),
    )
    # Only drawings that are trained on are redrawn; validation and test are seen as their artists drew them.
    redrawn = [i for i, r in enumerate(rows) if r["split"] == "train"]
    for row in rows:
        row["restyled"] = -1
    for position, i in enumerate(redrawn):
        rows[i]["restyled"] = position
    for style in (Style.OUTLINED, Style.LINES):
        pixels = render([rows[i] for i in redrawn], arguments.size, style, arguments.seed, arguments.workers)
        np.save(arguments.out / f"{style.value}.npy", pixels)
    pq.write_table(pa.Table.from_pylist(rows), arguments.out / "corpus.parquet")
    print(f"{len(rows)} drawings in {arguments.out}")


if __name__ == "__main__":
    main()
