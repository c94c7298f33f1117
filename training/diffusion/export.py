"""Make the bundle's pipeline from what was trained.

``python -m training.diffusion.export --bundle bundles/emoji`` writes ``diffusion/`` (the parts of a diffusers
`StableUnCLIPImg2ImgPipeline` in half-precision safetensors, and ``monofacet.json``) and renews the manifest.
``python -m training.diffusion.choose`` then chooses solver, steps and guidance.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableUnCLIPImg2ImgPipeline

from services.bundle.load import Bundle, refresh_manifest
from training.diffusion.model import DiffusionSettings, serving_solver
from training.diffusion.train import DiffusionTrainer, add_paths, load_trainer

# Until `training.diffusion.choose` has measured.
STEPS, GUIDANCE = 16, 3.0


def assemble_pipeline(trainer: DiffusionTrainer, vae: Path) -> StableUnCLIPImg2ImgPipeline:
    """Return the trained model as a pipeline without encoders, float32.

    Prompts and pictures are encoded by the towers of the bundle, which it need not hold twice;
    `services.imaging.stock` writes a folder with all that diffusers needs.

    Parameters
    ----------
    trainer : DiffusionTrainer
        Whose averaged weights to take.
    vae : Path
        Folder of the autoencoder.
    """
    noising = {k: v for k, v in trainer.noiser.scheduler.config.items() if not k.startswith("_")}
    return StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=None,
        image_normalizer=trainer.noiser.normaliser,
        image_noising_scheduler=DDPMScheduler(**noising),
        tokenizer=None,
        text_encoder=None,
        unet=trainer.exported(),
        scheduler=serving_solver(),
        vae=AutoencoderKL.from_pretrained(vae),
    )


def write_pipeline(
    pipeline: StableUnCLIPImg2ImgPipeline, folder: Path, fingerprint: str, steps: int, guidance: float
) -> None:
    """Write a pipeline in half precision, and what the manifest says of it."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("unet", "vae"):
        getattr(pipeline, name).half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "monofacet.json").write_text(
        json.dumps(
            {
                "pipeline": "StableUnCLIPImg2ImgPipeline",
                "conditioning": "embedding",
                "tower_fingerprint": fingerprint,
                "height": pipeline.vae.config.sample_size,
                "width": pipeline.vae.config.sample_size,
                "num_inference_steps": steps,
                "guidance_scale": guidance,
                "noise_level": 0,
                "embedding_from_prompt": True,
            },
            indent=2,
        )
        + "\n"
    )


def trained_on(folder: Path, embeddings: Path) -> bool:
    """Return whether `folder` holds a model that was trained on the towers of `embeddings`."""
    checkpoint = folder / "checkpoint.pt"
    if not checkpoint.exists():
        return False
    fingerprint = torch.load(checkpoint, weights_only=True, mmap=True)["fingerprint"]
    with np.load(embeddings, allow_pickle=False) as file:
        return str(file["fingerprint"]) == fingerprint


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_paths(parser)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/emoji"))
    parser.add_argument("--inference-steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument(
        "--if-trained", action="store_true", help="do nothing where no such model was trained"
    )
    arguments = parser.parse_args()
    if arguments.if_trained and not trained_on(arguments.out, arguments.embeddings):
        print("no text-to-image model was trained on these towers")
        return
    torch.set_num_threads(arguments.threads)
    stored = json.loads((arguments.out / "settings.json").read_text())
    settings = DiffusionSettings(**{**stored, "channels": tuple(stored["channels"])})
    trainer = load_trainer(arguments, settings)
    trainer.resume(train=False)
    bundle = Bundle.load(arguments.bundle, verify=False)
    fingerprint = trainer.conditions.fingerprint
    if bundle.manifest.clip.fingerprint != fingerprint:
        raise SystemExit("the bundle holds other towers than the diffusion was trained on")
    pipeline = assemble_pipeline(trainer, arguments.autoencoder / "vae")
    folder = bundle.path / "diffusion"
    write_pipeline(pipeline, folder, fingerprint, arguments.inference_steps, arguments.guidance)
    record = {"settings": asdict(settings), "step": trainer.step}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    refresh_manifest(bundle.path)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{Bundle.load(bundle.path).id}: diffusion {total / 1e6:.1f} MB, after {trainer.step} steps")


if __name__ == "__main__":
    main()
