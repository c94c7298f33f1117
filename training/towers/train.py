"""Train the embedded CLIP from scratch on the emoji corpus.

``python -m training.clip`` trains, ``--resume`` goes on from the last checkpoint; the result is an open_clip
model: a config JSON and safetensors. Three phases, for a machine with few cores:

1. The image tower learns with captions that are sums of word vectors (`training.caption_words`), by CLIP's
   contrastive loss over *every* caption of the emoji at every step. The same caption twice is never its own
   negative, and a picture that lost its colour is not held against the captions of its concept that name a tone.
   The joint embedding is standardised over the batch (batch normalisation without parameters, folded into the
   projection at the end), or it collapses to a dozen directions. Most steps run at a low resolution, which costs
   a fraction, and augmentation grows from weak to strong.
2. The text transformer learns to embed captions, in templates and in pairs, where their words' sums lie
   (`training.text_tower`).
3. The image tower is tuned at full resolution to the text transformer's own captions, which stay fixed (locked-text
   tuning, the mirror of Zhai et al., 2022): what the change of resolution and the distillation cost is won back, and
   whatever reads the text tower need not be trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from training.augment import Augment, AugmentSettings
from training.caption_words import CaptionWords
from training.clip_settings import ClipSettings
from training.contrastive import contrastive_loss, encode_text, two_caption_loss
from training.corpus.build import DEFAULT_DIR
from training.pairs import TEMPLATES, Batch, Corpus, PairSampler
from training.retrieval import auc_interval, gender_score, participation_ratio, retrieval
from training.text_tower import TextDistiller, start_as_a_sum

CONFIG = Path(__file__).parent / "configs" / "emoji_clip.json"


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
        # The text tower's embeddings of every caption and of the two genders, once it is trained.
        self.captions: Tensor | None = None
        self.man_and_woman: Tensor | None = None
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
        s = self.settings
        if self.step < s.steps:
            progress = self.step / s.steps
            return min(1.0, (progress + 1e-3) / s.warm_up, (1.0 - progress) / s.decay)
        progress = (self.step - s.steps) / s.tune_steps
        return s.tune_lr / s.image_lr * min((progress + 1e-3) / s.warm_up, 1.0 - progress)

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
            self.words(rows) if self.captions is None else self.captions[rows],
            torch.from_numpy(target).to(self.device),
            torch.from_numpy(ignore).to(self.device),
            scale,
            self.settings.text_weight,
        )
        if self.step >= self.settings.gender_from * self.settings.steps:
            loss = loss + self.settings.gender_weight * self.gender_loss(images, self._genders[own], scale)
        return loss

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
        if self.captions is None and not self.text_is_trained:
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
        auc = auc_interval(gender_score(images[known], man, woman), gender[known] == "woman")
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
            "text_is_trained": self.captions is not None,
        }
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
        if state["text_is_trained"]:
            self.standardise = nn.Identity()
        for name in ("model", "words", "standardise", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        self.sampler.augment.generator.set_state(state["generator"].cpu())
        self.step = state["step"]
        if state["text_is_trained"]:
            self.fix_captions()

    def fix_captions(self) -> None:
        """Embed every caption by the text tower, which stays as it is from here on."""
        self.text_is_trained = True
        self.captions = self.embed_texts(self.words.captions.tolist()).clone()
        self.man_and_woman = self.embed_texts(["man", "woman"]).clone()

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

    def train_images(self, until: int, validate_every: int, save_every: int) -> None:
        """Train the image tower until step `until`, with progress, checkpoints and validation."""
        started, first = time.monotonic(), self.step
        recent: list[float] = []
        while self.step < until:
            recent.append(self.train_step())
            if self.step % 20 == 0:
                pace = (time.monotonic() - started) / (self.step - first)
                print(
                    f"step {self.step}/{until} loss {np.mean(recent[-50:]):.3f} "
                    f"{self.settings.batch / pace:.0f} pairs/s",
                    flush=True,
                )
            if self.step % validate_every == 0 or self.step == until:
                self.log({"step": self.step, "minutes": (time.monotonic() - started) / 60})
            if self.step % save_every == 0 or self.step == until:
                self.save()

    def train_texts(self) -> None:
        """Fold the standardisation and train the text tower; short enough to start anew when it is cut."""
        fold_standardisation(self.model.visual.head.proj, self.standardise)
        self.standardise = nn.Identity()
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
    trainer.train_images(settings.steps, arguments.validate_every, arguments.save_every)
    if trainer.captions is None:
        trainer.train_texts()
        trainer.fix_captions()
    trainer.train_images(settings.steps + settings.tune_steps, arguments.validate_every, arguments.save_every)
    trainer.export()


if __name__ == "__main__":
    main()
