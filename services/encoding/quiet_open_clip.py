"""open_clip's towers and tokenizer without the rest of it, which takes seconds and 150 MB in every process.

open_clip's package imports what it trains and downloads with, and torchvision, which brings torch's compiler. What
is served needs none of it: pictures are preprocessed by `services.encoding.images`, and weights come from a bundle.
So its modules are loaded into a package of another name, with a torchvision that has but its small modules, and
without transformers, which is for Hugging Face's towers; those are refused here anyway.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

_PACKAGE = "services.encoding.served_open_clip"


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Have modules not to be had, unless they have been imported already; libraries take them for not installed."""
    absent = [name for name in names if name not in sys.modules]
    # An import of what is None fails.
    sys.modules.update(dict.fromkeys(absent, cast(ModuleType, None)))
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def _small_torchvision() -> Iterator[None]:
    """Have a torchvision of which only the modules that are asked for are loaded, unless all of it is there."""
    if "torchvision" in sys.modules:
        yield
        return
    home = _home("torchvision")
    sys.modules["torchvision"] = _hollow("torchvision", home)
    sys.modules["torchvision.ops"] = _hollow("torchvision.ops", home / "ops")
    try:
        with _without("torchvision.models"):
            yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


@contextmanager
def _no_compiler() -> Iterator[None]:
    """Keep decorators from importing torch's compiler in order to keep functions from it; nothing is compiled."""

    def as_it_is(function: Any = None, *arguments: Any, **options: Any) -> Any:
        return as_it_is if function is None else function

    compiler: Any = torch.compiler
    before, compiler.disable = compiler.disable, as_it_is
    try:
        yield
    finally:
        compiler.disable = before


def _home(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    return Path(spec.origin).parent


def _hollow(name: str, home: Path) -> Any:
    """Return a package with the modules that lie in `home`, whose own code has not run."""
    package = ModuleType(name)
    package.__spec__ = ModuleSpec(name, None, is_package=True)
    package.__path__ = [str(home)]
    return package


def _load() -> Any:
    package = sys.modules[_PACKAGE] = _hollow(_PACKAGE, _home("open_clip"))
    # Only for a tower of timm's is timm worth its time.
    with _without("transformers", "timm"), _small_torchvision():
        for name in ("model", "tokenizer", "transformer"):
            importlib.import_module(f"{_PACKAGE}.{name}")
    package.CLIP, package.CustomTextCLIP = package.model.CLIP, package.model.CustomTextCLIP
    package.SimpleTokenizer = package.tokenizer.SimpleTokenizer
    return package


def take_timm() -> None:
    """Let `open_clip` build towers of timm's, too."""
    adapter = open_clip.timm_model
    if adapter.timm is None:
        with _without("transformers"), _small_torchvision(), _no_compiler():
            importlib.reload(adapter)
        open_clip.model.TimmModel = adapter.TimmModel


def whole_open_clip() -> Any:
    """Return all of open_clip but Hugging Face's towers, for what is not serving."""
    with _without("transformers"):
        return importlib.import_module("open_clip")


open_clip = _load()

__all__ = ["open_clip", "take_timm", "whole_open_clip"]
