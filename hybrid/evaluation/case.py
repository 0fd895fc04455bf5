"""One question with the answer that counts as right."""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from hybrid.chat.message import Message, ToolCall
from hybrid.chat.parser import THINK_END
from hybrid.chat.template import ChatTemplate
from hybrid.chat.tokenizer import Tokenizer

TEST_SHARE = 8  # one case in so many is held out


@dataclass(frozen=True)
class Case:
    """A conversation up to the model's turn, and that turn: what training imitates and `check` asks for.

    `exact`: the words of the answer count, too. `key`: what training must not have seen when this case is a test, where
    that is less than the whole prompt (a sum, however it is asked for).
    """

    skill: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    thinking: bool
    answer: Message
    exact: bool = True
    key: str = ""

    @property
    def split(self) -> str:
        """ "train" or "test", decided by the prompt alone."""
        said = [[message.role, message.content] for message in self.messages]
        digest = sha256((self.key or json.dumps([said, self.tools])).encode()).digest()
        return "train" if digest[0] % TEST_SHARE else "test"


def check(case: Case, reply: Message) -> bool:
    """Whether `reply` is right. Reasoning is not compared.

    Calls must be the same, in the same order: names, and arguments as JSON values; words beside them are free. Where no
    call is right there must be none, and the same words, blanks around them aside, or any words if not `exact`.
    """
    wanted = case.answer
    if [call.name for call in wanted.tool_calls] != [call.name for call in reply.tool_calls]:
        return False
    if wanted.tool_calls:
        calls = zip(wanted.tool_calls, reply.tool_calls, strict=True)
        return all(_same_arguments(*pair) for pair in calls)
    said = reply.content.strip()
    return said == wanted.content.strip() if case.exact else bool(said)


def prompt_ids(case: Case, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The conversation up to where the model goes on."""
    return template.render_ids(case.messages, tokenizer, tools=case.tools, thinking=case.thinking)


def reply_ids(case: Case, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The answer as the model has to write it, <|im_end|> included.

    As a message of the history it would lose its reasoning, so it is rendered without and the reasoning put in front.
    """
    bare = replace(case.answer, reasoning_content=None)
    turn = template.render_ids([bare], tokenizer, add_generation_prompt=False)
    begin = turn.index(tokenizer.specials[THINK_END])
    if not case.thinking:
        return turn[begin + 1 :]
    return tokenizer.encode(case.answer.reasoning_content or "") + turn[begin:]


def _same_arguments(wanted: ToolCall, given: ToolCall) -> bool:
    try:
        return json.loads(given.arguments) == json.loads(wanted.arguments)
    except (ValueError, RecursionError):
        return False
