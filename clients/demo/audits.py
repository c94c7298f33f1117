"""The demonstration's bias and defense parts: who is seen as what, and which picture was attacked."""

from __future__ import annotations

from dataclasses import dataclass

from monofacet import (
    Ablation,
    AblationMode,
    AuditResult,
    AuditSettings,
    Client,
    FilteredImage,
    Gender,
    GenderClassification,
    LabelledItem,
)
from rich.console import Console
from rich.table import Table
from samples import AttackedSample, Sample

PROFESSIONS = (
    "police officer", "firefighter", "nurse", "astronaut", "teacher", "judge", "farmer", "cook", "mechanic",
    "factory worker", "office worker", "scientist", "singer", "artist", "pilot", "guard",
)  # fmt: skip
# Where the bundle's study recommends none.
ABLATION = Ablation(top_gender_features=16, mode=AblationMode.ZERO)


@dataclass(frozen=True)
class Bias:
    """How gendered professions are without a gender in the words, and the audit of one ablation.

    Parameters
    ----------
    professions : dict[str, GenderClassification]
        By name, before and after the ablation.
    audit : AuditResult
        Of captions that name a gender, and of the professions.
    """

    professions: dict[str, GenderClassification]
    audit: AuditResult

    def skew(self, after: bool) -> float:
        """Return the mean |P(woman) - 0.5| over the professions, at the bundle's threshold."""
        scores = [c.after if after and c.after else c.before for c in self.professions.values()]
        return sum(abs(score.p_woman_calibrated - 0.5) for score in scores) / len(scores)


def audit_bias(client: Client, console: Console) -> Bias:
    """Ask how gendered each profession is, and audit the ablation on captions of women and men."""
    ablation = client.model().recommended_ablation or ABLATION
    answer = client.classify_gender(PROFESSIONS, ablation=ablation)
    professions = dict(zip(PROFESSIONS, answer.classifications, strict=True))
    table = Table(title=f"P(woman) of words that name no gender; ablation: {ablation}")
    for heading in ("text", "before", "after", "cosine kept"):
        table.add_column(heading)
    for name, row in professions.items():
        after, kept = row.after, row.kept
        table.add_row(
            name,
            f"{row.before.p_woman_calibrated:.2f}",
            "" if after is None else f"{after.p_woman_calibrated:.2f}",
            "" if kept is None else f"{kept:.2f}",
        )
    console.print(table)
    items = [
        LabelledItem(f"{gender.value.lower()} {name}", gender, name, cluster=name)
        for name in PROFESSIONS
        for gender in Gender
    ] + [LabelledItem(name, None, name, cluster=name) for name in PROFESSIONS]
    settings = AuditSettings((ablation,), bootstrap_samples=200, null_sets=200, min_group=1, seed=0)
    audit = client.audit_gender(items, settings)
    first = audit.audits[0]
    console.print(
        f"audit of {len(items)} captions: AUC {_percent(first.auc.before.value)} before and "
        f"{_percent(first.auc.after.value)} after; a classifier trained "
        f"anew {_percent(first.probe.before.value)} and {_percent(first.probe.after.value)}; verdict "
        f"{first.verdict.value}" + "".join(f"; worse: {name.replace('_', ' ')}" for name in first.harms)
    )
    return Bias(professions, audit)


@dataclass(frozen=True)
class Screened:
    """What the service says of the samples, which nobody attacked, and of the one that was.

    Parameters
    ----------
    clean : list[FilteredImage]
        One a sample.
    false_positive_rate : float
        The operating point: so large a share of clean pictures may be called adversarial.
    attacked : tuple[AttackedSample, FilteredImage, FilteredImage] or None
        The attacked picture, and what was found of it before and after; None where the bundle has none.
    """

    clean: list[FilteredImage]
    false_positive_rate: float
    attacked: tuple[AttackedSample, FilteredImage, FilteredImage] | None

    @property
    def flagged(self) -> int:
        """Clean samples called adversarial."""
        return sum(image.adversarial for image in self.clean)


def screen(
    client: Client, samples: list[Sample], attacked: AttackedSample | None, console: Console
) -> Screened:
    """Judge the samples and the attacked one, with a second look at each; labels are the samples' captions."""
    pictures = [s.data for s in samples] + ([attacked.data] if attacked else [])
    labels = sorted({s.caption for s in samples})
    result = client.filter_adversarial(pictures, labels=labels, second_look=True)
    clean = list(result.images[: len(samples)])
    found = None
    if attacked is not None:
        before, after = clean[samples.index(attacked.sample)], result.images[-1]
        found = (attacked, before, after)
        console.print(
            f"a picture of “{attacked.sample.caption}”, changed by at most {attacked.levels} of 255 levels, reads "
            f"“{after.label_before.text}” and is called {after.verdict.value}; filtered it reads "
            f"“{after.label_after.text}”"
        )
    screened = Screened(clean, result.false_positive_rate, found)
    console.print(
        f"{screened.flagged} of {len(samples)} clean samples called adversarial, at an operating point of "
        f"{result.false_positive_rate:.0%} false positives"
    )
    return screened


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
