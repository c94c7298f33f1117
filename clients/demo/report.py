"""The demonstration's report: one page with its pictures inside."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from audits import Bias, Screened
from monofacet import (
    AuditVerdict,
    Change,
    FeatureCard,
    FeatureDetail,
    ModalityClassification,
    ModalityLabel,
    ModalityTable,
    Model,
    SteeringPreview,
)
from pictures import PROMPTS, SEED, STEERED, RoundTrip, Steered
from PIL import Image
from samples import Sample

# What a verdict means, after the word itself; see docs/bias.md.
VERDICTS = {
    AuditVerdict.EFFECT: "removing these features made the model know less of gender.",
    AuditVerdict.SILENCED: "the score no longer tells the genders, but a classifier trained anew still does.",
    AuditVerdict.THRESHOLD_ONLY: "scores moved, but what they say about the genders did not.",
    AuditVerdict.NOT_SPECIFIC: "removing as many random features did as much.",
    AuditVerdict.NO_EFFECT: "nothing that counts changed.",
}
BINS = 24


@dataclass(frozen=True)
class Retrieved:
    """A picture and its nearest captions with their cosines, nearest first."""

    sample: Sample
    nearest: list[tuple[str, float]]

    @property
    def right(self) -> bool:
        """Whether the nearest caption is the picture's own."""
        return self.nearest[0][0] == self.sample.caption


@dataclass(frozen=True)
class Classified:
    """What a picture and its caption are made of."""

    sample: Sample
    picture: ModalityClassification
    text: ModalityClassification


@dataclass(frozen=True)
class Features:
    """The features of all dictionaries, and some of the default one in detail."""

    default: str
    tables: dict[str, list[FeatureCard]]
    details: list[FeatureDetail]


@dataclass(frozen=True)
class Demo:
    """Everything that the demonstration saw."""

    model: Model
    retrieved: list[Retrieved]
    classified: list[Classified]
    features: Features
    scored: ModalityTable
    refused: int
    bias: Bias
    screened: Screened
    preview: SteeringPreview
    generated: list[Image.Image] | None
    steered: list[Steered]
    round_trip: RoundTrip | None
    health: str

    @property
    def clean_small(self) -> Image.Image:
        """The sample that was attacked, at the size at which it was."""
        assert self.screened.attacked is not None
        attacked = self.screened.attacked[0]
        size = Image.open(io.BytesIO(attacked.data)).size
        return (
            Image.open(io.BytesIO(attacked.sample.data)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        )

    @property
    def difference(self) -> Image.Image:
        """What the attack changed, 16 times stronger, on grey."""
        assert self.screened.attacked is not None
        after = np.asarray(Image.open(io.BytesIO(self.screened.attacked[0].data)).convert("RGB"), np.float32)
        moved = after - np.asarray(self.clean_small, np.float32)
        return Image.fromarray(np.clip(128 + 16 * moved, 0, 255).astype(np.uint8))


def data_uri(picture: bytes | Image.Image) -> str:
    """Return a picture as the page holds it, so that the page is one file."""
    if not isinstance(picture, bytes):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        picture = buffer.getvalue()
    kind = (Image.open(io.BytesIO(picture)).format or "PNG").lower()
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def histogram(cards: list[FeatureCard]) -> list[dict[ModalityLabel, int]]:
    """Count the features in each bin of the energy MDS, by label."""
    bins = [dict.fromkeys(ModalityLabel, 0) for _ in range(BINS)]
    for card in cards:
        if card.mds_energy is not None:
            bins[min(int(card.mds_energy * BINS), BINS - 1)][card.label] += 1
    return bins


def professions(bias: Bias) -> list[tuple[str, float, float]]:
    """Return each profession with P(woman) before and after the ablation, by what it was before."""
    rows = [
        (name, row.before.p_woman_calibrated, (row.after or row.before).p_woman_calibrated)
        for name, row in bias.professions.items()
    ]
    return sorted(rows, key=lambda row: row[1])


def _change(change: Change) -> str:
    parts = [
        f"{part.value:.2f}" if part.value is not None else "unknown" for part in (change.before, change.after)
    ]
    return f"from {parts[0]} to {parts[1]}"


def write(folder: Path, demo: Demo, *, seconds: float) -> Path:
    """Write the page into a folder and return its path.

    Parameters
    ----------
    folder : Path
        There already.
    demo : Demo
        What was seen.
    seconds : float
        From the service's start to its last answer.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    histograms = {name: histogram(cards) for name, cards in demo.features.tables.items()}
    shares = {
        name: {label: sum(c.label is label for c in cards) / len(cards) for label in ModalityLabel}
        for name, cards in demo.features.tables.items()
    }
    page = environment.get_template("report.html.j2").render(
        demo=demo,
        seconds=seconds,
        shares=shares,
        labels=list(ModalityLabel),
        histograms=histograms,
        peaks={name: max(1, *(sum(counts.values()) for counts in bins)) for name, bins in histograms.items()},
        professions=professions(demo.bias),
        change=_change,
        verdicts={verdict.value: text for verdict, text in VERDICTS.items()},
        captions=len({row.sample.caption for row in demo.retrieved}),
        steered_prompt=STEERED,
        data_uri=data_uri,
        prompts=PROMPTS,
        seed=SEED,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
