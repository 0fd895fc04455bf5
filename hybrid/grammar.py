"""Answers held to a form: a grammar says which tokens may come next. Reasoning, which comes first, stays free."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hybrid.chat.forms import BadField
from hybrid.chat.parser import SECTION_BEGIN, THINK_END
from hybrid.chat.tokenizer import NUM_SPECIALS, SPLIT_PATTERN, Tokenizer
from hybrid.errors import KimiError, MissingExtra

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = Callable[[Sequence[int]], Tensor | None]


class Grammars:
    """Masks for one model's answers. Its vocabulary is prepared once, which takes a second for a large one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._size = vocab_size
        self._stop_ids = stop_ids
        self._lock = threading.Lock()
        self._prepared: LLTokenizer | None = None

    def mask(self, grammar: str, thinking: bool) -> Mask:
        """For a reply that reasons first if `thinking`. Raises as `matcher`."""
        return _Held(self.matcher(grammar), self._tokenizer, self._size, self._stop_ids, thinking)

    def matcher(self, grammar: str) -> "LLMatcher":
        """Raises BadField for a schema that cannot be kept to, MissingExtra where llguidance is not installed."""
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError as error:
            remedy = "Answers of a form need it: pip install 'kimi-local[grammar]'."
            raise MissingExtra("llguidance is not installed.", remedy) from error
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            why = matcher.get_error().splitlines()[0]
            raise BadField(f"The schema cannot be kept to: {why}.", code="unsupported_schema")
        return matcher

    def _vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        with self._lock:
            if self._prepared is None:
                tokenizer, size = self._tokenizer, self._size
                ranks = range(tokenizer.vocab_size - NUM_SPECIALS)
                self._prepared = LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]
                    encoder={tokenizer.token_bytes(rank): rank for rank in ranks},
                    special_tokens={name: token for name, token in tokenizer.specials.items() if token < size},
                    pattern=SPLIT_PATTERN,
                    eos_token=sorted(self._stop_ids),
                    n_vocab=size,
                )
            return self._prepared


class _Held:
    """One answer's mask: until the reasoning has ended anything but the end of the answer is allowed."""

    def __init__(
        self, matcher: "LLMatcher", tokenizer: Tokenizer, size: int, stop_ids: frozenset[int], thinking: bool
    ) -> None:
        self._matcher = matcher
        self._size = size
        specials = tokenizer.specials
        self._think_end = specials.get(THINK_END)
        self._section = specials.get(SECTION_BEGIN[0])
        self._free = thinking and self._think_end is not None
        self._seen = 0
        self._goes_on = torch.ones(self._size, dtype=torch.bool)
        self._goes_on[list(stop_ids)] = False
        if self._section is not None:
            self._goes_on[self._section] = False

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """bool [vocab]: what may come after `ids`, all of the answer so far."""
        for token in ids[self._seen :]:
            if self._free:
                self._free = token != self._think_end
            elif not self._matcher.consume_token(token):
                raise KimiError("The answer has left the form it was to have.", "Ask again, or without a form.")
        self._seen = len(ids)
        if self._free:
            return self._goes_on
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=self._size, bitorder="little")
        return torch.from_numpy(allowed.astype(bool))
