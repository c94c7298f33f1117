"""What the diffusion learns from: latents of the drawings, and what the towers say of them and of their captions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from services.encoding.clip import build_clip, read_clip_config
from services.encoding.texts import Tokenizer
from services.imaging.text_encoder import convert_text_tower, hidden_states
from training.compute import mixed, pick_device, pick_precision
from training.diffusion.drawings import Drawings, to_tensor
from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE, EmbeddingSet

HELD_OUT_SHARE = 0.08


def held_out_combinations(columns: dict[str, np.ndarray], share: float = HELD_OUT_SHARE) -> np.ndarray:
    """Return which drawings show a profession, gender and skin tone that the diffusion never sees together.

    A combination is held out by a hash of its words, with all its artists; each of the three is still seen with
    others. The towers did see them: only the generator must combine what it learnt apart.

    Parameters
    ----------
    columns : dict[str, np.ndarray]
        The corpus's columns.
    share : float
        Of the combinations.

    Returns
    -------
    np.ndarray
        bool [n].
    """
    keys = [
        "|".join(parts) if all(parts) else ""
        for parts in zip(columns["profession"], columns["gender"], columns["tone"], strict=True)
    ]
    chosen = {
        k: int(hashlib.sha256(k.encode()).hexdigest()[:8], 16) < share * 2**32 for k in set(keys) - {""}
    }
    return np.array([chosen.get(key, False) for key in keys])


def text_tower_fingerprint(weights: Path) -> str:
    """Return the SHA-256 (hex) of the text tower's tensors, by sorted name: all but the image tower and the scale."""
    digest = hashlib.sha256()
    with safe_open(weights, framework="numpy") as file:
        for name in sorted(file.keys()):
            if not name.startswith("visual.") and name != "logit_scale":
                digest.update(name.encode() + file.get_tensor(name).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Conditions:
    """The towers' side of the training set.

    Attributes
    ----------
    fingerprint, text_fingerprint : str
        Of the towers, and of the text tower alone.
    images : Tensor
        Raw image embeddings (not normalised), float32 [n, d].
    caption : Tensor
        Row of `texts` with the drawing's caption, int64 [n].
    captions : np.ndarray
        Distinct captions, str [t].
    texts : Tensor
        Raw text embeddings of the captions in each template, float32 [templates, t, d].
    states : Tensor
        The text tower's token states of the captions, float16 [t, context, width].
    empty : Tensor
        The same of the empty prompt, float16 [context, width].
    """

    fingerprint: str
    text_fingerprint: str
    images: Float[Tensor, "n d"]
    caption: Int[Tensor, " n"]
    captions: np.ndarray
    texts: Float[Tensor, "templates t d"]
    states: Float[Tensor, "t context width"]
    empty: Float[Tensor, "context width"]

    @classmethod
    def build(cls, clip: Path, embeddings: EmbeddingSet, rows: np.ndarray) -> Conditions:
        """Read the towers' embeddings of corpus `rows` and run the text tower over the captions.

        Parameters
        ----------
        clip : Path
            Folder of the towers, in open_clip's format.
        embeddings : EmbeddingSet
            By the same towers, of all `rows`.
        rows : np.ndarray
            Corpus rows, int64 [n].
        """
        config = read_clip_config(clip / CONFIG_FILE)
        encoder = convert_text_tower(build_clip(config, clip / WEIGHTS_FILE), config)
        tokens = torch.from_numpy(Tokenizer(config).tokenize(["", *embeddings.captions], True))
        states = hidden_states(encoder, tokens).half()
        position = np.full(int(embeddings.rows.max()) + 1, -1)
        position[embeddings.rows] = np.arange(len(embeddings.rows))
        index = position[rows]
        return cls(
            fingerprint=embeddings.fingerprint,
            text_fingerprint=text_tower_fingerprint(clip / WEIGHTS_FILE),
            images=torch.from_numpy(embeddings.images[index] * embeddings.image_norm[index, None]),
            caption=torch.from_numpy(embeddings.caption[index].astype(np.int64)),
            captions=embeddings.captions,
            texts=torch.from_numpy(embeddings.texts * embeddings.text_norm[..., None]),
            states=states[1:],
            empty=states[0],
        )

    def part(self, rows: slice) -> Conditions:
        """Return the same of some of the drawings."""
        return replace(self, images=self.images[rows], caption=self.caption[rows])

    def to(self, device: torch.device) -> Conditions:
        """Return the same with its tensors on `device`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def equaliser(self, shrink: float = 0.01) -> Float[Tensor, "d d"]:
        """Return the matrix that gives embeddings an identity second moment, (M + shrink tr(M) / d I)^-1/2.

        Embeddings of a small CLIP fill few of their dimensions: without this the UNet's first layer sees little but
        those. Second moment and not covariance, so that zeros stay zeros.
        Shrinkage keeps directions that carry only noise from being blown up.
        """
        both = torch.cat([self.images, self.texts[0]]).double()
        moment = both.T @ both / len(both)
        values, vectors = torch.linalg.eigh(moment)
        floor = shrink * (values.sum() - values.max()) / len(values)
        return (vectors * (values.clamp(min=0) + floor).rsqrt() @ vectors.T).float()


@torch.inference_mode()
def drawing_latents(vae_folder: Path, pixels: np.ndarray) -> Float[Tensor, "n latent h w"]:
    """Return the latents of drawings, uint8 [n, H, W, 3], float16; the encoder draws no noise."""
    device = pick_device()
    precision = pick_precision(device)
    vae = AutoencoderKL.from_pretrained(vae_folder).to(device).eval()
    parts = []
    for start in range(0, len(pixels), 64):
        images = to_tensor(pixels[start : start + 64]).to(device)
        with mixed(device, precision):
            mean = vae.encode(images).latent_dist.mode().float()
        parts.append((mean * vae.config.scaling_factor).half().cpu())
        if start // 64 % 50 == 49:
            print(f"encoded {start + 64} of {len(pixels)} drawings", flush=True)
    return torch.cat(parts)


@dataclass(frozen=True)
class DiffusionData:
    """Everything a training step draws from.

    Attributes
    ----------
    latents : Tensor
        Of the drawings that are trained on, float16 [n, latent, h, w].
    weights : Tensor
        How often each is drawn, up to a factor, float32 [n]. By concept and not by caption: each skin tone is a caption
        of its own, and people would be half of all samples.
    conditions : Conditions
        Of the same drawings.
    held_out_latents : Tensor
        Of the validation drawings, float16 [m, latent, h, w].
    held_out : Conditions
        Of the same.
    """

    latents: Float[Tensor, "n latent h w"]
    weights: Float[Tensor, " n"]
    conditions: Conditions
    held_out_latents: Float[Tensor, "m latent h w"]
    held_out: Conditions

    @classmethod
    def build(cls, drawings: Drawings, clip: Path, embeddings: Path, vae: Path, cache: Path) -> DiffusionData:
        """Encode the drawings of the training artists; latents are cached, as they do not depend on the towers.

        Parameters
        ----------
        drawings : Drawings
            Pictures and words.
        clip, embeddings, vae : Path
            The towers' folder, their embeddings (npz), the autoencoder's folder.
        cache : Path
            Where latents are kept.
        """
        train, validation = drawings.split("train"), drawings.split("validation")
        train = train[~held_out_combinations(drawings.columns)[train]]
        stamp = hashlib.sha256(
            json.dumps([drawings.rows[train].tolist(), drawings.rows[validation].tolist()]).encode()
            + (vae / "config.json").read_bytes()
            + _encoder_bytes(vae)
        ).hexdigest()
        kept = dict(np.load(cache)) if cache.exists() else {}
        if str(kept.get("stamp")) != stamp:
            print("encoding the drawings", flush=True)
            cache.parent.mkdir(parents=True, exist_ok=True)
            kept = {
                "train": drawing_latents(vae, drawings.pixels[train]).numpy(),
                "validation": drawing_latents(vae, drawings.pixels[validation]).numpy(),
            }
            np.savez(cache, stamp=stamp, **kept)
        known = EmbeddingSet.load(embeddings)
        both = Conditions.build(clip, known, drawings.rows[np.concatenate([train, validation])])
        split = len(train)
        _, which, counts = np.unique(
            drawings.columns["concept"][train], return_inverse=True, return_counts=True
        )
        weights = torch.from_numpy(counts[which] ** -0.5).float()
        return cls(
            torch.from_numpy(kept["train"]),
            weights,
            both.part(slice(0, split)),
            torch.from_numpy(kept["validation"]),
            both.part(slice(split, None)),
        )


def _encoder_bytes(vae: Path) -> bytes:
    from safetensors.torch import load_file

    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    return b"".join(
        v.float().numpy().tobytes() for k, v in sorted(weights.items()) if k.startswith("encoder.")
    )
