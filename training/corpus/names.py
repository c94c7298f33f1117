"""Names of drawings, parsed to captions and attributes.

Every artist names the same concept in their own way: CLDR's words (``man-firefighter-medium-skin-tone``),
CLDR's words with short tones (``man-firefighter-medium``), older words (``bear-face``), or words run together
(``blacktouchtonetelephone``). The captions of all artists must agree where the concept agrees, since the
towers and the retrieval figures count two drawings as one concept only then.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

MALE = frozenset({"man", "men", "boy", "prince", "merman", "mermen", "father", "grandfather", "guardsman"})
FEMALE = frozenset({"woman", "women", "girl", "princess", "mermaid", "mother", "grandmother", "bride"})

COUNTERPARTS = {
    **{"man": "woman", "men": "women", "boy": "girl", "prince": "princess", "merman": "mermaid"},
    **{"woman": "man", "women": "men", "girl": "boy", "princess": "prince", "mermaid": "merman"},
}

# CLDR's "person-role" and "person-activity" names that are occupations, all drawn as man, woman and person.
PROFESSIONS = frozenset(
    [
        "health worker",
        "student",
        "teacher",
        "judge",
        "farmer",
        "cook",
        "mechanic",
        "factory worker",
        "office worker",
        "scientist",
        "technologist",
        "singer",
        "artist",
        "pilot",
        "astronaut",
        "firefighter",
        "police officer",
        "detective",
        "guard",
        "ninja",
        "construction worker",
    ]
)

# How a line-art set marks the weight of a drawing; the words are about the pen, not about the subject.
ICON_STYLE_WORDS = frozenset(
    [
        "outline",
        "outlined",
        "filled",
        "fill",
        "bold",
        "duotone",
        "light",
        "thin",
        "linear",
        "broken",
        "line",
        "sharp",
        "rounded",
        "round",
        "negative",
        "solid",
        "variant",
        "alt",
        "24px",
        "14px",
        "x14",
        "x24",
        "one",
        "two",
    ]
)


@dataclass(frozen=True)
class Name:
    """A parsed name.

    Parameters
    ----------
    caption : str
        What the drawing shows, in plain words, with its skin tone: ``man firefighter medium skin tone``.
    concept : str
        The caption without skin tone.
    gender : str
        ``man``, ``woman``, or empty where the name says neither or both.
    profession : str
        One of `PROFESSIONS`, or empty.
    tone : str
        One of `TONES`, or empty; two tones (couples, handshakes) are joined by ``+``.
    """

    caption: str
    concept: str
    gender: str
    profession: str
    tone: str


_TONE_ALTERNATION = "|".join(sorted(TONES, key=len, reverse=True))
_TONE_PATTERN = re.compile(rf"-({_TONE_ALTERNATION})-skin-tone(?=-|$)")


def split_tone(slug: str) -> tuple[str, str]:
    """Split CLDR's skin tones off a slug.

    Returns
    -------
    tuple[str, str]
        The slug without tones, and the tones joined by ``+`` (empty when there is none).
    """
    tones = _TONE_PATTERN.findall(slug)
    return _TONE_PATTERN.sub("", slug), "+".join(tones)


_PEOPLE = "man|woman|person|men|women|people|adult|boy|girl|child"
_LOOKS = re.compile(rf"\b({_PEOPLE}) ((?:red|white|blond|curly) hair|beard)\b")
_MEMBERS = re.compile(rf"^(kiss|couple with heart|family)((?: (?:{_PEOPLE}))+)\b")


def spoken(caption: str) -> str:
    """Return a caption as one would say it, with the punctuation that CLDR's names had and file names lose.

    "woman red hair dark skin tone" is "woman with red hair, dark skin tone", "kiss woman man" is "kiss: woman, man",
    and "flag latvia" is "flag of latvia".
    """
    said = re.sub(r" ((?:medium )?(?:light|dark)|medium) skin tone", r", \1 skin tone", caption)
    said = _LOOKS.sub(r"\1 with \2", said)
    said = _MEMBERS.sub(lambda found: f"{found[1]}: {', '.join(found[2].split())}", said)
    return re.sub(r"^flag (?!of |in |on |for |with )(?=\w)", "flag of ", said)


def gender_of(words: Iterable[str]) -> str:
    """Return ``man`` or ``woman`` when exactly one of the two is named, else an empty string."""
    words = set(words)
    male, female = bool(words & MALE), bool(words & FEMALE)
    if male == female:
        return ""
    return "man" if male else "woman"


def counterpart(caption: str) -> str:
    """Return the caption of the other gender, or an empty string when the caption names no gender, or both."""
    words = caption.split()
    if not gender_of(words):
        return ""
    return " ".join(COUNTERPARTS.get(word, word) for word in words)


def profession_of(words: list[str]) -> str:
    """Return the profession that the words name, with or without a gender before it, else an empty string."""
    rest = " ".join(w for w in words if w not in {"man", "men", "woman", "women", "person"})
    return rest if rest in PROFESSIONS else ""


def describe(slug: str) -> Name:
    """Parse a slug in CLDR's words.

    Parameters
    ----------
    slug : str
        Lower-case words joined by hyphens.

    Returns
    -------
    Name
        Caption and attributes.
    """
    base, tone = split_tone(slug)
    words = base.split("-")
    concept = " ".join(words)
    said = [f"{t.replace('-', ' ')} skin tone" for t in tone.split("+") if t]
    return Name(
        caption=" ".join([concept, *said]),
        concept=concept,
        gender=gender_of(words),
        profession=profession_of(words),
        tone=tone,
    )


def lengthen_tone(slug: str, siblings: frozenset[str] | set[str]) -> str:
    """Write a short tone in CLDR's long form: ``cook-medium`` becomes ``cook-medium-skin-tone``.

    A trailing ``-light`` is a tone only when the same set also draws the slug without it and in
    ``-medium-dark`` (``traffic-light`` is not a tone of traffic).
    """
    for tone in sorted(TONES, key=len, reverse=True):
        base = slug.removesuffix(f"-{tone}")
        if base != slug and base in siblings and f"{base}-medium-dark" in siblings:
            return f"{base}-{tone}-skin-tone"
    return slug


def icon_caption(slug: str) -> str:
    """Return what a line-art icon shows, without the words for its pen."""
    words = [w for w in slug.split("-") if w not in ICON_STYLE_WORDS]
    return " ".join(words) or slug.replace("-", " ")


@dataclass
class Segmenter:
    """Cut words that were run together, by the most probable split under unigram counts.

    Parameters
    ----------
    counts : Mapping[str, int]
        How often each known word occurs.
    """

    counts: Mapping[str, int]
    _total: int = field(init=False)

    def __post_init__(self) -> None:
        self._total = sum(self.counts.values())

    @classmethod
    def from_slugs(cls, slugs: Iterable[str]) -> Segmenter:
        """Count the words of hyphenated slugs; single letters (keycaps) would cut words to bits."""
        return cls(Counter(word for slug in slugs for word in slug.split("-") if len(word) > 1))

    def _cost(self, word: str) -> float:
        if word in self.counts:
            return -math.log(self.counts[word] / self._total)
        # An unknown run costs more the longer it is, so that known words win wherever they fit.
        return math.log(self._total) + 3.0 * len(word)

    def split(self, joined: str) -> list[str]:
        """Return the cheapest split of `joined` into words (Viterbi over end positions)."""
        best: list[tuple[float, list[str]]] = [(0.0, [])]
        for end in range(1, len(joined) + 1):
            best.append(
                min(
                    (
                        (best[start][0] + self._cost(joined[start:end]), [*best[start][1], joined[start:end]])
                        for start in range(max(0, end - 20), end)
                    ),
                    key=lambda option: option[0],
                )
            )
        return best[-1][1]


@dataclass(frozen=True)
class Canon:
    """CLDR's slugs, and every other way that the sets write them.

    Parameters
    ----------
    slugs : frozenset[str]
        The canonical slugs, as the sets that carry code points write them.
    by_codepoints : Mapping[str, str]
        Code-point sequence to canonical slug.
    aliases : Mapping[str, str]
        Other slugs (older or shorter words) to the canonical one.
    """

    slugs: frozenset[str]
    by_codepoints: Mapping[str, str]
    aliases: Mapping[str, str]

    def slug(self, slug: str) -> str:
        """Return the canonical slug, or the slug itself when it is not known."""
        if slug in self.slugs:
            return slug
        if (flag := slug.replace("flag-for-", "flag-", 1)) in self.slugs:
            return flag
        base, tone = split_tone(slug)
        if tone and base in self.aliases:
            return self.aliases[base] + slug[len(base) :]
        return self.aliases.get(slug, slug)


class JoinedNames:
    """The names of a set that runs its words together (fxemoji)."""

    _CLOCK = re.compile(r"^clock(\d+)(oclock|thirty)$")
    _NUMBERS = (
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    )

    def __init__(self, canon: Canon, other_words: Iterable[str] = ()) -> None:
        self._known = {alias.replace("-", ""): slug for alias, slug in canon.aliases.items()}
        self._known.update({slug.replace("-", ""): slug for slug in canon.slugs})
        self._segmenter = Segmenter.from_slugs([*canon.slugs, *canon.aliases, *other_words])

    def slug(self, joined: str) -> str:
        """Return the hyphenated slug of a joined name."""
        if clock := self._CLOCK.match(joined):
            hour = self._NUMBERS[int(clock[1]) - 1]
            return f"{hour}-oclock" if clock[2] == "oclock" else f"{hour}-thirty"
        if joined in self._known:
            return self._known[joined]
        words = self._segmenter.split(joined.replace("-", ""))
        slug = "-".join(words)
        return self._known.get("".join(words), slug)
