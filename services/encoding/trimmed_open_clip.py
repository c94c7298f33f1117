"""open_clip's towers and tokenizer without the rest of it, which takes seconds and 150 MB in every process.

open_clip's package imports what it trains and downloads with, and torchvision, which brings torch's compiler. What
is served needs none of it: pictures are preprocessed by `services.encoding.images`, and weights come from a bundle.
So its modules are loaded into a package of another name, with a torchvision that has but its small modules, and
without transformers, which is for Hugging Face's towers; those are refused here anyway.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from services.encoding.import_trimming import hollow, home_of, no_compiler, small_torchvision, without

_PACKAGE = "services.encoding.served_open_clip"


def _load() -> Any:
    package = sys.modules[_PACKAGE] = hollow(_PACKAGE, home_of("open_clip"))
    # Only for a tower of timm's is timm worth its time.
    with without("transformers", "timm"), small_torchvision():
        for name in ("model", "tokenizer", "transformer"):
            importlib.import_module(f"{_PACKAGE}.{name}")
    package.CLIP, package.CustomTextCLIP = package.model.CLIP, package.model.CustomTextCLIP
    package.SimpleTokenizer = package.tokenizer.SimpleTokenizer
    return package


def take_timm() -> None:
    """Let `open_clip` build towers of timm's, too."""
    adapter = open_clip.timm_model
    if adapter.timm is None:
        with without("transformers"), small_torchvision(), no_compiler():
            importlib.reload(adapter)
        open_clip.model.TimmModel = adapter.TimmModel


def whole_open_clip() -> Any:
    """Return all of open_clip but Hugging Face's towers, for what is not serving."""
    with without("transformers"):
        return importlib.import_module("open_clip")


open_clip = _load()

__all__ = ["open_clip", "take_timm", "whole_open_clip"]
