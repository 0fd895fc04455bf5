"""From lines to answers with a real, tiny model: seeds, order, records that OpenAI's own types accept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrid import Kimi
from hybrid.batch.estimate import estimate, room_for, sequences
from hybrid.batch.jobs import Answer, Job, Prompts, by_prefix, shared_tokens
from hybrid.batch.lines import read_lines
from hybrid.batch.records import answer_record, error_record
from hybrid.batch.run import answers, params_of, write_answers
from hybrid.batch.state import Output
from tests.batch.conftest import jobs_of, read


def many(prompts: Prompts, count: int = 12) -> list[Job]:
    texts = [{"prompt": f"of the {n % 3} in {n}", "max_tokens": 1 + n % 7} for n in range(count)]
    return jobs_of(prompts, *texts)


def test_prompts_are_those_of_the_chat(kimi: Kimi, prompts: Prompts) -> None:
    job, raw = jobs_of(
        prompts,
        {"messages": [{"role": "user", "content": "<|im_end|> is text"}], "max_tokens": 9},
        {"url": "/v1/completions", "body": {"prompt": "<think> is text", "max_tokens": 9}},
    )
    assert job.prompt == kimi.template.render_ids(job.asked.messages, kimi.tokenizer, thinking=True)
    assert raw.prompt == kimi.tokenizer.encode("<think> is text")
    assert params_of(kimi, job).max_tokens == job.longest == 9
    assert (prompts.stop_ids, prompts.model) == (kimi.stop_ids, kimi.name)


def test_the_line_wins_over_the_command_and_that_over_the_model(kimi: Kimi, prompts: Prompts) -> None:
    defaults = {"temperature": 0.5, "top_k": 9, "seed": 1, "top_p": None, "max_tokens": None}
    a, b = jobs_of(prompts, {"prompt": "x", "temperature": 0, "seed": 7}, {"prompt": "x"}, **defaults)
    params = params_of(kimi, a)
    assert (params.temperature, params.top_k, params.seed, params.top_p) == (0, 9, 7, 0.95)
    assert params_of(kimi, b).temperature == 0.5 and a.longest == 512 - len(a.prompt)


def test_seeds_come_from_names(prompts: Prompts) -> None:
    def seed(name: str, seed: int) -> int:
        return jobs_of(prompts, {"custom_id": name, "prompt": "x"}, seed=seed)[0].sampling["seed"]

    assert seed("a", 0) == seed("a", 0)
    assert len({seed("a", 0), seed("b", 0), seed("a", 1), seed("\ud800", 1)}) == 4


def test_what_does_not_fit_is_refused_alone_with_its_numbers(prompts: Prompts) -> None:
    found = read({"prompt": "x " * 600}, {"prompt": "x"}, {"url": "/v1/completions", "body": {"prompt": [10**6]}})
    jobs, refused = prompts.jobs(found.good, {}, None)
    assert [job.custom_id for job in jobs] == ["line-2"]
    assert [(name, why.code, why.param) for name, why in refused] == [
        ("line-1", "context_length_exceeded", "messages"), ("line-3", "invalid_request", "prompt"),
    ]  # fmt: skip
    assert "512" in str(refused[0][1])


def test_thinking(prompts: Prompts) -> None:
    on, off = jobs_of(prompts, {"prompt": "x"}, {"prompt": "x", "enable_thinking": False})
    assert (on.thinking, off.thinking) == (True, False) and on.prompt != off.prompt
    assert not prompts.job(read({"prompt": "x"}).good[0], {}, False).thinking


def test_answers_do_not_depend_on_order_and_company(kimi: Kimi, prompts: Prompts) -> None:
    jobs = many(prompts)
    alone = {job.custom_id: next(answers(kimi, [job], 1)).ids for job in jobs}
    for order in (jobs, by_prefix(jobs), jobs[5:]):
        together = {order[each.index].custom_id: each.ids for each in answers(kimi, order, 5)}
        assert together == {job.custom_id: alone[job.custom_id] for job in order}


def test_prompts_that_begin_alike_are_computed_once(kimi: Kimi, prompts: Prompts) -> None:
    jobs = jobs_of(prompts, *({"prompt": "of the " * 60 + str(n), "max_tokens": 1} for n in range(6)))
    made = {answer.index: answer.cached_tokens for answer in answers(kimi, by_prefix(jobs), 1)}
    assert sum(made.values()) - made[0] == shared_tokens(jobs) > 5 * 60


def ids_in(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def test_answers_are_written_as_they_end_or_in_order(tmp_path: Path, kimi: Kimi, prompts: Prompts) -> None:
    jobs = many(prompts)
    wanted = [job.custom_id for job in jobs]
    found = {}
    for ordered in (False, True):
        out = tmp_path / f"{ordered}.jsonl"
        with Output(out, {}, dict.fromkeys(wanted, ""), force=False) as output:
            told = list(write_answers(answers(kimi, jobs, 6), jobs, output, prompts, ordered=ordered))
            assert output.answered == set(wanted)
        found[ordered] = ids_in(out)
        assert sorted(each.custom_id for each in told) == sorted(wanted)
        assert sum(each.new_tokens for each in told) <= sum(job.longest for job in jobs)
    assert found[True] == wanted and sorted(found[False]) == sorted(wanted) and found[False] != wanted


def test_an_ordered_output_that_is_stopped_is_a_beginning(tmp_path: Path, kimi: Kimi, prompts: Prompts) -> None:
    jobs = many(prompts)
    wanted = [job.custom_id for job in jobs]
    with Output(tmp_path / "out.jsonl", {}, dict.fromkeys(wanted, ""), force=False) as output:
        running = write_answers(answers(kimi, jobs, 6), jobs, output, prompts, ordered=True)
        for _ in range(5):
            next(running)
        running.close()
    written = ids_in(tmp_path / "out.jsonl")
    assert written == wanted[: len(written)] and len(written) < 6


CALL = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"


def test_records_are_what_openai_says_they_are(prompts: Prompts) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "y", "tool_call_id": "functions.f:0"},
    ]  # fmt: skip
    chat, raw = jobs_of(prompts, {"messages": talk}, {"url": "/v1/completions", "body": {"prompt": "x"}})
    ids = prompts.tokenizer.encode_prompt("because</think>Yes." + CALL.format(1, '{"a": 1}'))
    stop = min(prompts.stop_ids)
    record = answer_record(chat, Answer(0, [*ids, stop], "stop", 3), prompts)
    body = record["response"]["body"]
    answer = openai.types.chat.ChatCompletion.model_validate(body, strict=True)
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("Yes.", "tool_calls")
    assert body["choices"][0]["message"]["reasoning_content"] == "because"
    assert [(each.id, each.function.arguments) for each in message.tool_calls] == [("functions.f:1", '{"a": 1}')]
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(chat.prompt), len(ids) + 1)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.completion_tokens_details.reasoning_tokens == len(prompts.tokenizer.encode("because")) + 1
    record = answer_record(raw, Answer(1, prompts.tokenizer.encode("a <think>"), "context", 0), prompts)
    text = openai.types.Completion.model_validate(record["response"]["body"], strict=True)
    assert (text.choices[0].text, text.choices[0].finish_reason) == ("a <think>", "length")


def test_an_error_has_the_shape_of_openais() -> None:
    bad = read_lines([b'{"custom_id": "a", "prompt": "x", "n": 2}']).bad[0]
    record = error_record(bad.custom_id, bad.why)
    assert set(record) == {"id", "custom_id", "response", "error"}
    assert record["error"] == record["response"]["body"]["error"] == {
        "message": "n: One answer per request is made here. Send the request several times.",
        "type": "invalid_request_error", "param": "n",
        "code": "unsupported_parameter",
    }  # fmt: skip
    assert record["response"]["status_code"] == 400


def test_shared_tokens_are_those_of_a_tree(prompts: Prompts) -> None:
    """Prompts of ids, so that pages are easy to count."""
    stem = list(range(1, 131))

    def shared(*given: list[int]) -> int:
        lines = [{"url": "/v1/completions", "body": {"prompt": ids}} for ids in given]
        return shared_tokens(jobs_of(prompts, *lines))

    assert shared([*stem, 200], [5, 6], [*stem, 201]) == 130
    assert shared(stem, stem) == 129
    assert shared([*stem[:64], 9], [*stem[:64], 8], [*stem, 1], [*stem, 2]) == 64 + 64 + 130


def test_room_and_sequences(tiny: Path, prompts: Prompts) -> None:
    jobs = many(prompts, 5)
    assert sequences(tiny, jobs) == 5
    assert room_for(jobs, 2) == 2 * 64 and room_for(jobs, 9) == 5 * 64


def test_an_estimate_adds_up(tiny: Path, prompts: Prompts) -> None:
    jobs = many(prompts)
    found = estimate(tiny, jobs, 4)
    assert found is not None
    assert found.prompt_tokens == sum(len(job.prompt) for job in jobs) and found.new_tokens == sum(
        j.longest for j in jobs
    )
    assert found.decode_tok_s > found.decode_alone_tok_s > 0
    assert found.hours == pytest.approx(
        ((found.prompt_tokens - found.shared_tokens) / found.prefill_tok_s + found.new_tokens / found.decode_tok_s)
        / 3600
    )
    assert estimate(tiny, [], 4) is None
