"""What is there, and how refusals look."""

from __future__ import annotations

from pathlib import Path

import httpx2
from openai import OpenAI

from hybrid.kimi import Kimi


def test_models(openai: OpenAI, tiny: Path) -> None:
    (model,) = openai.models.list().data
    assert model.id == tiny.name and openai.models.retrieve(tiny.name).id == tiny.name


def test_errors_wear_openais_envelope(client: httpx2.Client) -> None:
    cases = {
        404: client.get("/nowhere"),
        405: client.get("/v1/chat/completions"),
        501: client.post("/v1/embeddings", json={"input": "x"}),
        400: client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}),
        413: client.post("/tokenize", json={"prompt": "x" * 200_000}),
    }
    for status, response in cases.items():
        error = response.json()["error"]
        assert response.status_code == status and set(error) == {"message", "type", "param", "code"}, response.text
    missing = client.get("/v1/models/other").json()["error"]
    assert missing["code"] == "model_not_found" and missing["type"] == "not_found_error"
    assert "access-control-allow-origin" not in client.get("/health", headers={"origin": "http://localhost"}).headers


def test_half_a_letter_is_told_back(client: httpx2.Client) -> None:
    text = b'{"messages":[{"role":"user","content":[{"type":"text","text":"\\ud800"}]}],"max_tokens":2}'
    assert client.post(
        "/v1/chat/completions", content=text, headers={"content-type": "application/json"}
    ).status_code in (200, 400)


def test_the_description_covers_requests_and_answers(client: httpx2.Client) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            assert "4XX" in operation["responses"] and "422" not in operation["responses"], path
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert {"application/json", "text/event-stream"} == set(chat["responses"]["200"]["content"])
    assert "messages" in schemas["ChatRequest"]["properties"] and "ChatCompletion" in schemas


def test_metrics(client: httpx2.Client) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE kimi_local:requests_processing gauge" in response.text


def test_tokens_there_and_back(client: httpx2.Client, kimi: Kimi) -> None:
    text = "naïve <|im_end|> 漢字"
    told = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == kimi.tokenizer.encode(text) and told["count"] == len(told["token_strs"])
    assert client.post("/detokenize", json={"tokens": told["tokens"]}).json()["prompt"] == text
    assert client.post("/detokenize", json={"tokens": [10**9]}).status_code == 400
    assert client.post("/tokenize", json={}).json()["error"]["param"] == "prompt"
    info = client.get("/tokenizer_info").json()
    assert info["special_tokens"]["<|im_end|>"] in info["eos_token_ids"] and "im_middle" in info["chat_template"]
