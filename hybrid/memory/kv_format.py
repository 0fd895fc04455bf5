"""How a row of the latent KV cache is kept: as it was computed, or with its latent part in eight bits. Sizes only.

    fp32, bf16   kv_lora_rank + qk_rope_head_dim values
    fp8, int8    one fp32 scale per tile of up to 128 latent values, the rotated key in bf16, one byte per latent value

The rotated key says where a token stands, which bears rounding badly, and is short. All bytes of a row lie together, so
that whoever copies pages need not know which kind they are. K2.5 takes 1152 bytes per token and layer in bf16, and 656
reduced. What the bytes mean is in `kv_codec`.
"""

from typing import NamedTuple

from hybrid.config import ModelConfig

KINDS = ("fp32", "bf16", "fp8", "int8")
REDUCED = ("fp8", "int8")
AUTO = "auto"  # the kind that rows are computed in
PAGE_SIZE = 64  # tokens
TILE, SCALE_BYTES, ROTATED_BYTES = 128, 4, 2
ALIGNED = 4  # bytes: every row starts where its scales can be read


def pages_for(tokens: int) -> int:
    """Pages that `tokens` tokens take."""
    return -(-tokens // PAGE_SIZE)


def kind_of(asked: str, *, full: bool) -> str:
    """The member of KINDS that `asked` or "auto" means for rows that are computed in fp32, if `full`, else in bf16."""
    return asked if asked != AUTO else "fp32" if full else "bf16"


class KVFormat(NamedTuple):
    """The kind of a row, a member of KINDS, and its values: `rank` latent ones before `rope` rotated ones."""

    kind: str
    rank: int
    rope: int

    @classmethod
    def of(cls, config: ModelConfig, kind: str) -> "KVFormat":
        assert kind in KINDS, kind
        return cls(kind, config.kv_lora_rank, config.qk_rope_head_dim)

    @property
    def reduced(self) -> bool:
        """Whether rows are codes."""
        return self.kind in REDUCED

    @property
    def tile(self) -> int:
        """Latent values that share a scale: the largest power of two up to TILE that divides them."""
        return min(TILE, self.rank & -self.rank)

    @property
    def tiles(self) -> int:
        return self.rank // self.tile

    @property
    def rotated_at(self) -> int:
        """Where, in bytes, a reduced row's rotated key begins; scales are before it."""
        return SCALE_BYTES * self.tiles

    @property
    def codes_at(self) -> int:
        return self.rotated_at + ROTATED_BYTES * self.rope

    @property
    def padding(self) -> int:
        """Bytes, of zero, at the end of a reduced row."""
        return -(self.codes_at + self.rank) % ALIGNED

    @property
    def row_bytes(self) -> int:
        """Of one token in one layer."""
        if self.reduced:
            return self.codes_at + self.rank + self.padding
        return (self.rank + self.rope) * (4 if self.kind == "fp32" else 2)


def kv_bytes(config: ModelConfig, tokens: int, kind: str) -> int:
    """Bytes of a cache with room for `tokens` tokens, which are whole pages."""
    return pages_for(tokens) * PAGE_SIZE * config.num_hidden_layers * KVFormat.of(config, kind).row_bytes
