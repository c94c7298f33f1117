"""The demonstration's pictures: what is drawn, what a picture's embedding holds, and what steering changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from monofacet import Client, FeatureCard, ModalityLabel, SteeringAttribute, SteeringEdit, SteeringPreview
from PIL import Image
from rich.console import Console
from rich.progress import track
from samples import Sample

PROMPTS = (
    "red apple", "dog face", "woman firefighter", "sun", "red heart", "grinning face", "man astronaut", "automobile",
    "flag germany", "cat face", "pizza", "tulip", "thumbs up", "crown", "fish", "soccer ball",
)  # fmt: skip
SEED = 7
# Drawings at once: the server batches their steps.
AT_ONCE = 8
STEERED = "woman firefighter"
ROUND_TRIPS = 3
# What is turned, if the bundle has it; the first so many rows are drawn, then features take the place of attributes.
TURNED = (
    ("red heart", "blue"), ("thumbs up", "medium skin"), ("man farmer", "woman"), ("grinning face", "frown"),
    ("tulip", "yellow"), ("umbrella", "red"), ("baby", "dark skin"), ("man teacher", "light skin"),
)  # fmt: skip
ROWS = 5
STRENGTHS = (0.0, 0.5, 1.0)
# Where features activate that are turned up: their own strongest activations.
HIGH = 0.99


@dataclass(frozen=True)
class Steered:
    """One drawing, with one thing turned up.

    Parameters
    ----------
    prompt, what : str
        What is drawn, and what is turned.
    label : str
        Of a feature; empty for an attribute.
    pictures : list[Image.Image]
        One a strength.
    strengths : tuple[float, ...]
        0 is the drawing as it is.
    """

    prompt: str
    what: str
    label: str
    pictures: list[Image.Image]
    strengths: tuple[float, ...] = STRENGTHS


@dataclass(frozen=True)
class RoundTrip:
    """A picture, and what is drawn from its embedding alone.

    Parameters
    ----------
    sample : Sample
        The picture.
    size : int
        Numbers of its embedding.
    pictures : list[Image.Image]
        From several random starts.
    """

    sample: Sample
    size: int
    pictures: list[Image.Image]


def preview(client: Client, reference: Sample, console: Console) -> SteeringPreview:
    """Say what a steered prompt would be near to, without drawing anything."""
    answer = client.preview_steering(
        STEERED, SteeringEdit(ModalityLabel.CROSS, reference=reference.data), max_captions=3
    )
    before = ", ".join(c.text for c in answer.captions)
    after = ", ".join(c.text for c in answer.steered_captions)
    console.print(
        f"“{STEERED}” with the CROSS features of a {reference.caption}: moved by {answer.delta:.2f}; nearest captions "
        f"before: {before}; after: {after}"
    )
    return answer


def generate_sheet(client: Client, console: Console) -> list[Image.Image]:
    """Draw the 16 prompts."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        drawn = pool.map(lambda prompt: client.generate(prompt, seeds=SEED).images[0].image, PROMPTS)
        return list(track(drawn, total=len(PROMPTS), description="drawing", console=console))


def round_trip(client: Client, sample: Sample, size: int) -> RoundTrip:
    """Draw from the embedding of a picture, without a prompt."""
    seeds = range(SEED, SEED + ROUND_TRIPS)
    result = client.generate("", image=sample.data, seeds=seeds)
    return RoundTrip(sample, size, [made.image for made in result.images])


def steer(client: Client, cards: list[FeatureCard], console: Console) -> list[Steered]:
    """Turn one thing in each of some drawings: attributes of the bundle, and features where there are too few."""
    known = {attribute.name for attribute in client.attributes().attributes}
    turned: list[tuple[str, str | FeatureCard]] = [(p, name) for p, name in TURNED if name in known]
    best = [card for card in cards if card.label is ModalityLabel.CROSS and card.name]
    best.sort(key=lambda card: -(card.name_auc or 0.0))
    turned += zip(PROMPTS, best, strict=False)
    jobs = [(row, strength) for row in turned[:ROWS] for strength in STRENGTHS]

    def draw(job: tuple[tuple[str, str | FeatureCard], float]) -> Image.Image:
        (prompt, what), strength = job
        if isinstance(what, str):
            made = client.generate(prompt, seeds=SEED, attributes=[SteeringAttribute(what, strength)])
        else:
            edit = SteeringEdit(what.feature, quantile=HIGH, strength=strength)
            made = client.generate(prompt, seeds=SEED, edits=[edit])
        return made.images[0].image

    with ThreadPoolExecutor(AT_ONCE) as pool:
        drawn = list(track(pool.map(draw, jobs), total=len(jobs), description="steering", console=console))
    rows = []
    for i, (prompt, what) in enumerate(turned[:ROWS]):
        pictures = drawn[i * len(STRENGTHS) : (i + 1) * len(STRENGTHS)]
        if isinstance(what, str):
            rows.append(Steered(prompt, f"turned towards: {what}", "", pictures))
        else:
            rows.append(Steered(prompt, f"the feature “{what.name}” turned up", what.label.value, pictures))
    return rows
