"""Whether to reason, as Moonshot, vLLM, Qwen's and OpenAI's clients say it."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid.chat.switch import wanted_thinking
from hybrid.errors import UsageError


@pytest.mark.parametrize("given, wanted", [
    ({}, None),
    ({"thinking": {"type": "disabled"}}, False),
    ({"thinking": {"type": "enabled", "keep": "all"}}, True),
    ({"thinking": {"type": "adaptive"}}, True),
    ({"thinking": "disabled"}, False),
    ({"thinking": False}, False),
    ({"chat_template_kwargs": {"thinking": False}}, False),
    ({"chat_template_kwargs": {"enable_thinking": True}}, True),
    ({"chat_template_kwargs": "nonsense"}, None),
    ({"enable_thinking": False}, False),
    ({"reasoning_effort": "none"}, False),
    ({"reasoning_effort": "minimal"}, True),
    ({"reasoning_effort": "utmost"}, None),
    ({"reasoning_effort": 3}, None),
    ({"thinking": {"type": "enabled"}, "enable_thinking": False, "reasoning_effort": "none"}, True),
    ({"chat_template_kwargs": {"thinking": False}, "enable_thinking": True}, False),
    ({"thinking": None, "chat_template_kwargs": None, "enable_thinking": None, "reasoning_effort": None}, None),
])  # fmt: skip
def test_the_switch_in_its_spellings(given: dict[str, Any], wanted: bool | None) -> None:
    assert wanted_thinking(given) is wanted


@pytest.mark.parametrize("given", [{"thinking": "maybe"}, {"enable_thinking": "x"}, {"thinking": [1]}])
def test_what_is_no_switch_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="thinking is"):
        wanted_thinking(given)
