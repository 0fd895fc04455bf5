"""llama.cpp with a model, in a process of its own: `python tools/peers_llama.py FILE.gguf THREADS CTX REPACK`.

It shares nothing with the program that asks, neither OpenMP's settings nor a crash. Standard input has one request per
line, {"prompt": [ids], "steps": n}; standard output one answer, {"prompt_s": seconds until the token after the prompt,
"decode_s": seconds for n more}. Tokens are the likeliest ones. The first line says what was loaded, or
{"error": text}. CTX is in tokens, REPACK 1 or 0 as in llama.cpp's --repack.
"""

import ctypes
import json
import sys
import time
from collections.abc import Sequence

import llama_cpp
import numpy as np

ERROR, CONTINUED = 4, 5  # ggml_log_level


@llama_cpp.llama_log_callback
def log(level: int, text: bytes, data: int | None) -> None:
    """Failures only: loading reports every tensor."""
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class Failed(Exception):
    """llama.cpp did not do what it was asked."""


class Model:
    """A loaded file and one sequence."""

    def __init__(self, path: str, threads: int, ctx: int, repack: bool) -> None:
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.n_gpu_layers = 0
        loading.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
        if not self.model:
            raise Failed(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = ctx, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise Failed("llama.cpp makes no context for it")
        self.batch = llama_cpp.llama_n_batch(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return llama_cpp.llama_model_size(self.model)

    def decode(self, ids: Sequence[int]) -> int:
        """Append `ids` to the sequence; returns the likeliest token after them."""
        for start in range(0, len(ids), self.batch):
            some = ids[start : start + self.batch]
            tokens = (llama_cpp.llama_token * len(some))(*some)
            status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(some)))
            if status:
                raise Failed(f"llama_decode returned {status}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocab,))
        if not np.isfinite(logits).all():
            raise Failed("llama.cpp computed values that are not numbers")
        return int(logits.argmax())

    def run(self, prompt: Sequence[int], steps: int) -> dict[str, float]:
        """Seconds for a fresh sequence's prompt, and for `steps` tokens after the first."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        start = time.perf_counter()
        token = self.decode(prompt)
        first = time.perf_counter()
        for _ in range(steps):
            token = self.decode([token])
        return {"prompt_s": first - start, "decode_s": time.perf_counter() - first}


def serve(path: str, threads: str, ctx: str, repack: str) -> None:
    try:
        model = Model(path, int(threads), int(ctx), repack == "1")
        answer({"bytes": model.nbytes, "vocab": model.vocab})
        for line in sys.stdin:
            answer(model.run(**json.loads(line)))
    except Failed as error:
        answer({"error": str(error)})


def answer(value: dict[str, object]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
