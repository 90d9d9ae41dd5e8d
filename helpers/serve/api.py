"""The HTTP interface over a ChipQueue: the documented route, the OpenAI-compatible ones, a page to chat in.

Imported by `helpers.serve.server` only when a service starts, so fastapi and pydantic may be imported at the top.
"""

import asyncio
import hmac
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from helpers.chat.session import MAX_TURNS, fit_history
from helpers.errors import UserError
from helpers.run.generation import QwenRunner, Sampling
from helpers.serve.front import HEADERS_WITHIN_S, Access, Connection, Refused, short
from helpers.serve.queue import ChipQueue, EngineFailed, Job, QueueFull, TimeLimit

WEB = Path(__file__).with_name("web")
# What is too long is read and thrown away up to here, so that the client gets to read the refusal.
DISCARD_BYTES = 64 << 20
CLIENT_GONE = 499
# At the end every client is told; a connection that then still has something to send after this long is cut.
FAREWELL_S = 60
STOP_CHARACTERS = 1000

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """model: the name it is served under. api_key: None for none. time_limit_s: from arrival to last token."""

    model: str
    system: str
    api_key: str | None = None
    time_limit_s: float = 600
    max_body_bytes: int = 1 << 19
    access: Access = Access()


class ApiError(Exception):
    """An answer that is a refusal: one sentence, in the shape of the route it is for."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def openai(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def api_error(error: QueueFull | TimeLimit | EngineFailed) -> ApiError:
    """What an exception of the queue is over HTTP."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "rate_limit_exceeded", Retry_After=str(error.retry_after_s))
    if isinstance(error, TimeLimit):
        return ApiError(504, str(error), "time_limit")
    return ApiError(503, str(error), "engine_failed", Retry_After="5")


class DocumentedRequest(BaseModel):
    """Body of `POST /chat/completions` as Sophgo's demo documents it."""

    question: str
    # Every list ends at its first fault: the faults of a list of small ones would take a thousand times its memory.
    history: Annotated[list[str], Field(fail_fast=True)] = []
    stream: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def chatml(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


StopString = Annotated[str, Field(max_length=STOP_CHARACTERS)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class CompletionRequest(BaseModel):
    """Body of `POST /v1/chat/completions`: OpenAI's fields, and vLLM's names for top_k and repetition_penalty.

    Without a temperature the answer is greedy, or drawn at 1 where top_p or top_k is given. Fields that would
    change the answer and are not supported are refused unless they hold their neutral value; others are ignored.
    vLLM's neutral top_k, 0 or -1, means all of the chip's candidates.
    """

    model_config = ConfigDict(strict=True)

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repetition_last_n: int | None = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0, 0.0] | None = None
    presence_penalty: Literal[0, 0.0] | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    tools: Annotated[list, Field(max_length=0)] | None = None
    functions: Annotated[list, Field(max_length=0)] | None = None
    response_format: dict | None = None

    def sampling(self) -> Sampling:
        """Raises UserError where a value is out of the chip's range."""
        top_k = None if self.top_k in (0, -1) else self.top_k
        drawn = self.top_p is not None or top_k is not None
        given = {
            "temperature": self.temperature if self.temperature is not None else float(drawn),
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": top_k,
            "repetition_penalty": self.repetition_penalty,
            "repetition_last_n": self.repetition_last_n,
            # Any integer is a seed to OpenAI; numpy wants none below zero.
            "seed": None if self.seed is None else self.seed % (1 << 63),
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


async def read_body(request: Request, limit: int, time_limit_s: float) -> bytes:
    """The request's body. Raises ApiError where it is longer than `limit` bytes, or does not arrive."""

    async def read() -> bytes:
        body, total = bytearray(), 0
        async for chunk in request.stream():
            total += len(chunk)
            if total <= limit:
                body += chunk
            elif total > DISCARD_BYTES:
                break
        if total > limit:
            raise ApiError(413, f"The request is longer than {limit} bytes: shorten it.", "request_too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), time_limit_s)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The request did not arrive within {time_limit_s:g} s.") from None


def parse(body: bytes, model: type[Model], invalid: int) -> Model:
    """Raises ApiError, 400 where it is not JSON and `invalid` where a field is not as it must be."""
    try:
        # Any of JSON's encodings, with a byte-order mark or without.
        return model.model_validate_json(body.decode(json.detect_encoding(body)))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", "invalid_json") from None
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        first = errors[0]
        if first["type"] == "json_invalid":
            reason = first["ctx"]["error"]
            raise ApiError(400, f"The body is not valid JSON: {reason}.", "invalid_json") from None
        # Where a field may be of several types, each has its say: the one that the value is of tells more.
        same = [e for e in errors if e["loc"][:1] == first["loc"][:1]]
        told = next((e for e in same if not e["type"].endswith("_type")), first)
        names = (str(part) for part in told["loc"])
        field = ".".join(name for name in names if name not in ("str", "constrained-str") and "[" not in name)
        raise ApiError(invalid, f"{field or 'The body'}: {told['msg']}.", "invalid_value", field) from None


def has_messages(body: bytes) -> bool:
    try:
        return "messages" in parse(body, RootModel[dict[str, Any]], 422).root
    except ApiError:
        return False


class ClientGone(Exception):
    pass


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Raises ClientGone, and cancels it, where the client leaves before it is done."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class AnswerStream(EventSourceResponse):
    """Server-sent events of one job; when they end for whatever reason, nobody waits for the job any more."""

    def __init__(self, queue: ChipQueue, job: Job, events: AsyncIterator[ServerSentEvent], **headers: str):
        super().__init__(events, sep="\n", shutdown_grace_period=FAREWELL_S, headers=headers)
        self.queue, self.job = queue, job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.queue.cancel(self.job)


def event(value: dict) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(value, ensure_ascii=False), sep="\n")


def refusal(scope: Scope, error: ApiError) -> Response:
    """The error in the shape of its route; in both where only the body, not read yet, would tell which is meant."""
    path, body = scope["path"], {}
    is_openai = path.startswith("/v1") or scope.get("state", {}).get("openai", path == "/chat/completions")
    if not path.startswith("/v1") and not scope.get("state", {}).get("openai"):
        body["detail"] = str(error)
    return JSONResponse(body | (error.openai() if is_openai else {}), error.status, error.headers)


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


def create_app(queue: ChipQueue, runner: QwenRunner, settings: Settings) -> FastAPI:
    """The service over a queue whose engine is open; `runner` is read for its sizes only."""
    # Swagger's own pages load their scripts from elsewhere; /openapi.json says the same.
    app = FastAPI(title="Qwen on BM1684X", docs_url=None, redoc_url=None, redirect_slashes=False)
    seq_length, can_sample = runner.seq_length, runner.can_sample
    engine_name, kind_of_time = runner.engine.name, runner.engine.kind_of_time
    started = int(time.time())

    def check_key(request: Request) -> None:
        if settings.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        good = hmac.compare_digest(key.strip().encode(), settings.api_key.encode())
        if scheme.lower() != "bearer" or not good:
            raise ApiError(
                401,
                "This service wants its API key, as `Authorization: Bearer KEY`.",
                "invalid_api_key",
                WWW_Authenticate="Bearer",
            )

    closed = [Depends(check_key)]
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

    def no_model(name: str) -> ApiError:
        known = f"There is no model {short(name)!r} here, only {settings.model!r}."
        return ApiError(404, known, "model_not_found", "model")

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return refusal(request.scope, error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        headers = {}
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "GET")
            headers["Allow"] = f"{allowed}, HEAD" if "GET" in allowed else allowed
        where = f"{request.method} {short(request.url.path)}"
        return refusal(request.scope, ApiError(error.status_code, f"{where}: {error.detail}.", **headers))

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    def submit(
        ids: list[int], sampling: Sampling, max_new_tokens: int | None = None, stop: list[str] | None = None
    ) -> Job:
        if not sampling.greedy and not can_sample:
            raise ApiError(400, "This bmodel has no penalty_sample_head: ask with temperature 0.")
        job = Job(ids, settings.time_limit_s, max_new_tokens, sampling, stop or [])
        try:
            queue.submit(job)
        except (QueueFull, EngineFailed) as error:
            raise api_error(error) from None
        return job

    async def first_piece(request: Request, job: Job) -> tuple[str, AsyncIterator[str]]:
        """The first piece ("" where the answer is empty) and the rest: errors before it have a status."""
        pieces = job.pieces()

        async def first() -> str:
            return await anext(pieces, "")

        return await attended(request, job, first()), pieces

    async def whole(request: Request, job: Job) -> str:
        async def text() -> str:
            return "".join([piece async for piece in job.pieces()])

        return await attended(request, job, text())

    async def attended(request: Request, job: Job, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            return await while_connected(request, work)
        except BaseException as error:
            queue.cancel(job)
            raise (api_error(error) if isinstance(error, (EngineFailed, TimeLimit)) else error) from None

    def check_room() -> None:
        try:
            queue.check_room()
        except (QueueFull, EngineFailed) as error:
            raise api_error(error) from None

    def takes(model: type[BaseModel]) -> dict:
        """What OpenAPI says of a body that the route reads by itself."""
        return {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}

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
        if len(asked.history) % 2:
            raise ApiError(
                400,
                f"history has {len(asked.history)} entries, an even number is needed: user and assistant alternate.",
            )
        check_room()
        turns = list(zip(asked.history[::2], asked.history[1::2], strict=True))
        kept = turns[max(0, len(turns) - MAX_TURNS) :]
        try:
            ids, dropped = await asyncio.to_thread(
                fit_history,
                queue.tokenizer,
                seq_length,
                settings.system,
                kept,
                asked.question,
                seq_length // 4,
            )
        except UserError as error:
            raise ApiError(400, str(error)) from None
        headers = {"X-Dropped-Turns": str(dropped + len(turns) - len(kept))}
        job = submit(ids, Sampling())
        if not asked.stream:
            return JSONResponse({"data": await whole(request, job)}, headers=headers)

        text, pieces = await first_piece(request, job)

        async def cumulative() -> AsyncIterator[ServerSentEvent]:
            so_far = text
            if so_far:
                yield ServerSentEvent(so_far, sep="\n")
            try:
                async for piece in pieces:
                    so_far += piece
                    yield ServerSentEvent(so_far, sep="\n")
            except (EngineFailed, TimeLimit) as error:
                yield ServerSentEvent(str(error), event="error", sep="\n")
                return
            yield ServerSentEvent(so_far, event="done", sep="\n")

        return AnswerStream(queue, job, cumulative(), **headers)

    def usage_of(job: Job) -> dict:
        completion = len(job.answer.tokens) if job.answer else 0
        return {
            "prompt_tokens": len(job.ids),
            "completion_tokens": completion,
            "total_tokens": len(job.ids) + completion,
        }

    def timings_of(job: Job) -> dict:
        answer = job.answer
        return {
            "first_token_s": answer.first_token_s if answer else 0.0,
            "tokens_per_s": answer.tokens_per_s if answer else 0.0,
            "kind": kind_of_time,
        }

    @app.post("/v1/chat/completions", dependencies=closed, openapi_extra=takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        """OpenAI's chat completions; `timings` beside `usage` are this service's own."""
        return await answer_openai(request, await read_body(request, settings.max_body_bytes, settings.time_limit_s))

    async def answer_openai(request: Request, body: str) -> Response:
        # Every invalid request is a 400 to OpenAI, and to the exceptions of its client.
        asked = parse(body, CompletionRequest, 400)
        if asked.model not in (None, settings.model):
            raise no_model(asked.model)
        if asked.response_format and asked.response_format.get("type") != "text":
            raise ApiError(400, "Only text is supported.", "unsupported_value", "response_format")
        messages = [message.chatml() for message in asked.messages]
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise ApiError(400, "The last message must be the user's, and not empty.", "invalid_value", "messages")
        if settings.system and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": settings.system})
        try:
            sampling = asked.sampling()
        except UserError as error:
            raise ApiError(400, str(error), "invalid_value") from None
        check_room()
        try:
            ids = await asyncio.to_thread(queue.tokenizer.chatml, messages)
            if len(ids) > seq_length:
                raise UserError(
                    f"The messages take {len(ids)} tokens, this bmodel was compiled for {seq_length} (S), the answer "
                    "among them: drop the oldest turns or shorten the question."
                )
        except UserError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from None
        job = submit(ids, sampling, asked.max_completion_tokens or asked.max_tokens, asked.stops())
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": settings.model}
        if not asked.stream:
            text = await whole(request, job)
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": job.finish_reason}
            return JSONResponse(
                {
                    **head,
                    "object": "chat.completion",
                    "choices": [choice],
                    "usage": usage_of(job),
                    "timings": timings_of(job),
                }
            )

        first, pieces = await first_piece(request, job)

        def chunk(delta: dict, finish_reason: str | None = None, **more: object) -> ServerSentEvent:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

        async def deltas() -> AsyncIterator[ServerSentEvent]:
            yield chunk({"role": "assistant", "content": ""})
            if first:
                yield chunk({"content": first})
            try:
                async for piece in pieces:
                    yield chunk({"content": piece})
            except (EngineFailed, TimeLimit) as error:
                yield event(api_error(error).openai())
                return
            yield chunk({}, job.finish_reason, timings=timings_of(job))
            if asked.stream_options and asked.stream_options.include_usage:
                usage = usage_of(job)
                yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
            yield ServerSentEvent("[DONE]", sep="\n")

        return AnswerStream(queue, job, deltas())

    model_card = {"id": settings.model, "object": "model", "created": started, "owned_by": "local"}

    @app.get("/v1/models", dependencies=closed)
    async def models() -> dict:
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{name:path}", dependencies=closed)
    async def one_model(name: str) -> dict:
        if name != settings.model:
            raise no_model(name)
        return model_card

    @app.get("/health")
    async def health() -> Response:
        """200 where the engine is open, else 503; open without the API key."""
        body = {
            "status": queue.state,
            "model": settings.model,
            "engine": engine_name,
            "kind_of_time": kind_of_time,
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


class Server(uvicorn.Server):
    """uvicorn's server, which at its end tells those who wait for answers that none will come."""

    def __init__(self, app: FastAPI, queue: ChipQueue):
        # Nothing is left to what happens to be installed, or to stand in the environment.
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            workers=1,
            proxy_headers=False,
            log_level="error",
            timeout_keep_alive=HEADERS_WITHIN_S,
            timeout_graceful_shutdown=FAREWELL_S + 5,
        )
        super().__init__(config)
        self.queue = queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.refuse()
        await super().shutdown(sockets)
