"""The record of a run."""

from __future__ import annotations

from hybrid.memory.achieved import recorded
from hybrid.stats import Stats


def test_prompts_that_were_not_read_to_their_end_say_nothing_of_speed() -> None:
    read = Stats(prompt_tokens=110, cached_tokens=10, prefill_s=2.0, first_token_s=2.5)
    given_up = Stats(prompt_tokens=5000)
    assert recorded([read, given_up], 1.0)["prefill_tok_s"] == 50.0
    assert "prefill_tok_s" not in recorded([given_up], 1.0)
