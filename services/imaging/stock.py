"""A bundle's pipeline as a folder that diffusers runs by itself, for pictures without the service."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from services.bundle.load import Bundle
from services.encoding.clip import build_clip
from services.errors import InvalidInput, NoPipeline
from services.imaging.folder import read_json
from services.imaging.pipeline import STABLE_UNCLIP, lacks_text_encoder
from services.imaging.reference import READABLE, pipeline_folder
from services.imaging.text_encoder import build_tokenizer, convert_text_tower

INDEX = "model_index.json"


def write_stock_pipeline(bundle: Bundle, out: Path) -> Path:
    """Write the pipeline of a bundle with all that diffusers needs to run it.

    A bundle holds its text tower once; the folder gets a text encoder and a tokenizer made of it. An unCLIP pipeline
    asks its image encoder for a number format even where the embedding is given, and an open_clip image tower need not
    be a `CLIPVisionModelWithProjection`: where there is none, the text tower with its projection takes that place,
    whose ``text_embeds`` are the joint embeddings of prompts. So the folder draws from prompts, and from pictures
    whose embedding is given as ``image_embeds``, but embeds no pictures.

    Parameters
    ----------
    bundle : Bundle
        With a pipeline.
    out : Path
        Folder to be made.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    NoPipeline
        Where the bundle has none.
    InvalidInput
        Where the folder is there already.
    UnsupportedModel
        Where the text tower has no form in transformers.
    """
    entry = bundle.manifest.diffusion
    if entry is None:
        raise NoPipeline("this bundle has no text-to-image pipeline")
    if out.exists():
        raise InvalidInput(f"{out} is there already", [("out", "is there already")])
    source = pipeline_folder(bundle.path, entry)
    for file in sorted(source.rglob("*")):
        if file.is_file() and file.suffix in READABLE:
            place = out / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    index, config = read_json(out / INDEX), bundle.clip_config
    tower = build_clip(config, bundle.clip_weights)

    def save(name: str, projecting: bool) -> None:
        # In float32: transformers computes in the type of the file, diffusers in float32 unless it is told otherwise.
        convert_text_tower(tower, config, projecting).save_pretrained(out / name)

    if lacks_text_encoder(index):
        save("text_encoder", projecting=False)
        build_tokenizer(config.context_length).save_pretrained(out / "tokenizer")
        index |= {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
    if entry.pipeline == STABLE_UNCLIP and (index.get("image_encoder") or [None])[0] is None:
        save("image_encoder", projecting=True)
        index["image_encoder"] = ["transformers", "CLIPTextModelWithProjection"]
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return out
