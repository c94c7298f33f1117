"""Train the embedded CLIP from scratch on the emoji corpus.

``python -m training.clip`` trains, ``--resume`` goes on from the last checkpoint; the result is an open_clip
model: a config JSON and safetensors. Loss and choices:

- image to text: cross-entropy over the captions of the batch (fresh) and all other emoji captions (a bank of
  embeddings that is refreshed now and then), so that a small batch still meets every hard negative;
- text to image: cross-entropy over the batch's images, shared evenly by all images of the caption;
- every caption that names a gender brings the caption of the other one as a negative, which a batch drawn at random
  hardly ever holds (without it the woman/man AUC stayed at 0.5 for 1,000 steps);
- the same caption twice is never its own negative, and a picture that lost its colour is not held against the
  captions of its concept that name a skin tone;
- warm-up, constant rate, then linear decay; the first part at a lower resolution, which costs half as much;
- a curriculum: augmentation grows from weak to full, since with few samples the towers must first find out what a
  caption means at all (at full strength from the start, 500 steps taught them next to nothing).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from training.augment import Augment, AugmentSettings
from training.contrastive import contrastive_loss, encode_text
from training.corpus.build import DEFAULT_DIR
from training.corpus.names import counterpart
from training.pairs import TEMPLATES, Batch, Corpus, PairSampler
from training.retrieval import bootstrap_auc, gender_score, retrieval

CONFIG = Path(__file__).parent / "configs" / "emoji_clip.json"


@dataclass(frozen=True)
class ClipSettings:
    """Hyperparameters of a run.

    Parameters
    ----------
    steps, batch : int
        Optimiser steps, and pairs a step.
    image_lr, text_lr : float
        Peak learning rates of the towers.
    weight_decay : float
        On matrices and filters only.
    warm_up, decay : float
        Shares of the steps with a rising and a falling rate.
    low_resolution : int
        Pixels a side during the first `low_share` of the steps.
    weak, full_from : float
        Strength of the augmentation at the start, and the share of the steps after which it is full.
    bank_from : float
        Share of the steps after which the caption bank joins the negatives.
    bank_every : int
        Steps between two full refreshes of the bank.
    """

    steps: int = 2500
    batch: int = 128
    image_lr: float = 2e-3
    text_lr: float = 1e-3
    weight_decay: float = 0.05
    warm_up: float = 0.04
    decay: float = 0.35
    low_resolution: int = 48
    low_share: float = 0.6
    weak: float = 0.15
    full_from: float = 0.7
    bank_from: float = 0.85
    bank_every: int = 150
    emoji_share: float = 0.75
    without: str = ""
    seed: int = 0


def build_model(config: dict) -> open_clip.CLIP:
    """Return a randomly initialised open_clip model of a config's ``model_cfg``."""
    return open_clip.CLIP(**{k: v for k, v in config["model_cfg"].items() if k != "custom_text"})


class CaptionBank:
    """Embeddings of every emoji caption, as they were when last encoded."""

    def __init__(self, captions: np.ndarray, concepts: np.ndarray, dim: int, device: torch.device) -> None:
        self.captions, first = np.unique(captions, return_index=True)
        self.concepts = concepts[first]
        self.index = {caption: i for i, caption in enumerate(self.captions)}
        self.embeddings = torch.zeros(len(self.captions), dim, device=device)

    def refresh(self, trainer: ClipTrainer) -> None:
        """Encode all captions anew."""
        # Cloned: a tensor made in inference mode could not join a loss.
        self.embeddings = trainer.embed_texts(list(self.captions), templates=TEMPLATES[:1]).clone()

    def write(self, captions: list[str], embeddings: Tensor) -> None:
        """Keep the fresh embeddings of captions that the bank has."""
        known = [(i, self.index[c]) for i, c in enumerate(captions) if c in self.index]
        if known:
            source, where = zip(*known, strict=True)
            self.embeddings[list(where)] = embeddings[list(source)].detach()


class ClipTrainer:
    """Holds the model, the optimiser and the sampler of one run.

    Parameters
    ----------
    config : dict
        open_clip's config JSON.
    corpus : Corpus
        Pictures and captions.
    settings : ClipSettings
        Hyperparameters.
    folder : Path
        Where checkpoints, the log and the result go.
    """

    def __init__(self, config: dict, corpus: Corpus, settings: ClipSettings, folder: Path) -> None:
        torch.manual_seed(settings.seed)
        self.config, self.corpus, self.settings, self.folder = config, corpus, settings, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(config).to(self.device, memory_format=torch.channels_last)
        self.size = config["model_cfg"]["vision_cfg"]["image_size"]
        self.tokenizer = open_clip.SimpleTokenizer(
            context_length=config["model_cfg"]["text_cfg"]["context_length"]
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.augmentation = AugmentSettings()
        augment = Augment(self.augmentation, self.generator)
        self.sampler = PairSampler(corpus, augment, settings.emoji_share, settings.without)
        self.optimiser = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98), eps=1e-6)
        emoji = self.sampler.emoji
        columns = corpus.columns
        self.bank = CaptionBank(
            np.concatenate([columns["caption"][emoji], columns["concept"][emoji]]),
            np.concatenate([columns["concept"][emoji]] * 2),
            config["model_cfg"]["embed_dim"],
            self.device,
        )
        self.step = 0

    def _groups(self) -> list[dict]:
        s = self.settings
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            decays = parameter.ndim > 1 and "embedding" not in name
            groups.setdefault((name.startswith("visual."), decays), []).append(parameter)
        return [
            {
                "params": parameters,
                "peak": s.image_lr if visual else s.text_lr,
                "weight_decay": s.weight_decay if decays else 0.0,
            }
            for (visual, decays), parameters in groups.items()
        ]

    def resolution(self) -> int:
        """Return the pixels a side that this step trains at."""
        s = self.settings
        return s.low_resolution if self.step < s.low_share * s.steps else self.size

    def rate(self) -> float:
        """Return the share of the peak learning rate at this step."""
        progress = self.step / self.settings.steps
        return min(1.0, (progress + 1e-3) / self.settings.warm_up, (1.0 - progress) / self.settings.decay)

    def normalise(self, images: Tensor) -> Tensor:
        """Apply the config's mean and standard deviation to images in [0, 1]."""
        cfg = self.config["preprocess_cfg"]
        mean, std = (torch.tensor(cfg[k], device=images.device).view(1, 3, 1, 1) for k in ("mean", "std"))
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)

    def tokens(self, captions: list[str], templates: tuple[str, ...]) -> Tensor:
        """Tokenise each caption in a template drawn at random."""
        pick = torch.randint(len(templates), (len(captions),), generator=self.generator).tolist()
        texts = [templates[p].format(c) for p, c in zip(pick, captions, strict=True)]
        return self.tokenizer(texts).to(self.device)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of one batch."""
        captions, target = np.unique(batch.captions, return_inverse=True)
        # Only counterparts that some artist draws: the towers should not learn captions of nothing.
        opposite = np.setdiff1d([c for c in map(counterpart, captions) if c in self.bank.index], captions)
        images = F.normalize(self.model.encode_image(self.normalise(batch.images.to(self.device))), dim=-1)
        fresh = np.concatenate([captions, opposite])
        texts = encode_text(self.model, self.tokens(list(fresh), TEMPLATES))
        uses_bank = self.step >= self.settings.bank_from * self.settings.steps
        stale = ~np.isin(self.bank.captions, fresh) if uses_bank else np.zeros(len(self.bank.captions), bool)
        concept_of = dict(zip(batch.captions, batch.concepts, strict=True))
        all_captions = np.concatenate([fresh, self.bank.captions[stale]])
        all_concepts = np.concatenate(
            [
                [concept_of[c] for c in captions],
                [self.bank.concepts[self.bank.index[c]] for c in opposite],
                self.bank.concepts[stale],
            ]
        )
        ignore = (
            batch.toneless[:, None]
            & (batch.concepts[:, None] == all_concepts[None, :])
            & (np.asarray(batch.captions)[:, None] != all_captions[None, :])
        )
        others = torch.cat(
            [texts[len(captions) :], self.bank.embeddings[torch.from_numpy(stale).to(self.device)]]
        )
        scale = self.model.logit_scale.clamp(max=np.log(100.0)).exp()
        self.bank.write(list(fresh), texts)
        return contrastive_loss(
            images,
            texts[: len(captions)],
            others,
            torch.from_numpy(target).to(self.device),
            torch.from_numpy(ignore).to(self.device),
            scale,
        )

    def train_step(self) -> float:
        """Take one optimiser step and return the loss."""
        s = self.settings
        self.model.train()
        progress = self.step / s.steps
        strength = min(1.0, s.weak + (1 - s.weak) * progress / s.full_from)
        self.sampler.augment.settings = self.augmentation.scaled(strength)
        batch = self.sampler.batch(s.batch, self.resolution())
        if self.step >= s.bank_from * s.steps and self.step % s.bank_every == 0:
            self.bank.refresh(self)
            self.model.train()
        loss = self.loss(batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * self.rate()
        self.optimiser.step()
        self.step += 1
        return float(loss.detach())

    @torch.inference_mode()
    def embed_texts(self, captions: list[str], templates: tuple[str, ...] = TEMPLATES) -> Tensor:
        """Return unit text embeddings, float32 [n, d]: the mean over templates, renormalised."""
        self.model.eval()
        parts = []
        for start in range(0, len(captions), 512):
            chunk = captions[start : start + 512]
            mean = sum(
                encode_text(self.model, self.tokenizer([t.format(c) for c in chunk]).to(self.device))
                for t in templates
            )
            parts.append(F.normalize(mean, dim=-1))
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_images(self, rows: np.ndarray) -> Tensor:
        """Return unit embeddings of the drawings as their artists drew them, float32 [n, d].

        At the resolution of this step: the statistics of the other one are not those that normalisation learnt,
        and R@1 would read 1% where it is 13%.
        """
        self.model.eval()
        size = self.resolution()
        parts = []
        for start in range(0, len(rows), 256):
            drawn = torch.from_numpy(self.corpus.plain[rows[start : start + 256]])
            pixels = drawn.permute(0, 3, 1, 2).float() / 255
            if size != self.size:
                pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
            parts.append(F.normalize(self.model.encode_image(self.normalise(pixels.to(self.device))), dim=-1))
        return torch.cat(parts)

    def validate(self) -> dict[str, float]:
        """Return the figures on held-out drawings that every choice is made by."""
        columns = self.corpus.columns
        rows = self.corpus.rows("validation")
        images = self.embed_images(rows).cpu().numpy()
        captions = columns["caption"][rows]
        distinct = np.unique(captions)
        result = retrieval(images, captions, self.embed_texts(list(distinct)).cpu().numpy(), distinct)
        strict = ~columns["sibling"][rows].astype(bool)
        strict_result = retrieval(
            images[strict], captions[strict], self.embed_texts(list(distinct)).cpu().numpy(), distinct
        )
        man, woman = self.embed_texts(["man", "woman"]).cpu().numpy()
        gender = columns["gender"][rows]
        known = gender != ""
        auc = bootstrap_auc(gender_score(images[known], man, woman), gender[known] == "woman", resamples=50)
        return {
            "r1": result.image_to_text[1].value,
            "r5": result.image_to_text[5].value,
            "r1_strict": strict_result.image_to_text[1].value,
            "r1_text": result.text_to_image[1].value,
            "gender_auc": auc.value,
        }

    def save(self) -> None:
        """Write a checkpoint; the previous one is replaced only when the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.part"
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "bank": self.bank.embeddings.clone(),
            "step": self.step,
        }
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"].cpu())
        self.bank.embeddings = state["bank"]
        self.step = state["step"]

    def export(self) -> None:
        """Write the model as open_clip's config JSON and half-precision safetensors."""
        (self.folder / "open_clip_config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        weights = {
            name: tensor.detach().cpu().contiguous().half()
            if tensor.is_floating_point()
            else tensor.detach().cpu()
            for name, tensor in self.model.state_dict().items()
        }
        save_file(weights, self.folder / "open_clip_model.safetensors")

    def run(self, validate_every: int, save_every: int) -> None:
        """Train to the end, with progress, checkpoints and validation."""
        started, first = time.monotonic(), self.step
        recent: list[float] = []
        while self.step < self.settings.steps:
            recent.append(self.train_step())
            if self.step % 20 == 0:
                pace = (time.monotonic() - started) / (self.step - first)
                left = (self.settings.steps - self.step) * pace / 60
                print(
                    f"step {self.step}/{self.settings.steps} loss {np.mean(recent[-50:]):.3f} "
                    f"{self.settings.batch / pace:.0f} pairs/s, {left:.0f} min left",
                    flush=True,
                )
            if self.step % validate_every == 0 or self.step == self.settings.steps:
                figures = {"step": self.step, "minutes": (time.monotonic() - started) / 60, **self.validate()}
                self.folder.mkdir(parents=True, exist_ok=True)
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(figures) + "\n")
                print(figures, flush=True)
            if self.step % save_every == 0 or self.step == self.settings.steps:
                self.save()
        self.export()


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--out", type=Path, default=Path("work/clip"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=100)
    defaults = asdict(ClipSettings())
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = ClipSettings(**{name: getattr(arguments, name) for name in defaults})
    trainer = ClipTrainer(
        json.loads(arguments.config.read_text()), Corpus.load(arguments.corpus), settings, arguments.out
    )
    if arguments.resume:
        trainer.resume()
    trainer.run(arguments.validate_every, arguments.save_every)


if __name__ == "__main__":
    main()
