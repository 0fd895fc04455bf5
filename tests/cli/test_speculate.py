"""`--speculate`: off unless asked for, handed to the model, and told of below an answer."""

from collections.abc import Callable
from typing import Any

import pytest

from cli.attaching import LOADING
from cli.options import ChatOptions, Speculate
from cli.output import stats_line
from hybrid.stats import Stats


@pytest.mark.parametrize(("options", "on"), [(ChatOptions(), False), (ChatOptions(speculate=Speculate.auto), True)])
def test_what_the_model_is_loaded_with(
    load_settings: Callable[..., dict[str, Any]], options: ChatOptions, on: bool
) -> None:
    assert load_settings(options)["speculate"] is on


def test_it_is_about_a_model_that_is_loaded_here() -> None:
    assert "speculate" in LOADING


def test_the_line_below_an_answer_tells_of_guesses_if_there_were_any() -> None:
    stats = Stats(prompt_tokens=20, answer_tokens=50)
    assert "guessed" not in stats_line(stats, 4096, None, 200)
    stats.drafted, stats.accepted = 1200, 1010
    assert "1,010 of 1,200 guessed tok right" in stats_line(stats, 4096, None, 200)
