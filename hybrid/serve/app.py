"""The application: which path leads where, and every error in the envelope of the API that was called."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from hybrid.chat.wishes import explained
from hybrid.engine.request import Closed
from hybrid.errors import KimiError
from hybrid.grammar import Grammars
from hybrid.kimi import Kimi
from hybrid.reply import Reply
from hybrid.serve import chat, completions, messages, responses, tokens
from hybrid.serve.desk import Desk
from hybrid.serve.guard import Guard
from hybrid.serve.insight import Inside
from hybrid.serve.job import EventStream, Job, StartReply, unless_gone
from hybrid.serve.openai_shapes import ChatCompletion, Completion, ModelCard, ModelList
from hybrid.serve.refusal import DOCUMENTED, STREAMED, Refusal, bad_request, failure, json_response, refuse
from hybrid.serve.site import page_router

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """`parallel` answers are made at once, `queue` more may wait; after `keep_alive_s` of silence a comment is sent."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    parallel: int = 4
    queue: int = 32
    keep_alive_s: float = 5.0
    body_limit: int = 32 * MIB


class Routes:
    """The endpoints of one server."""

    def __init__(self, kimi: Kimi, desk: Desk, settings: Settings) -> None:
        self.kimi = kimi
        self.desk = desk
        self.settings = settings
        self.grammars = Grammars(kimi.tokenizer, kimi.config.vocab_size, kimi.stop_ids)
        self.started = int(time.time())
        self.router = APIRouter()
        self._add("/health", self.health, "GET")
        self._add("/metrics", self.metrics, "GET", response_class=PlainTextResponse)
        self._add("/v1/models", self.models, "GET", response_model=ModelList)
        self._add("/v1/models/{name:path}", self.model, "GET", response_model=ModelCard)
        self._add("/v1/chat/completions", self.complete_chat, "POST", response_model=ChatCompletion, responses=STREAMED)
        self._add("/v1/completions", self.complete, "POST", response_model=Completion, responses=STREAMED)
        self._add("/v1/responses", self.respond, "POST", response_model=responses.ItemAnswer, responses=STREAMED)
        self._add("/v1/messages", self.create_message, "POST", response_model=messages.BlockAnswer, responses=STREAMED)
        self._add("/v1/messages/count_tokens", self.count_tokens, "POST", response_model=messages.TokenCount)
        self._add("/v1/embeddings", self.embeddings, "POST")
        self._add("/tokenize", self.tokenize, "POST", response_model=tokens.Tokenized)
        self._add("/detokenize", self.detokenize, "POST", response_model=tokens.Detokenized)
        self._add("/tokenizer_info", self.tokenizer_info, "GET", response_model=tokens.TokenizerInfo)

    def _add(self, path: str, endpoint: Callable[..., Any], method: str, **more: Any) -> None:
        self.router.add_api_route(path, endpoint, methods=[method], **{"responses": DOCUMENTED, **more})

    # -- what is there ----------------------------------------------------------------------------------------------
    async def health(self) -> dict[str, str | int]:
        """Whether answers can be made here, and by which process; needs no key."""
        try:
            self.kimi.require_open()
        except Closed as error:
            raise bad_request(error) from error
        return {"status": "ok", "pid": os.getpid()}

    async def metrics(self) -> Response:
        """What was counted so far, in Prometheus' text format."""
        counted = await asyncio.to_thread(self.desk.metrics)
        return Response(counted, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        """The one model there is."""
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """That model, by its name."""
        if name != self.kimi.name:
            raise Refusal(404, f"There is no model {name!r} here, only {self.kimi.name!r}.", code="model_not_found")
        return json_response(self._card())

    async def embeddings(self) -> Response:
        """Not there: this model writes, and has no embeddings of texts."""
        raise Refusal(501, "This model makes no embeddings.", code="unsupported_endpoint")

    def _card(self) -> ModelCard:
        config = self.kimi.config
        meta = {
            "vocab_size": config.vocab_size,
            "thinking": self.kimi.default_thinking,
            "layers": config.num_hidden_layers,
            "experts": config.n_routed_experts,
            "experts_per_token": config.num_experts_per_tok,
            "generation_config": self.kimi.generation_config,
            "sampling": {name: sampling_defaults(self.kimi, name == "thinking") for name in ("thinking", "instant")},
        }
        card = {"id": self.kimi.name, "object": "model", "created": self.started, "owned_by": "kimi-local"}
        return {**card, "max_model_len": self.kimi.ctx, "meta": meta}  # type: ignore[typeddict-item]

    # -- what it does -----------------------------------------------------------------------------------------------
    async def complete_chat(self, request: Request, body: chat.ChatRequest) -> Any:
        """The next turn of a conversation, whole or streamed."""
        turn = chat.to_turn(self.kimi, body)
        job, reply = await self._begin(chat.start_turn(self.kimi, self.grammars, turn, call_pieces=bool(body.stream)))
        form = chat.ChatForm(self.kimi, body, turn, reply)
        self.desk.call(job, form.id)
        if body.stream:
            return EventStream(job, form.stream(job, self.settings.keep_alive_s))
        return await self._whole(request, [job], form.whole(job))

    async def complete(self, request: Request, body: completions.CompletionRequest) -> Any:
        """What follows a text, or each of several, whole or streamed."""
        asked = await asyncio.to_thread(completions.prompts, self.kimi, body)
        if len(asked) > self.desk.room:
            raise Refusal(400, f"At most {self.desk.room} prompts at once are answered here.", param="prompt")
        likelihoods = await asyncio.to_thread(completions.echoed_logprobs, self.kimi, body, asked)
        form = completions.TextForm(self.kimi, body, asked)
        starts = [completions.start_completion(self.kimi, body, ids) for ids in asked]
        jobs, replies = await self._begin_all(starts, "prompt")
        if body.stream:
            return EventStream(jobs[0], form.stream(jobs[0], replies[0], self.settings.keep_alive_s))
        return await self._whole(request, jobs, form.whole(jobs, replies, likelihoods))

    async def respond(self, request: Request, body: responses.ResponseRequest) -> Any:
        """The next turn of a conversation, as OpenAI's newer API has it, whole or streamed; nothing is kept."""
        turn = responses.to_turn(self.kimi, body)
        start = chat.start_turn(self.kimi, self.grammars, turn, call_pieces=bool(body.stream))
        job, reply = await self._begin(start, "input")
        form = responses.ItemForm(self.kimi, body, reply)
        if body.stream:
            return EventStream(job, form.stream(job, self.settings.keep_alive_s))
        return await self._whole(request, [job], form.whole(job))

    async def create_message(self, request: Request, body: messages.MessagesRequest) -> Any:
        """The next turn of a conversation, as Anthropic's API has it, whole or streamed."""
        turn = messages.to_turn(self.kimi, body)
        job, reply = await self._begin(chat.start_turn(self.kimi, self.grammars, turn, call_pieces=bool(body.stream)))
        form = messages.BlockForm(self.kimi, reply)
        if body.stream:
            return EventStream(job, form.stream(job, self.settings.keep_alive_s))
        return await self._whole(request, [job], form.whole(job))

    async def count_tokens(self, body: messages.Conversation) -> Response:
        """How many tokens the prompt of such a request has."""
        turns, tools, thinking = messages.conversation(self.kimi, body)
        try:
            number = await asyncio.to_thread(self.kimi.count_tokens, turns, tools, thinking)
        except KimiError as error:
            raise bad_request(error) from error
        return json_response({"input_tokens": number})

    async def tokenize(self, body: tokens.TokenizeRequest) -> Response:
        """Text, or a conversation as a prompt, to ids."""
        return json_response(await asyncio.to_thread(tokens.tokenize, self.kimi, body))

    async def detokenize(self, body: tokens.DetokenizeRequest) -> Response:
        """Ids to text, control tokens by their names."""
        return json_response(tokens.detokenize(self.kimi, body))

    async def tokenizer_info(self) -> Response:
        """Special tokens, chat template and context."""
        return json_response(tokens.tokenizer_info(self.kimi))

    async def _begin(self, start: StartReply, prompt: str = "messages") -> tuple[Job, Reply]:
        """A job and its reply. Raises Refusal, also if what the field `prompt` says is more than the context holds."""
        jobs, replies = await self._begin_all([start], prompt)
        return jobs[0], replies[0]

    async def _begin_all(self, starts: Sequence[StartReply], prompt: str) -> tuple[list[Job], list[Reply]]:
        """The same for several, all of them or none."""
        jobs: list[Job] = []
        try:
            for start in starts:
                jobs.append(self.desk.open(start))
            return jobs, [await job.started() for job in jobs]
        except (KimiError, Refusal) as error:
            for job in jobs:
                job.stop()
            if isinstance(error, Refusal):
                raise
            raise bad_request(error, prompt) from error

    async def _whole(self, request: Request, jobs: Sequence[Job], work: Any) -> Response:
        """The finished answer; to a client that has left, nothing."""
        try:
            body = await unless_gone(request.receive, jobs, work)
        except KimiError as error:
            raise failure(error) from error
        return Response(status_code=499) if body is None else json_response(body)


def sampling_defaults(kimi: Kimi, thinking: bool) -> dict[str, Any]:
    """What applies where a request says nothing."""
    params = kimi.default_params(thinking)
    return {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens")}


def create_app(kimi: Kimi, desk: Desk, settings: Settings) -> ASGIApp:
    """Everything between a connection and the model."""
    app = FastAPI(title="kimi-local", version=version("kimi-local"), docs_url=None, redoc_url=None)
    app.include_router(Routes(kimi, desk, settings).router)
    app.include_router(Inside(kimi, desk, settings.keep_alive_s).router)
    app.include_router(page_router())
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(KimiError, _told)
    app.add_exception_handler(Exception, _bug)
    return Guard(app, host=settings.host, api_key=settings.api_key, body_limit=settings.body_limit)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refuse(request.url.path, error)


async def _invalid(request: Request, error: Exception) -> Response:
    """The first field that is wrong, by its path."""
    assert isinstance(error, RequestValidationError)
    message, param = explained(error.errors(), above=("body",))
    return refuse(request.url.path, Refusal(400, message, param=param, code="invalid_value"))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"There is no {request.url.path}." if error.status_code == 404 else f"{error.detail}."
    return refuse(request.url.path, Refusal(error.status_code, message, headers=error.headers))


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, KimiError)
    return refuse(request.url.path, bad_request(error))


async def _bug(request: Request, error: Exception) -> Response:
    """What went wrong is in the server's log and no client's business. The connection ends with it, which is said."""
    why = Refusal(500, "The server has failed; its log says why.", headers={"connection": "close"})
    return refuse(request.url.path, why)
