"""/v1/completions as OpenAI's own client sees it."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from openai.types import Completion

from hybrid.kimi import Kimi

PATH = "/v1/completions"


def ask(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": "any", "prompt": prompt, "max_tokens": 6, "temperature": 0, **more}


def post(client: httpx2.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    Completion.model_validate_json(response.content, strict=True)
    return response.json()


def texts(body: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in body["choices"]]


def test_prompts_in_their_four_forms(client: httpx2.Client, kimi: Kimi) -> None:
    first, second = kimi.tokenizer.encode("Once"), kimi.tokenizer.encode("and for all")
    both = texts(post(client, ask(["Once", "and for all"])))
    assert texts(post(client, ask([first, second]))) == both
    assert texts(post(client, ask("Once"))) == texts(post(client, ask(first))) == both[:1]
    assert texts(post(client, ask("and for all"))) == both[1:]
    usage = post(client, ask([first, second]))["usage"]
    assert usage["prompt_tokens"] == len(first) + len(second) and usage["completion_tokens"] <= 12


def test_the_text_is_what_the_model_says(client: httpx2.Client, kimi: Kimi) -> None:
    prompt = kimi.tokenizer.encode("Once <|im_end|>")
    params = kimi.default_params(False)
    reply = kimi.complete(prompt, type(params)(temperature=0, max_tokens=6, stop_ids=params.stop_ids))
    expected = "".join(part.text for part in reply)  # type: ignore[union-attr]
    assert texts(post(client, ask("Once <|im_end|>", echo=True))) == ["Once <|im_end|>" + expected]


def test_a_stream(client: httpx2.Client, openai: OpenAI) -> None:
    whole = post(client, ask("Once", echo=True))
    usage = {"include_usage": True}
    chunks = list(openai.completions.create(**ask("Once", echo=True), stream=True, stream_options=usage))  # type: ignore[call-overload]
    Completion.model_validate_json(json.dumps(chunks[-2].to_dict()), strict=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole["choices"][0]["text"]
    assert chunks[-2].choices[0].finish_reason == whole["choices"][0]["finish_reason"] == "length"
    assert chunks[-1].usage.total_tokens == whole["usage"]["total_tokens"]


def test_likelihoods_of_prompt_and_answer(client: httpx2.Client, kimi: Kimi) -> None:
    body = ask("Once upon", echo=True, logprobs=2, max_tokens=3)
    likely = client.post(PATH, json=body).json()["choices"][0]["logprobs"]  # OpenAI sends nulls its own types refuse
    prompt = kimi.tokenizer.encode("Once upon")
    assert likely["tokens"][: len(prompt)] == [kimi.tokenizer.decode([token]) for token in prompt]
    assert len(likely["tokens"]) == len(prompt) + 3 and likely["token_logprobs"][0] is likely["top_logprobs"][0] is None
    expected = kimi.logits(prompt[:-1]).log_softmax(-1)
    for row, token, logprob in zip(expected, prompt[1:], likely["token_logprobs"][1:], strict=False):
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
    assert likely["text_offset"][1] == len(likely["tokens"][0])
    alone = post(client, body | {"echo": False})["choices"][0]["logprobs"]
    assert alone["tokens"] == likely["tokens"][len(prompt) :]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["x"] * 100}, "prompt"),
        ({"prompt": ["a", "b"], "stream": True}, "stream"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 2, "stream": True}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"n": 3}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": "word " * 3000}, "prompt"),
    ],
)
def test_what_is_wrong_is_named(client: httpx2.Client, change: dict[str, Any], param: str) -> None:
    response = client.post(PATH, json=ask("x") | change)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
