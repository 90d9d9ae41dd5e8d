"""The HTTP interface over a ChipQueue: the documented route, the OpenAI-compatible ones, a page to chat in."""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import anyio
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from sse_starlette import EventSourceResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from helpers.chat.session import figures_object, fit_history
from helpers.errors import UserError
from helpers.run.generation import QwenRunner
from helpers.serve.access import Access, Refused, short
from helpers.serve.queue import ChipQueue, EngineFailed, Job, NoAnswer, QueueFull, TimeLimit
from helpers.serve.requests import (
    ApiError,
    CompletionRequest,
    DocumentedRequest,
    has_messages,
    parse,
    read_body,
    refusal,
)
from helpers.serve.server import FAREWELL_S

WEB = Path(__file__).with_name("web")
CLIENT_GONE = 499

# An event as sse_starlette sends it: the data alone, or {"event": name, "data": data}.
Events = AsyncIterator[str | dict[str, str]]


@dataclass(frozen=True)
class Settings:
    """model: the name it is served under. api_key: None for none. time_limit_s: from arrival to last token."""

    model: str
    system: str
    api_key: str | None = None
    time_limit_s: float = 600
    max_body_bytes: int = 1 << 19
    access: Access = Access()


# What a route may raise, over HTTP: the status, and the code for programs.
STATUS = {
    UserError: (400, "invalid_value"),
    QueueFull: (429, "rate_limit_exceeded"),
    TimeLimit: (504, "time_limit"),
    EngineFailed: (503, "engine_failed"),
}


def api_error(error: UserError | NoAnswer) -> ApiError:
    status, code = STATUS[type(error)]
    retry = {"Retry_After": str(error.retry_after_s)} if hasattr(error, "retry_after_s") else {}
    return ApiError(status, str(error), code, **retry)


async def refuse(request: Request, error: Exception) -> Response:
    """The answer to whatever a route raised."""
    if type(error) in STATUS:
        error = api_error(error)
    elif not isinstance(error, ApiError):
        # A route, or a method of it, that is not there.
        allowed = error.headers.get("Allow", "GET") if error.headers else "GET"
        allowed = f"{allowed}, HEAD" if "GET" in allowed else allowed
        sentence = f"{request.method} {short(request.url.path)}: {error.detail}."
        error = ApiError(error.status_code, sentence, **({"Allow": allowed} if error.status_code == 405 else {}))
    return refusal(request.scope, error)


async def forget(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_GONE)


class Front:
    """What every request passes first: whether it is served, and which route is meant."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # uvicorn leaves out the body where HEAD was asked.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        path = scope["path"].rstrip("/") or "/"
        # OpenAI clients whose base URL lacks /v1.
        path = f"/v1{path}" if path == "/models" or path.startswith("/models/") else path
        scope = {**scope, "method": method, "path": path}
        answer = self.app
        try:
            self.access.check(Headers(scope=scope), scope["client"] and scope["client"][0])
        except Refused as error:
            answer = refusal(scope, ApiError(403, str(error), error.code))
        await answer(scope, receive, send)


@contextlib.asynccontextmanager
async def attended(request: Request, queue: ChipQueue, job: Job) -> AsyncIterator[None]:
    """Waiting for a job. Where the client leaves (raises ClientDisconnect), or the job fails, it is cancelled."""

    async def until_it_leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        waiting.cancel()

    with anyio.CancelScope() as waiting:
        watcher = asyncio.create_task(until_it_leaves())
        try:
            yield
        except BaseException:
            queue.cancel(job)
            raise
        finally:
            watcher.cancel()
    if waiting.cancelled_caught:
        raise ClientDisconnect


class AnswerStream(EventSourceResponse):
    """Server-sent events of one job; when they end for whatever reason, nobody waits for the job any more."""

    def __init__(self, queue: ChipQueue, job: Job, events: Events, headers: dict[str, str]):
        super().__init__(events, sep="\n", shutdown_grace_period=FAREWELL_S, headers=headers)
        self.queue, self.job = queue, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.queue.cancel(self.job)


def create_app(queue: ChipQueue, runner: QwenRunner, settings: Settings) -> FastAPI:
    """The service over a queue whose engine is open; `runner` is read for its sizes only."""
    app = FastAPI(
        title="Qwen on BM1684X",
        # Swagger's own pages load their scripts from elsewhere; /openapi.json says the same.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            **dict.fromkeys((HTTPException, *STATUS), refuse),
            ClientDisconnect: forget,
        },
    )
    if settings.access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.access.origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["Retry-After", "X-Dropped-Turns"],
        )
    app.add_middleware(Front, access=settings.access)
    seq_length, engine = runner.seq_length, runner.engine

    async def check_key(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        if not given or not hmac.compare_digest(given.credentials.strip().encode(), settings.api_key.encode()):
            raise ApiError(
                401,
                "This service wants its API key, as `Authorization: Bearer KEY`.",
                "invalid_api_key",
                WWW_Authenticate="Bearer",
            )

    closed = [] if settings.api_key is None else [Depends(check_key)]

    def check_model(name: str | None) -> None:
        if name != settings.model:
            known = f"There is no model {short(name)!r} here, only {settings.model!r}."
            raise ApiError(404, known, "model_not_found", "model")

    def takes(model: type[BaseModel]) -> dict:
        """What OpenAPI says of a body that the route reads by itself."""
        return {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}

    async def answer(
        request: Request,
        job: Job,
        stream: bool,
        whole: Callable[[str], dict],
        events: Callable[[AsyncIterator[str]], Events],
        **headers: str,
    ) -> Response:
        """A job's answer as one object, or as events; what fails before the first piece has a status of its own."""
        if not job.sampling.greedy and not runner.can_sample:
            raise ApiError(400, "This bmodel has no penalty_sample_head: ask with temperature 0.")
        queue.submit(job)
        pieces = job.pieces()
        async with attended(request, queue, job):
            if not stream:
                return JSONResponse(whole("".join([piece async for piece in pieces])), headers=headers)
            first = await anext(pieces, "")

        async def all_pieces() -> AsyncIterator[str]:
            if first:
                yield first
            async for piece in pieces:
                yield piece

        return AnswerStream(queue, job, events(all_pieces()), headers)

    @app.post("/chat/completions", dependencies=closed, openapi_extra=takes(DocumentedRequest))
    async def documented(request: Request) -> Response:
        """As documented: {"data": answer}, or events whose data is the whole text so far.

        The last event is named `done` and repeats the whole text, so that a client that knows no event names
        still ends with it; an `error` event carries one sentence instead. Greedy. Turns that do not fit S with
        the question are dropped, oldest first; the header X-Dropped-Turns counts them. A body with `messages` comes
        from an OpenAI client whose base URL lacks /v1, and is answered as there.
        """
        body = await read_body(request, settings.max_body_bytes, settings.time_limit_s)
        request.state.openai = has_messages(body)
        if request.state.openai:
            return await answer_openai(request, body)
        asked = parse(body, DocumentedRequest, 422)
        turns = asked.turns()
        queue.check_room()
        ids, dropped = await asyncio.to_thread(
            fit_history, queue.tokenizer, seq_length, settings.system, turns, asked.question, seq_length // 4
        )

        async def cumulative(pieces: AsyncIterator[str]) -> Events:
            text = ""
            try:
                async for piece in pieces:
                    text += piece
                    yield text
                yield {"event": "done", "data": text}
            except NoAnswer as error:
                yield {"event": "error", "data": str(error)}

        job = Job(ids, settings.time_limit_s)
        headers = {"X-Dropped-Turns": str(dropped)}
        return await answer(request, job, asked.stream, lambda text: {"data": text}, cumulative, **headers)

    @app.post("/v1/chat/completions", dependencies=closed, openapi_extra=takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        """OpenAI's chat completions; `timings` beside `usage` are this service's own."""
        return await answer_openai(request, await read_body(request, settings.max_body_bytes, settings.time_limit_s))

    async def answer_openai(request: Request, body: bytes) -> Response:
        # Every invalid request is a 400 to OpenAI, and to the exceptions of its client.
        asked = parse(body, CompletionRequest, 400)
        if asked.model is not None:
            check_model(asked.model)
        if asked.response_format and asked.response_format.get("type") != "text":
            raise ApiError(400, "Only text is supported.", "unsupported_value", "response_format")
        messages, sampling = asked.conversation(settings.system), asked.sampling()
        queue.check_room()
        try:
            ids = await asyncio.to_thread(queue.tokenizer.chatml, messages)
            if len(ids) > seq_length:
                raise UserError(
                    f"The messages take {len(ids)} tokens, this bmodel was compiled for {seq_length} (S), the answer "
                    "among them: drop the oldest turns or shorten the question."
                )
        except UserError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from None
        job = Job(ids, settings.time_limit_s, asked.max_completion_tokens or asked.max_tokens, sampling, asked.stops())
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": settings.model}

        def choice(finish_reason: str | None = None, **said: dict) -> dict:
            return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}

        def usage() -> dict:
            prompt, completion = len(ids), len(job.answer.tokens)
            return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

        def timings() -> dict:
            return figures_object(job.answer, engine)

        def whole(text: str) -> dict:
            message = {"role": "assistant", "content": text, "refusal": None}
            choices = [choice(job.finish_reason, message=message)]
            return {**head, "object": "chat.completion", "choices": choices, "usage": usage(), "timings": timings()}

        def chunk(*choices: dict, **more: dict) -> str:
            made = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
            return json.dumps(made, ensure_ascii=False)

        async def chunks(pieces: AsyncIterator[str]) -> Events:
            yield chunk(choice(delta={"role": "assistant", "content": ""}))
            try:
                async for piece in pieces:
                    yield chunk(choice(delta={"content": piece}))
            except NoAnswer as error:
                yield json.dumps(api_error(error).openai(), ensure_ascii=False)
                return
            yield chunk(choice(job.finish_reason, delta={}), timings=timings())
            if asked.stream_options and asked.stream_options.include_usage:
                yield chunk(usage=usage())
            yield "[DONE]"

        return await answer(request, job, bool(asked.stream), whole, chunks)

    model_card = {"id": settings.model, "object": "model", "created": int(time.time()), "owned_by": "local"}

    @app.get("/v1/models", dependencies=closed)
    async def models() -> dict:
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{name:path}", dependencies=closed)
    async def one_model(name: str) -> dict:
        check_model(name)
        return model_card

    @app.get("/health")
    async def health() -> Response:
        """200 where the engine is open, else 503; open without the API key."""
        body = {
            "status": queue.state,
            "model": settings.model,
            "engine": engine.name,
            "kind_of_time": engine.kind_of_time,
            "seq_length": seq_length,
            "busy": queue.busy,
            "waiting": queue.waiting,
            "waiting_limit": queue.waiting_limit,
            "answered": queue.answered,
            "failure": queue.failure,
        }
        return JSONResponse(body, 200 if queue.state == "ok" else 503)

    page_headers = {
        "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(WEB / "index.html", headers=page_headers)

    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app
