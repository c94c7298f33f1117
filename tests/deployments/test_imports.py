"""Which processes pay for torch: only the encoder's, since importing it takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "open_clip", "transformers", "diffusers", "scipy")


@pytest.mark.parametrize(
    "modules",
    [
        "deployments.serve, services.bundle.load, deployments.cluster.app",
        "deployments.gateway.server, services.bundle.load",
    ],
    ids=["command", "gateway"],
)
def test_only_the_encoder_imports_torch(modules: str) -> None:
    script = f"import sys, {modules}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# What a replica has no use for, by what it costs to import (torch's compiler alone: 2 s and 100 MB).
UNUSED = (
    "torchvision",
    "transformers",
    "torch._dynamo",
    "sympy",
    "torch.distributed.tensor",
    "huggingface_hub",
)
BUILD = """
import sys
from pathlib import Path
import torch
from services.encoding.clip import build_clip, read_clip_config
from services.encoding.openvino_backend import OpenVINOTowers
from deployments.encoder.encoder import Encoder
path = Path(sys.argv[1])
config = read_clip_config(path)
towers = OpenVINOTowers(build_clip(config, None), config, threads=1, precision="f32")
print([m for m in sys.argv[2].split() if m in sys.modules], towers.embed_dim)
import torchvision, open_clip
print(torchvision.ops.misc.FrozenBatchNorm2d.__name__, open_clip.create_model.__name__)
"""


@pytest.mark.parametrize("vision", ["vit", "timm"])
def test_an_encoder_imports_no_compiler_and_leaves_the_libraries_whole(tmp_path: Path, vision: str) -> None:
    # timm downloads through huggingface_hub, and imports it whether or not it does.
    unused = [name for name in UNUSED if vision == "vit" or name != "huggingface_hub"]
    tower = {"image_size": 16, "width": 32, "layers": 1, "patch_size": 8, "head_width": 16}
    if vision == "timm":
        tower = {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}, "preprocess_cfg": {}}
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, str(path), " ".join(unused)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[] 16", "FrozenBatchNorm2d create_model"]


PIPELINES = """
import sys, torch
from services.encoding.import_trimming import import_pipelines, no_compiler
with no_compiler():
    import_pipelines()
    from transformers import CLIPTextConfig, CLIPTextModel
    sizes = dict(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = CLIPTextConfig(**sizes)
    with torch.device("meta"):
        CLIPTextModel(config)
    model = CLIPTextModel(config).eval()
    inside = model(torch.tensor([[1, 2, 3]]))[0]
unused = ("torchvision", "scipy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor")
print([m for m in unused if m in sys.modules])
print(torch.distributed.is_available(), torch.equal(inside, model(torch.tensor([[1, 2, 3]]))[0]))
import scipy.stats, torch._dynamo, torchvision
print(torch._dynamo.allow_in_graph.__module__, torch.compiler.disable.__module__)
"""


def test_a_generator_imports_no_compiler_and_leaves_torch_whole() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PIPELINES],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "True True", "torch._dynamo.decorators torch.compiler"]


WARM = """
import sys
from deployments.cluster.replicas import _warm_pipeline
from deployments.operations.settings import Settings
print(_warm_pipeline(Settings(threads=1)).info().device, [m for m in sys.argv[1].split() if m in sys.modules])
"""


def test_a_generator_of_the_embedded_bundle_starts_in_a_process_of_its_own() -> None:
    """Its pipeline reads prompts by the bundle's text tower, so open_clip comes after diffusers has been cut down."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WARM, "torchvision.models torch._dynamo"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cpu []"
