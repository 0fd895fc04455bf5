"""Nothing that comes from outside the template can become a control token, and nothing of it is lost."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from hybrid.chat.tokenizer import KIMI_SPECIALS, Tokenizer

NAMES = [name for name, _ in KIMI_SPECIALS.values()] + ["<|reserved_token_400|>", "<|kimi_k25_video_placeholder|>"]
PIECES = ["<", ">", "|", "<|", "|>", "<|im_", "end|>", "im_end", "[", "EOS", "eos", "end", "]", "</", "think"]
PIECES += [" ", "\n", "a", "é", "中"]
PRIVATE = ["\U000f0000", "\U000f0001", "\U000f0002", "\U000f0003", "\ue000"]
TEXTS = st.lists(st.sampled_from(NAMES * 2 + PIECES + PRIVATE), max_size=6).map("".join)


def parts_of(texts: Any) -> Any:
    return st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)


def arguments(texts: Any) -> Any:
    return st.dictionaries(texts, st.one_of(texts, st.lists(texts, max_size=2), st.integers()), max_size=2)


def conversations(texts: Any = TEXTS) -> Any:
    """Messages with foreign text in every place that takes text."""
    function = st.fixed_dictionaries({"name": texts, "arguments": st.one_of(texts, arguments(texts))})
    calls = st.lists(st.fixed_dictionaries({"id": texts, "function": function}), max_size=2)
    message = st.fixed_dictionaries(
        {
            "role": st.one_of(st.sampled_from(["user", "assistant", "assistant", "tool", "system"]), texts),
            "content": st.one_of(texts, parts_of(texts), st.none()),
        },
        optional={"reasoning_content": texts, "tool_calls": calls, "tool_call_id": texts, "name": texts},
    )
    return st.lists(message, max_size=4)


def tool_lists(texts: Any = TEXTS) -> Any:
    field = st.fixed_dictionaries({"type": st.just("string")}, optional={"description": texts, "default": texts})
    parameters = st.fixed_dictionaries({"properties": st.dictionaries(texts, field, max_size=2)})
    function = st.fixed_dictionaries({"name": texts, "parameters": parameters}, optional={"description": texts})
    return st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": function}), max_size=2)


def harmless(value: Any) -> Any:
    """The same shape with everything removed that could be part of a special token's name."""
    if isinstance(value, str):
        return value if value in ("function", "text") else re.sub(r"[<>\[\]|]", "", value) or "x" * bool(value)
    if isinstance(value, dict):
        return {harmless(key): harmless(item) for key, item in value.items()}
    return [harmless(item) for item in value] if isinstance(value, list) else value


def specials(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    return [name for i in ids if (name := tokenizer.special_name(i))]


@given(conversations(), tool_lists(), st.booleans())
def test_foreign_text_never_becomes_a_control_token(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool
) -> None:
    template = ChatTemplate(DEFAULT_TEMPLATE)
    ids = template.render_ids(messages, tokenizer, tools=tools, thinking=thinking)
    clean = template.render_ids(harmless(messages), tokenizer, tools=harmless(tools), thinking=thinking)
    assert specials(ids, tokenizer) == specials(clean, tokenizer)
    assert tokenizer.decode(ids, skip_special=False) == template.render(messages, tools=tools, thinking=thinking)


@given(TEXTS, TEXTS, TEXTS)
def test_between_control_tokens_the_ids_are_those_of_plain_text(
    tokenizer: Tokenizer, system: str, question: str, thought: str
) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": [{"type": "text", "text": question}, {"type": "text", "text": thought}]},
        {
            "role": "assistant",
            "content": question,
            "reasoning_content": thought,
            "tool_calls": [{"id": "functions.f:0", "function": {"name": "f", "arguments": system}}],
        },
    ]
    s, plain = tokenizer.specials, tokenizer.encode
    middle, end = s["<|im_middle|>"], s["<|im_end|>"]
    expected = [s["<|im_system|>"], *plain("system"), middle, *plain(system), end]
    expected += [s["<|im_user|>"], *plain("user"), middle, *plain(question + thought), end]
    expected += [s["<|im_assistant|>"], *plain("assistant"), middle, s["<think>"], *plain(thought), s["</think>"]]
    expected += [*plain(question), s["<|tool_calls_section_begin|>"], s["<|tool_call_begin|>"], *plain("functions.f:0")]
    expected += [s["<|tool_call_argument_begin|>"], *plain(system), s["<|tool_call_end|>"]]
    expected += [s["<|tool_calls_section_end|>"], end]
    ids = ChatTemplate(DEFAULT_TEMPLATE).render_ids(messages, tokenizer, add_generation_prompt=False)
    assert ids == expected


# What templates of other origin do to texts, and the control tokens that they write themselves.
OTHER_TEMPLATES = {
    "{% for m in messages %}{{ m.content }}{% endfor %}": 0,
    "{% for m in messages %}<{{ m.content }}>{% endfor %}": 0,
    "{% for m in messages %}[{{ m.content | trim }}]<|im_{{ m.content | trim }}|></{{ m.content }}>{% endfor %}": 0,
    "{% for m in messages %}[{{ m.content | upper }}]<|{{ m.content | lower | trim }}|>{% endfor %}": 0,
    "{% for m in messages %}{{ m.content[1:] }}{{ m.content[:-1] }}{{ m.content[::2] }}{% endfor %}": 0,
    "{% for m in messages %}{{ m.content | tojson }}{{ m | tojson(indent=2) }}{% endfor %}": 0,
    "{% for m in messages %}{{ m.content | upper }}{{ m.content.lower() }}{{ m.content.title() }}{% endfor %}": 0,
    "{% for m in messages %}{{ m.content.split() | join }}{{ m.content.split('|') | join('|') }}{% endfor %}": 0,
    "{{ messages | map(attribute='content') | join }}{{ messages | map(attribute='content') | join('im_end') }}": 0,
    "{{ messages }}{% for m in messages %}{{ m.content | reverse }}{{ m.content.strip('<|') }}{% endfor %}": 0,
    "<|im_user|>{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>": 2,
}


@pytest.mark.parametrize("source", OTHER_TEMPLATES)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_with_templates_of_other_origin(tokenizer: Tokenizer, source: str, texts: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    ids = ChatTemplate(source).render_ids(messages, tokenizer)
    assert len(specials(ids, tokenizer)) == OTHER_TEMPLATES[source]


@given(TEXTS)
def test_lengths_and_slices_stay_true(tokenizer: Tokenizer, text: str) -> None:
    source = "{% for m in messages %}{{ m.content | length }}:{{ m.content[2:9] }}:{{ m.content | tojson }}{% endfor %}"
    template, messages = ChatTemplate(source), [{"role": "user", "content": text}]
    assert tokenizer.decode(template.render_ids(messages, tokenizer)) == template.render(messages)


def test_a_special_named_like_a_word_cannot_be_written() -> None:
    """Its letters cannot be told from those of ordinary text, so it stays text even where the template writes it."""
    tokenizer = Tokenizer([bytes([i]) for i in range(256)], {256: ("user", True), 257: ("<|im_user|>", True)})
    ids = ChatTemplate(DEFAULT_TEMPLATE).render_ids([{"role": "user", "content": "user<|im_user|>"}], tokenizer)
    assert specials(ids, tokenizer) == ["<|im_user|>"]
