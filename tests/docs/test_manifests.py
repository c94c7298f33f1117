"""The manifests of stock pipelines in docs/imaging.md are ones that the service takes."""

import json
import re

from benchmarks.readme import ROOT
from services.bundle.manifest import DiffusionEntry
from services.strict_json import parse_dataclass

PAGE = ROOT / "docs" / "imaging.md"


def test_the_manifests_of_stock_pipelines_parse_and_name_the_path_that_steers_them() -> None:
    blocks = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    entries = [parse_dataclass(DiffusionEntry, json.loads(block), "diffusion") for block in blocks]
    assert [(entry.pipeline, entry.conditioning) for entry in entries] == [
        ("StableDiffusionPipeline", "prompt"),
        ("StableUnCLIPImg2ImgPipeline", "embedding"),
    ]
    assert all(entry.reference and entry.revision and entry.sha256 for entry in entries)
