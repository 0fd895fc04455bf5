"""What the web page shows beside the chat: the model, its memory, its experts at work. Counts only, never content."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from pydantic import BaseModel

from hybrid.kimi import Kimi
from hybrid.serve.desk import Desk
from hybrid.serve.job import EventStream
from hybrid.serve.refusal import DOCUMENTED, Refusal, json_response, to_json

LOOKS_EACH_S = 0.2  # how often experts are looked at for those who watch
TOP = 12  # experts listed one by one


class Hurry(BaseModel):
    """`id` is that of a streamed chat completion: every chunk has it."""

    id: str


class Inside:
    """The endpoints under /v1/kimi/ of one server."""

    def __init__(self, kimi: Kimi, desk: Desk, keep_alive_s: float) -> None:
        self.kimi = kimi
        self.desk = desk
        self.keep_alive_s = keep_alive_s
        self.router = APIRouter(prefix="/v1/kimi")
        self._add("/server", self.server, "GET")
        self._add("/memory", self.memory, "GET")
        self._add("/experts", self.experts, "GET")
        self._add("/events", self.events, "GET")
        self._add("/answers/{name}", self.answer, "GET")
        self._add("/answer-now", self.answer_now, "POST")

    def _add(self, path: str, endpoint: Callable[..., Any], method: str) -> None:
        self.router.add_api_route(path, endpoint, methods=[method], responses=DOCUMENTED)

    async def server(self) -> Response:
        """The model, the machine, and the figures of this run so far."""
        machine = await asyncio.to_thread(self.kimi.insight.machine)  # the first look takes its time
        return json_response(
            {
                "name": self.kimi.name,
                "version": version("kimi-local"),
                "model": _facts(self.kimi),
                "ctx": self.kimi.ctx,
                "thinking": self.kimi.default_thinking,
                "images": False,
                "machine": machine,
                "figures": self.kimi.run_record(),
            }
        )

    async def memory(self) -> Response:
        """Bytes by kind, planned and real, of `ram`, `vram` and `nvme`; pages of the KV cache, `prefix`, with their
        use; and what of it `disk` has, null where nothing is kept there."""
        areas = await asyncio.to_thread(self.kimi.insight.memory)
        disk = await asyncio.to_thread(self.kimi.insight.disk)
        restored = {"restored_tokens": int(self.desk.total("prompt_disk_tokens_total"))}
        prompts = {
            "prompt_tokens": int(self.desk.total("prompt_tokens_total")),
            "reused_tokens": int(self.desk.total("prompt_cached_tokens_total")),
        }
        pages = self.kimi.insight.pages() | prompts
        return json_response({**areas, "prefix": pages, "disk": None if disk is None else disk | restored})

    async def experts(self, counts: bool = False) -> Response:
        """How much each routed expert was used since loading, and where it is: `heat` and `places` are base64 of one
        byte for each, layer by layer.

        Heat is the square root of an expert's share of the most used one of its layer, 255 for that one itself.
        Places: 0 RAM, 1 card, 2 drive. `choices` and `peaks` are by layer: all choices, and those of the most used.
        With `counts` also the choices of every expert, layer by layer.
        """
        insight = self.kimi.insight
        used, places = insight.counts(), insight.places()
        report = self.kimi.expert_report()
        return json_response(
            {
                "layers": insight.layers,
                "experts": used.shape[1],
                "per_token": self.kimi.config.num_experts_per_tok,
                "heat": _packed(heat(used)),
                "places": _packed(places),
                "choices": used.sum(1).tolist(),
                "peaks": used.max(1, initial=0).tolist(),
                "top": top(used, insight.layers),
                "tier": report["tier"],
                "cache": report["cache"],
                **({"counts": used.tolist()} if counts else {}),
            }
        )

    async def events(self) -> Response:
        """A stream of the experts chosen since the last event: `cells` number them as in `heat`, `times` says how often
        each was chosen. Starts with what is chosen after the first event, which has none."""
        return EventStream(None, self._choices())

    async def answer(self, name: str) -> Response:
        """What was measured of a chat completion so far, by its id: counts, seconds and bytes, as `hybrid.stats.Stats`
        names them. Some of the last ones that ended are known too."""
        stats = self.desk.figures(name)
        if stats is None:
            raise _unknown(name)
        return json_response({"id": name, **vars(stats)})

    async def answer_now(self, body: Hurry) -> Response:
        """End the reasoning of an answer that is being made; `thinking` tells whether there was any to end."""
        job = self.desk.find(body.id)
        if job is None or job.reply is None:
            raise _unknown(body.id)
        thinking = job.reply.thinking
        job.reply.answer_now()
        return json_response({"id": body.id, "thinking": thinking})

    async def _choices(self) -> AsyncIterator[str]:
        before = self.kimi.insight.counts()
        yield _event([], [])
        told = time.monotonic()
        while not self.desk.stopped:
            await asyncio.sleep(LOOKS_EACH_S)
            now = self.kimi.insight.counts()
            new, before = (now - before).reshape(-1), now
            cells = np.flatnonzero(new)
            if cells.size:
                yield _event(cells.tolist(), new[cells].tolist())
                told = time.monotonic()
            elif time.monotonic() - told > self.keep_alive_s:
                yield ": keep-alive\n\n"
                told = time.monotonic()


def _unknown(name: str) -> Refusal:
    return Refusal(404, f"No answer {name!r} is being made.", param="id", code="not_found")


def heat(counts: np.ndarray) -> np.ndarray:
    """counts int64 [layers, experts] -> uint8 [layers, experts]: the darkest are those that were never chosen."""
    most = np.maximum(1, counts.max(1, keepdims=True, initial=0))
    return np.ceil(255 * np.sqrt(counts / most)).astype(np.uint8)


def top(counts: np.ndarray, layers: list[int]) -> list[dict[str, int]]:
    """The experts chosen most often, of all layers."""
    order = np.argsort(-counts, axis=None, kind="stable")[:TOP].tolist()
    found = [(divmod(cell, counts.shape[1]), int(counts.flat[cell])) for cell in order]
    return [{"layer": layers[row], "expert": expert, "choices": times} for (row, expert), times in found if times]


def _facts(kimi: Kimi) -> dict[str, Any]:
    config = kimi.config
    return {
        "architecture": config.architecture,
        "layers": config.num_hidden_layers,
        "moe_layers": config.num_moe_layers,
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "weights": config.routed_params + config.resident_params,
        "longest_context": config.max_position_embeddings,
    }


def _packed(cells: np.ndarray) -> str:
    return base64.b64encode(cells.tobytes()).decode()


def _event(cells: list[int], times: list[int]) -> str:
    return f"data: {to_json({'cells': cells, 'times': times})}\n\n"
