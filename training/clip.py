"""Train the embedded CLIP from scratch on the emoji corpus.

``python -m training.clip`` trains, ``--resume`` goes on from the last checkpoint; the result is an open_clip
model: a config JSON and safetensors. Two phases, for a machine with few cores:

1. The image tower learns with captions that are sums of word vectors (`training.caption_words`), by CLIP's
   contrastive loss over *every* caption of the emoji at every step. The same caption twice is never its own
   negative, and a picture that lost its colour is not held against the captions of its concept that name a tone.
   The joint embedding is standardised over the batch (batch normalisation without parameters, folded into the
   projection at the end), or it collapses to a dozen directions. Most steps run at a low resolution, which costs
   a fraction, and augmentation grows from weak to strong.
2. The text transformer learns to embed captions, in templates and in pairs, where their words' sums lie
   (`training.text_tower`).
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
from torch import Tensor, nn

from training.augment import Augment, AugmentSettings
from training.caption_words import CaptionWords
from training.contrastive import contrastive_loss, encode_text
from training.corpus.build import DEFAULT_DIR
from training.pairs import TEMPLATES, Batch, Corpus, PairSampler
from training.retrieval import bootstrap_auc, gender_score, participation_ratio, retrieval
from training.text_tower import TextDistiller, start_as_a_sum

CONFIG = Path(__file__).parent / "configs" / "emoji_clip.json"


@dataclass(frozen=True)
class ClipSettings:
    """Hyperparameters of a run.

    Parameters
    ----------
    steps, batch : int
        Optimiser steps of the image tower, and pairs a step.
    image_lr, word_lr : float
        Peak learning rates of the image tower and of the word vectors.
    weight_decay : float
        On matrices and filters only.
    warm_up, decay : float
        Shares of the steps with a rising and a falling rate.
    low_resolution : int
        Pixels a side during the first `low_share` of the steps.
    weak, strong, strong_from : float
        Strength of the augmentation at the start and in the end, and the share of the steps after which it is
        strong.
    text_weight : float
        Of the loss from caption to image, against the loss from image to caption.
    gender_weight, gender_from : float
        Of the loss that tells "woman" from "man", and the share of the steps after which it joins.
    emoji_share : float
        Share of a batch that comes from the training artists; the rest is line art.
    text_steps, text_batch : int
        Optimiser steps of the text tower, and texts a step.
    text_lr : float
        Peak learning rate of the text tower.
    without : str
        A set to leave out (leave-one-artist-out runs), or empty.
    seed : int
        Of weights, samples and augmentation.
    """

    steps: int = 3200
    batch: int = 128
    image_lr: float = 2e-3
    word_lr: float = 2e-3
    weight_decay: float = 0.05
    warm_up: float = 0.05
    decay: float = 0.4
    low_resolution: int = 32
    low_share: float = 0.8
    weak: float = 0.3
    strong: float = 0.7
    strong_from: float = 0.5
    text_weight: float = 0.3
    gender_weight: float = 0.5
    gender_from: float = 0.6
    emoji_share: float = 0.75
    text_steps: int = 400
    text_batch: int = 256
    text_lr: float = 1e-3
    without: str = ""
    seed: int = 0


def build_model(config: dict) -> open_clip.CLIP:
    """Return a randomly initialised open_clip model of a config's ``model_cfg``."""
    return open_clip.CLIP(**{k: v for k, v in config["model_cfg"].items() if k != "custom_text"})


@torch.no_grad()
def fold_standardisation(projection: nn.Linear, standardise: nn.BatchNorm1d) -> None:
    """Make `projection` do what `standardise` does after it in evaluation: (W x + b - mean) / std."""
    std = (standardise.running_var + standardise.eps).sqrt()
    projection.weight /= std[:, None]
    projection.bias.copy_((projection.bias - standardise.running_mean) / std)


class ClipTrainer:
    """Holds the model, the optimiser and the sampler of one run.

    Parameters
    ----------
    config : dict
        open_clip's config JSON; the image tower is a timm trunk with a linear projection that has a bias.
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
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        augment = Augment(AugmentSettings(), torch.Generator().manual_seed(settings.seed))
        self.sampler = PairSampler(corpus, augment, settings.emoji_share, settings.without)
        self.words = self._caption_words().to(self.device)
        self.standardise = nn.BatchNorm1d(config["model_cfg"]["embed_dim"], affine=False, momentum=0.05)
        self.standardise.to(self.device)
        self.optimiser = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98), eps=1e-6)
        self.step = 0
        self.text_is_trained = False

    def _caption_words(self) -> CaptionWords:
        columns, sampler = self.corpus.columns, self.sampler
        rows = np.concatenate([sampler.emoji, sampler.icons])
        captions, first = np.unique(
            np.concatenate([columns["caption"][rows], columns["concept"][rows]]), return_index=True
        )
        concepts = np.concatenate([columns["concept"][rows]] * 2)[first]
        _, self._concepts = np.unique(concepts, return_inverse=True)
        self._genders = np.concatenate([columns["gender"][rows]] * 2)[first]
        drawn = np.concatenate([columns["caption"][sampler.emoji], columns["concept"][sampler.emoji]])
        self._emoji_captions = np.flatnonzero(np.isin(captions, drawn))
        return CaptionWords(
            captions, [self.tokenizer.encode(c) for c in captions], self.config["model_cfg"]["embed_dim"]
        )

    def _groups(self) -> list[dict]:
        s = self.settings
        matrices = [p for p in self.model.visual.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.visual.parameters() if p.ndim <= 1]
        words = [self.words.vectors.weight, self.model.logit_scale]
        return [
            {"params": matrices, "peak": s.image_lr, "weight_decay": s.weight_decay},
            {"params": vectors, "peak": s.image_lr, "weight_decay": 0.0},
            {"params": words, "peak": s.word_lr, "weight_decay": 0.0},
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

    def encode_images(self, images: Tensor) -> Tensor:
        """Return unit, standardised embeddings of images in [0, 1], float32 [n, d]."""
        return F.normalize(self.standardise(self.model.encode_image(self.normalise(images))), dim=-1)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of one batch: against all captions of the emoji and those of its icons."""
        own = self.words.positions(np.asarray(batch.captions))
        rows = np.union1d(self._emoji_captions, own)
        target = np.searchsorted(rows, own)
        concepts = self._concepts[rows]
        ignore = batch.toneless[:, None] & (self._concepts[own][:, None] == concepts[None, :])
        ignore[np.arange(len(own)), target] = False
        images = self.encode_images(batch.images.to(self.device))
        scale = self.model.logit_scale.clamp(max=np.log(100.0)).exp()
        loss = contrastive_loss(
            images,
            self.words(rows),
            torch.from_numpy(target).to(self.device),
            torch.from_numpy(ignore).to(self.device),
            scale,
            self.settings.text_weight,
        )
        if self.step >= self.settings.gender_from * self.settings.steps:
            loss = loss + self.settings.gender_weight * self.gender_loss(images, self._genders[own], scale)
        return loss

    def gender_loss(self, images: Tensor, genders: np.ndarray, scale: Tensor) -> Tensor:
        """Return the cross-entropy of "woman" against "man" alone, over the pictures whose captions say which.

        Among thousands of captions, the two of one profession are told apart last; on their own they are not.
        """
        gendered = np.isin(genders, ("woman", "man"))
        if not gendered.any():
            return images.new_zeros(())
        man, woman = self.words.embed([self.tokenizer.encode("man"), self.tokenizer.encode("woman")])
        logit = scale * images[torch.from_numpy(gendered).to(self.device)] @ (woman - man)
        is_woman = torch.from_numpy(genders[gendered] == "woman").to(self.device, logit.dtype)
        return F.binary_cross_entropy_with_logits(logit, is_woman)

    def train_step(self) -> float:
        """Take one optimiser step and return the loss."""
        s = self.settings
        self.model.train()
        self.standardise.train()
        growth = min(1.0, self.step / (s.steps * s.strong_from))
        self.sampler.augment.settings = AugmentSettings().scaled(s.weak + (s.strong - s.weak) * growth)
        batch = self.sampler.batch(s.batch, self.resolution())
        loss = self.loss(batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimiser.param_groups[0]["params"], 5.0)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * self.rate()
        self.optimiser.step()
        self.step += 1
        return float(loss.detach())

    @torch.inference_mode()
    def embed_texts(self, captions: list[str], templates: tuple[str, ...] = TEMPLATES) -> Tensor:
        """Return unit text embeddings, float32 [n, d]: the mean over templates, renormalised.

        While the text tower is untrained, captions are the sums of their words.
        """
        if not self.text_is_trained:
            return self.words.embed([self.tokenizer.encode(caption) for caption in captions])
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

        At the resolution of this step: the statistics of the other one are not those that normalisation learnt.
        """
        self.model.eval()
        self.standardise.eval()
        size = self.resolution()
        parts = []
        for start in range(0, len(rows), 256):
            drawn = torch.from_numpy(self.corpus.plain[rows[start : start + 256]])
            pixels = drawn.permute(0, 3, 1, 2).float() / 255
            if size != self.size:
                pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
            parts.append(self.encode_images(pixels.to(self.device)))
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
            "dimensions": participation_ratio(images),
        }

    def save(self) -> None:
        """Write a checkpoint; the previous one is replaced only when the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.part"
        state = {
            "model": self.model.state_dict(),
            "words": self.words.state_dict(),
            "standardise": self.standardise.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.sampler.augment.generator.get_state(),
            "step": self.step,
        }
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
        for name in ("model", "words", "standardise", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        self.sampler.augment.generator.set_state(state["generator"].cpu())
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

    def train_images(self, validate_every: int, save_every: int) -> None:
        """Train the image tower to the end, with progress, checkpoints and validation."""
        started, first = time.monotonic(), self.step
        recent: list[float] = []
        while self.step < self.settings.steps:
            recent.append(self.train_step())
            if self.step % 20 == 0:
                pace = (time.monotonic() - started) / (self.step - first)
                print(
                    f"step {self.step}/{self.settings.steps} loss {np.mean(recent[-50:]):.3f} "
                    f"{self.settings.batch / pace:.0f} pairs/s",
                    flush=True,
                )
            if self.step % validate_every == 0 or self.step == self.settings.steps:
                self.log({"step": self.step, "minutes": (time.monotonic() - started) / 60})
            if self.step % save_every == 0 or self.step == self.settings.steps:
                self.save()
        fold_standardisation(self.model.visual.head.proj, self.standardise)
        self.standardise = nn.Identity()

    def train_texts(self) -> None:
        """Train the text tower; short enough to start anew when it is cut."""
        s = self.settings
        start_as_a_sum(self.model, self.words)
        # Three to one: the captions that retrieval asks for against the many names of icons.
        weights = np.where(np.isin(np.arange(len(self.words.captions)), self._emoji_captions), 3.0, 1.0)
        distiller = TextDistiller(
            self.model, self.words, weights, TEMPLATES, s.text_steps, s.text_batch, s.text_lr, s.seed
        )
        started = time.monotonic()
        recent: list[float] = []
        self.text_is_trained = True
        self.model.train()
        while distiller.step < s.text_steps:
            recent.append(distiller.train_step())
            if distiller.step % 50 == 0:
                print(
                    f"text step {distiller.step}/{s.text_steps} 1 - cosine {np.mean(recent[-50:]):.4f}",
                    flush=True,
                )
        self.log(
            {"step": self.step, "text_step": distiller.step, "minutes": (time.monotonic() - started) / 60}
            | {"text_error": float(np.mean(recent[-50:]))}
        )

    def log(self, progress: dict[str, float]) -> None:
        """Validate, print the figures and append them to the log."""
        figures = progress | self.validate()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(figures) + "\n")
        print(figures, flush=True)


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
    trainer.train_images(arguments.validate_every, arguments.save_every)
    trainer.train_texts()
    trainer.export()


if __name__ == "__main__":
    main()
