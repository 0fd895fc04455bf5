"""A checkpoint's chat template, run without trust: jinja2's immutable sandbox with the settings templates expect.

Templates are written for transformers: block lines leave no blanks, `tojson` keeps non-ASCII letters, `break` and
`continue` work, `raise_exception` and `strftime_now` exist, and `{% generation %}` blocks are transparent.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from hybrid.errors import CheckpointError, KimiError

MAX_STEPS = 1_000_000

# What a wrong template can run into; none of our own code runs while these are caught.
FAILURES = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def compile_template(source: str, origin: str) -> Callable[[dict[str, Any]], str]:
    """A function that renders `source` with the given variables.

    Both steps raise CheckpointError, naming `origin`, for a template that is broken or leaves the sandbox; rendering
    raises KimiError with the template's own words when it calls `raise_exception`.
    """
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except FAILURES as error:
        raise _broken(origin, error) from error

    def render(variables: dict[str, Any]) -> str:
        try:
            return template.render(range=_LimitedRange(), **variables)
        except FAILURES as error:
            raise _broken(origin, error) from error

    return render


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        # jinja2 lets the access pass as "undefined" until its value is used; nothing honest gets this far.
        raise SecurityError(f"it reaches for the attribute {attribute!r} of a {type(obj).__name__}")


class _LimitedRange:
    """`range`, for MAX_STEPS numbers in one rendering: the sandbox limits one range, not ranges within ranges."""

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def __call__(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.left -= len(numbers)
        if self.left < 0:
            raise OverflowError(f"it counts through more than {MAX_STEPS} numbers")
        return numbers


class _Generation(Extension):
    """`{% generation %}` marks the model's own words for training; here its content is simply written."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise KimiError(f"The model's chat template refuses this conversation: {message}")


def _broken(origin: str, error: BaseException) -> CheckpointError:
    where = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    why = " ".join(str(error).split())[:300] or type(error).__name__
    remedy = "Download chat_template.jinja again, or delete it to use the built-in one."
    return CheckpointError(f"The chat template of {origin}{where} does not work: {why}.", remedy)
