"""CONTRIBUTING's example: an optional field goes through the whole system with four files changed by hand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "tests" / "docs" / "adding_a_field.patch"
# Both clients call the gateway's servicer, whose encoder answers with one strong and one weak feature.
CALL = """
import asyncio, inspect
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import MagicMock
import numpy as np
from monofacet import AsyncClient, Client, InputError
from monofacet.testing import FakeMonofacet, mock_async_client, mock_client
from deployments.encoder.tasks import Encoded, Features
from deployments.gateway.servicers.feature import FeatureServicer

class Encoder:
    async def encode(self, task, seconds):
        found = Features(np.array([7, 8], np.int32), np.array([2, 0.5], np.float32))
        return Encoded(np.ones((1, 1), np.float32), np.ones(1, np.float32), [found], 0.0, 0.0)

catalogue = SimpleNamespace(bundle=SimpleNamespace(id="b@1"), resolve=lambda name, where: "sae")
settings = SimpleNamespace(max_items=9, max_text_bytes=99)
servicer = FeatureServicer(Encoder(), catalogue, settings, MagicMock())

class Service(FakeMonofacet):
    def Encode(self, request, context):
        with ThreadPoolExecutor() as threads:
            return threads.submit(asyncio.run, servicer.Encode(request, context)).result()

def found(result):
    return result.features[0].indices.tolist()

client = mock_client(Service())[0]
both = found(client.encode("a", dictionary=""))
strong = found(client.encode("a", dictionary="", min_activation=1))
awaited = found(asyncio.run(mock_async_client(Service())[0].encode("a", dictionary="", min_activation=1)))
try:
    client.encode("a", min_activation="x")
except InputError as error:
    refused = str(error).partition(":")[0]
told = [
    "min_activation" in inspect.signature(call).parameters and "min_activation" in call.__doc__
    for kind in (Client, AsyncClient) for call in (kind.encode, kind.stream_encode)
]
print(both, strong, awaited, refused, all(told))
"""


def test_an_optional_field_goes_from_the_contract_to_both_clients(tmp_path: Path) -> None:
    for name in ("protos", "services", "deployments", "clients/python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    # How the generated modules are formatted.
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # Where it does not apply any more, make it anew; the walk through the four files is the point.
    subprocess.run(["git", "apply", PATCH], cwd=tmp_path, check=True)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'clients' / 'python'}"}
    tools = tmp_path / "clients" / "python" / "tools"
    for command in ([tools / "generate.py"], [tools / "sync_side.py"], ["-c", CALL]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == "[7, 8] [7] [7] min_activation cannot be sent True\n"


def test_the_example_changes_the_four_files_that_the_page_names() -> None:
    changed = re.findall(r"^\+\+\+ b/(.+)$", PATCH.read_text(), re.MULTILINE)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"^- \*\*a field\*\*.*?(?=^- )", page, re.MULTILINE | re.DOTALL)
    named = re.findall(r"`([\w/]+\.(?:py|proto))`", example)
    assert len(changed) == len(named) == 4
    assert [name for name in named if not any(path.endswith(name) for path in changed)] == []
