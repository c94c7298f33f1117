"""Train the embedded CLIP from scratch on the emoji corpus.

``python -m training.towers.train`` trains, on a GPU where there is one, and ``--resume`` goes on from the last
checkpoint; the result is an open_clip model: a config JSON and safetensors. Three phases:

1. *images*: the image tower learns with captions that are sums of word vectors (`training.towers.caption_words`), by
   CLIP's contrastive loss over *every* caption of the emoji at every step. The same caption twice is never its own
   negative, and a picture that lost its colour is not held against the captions of its concept that name a tone.
   Emoji come as pairs of one concept by two artists, which a supervised contrastive loss brings together: it is what
   helps most on artists never seen. Most steps run at a low resolution, which costs a fraction, and augmentation
   grows from weak to strong.
2. *texts*: the text transformer learns to embed captions, in templates and in pairs, where their words' sums lie
   (`training.towers.text_tower`).
3. *locked*: the image tower is tuned at full resolution to the text transformer's own captions, which stay fixed
   (locked-text tuning, the mirror of Zhai et al., 2022): what the distillation cost is won back, and whatever reads
   the text tower need not be trained again.

What is measured, tuned on and exported is the moving average of the weights. ``--without ARTISTS`` leaves artists out
and logs retrieval on them: choose by that and by validation, for validation alone chooses what suits the artists seen.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.compute import CPU, coarse_products, pick_device, pick_precision
from training.corpus.build import DEFAULT_DIR
from training.towers.augment import Augment, AugmentSettings
from training.towers.caption_words import Captions, CaptionWords
from training.towers.contrastive import (
    contrastive_loss,
    encode_text,
    supervised_contrastive,
    two_caption_loss,
)
from training.towers.export import CONFIG, write_towers
from training.towers.image_tower import ImageTower, WeightAverage, build_projector
from training.towers.muon import Muon
from training.towers.pairs import TEMPLATES, Batch, Corpus, PartnerSampler
from training.towers.settings import Phase, TowerSettings
from training.towers.text_tower import TextDistiller, start_as_a_sum
from training.towers.validate import on_artist, on_validation

CHUNK = 512


def build_model(config: dict[str, Any]) -> open_clip.CLIP:
    """Return a randomly initialised open_clip model of a config's ``model_cfg``."""
    return open_clip.CLIP(**{k: v for k, v in config["model_cfg"].items() if k != "custom_text"})


class TowerTrainer:
    """Holds the model, the optimisers and the sampler of one run.

    Parameters
    ----------
    config : dict
        open_clip's config JSON; the image tower is a timm trunk with a linear projection that has a bias.
    corpus : Corpus
        Pictures and captions.
    settings : TowerSettings
        Hyperparameters.
    folder : Path
        Where checkpoints, the log and the result go.
    device : torch.device
        Where it trains.
    precision : torch.dtype
        Of products and convolutions.
    """

    def __init__(
        self,
        config: dict[str, Any],
        corpus: Corpus,
        settings: TowerSettings,
        folder: Path,
        device: torch.device = CPU,
        precision: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.config, self.corpus, self.settings, self.folder = config, corpus, settings, folder
        self.device, self.precision = device, precision
        model_cfg, preprocess = config["model_cfg"], config["preprocess_cfg"]
        self.size = model_cfg["vision_cfg"]["image_size"]
        self.model = build_model(config).to(device, memory_format=torch.channels_last)
        self.tower = ImageTower(self.model, preprocess["mean"], preprocess["std"], precision).to(device)
        self.projector = build_projector(self.tower.projection.in_features).to(device)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        augment = Augment(AugmentSettings(), torch.Generator().manual_seed(settings.seed))
        left_out = settings.artists_left_out()
        self.sampler = PartnerSampler(corpus, augment, settings.emoji_share, left_out)
        self.table = Captions.of(corpus.columns, self.sampler.emoji, self.sampler.icons)
        ids = [self.tokenizer.encode(text) for text in self.table.texts]
        self.words = CaptionWords(self.table.texts, ids, model_cfg["embed_dim"]).to(device)
        self.concept = np.unique(corpus.columns["concept"], return_inverse=True)[1]
        # The text tower's embeddings of every caption and of the two genders, once it is trained.
        self.captions: Tensor | None = None
        self.man_and_woman: Tensor | None = None
        self.average = WeightAverage(settings.average)
        # Steps of all phases of the image tower, and of this one.
        self.step = self.phase_step = 0
        self.started = time.monotonic()
        self.optimisers = self._optimisers()

    @property
    def phase(self) -> Phase:
        """The schedule of the image tower that runs now."""
        return (self.settings.images if self.captions is None else self.settings.locked)(self.size)

    @property
    def progress(self) -> float:
        """Share of this phase that is done."""
        return self.phase_step / self.phase.steps

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        s, trunk = self.settings, self.tower.trunk
        matrices = [p for p in trunk.parameters() if p.ndim > 1]
        vectors = [p for p in self.tower.parameters() if p.ndim <= 1]
        rest = [*self.projector.parameters(), self.model.logit_scale]
        rest += list(self.words.parameters()) if self.captions is None else []
        groups = [
            {"params": [self.tower.projection.weight], "peak": s.image_lr, "weight_decay": s.weight_decay},
            {"params": vectors, "peak": s.image_lr, "weight_decay": 0.0},
            {"params": rest, "peak": s.word_lr, "weight_decay": 0.0},
        ]
        muon = Muon(matrices, lr=s.muon_lr, weight_decay=s.weight_decay, precision=self.precision)
        muon.param_groups[0]["peak"] = s.muon_lr
        self._clipped = [*matrices, self.tower.projection.weight]
        return [torch.optim.AdamW(groups, lr=s.image_lr, betas=(0.9, 0.98), eps=1e-6, fused=True), muon]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted parts of the loss of one batch.

        CLIP's is against all captions of the emoji and those of the batch's icons.
        """
        s, table = self.settings, self.table
        own = self.words.positions(batch.captions)
        rows = np.union1d(table.drawn, own)
        target = np.searchsorted(rows, own)
        ignore = batch.toneless[:, None] & (table.concept[own][:, None] == table.concept[rows][None, :])
        ignore[np.arange(len(own)), target] = False
        features = self.tower.features(batch.images)
        images = self.tower.embed(features)
        scale = self.model.logit_scale.clamp(max=np.log(100.0)).exp()
        parts = {
            "clip": contrastive_loss(
                images,
                self.words(rows) if self.captions is None else self.captions[rows],
                torch.from_numpy(target).to(self.device),
                torch.from_numpy(ignore).to(self.device),
                scale,
                s.text_weight,
            )
        }
        if batch.paired:
            projections = F.normalize(self.projector(features[: batch.paired]), dim=-1)
            concepts = torch.from_numpy(self.concept[batch.rows[: batch.paired]]).to(self.device)
            parts["concept"] = s.concept_weight * supervised_contrastive(projections, concepts, s.temperature)
        if self.progress >= self.phase.gender_from:
            parts["gender"] = s.gender_weight * self.gender_loss(images, table.gender[own], scale)
        return parts

    def gender_loss(self, images: Tensor, genders: np.ndarray, scale: Tensor) -> Tensor:
        """Return the loss of telling "woman" from "man", over the pictures whose captions say which."""
        gendered = np.isin(genders, ("woman", "man"))
        if not gendered.any():
            return images.new_zeros(())
        man, woman = self.gender_texts()
        is_woman = torch.from_numpy(genders[gendered] == "woman").to(self.device, images.dtype)
        gendered = torch.from_numpy(gendered).to(self.device)
        return two_caption_loss(images[gendered], man, woman, is_woman, scale)

    def gender_texts(self) -> Tensor:
        """Return the embeddings of "man" and "woman" that the image tower is trained against, float32 [2, d]."""
        if self.man_and_woman is None:
            return self.words.embed([self.tokenizer.encode("man"), self.tokenizer.encode("woman")])
        return self.man_and_woman

    def train_step(self) -> dict[str, float]:
        """Take one optimiser step and return the parts of the loss."""
        s, phase, progress = self.settings, self.phase, self.progress
        pixels = phase.resolution(progress)
        if self.phase_step and pixels != phase.resolution((self.phase_step - 1) / phase.steps):
            self.average.restart()
        self.tower.train()
        self.projector.train()
        augment = AugmentSettings(toned_light=s.toned_light).scaled(phase.strength(progress))
        self.sampler.augment.settings = augment
        batch = self.sampler.batch(s.batch, pixels, self.device)
        with coarse_products(self.precision):
            parts = self.losses(batch)
            for optimiser in self.optimisers:
                optimiser.zero_grad(set_to_none=True)
            sum(parts.values()).backward()
        nn.utils.clip_grad_norm_(self._clipped, 5.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * phase.rate(progress)
            optimiser.step()
        self.average.update(self.tower)
        self.step += 1
        self.phase_step += 1
        return {name: float(part.detach()) for name, part in parts.items()}

    def train_images(self, validate_every: int, save_every: int) -> None:
        """Train the image tower to the end of this phase, and go on from the average of its weights."""
        started, first, steps = time.monotonic(), self.phase_step, self.phase.steps
        recent: list[dict[str, float]] = []
        while self.phase_step < steps:
            recent.append(self.train_step())
            done = self.phase_step == steps
            parts = {name: np.mean([r[name] for r in recent[-50:] if name in r]) for name in recent[-1]}
            if self.phase_step % 20 == 0 or done:
                pace = (time.monotonic() - started) / (self.phase_step - first)
                print(
                    f"{self.phase.name} {self.phase_step}/{steps} "
                    + " ".join(f"{name} {value:.3f}" for name, value in parts.items())
                    + f" {self.settings.batch / pace:.0f} drawings/s",
                    flush=True,
                )
            if self.phase_step % validate_every == 0 or done:
                self.log(self.phase.name, {name: float(value) for name, value in parts.items()})
            if self.phase_step % save_every == 0 or done:
                self.save()
        self.average.settle(self.tower)

    def train_texts(self) -> None:
        """Train the text tower, and fix the captions to what it says; short enough to start anew when it is cut."""
        s = self.settings
        # A run that was resumed after the images starts here like one that was not.
        torch.manual_seed(s.seed)
        start_as_a_sum(self.model, self.words)
        # Three to one: the captions that retrieval asks for against the many names of icons.
        weights = np.where(np.isin(np.arange(len(self.table.texts)), self.table.drawn), 3.0, 1.0)
        distiller = TextDistiller(
            self.model, self.words, weights, TEMPLATES, s.text_steps, s.text_batch, s.text_lr, s.seed
        )
        errors: list[float] = []
        self.model.train()
        while distiller.step < s.text_steps:
            with coarse_products(self.precision):
                errors.append(distiller.train_step())
            if distiller.step % 50 == 0:
                error = np.mean(errors[-50:])
                print(f"texts {distiller.step}/{s.text_steps} 1 - cosine {error:.4f}", flush=True)
        self.fix_captions()
        self.average.restart()
        self.phase_step, self.optimisers = 0, self._optimisers()
        self.log("texts", {"text_error": float(np.mean(errors[-50:]))})
        self.save()

    def fix_captions(self) -> None:
        """Embed every caption by the text tower, which stays as it is from here on."""
        texts = self.table.texts
        captions = self._transformed(texts.tolist(), ("{}",))
        captions[self.table.drawn] = self._transformed(texts[self.table.drawn].tolist(), TEMPLATES)
        self.captions = captions
        self.man_and_woman = self._transformed(["man", "woman"], TEMPLATES)

    @torch.no_grad()
    def _transformed(self, texts: list[str], templates: tuple[str, ...]) -> Tensor:
        """Return unit embeddings by the text transformer, the mean over templates, float32 [n, d]."""
        self.model.eval()
        parts = []
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            tokens = [self.tokenizer([t.format(text) for text in chunk]).to(self.device) for t in templates]
            parts.append(F.normalize(sum(encode_text(self.model, t) for t in tokens), dim=-1))
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Return unit text embeddings, float32 [n, d]: sums of words while the text tower is untrained."""
        if self.captions is None:
            return self.words.embed([self.tokenizer.encode(text) for text in texts]).cpu().numpy()
        return self._transformed(texts, TEMPLATES).cpu().numpy()

    @torch.no_grad()
    def embed_images(self, rows: np.ndarray) -> np.ndarray:
        """Return unit embeddings of the drawings as their artists drew them, float32 [n, d].

        At the resolution of the last step: the statistics of another are not those that normalisation learnt.
        """
        self.tower.eval()
        size = self.phase.resolution(max(0, self.phase_step - 1) / self.phase.steps)
        parts = []
        for start in range(0, len(rows), CHUNK):
            drawn = torch.from_numpy(self.corpus.plain[rows[start : start + CHUNK]]).to(self.device)
            pixels = drawn.permute(0, 3, 1, 2).float() / 255
            if size != pixels.shape[-1]:
                pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
            parts.append(self.tower(pixels).cpu())
        return torch.cat(parts).numpy()

    def validate(self) -> dict[str, float]:
        """Return the figures of the averaged weights on validation drawings, and on the artists left out."""
        left_out = self.settings.artists_left_out()
        with self.average.applied(self.tower):
            metrics = on_validation(self.corpus, left_out, self.embed_images, self.embed_texts)
            for artist in left_out:
                metrics |= on_artist(
                    self.corpus, artist, self.sampler.emoji, self.embed_images, self.embed_texts
                )
        return metrics

    def log(self, phase: str, losses: dict[str, float]) -> None:
        """Validate, print the figures and append them to the log; a run that is resumed counts minutes from zero."""
        minutes = (time.monotonic() - self.started) / 60
        metrics = {"phase": phase, "step": self.step, "minutes": minutes, **losses, **self.validate()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(metrics) + "\n")
        print(metrics, flush=True)

    def save(self) -> None:
        """Write a checkpoint; the previous one is replaced only when the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.part"
        state = {
            "model": self.model.state_dict(),
            "tower": self.tower.state_dict(),
            "projector": self.projector.state_dict(),
            "words": self.words.state_dict(),
            "average": self.average.values,
            "averaged": self.average.count,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.sampler.augment.generator.get_state(),
            "step": self.step,
            "phase_step": self.phase_step,
            "text_is_trained": self.captions is not None,
        }
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
        for name in ("model", "tower", "projector", "words"):
            getattr(self, name).load_state_dict(state[name])
        if state["text_is_trained"]:
            self.fix_captions()
            self.optimisers = self._optimisers()
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.average.values, self.average.count = state["average"], state["averaged"]
        self.sampler.augment.generator.set_state(state["generator"].cpu())
        self.step, self.phase_step = state["step"], state["phase_step"]

    def run(self, validate_every: int, save_every: int) -> None:
        """Train what is left of all phases, and write the towers."""
        if self.captions is None:
            self.train_images(validate_every, save_every)
            self.train_texts()
        self.train_images(validate_every, save_every)
        write_towers(self.folder, self.config, self.model.state_dict(), self.tower.state_dict())


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--out", type=Path, default=Path("work/clip"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "f32"), default="auto")
    parser.add_argument("--validate-every", type=int, default=500)
    parser.add_argument("--save-every", type=int, default=100)
    defaults = asdict(TowerSettings())
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = TowerSettings(**{name: getattr(arguments, name) for name in defaults})
    config, corpus = json.loads(arguments.config.read_text()), Corpus.load(arguments.corpus)
    device = pick_device(arguments.device)
    precision = pick_precision(device, arguments.precision)
    trainer = TowerTrainer(config, corpus, settings, arguments.out, device, precision)
    if arguments.resume:
        trainer.resume()
    trainer.run(arguments.validate_every, arguments.save_every)


if __name__ == "__main__":
    main()
