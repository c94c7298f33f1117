"""What the study of attributes fits, chooses and measures on a finished bundle.

* The unit: the smallest dose at which the judge, shown a steered picture and its unsteered twin, takes the steered
  one for what the feature's strongest captions say in 90% of pairs; and whether the prompt's words should fade.
* The dose of an attribute: the smallest at which its hit rate and the share of pictures that stay their concept come
  nearest to 80% and 90%.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from services.bundle.load import Bundle
from services.imaging.denoiser import Sample
from services.imaging.dose import (
    Attribute,
    AttributeMeasures,
    Attributes,
    AttributesConfig,
    Share,
    whitening_of,
)
from services.imaging.edits import AttributeEdit, Edit, ImageRequest, SetQuantile, Steering
from services.imaging.generator import Imaging
from services.strict_json import parse_dataclass
from training.compute import CPU, mixed, pick_precision
from training.diffusion.drawings import resized
from training.imaging.attributes import GENDERED, eligible, fit_all, training_pool, without_words
from training.imaging.probes import Probes
from training.judging.train import CANDIDATES, Judge, read_inputs
from training.towers.embed import EmbeddingSet
from training.towers.pairs import Corpus
from training.towers.retrieval import bootstrap_mean

FOLDER = "attributes"
UNITS = (0.9, 1.3)
SEEN = 0.9
# Features that are about something one can name: what the unit is chosen on.
NAMED_AUC, FIRES = 0.9, 0.004
# Dose over which the prompt's words fade: well below what can be seen, and no jump.
FADE = 0.25
DOSES = (0.45, 0.65, 0.9, 1.2)
HIT, KEPT = 0.8, 0.9
# ITU-R BT.709.
LUMA = np.array([[0.2126], [0.7152], [0.0722]])
# What the choosing half must show of an attribute for it to be listed.
LEAST_HIT, LEAST_KEPT = 0.6, 0.75


def draw(
    imaging: Imaging,
    requests: Sequence[Any],
    side: int,
    batch: int = 16,
    prepare: Callable[[Any], Sample] | None = None,
) -> UInt8[NDArray[np.uint8], "n side side 3"]:
    """Return pictures, in bfloat16 where the CPU has it and in whole batches: faster than what is served.

    Parameters
    ----------
    imaging : Imaging
        Draws.
    requests : sequence
        Of `ImageRequest`, or of what `prepare` takes.
    side : int
        Pixels that the pictures are brought to.
    """
    imaging.denoiser.batching = "free"
    made, started = [], time.monotonic()
    with mixed(CPU, pick_precision(CPU)):
        for start in range(0, len(requests), batch):
            samples = [(prepare or imaging.prepare)(one) for one in requests[start : start + batch]]
            while not all(sample.done for sample in samples):
                imaging.step(samples)
            made += [imaging.decode(sample) for sample in samples]
            if start // batch % 10 == 9:
                rate = len(made) / (time.monotonic() - started)
                print(f"pictures {len(made)}/{len(requests)} {rate:.1f}/s", flush=True)
    return resized(np.stack(made), side)


def grey(pictures: np.ndarray) -> UInt8[NDArray[np.uint8], "n h w 3"]:
    """Return the luma of pictures: what is left for a judge that must not see colour; edges stay."""
    seen: NDArray[np.uint8] = np.repeat(pictures @ LUMA, 3, axis=-1).round().astype(np.uint8)
    return seen


class Study:
    """Fits, chooses and measures.

    Parameters
    ----------
    bundle : Bundle
        With a generator.
    corpus : Corpus
        Drawings.
    embeddings : EmbeddingSet
        Of them, by the bundle's towers.
    clip : Path
        Folder of the towers.
    judge : Path
        What training.judging.train wrote.
    steps : int
        Denoising steps of a picture.
    """

    def __init__(
        self, bundle: Bundle, corpus: Corpus, embeddings: EmbeddingSet, clip: Path, judge: Path, steps: int
    ) -> None:
        self.bundle, self.corpus, self.judge, self.steps = bundle, corpus, Judge(judge), steps
        self.pool = training_pool(corpus, embeddings, clip)
        raw_texts = (embeddings.texts * embeddings.text_norm[..., None])[0]
        used = np.isin(embeddings.captions, self.pool.columns["caption"])
        plain = self.pool.columns["style"] == "plain"
        self.bank = np.concatenate([self.pool.raw[plain], raw_texts[used]])
        self.whitening = whitening_of(self.bank)
        self.name = bundle.resolve("")
        self.fitted, self.dense = fit_all(self.pool, self.whitening, bundle.dictionary())
        self.imaging = Imaging.load(bundle, "cpu", torch.get_num_threads(), verify=False, max_batch=1)
        seen = read_inputs(corpus, judge, self.judge.settings.seed)
        self.probes = Probes.fit(corpus, seen, self.judge.backbone)
        print(f"probes on validation drawings: {self.probes.accuracy}", flush=True)
        validation = embeddings.where("validation")
        unseen = np.setdiff1d(embeddings.caption[validation], np.flatnonzero(used))
        self.usual = self._distance(
            np.concatenate(
                [embeddings.images[validation] * embeddings.image_norm[validation, None], raw_texts[unseen]]
            )
        )
        columns = corpus.columns
        held_out = columns["split"] == "validation"
        self.concepts = np.unique(columns["concept"][held_out])
        self._plain: dict[tuple[str, int], np.ndarray] = {}
        self.stems = without_words(self.concepts, GENDERED)
        self.candidates = self.judge.texts(list(self.concepts))

    def _distance(self, raw: Float[NDArray[np.float32], "n d"]) -> NDArray[np.float64]:
        """Return how far embeddings are from the nearest of the training data, whitened."""
        a, b = raw @ self.whitening, self.bank @ self.whitening
        squared = np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1)[None]
        nearest: NDArray[np.float64] = np.sqrt(squared.min(1).clip(0))
        return nearest

    def off_distribution(self, raw: Float[NDArray[np.float32], "n d"]) -> float:
        """Return the mean share of held-out embeddings that lie nearer to the training data than these."""
        return float((self.usual[None] < self._distance(raw)[:, None]).mean())

    def use(self, config: AttributesConfig, attributes: Sequence[Attribute]) -> None:
        """Let the generator steer by these doses and attributes."""
        known = Attributes(config, self.whitening, {a.entry.name: a for a in attributes})
        self.imaging.know(known)

    def kept(self, pictures: np.ndarray, concepts: Sequence[str], colour_blind: bool) -> NDArray[np.float64]:
        """Return whether the judge finds each picture's concept among 100 of the validation concepts.

        The same with another gender is no other concept here. A colour-blind judge is shown lightness alone, so that it
        does not hold a colour against a thing.
        """
        similarity = self.judge.images(grey(pictures) if colour_blind else pictures) @ self.candidates.T
        rng, found = np.random.default_rng(0), []
        for row, concept in zip(similarity, concepts, strict=True):
            own = int(np.searchsorted(self.concepts, concept))
            others = rng.permutation(np.flatnonzero(self.stems != self.stems[own]))[: CANDIDATES - 1]
            found.append(row[own] > row[others].max())
        return np.array(found, np.float64)

    def request(self, concept: str, seed: int, steering: Steering | None = None) -> ImageRequest:
        """Return what draws a concept."""
        return ImageRequest(
            concept, seed=seed, steering=steering or Steering(), num_inference_steps=self.steps
        )

    def unsteered(self, concepts: Sequence[str], seed: int) -> np.ndarray:
        """Return pictures without edits, uint8 [n, side, side, 3]; each is made once."""
        keys = [(concept, seed + i) for i, concept in enumerate(concepts)]
        missing = [key for key in keys if key not in self._plain]
        if missing:
            made = draw(self.imaging, [self.request(*key) for key in missing], self.corpus.plain.shape[1])
            self._plain.update(zip(missing, made, strict=True))
        return np.stack([self._plain[key] for key in keys])

    def raw_steered(self, requests: Sequence[ImageRequest]) -> NDArray[np.float32]:
        """Return the unnormalised embeddings that requests are conditioned on, float32 (n, d)."""
        made = [self.imaging.condition(request).embedding for request in requests]
        return np.stack([one[-1].numpy() for one in made if one is not None])

    def choose_unit(self, features: int, seed: int) -> tuple[float, float, dict[str, Any]]:
        """Return the unit, the dose over which words fade, and the shares seen behind both."""
        table, cards = self.bundle.modality(), self.bundle.cards().table.to_pandas()
        rng = np.random.default_rng(seed)
        texts = {
            f: list(dict.fromkeys(g.sort_values("rank")["text"]))[:5] for f, g in cards.groupby("feature")
        }
        named = np.flatnonzero((table.name_auc >= NAMED_AUC) & (table.firing_rate_image >= FIRES))
        chosen = rng.permutation([f for f in named if f in texts])[:features]
        bases = rng.choice(self.concepts, len(chosen))
        towards = np.stack([self.judge.texts(texts[int(f)]).mean(0) for f in chosen])
        side = self.corpus.plain.shape[1]
        plain = self.judge.images(
            draw(self.imaging, [self.request(str(b), i) for i, b in enumerate(bases)], side)
        )

        def seen(unit: float, fade: float) -> NDArray[np.float64]:
            self.use(AttributesConfig("", self.name, unit, fade, {}), ())
            edits = [Steering((Edit((int(f),), SetQuantile(0.95)),)) for f in chosen]
            made = draw(
                self.imaging,
                [self.request(str(b), i, e) for i, (b, e) in enumerate(zip(bases, edits, strict=True))],
                side,
            )
            found: NDArray[np.float64] = ((self.judge.images(made) - plain) * towards).sum(1) > 0
            return found.astype(float)

        shares = {f"{unit:g}": vars(bootstrap_mean(seen(unit, FADE))) for unit in UNITS}
        values = [shares[f"{unit:g}"]["value"] for unit in UNITS]
        wanted = min(SEEN, max(values))
        unit = UNITS[next(i for i, value in enumerate(values) if value >= wanted)]
        held = bootstrap_mean(seen(unit, 0.0))
        fade = FADE if values[UNITS.index(unit)] >= held.value else 0.0
        record = {"features": len(chosen), "seen_by_unit": shares, "seen_with_words_kept": vars(held)}
        print(f"unit {unit:g}, fade {fade:g}: {record}", flush=True)
        return unit, fade, record

    def measure(
        self,
        attribute: Attribute,
        doses: Sequence[float],
        concepts: Sequence[str],
        seed: int,
        config: AttributesConfig,
    ) -> list[dict[str, NDArray[np.float64] | float]]:
        """Return hit, kept and distance at each dose, 0 for the unsteered twins."""
        found = []
        side = self.corpus.plain.shape[1]
        for dose in doses:
            self.use(config, [replace(attribute, entry=replace(attribute.entry, dose=dose or 1.0))])
            steering = Steering(attributes=(AttributeEdit(attribute.entry.name),)) if dose else None
            requests = [self.request(c, seed + i, steering) for i, c in enumerate(concepts)]
            pictures = draw(self.imaging, requests, side) if dose else self.unsteered(concepts, seed)
            found.append(
                {
                    "hit": self.probes.has(attribute.entry.group, attribute.entry.name, pictures),
                    "kept": self.kept(pictures, concepts, attribute.entry.group == "colour"),
                    "off": self.off_distribution(self.raw_steered(requests)),
                }
            )
        return found

    def chosen_dose(
        self, attribute: Attribute, concepts: Sequence[str], config: AttributesConfig
    ) -> dict[str, float]:
        """Return the dose that comes nearest to both goals, the smallest of equals, with what it does."""
        plain, *chosen = self.measure(attribute, (0.0, *DOSES), concepts, 1000, config)
        there = np.asarray(plain["kept"]) > 0
        # Where the judge knows none of the pictures nothing can be kept.
        kept = [float(np.mean(np.asarray(m["kept"])[there])) if there.any() else 0.0 for m in chosen]
        hit = [float(np.mean(m["hit"])) for m in chosen]
        scores = [min(h / HIT, 1) + min(k / KEPT, 1) for h, k in zip(hit, kept, strict=True)]
        best = int(np.argmax(np.round(scores, 6)))
        print(f"{attribute.entry.name}: doses {DOSES}, hit {hit}, kept {kept}", flush=True)
        return {"dose": DOSES[best], "hit": hit[best], "kept": kept[best]}

    def measured(
        self, attribute: Attribute, dose: float, concepts: Sequence[str], config: AttributesConfig
    ) -> AttributeMeasures:
        """Return an attribute's measures at a dose."""
        before, after = self.measure(attribute, (0.0, dose), concepts, 2000, config)
        there = np.asarray(before["kept"]) > 0
        nothing = Share(0.0, 0.0, 1.0)
        known = np.asarray(concepts)[there]
        return AttributeMeasures(
            len(concepts),
            by_concept(after["hit"], concepts),
            by_concept(before["hit"], concepts),
            by_concept(np.asarray(after["kept"])[there], known) if there.any() else nothing,
            by_concept(before["kept"], concepts),
            float(np.mean(after["off"])),
            float(np.mean(before["off"])),
        )

    def run(
        self, fingerprint: str, choosing: int, measuring: int, features: int, keep: Path | None = None
    ) -> Attributes:
        """Return everything, chosen and measured; what `keep` holds of a run like this is not measured again."""
        files = self.bundle.manifest.files
        weights = {
            name: file.sha256
            for name, file in files.items()
            if name.endswith(".safetensors") and not name.startswith(f"{FOLDER}/")
        }
        settings = [weights, DOSES, UNITS, self.steps, choosing, measuring, features]
        stamp = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        done: dict[str, Any] = json.loads(keep.read_text()) if keep is not None and keep.exists() else {}
        if done.get("stamp") != stamp:
            done = {"stamp": stamp, "attributes": {}}

        def save() -> None:
            if keep is not None:
                keep.parent.mkdir(parents=True, exist_ok=True)
                keep.write_text(json.dumps(done, indent=1) + "\n")

        if "unit" not in done:
            done["unit"] = self.choose_unit(features, 0)
            save()
        unit, fade, record = done["unit"]
        config = AttributesConfig(fingerprint, self.name, unit, fade, {"unit": record})
        kept, left_out = [], {}
        for attribute in self.fitted:
            group, name = attribute.entry.group, attribute.entry.name
            if name not in done["attributes"]:
                concepts = np.random.default_rng(1).permutation(eligible(group, name, self.corpus.columns))
                half = len(concepts) // 2
                # Few concepts are drawn more than once, from other seeds.
                a, b = (
                    [str(c) for c in np.resize(part, n)]
                    for part, n in ((concepts[:half], choosing), (concepts[half:], measuring))
                )
                choice = self.chosen_dose(attribute, a, config)
                shown = choice["hit"] >= LEAST_HIT and choice["kept"] >= LEAST_KEPT
                measures = asdict(self.measured(attribute, choice["dose"], b, config)) if shown else None
                print(f"{name}: {choice}, {measures}", flush=True)
                done["attributes"][name] = {"choice": choice, "measures": measures}
                save()
            choice, measures = (done["attributes"][name][key] for key in ("choice", "measures"))
            if measures is None:
                left_out[name] = choice
                continue
            entry = replace(
                attribute.entry,
                dose=choice["dose"],
                measures=parse_dataclass(AttributeMeasures, measures, name),
            )
            kept.append(replace(attribute, entry=entry))
        evidence = {
            "unit": record,
            "left_out": left_out,
            "probes": self.probes.accuracy,
            "steps": self.steps,
            "choosing": choosing,
        }
        final = replace(config, evidence=evidence, attributes=tuple(a.entry for a in kept))
        return Attributes(final, self.whitening, {a.entry.name: a for a in kept})


def by_concept(values: Any, concepts: Sequence[str]) -> Share:
    """Return the share with its interval, by bootstrap over concepts and never narrower than of as many coins."""
    values = np.asarray(values, float)
    names, where = np.unique(np.asarray(concepts), return_inverse=True)
    sums, counts = np.bincount(where, values), np.bincount(where)
    draws = np.random.default_rng(0).integers(0, len(names), (2000, len(names)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    # At 0 and 1 a bootstrap has no width: Wilson's interval has.
    n, p, z = len(names), values.mean(), 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Share(float(p), float(min(low, centre - half)), float(max(high, min(1.0, centre + half))))
