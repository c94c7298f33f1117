"""The demonstration's report: one page and its pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from audits import Bias
from matplotlib import pyplot as plt
from monofacet import (
    FeatureCard,
    FeatureDetail,
    FilterResult,
    ModalityClassification,
    ModalityLabel,
    ModalityTable,
    Model,
    SteeringPreview,
)
from pictures import Steering, draw_sheet, draw_steering
from PIL import Image
from samples import Sample

matplotlib.use("Agg")

COLOURS = {
    ModalityLabel.IMAGE: "#d1495b",
    ModalityLabel.TEXT: "#2e86ab",
    ModalityLabel.CROSS: "#6a994e",
    ModalityLabel.UNRESOLVED: "#b8b8b8",
    ModalityLabel.DEAD: "#555555",
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
    filtered: FilterResult
    preview: SteeringPreview
    generated: list[Image.Image] | None
    steered: Steering | None
    health: str


def _picture(data: bytes, size: int = 96) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((size, size)))


def draw_mds(features: Features, path: Path) -> None:
    """Draw the histogram of the energy MDS of every dictionary, stacked by label."""
    names = list(features.tables)
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        cards = [c for c in features.tables[name] if c.mds_energy is not None]
        groups = [[c.mds_energy for c in cards if c.label is label] for label in COLOURS]
        axis.hist(
            groups,
            bins=np.linspace(0, 1, BINS + 1),
            stacked=True,
            color=list(COLOURS.values()),
            label=list(COLOURS),
        )
        axis.set_title(name + (" (default)" if name == features.default else ""), fontsize=10)
        axis.set_xlabel("energy MDS (0 text, 1 image)")
    axes[0][0].set_ylabel("features")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(COLOURS), loc="upper center", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_retrieval(retrieved: list[Retrieved], path: Path, columns: int = 6) -> None:
    """Draw each picture with its three nearest captions, the right one in green."""
    rows = -(-len(retrieved) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.5 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, retrieved, strict=False):
        axis.imshow(_picture(row.sample.data))
        for line, (caption, cosine) in enumerate(row.nearest):
            right = caption == row.sample.caption
            axis.text(
                0.5, -0.06 - 0.13 * line, f"{_short(caption)} {cosine:.2f}", transform=axis.transAxes,
                ha="center", va="top", fontsize=7.5, color="#2f6b2f" if right else "#777777",
                fontweight="bold" if right else "normal",
            )  # fmt: skip
    figure.subplots_adjust(left=0.01, right=0.99, top=0.98, bottom=0.09, hspace=0.6, wspace=0.1)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_cards(details: list[FeatureDetail], path: Path, columns: int = 5) -> None:
    """Draw feature cards: a line each, its label, name and interval, its top pictures and texts."""
    figure, axes = plt.subplots(len(details), columns + 2, figsize=(11.5, 1.35 * len(details)), squeeze=False)
    for line, detail in zip(axes, details, strict=True):
        for axis in line:
            axis.axis("off")
        card = detail.card
        title = _short(card.name or f"feature {card.feature}", 17)
        line[0].text(0, 0.72, title, fontsize=10, fontweight="bold")
        line[0].text(0, 0.42, card.label.value, fontsize=9, color=COLOURS[card.label])
        line[0].text(0, 0.12, _interval(card), fontsize=8, color="#555555")
        for axis, example in zip(line[1 : columns + 1], detail.images, strict=False):
            if example.image is not None:
                axis.imshow(example.image)
        for i, caption in enumerate(detail.texts[:5]):
            line[-1].text(0, 0.85 - 0.2 * i, _short(caption.text, 34), fontsize=8)
    figure.subplots_adjust(left=0.01, right=0.9, top=0.99, bottom=0.01, hspace=0.15, wspace=0.08)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_bias(bias: Bias, path: Path) -> None:
    """Draw P(woman) of each profession before and after the ablation."""
    rows = sorted(bias.professions.items(), key=lambda row: row[1].before.p_woman_calibrated)
    figure, axis = plt.subplots(figsize=(7, 0.28 * len(rows) + 1))
    for y, (_, row) in enumerate(rows):
        before = row.before.p_woman_calibrated
        after = row.after.p_woman_calibrated if row.after else before
        axis.plot([before, after], [y, y], color="#bbbbbb", zorder=1)
        axis.scatter([before], [y], color="#d1495b", label="before" if y == 0 else None, zorder=2)
        axis.scatter([after], [y], color="#2e86ab", label="after" if y == 0 else None, zorder=2)
    axis.axvline(0.5, color="#555555", lw=0.8, ls="--")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axis.set_xlim(0, 1)
    axis.set_xlabel("P(woman) of the text")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _interval(card: FeatureCard) -> str:
    if card.mds_energy is None or card.mds_energy_low is None or card.mds_energy_high is None:
        return "MDS undefined"
    return f"MDS {card.mds_energy:.2f} [{card.mds_energy_low:.2f}, {card.mds_energy_high:.2f}]"


def _short(text: str, limit: int = 26) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def write(folder: Path, demo: Demo, *, seconds: float) -> Path:
    """Write the pictures and the page into a folder and return the page's path.

    Parameters
    ----------
    folder : Path
        There already.
    demo : Demo
        What was seen.
    seconds : float
        From the service's start to its last answer.
    """
    draw_mds(demo.features, folder / "mds.png")
    draw_retrieval(demo.retrieved, folder / "retrieval.png")
    draw_cards(demo.features.details, folder / "cards.png")
    draw_bias(demo.bias, folder / "bias.png")
    if demo.generated is not None:
        draw_sheet(demo.generated, folder / "generated.png")
    if demo.steered is not None:
        draw_steering(demo.steered, folder / "steered.png")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    shares = {
        name: {label: sum(c.label is label for c in cards) / len(cards) for label in ModalityLabel}
        for name, cards in demo.features.tables.items()
    }
    page = environment.get_template("report.html.j2").render(
        demo=demo, seconds=seconds, shares=shares, labels=list(ModalityLabel)
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
