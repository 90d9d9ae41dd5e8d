"""The HTTP interface over a ChipQueue: the documented route, the OpenAI-compatible ones, a page to chat in."""

import asyncio
import functools
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
from pydantic import RootModel
from sse_starlette import EventSourceResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from helpers.chat.session import figures_object, fit_history
from helpers.errors import UserError
from helpers.run.generation import QwenRunner, check_prompt
from helpers.serve.access import Access
from helpers.serve.queue import ChipQueue, Job
from helpers.serve.requests import ApiError, CompletionRequest, DocumentedRequest, parse, read_body, refusal
from helpers.serve.server import FAREWELL_S

WEB = Path(__file__).with_name("web")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
EventStream = functools.partial(EventSourceResponse, sep="\n", shutdown_grace_period=FAREWELL_S)


@dataclass(frozen=True)
class Settings:
    """model: the name it is served under. api_key: None for none. time_limit_s: from arrival to last token."""

    model: str
    system: str
    api_key: str | None = None
    time_limit_s: float = 600
    max_body_bytes: int = 1 << 19
    access: Access = Access()
    by_heart: dict | None = None  # of the checkpoint, for the page


async def refuse(request: Request, error: Exception) -> Response:
    """The answer to whatever a route raised."""
    if isinstance(error, UserError):
        error = ApiError(400, str(error), "invalid_value")
    elif not isinstance(error, ApiError):
        # A route, or a method of it, that is not there.
        allowed = (error.headers or {}).get("Allow", "GET").replace("GET", "GET, HEAD")
        sentence = f"{request.method} {request.url.path:.100}: {error.detail}."
        error = ApiError(error.status_code, sentence, **({"Allow": allowed} if error.status_code == 405 else {}))
    return refusal(request.scope, error)


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
        why_not = self.access.refusal(Headers(scope=scope), scope["client"] and scope["client"][0])
        answer = refusal(scope, ApiError(403, *why_not)) if why_not else self.app
        await answer(scope, receive, send)


class JobResponse(Response):
    """A job's answer: what `respond` makes once the job has ended or, with `stream`, once there is something of it.

    The job is submitted as this is sent; what fails until then (raises ApiError) has a status of its own. When this
    ends for whatever reason, that the client leaves among them, nobody waits for the job any more.
    """

    background = None

    def __init__(self, queue: ChipQueue, job: Job, stream: bool | None, respond: Callable[[], Response]):
        self.queue, self.job, self.stream, self.respond = queue, job, stream, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def until_it_leaves() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            serving.cancel()

        with anyio.CancelScope() as serving:
            watcher = asyncio.create_task(until_it_leaves())
            try:
                self.queue.submit(self.job)
                async for _ in self.job.pieces():
                    if self.stream:
                        break
                await self.respond()(scope, anyio.sleep_forever, send)
            finally:
                watcher.cancel()
                self.queue.cancel(self.job)


def create_app(queue: ChipQueue, runner: QwenRunner, settings: Settings) -> FastAPI:
    """The service over a queue whose engine is open; `runner` is read for its sizes only."""
    app = FastAPI(
        openapi_url=None,  # what the routes take, they check by themselves
        redirect_slashes=False,
        exception_handlers={HTTPException: refuse, UserError: refuse},
    )
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

    async def check_key(given: Bearer) -> None:
        if not given or not hmac.compare_digest(given.credentials.strip().encode(), settings.api_key.encode()):
            message = "This service wants its API key, as `Authorization: Bearer KEY`."
            raise ApiError(401, message, "invalid_api_key", WWW_Authenticate="Bearer")

    closed = [] if settings.api_key is None else [Depends(check_key)]

    def check_model(name: str) -> None:
        if name != settings.model:
            message = f"There is no model '{name:.100}' here, only {settings.model!r}."
            raise ApiError(404, message, "model_not_found", "model")

    @app.post("/chat/completions", dependencies=closed)
    async def documented(request: Request) -> Response:
        """As documented: {"data": answer}, or events whose data is the whole text so far.

        The last event is named `done` and repeats the whole text, so that a client that knows no event names
        still ends with it; an `error` event carries one sentence instead. Greedy. Turns that do not fit S with
        the question are dropped, oldest first; the header X-Dropped-Turns counts them. A body with `messages` comes
        from an OpenAI client whose base URL lacks /v1, and is answered as there.
        """
        body = await read_body(request, settings.max_body_bytes, settings.time_limit_s)
        request.state.openai = False
        if "messages" in parse(body, RootModel[dict], 422).root:
            request.state.openai = True
            return await answer_openai(body)
        asked = parse(body, DocumentedRequest, 422)
        queue.check_room()
        ids, dropped = await asyncio.to_thread(
            fit_history, queue.tokenizer, seq_length, settings.system, asked.turns(), asked.question, seq_length // 4
        )
        job = Job(ids, settings.time_limit_s)

        async def cumulative() -> AsyncIterator[str | dict[str, str]]:
            try:
                async for _ in job.pieces():
                    yield job.text
                yield {"event": "done", "data": job.text}
            except ApiError as error:
                yield {"event": "error", "data": error.detail}

        def respond() -> Response:
            headers = {"X-Dropped-Turns": str(dropped)}
            if asked.stream:
                return EventStream(cumulative(), headers=headers)
            return JSONResponse({"data": job.text}, headers=headers)

        return JobResponse(queue, job, asked.stream, respond)

    @app.post("/v1/chat/completions", dependencies=closed)
    async def completions(request: Request) -> Response:
        """OpenAI's chat completions; `timings` beside `usage` are this service's own."""
        return await answer_openai(await read_body(request, settings.max_body_bytes, settings.time_limit_s))

    async def answer_openai(body: bytes) -> Response:
        # Every invalid request is a 400 to OpenAI, and to the exceptions of its client.
        asked = parse(body, CompletionRequest, 400)
        if asked.model is not None:
            check_model(asked.model)
        if asked.response_format and asked.response_format.get("type") != "text":
            raise ApiError(400, "Only text is supported.", "unsupported_value", "response_format")
        messages, sampling = asked.conversation(settings.system), asked.sampling()
        if not sampling.greedy and not runner.can_sample:
            raise ApiError(400, "This bmodel has no penalty_sample_head: ask with temperature 0.")
        queue.check_room()
        try:
            ids = await asyncio.to_thread(queue.tokenizer.chatml, messages)
            check_prompt(ids, seq_length)
        except UserError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from None
        most = asked.max_completion_tokens or asked.max_tokens
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        job = Job(ids, settings.time_limit_s, max_new_tokens=most, sampling=sampling, stop=stops)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": settings.model}

        def choice(finish_reason: str | None = None, **said: dict) -> dict:
            return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}

        def usage() -> dict:
            prompt, completion = job.answer.prompt_tokens, len(job.answer.tokens)
            return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

        def respond() -> Response:
            if asked.stream:
                return EventStream(chunks())
            message = {"role": "assistant", "content": job.text, "refusal": None}
            made = {**head, "object": "chat.completion", "choices": [choice(job.finish_reason, message=message)]}
            return JSONResponse({**made, "usage": usage(), "timings": figures_object(job.answer, engine)})

        def chunk(*choices: dict, **more: dict) -> str:
            made = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
            return json.dumps(made, ensure_ascii=False)

        async def chunks() -> AsyncIterator[str]:
            yield chunk(choice(delta={"role": "assistant", "content": ""}))
            try:
                async for piece in job.pieces():
                    yield chunk(choice(delta={"content": piece}))
            except ApiError as error:
                yield json.dumps(error.openai(), ensure_ascii=False)
                return
            yield chunk(choice(job.finish_reason, delta={}), timings=figures_object(job.answer, engine))
            if asked.stream_options and asked.stream_options.include_usage:
                yield chunk(usage=usage())
            yield "[DONE]"

        return JobResponse(queue, job, asked.stream, respond)

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
            "by_heart": settings.by_heart,
        }
        return JSONResponse(body, 200 if queue.state == "ok" else 503)

    @app.get("/")
    async def page() -> Response:
        policy = {"Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'"}
        return FileResponse(WEB / "index.html", headers=policy | {"X-Content-Type-Options": "nosniff"})

    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app
