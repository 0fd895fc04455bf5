"""What a line asks beyond sampling: the same answers as one request alone gets, and the same shapes as the server's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hybrid import Kimi
from hybrid.batch.jobs import Answer, Job, Prompts
from hybrid.batch.lines import read_lines
from hybrid.batch.records import answer_record
from hybrid.batch.run import answers, params_of
from tests.batch.conftest import jobs_of

HI = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"messages": HI, "temperature": 0, "max_tokens": 40, "enable_thinking": False}
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "hot": {"type": "boolean"}},
    "required": ["size", "hot"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}


def bodies(kimi: Kimi, prompts: Prompts, jobs: list[Job]) -> list[dict[str, Any]]:
    made: dict[int, Answer] = {answer.index: answer for answer in answers(kimi, jobs, 4)}
    records = [answer_record(job, made[index], prompts) for index, job in enumerate(jobs)]
    return [record["response"]["body"] for record in records]


def choices(kimi: Kimi, prompts: Prompts, *asked: dict[str, Any]) -> list[dict[str, Any]]:
    return [body["choices"][0] for body in bodies(kimi, prompts, jobs_of(prompts, *asked))]


def test_a_stop_string_ends_the_answer_as_it_does_alone(kimi: Kimi, prompts: Prompts) -> None:
    (plain,) = choices(kimi, prompts, GREEDY)
    text = plain["message"]["content"]
    stop = text[8:11]
    asked = [GREEDY | {"stop": stop}, GREEDY | {"stop": ["not there", stop]}]
    jobs = jobs_of(prompts, *asked)
    for body, job in zip(bodies(kimi, prompts, jobs), jobs, strict=True):
        reply = kimi.reply(list(job.asked.messages), params_of(kimi, job), thinking=False)
        for _ in reply:
            pass
        choice = body["choices"][0]
        assert choice["message"]["content"] == text[: text.index(stop)] == reply.message.content
        assert choice["finish_reason"] == reply.finish_reason == "stop"
        assert body["usage"]["completion_tokens"] == reply.stats.generated_tokens < 40


def test_a_stop_string_does_not_count_in_reasoning(kimi: Kimi, prompts: Prompts) -> None:
    thinking = GREEDY | {"enable_thinking": True}
    (plain,) = choices(kimi, prompts, thinking)
    thoughts, answer = plain["message"]["reasoning_content"], plain["message"]["content"]
    only_there = next(pair for at in range(len(thoughts)) if (pair := thoughts[at : at + 3]) not in answer)
    (stopped,) = choices(kimi, prompts, thinking | {"stop": only_there})
    assert stopped["message"]["reasoning_content"] == thoughts and stopped["finish_reason"] == plain["finish_reason"]


def test_reasoning_ends_after_its_budget_as_it_does_alone(kimi: Kimi, prompts: Prompts) -> None:
    asked = GREEDY | {"enable_thinking": True}
    bounded = [{"thinking_budget": 5}, {"thinking": {"type": "enabled", "budget_tokens": 5}}]
    jobs = jobs_of(prompts, *(asked | each for each in bounded))
    for body, job in zip(bodies(kimi, prompts, jobs), jobs, strict=True):
        reply = kimi.reply(list(job.asked.messages), params_of(kimi, job), thinking=True, think_budget=5)
        for _ in reply:
            pass
        message, usage = body["choices"][0]["message"], body["usage"]
        assert message["reasoning_content"] == reply.message.reasoning_content
        assert message["content"] == reply.message.content != ""
        assert usage["completion_tokens_details"]["reasoning_tokens"] == reply.stats.thinking_tokens <= 6


def test_what_must_not_be_kept_is_not(kimi: Kimi, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, finish = [], kimi.finish_many

    def spy(asked: Any, *settings: Any, **more: Any) -> Any:
        for index, _, request in finish(asked, *settings, **more):
            kept.append((index, request.keep))
            yield index, _, request

    monkeypatch.setattr(kimi, "finish_many", spy)
    short = GREEDY | {"max_tokens": 2}
    bodies(kimi, prompts, jobs_of(prompts, short, short | {"store": False}, short | {"store": True}))
    assert sorted(kept) == [(0, True), (1, False), (2, True)]


def test_a_text_that_is_continued_has_stops_and_logprobs_too(kimi: Kimi, prompts: Prompts) -> None:
    body = {"prompt": "of the", "temperature": 0, "max_tokens": 20, "logprobs": 2}
    (plain,) = choices(kimi, prompts, {"url": "/v1/completions", "body": body})
    text, told = plain["text"], plain["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 20
    assert all(1 <= len(top) <= 2 for top in told["top_logprobs"])
    (stopped,) = choices(kimi, prompts, {"url": "/v1/completions", "body": body | {"stop": text[3:6]}})
    assert stopped["text"] == text[: text.index(text[3:6])] and len(stopped["logprobs"]["tokens"]) < 20


def test_logprobs_are_those_of_the_model(kimi: Kimi, prompts: Prompts) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    (job,) = jobs_of(prompts, GREEDY | {"logprobs": True, "top_logprobs": 3})
    (body,) = bodies(kimi, prompts, [job])
    told = openai.types.chat.ChatCompletion.model_validate(body, strict=True).choices[0].logprobs.content
    assert len(told) == body["usage"]["completion_tokens"]
    first = kimi.logits(job.prompt)[-1].log_softmax(-1)
    assert told[0].logprob == pytest.approx(float(first.max()), abs=1e-4)
    assert [each.logprob for each in told[0].top_logprobs] == pytest.approx(first.topk(3).values.tolist(), abs=1e-4)


def test_penalties_and_biases_change_what_is_drawn(kimi: Kimi, prompts: Prompts) -> None:
    (job,) = jobs_of(prompts, GREEDY)
    likeliest = next(answers(kimi, [job], 1)).ids
    (forbidden,) = jobs_of(prompts, GREEDY | {"logit_bias": {str(likeliest[0]): -100}})
    assert next(answers(kimi, [forbidden], 1)).ids[0] != likeliest[0]
    (penalised,) = jobs_of(prompts, GREEDY | {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 5})
    ids = next(answers(kimi, [penalised], 1)).ids
    assert len(set(ids)) / len(ids) > len(set(likeliest)) / len(likeliest)


def test_forms_are_kept_to(kimi: Kimi, prompts: Prompts) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    tool = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    asked = GREEDY | {"max_tokens": 300, "temperature": 1}
    thing, called, free = choices(
        kimi, prompts, asked | {"response_format": FORMAT}, asked | {"tools": [tool], "tool_choice": "required"}, GREEDY
    )
    assert set(json.loads(thing["message"]["content"])) == {"size", "hot"} and thing["finish_reason"] == "stop"
    call = called["message"]["tool_calls"][0]["function"]
    assert call["name"] == "look" and set(json.loads(call["arguments"])) == {"size", "hot"}
    assert free == choices(kimi, prompts, GREEDY)[0]


def test_what_the_model_cannot_do_is_refused_line_by_line(prompts: Prompts) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    nonsense = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    asked = [GREEDY | {"response_format": nonsense}, GREEDY | {"logit_bias": {"999999": 1}}, GREEDY]
    found = read_lines(json.dumps(each).encode() for each in asked)
    jobs, refused = prompts.jobs(found.good, {}, None)
    assert [job.custom_id for job in jobs] == ["line-3"]
    assert [(why.param, why.code) for _, why in refused] == [
        ("response_format", "unsupported_schema"), ("logit_bias", "invalid_request"),
    ]  # fmt: skip
