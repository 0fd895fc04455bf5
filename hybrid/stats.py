"""The figures of one reply; light, so that what only prints them need not load the runtime."""

from dataclasses import dataclass


@dataclass
class Stats:
    """Counts and seconds of one reply, filled in as it goes."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache
    disk_tokens: int = 0  # of those, read from the disk
    thinking_tokens: int = 0
    answer_tokens: int = 0
    prefill_s: float = 0.0
    first_token_s: float = 0.0  # from the call to the first token
    decode_s: float = 0.0  # from the first token to the last
    expert_bytes: int = 0  # routed experts' weights read while decoding
    host_bytes: int = 0  # all weights read from the host's memory while decoding, those included
    drafted: int = 0  # ids guessed and computed ahead,
    accepted: int = 0  # and those that were right
    # where some experts stay on the drive, while decoding:
    tier_hits: int = 0  # experts found in RAM, counted once per step and layer
    tier_misses: int = 0  # and those that were not
    nvme_bytes: int = 0  # read from the drive
    stall_s: float = 0.0  # seconds in which arithmetic waited for it

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that had to be computed."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def generated_tokens(self) -> int:
        return self.thinking_tokens + self.answer_tokens

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefilled_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Steps per second after the first token, whose step is part of the prefill."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s else 0.0

    @property
    def ram_gbps(self) -> float:
        """Weights read from the host's memory per second while decoding, in GB/s."""
        return self.host_bytes / self.decode_s / 1e9 if self.decode_s else 0.0
