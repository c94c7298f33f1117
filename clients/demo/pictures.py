"""The demonstration's pictures: what the pipeline draws, and what steering by modality changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from monofacet import Client, FeatureCard, ModalityLabel, SteeringEdit, SteeringPreview
from PIL import Image
from rich.console import Console
from rich.progress import track
from samples import Sample

PROMPTS = (
    "red apple", "dog face", "woman firefighter", "sun", "red heart", "grinning face", "man astronaut", "automobile",
    "flag germany", "cat face", "pizza", "tulip", "thumbs up", "crown", "fish", "soccer ball",
)  # fmt: skip
SEED = 7
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
STEERED = "woman firefighter"


@dataclass(frozen=True)
class Steering:
    """Pictures of one prompt, steered towards a reference by groups of features.

    Parameters
    ----------
    reference : Sample
        Whose activations the features are set to.
    rows : dict[str, list[Image.Image]]
        By group, one picture a strength.
    """

    reference: Sample
    rows: dict[str, list[Image.Image]]


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
    """Draw the 16 prompts, several at a time, so that the server batches their steps."""
    with ThreadPoolExecutor(8) as pool:
        drawn = pool.map(lambda prompt: client.generate(prompt, seeds=SEED).images[0].image, PROMPTS)
        return list(track(drawn, total=len(PROMPTS), description="drawing", console=console))


def steer_sheet(client: Client, cards: list[FeatureCard], reference: Sample, console: Console) -> Steering:
    """Steer one prompt by the features of each label, and by random ones, with growing strength."""
    alive = [card.feature for card in cards if card.label is not ModalityLabel.DEAD]
    size = sum(card.label is ModalityLabel.IMAGE for card in cards)
    random = np.random.default_rng(0).choice(alive, min(size, len(alive)), replace=False)
    groups: dict[str, ModalityLabel | list[int]] = {
        label.value: label for label in (ModalityLabel.IMAGE, ModalityLabel.TEXT, ModalityLabel.CROSS)
    }
    groups["random"] = [int(feature) for feature in random]
    jobs = [(name, strength) for name in groups for strength in STRENGTHS]

    def draw(job: tuple[str, float]) -> Image.Image:
        name, strength = job
        edit = SteeringEdit(groups[name], reference=reference.data, strength=strength)
        return client.generate(STEERED, seeds=SEED, edits=[edit]).images[0].image

    with ThreadPoolExecutor(8) as pool:
        drawn = list(track(pool.map(draw, jobs), total=len(jobs), description="steering", console=console))
    width = len(STRENGTHS)
    return Steering(reference, {name: drawn[i * width : (i + 1) * width] for i, name in enumerate(groups)})
