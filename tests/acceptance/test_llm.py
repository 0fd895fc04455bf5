"""The `llm` command-line tool against the server: prompts, streams, conversations, schemas, tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODELS = """
- model_id: kimi
  model_name: instant
  api_base: "{address}/v1"
  supports_schema: true
  supports_tools: true
"""
LIMIT = ("-o", "temperature", "0", "-o", "max_tokens")


@pytest.fixture
def llm(address: str, tmp_path: Path) -> Callable[..., str]:
    """What the tool prints for these arguments."""
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(address=address))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=120, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def logged(llm: Callable[..., str]) -> list[dict[str, Any]]:
    """What the tool kept of its questions, oldest first."""
    return json.loads(llm("logs", "-n", "0", "--json"))


def test_a_prompt_streamed_and_whole(llm: Callable[..., str]) -> None:
    question = ("-m", "kimi", "hello", *LIMIT, "12")
    whole = llm(*question, "--no-stream")
    assert whole.strip() and llm(*question) == whole
    assert all(entry["output_tokens"] == 12 for entry in logged(llm))


def test_a_conversation_goes_on(llm: Callable[..., str]) -> None:
    llm("-m", "kimi", "hello", "-s", "be brief", *LIMIT, "8")
    llm("-c", "and now?", *LIMIT, "8")
    first, second = logged(llm)
    assert first["conversation_id"] == second["conversation_id"]
    assert second["input_tokens"] > first["input_tokens"] + first["output_tokens"]


def test_a_schema_is_kept_to(llm: Callable[..., str]) -> None:
    kinds = {"sunny": {"type": "boolean"}, "sky": {"enum": ["blue", "grey"]}}
    schema = {"type": "object", "properties": kinds, "required": [*kinds], "additionalProperties": False}
    told = json.loads(llm("-m", "kimi", "the weather", "--schema", json.dumps(schema), *LIMIT, "400"))
    assert isinstance(told["sunny"], bool) and told["sky"] in ("blue", "grey")


def test_tools_are_declared(llm: Callable[..., str]) -> None:
    plain, tooled = (llm("-m", "kimi", "hello", *more, *LIMIT, "8") for more in ((), ("-T", "llm_version")))
    assert plain and tooled
    without, declared = logged(llm)
    assert declared["input_tokens"] > without["input_tokens"], "the model is told of the tool"
