"""`monofacet serve` with two bundles: each call is answered by the towers of the bundle that it names."""

from __future__ import annotations

import io
import urllib.request
from pathlib import Path

import monofacet
import numpy as np
import pytest
from PIL import Image

from services.bundle.load import Bundle
from services.bundle.towers import load_towers
from services.encoding.texts import Tokenizer
from tests.support.service import start_service
from tests.support.tiny_bundle import make_tiny_bundle

TEXT = "red circle"


def local_embedding(bundle: Bundle) -> np.ndarray:
    towers = load_towers(bundle, "torch", threads=1)
    return towers.encode_texts(Tokenizer(bundle.clip_config).tokenize([TEXT])).unit[0]


def test_two_bundles_are_served_at_once_and_chosen_per_request(tiny: Bundle, tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path / "other", seed=1, name="other")
    service = start_service(tiny.path, tmp_path / "log", ["--bundle", str(other.path), "--backend", "torch"])
    try:
        assert service.bundle == f"{tiny.id},{other.id}"
        with monofacet.Client(service.target, timeout=120) as client:
            expected = {bundle.manifest.name: local_embedding(bundle) for bundle in (tiny, other)}
            # The towers differ, so an answer of the wrong ones would show.
            assert expected["tiny"] @ expected["other"] < 0.99
            for name, bundle in (("", tiny), ("tiny", tiny), ("other", other), (other.id, other)):
                result = client.with_bundle(name).encode(TEXT, dictionary="")
                assert result.bundle == bundle.id
                # The same towers in float32; the service runs them in a batch of one, as here.
                np.testing.assert_allclose(result.embeddings[0], expected[bundle.manifest.name], atol=1e-5)
            picture = Image.new("RGB", (32, 32), "red")
            streams = [client.with_bundle(name).stream_encode([TEXT, picture]) for name in ("tiny", "other")]
            for bundle, stream in zip((tiny, other), streams, strict=True):
                assert [item.bundle for item in stream] == [bundle.id] * 2
            assert [(model.name, model.is_default) for model in client.models()] == [
                ("tiny", True), ("other", False)
            ]  # fmt: skip
            with pytest.raises(monofacet.NotFoundError) as caught:
                client.with_bundle("gone").encode(TEXT)
            assert caught.value.reason == "UNKNOWN_MODEL"
        with urllib.request.urlopen(service.metrics_url) as page:
            lines = io.TextIOWrapper(page).read().splitlines()
        series = [line for line in lines if line.startswith("monofacet_model_info{")]
        assert len(series) == 2 and all(line.endswith(" 1.0") for line in series)
    finally:
        assert service.stop() == 0
