"""One attacked sample for demonstrations, since attacks need weights and no call makes any.

``python -m training.defense.sample --bundle bundles/emoji`` attacks the bundle's samples and keeps one, as
``samples/attacked.png`` with ``samples/attacked.json``. The defence has no say in which.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from services.bundle.load import Bundle, refresh_manifest
from services.bundle.manifest import Sample
from services.encoding.images import ImagePreprocess, decode_image
from training.build.embedded import DEFAULT_OUT
from training.defense.attacks import pgd, untargeted
from training.defense.redteam import embed_texts
from training.defense.victim import Victim, to_images, to_pixels

# Of 255: the most that any colour of any pixel is changed by.
LEVELS = 4


def attack_samples(bundle: Bundle, samples: list[Sample], seed: int = 0) -> tuple[Sample, str, np.ndarray]:
    """Attack every sample so that it is taken for the caption of another.

    Parameters
    ----------
    bundle
        Of the towers.
    samples
        With captions that differ.

    Returns
    -------
    Of the samples that were read right before and as their target after, the one whose target means least the same, or
    where there is none the one that came nearest; its target; and the picture, uint8, shape (H, W, 3).
    """
    victim = Victim(bundle)
    fit = ImagePreprocess(bundle.clip_config).fit
    clean = to_images(
        np.stack([np.asarray(fit(decode_image((bundle.path / s.path).read_bytes()))) for s in samples])
    )
    texts = embed_texts(bundle, tuple(sample.caption for sample in samples))
    own = torch.arange(len(samples))
    # Each is taken for another, and each of those by one.
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(samples)))
    aims = torch.empty_like(own)
    aims[order] = order.roll(1)
    generator = torch.Generator().manual_seed(seed)
    away = untargeted(victim, texts, aims, victim.logit_scale)
    moved = pgd(lambda images: -away(images), clean, LEVELS / 255, generator=generator)
    pixels = to_pixels(moved)
    before, after = victim.embed(clean) @ texts.T, victim.embed(to_images(pixels)) @ texts.T
    taken = (before.argmax(1) == own) & (after.argmax(1) == aims)
    margin = after[own, aims] - after[own, own]
    unlike = 1 - (texts[own] * texts[aims]).sum(1)
    # Cosines lie within 2 of each other, so whoever was taken comes first.
    best = int(torch.where(taken, 4 + unlike, margin).argmax())
    return samples[best], samples[int(aims[best])].caption, pixels[best]


def write_attacked(path: Path) -> None:
    """Attack the samples of the bundle at `path`, and write one with the manifest."""
    bundle = Bundle.load(path)
    captions: dict[str, Sample] = {sample.caption: sample for sample in bundle.manifest.samples}
    if len(captions) < 2:
        return
    sample, target, pixels = attack_samples(bundle, list(captions.values()))
    Image.fromarray(pixels).save(path / "samples" / "attacked.png", optimize=True)
    document = {"path": "samples/attacked.png", "sample": sample.path, "target": target, "levels": LEVELS}
    (path / "samples" / "attacked.json").write_text(json.dumps(document, indent=1) + "\n")
    refresh_manifest(path)


def main() -> None:
    """Attack from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=DEFAULT_OUT)
    write_attacked(parser.parse_args().bundle)


if __name__ == "__main__":
    main()
