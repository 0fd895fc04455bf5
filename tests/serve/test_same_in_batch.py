"""A body of OpenAI's APIs means the same over HTTP and as a line of a batch: the same settings, the same refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from hybrid.batch.body import CHAT, COMPLETIONS
from hybrid.batch.jobs import Job, Prompts
from hybrid.batch.lines import read_lines
from hybrid.batch.run import params_of
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.sampler import SamplingParams
from hybrid.kimi import Kimi
from hybrid.serve.asked import Turn, params
from hybrid.serve.chat import ChatRequest, to_turn
from hybrid.serve.completions import CompletionRequest

# a line without these gets a seed of its own and the length that the command says
GIVEN: dict[str, Any] = {"seed": 7, "max_tokens": 5}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: GIVEN | {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: GIVEN | {"prompt": "hi"},
}
SCHEMA = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
NOTHING = dict.fromkeys(
    ("temperature", "top_p", "top_k", "min_p", "stop", "logit_bias", "n", "logprobs", "presence_penalty")
)

BOTH: list[dict[str, Any]] = [
    {},
    NOTHING,
    {"temperature": 0, "top_p": 1, "top_k": 5, "min_p": 0.5},
    {"temperature": 1e-300},
    {"temperature": 1e-3},
    {"seed": -1},
    {"seed": 1 << 70},
    {"stop": "a"},
    {"stop": ["a", "", "b"]},
    {"stop": ""},
    {"stop": []},
    {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.5},
    {"logit_bias": {"7": -1.5, "8": 100}},
    {"logit_bias": {}},
    {"n": 1, "user": "x", "invented": {}},
]
VALID = [(url, change) for url in BODIES for change in BOTH] + [
    (COMPLETIONS, {"logprobs": 3, "suffix": "", "best_of": 1}),
    (CHAT, {"logprobs": True}),
    (CHAT, {"logprobs": True, "top_logprobs": 20}),
    (CHAT, {"logprobs": False, "top_logprobs": 3}),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 3}),
    (CHAT, {"response_format": {"type": "text"}, "functions": [], "modalities": ["text"]}),
    (CHAT, {"response_format": {"type": "json_object"}}),
    (CHAT, {"response_format": FORMAT}),
    (CHAT, {"tools": [TOOL]}),
    (CHAT, {"tools": [TOOL], "tool_choice": "none"}),
    (CHAT, {"tools": [TOOL], "tool_choice": "required", "response_format": FORMAT}),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}),
    (CHAT, {"thinking": {"type": "disabled", "keep": "all"}}),
    (CHAT, {"thinking": {"type": "enabled", "budget_tokens": 9}, "enable_thinking": False}),
    (CHAT, {"thinking": False}),
    (CHAT, {"thinking": {}}),
    (CHAT, {"thinking": "disabled"}),
    (CHAT, {"chat_template_kwargs": {"thinking": False}}),
    (CHAT, {"enable_thinking": False}),
    (CHAT, {"reasoning_effort": "none"}),
    (CHAT, {"reasoning_effort": "utmost"}),
    (CHAT, {"thinking_budget": 4, "store": False}),
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": "x"}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": 3}, "stop"),
    ({"stop": ["a", None]}, "stop"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": "much"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"n": 2}, "n"),
]
INVALID = [(url, change, param) for url in BODIES for change, param in WRONG] + [
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"best_of": 3}, "best_of"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"functions": [{}]}, "functions"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (CHAT, {"response_format": "json"}, "response_format"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"tools": "x"}, "tools"),
    (CHAT, {"tools": [3]}, "tools.0"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": "whatever"}, "tool_choice"),
    (CHAT, {"tool_choice": 3}, "tool_choice"),
    (CHAT, {"thinking": "maybe"}, "thinking"),
    (CHAT, {"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking"),
    (CHAT, {"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    (CHAT, {"enable_thinking": "x"}, "enable_thinking"),
    (CHAT, {"reasoning_effort": 3}, "reasoning_effort"),
    (CHAT, {"thinking_budget": 0}, "thinking_budget"),
    (CHAT, {"store": "no"}, "store"),
]


@pytest.fixture(scope="module")
def prompts(kimi: Kimi) -> Prompts:
    with open_checkpoint(kimi.path) as checkpoint:
        return Prompts(checkpoint, kimi.ctx)


def line_of(url: str, change: dict[str, Any]) -> bytes:
    return json.dumps({"url": url, "body": BODIES[url] | change}).encode()


def job_of(prompts: Prompts, url: str, change: dict[str, Any]) -> Job:
    found = read_lines([line_of(url, change)])
    assert not found.bad, found.bad
    return prompts.job(found.good[0], {}, None)


@pytest.mark.parametrize(("url", "change"), VALID)
def test_the_same_is_meant(kimi: Kimi, prompts: Prompts, url: str, change: dict[str, Any]) -> None:
    body, job = BODIES[url] | change, job_of(prompts, url, change)
    assert SamplingParams() != params_of(kimi, job), "something was given"
    if url == COMPLETIONS:
        assert params(kimi, CompletionRequest.model_validate(body), False) == params_of(kimi, job)
        return
    asked = job.asked
    in_file = Turn(
        list(asked.messages),
        params_of(kimi, job),
        list(asked.tools) or None,
        job.thinking,
        asked.think_budget,
        asked.grammar,
        asked.keep,
    )
    assert to_turn(kimi, ChatRequest.model_validate(body)) == in_file


@pytest.mark.parametrize(("url", "change", "param"), INVALID)
def test_the_same_is_refused(
    client: httpx2.Client, prompts: Prompts, url: str, change: dict[str, Any], param: str
) -> None:
    found = read_lines([line_of(url, change)])
    why = found.bad[0].why if found.bad else prompts.jobs(found.good, {}, None)[1][0][1]
    content = json.dumps(BODIES[url] | change)
    response = client.post(url, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert (error["message"], error["param"]) == (str(why), why.param)
    assert why.param == param
    assert (error["code"] == "unsupported_parameter") == (why.code == "unsupported_parameter")


def test_what_differs_is_where_an_answer_may_end_by_itself(kimi: Kimi, prompts: Prompts) -> None:
    """A continuation without a length has OpenAI's 16 tokens over HTTP; a line has what the command says."""
    lacking = {name: value for name, value in BODIES[COMPLETIONS].items() if name != "max_tokens"}
    served = params(kimi, CompletionRequest.model_validate(lacking), False)
    (line,) = read_lines([json.dumps({"url": COMPLETIONS, "body": lacking}).encode()]).good
    job = prompts.job(line, {"max_tokens": 9}, None)
    assert (served.max_tokens, job.longest) == (16, 9)
    assert replace(served, max_tokens=9) == params_of(kimi, job)
