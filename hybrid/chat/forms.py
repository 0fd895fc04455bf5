"""The form that an answer is to have, as a grammar in Lark: JSON of a schema, calls of declared tools."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.chat.parser import CALL_ARGUMENTS, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END
from hybrid.errors import UsageError

ANY_OBJECT = {"type": "object"}
BLANKS = r"\n? {0,40}"
UNSUPPORTED = "unsupported_parameter"


class BadField(UsageError):
    """What a request asks for and cannot have: `param` is the field at fault, `code` a word for programs."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def answer_grammar(response_format: Mapping[str, Any] | None) -> str | None:
    """The rule of an answer in that format, in Lark; None where any text will do. Raises BadField."""
    match (response_format or {}).get("type", "text"):
        case "text":
            return None
        case "json_object":
            return _json(ANY_OBJECT)
        case "json_schema":
            given = (response_format or {}).get("json_schema", response_format)
            schema = given.get("schema") if isinstance(given, Mapping) else None
            if not isinstance(schema, dict):
                raise BadField("json_schema has no `schema` object.", "response_format")
            return _json(schema)
        case kind:
            known = "text, json_object and json_schema"
            raise BadField(f"Answers of type {kind!r} are not here: {known} are.", "response_format", UNSUPPORTED)


def calls_grammar(tools: Sequence[Mapping[str, Any]], name: str | None) -> str:
    """The rule of an answer that calls these tools; of one of the tool `name` if that is given. Raises BadField."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), Mapping)]
    chosen = [function for function in functions if name is None or function.get("name") == name]
    if not chosen:
        what = "There are no tools to call." if name is None else f"There is no tool {name!r}."
        raise BadField(what, "tool_choice")
    calls = " | ".join(f"( {_call(function)} )" for function in chosen)
    return f"{SECTION_BEGIN[0]} ( {calls} ){'+' if name is None else ''} {SECTION_END[0]}"


def _call(function: Mapping[str, Any]) -> str:
    parameters = function.get("parameters")
    schema = parameters if isinstance(parameters, dict) and parameters else ANY_OBJECT
    prefix = json.dumps(f"functions.{function.get('name')}:")
    return f"{CALL_BEGIN} {prefix} /[0-9]{{1,3}}/ {CALL_ARGUMENTS} {_json(schema)} {CALL_END}"


def _json(schema: Mapping[str, Any]) -> str:
    """A rule for values of `schema`, with room for layout, but not for blanks without end."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": BLANKS}})


def either(*rules: str | None) -> str | None:
    """The grammar of an answer that follows one of `rules`; None where there are none."""
    found = [rule for rule in rules if rule is not None]
    return "start: " + " | ".join(f"( {rule} )" for rule in found) if found else None


def held_to(
    tools: Sequence[dict[str, Any]] | None, choice: str | Mapping[str, Any] | None, answer: str | None
) -> tuple[list[dict[str, Any]] | None, str | None]:
    """The tools to declare, and the grammar of what is to come, where `answer` is the rule of an answer in text.

    Tools that must not be called are not declared: the model is not to know of them then. Raises BadField.
    """
    tools = list(tools or ()) or None
    if choice == "none" or (tools is None and choice in (None, "auto")):
        return None, either(answer)
    if choice in (None, "auto"):
        return tools, either(answer, calls_grammar(tools or (), None)) if answer else None
    if choice == "required":
        return tools, either(calls_grammar(tools or (), None))
    function = choice.get("function", choice) if isinstance(choice, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        what = "tool_choice may be auto, none, required or one function by its name."
        raise BadField(what, "tool_choice", UNSUPPORTED)
    return tools, either(calls_grammar(tools or (), name))
