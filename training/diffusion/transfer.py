"""Bring a trained text-to-image model over to other towers.

``python -m training.diffusion.transfer --teacher bundles/emoji --teacher-embeddings OLD.npz`` starts from the pipeline
of a bundle with other towers and leaves a checkpoint that ``training.diffusion.export`` takes; ``--resume`` goes on. A
model that was trained for hours on one pair of towers needs minutes on the next:

1. What reads the towers is fitted in closed form: the cross-attention's keys and values, and the first layer of the
   class embedding, by least squares from the new towers' outputs to the old ones'; then the whole class embedding is
   trained to give what the teacher's gives for the same drawing or caption.
2. The layers that tell the UNet what to draw (`CONDITIONING`) learn to have it predict what the teacher predicts for
   the same noisy drawing; how things are drawn stays as it is. The teacher's v has not the noise that the data's has,
   so that a step teaches more, and it knows what belongs to an embedding between two drawings, where steering goes.

``--start BUNDLE --layers all`` goes on from a pipeline of the new towers instead, with every layer.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from training.compute import pick_device, pick_precision
from training.diffusion.data import DiffusionData
from training.diffusion.drawings import Drawings
from training.diffusion.model import DiffusionSettings, build_optimisers
from training.diffusion.train import DiffusionTrainer, add_paths

DEFAULTS = DiffusionSettings(steps=1000, batch=64, lr=1e-3, decay=0.8, mixed_share=0.3, average=0.99)
# Cross-attention, the class embedding, and what scales and shifts every block by it.
CONDITIONING = ("attn2.", "class_embedding.", "time_emb_proj.")


def least_squares(
    inputs: Float[Tensor, "n a"], targets: Float[Tensor, "n b"], ridge: float = 1e-4
) -> Float[Tensor, "a b"]:
    """Return M of least ||inputs M - targets||^2 + ridge tr(inputs^T inputs) / a ||M||^2."""
    x, y = inputs.double(), targets.double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.trace() / len(gram))
    return torch.linalg.solve(gram, x.T @ y).float()


class TransferTrainer(DiffusionTrainer):
    """Trains on the predictions of a teacher that sees the same drawings through other towers.

    Parameters
    ----------
    data : DiffusionData
        By the new towers.
    teacher : DiffusionTrainer
        Its UNet takes raw embeddings (its equaliser is the identity); its data are the same drawings, by its towers.
    settings, folder, device, precision
        Of `DiffusionTrainer`.
    layers : tuple[str, ...]
        Those whose names hold one of these are trained.
    """

    def __init__(
        self,
        data: DiffusionData,
        teacher: DiffusionTrainer,
        settings: DiffusionSettings,
        folder: Path,
        device: torch.device,
        precision: torch.dtype,
        layers: tuple[str, ...] = CONDITIONING,
    ) -> None:
        super().__init__(data, settings, folder, device, precision)
        if not (self.conditions.captions == teacher.conditions.captions).all():
            raise ValueError("the two sets of embeddings are not of the same captions")
        self.teacher = teacher
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(any(part in name for part in layers))
        self.optimisers = build_optimisers(self.unet, settings)

    def batch_loss(self, index: Tensor) -> Tensor:
        """Return the mean squared difference to the teacher's v for the drawings of `index`."""
        # Both draw the same: which drawing is told how, and which sibling stands for it.
        same = self.generator.clone_state()
        states, labels = self.conditioning(self.conditions, index, self.generator)
        teacher_states, teacher_labels = self.teacher.conditioning(self.teacher.conditions, index, same)
        noisy, times, _ = self.noised(self.latents[index], self.generator)
        with torch.no_grad():
            target = self.teacher.predict(noisy, times, teacher_states, teacher_labels)
        return F.mse_loss(self.predict(noisy, times, states, labels), target)

    @torch.no_grad()
    def start_from(self, bundle: Path) -> None:
        """Take the weights of a bundle's pipeline that was trained on these towers.

        Raises
        ------
        ValueError
            Where it holds other towers.
        """
        entry = json.loads((bundle / "diffusion" / "monofacet.json").read_text())
        if entry["tower_fingerprint"] != self.conditions.fingerprint:
            raise ValueError(f"{bundle} was not trained on these towers")
        unet = UNet2DConditionModel.from_pretrained(bundle / "diffusion" / "unet", torch_dtype=torch.float32)
        first, d = unet.class_embedding.linear_1, len(self.equaliser)
        # A pipeline's UNet takes raw embeddings.
        back = torch.linalg.inv(self.equaliser.cpu().double())
        first.weight[:, :d] = (first.weight[:, :d].double() @ back.T).float()
        self.unet.load_state_dict(unet.state_dict())

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Take the teacher's weights, with what reads the towers fitted to the new ones by least squares."""
        self.unet.load_state_dict(self.teacher.unet.state_dict())
        new, old = self.conditions, self.teacher.conditions
        states, old_states = (_token_rows(c.states, c.empty) for c in (new, old))
        through = least_squares(states, old_states)
        for name, module in self.unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                module.weight.copy_(module.weight @ through.T)
        embeddings, old_embeddings = (torch.cat([c.images, c.texts.flatten(0, 1)]) for c in (new, old))
        first, known = self.unet.class_embedding.linear_1, self.teacher.unet.class_embedding.linear_1
        d, old_d = embeddings.shape[1], old_embeddings.shape[1]
        through = least_squares(embeddings @ self.equaliser, old_embeddings)
        first.weight[:, :d] = known.weight[:, :old_d] @ through.T

    def fit_class_embedding(self, steps: int, batch: int = 512, lr: float = 1e-3) -> tuple[float, float]:
        """Train the class embedding to give the teacher's, for drawings and captions alike.

        Returns
        -------
        tuple[float, float]
            Share of the variance over drawings held out that is not explained, before and after.
        """
        own, other = self.unet.class_embedding, self.teacher.unet.class_embedding
        optimiser = torch.optim.AdamW(own.parameters(), lr=lr, weight_decay=0.01)
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        before = self._unexplained()
        for step in range(steps):
            index = torch.multinomial(self.weights, batch, generator=generator)
            same = generator.clone_state()
            _, labels = self.conditioning(self.conditions, index, generator)
            _, teacher_labels = self.teacher.conditioning(self.teacher.conditions, index, same)
            with torch.no_grad():
                target = other(teacher_labels)
            loss = F.mse_loss(own(labels), target)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimiser.step()
        return before, self._unexplained()

    @torch.no_grad()
    def _unexplained(self) -> float:
        zeros = torch.zeros(len(self.held_out.images), dtype=torch.int64, device=self.device)
        quiet = torch.Generator(self.device).manual_seed(0)
        target = self.teacher.unet.class_embedding(
            self.teacher.class_vector(self.teacher.held_out.images, zeros, quiet)
        )
        found = self.unet.class_embedding(self.class_vector(self.held_out.images, zeros, quiet))
        return float((found - target).square().sum() / (target - target.mean(0)).square().sum())


def _token_rows(states: Tensor, empty: Tensor, share: float = 0.2) -> Tensor:
    """Return token states as rows, float32; those of the empty prompt weigh `share` of the captions' together.

    Most samples see the empty prompt, which is one row among thousands.
    """
    weight = (share * len(states)) ** 0.5
    return torch.cat([states.float(), weight * empty.float().unsqueeze(0)]).flatten(0, 1)


def load_teacher(
    bundle: Path, drawings: Drawings, embeddings: Path, arguments: argparse.Namespace
) -> DiffusionTrainer:
    """Return the pipeline of `bundle` as a trainer that is not trained: it predicts.

    Parameters
    ----------
    bundle : Path
        Its ``clip/`` made `embeddings`, and its ``diffusion/`` is the teacher.
    drawings, embeddings, arguments
        The corpus; by the teacher's towers; the paths and the device of the command line.
    """
    vae, device = arguments.autoencoder / "vae", pick_device(arguments.device)
    data = DiffusionData.build(drawings, bundle / "clip", embeddings, vae, arguments.out / "latents.npz")
    teacher = DiffusionTrainer(
        data, DEFAULTS, arguments.out, device, pick_precision(device, arguments.precision)
    )
    unet = UNet2DConditionModel.from_pretrained(bundle / "diffusion" / "unet", torch_dtype=torch.float32)
    teacher.unet = unet.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    # A pipeline's UNet takes raw embeddings.
    teacher.equaliser = torch.eye(len(teacher.equaliser), device=device)
    return teacher


def main() -> None:
    """Transfer from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_paths(parser)
    parser.add_argument(
        "--teacher", type=Path, default=Path("bundles/emoji"), help="a bundle with a pipeline"
    )
    parser.add_argument("--teacher-embeddings", type=Path, required=True, help="by the teacher's towers")
    parser.add_argument("--start", type=Path, help="a bundle of the new towers whose pipeline is trained on")
    parser.add_argument("--layers", choices=("conditioning", "all"), default="conditioning")
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps)
    parser.add_argument("--batch", type=int, default=DEFAULTS.batch)
    parser.add_argument("--lr", type=float, default=DEFAULTS.lr)
    parser.add_argument("--fit-steps", type=int, default=3000, help="of the class embedding alone")
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = replace(DEFAULTS, steps=arguments.steps, batch=arguments.batch, lr=arguments.lr)
    drawings = Drawings.load(arguments.corpus)
    teacher = load_teacher(arguments.teacher, drawings, arguments.teacher_embeddings, arguments)
    vae = arguments.autoencoder / "vae"
    data = DiffusionData.build(
        drawings, arguments.clip, arguments.embeddings, vae, arguments.out / "latents.npz"
    )
    layers = CONDITIONING if arguments.layers == "conditioning" else ("",)
    trainer = TransferTrainer(
        data, teacher, settings, arguments.out, teacher.device, teacher.precision, layers
    )
    (arguments.out / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    if arguments.resume:
        trainer.resume()
    elif arguments.start is not None:
        trainer.start_from(arguments.start)
        trainer.average = {k: v.clone() for k, v in trainer.unet.state_dict().items()}
    else:
        trainer.copy_weights()
        before, after = trainer.fit_class_embedding(arguments.fit_steps)
        print(f"class embedding: {before:.3f} of its variance not explained, then {after:.3f}", flush=True)
        trainer.average = {k: v.clone() for k, v in trainer.unet.state_dict().items()}

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        model = AutoencoderKL.from_pretrained(vae)
        return model.decode(latents / model.config.scaling_factor).sample

    trainer.run(arguments.validate_every, decode)


if __name__ == "__main__":
    main()
