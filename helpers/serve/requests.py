"""What clients send, as it is checked before anything is computed, and the errors that they get.

Two dialects: the documented route's, and OpenAI's.
"""

import json
from dataclasses import fields
from typing import Annotated, Literal

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from helpers.errors import UserError
from helpers.run.generation import Sampling

STOP_CHARACTERS = 1000


class ApiError(HTTPException):
    """An answer that is a refusal: one sentence, in the shape of the route it is for."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(status, message, {name.replace("_", "-"): value for name, value in headers.items()})
        self.code, self.param = code, param

    def openai(self) -> dict:
        usual = "invalid_request_error" if self.status_code < 500 else "server_error"
        kind = "rate_limit_error" if self.status_code == 429 else usual
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def refusal(scope: dict, error: ApiError) -> JSONResponse:
    """The error in the shape of its route; in both where only the body, not read yet, would tell which is meant."""
    is_openai = scope["path"].startswith("/v1") or scope.get("state", {}).get("openai")
    body = {} if is_openai else {"detail": error.detail}
    if is_openai or (is_openai is None and scope["path"] == "/chat/completions"):
        body |= error.openai()
    return JSONResponse(body, error.status_code, error.headers)


class DocumentedRequest(BaseModel):
    """Body of `POST /chat/completions` as Sophgo's demo documents it."""

    question: str
    # Every list ends at its first fault: the faults of a list of small ones would take a thousand times its memory.
    history: Annotated[list[str], Field(fail_fast=True)] = []
    stream: bool = False

    def turns(self) -> list[tuple[str, str]]:
        """(question, answer) in order. Raises UserError where an answer is missing."""
        if len(self.history) % 2:
            found = len(self.history)
            raise UserError(f"history has {found} entries, an even number is needed: user and assistant alternate.")
        return list(zip(self.history[::2], self.history[1::2], strict=True))


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

    def conversation(self, system: str) -> list[dict[str, str]]:
        """The messages for the tokenizer, after `system` where they bring no system prompt of their own.

        Raises ApiError where they do not end with a question.
        """
        messages = [message.chatml() for message in self.messages]
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise ApiError(400, "The last message must be the user's, and not empty.", "invalid_value", "messages")
        if system and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def sampling(self) -> Sampling:
        """Raises UserError where a value is out of the chip's range."""
        given = self.model_dump(include={field.name for field in fields(Sampling)}, exclude_none=True)
        if given.get("top_k") in (0, -1):
            del given["top_k"]
        given.setdefault("temperature", float("top_p" in given or "top_k" in given))
        given.setdefault("top_p", 1.0)
        if "seed" in given:
            # Any integer is a seed to OpenAI; numpy wants none below zero.
            given["seed"] %= 1 << 63
        return Sampling(**given)


async def read_body(request: Request, limit: int, time_limit_s: float) -> bytes:
    """The request's body. Raises ApiError where it is longer than `limit` bytes, or does not arrive."""
    body, total = bytearray(), 0
    try:
        with anyio.fail_after(time_limit_s):
            async for chunk in request.stream():
                # What is too long is read to its end and thrown away, so that the client gets to read the refusal.
                total += len(chunk)
                if total <= limit:
                    body += chunk
    except (TimeoutError, ClientDisconnect):
        raise ApiError(408, f"The request did not arrive within {time_limit_s:g} s.") from None
    if total > limit:
        raise ApiError(413, f"The request is longer than {limit} bytes: shorten it.", "request_too_large")
    return bytes(body)


def parse(body: bytes, model: type[BaseModel], invalid: int) -> BaseModel:
    """Raises ApiError, 400 where it is not JSON and `invalid` where a field is not as it must be."""
    try:
        # Any of JSON's encodings, with a byte-order mark or without.
        return model.model_validate_json(body.decode(json.detect_encoding(body)))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", "invalid_json") from None
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        raise ApiError(400, f"The body is not valid JSON: {errors[0]['ctx']['error']}.", "invalid_json")
    # Of the first wrong field. Where it may be of several types, the one that the value is of tells more.
    told = min(errors, key=lambda e: (e["loc"][:1] != errors[0]["loc"][:1], e["type"].endswith("_type")))
    names = (str(part) for part in told["loc"])
    field = ".".join(name for name in names if name not in ("str", "constrained-str") and "[" not in name)
    raise ApiError(invalid, f"{field or 'The body'}: {told['msg']}.", "invalid_value", field)
