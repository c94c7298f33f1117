"""Importing less of a library: what it takes to keep out what it imports and this process never uses.

Libraries import optional ones wherever those are installed, and torch's compiler for the sake of decorators. In a
process that serves, that is seconds of start-up and hundreds of megabytes for nothing. torch is imported only where it
is needed: the command and the gateway, which have none, use `without` too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

_COMPILER = "torch._dynamo"
# What libraries decorate functions with, so that the compiler treats them in some way.
_DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Make these modules unimportable for the length of a block, unless they have been imported already."""
    absent = [name for name in names if name not in sys.modules]
    # An import of what is None fails, so that libraries take it for not installed.
    sys.modules.update(dict.fromkeys(absent, cast(ModuleType, None)))
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


def hollow(name: str, home: Path | None = None) -> Any:
    """Return a package with the modules that lie in `home`, whose own code has not run."""
    package = ModuleType(name)
    package.__spec__ = ModuleSpec(name, None, is_package=True)
    package.__path__ = [] if home is None else [str(home)]
    return package


def home_of(package: str) -> Path:
    """Return the directory of an installed package, which need not be imported for it.

    Raises
    ------
    ImportError
        Where it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    return Path(spec.origin).parent


@contextmanager
def small_torchvision() -> Iterator[None]:
    """Load only those modules of torchvision that are asked for, unless it has been imported already."""
    if "torchvision" in sys.modules:
        yield
        return
    home = home_of("torchvision")
    sys.modules["torchvision"] = hollow("torchvision", home)
    sys.modules["torchvision.ops"] = hollow("torchvision.ops", home / "ops")
    try:
        with without("torchvision.models"):
            yield
    finally:
        _forget("torchvision")


@contextmanager
def no_compiler() -> Iterator[None]:
    """Replace the decorators of torch's compiler by ones that do nothing, unless it has been imported already.

    torch itself imports its compiler when such a function is first called, as the initialisation of a module on the
    meta device does. So a model is best loaded, and run once, within.
    """
    if _COMPILER in sys.modules:
        yield
        return

    def as_it_is(function: Any = None, *arguments: Any, **options: Any) -> Any:
        return as_it_is if function is None else function

    import torch

    compiler: Any = torch.compiler
    before, compiler.disable = compiler.disable, as_it_is
    stand_in = sys.modules[_COMPILER] = hollow(_COMPILER)
    for name in _DECORATORS:
        setattr(stand_in, name, as_it_is)
    try:
        yield
    finally:
        compiler.disable = before
        _forget(_COMPILER)


@contextmanager
def _no_masks_of_patterns() -> Iterator[None]:
    """Stand in for what transformers imports of the compiler for flexible attention masks, which CLIP does not use."""
    if _COMPILER in sys.modules and getattr(sys.modules[_COMPILER], "__file__", None):
        yield
        return
    name = f"{_COMPILER}._trace_wrapped_higher_order_op"
    module: Any = ModuleType(name)

    class TransformGetItemToIndex:
        def __init__(self) -> None:
            raise RuntimeError("attention masks made of patterns need torch's compiler")

    module.TransformGetItemToIndex = TransformGetItemToIndex
    with no_compiler():
        sys.modules[name] = module
        yield


@contextmanager
def _not_distributed() -> Iterator[None]:
    """Tell transformers that torch cannot run distributed, for which it would import the compiler."""
    import torch

    distributed: Any = torch.distributed
    before, distributed.is_available = distributed.is_available, lambda: False
    try:
        yield
    finally:
        distributed.is_available = before


def import_pipelines() -> None:
    """Import what `services.imaging.pipeline` uses of diffusers and transformers, and as little else as can be.

    For a process that does nothing else with them: they go on to believe that what was kept out is not installed.
    """
    with ExitStack() as kept_out:
        kept_out.enter_context(_no_masks_of_patterns())
        kept_out.enter_context(_not_distributed())
        kept_out.enter_context(without("torchvision", "scipy", "sklearn", "pandas"))
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
        from diffusers.pipelines.stable_diffusion import stable_unclip_image_normalizer  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]
