"""The figures of one reply in OpenAI's and llama.cpp's words."""

from hybrid.reply import Reply
from hybrid.serve.openai_shapes import FinishReason, Timings, Usage
from hybrid.stats import Stats


def usage(stats: Stats) -> Usage:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": stats.thinking_tokens},
    }


def timings(stats: Stats) -> Timings:
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": stats.prefilled_tokens,
        "prompt_ms": round(stats.prefill_s * 1000, 3),
        "prompt_per_second": round(stats.prefill_tokens_per_s, 3),
        "predicted_n": stats.generated_tokens,
        "predicted_ms": round(stats.decode_s * 1000, 3),
        "predicted_per_second": round(stats.decode_tokens_per_s, 3),
    }


def finish_reason(reply: Reply) -> FinishReason:
    """An answer that was cut off, by whatever, counts as too long."""
    match reply.finish_reason:
        case "stop":
            return "stop"
        case "tool_calls":
            return "tool_calls"
    return "length"
