"""Dictionaries in SAELens's format: a folder with ``cfg.json`` and ``sae_weights.safetensors``.

The format alone; SAELens itself is not needed. Its autoencoders are of one input,

    z = activation((x - b_dec) W_enc + b_enc),    x_hat = z W_dec + b_dec,

where x is a unit embedding here. A shared dictionary has a pre-bias a modality, so it is written as two folders,
``image`` and ``text``, and read from either two or one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from services.dictionaries.base import Dictionary, Modality
from services.dictionaries.pair import SAEPair
from services.dictionaries.sae import SAE
from services.errors import UnsupportedModel
from services.weights import load_weights

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
# Saved after training, BatchTopK and Matryoshka autoencoders are JumpReLU ones already.
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
_TENSORS = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
# Lengths of decoder rows that float32 and its sums leave of 1.
_UNIT = 1e-5
_THRESHOLDS = ("threshold", "log_threshold", "topk_threshold")


@dataclass(frozen=True)
class _Parts:
    """An autoencoder in our form, decoder rows of length 1.

    Attributes
    ----------
    threshold
        None for TopK.
    scale
        What TopK multiplies its activations with when it has chosen them; all 1 where nothing is to be done.
    """

    pre_bias: Float[Tensor, " d"]
    encoder: Float[Tensor, "d n"]
    bias: Float[Tensor, " n"]
    decoder: Float[Tensor, "n d"]
    threshold: Float[Tensor, " n"] | None
    scale: Float[Tensor, " n"]
    k: int

    @property
    def scaled(self) -> bool:
        """Whether `scale` does anything."""
        return not bool((self.scale == 1).all())

    def shares_features_with(self, other: _Parts) -> bool:
        """Return whether only the pre-biases differ."""
        pairs = [
            (self.encoder, other.encoder), (self.bias, other.bias), (self.decoder, other.decoder),
            (self.scale, other.scale),
        ]  # fmt: skip
        if (self.threshold is None) != (other.threshold is None) or self.k != other.k:
            return False
        if self.threshold is not None and other.threshold is not None:
            pairs.append((self.threshold, other.threshold))
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)

    def sae(self, text: _Parts | None = None, scaled: bool = False) -> SAE:
        """Return the dictionary, with the pre-bias of `text` for texts, and with a scale where it has to have one."""
        n, d = self.decoder.shape
        scaled = scaled or self.scaled
        made = SAE(d, n, self.k, "topk" if self.threshold is None else "jump-relu", scaled)
        state = {
            "encoder": self.encoder,
            "encoder_bias": self.bias,
            "decoder": self.decoder,
            "pre_bias_image": self.pre_bias,
            "pre_bias_text": (text or self).pre_bias,
            "threshold": torch.zeros(()) if self.threshold is None else self.threshold,
            **({"scale": self.scale} if scaled else {}),
        }
        made.load_state_dict(state)
        return made.eval().requires_grad_(False)


def read_saelens(folder: Path) -> SAE | SAEPair:
    """Read an autoencoder, or the two of a folder with ``image`` and ``text``.

    Returns
    -------
    SAE or SAEPair
        In eval mode, float32. Two autoencoders that differ in their pre-biases alone are one `SAE`; features j of any
        other two are taken to belong together.

    Raises
    ------
    UnsupportedModel
        Where the files are not of the format, or ask for what a `Dictionary` here does not do.
    """
    sides = [folder / modality.value for modality in (Modality.IMAGE, Modality.TEXT)]
    if not all((side / CONFIG).is_file() for side in sides):
        return _read(folder).sae()
    image, text = map(_read, sides)
    if image.shares_features_with(text):
        return image.sae(text)
    if image.decoder.shape != text.decoder.shape or image.k != text.k:
        raise UnsupportedModel(f"{folder.name}: image and text must be of one size and one k")
    if (image.threshold is None) != (text.threshold is None):
        raise UnsupportedModel(f"{folder.name}: image and text must be of one architecture")
    scaled = image.scaled or text.scaled
    return _pair(image.sae(scaled=scaled), text.sae(scaled=scaled))


def write_saelens(dictionary: Dictionary, folder: Path, *, model_name: str = "") -> list[Path]:
    """Write a dictionary as ``<folder>/image`` and ``<folder>/text``.

    Parameters
    ----------
    dictionary
        A `SAE` or `SAEPair`.
    folder
        Made if absent.
    model_name
        Of the towers, for the metadata.

    Returns
    -------
    list of Path
        The folders.

    Raises
    ------
    UnsupportedModel
        For a kind that the format cannot hold.
    """
    if not isinstance(dictionary, SAE | SAEPair):
        raise UnsupportedModel(f"a dictionary of kind {dictionary.kind} has no form in SAELens's format")
    written = []
    for modality in (Modality.IMAGE, Modality.TEXT):
        sae = dictionary.side(modality) if isinstance(dictionary, SAEPair) else dictionary
        target = folder / modality.value
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            "W_enc": sae.encoder,
            "b_enc": sae.encoder_bias,
            # SAELens scales what was chosen by the decoder alone.
            "W_dec": sae.decoder * sae.scale[:, None] if sae.scaled else sae.decoder,
            "b_dec": sae.pre_bias(modality),
        }
        if sae.activation != "topk":
            # A threshold for all features is one for each.
            tensors["threshold"] = sae.threshold.expand(sae.n_features)
        state = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
        (target / WEIGHTS).write_bytes(safetensors.torch.save(state))
        document = json.dumps(_config(sae, modality, model_name), indent=1)
        (target / CONFIG).write_text(document + "\n", encoding="utf-8")
        written.append(target)
    return written


def _config(sae: SAE, modality: Modality, model_name: str) -> dict[str, Any]:
    topk = sae.activation == "topk"
    return {
        "architecture": "topk" if topk else "jumprelu",
        "d_in": sae.embed_dim,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if topk else {}),
        "metadata": {"model_name": model_name, "hook_name": f"{modality.value}_embedding, of length 1"},
    }


def _pair(image: SAE, text: SAE) -> SAEPair:
    pair = SAEPair(**image.config())
    pair.image.load_state_dict(image.state_dict())
    pair.text.load_state_dict(text.state_dict())
    return pair.eval().requires_grad_(False)


def _read(folder: Path) -> _Parts:
    config, state = _read_files(folder)
    d, n = _sizes(folder, config)
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    for name, shape in shapes.items():
        if name not in state or tuple(state[name].shape) != shape:
            found = tuple(state[name].shape) if name in state else "missing"
            raise UnsupportedModel(f"{folder.name}: {name} is {found}, not of shape {shape}")
    unknown = sorted(set(state) - _TENSORS - set(_THRESHOLDS))
    if unknown:
        raise UnsupportedModel(f"{folder.name}: does not know what to do with {', '.join(unknown)}")
    architecture, k = _architecture(folder, config)
    encoder, decoder, pre_bias, bias = (state[name] for name in ("W_enc", "W_dec", "b_dec", "b_enc"))
    threshold = None if architecture == "topk" else _threshold(folder, architecture, state, n)
    if config.get("normalize_activations") == "constant_norm_rescale":
        # An embedding has length 1, so the factor is the same for all: sqrt(d), undone after decoding.
        factor = math.sqrt(d)
        encoder, decoder, pre_bias = encoder * factor, decoder / factor, pre_bias / factor
    if config.get("apply_b_dec_to_input") is False:
        # The encoder is given x itself; here it is given x - b.
        bias = bias + pre_bias @ encoder
    return _fold(pre_bias, encoder, bias, decoder, threshold, k or n, config, "topk_threshold" in state)


def _fold(
    pre_bias: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, threshold: Tensor | None, k: int,
    config: dict[str, Any], learnt: bool,
) -> _Parts:  # fmt: skip
    """Give decoder rows length 1, and the activations what the rows had.

    Energies, labels and strengths compare activations with one another, which means something only where each is the
    length that its feature adds to an embedding.

    Parameters
    ----------
    pre_bias, encoder, bias, decoder, threshold, k
        Of embeddings of length 1: `normalize_activations` and `apply_b_dec_to_input` are folded in.
    config
        Of SAELens.
    learnt
        Whether the threshold is a checkpoint's `topk_threshold`.
    """
    rescaled = bool(config.get("rescale_acts_by_decoder_norm"))
    norms = decoder.norm(dim=-1)
    # A feature that adds nothing keeps its activations, unless SAELens itself makes them zero. Rows that are of length
    # 1 but for their rounding stay as they are, so that a dictionary comes back with the same bytes.
    kept = (norms - 1).abs() < _UNIT
    kept |= (norms == 0) & (not rescaled)
    norms = torch.where(kept, 1.0, norms)
    decoder = decoder / torch.where(norms == 0, 1.0, norms)[:, None]
    scale = torch.ones_like(norms)
    if threshold is None and not rescaled:
        # The k largest are chosen before they are given their length.
        scale = norms
    else:
        encoder, bias = encoder * norms, bias * norms
    if threshold is not None and learnt and rescaled:
        # Learnt on activations that had the length of rows, and on inputs that had length sqrt(d).
        constant = config.get("normalize_activations") == "constant_norm_rescale"
        threshold = threshold / math.sqrt(len(pre_bias)) if constant else threshold
    elif threshold is not None:
        threshold = threshold * norms
    return _Parts(pre_bias, encoder, bias, decoder, threshold, scale, k)


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{folder.name}: no {CONFIG} and {WEIGHTS} to read: {error}") from error
    state = load_weights(folder / WEIGHTS, "pt")
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{folder.name}: {CONFIG} is not an object")
    for key, allowed in (
        ("normalize_activations", (None, False, "none", "constant_norm_rescale")),
        ("reshape_activations", (None, "none")),
        ("hook_z", (None, False)),
        ("finetuning_scaling_factor", (None, False)),
        ("activation_fn_str", (None, "relu", "topk")),
        ("activation_fn", (None, "relu", "topk")),
    ):
        if config.get(key) not in allowed:
            raise UnsupportedModel(f"{folder.name}: {key} {config[key]!r} is not supported")
    floats = {name: tensor.float() for name, tensor in state.items()}
    bad = sorted(name for name, tensor in floats.items() if not torch.isfinite(tensor).all())
    if bad:
        raise UnsupportedModel(f"{folder.name}: not all finite: {', '.join(bad)}")
    return config, floats


def _sizes(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    sizes = config.get("d_in"), config.get("d_sae")
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UnsupportedModel(f"{folder.name}: d_in and d_sae are sizes, not {sizes}")
    return int(sizes[0] or 0), int(sizes[1] or 0)


def _architecture(folder: Path, config: dict[str, Any]) -> tuple[str, int | None]:
    """Return the architecture and the k of a TopK one."""
    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{folder.name}: architecture {architecture!r}; {', '.join(ARCHITECTURES)} can be represented"
        )
    # Older files say it of the activation function.
    old = "topk" in (config.get("activation_fn_str"), config.get("activation_fn"))
    if architecture == "standard" and old:
        architecture = "topk"
    if architecture != "topk":
        return architecture, None
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if not isinstance(k, int) or not 1 <= k <= config["d_sae"]:
        raise UnsupportedModel(f"{folder.name}: k is from 1 to d_sae, not {k!r}")
    return architecture, k


def _threshold(folder: Path, architecture: str, state: dict[str, Tensor], n: int) -> Float[Tensor, " n"]:
    found = [name for name in _THRESHOLDS if name in state]
    if architecture == "standard" and not found:
        return torch.zeros(n)
    if architecture == "standard" or len(found) != 1:
        raise UnsupportedModel(
            f"{folder.name}: a {architecture} autoencoder has {'no' if architecture == 'standard' else 'one'} "
            f"threshold; this one has {', '.join(found) or 'none'}"
        )
    value = state[found[0]]
    value = value.exp() if found[0] == "log_threshold" else value
    if value.numel() not in (1, n):
        raise UnsupportedModel(f"{folder.name}: {found[0]} has {value.numel()} values for {n} features")
    # Negative pre-activations are zero whatever the threshold.
    return value.reshape(-1).expand(n).clamp_min(0).contiguous()
