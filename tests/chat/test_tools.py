"""Tool declarations: the documented example, one case per rule of the notation, and the fallback."""

import json
from typing import Any

import pytest

from hybrid.chat.tools import MAX_DEPTH, declare_tools
from hybrid.errors import KimiError


def function(name: str = "f", description: str = "", **parameters: Any) -> dict[str, Any]:
    tool: dict[str, Any] = {"name": name, "parameters": {"type": "object", **parameters}}
    return {"type": "function", "function": {**tool, "description": description} if description else tool}


def declared(**parameters: Any) -> str:
    """What is written between the braces of the namespace for one function f."""
    text = declare_tools([function(**parameters)])
    head, tail = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(head) and text.endswith(tail), text
    return text.removeprefix(head).removesuffix(tail)


def field(schema: Any) -> str:
    """What is written for one optional field x."""
    text = declared(properties={"x": schema})
    return text.removeprefix("type f = (_: {\n").removesuffix("\n}) => any;")


def test_the_documented_example() -> None:
    weather = function(
        "get_weather",
        "Get weather information.",
        properties={
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "city": {"type": "string", "description": "City name"},
        },
        required=["city"],
    )
    assert declare_tools([weather, function("ping", properties={})]) == (
        "# Tools\n\n## functions\nnamespace functions {\n"
        "// Get weather information.\n"
        "type get_weather = (_: {\n"
        "  // City name\n"
        "  city: string,\n"
        "  // maximum: 7, minimum: 1\n"
        "  days?: number,\n"
        '  // Default: "c"\n'
        '  unit?: "c" | "f"\n'
        "}) => any;\n"
        "type ping = (_: {}) => any;\n"
        "}\n"
    )


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer"}, "  x?: number"),
        ({"type": "boolean"}, "  x?: boolean"),
        ({}, "  x?: any"),
        (True, "  x?: any"),
        (False, "  x?: null"),
        ({"enum": ["a", 1, None, True, 1.5]}, '  x?: "a" | 1 | None | True | 1.5'),
        ({"enum": ["a", None], "type": ["string", "null"]}, '  x?: "a" | None'),
        ({"type": ["string", "integer", "object", "array", "null"]}, "  x?: string | number | {} | Array<any> | null"),
        (
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
            "  x?: string | Array<number>",
        ),
        ({"type": "array"}, "  x?: Array<any>"),
        ({"type": "array", "items": {"type": "string"}, "minItems": 1}, "  // minItems: 1\n  x?: Array<string>"),
        (
            {"type": "array", "items": {"type": "string", "description": "one"}},
            "  x?: Array<\n    // one\n    string\n  >",
        ),
        (
            {"type": "string", "pattern": "^a", "maxLength": 3, "minLength": 0, "maximum": 9},
            "  // maxLength: 3, minLength: 0, pattern: ^a\n  x?: string",
        ),
        ({"type": "string", "description": "a\n\nb"}, "  // a\n\n  // b\n  x?: string"),
        ({"type": "boolean", "default": True}, "  // Default: True\n  x?: boolean"),
        ({"type": "number", "default": 0.00001}, "  // Default: 1e-05\n  x?: number"),
        ({"type": "string", "default": "é"}, '  // Default: "é"\n  x?: string'),
        ({"type": "object", "default": {"a": [1]}}, '  // Default: {"a": [1]}\n  x?: {}'),
        ({"type": "string", "default": None}, "  x?: string"),
        ({"type": "object", "additionalProperties": True}, "  x?: {\n    [k: string]: any\n  }"),
        (
            {"type": "object", "properties": {"z": {}}, "additionalProperties": False},
            "  x?: {\n    z?: any,\n    [k: string]: never\n  }",
        ),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "  x?: {\n    [k: string]: number\n  }"),
        (
            {"type": "object", "properties": {"b": {}, "a": {}, "c": {}}, "required": ["c"]},
            "  x?: {\n    c: any,\n    a?: any,\n    b?: any\n  }",
        ),
    ],
)
def test_one_field(schema: Any, text: str) -> None:
    assert field(schema) == text


def test_definitions_become_interfaces() -> None:
    defs = {"Node": {"type": "object", "description": "A node", "properties": {"next": {"$ref": "#/$defs/Node"}}}}
    text = declared(properties={"root": {"$ref": "#/$defs/Node"}}, required=["root"], **{"$defs": defs})
    assert text == "// A node\ninterface Node {\n  next?: Node\n}\ntype f = (_: {\n  root: Node\n}) => any;"


def test_parameters_that_refer_to_themselves() -> None:
    text = declared(properties={"next": {"$ref": "#"}, "a": {"type": "string"}}, required=["next"])
    assert text == "interface parameters {\n  a?: string,\n  next: parameters\n}\ntype f = (_: parameters) => any;"


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "string"}]},
        {"allOf": []},
        {"$ref": "#/$defs/Unknown"},
        {"$ref": "http://example.org/x"},
        {"type": "string", "enum": [1]},
        {"type": ["string", "integer"], "enum": ["a"]},
        {"type": "string", "description": 5},
        {"type": "array", "items": [{"type": "string"}]},
        {"type": ["text"]},
        7,
    ],
)
def test_what_cannot_be_said_is_sent_as_compact_json(schema: Any) -> None:
    tools = [function("é", "d", properties={"x": schema}), function("g")]
    text = declare_tools(tools)
    assert json.loads(text) == tools
    assert text.startswith('[{"function":{"description":"d","name":"é","parameters":{"properties":{"x":')


def test_other_kinds_of_tools_are_left_out() -> None:
    plugin = {"type": "_plugin", "name": "search"}
    assert declare_tools([plugin, function("f")]) == declare_tools([function("f")])
    assert declare_tools([plugin]) == '[{"name":"search","type":"_plugin"}]'
    assert declare_tools([]) == ""


def test_the_order_of_keys_does_not_matter() -> None:
    one = function(properties={"a": {"type": "string", "description": "x"}, "b": {}})
    two = {"function": dict(reversed(one["function"].items())), "type": "function"}
    assert declare_tools([one]) == declare_tools([two])


@pytest.mark.parametrize("tools", [5, "f", [5], {"type": "function"}])
def test_what_is_no_list_of_tools_is_refused(tools: Any) -> None:
    with pytest.raises(KimiError, match="list of objects"):
        declare_tools(tools)


@pytest.mark.parametrize("depth", [MAX_DEPTH, 100_000])
def test_endless_nesting_is_refused(depth: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    with pytest.raises(KimiError, match="deeper"):
        declare_tools([function(properties={"x": schema})])


def test_a_schema_that_holds_itself_is_refused() -> None:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    with pytest.raises(KimiError, match="deeper"):
        declare_tools([function(properties={"x": schema})])
