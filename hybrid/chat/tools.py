"""Tool declarations as the model was trained to read them: TypeScript text made from JSON schemas.

Each function becomes `type NAME = (_: {fields}) => any;` with descriptions, limits and defaults as `//` comments.
A schema this notation cannot say (oneOf, allOf, unknown references, ...) sends all tools as compact JSON instead.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from hybrid.errors import KimiError

Schema = dict[str, Any] | bool

INDENT = "  "
MAX_DEPTH = 64
LIMITS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
UNION_TYPES = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
ENUM_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}


def declare_tools(tools: Sequence[dict[str, Any]]) -> str:
    """The text of the tool_declare message for OpenAI-style `tools`; "" when there are none.

    Raises KimiError when `tools` is no list of objects or nests too deeply to be a schema.
    """
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise KimiError("`tools` is not a list of objects.", 'Write [{"type": "function", "function": {...}}].')
    if not tools:
        return ""
    tools = sort_keys(tools)
    try:
        text = "\n".join(_functions(tools))
    except (AttributeError, LookupError, TypeError, ValueError):
        text = ""
    if not text:
        return json.dumps(tools, ensure_ascii=False, separators=(",", ":"))
    return f"# Tools\n\n## functions\nnamespace functions {{\n{text}\n}}\n"


def sort_keys(value: Any, depth: int = 0) -> Any:
    """`value` with the keys of every object in order, at any depth. Raises KimiError past MAX_DEPTH levels."""
    if depth > MAX_DEPTH:
        raise KimiError(f"A tool's schema nests deeper than {MAX_DEPTH} levels.", "Simplify its parameters.")
    if isinstance(value, dict):
        return {str(key): sort_keys(value[key], depth + 1) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [sort_keys(item, depth + 1) for item in value]
    return value


def _functions(tools: Sequence[dict[str, Any]]) -> Iterable[str]:
    for tool in tools:
        if tool.get("type") == "function" and tool.get("function"):
            yield _Function(tool["function"]).declaration()


class _Function:
    """One function while it is being written; `$defs` become known as the objects that hold them are written."""

    def __init__(self, function: dict[str, Any]) -> None:
        self.function = function
        self.definitions: dict[str, Schema] = {}
        self.refers_to_itself = False

    def declaration(self) -> str:
        parameters = self.function.get("parameters") or {}
        root, lines = self._object(parameters, ""), []
        if self.refers_to_itself:
            root = "parameters"
            body = ",\n".join(text for _, text in self._fields(parameters, INDENT))
            lines.append("interface parameters {" + (f"\n{body}\n" if body else "") + "}")
        lines += [self._interface(name, schema) for name, schema in list(self.definitions.items())]
        if description := self.function.get("description"):
            lines.append(_comment(description, ""))
        lines.append(f"type {self.function.get('name', 'function')} = (_: {root}) => any;")
        return "\n".join(lines)

    def _interface(self, name: str, schema: Schema) -> str:
        if isinstance(schema, bool):
            raise ValueError(f"definition {name} is no object")
        description = schema.get("description", "")
        head = _comment(description, "") + "\n" if description else ""
        return f"{head}interface {name} {self._type(schema, '')}"

    def _type(self, schema: Schema, indent: str) -> str:
        """The TypeScript type of `schema`; lines after the first start with `indent`."""
        if isinstance(schema, bool):
            return "any" if schema else "null"
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            return " | ".join(self._type(option, indent) for option in schema["anyOf"])
        if "enum" in schema:
            return _enum(schema)
        if "type" not in schema:
            if schema:
                raise ValueError("a schema without a type")
            return "any"
        kind = schema["type"]
        if isinstance(kind, list):
            return " | ".join(UNION_TYPES[option] for option in kind)
        if kind == "object":
            return self._object(schema, indent)
        if kind == "array":
            return self._array(schema, indent)
        return "number" if kind == "integer" else str(kind)

    def _reference(self, ref: str) -> str:
        if ref == "#":
            self.refers_to_itself = True
            return "parameters"
        name = ref.rsplit("/", 1)[-1]
        if not ref.startswith("#/$defs/") or not isinstance(self.definitions.get(name), dict):
            raise ValueError(f"unknown reference {ref}")
        return name

    def _object(self, schema: dict[str, Any], indent: str) -> str:
        inner = indent + INDENT
        self.definitions.update(schema.get("$defs") or {})
        rest = self._additional(schema.get("additionalProperties"), inner)
        required = set(schema.get("required", []))
        fields = self._fields(schema, inner)
        lines = [text for name, text in fields if name in required]
        lines += [text for name, text in fields if name not in required]
        lines += rest
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if lines else "{}"

    def _additional(self, schema: Schema | None, indent: str) -> list[str]:
        if schema is None:
            return []
        kind = {True: "any", False: "never"}[schema] if isinstance(schema, bool) else self._type(schema, indent)
        return [f"{indent}[k: string]: {kind}"]

    def _fields(self, schema: dict[str, Any], indent: str) -> list[tuple[str, str]]:
        """(name, text) of every property, in name order."""
        required = set(schema.get("required", []))
        fields = []
        for name, field in sorted(schema.get("properties", {}).items()):
            mark = "" if name in required else "?"
            text = f"{indent}{name}{mark}: {self._type(field, indent)}"
            fields.append((name, _comments(field, indent) + _default(field, indent) + text))
        return fields

    def _array(self, schema: dict[str, Any], indent: str) -> str:
        items = schema.get("items") or {}
        comments = _comments(items, indent + INDENT)
        if not comments:
            return f"Array<{self._type(items, indent)}>"
        inner = indent + INDENT
        return f"Array<\n{comments}{inner}{self._type(items, inner)}\n{indent}>"


def _enum(schema: dict[str, Any]) -> str:
    kinds = schema.get("type", [])
    if isinstance(kinds, list) and "type" in schema:
        if len(kinds) not in (1, 2) or (len(kinds) == 2 and "null" not in kinds):
            raise ValueError(f"an enumeration of several types {kinds}")
        kinds = next((kind for kind in kinds if kind != "null"), "null")
    values = schema["enum"]
    expected = ENUM_TYPES.get(kinds, object) if isinstance(kinds, str) else object
    if not all(value is None or isinstance(value, expected) for value in values):
        raise ValueError(f"enumeration values that are not {kinds}")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def _comments(schema: Schema, indent: str) -> str:
    """The lines above a field: its description, then its limits; each line ends with a newline."""
    if isinstance(schema, bool):
        return ""
    text = ""
    if schema.get("description"):
        text += _comment(schema["description"], indent) + "\n"
    # A reference, a union or an enumeration is no plain type: its limits are not written.
    plain = not any(key in schema for key in ("$ref", "anyOf", "enum")) and isinstance(schema.get("type"), str)
    names = LIMITS.get(schema["type"], ()) if plain else ()
    limits = ", ".join(f"{name}: {schema[name]}" for name in sorted(names) if name in schema)
    return text + (f"{indent}// {limits}\n" if limits else "")


def _comment(text: str, indent: str) -> str:
    return "\n".join(f"{indent}// {line}" if line else "" for line in text.split("\n"))


def _default(schema: Schema, indent: str) -> str:
    value = None if isinstance(schema, bool) else schema.get("default")
    if value is None:
        return ""
    text = repr(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)
    return f"{indent}// Default: {text}\n"
