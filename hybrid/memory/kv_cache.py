"""The latent KV cache: per token and layer one row of kv_lora_rank + qk_rope_head_dim values, in pages.

K2.5 keeps 576 values per token and layer (70,272 bytes per token in bf16) where keys and values spelled out per head
would take 2.5 MB. Less if they are reduced (`kv_format`): rows are then rounded as they are written, and attention sees
what was written, of the tokens it is computing as well. So it does not matter whether rows were computed in this step.
"""

import math
from bisect import bisect_left, insort
from operator import neg

import torch
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.memory.kv_codec import decode, encode
from hybrid.memory.kv_format import AUTO, PAGE_SIZE, KVFormat, kind_of, pages_for
from quant.aligned import PAGE

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}

__all__ = ["PAGE_SIZE", "KVCache", "pages_for"]


class KVCache:
    """Pages of latent rows shared by all sequences; a sequence is a list of page numbers.

    A page may have several holders, none of whom writes to it then; it is free when the last one has dropped it.
    """

    def __init__(
        self, config: ModelConfig, tokens: int, *, dtype: torch.dtype, device: torch.device, kind: str = AUTO
    ) -> None:
        """Room for `tokens` tokens, rounded up to whole pages; on a CPU memory is taken as it is first written.

        `dtype` is what rows are computed in, `kind` how they are kept: a member of KINDS, or "auto" for the same.
        """
        self.dtype, self.format = dtype, KVFormat.of(config, kind_of(kind, full=dtype == torch.float32))
        self.num_pages = pages_for(tokens)
        stored = STORED.get(self.format.kind, torch.uint8)
        width = self.format.row_bytes // stored.itemsize
        self.rows = _empty((config.num_hidden_layers, self.num_pages * PAGE_SIZE, width), stored, device)
        self.free = list(range(self.num_pages - 1, -1, -1))  # lowest page last: handed out in memory order
        self.holders = [0] * self.num_pages

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.num_pages * PAGE_SIZE

    def extend(self, page_table: list[int], tokens: int) -> None:
        """Append pages to `page_table` until it holds `tokens` tokens; the caller has checked that there are enough."""
        missing = pages_for(tokens) - len(page_table)
        assert missing <= len(self.free), (missing, len(self.free))
        for _ in range(missing):
            page_table.append(self._take(page_table[-1] + 1 if page_table else 0))

    def hold(self, page: int) -> None:
        """One more holder of a page that has one."""
        assert self.holders[page], page
        self.holders[page] += 1

    def drop(self, page: int) -> None:
        """One holder less."""
        assert self.holders[page], page
        self.holders[page] -= 1
        if not self.holders[page]:
            insort(self.free, page, key=neg)

    def release(self, page_table: list[int], tokens: int = 0) -> None:
        """Drop the pages of `page_table` beyond its first `tokens` tokens."""
        kept = pages_for(tokens)
        for page in page_table[kept:]:
            self.drop(page)
        del page_table[kept:]

    def copy(self, source: int, target: int, rows: int) -> None:
        """The first `rows` rows of page `source` into page `target`, in all layers."""
        first, second = source * PAGE_SIZE, target * PAGE_SIZE
        self.rows[:, second : second + rows] = self.rows[:, first : first + rows]

    def write(self, layer: int, page_table: tuple[int, ...], past: int, rows: Tensor) -> None:
        """Store `rows` [tokens, latent_dim] at positions past.. of a sequence."""
        run = self._run(page_table, past, past + len(rows))
        stored = encode(rows, self.format) if self.format.reduced else rows.to(self.rows.dtype)
        if isinstance(run, slice):
            self.rows[layer, run] = stored
        else:
            self.rows[layer].index_copy_(0, run, stored)

    def read(self, layer: int, page_table: tuple[int, ...], tokens: int) -> Tensor:
        """The first `tokens` rows of a sequence, [tokens, latent_dim]; unless reduced a view where its pages lie in a
        row."""
        run = self._run(page_table, 0, tokens)
        stored = self.rows[layer, run] if isinstance(run, slice) else self.rows[layer].index_select(0, run)
        return decode(stored, self.format, self.dtype) if self.format.reduced else stored

    def _take(self, wanted: int) -> int:
        """Page `wanted` if it is free, so that sequences lie in a row, else the lowest that is."""
        at = bisect_left(self.free, -wanted, key=neg)
        page = self.free.pop(at if at < len(self.free) and self.free[at] == wanted else -1)
        self.holders[page] = 1
        return page

    def _run(self, page_table: tuple[int, ...], start: int, stop: int) -> slice | Tensor:
        """Where positions start..stop of a sequence lie in `rows`."""
        first, last = start // PAGE_SIZE, pages_for(stop)
        pages = page_table[first:last]
        if pages == tuple(range(pages[0], pages[0] + len(pages))):
            offset = (pages[0] - first) * PAGE_SIZE
            return slice(offset + start, offset + stop)
        slots = (torch.tensor(pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).view(-1)
        return slots[start - first * PAGE_SIZE : stop - first * PAGE_SIZE].to(self.rows.device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, and in RAM beginning where a drive can read to."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.empty(size + PAGE, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % PAGE
    return raw[start : start + size].view(dtype).view(shape)
