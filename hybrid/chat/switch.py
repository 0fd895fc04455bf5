"""Whether to reason, in all the spellings in which programs say so."""

from collections.abc import Mapping
from typing import Any

from hybrid.errors import UsageError

EFFORTS = {"none": False, "minimal": True, "low": True, "medium": True, "high": True, "xhigh": True, "max": True}


def wanted_thinking(given: Mapping[str, Any]) -> bool | None:
    """The switch in the fields of a request, None where there is none. Raises UsageError for what is no switch.

    `thinking` ({"type": "enabled" | "disabled"}) counts before `chat_template_kwargs`, `enable_thinking` and
    `reasoning_effort`.
    """
    extra = given.get("chat_template_kwargs")
    nested = [extra.get(name) for name in ("thinking", "enable_thinking")] if isinstance(extra, Mapping) else []
    spelled = [_typed(given.get("thinking")), *nested, given.get("enable_thinking")]
    found = next((value for value in spelled if value is not None), None)
    if found not in (None, True, False):
        raise UsageError(f"thinking is {found!r}.", "It is true or false.")
    effort = given.get("reasoning_effort")
    if found is None:
        return EFFORTS.get(effort) if isinstance(effort, str) else None
    return bool(found)


def _typed(thinking: Any) -> Any:
    kind = thinking.get("type") if isinstance(thinking, Mapping) else thinking
    if isinstance(thinking, Mapping) and isinstance(kind, str):
        return kind != "disabled"
    return {"enabled": True, "disabled": False}.get(kind, kind) if isinstance(kind, str) else kind
