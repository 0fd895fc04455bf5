"""Whatever is sent, nothing breaks: every answer is one, or a refusal in the API's envelope."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.serve.chat import ChatRequest
from hybrid.serve.completions import CompletionRequest
from hybrid.serve.messages import MessagesRequest
from hybrid.serve.responses import ResponseRequest

# words that mean something somewhere, so that the odd body gets far
KEYS = ["type", "text", "role", "content", "function", "name", "image_url", "url", "input", "id", "parameters"]
KINDS = ["user", "assistant", "tool", "text", "function", "image", "tool_use", "tool_result", "json_schema", "message"]
WORDS = st.sampled_from(KEYS + KINDS)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text("a<|{\\u00e9", max_size=4)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=8
)
OBJECTS = st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=4), min_size=1, max_size=3)
ENDPOINTS = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
    "/v1/completions": (CompletionRequest, {"prompt": "x", "max_tokens": 1}),
    "/v1/messages": (MessagesRequest, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
    "/v1/responses": (ResponseRequest, {"input": "x", "max_output_tokens": 1}),
}
LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens", "stream"}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_any_fields(address: str, path: str) -> None:
    model, valid = ENDPOINTS[path]
    names = sorted(set(model.model_fields) - LENGTHS)

    @settings(max_examples=60)
    @given(st.dictionaries(st.sampled_from(names), JSON | OBJECTS, max_size=3))
    def check(change: dict[str, Any]) -> None:
        response = client.post(path, content=json.dumps(valid | change), headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), (change, response.text)
        assert response.status_code == 200 or response.json()["error"]["message"]

    with httpx2.Client(base_url=address, timeout=30) as client:
        check()


@pytest.mark.parametrize("extreme", [{"temperature": 1e-300}, {"temperature": 1e300}, {"top_k": 10**9}])
def test_extreme_settings(address: str, extreme: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3} | extreme
    assert httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=30).status_code == 200


@pytest.mark.parametrize("impossible", [{"logit_bias": {"1": 1e300}}, {"repetition_penalty": 1e-300}])
def test_settings_that_make_no_sense(address: str, impossible: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3} | impossible
    response = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 400 and response.json()["error"]["param"] == next(iter(impossible))
