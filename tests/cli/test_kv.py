"""`--kv`: as computed unless asked for, and handed to the model."""

from collections.abc import Callable
from typing import Any

import pytest

from cli.attaching import LOADING
from cli.options import KV, ChatOptions
from hybrid.kimi import KV_CHOICES


@pytest.mark.parametrize(("options", "kind"), [(ChatOptions(), "auto"), (ChatOptions(kv=KV.int8), "int8")])
def test_what_the_model_is_loaded_with(
    load_settings: Callable[..., dict[str, Any]], options: ChatOptions, kind: str
) -> None:
    assert load_settings(options)["kv"] == kind


def test_there_is_a_choice_for_every_kind() -> None:
    assert tuple(each.value for each in KV) == KV_CHOICES


def test_it_is_about_a_model_that_is_loaded_here() -> None:
    assert "kv" in LOADING
