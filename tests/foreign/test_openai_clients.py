"""What others wrote for OpenAI's API runs unchanged, and gets the vectors that gRPC gives."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
from monofacet import Client

from tests.foreign.conftest import Run
from tests.support.waiting import CALL_S

TEXTS = ["a red circle", "ein roter Kreis 🔴", "zwei\nZeilen"]


@pytest.fixture
def ours(running_service: Any) -> Any:
    with Client(running_service.target, timeout=CALL_S) as client:
        return client.encode(TEXTS)


def same(vectors: Any, ours: Any) -> bool:
    # The same floats in the same batch; JSON carries each float32 exactly.
    return np.allclose(vectors, ours.embeddings, rtol=0, atol=1e-6)


def test_openais_client_in_node(running_service: Any, ours: Any, node: Run) -> None:
    found = node("openai.mjs", f"{running_service.http_url}/v1", *TEXTS)
    assert found["model"] == ours.bundle
    assert same(found["floats"], ours)
    assert same(found["default"], ours)
    assert PIL.Image.open(io.BytesIO(base64.b64decode(found["image"]))).format == "PNG"
    assert found["refused"] == {"kind": "NotFoundError", "status": 404, "code": "UNKNOWN_MODEL"}


def test_langchain(running_service: Any, ours: Any) -> None:
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model=ours.bundle,
        base_url=f"{running_service.http_url}/v1",
        api_key="none",
        # As LangChain asks of servers other than OpenAI's: else it sends the tokens of OpenAI's models.
        check_embedding_ctx_length=False,
    )
    assert same(embeddings.embed_documents(TEXTS), ours)
    assert np.allclose(embeddings.embed_query(TEXTS[0]), ours.embeddings[0], rtol=0, atol=1e-5)


def test_litellm(running_service: Any, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise its import asks the network for prices.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    base = f"{running_service.http_url}/v1"
    answer = litellm.embedding(
        model=f"openai/{ours.bundle}", api_base=base, api_key="none", input=TEXTS, encoding_format="float"
    )
    assert same([one["embedding"] for one in answer.data], ours)
    with pytest.raises(litellm.NotFoundError):
        litellm.embedding(model="openai/none", api_base=base, api_key="none", input=TEXTS)
