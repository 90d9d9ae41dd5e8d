"""The service over a real socket, with a runner that blocks, fails and answers on demand."""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from helpers.chat.session import MAX_TURNS, StopStrings
from helpers.checkpoint.weights import Checkpoint
from helpers.cli import main
from helpers.commands.serve import KEY_VARIABLE, WAITING, add_arguments, read_access, read_key
from helpers.errors import UserError
from helpers.nets import CANDIDATES
from helpers.serve.api import Settings, create_app
from helpers.serve.queue import ChipQueue, EngineFailed, Job
from helpers.serve.requests import STOP_CHARACTERS, CompletionRequest
from helpers.serve.server import FAREWELL_S, HEADERS_WITHIN_S, STALLED_S, Server, is_loopback, listen
from tests.unit.chromium import Page, find_chromium
from tests.unit.fake_runner import FakeRunner
from tests.unit.served import Served

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "helpers" / "serve" / "web"
DOCUMENTED = {
    "question": "你知道深圳的历史吗?写一段小作文介绍下。",
    "history": ["Hello, how are you?", "I am fine, thank you."],
    "stream": False,
}
TEXT = "深圳 is a city 🙂, and BM1684X\na chip."


class Service:
    """A server in a thread; `runners` are the fakes that were opened so far."""

    def __init__(self, tokenizer, runner, waiting=16, open_runner=None, **settings):
        self.runners = []

        def reopen():
            self.runners.append((open_runner or (lambda: runner))())
            return self.runners[-1]

        self.queue = ChipQueue(reopen, tokenizer, waiting)
        app = create_app(self.queue, self.queue.start(), Settings(**{"model": "tiny", "system": ""} | settings))
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(app, self.queue)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=600, trust_env=False, verify=False)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.Client(trust_env=False, timeout=600, verify=False),
        )

    def close(self):
        self.http.close()
        self.openai.close()
        self.server.should_exit = True
        self.thread.join()
        for runner in self.runners:
            runner.close()
        self.queue.close()
        self.socket.close()

    def wait_until(self, condition):
        # What is waited for takes no time; what is broken never happens.
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.01)

    def allow(self, tokens=math.inf):
        self.runners[-1].allow(tokens)

    def send(self, body, path="/v1/chat/completions", version="1.1", window=None, pieces=1):
        """A socket on which this was posted and nothing was read; window: its receive buffer, bytes.

        pieces: 2 sends the end of the body when the service has seen the rest.
        """
        body = json.dumps(body).encode()
        head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        client = socket.socket()
        client.settimeout(600)
        if window:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        client.connect(("127.0.0.1", self.port))
        client.sendall(head.encode() + (body if pieces == 1 else body[:-1]))
        if pieces == 2:
            self.wait_until(lambda: self.server.server_state.tasks)
            client.sendall(body[-1:])
        return client


@pytest.fixture
def serve(tokenizer):
    failures = []
    with contextlib.ExitStack() as stack:

        def start(text=TEXT, waiting=16, open_runner=None, settings=None, endless=False, **runner):
            if endless:
                runner["seq_length"] = 1 << 40
            reply = itertools.cycle if endless else list
            fake = FakeRunner(lambda ids: reply(tokenizer.encode(text)), **runner)
            service = Service(tokenizer, fake, waiting, open_runner, **(settings or {}))
            stack.callback(service.close)
            # uvicorn, as it is made, takes away what was there before.
            handler = logging.Handler()
            handler.emit = failures.append
            for logger in map(logging.getLogger, ("uvicorn.error", "asyncio")):
                logger.addHandler(handler)
                stack.callback(logger.removeHandler, handler)
            return service

        yield start
    assert [record.exc_info for record in failures if record.exc_info] == []


@pytest.fixture
def limit(serve):
    """Seconds within which a client can ask and the chip can start on its answer, however busy this machine is."""
    service = serve("a")
    started = time.monotonic()
    for _ in range(5):
        service.http.post("/v1/chat/completions", json=ask())
    return max(1.0, 20 * (time.monotonic() - started))


def ask(content="hello", **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **more}


def read_all(client):
    """The response on a socket, up to its end: (status, body)."""
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, response.read().decode()


def sse(response):
    """Server-sent events as (name, data)."""
    name, data = "message", []
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: ") or line == "data:":
            data.append(line[6:])
        elif not line and data:
            yield name, "\n".join(data)
            name, data = "message", []


# The documented route


def test_curl_with_the_documented_body(serve, tokenizer):
    service = serve()
    command = ["curl", "-sS", "--noproxy", "*", f"{service.url}/chat/completions", "-d", json.dumps(DOCUMENTED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"data": TEXT}
    assert service.runners[0].answers[0]["ids"] == tokenizer.chatml(
        [
            {"role": "user", "content": DOCUMENTED["history"][0]},
            {"role": "assistant", "content": DOCUMENTED["history"][1]},
            {"role": "user", "content": DOCUMENTED["question"]},
        ]
    )


def test_the_documented_stream_is_cumulative_and_has_an_end(serve):
    # A character takes 4 tokens at most: each event is followed by another.
    service, events = serve(allowed=4), []
    with service.http.stream("POST", "/chat/completions", json={**DOCUMENTED, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for event in sse(response):
            events.append(event)
            service.allow(4)
    texts = [data for name, data in events if name == "message"]
    assert len(texts) > 3 and texts[-1] == TEXT
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert events[-1] == ("done", TEXT)


@pytest.mark.parametrize("text", ["a", ""])
def test_a_short_answer_is_not_null(serve, text):
    service = serve(text)
    assert service.http.post("/chat/completions", json={"question": "q"}).json() == {"data": text}
    with service.http.stream("POST", "/chat/completions", json={"question": "q", "stream": True}) as response:
        assert list(sse(response))[-1] == ("done", text)


def test_long_histories_lose_their_oldest_turns_and_it_says_so(serve):
    service = serve(seq_length=128)
    history = ["a question of some length", "an answer of some length"] * 20
    response = service.http.post("/chat/completions", json={"question": "q", "history": history})
    assert response.json() == {"data": TEXT}
    assert 10 < int(response.headers["X-Dropped-Turns"]) < 20
    roomy = serve(seq_length=4096)
    response = roomy.http.post("/chat/completions", json={"question": "q", "history": ["a", "b"] * (MAX_TURNS + 2)})
    assert response.headers["X-Dropped-Turns"] == "2"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"question": "q", "history": ["one"]}, 400, "even"),
        ({"question": " "}, 400, "empty"),
        ({"question": "long " * 2000}, 400, "tokens"),
        ({"history": []}, 422, "question"),
        ({"question": 5}, 422, "question"),
        ({"question": "q", "history": "no list"}, 422, "history"),
        ({"question": "q", "history": ["a", 5]}, 422, "history.1"),
        ([], 422, "object"),
        (b"{", 400, "JSON"),
        (b"", 400, "JSON"),
        (b'{"question": "\xff"}', 400, "JSON"),
        (b'{"question": "\\ud800"}', 400, "JSON"),
        (b"[" * 100_000, 400, "JSON"),
    ],
)
def test_a_documented_request_that_is_malformed(serve, body, status, words):
    service = serve()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = service.http.post("/chat/completions", content=content)
    assert response.status_code == status
    assert list(response.json()) == ["detail"] and words in response.json()["detail"]
    assert service.runners[0].answers == []


# The OpenAI-compatible routes


def test_the_openai_client_holds_a_chat_of_two_turns(serve, tokenizer):
    service = serve()
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one"}]
    first = service.openai.chat.completions.create(model="tiny", messages=messages)
    assert first.choices[0].message.content == TEXT and first.choices[0].finish_reason == "stop"
    assert first.usage.prompt_tokens == len(tokenizer.chatml(messages))
    assert first.usage.completion_tokens == len(tokenizer.encode(TEXT))
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    messages += [{"role": "assistant", "content": TEXT}, {"role": "user", "content": "two"}]
    stream = service.openai.chat.completions.create(
        model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == len(tokenizer.chatml(messages))
    assert len({c.id for c in chunks}) == 1
    assert service.runners[0].answers[1]["ids"] == tokenizer.chatml(messages)


def test_the_stream_ends_with_done(serve):
    service = serve()
    with service.http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as response:
        data = [data for _, data in sse(response)]
    assert data[-1] == "[DONE]"
    assert all("usage" not in json.loads(chunk) for chunk in data[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_limits_and_stop_strings(serve, stream):
    service = serve("one two three four five")

    def answer(**more):
        made = service.openai.chat.completions.create(**ask(stream=stream, **more))
        if not stream:
            return made.choices[0].message.content, made.choices[0].finish_reason
        chunks = [chunk.choices[0] for chunk in made]
        return "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason

    assert answer(stop=[" three", "never"]) == ("one two", "stop")
    assert answer(stop="five hundred") == ("one two three four five", "stop")
    text, reason = answer(max_tokens=2)
    assert "one two three four five".startswith(text) and reason == "length"
    assert answer(max_completion_tokens=2) == (text, reason)


def test_sampling_parameters_reach_the_runner(serve):
    service = serve()
    create = service.openai.chat.completions.create
    create(**ask())
    create(**ask(temperature=0.7, top_p=0.5, seed=-3))
    create(**ask(top_p=0.5, extra_body={"top_k": 7, "repetition_penalty": 1.1, "repetition_last_n": 5}))
    greedy, drawn, extra = (answer["sampling"] for answer in service.runners[0].answers)
    assert greedy.greedy
    assert (drawn.temperature, drawn.top_p) == (0.7, 0.5) and drawn.seed >= 0
    assert (extra.temperature, extra.top_k, extra.repetition_penalty, extra.repetition_last_n) == (1, 7, 1.1, 5)


def test_models(serve):
    service = serve()
    assert [model.id for model in service.openai.models.list()] == ["tiny"]
    assert service.openai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        service.openai.models.retrieve("gpt")


def test_a_model_whose_name_has_a_slash(serve):
    service = serve(settings={"model": "Qwen/Qwen-7B-Chat"})
    assert service.openai.models.retrieve("Qwen/Qwen-7B-Chat").id == "Qwen/Qwen-7B-Chat"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"messages": []}, 400, "invalid_value"),
        ({}, 400, "invalid_value"),
        (ask(""), 400, "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "invalid_value"),
        (ask([{"type": "image_url", "image_url": {"url": "x"}}]), 400, "invalid_value"),
        (ask("long " * 2000), 400, "context_length_exceeded"),
        (ask("x" * 500_001), 400, "context_length_exceeded"),
        (ask(temperature=-1), 400, "invalid_value"),
        (ask(temperature="hot"), 400, "invalid_value"),
        (ask(top_p=0), 400, "invalid_value"),
        (ask(top_k=51), 400, "invalid_value"),
        (ask(repetition_last_n=0), 400, "invalid_value"),
        (ask(max_tokens=0), 400, "invalid_value"),
        (ask(n=2), 400, "invalid_value"),
        (ask(logprobs=True), 400, "invalid_value"),
        (ask(frequency_penalty=0.5), 400, "invalid_value"),
        (ask(tools=[{"type": "function"}]), 400, "invalid_value"),
        (ask(response_format={"type": "json_object"}), 400, "unsupported_value"),
        (ask() | {"model": "gpt"}, 404, "model_not_found"),
        (b'{"messages": [{"role": "user", "content": "q"}], "temperature": NaN}', 400, "invalid_value"),
        (ask(stop=list("abcde")), 400, "invalid_value"),
        (b"nonsense", 400, "invalid_json"),
    ],
)
def test_an_openai_request_that_is_malformed(serve, body, status, code):
    service = serve()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = service.http.post("/v1/chat/completions", content=content)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"] and error["code"] == code
    assert service.runners[0].answers == []


def test_neutral_values_and_fields_of_other_makes_are_taken(serve):
    service = serve()
    body = ask(
        n=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, tools=[], logprobs=False, user="somebody",
        response_format={"type": "text"}, stop=None,
    )  # fmt: skip
    body["messages"].insert(0, {"role": "developer", "content": [{"type": "text", "text": "be kind"}]})
    assert service.http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_field_of_several_types_is_told_what_is_wrong_with_the_one_given(serve):
    service = serve()

    def error(**body):
        return service.http.post("/v1/chat/completions", json=ask() | body).json()["error"]

    assert "at most 4 items" in error(stop=list("abcde"))["message"]
    image = error(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert image["param"] == "messages.0.content.0.type" and "'text'" in image["message"]


def test_the_system_prompt_of_the_service_stands_in_for_none(serve, tokenizer):
    service = serve(settings={"system": "be kind"})
    own = [{"role": "system", "content": "be short"}]
    service.http.post("/v1/chat/completions", json=ask("q"))
    service.http.post("/v1/chat/completions", json={"messages": own + ask("q")["messages"]})
    service.http.post("/chat/completions", json={"question": "q"})
    kind, short = ([{"role": "system", "content": f"be {how}"}, *ask("q")["messages"]] for how in ("kind", "short"))
    prompts = [answer["ids"] for answer in service.runners[0].answers]
    assert prompts == [tokenizer.chatml(messages) for messages in (kind, short, kind)]


def test_no_value_is_as_no_field(serve):
    service = serve()
    fields = [*CompletionRequest.model_fields, "user", "metadata", "tool_choice", "parallel_tool_calls"]
    body = dict.fromkeys(fields) | ask()
    assert service.http.post("/v1/chat/completions", json=body).status_code == 200
    options = {"stream_options": {"include_usage": None}, "stream": True}
    assert service.http.post("/v1/chat/completions", json=ask(**options)).status_code == 200
    assert service.http.post("/v1/chat/completions", json=ask(top_k=-1)).status_code == 200
    assert all(answer["sampling"].greedy for answer in service.runners[0].answers)


def test_drawing_without_the_net_for_it_is_refused(serve):
    service = serve(can_sample=False)
    response = service.http.post("/v1/chat/completions", json=ask(temperature=1))
    assert response.status_code == 400 and "penalty_sample_head" in response.json()["error"]["message"]
    assert service.http.post("/v1/chat/completions", json=ask()).status_code == 200


def test_what_is_not_there(serve):
    service = serve()
    assert service.http.get("/nowhere").json() == {"detail": "GET /nowhere: Not Found."}
    assert service.http.get("/v1/chat/completions").status_code == 405
    assert "error" in service.http.get("/v1/nowhere").json()


def test_heads_are_answered(serve):
    service = serve()
    for path in ("/", "/health", "/v1/models", "/v1/models/", "/v1/models/tiny", "/models", "/web/chat.js"):
        head, get = service.http.head(path), service.http.get(path)
        assert head.status_code == get.status_code == 200 and head.content == b"", path
        assert head.headers["Content-Length"] == str(len(get.content))
    assert service.http.head("/nowhere").status_code == 404
    assert (
        subprocess.run(["curl", "-sfI", "--noproxy", "*", service.url], capture_output=True, check=False).returncode
        == 0
    )


def test_a_wrong_method_is_told_the_right_ones(serve):
    service, refused = serve(), 0
    paths = ("/", "/health", "/v1/models", "/v1/models/tiny", "/models", "/v1/chat/completions", "/chat/completions",
             "/web/chat.js")  # fmt: skip
    for path in paths:
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"):
            response = service.http.request(method, path)
            if response.status_code == 405:
                refused += 1
                for allowed in response.headers["Allow"].split(", "):
                    assert service.http.request(allowed, path).status_code != 405, (method, path)
    assert refused > 40


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/models", "/models/"])
def test_the_list_of_models(serve, path):
    answer = serve().http.get(path)
    assert answer.status_code == 200 and [model["id"] for model in answer.json()["data"]] == ["tiny"]


def test_a_slash_at_the_end_is_no_other_route(serve):
    service = serve()
    assert service.http.get("/v1/models/tiny/").json()["id"] == "tiny"
    assert service.http.post("/chat/completions/", json={"question": "q"}).json() == {"data": TEXT}
    assert service.http.post("/v1/chat/completions/", json=ask()).status_code == 200
    assert service.http.get("/web/").status_code == 404


def test_an_openai_client_without_v1_in_its_address(serve, tokenizer):
    service = serve()
    client = service.openai.with_options(base_url=service.url)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert client.chat.completions.create(**ask()).choices[0].message.content == TEXT
    chunks = list(client.chat.completions.create(**ask(stream=True)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    with pytest.raises(openai.BadRequestError, match="temperature: Input should be") as error:
        client.chat.completions.create(**ask(temperature=9))
    assert error.value.body["code"] == "invalid_value"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
        client.models.retrieve("gpt")
    both = {"question": "one", **ask("two")}
    assert "choices" in service.http.post("/chat/completions", json=both).json()
    assert service.runners[0].answers[-1]["ids"] == tokenizer.chatml(ask("two")["messages"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize(
    ("path", "body"),
    [("/chat/completions", DOCUMENTED), ("/chat/completions", ask("深圳")), ("/v1/chat/completions", ask("深圳"))],
)
def test_a_byte_order_mark_is_no_fault(serve, path, body, encoding):
    service = serve()
    response = service.http.post(path, content=json.dumps(body, ensure_ascii=False).encode(encoding))
    assert response.status_code == 200 and TEXT in (
        response.json().get("data") or response.json()["choices"][0]["message"]["content"]
    )


def test_an_upgrade_that_a_java_client_offers_costs_nothing(serve):
    """Its HTTP client offers h2c with every first request; the body comes with it all the same."""
    service = serve()
    offer = {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    }
    for _ in range(2):
        response = service.http.post("/chat/completions", json=DOCUMENTED, headers=offer)
        assert response.status_code == 200 and response.json() == {"data": TEXT}


def test_nothing_depends_on_what_happens_to_be_installed(tmp_path):
    """Or on what stands in the environment for another program's sake."""
    for module in ("httptools", "uvloop", "websockets", "wsproto", "zttp", "h2"):
        (tmp_path / f"{module}.py").write_text(
            "import sys\nprint('imported', __name__, file=sys.stderr)\nraise SystemExit(3)\n"
        )
    served = Served.fake(PYTHONPATH=str(tmp_path), WEB_CONCURRENCY="many", FORWARDED_ALLOW_IPS="*")
    try:
        for upgrade in ("h2c", "websocket"):
            headers = {
                "Connection": "Upgrade",
                "Upgrade": upgrade,
                "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "a",
            }
            response = httpx.post(
                f"{served.url}/chat/completions", json=DOCUMENTED, headers=headers, trust_env=False, timeout=600
            )
            assert response.status_code == 200
    finally:
        assert served.close() == 0
    log = "".join(served.log)
    assert "imported" not in log and "pip install" not in log and "WebSocket" not in log, log


# Who may ask


def serve_arguments(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--model", "m", *argv])


def access(*argv, loopback=True, has_key=False):
    return {"access": read_access(serve_arguments(*argv), loopback, has_key)}


GOOD_KEY = "s3cret-Key"


@pytest.mark.parametrize(
    ("authorization", "good"),
    [
        (None, False),
        ("", False),
        ("Bearer", False),
        ("Bearer x", False),
        ("Bearer wrong", False),
        (f"Bearer {GOOD_KEY[:-1]}", False),
        (f"Bearer {GOOD_KEY[1:]}", False),
        (f"Bearer {GOOD_KEY}s", False),
        (f"Bearer {GOOD_KEY} {GOOD_KEY}", False),
        (f"Bearer {GOOD_KEY.lower()}", False),
        (f"Bearer{GOOD_KEY}", False),
        (f"Basic {GOOD_KEY}", False),
        (f"Token {GOOD_KEY}", False),
        (f"BearerToken {GOOD_KEY}", False),
        (GOOD_KEY, False),
        (b"Bearer \xff\xfe", False),
        (f"Bearer {GOOD_KEY}", True),
        (f"bearer {GOOD_KEY}", True),
    ],
)
def test_the_api_key(serve, authorization, good):
    service = serve(settings={"api_key": GOOD_KEY})
    headers = {} if authorization is None else {"Authorization": authorization}
    for path, body in (
        ("/v1/chat/completions", ask()),
        ("/chat/completions", {"question": "q"}),
        ("/chat/completions", ask()),
    ):
        response = service.http.post(path, json=body, headers=headers)
        assert response.status_code == (200 if good else 401), (path, response.text)
        assert good or response.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/v1/models", "/v1/models/tiny", "/models", "/models/tiny"):
        assert service.http.get(path, headers=headers).status_code == (200 if good else 401)
        assert service.http.head(path, headers=headers).status_code == (200 if good else 401)
    for path in ("/health", "/", "/web/chat.js"):
        assert service.http.get(path, headers=headers).status_code == 200


def test_the_openai_client_sees_a_wrong_key_as_one(serve):
    service = serve(settings={"api_key": GOOD_KEY})
    for base_url in (f"{service.url}/v1", service.url):
        client = service.openai.with_options(base_url=base_url)
        with pytest.raises(openai.AuthenticationError, match="wants its API key"):
            client.models.list()
        with pytest.raises(openai.AuthenticationError, match="wants its API key"):
            client.chat.completions.create(**ask())
        right = client.with_options(api_key=GOOD_KEY)
        assert right.chat.completions.create(**ask()).choices[0].message.content == TEXT


@pytest.mark.parametrize("key", [b"geh\xc3\xa9im", b"geh\xe9im", b" secret", b"secret\n", b"sec\tret", b" "])
@pytest.mark.parametrize("given", ["variable", "option"])
def test_a_key_that_cannot_be_sent_is_told_at_the_start(key, given, capsys, monkeypatch):
    key = os.fsdecode(key)
    monkeypatch.setenv(KEY_VARIABLE, key if given == "variable" else "unused")
    assert main(["serve", "--model", "absent", *(["--api-key", key] if given == "option" else [])]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: The ") and err.count("\n") == 1 and "cannot be sent in a header" in err
    assert (KEY_VARIABLE if given == "variable" else "--api-key") in err


def test_which_key_is_asked_for(monkeypatch, capsys):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(serve_arguments()) is None
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert read_key(serve_arguments()) is None
    monkeypatch.setenv(KEY_VARIABLE, "one of it!")
    assert read_key(serve_arguments()) == "one of it!"
    assert read_key(serve_arguments("--api-key", "two")) == "two"
    # An empty variable in a command line must not open the service to all.
    with pytest.raises(UserError, match="--api-key"):
        read_key(serve_arguments("--api-key", ""))


@pytest.mark.parametrize(
    "name", ["Authorization", "Origin", "Host", "Accept", "Content-Type", "User-Agent", "X-Forwarded-Host", "Cookie",
             "Access-Control-Request-Method", "X-Forwarded-Proto", "X-Forwarded-Port"],
)  # fmt: skip
def test_headers_that_are_not_utf8(serve, name, capfd):
    service = serve(
        settings={"api_key": GOOD_KEY, **access("--forwarded-allow-ips", "*", "--allow-origin", "http://a")}
    )
    headers = {"Host": b"localhost", "Connection": b"close", name: b"\xff\xfe\x80 \xc3\x28"}
    for method in (b"GET", b"OPTIONS"):
        with socket.create_connection(("127.0.0.1", service.port), timeout=600) as client:
            lines = b"".join(key.encode() + b": " + value + b"\r\n" for key, value in headers.items())
            client.sendall(method + b" /v1/models HTTP/1.1\r\n" + lines + b"\r\n")
            received = b"".join(iter(lambda client=client: client.recv(1 << 16), b""))
        assert 400 <= int(received.split()[1]) < 500, received
    assert "Traceback" not in capfd.readouterr().err


def test_pages_of_other_sites_are_refused(serve):
    service = serve()
    same = f"http://LOCALHOST:{service.port}"
    for origin, host, status in (
        (service.url, None, 200),
        (same, f"localhost:{service.port}", 200),
        ("http://elsewhere.example", None, 403),
        (service.url + "1", None, 403),
        (service.url[:-1], None, 403),
        ("http://127.0.0.1", None, 403),
        (f"http://evil.example:{service.port}", None, 403),
        (f"ftp://127.0.0.1:{service.port}", None, 403),
        ("null", None, 403),
    ):
        headers = {"Origin": origin} | ({"Host": host} if host else {})
        response = service.http.post("/chat/completions", json={"question": "q"}, headers=headers)
        assert response.status_code == status, origin
        assert status == 200 or f"--allow-origin {origin}`" in response.json()["detail"]
        response = service.http.post("/v1/chat/completions", json=ask(), headers=headers)
        assert response.status_code == status and (
            status == 200 or response.json()["error"]["code"] == "foreign_origin"
        )
        assert "Access-Control-Allow-Origin" not in response.headers


def preflight(service, origin, path="/v1/chat/completions", **headers):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    return service.http.options(path, headers={"Origin": origin, **asked, **headers})


def test_pages_that_the_operator_names_may_ask(serve):
    pages = ("https://chat.example.com", "http://chat.example.com:8080", "chrome-extension://abcdef")
    options = [option for page in pages for option in ("--allow-origin", page)]
    service = serve(settings={"api_key": GOOD_KEY, **access(*options)})
    for page in pages:
        # A preflight brings no key.
        response = preflight(service, page)
        assert response.status_code == 200 and response.headers["Access-Control-Allow-Origin"] == page
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        allowed = response.headers["Access-Control-Allow-Headers"]
        assert "authorization" in allowed and "x-stainless-os" in allowed
        # The page may read answers and refusals alike.
        for key, status in ((GOOD_KEY, 200), ("wrong", 401)):
            headers = {"Origin": page, "Authorization": f"Bearer {key}"}
            response = service.http.post("/v1/chat/completions", json=ask(), headers=headers)
            assert response.status_code == status and response.headers["Access-Control-Allow-Origin"] == page
            assert "Origin" in response.headers["Vary"]
    for page in ("https://chat.example.com.evil.example", "http://chat.example.com", "https://evil.example", "null"):
        for response in (preflight(service, page), service.http.get("/v1/models", headers={"Origin": page})):
            assert response.status_code == 403 and "--allow-origin" in response.json()["error"]["message"]
            assert "Access-Control-Allow-Origin" not in response.headers


def test_any_page_may_ask_where_there_is_a_key(serve):
    with pytest.raises(UserError, match=rf"--allow-origin \*.*{KEY_VARIABLE}"):
        access("--allow-origin", "*")
    with pytest.raises(UserError, match="--allow-origin null"):
        access("--allow-origin", "null")
    service = serve(settings={"api_key": GOOD_KEY, **access("--allow-origin", "*", has_key=True)})
    for page in ("https://anywhere.example", "null"):
        assert preflight(service, page).headers["Access-Control-Allow-Origin"] == "*"
        response = service.http.get("/v1/models", headers={"Origin": page, "Authorization": f"Bearer {GOOD_KEY}"})
        assert response.status_code == 200 and response.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--allow-origin", "chat.example.com"),
        ("--allow-origin", "https://chat.example.com/"),
        ("--allow-origin", "https://Chat.example.com"),
        ("--allow-origin", "https://*.example.com"),
        ("--allow-origin", ""),
        ("--allow-host", "https://chat.example.com"),
        ("--allow-host", "*"),
        ("--allow-host", ""),
        ("--allow-host", "a b"),
        ("--forwarded-allow-ips", "proxy.example"),
        ("--forwarded-allow-ips", "127.0.0.1,10.0.0.0/33"),
    ],
)
def test_an_option_that_names_nobody_is_told_at_the_start(option, value):
    with pytest.raises(UserError, match=option):
        access(option, value)


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/web/chat.js", "/nowhere"])
def test_a_name_that_another_site_has_resolved_to_here_is_refused(serve, path):
    service = serve(settings=access("--host", "my.box", "--allow-host", "Chat.example.com", "--allow-host", "::2"))
    for name, good in (
        ("localhost", True),
        ("LocalHost", True),
        ("127.0.0.1", True),
        ("[::1]", True),
        ("my.box", True),
        ("chat.example.com", True),
        ("[::2]", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evil.localhost", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.2", False),
        ("[::3]", False),
        ("xlocalhost", False),
    ):
        # Whatever the port: a tunnel may have another.
        for host in (name, f"{name}:{service.port}", f"{name}:1"):
            headers = {"Host": host, "Origin": f"http://{host}"}
            for response in (service.http.get(path, headers=headers), service.http.get(path, headers={"Host": host})):
                assert response.status_code == (403 if not good else 404 if path == "/nowhere" else 200), host
                assert good or f"--allow-host {name}`" in response.text
    body = {"question": "q"}
    evil = {"Host": f"evil.example:{service.port}", "Origin": f"http://evil.example:{service.port}"}
    assert service.http.post("/chat/completions", json=body, headers=evil).status_code == 403
    assert service.runners[0].answers == []
    # Only browsers are deceived so, and they always send a name.
    with socket.create_connection(("127.0.0.1", service.port), timeout=600) as client:
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert read_all(client)[0] == 200


def test_the_options_reach_the_service():
    options = (
        "--allow-host",
        "chat.example.com",
        "--allow-origin",
        "https://a.example",
        "--waiting",
        "3",
        "--name",
        "x",
    )
    served = Served.fake(
        *options, "--forwarded-allow-ips", "127.0.0.1", "--max-body", "999", **{KEY_VARIABLE: GOOD_KEY}
    )
    try:
        with httpx.Client(base_url=served.url, trust_env=False, timeout=600) as http:
            http.headers["Authorization"] = f"Bearer {GOOD_KEY}"

            def status(**headers):
                return http.get(
                    "/v1/models/x", headers={k.replace("_", "-"): v for k, v in headers.items()}
                ).status_code

            assert status() == status(Host="chat.example.com") == status(Origin="https://a.example") == 200
            assert status(Host="evil.example") == status(Origin="https://evil.example") == 403
            assert status(Authorization="Bearer no") == 401
            assert status(X_Forwarded_Host="evil.example") == 403
            forwarded = {"X_Forwarded_Host": "chat.example.com", "X_Forwarded_Proto": "https"}
            assert status(**forwarded, Origin="https://chat.example.com") == 200
            assert http.get("/health").json()["waiting_limit"] == 3
            assert http.post("/v1/chat/completions", json=ask("q" * 999)).status_code == 413
    finally:
        assert served.close() == 0
    assert not any("warning" in line for line in served.log)


@pytest.mark.parametrize(("host", "key", "warned"), [("0.0.0.0", "", True), ("0.0.0.0", GOOD_KEY, False)])
def test_a_service_for_all_without_a_key_is_warned_of(host, key, warned):
    served = Served.fake("--host", host, **{KEY_VARIABLE: key})
    try:
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=600) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: any.name\r\n\r\n")
            assert read_all(client)[0] == 200
    finally:
        assert served.close() == 0
    assert any("every machine that reaches 0.0.0.0" in line for line in served.log) == warned


def test_names_are_not_asked_for_where_other_machines_are_served():
    assert access(loopback=False)["access"].hosts is None
    hosts = access("--host", "0.0.0.0", "--allow-host", "chat.example.com:443", loopback=False)["access"].hosts
    assert {"chat.example.com", "localhost", "127.0.0.1", "[::1]"} <= hosts


# What nginx sends: by itself, and with the headers of its usual recipe.
BARE = {"Host": "127.0.0.1:8000"}
RECIPE = {
    "Host": "chat.example.com",
    "X-Real-IP": "203.0.113.9",
    "X-Forwarded-For": "203.0.113.9",
    "X-Forwarded-Proto": "https",
}


@pytest.mark.parametrize(
    ("options", "sent", "origin", "status"),
    [
        ([], BARE, "https://chat.example.com", 403),
        (["--allow-origin", "https://chat.example.com"], BARE, "https://chat.example.com", 200),
        ([], RECIPE, "https://chat.example.com", 403),
        (["--allow-host", "chat.example.com"], RECIPE, "https://chat.example.com", 200),
        (["--allow-host", "chat.example.com"], RECIPE, "https://chat.example.com:8443", 403),
        (
            ["--allow-host", "chat.example.com", "--forwarded-allow-ips", "127.0.0.1"],
            RECIPE | {"X-Forwarded-Port": "8443"},
            "https://chat.example.com:8443",
            200,
        ),
        # Another proxy's headers are nobody's word.
        (
            ["--allow-host", "chat.example.com", "--forwarded-allow-ips", "10.0.0.0/8,::1"],
            RECIPE | {"X-Forwarded-Port": "8443"},
            "https://chat.example.com:8443",
            403,
        ),
        (
            ["--allow-host", "chat.example.com"],
            BARE | {"X-Forwarded-Host": "chat.example.com", "X-Forwarded-Proto": "https"},
            "https://chat.example.com",
            403,
        ),
        *(
            (
                ["--allow-host", "chat.example.com", "--forwarded-allow-ips", trusted],
                BARE | {"X-Forwarded-Host": host, "X-Forwarded-Proto": "https"},
                origin,
                status,
            )
            for trusted in ("127.0.0.0/8", "10.1.2.3, 127.0.0.1", "*")
            for host, origin, status in (
                ("chat.example.com", "https://chat.example.com", 200),
                ("chat.example.com:443", "https://chat.example.com", 200),
                ("chat.example.com:8443", "https://chat.example.com:8443", 200),
                ("chat.example.com:8443", "https://chat.example.com", 403),
                ("chat.example.com", "http://chat.example.com", 403),
                ("evil.example, chat.example.com", "https://chat.example.com", 200),
                ("chat.example.com, evil.example", "https://chat.example.com", 403),
                ("evil.example", "https://evil.example", 403),
            )
        ),
        # The name that the browser itself sent counts, whatever a page adds.
        (
            ["--forwarded-allow-ips", "127.0.0.1"],
            {"Host": "evil.example", "X-Forwarded-Host": "localhost"},
            "http://localhost",
            403,
        ),
    ],
)
def test_the_page_behind_a_proxy(serve, options, sent, origin, status):
    service = serve(settings=access(*options))
    response = service.http.post("/v1/chat/completions", json=ask(), headers=sent | {"Origin": origin})
    assert response.status_code == status, response.text
    assert status == 200 or "`serve --allow-" in response.json()["error"]["message"]


def test_the_page_is_in_nobody_s_frame(serve):
    policy = serve().http.get("/").headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in policy and "default-src 'self'" in policy


# Sizes


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_that_is_too_long(serve, chunked):
    service = serve(settings={"max_body_bytes": 10_000})
    body = json.dumps({"question": "x" * 5_000_000}).encode()
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    response = service.http.post("/chat/completions", content=pieces if chunked else body)
    assert response.status_code == 413 and "10000" in response.json()["detail"]
    assert service.http.post("/chat/completions", json={"question": "q"}).status_code == 200


@pytest.mark.parametrize(
    ("field", "least", "most", "outside"),
    [
        ("temperature", 0, 2, [-0.001, 2.001]),
        ("top_p", 0.001, 1, [0, 1.001]),
        ("top_k", 1, CANDIDATES, [-2, CANDIDATES + 1]),
        ("repetition_penalty", 0.001, 10, [0, 10.001]),
        ("repetition_last_n", 1, 10**30, [0]),
        ("max_tokens", 1, 10**30, [0]),
        ("max_completion_tokens", 1, 10**30, [0]),
        ("seed", -(10**30), 10**30, [0.5]),
        ("n", 1, 1, [0, 2]),
    ],
)
def test_the_ends_of_each_range_are_taken_and_no_more(serve, field, least, most, outside):
    service = serve()
    for value in (least, most):
        assert service.http.post("/v1/chat/completions", json=ask(**{field: value})).status_code == 200, value
    for value in outside:
        response = service.http.post("/v1/chat/completions", json=ask(**{field: value}))
        assert response.status_code == 400 and field in response.json()["error"]["message"], value


def test_the_limits_are_those_of_the_documents():
    given = serve_arguments()
    assert (given.max_body, given.time_limit, given.waiting) == (
        Settings.max_body_bytes,
        Settings.time_limit_s,
        WAITING,
    )
    figures = [
        given.max_body,
        STOP_CHARACTERS,
        given.waiting,
        given.time_limit,
        HEADERS_WITHIN_S,
        STALLED_S,
        FAREWELL_S,
    ]
    for page, heading in (("troubleshooting.md", "### Limits"), ("zh/troubleshooting.md", "### 限制")):
        table = (ROOT / "docs" / page).read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
        assert [figure for figure in figures if f" {figure:g} " not in table] == [], page


def test_stop_strings_are_few_and_short(serve):
    service = serve("one two three four five")
    create = service.openai.chat.completions.create
    longest = " three" + "x" * (STOP_CHARACTERS - 6)
    assert create(**ask(stop=[longest, longest, " four", longest])).choices[0].message.content == "one two three"
    for stop, words in (
        (["a"] * 5, "at most 4 items"),
        (longest + "x", f"stop: String should have at most {STOP_CHARACTERS} characters"),
        (["a", longest + "x"], f"stop.1: String should have at most {STOP_CHARACTERS} characters"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            create(**ask(stop=stop))
    assert len(service.runners[0].answers) == 1


MAX_BODY = Settings.max_body_bytes
# Values as large as fit `room` bytes of JSON, each of a shape that is dear in another way.
LARGE = {
    "text": lambda room: '"' + "a" * room + '"',
    "escapes": lambda room: '"' + r"\u0000" * (room // 6) + '"',
    "blanks": lambda room: '"' + " " * room + '"',
    "marks": lambda room: '"' + "\u0301\u0316" * (room // 4) + '"',
    "digits": lambda room: "9" * room,
    "fraction": lambda room: "0." + "1" * (room - 2),
    "numbers": lambda room: "[" + "0," * (room // 2 - 1) + "0]",
    "texts": lambda room: "[" + '"",' * (room // 3 - 1) + '""]',
    "objects": lambda room: "[" + "{}," * (room // 3 - 1) + "{}]",
    "depth": lambda room: "[" * (room // 2) + "]" * (room // 2),
    "keys": lambda room: "{" + ",".join(f'"{k:x}":0' for k in range(room // 9)) + "}",
    "messages": lambda room: "[" + ",".join(['{"role":"user","content":"a"}'] * (room // 30)) + "]",
    "parts": lambda room: "[" + ",".join(['{"type":"text","text":""}'] * (room // 27)) + "]",
}
OPENAI = "/v1/chat/completions"
PLACES = {
    "the whole": (OPENAI, "%s"),
    "an unknown field": (OPENAI, '{"messages": [{"role": "user", "content": "q"}], "x": %s}'),
    **{
        name: (OPENAI, '{"messages": [{"role": "user", "content": "q"}], "' + name + '": %s}')
        for name in CompletionRequest.model_fields
        if name != "messages"
    },
    "messages": (OPENAI, '{"messages": %s}'),
    "messages, without /v1": ("/chat/completions", '{"messages": %s}'),
    "role": (OPENAI, '{"messages": [{"role": %s, "content": "q"}]}'),
    "content": (OPENAI, '{"messages": [{"role": "user", "content": %s}]}'),
    "a part": (OPENAI, '{"messages": [{"role": "user", "content": [%s]}]}'),
    "its type": (OPENAI, '{"messages": [{"role": "user", "content": [{"type": %s, "text": "q"}]}]}'),
    "its text": (OPENAI, '{"messages": [{"role": "user", "content": [{"type": "text", "text": %s}]}]}'),
    "include_usage": (OPENAI, json.dumps(ask(stream=True))[:-1] + ', "stream_options": {"include_usage": %s}}'),
    "type of response": (OPENAI, json.dumps(ask())[:-1] + ', "response_format": {"type": %s}}'),
    "question": ("/chat/completions", '{"question": %s}'),
    "history": ("/chat/completions", '{"question": "q", "history": %s}'),
    "a turn": ("/chat/completions", '{"question": "q", "history": ["a", %s]}'),
    "documented stream": ("/chat/completions", '{"question": "q", "stream": %s}'),
    "an unknown documented field": ("/chat/completions", '{"question": "q", "x": %s}'),
}


@pytest.fixture(scope="module")
def served():
    served = Served.fake()
    yield served
    assert served.close() == 0
    assert "Traceback" not in "".join(served.log), "".join(served.log)


@pytest.mark.parametrize("place", PLACES)
def test_the_largest_request_in_each_field_takes_little_memory(served, place):
    """Every large value in every field, one after the other; then the next client is answered."""
    path, body = PLACES[place]
    with httpx.Client(base_url=served.url, trust_env=False, timeout=600) as http:
        for shape, large in LARGE.items():
            content = (body % large(MAX_BODY - len(body))).encode()
            assert 0.8 * MAX_BODY < len(content) <= MAX_BODY, shape
            response = http.post(path, content=content)
            assert response.status_code in (200, 400, 404, 422), (shape, response.text[:500])
            assert len(response.content) < 10_000, shape
            assert (peak := served.peak_bytes()) < 400e6, f"{shape}: {peak / 1e6:.0f} MB"
        assert http.post("/v1/chat/completions", json=ask("hello")).status_code == 200


def cpu_seconds(work):
    """The least of some runs: of this thread alone, so other processes do not count."""
    taken = []
    for _ in range(3):
        started = time.thread_time()
        work()
        taken.append(time.thread_time() - started)
    return min(taken)


@pytest.mark.parametrize("what", ["marks", "a stop string", "a stop string that nearly comes"])
def test_no_work_grows_with_the_square_of_what_is_sent(tokenizer, what):
    def work(size):
        if what == "marks":
            return lambda: tokenizer.encode("a" + "\u0301\u0316" * size)
        stop, pieces = "a" * size + "b", ["a" * size] if what == "a stop string" else ["a"] * size

        def push():
            stops = StopStrings([stop] if what == "a stop string" else ["a" * 50 + "b"])
            for piece in pieces:
                stops.push(piece)

        return push

    # Eight times as much is 8 times the work, not 64.
    assert cpu_seconds(work(32_000)) < 24 * cpu_seconds(work(4_000))


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("--waiting", "-1", 0), ("--time-limit", "0.9", 1), ("--time-limit", "nan", 1), ("--max-body", "0", 1)],
)
def test_a_limit_that_is_none_is_told_at_the_start(option, value, least, capsys):
    assert main(["serve", "--model", "absent", option, value]) == 2
    assert capsys.readouterr().err == f"error: {option} is {value}, it must be {least} or more.\n"
    # The least one is taken: then the model is looked for.
    assert main(["serve", "--model", "absent", "--port", "0", option, str(least)]) == 2
    assert "must be" not in capsys.readouterr().err


def test_a_box_without_the_packages_is_told_which(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "helpers.serve.api")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--model", "absent"]) == 2
    assert "The service needs fastapi, which is absent: pip install" in capsys.readouterr().err


def test_only_this_machine_unless_told_otherwise():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with listen(parser.parse_args(["--model", "m"]).host, 0) as bound:
        assert is_loopback(bound)
        with pytest.raises(UserError, match="Cannot listen on .* port"):
            listen("127.0.0.1", bound.getsockname()[1])
        for port in (-1, 1 << 16):
            with pytest.raises(UserError, match=f"--port is {port}, .* 65535"):
                listen("127.0.0.1", port)
        with pytest.raises(UserError, match="host"):
            listen("no.such.host.invalid", 0)
    with listen("0.0.0.0", 0) as bound:
        assert not is_loopback(bound)


# One chip, many clients


def test_the_event_loop_never_waits_for_the_chip(serve):
    service = serve(allowed=0)
    with service.send(ask()) as first:
        service.wait_until(lambda: service.runners[0].answers)
        for _ in range(5):
            assert service.http.get("/health").json()["busy"]
        assert service.runners[0].answers[0]["computed"] == 0
        service.allow()
        assert read_all(first)[0] == 200


def test_one_request_at_a_time_in_order(serve, tokenizer):
    service = serve(allowed=0)
    queue, prompts, clients = service.queue, [], []
    for k in range(6):
        prompts.append(tokenizer.chatml([{"role": "user", "content": f"question {k}"}]))
        clients.append(service.send({"question": f"question {k}"}, "/chat/completions"))
        service.wait_until(lambda k=k: queue.busy + queue.waiting > k)
    service.allow()
    for client in clients:
        assert read_all(client)[0] == 200
        client.close()
    answers = service.runners[0].answers
    assert [answer["ids"] for answer in answers] == prompts
    assert [answer["computed"] for answer in answers] == [len(service.runners[0].reply([])) + 1] * 6


def test_a_thousand_requests_at_once(serve):
    service = serve("a", waiting=7)
    body = json.dumps(ask()).encode()
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    )

    async def one():
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(request % (len(body), body))
        response = await reader.read()
        writer.close()
        return response.decode()

    async def all_of_them():
        return await asyncio.gather(*(one() for _ in range(1000)))

    responses = asyncio.run(all_of_them())
    answered = [r for r in responses if r.startswith("HTTP/1.1 200 ")]
    refused = [r for r in responses if r.startswith("HTTP/1.1 429 ")]
    assert len(answered) + len(refused) == 1000
    assert len(answered) == len(service.runners[0].answers) >= 8
    assert all('"finish_reason":"stop"' in response for response in answered)
    assert all("rate_limit_error" in response and "retry-after: " in response.lower() for response in refused)
    assert service.http.get("/health").json()["waiting"] == 0


def test_the_openai_client_sees_a_full_queue_as_a_rate_limit(serve):
    service = serve("one two three", waiting=0, allowed=1)
    with service.http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as response:
        assert response.status_code == 200
        with pytest.raises(openai.RateLimitError, match="waiting"):
            service.openai.chat.completions.create(**ask())
        service.allow()
        assert [data for _, data in sse(response)][-1] == "[DONE]"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_chip(serve, stream, version):
    service = serve("word ", endless=True, step_s=0.001)
    with service.send(ask(stream=stream), version=version) as client:
        service.wait_until(lambda: service.runners[0].answers and service.runners[0].answers[0]["computed"] > 3)
        assert not stream or client.recv(1)
    service.wait_until(lambda: not service.queue.busy)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_never_answered(serve, stream, version):
    service = serve(allowed=0)
    with service.send(ask("first", stream=True)) as first:
        service.wait_until(lambda: service.queue.busy)
        with service.send(ask("second", stream=stream), version=version):
            service.wait_until(lambda: service.queue.waiting == 1)
        service.wait_until(lambda: service.queue.waiting == 0)
        assert service.queue.busy
        service.allow()
        assert read_all(first)[1].endswith("[DONE]\n\n")
    assert len(service.runners[0].answers) == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_leaves_amid_a_request_leaves_nothing_behind(serve, sent, half):
    service = serve()
    with socket.create_connection(("127.0.0.1", service.port), timeout=600) as client:
        service.wait_until(lambda: service.server.server_state.connections)
        client.sendall(sent)
        if half:
            client.shutdown(socket.SHUT_WR)
            # It counts as gone: the connection is closed, answered or not.
            while client.recv(1 << 16):
                pass
    service.wait_until(lambda: not service.server.server_state.connections)
    assert service.http.post("/v1/chat/completions", json=ask()).status_code == 200


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("half", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"])
def test_half_sent_headers_are_dropped_and_nobody_else_is(serve, limit, monkeypatch, before, half):
    monkeypatch.setattr("helpers.serve.server.HEADERS_WITHIN_S", limit)
    service = serve(allowed=0)
    service.server.config.timeout_keep_alive = limit
    with service.send(ask(), pieces=2) as healthy:
        service.wait_until(lambda: service.queue.busy)
        with socket.create_connection(("127.0.0.1", service.port), timeout=600) as client:
            client.sendall(before + half)
            received = b"".join(iter(lambda: client.recv(1 << 16), b""))
            assert received.count(b"HTTP/1.1 200 OK") == bool(before)
        service.allow()
        assert read_all(healthy)[0] == 200


def test_giving_up_is_never_forgotten():
    """Not even where a piece comes at that moment."""

    async def given_up_after(steps):
        job = Job([1], 600)

        async def read():
            return [piece async for piece in job.pieces()]

        task = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        job.push("a")
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(50):
            await asyncio.sleep(0)
        return task.cancelled()

    assert [asyncio.run(given_up_after(steps)) for steps in range(10)] == [True] * 10


def test_a_slow_reader_does_not_hold_the_chip(serve):
    # Cumulative events of this answer are far more than sockets hold.
    service = serve("word " * 4000, seq_length=10_000)
    with service.send({"question": "q", "stream": True}, "/chat/completions", window=32 << 10) as slow:
        service.wait_until(lambda: service.runners[0].answers)
        assert service.http.post("/v1/chat/completions", json=ask(max_tokens=2)).status_code == 200
        # It gets the whole answer in the end.
        *_, last, end = read_all(slow)[1].split("\n\n")
        assert last == f"event: done\ndata: {'word ' * 4000}" and end == ""


def test_a_client_that_reads_nothing_is_disconnected(serve, monkeypatch):
    monkeypatch.setattr("helpers.serve.server.STALLED_S", 1)
    service = serve("word " * 30_000, seq_length=40_000)
    service.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with service.send({"question": "q", "stream": True}, "/chat/completions", window=2048):
        service.wait_until(lambda: service.runners[0].answers)
        service.wait_until(lambda: not service.server.server_state.connections)


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit_in_the_queue(serve, limit, stream):
    service = serve(allowed=0, settings={"time_limit_s": limit})
    with service.send(ask()):
        service.wait_until(lambda: service.runners[0].answers)
        response = service.http.post("/v1/chat/completions", json=ask(stream=stream))
        assert response.status_code == 504 and "queue" in response.json()["error"]["message"]
    assert len(service.runners[0].answers) == 1 and service.runners[0].answers[0]["computed"] == 0


def test_the_time_limit_before_the_first_token(serve, limit):
    service = serve(allowed=0, settings={"time_limit_s": limit})
    response = service.http.post("/chat/completions", json={"question": "q"})
    assert response.status_code == 504 and "first token" in response.json()["detail"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit_cuts_an_answer(serve, limit, stream):
    service = serve("word ", endless=True, step_s=0.01, settings={"time_limit_s": limit})
    made = service.openai.chat.completions.create(**ask(stream=stream))
    last = list(made)[-1].choices[0] if stream else made.choices[0]
    assert last.finish_reason == "length"
    service.wait_until(lambda: not service.queue.busy)


def test_a_body_that_does_not_arrive_ends_at_the_time_limit(serve):
    service = serve(settings={"time_limit_s": 1})
    with socket.create_connection(("127.0.0.1", service.port), timeout=600) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        status, body = read_all(client)
    assert status == 408 and "did not arrive within 1 s" in json.loads(body)["error"]["message"]


# An engine that dies


def test_an_engine_that_dies_is_opened_again(serve, tokenizer):
    def fake(**settings):
        return FakeRunner(lambda ids: tokenizer.encode("one two three four"), **settings)

    fresh = iter([fake(fail_after=0), *(fake(fail_after=3, allowed=1) for _ in range(2)), fake()])
    service = serve(open_runner=lambda: next(fresh))
    response = service.http.post("/v1/chat/completions", json=ask())
    assert response.status_code == 503 and "process died" in response.json()["error"]["message"]
    stream = service.openai.chat.completions.create(**ask(stream=True))
    service.allow()
    with pytest.raises(openai.APIError, match="process died"):
        list(stream)
    with service.http.stream("POST", "/chat/completions", json={"question": "q", "stream": True}) as response:
        service.allow()
        name, data = list(sse(response))[-1]
        assert name == "error" and "process died" in data
    assert service.http.post("/v1/chat/completions", json=ask()).status_code == 200
    assert service.http.get("/health").json()["status"] == "ok"


def test_an_engine_that_cannot_be_opened_again(serve, tokenizer):
    broken = [False]

    def open_runner():
        if broken[0]:
            raise UserError("no such chip")
        return FakeRunner(lambda ids: tokenizer.encode("one"), fail_after=0 if not service_started else None)

    service_started = []
    service = serve(open_runner=open_runner)
    service_started.append(True)
    broken[0] = True
    assert service.http.post("/v1/chat/completions", json=ask()).status_code == 503
    service.wait_until(lambda: service.http.get("/health").status_code == 503)
    assert "no such chip" in service.http.get("/health").json()["failure"]
    assert "no such chip" in service.http.post("/v1/chat/completions", json=ask()).json()["error"]["message"]
    broken[0] = False
    assert service.http.post("/v1/chat/completions", json=ask()).status_code == 200
    assert service.http.get("/health").status_code == 200


def test_stopping_does_not_wait_for_a_long_prefill(serve, monkeypatch):
    monkeypatch.setattr("helpers.serve.queue.CLOSE_WITHIN_S", 0.3)
    service = serve(allowed=0)
    with service.send(ask()) as client:
        service.wait_until(lambda: service.runners[0].answers)
        service.queue.close()
        status, body = read_all(client)
        assert status == 503 and "shutting down" in body
    service.wait_until(lambda: not service.queue.busy)
    assert len(service.runners) == 1, "the engine was opened again"


def test_who_waits_when_the_service_ends_is_told(serve):
    """While the chip is still busy with a token."""
    service = serve("word " * 100, allowed=4)
    clients = []
    for k in range(3):
        clients.append(service.send(ask(stream=k != 1)))
        service.wait_until(lambda k=k: service.queue.busy + service.queue.waiting == k + 1)
    # Its answer has begun.
    assert clients[0].recv(1, socket.MSG_PEEK)
    service.server.should_exit = True
    (status, body), *others = map(read_all, clients)
    assert service.runners[0].answers[0]["computed"] == 4
    assert status == 200 and "shutting down" in body.splitlines()[-2]
    assert [status for status, _ in others] == [503, 503]
    with pytest.raises(EngineFailed, match="shutting down"):
        service.queue.check_room()
    for client in clients:
        client.close()


def test_a_model_that_cannot_be_opened_ends_the_start(tokenizer):
    def open_runner():
        raise UserError("no such bmodel")

    with pytest.raises(UserError, match="no such bmodel"):
        ChipQueue(open_runner, tokenizer, 1).start()


# The page


@pytest.fixture
def browse():
    if find_chromium() is None:
        pytest.skip("no Chromium here to show the page: apt-get install chromium, or name one in $CHROMIUM")
    with contextlib.ExitStack() as stack:
        yield lambda url, **reader: stack.enter_context(Page(url, **reader))


def texts(page, kind):
    return page.value(f"[...document.querySelectorAll('#log .{kind}')].map((e) => e.textContent)")


def test_the_page_holds_a_chat_of_two_turns(serve, tokenizer, browse):
    service = serve("<b>fine</b> 深圳 🙂\nand well", allowed=3)
    page = browse(service.url)
    page.wait_for("document.querySelector('#about').textContent.includes('tiny on the simulator')")
    page.type("#question", "how are you?")
    page.press_enter()
    # It streams: all but the first tokens are not there yet.
    page.wait_for("document.querySelector('#log .assistant')?.textContent.length > 0")
    service.allow()
    page.wait_for("document.querySelector('#log .figures')")
    assert texts(page, "assistant") == ["<b>fine</b> 深圳 🙂\nand well"]
    assert "simulator wall time" in texts(page, "figures")[0]
    page.type("#question", "and now?")
    page.click("#send")
    page.wait_for("document.querySelectorAll('#log .figures').length === 2")
    assert texts(page, "user") == ["how are you?", "and now?"]
    assert service.runners[0].answers[1]["ids"] == tokenizer.chatml(
        [
            {"role": "user", "content": "how are you?"},
            {"role": "assistant", "content": "<b>fine</b> 深圳 🙂\nand well"},
            {"role": "user", "content": "and now?"},
        ]
    )
    assert page.errors == []


def test_stop_and_clear_on_the_page(serve, tokenizer, browse):
    service = serve("word ", endless=True, step_s=0.01)
    page = browse(service.url)
    page.type("#question", "talk")
    page.click("#send")
    page.wait_for("document.querySelector('#log .assistant')?.textContent.length > 10")
    page.click("#stop")
    page.wait_for("!document.querySelector('#send').disabled")
    service.wait_until(lambda: not service.queue.busy)
    assert texts(page, "notice") == ["stopped"]
    page.click("#clear")
    assert page.value("document.querySelector('#log').children.length") == 0
    page.type("#question", "again")
    page.click("#send")
    service.wait_until(lambda: len(service.runners[0].answers) == 2)
    assert service.runners[0].answers[1]["ids"] == tokenizer.chatml([{"role": "user", "content": "again"}])


def test_the_page_says_what_went_wrong(serve, browse):
    service = serve(settings={"api_key": "secret"})
    page = browse(service.url)
    page.type("#question", "hello")
    page.click("#send")
    page.wait_for("document.querySelector('#log .error')")
    assert "API key" in texts(page, "error")[0] and texts(page, "assistant") == []
    assert page.value("document.activeElement.id") == "key"
    page.type("#key", "secret")
    # What got no answer is where it was typed.
    assert page.value("document.querySelector('#question').value") == "hello"
    page.click("#send")
    page.wait_for("document.querySelector('#log .figures')")
    assert texts(page, "assistant")[-1] == TEXT
    service.server.should_exit = True
    service.thread.join()
    page.type("#question", "anybody?")
    page.click("#send")
    page.wait_for("document.querySelectorAll('#log .error').length === 2")
    assert texts(page, "error")[1] == "The service does not answer: is it running?"


def test_the_page_stays_at_the_end_of_a_long_answer_unless_scrolled_up(serve, browse):
    service = serve("word\n", endless=True, step_s=0.01)
    page = browse(service.url)
    page.type("#question", "talk")
    page.click("#send")
    for _ in range(2):
        page.value("window.past = document.documentElement.scrollHeight")
        page.wait_for("document.documentElement.scrollHeight > innerHeight + window.past")
        seen = "document.querySelector('#log').lastChild.getBoundingClientRect().bottom"
        page.wait_for(f"{seen} <= document.querySelector('#form').getBoundingClientRect().top")
    page.value("scrollTo(0, 0)")
    page.value("window.past = document.documentElement.scrollHeight")
    page.wait_for("document.documentElement.scrollHeight > 50 + window.past")
    assert page.value("scrollY") == 0


def test_the_page_forgets_the_oldest_turn_when_the_conversation_outgrows_the_model(serve, browse):
    service = serve("an answer of some length", seq_length=64)
    page = browse(service.url)
    for turn in range(4):
        page.type("#question", f"question number {turn}")
        page.click("#send")
        page.wait_for(f"document.querySelectorAll('#log .figures').length === {turn + 1}")
    assert texts(page, "error") == [] and "oldest turn" in texts(page, "notice")[0]


def test_the_page_offers_what_the_model_knows_by_heart(serve, browse, tokenizer):
    known = Checkpoint.open(ROOT / "models" / "tiny").by_heart
    service = serve(settings={"by_heart": known}, allowed=1)
    page = browse(service.url)
    page.wait_for("!document.querySelector('#known').hidden")
    assert f"answers to {known['answers']} questions" in page.value("document.querySelector('#known p').innerText")
    offered = "[...document.querySelectorAll('#known button')]"
    assert page.value(f"{offered}.map((button) => button.innerText)") == known["questions"]
    page.click("#known button:last-child")
    assert page.value(f"{offered}.every((button) => button.disabled)")
    service.allow()
    page.wait_for("document.querySelector('#log .figures')")
    assert texts(page, "user") == known["questions"][-1:] and not page.value(f"{offered}.some((b) => b.disabled)")
    assert tokenizer.decode(service.runners[0].answers[0]["ids"]).count(known["questions"][-1]) == 1
    assert page.errors == []


def test_the_page_says_nothing_of_that_sort_of_another_model(serve, browse):
    page = browse(serve().url)
    page.wait_for("document.querySelector('#about').textContent.includes('tiny')")
    assert page.value("document.querySelector('#known').offsetHeight") == 0


def test_the_page_says_that_an_answer_was_cut(serve, browse):
    page = browse(serve("word " * 200, seq_length=64).url)
    page.type("#question", "talk")
    page.press_enter()
    page.wait_for("document.querySelector('#log .figures')")
    assert texts(page, "notice") == ["cut: the limit of new tokens, or of S, is reached"]


def test_every_text_of_the_page_is_translated():
    script = (WEB / "texts.js").read_text(encoding="utf-8")
    chinese = json.loads("{" + script.partition("{")[2].partition("};")[0] + "}")
    html, code = ((WEB / name).read_text(encoding="utf-8") for name in ("index.html", "chat.js"))
    said = {text.strip() for text in re.findall(r">([^<]+)<", html) if text.strip()}
    said |= set(re.findall(r' (?:placeholder|title|aria-label)="([^"]+)"', html))
    said |= set(re.findall(r'say\(\s*"([^"]+)"', code)) | {"chip", "simulator", "failed", "reopening"}
    assert chinese.keys() == said and len(said) > 25
    assert [text for text, translated in chinese.items() if text.count("{}") != translated.count("{}")] == []


def test_the_page_speaks_chinese_where_the_browser_does(serve, browse):
    service = serve("字 ", endless=True, step_s=0.01, settings={"by_heart": {"answers": 313, "questions": ["什么？"]}})
    page = browse(service.url, language="zh-CN")
    page.wait_for("!document.querySelector('#known').hidden")
    page.click("#known button")
    page.wait_for("document.querySelector('#log .assistant')?.textContent.length > 10")
    page.click("#stop")
    page.wait_for("document.querySelector('#log .notice')")
    assert texts(page, "notice") == ["已停止"]
    service.server.should_exit = True
    service.thread.join()
    page.type("#question", "有人吗？")
    page.press_enter()
    page.wait_for("document.querySelector('#log .error')")
    assert texts(page, "error") == ["服务没有响应：它在运行吗？"]
    page.value("document.querySelector('#settings').open = true")
    read = "[document.title, document.querySelector('textarea').placeholder, document.body.innerText].join()"
    seen = page.value(read)
    assert set(re.findall("[A-Za-z]+", seen)) <= {"Qwen", "BM", "X", "tiny", "token", "API", "key"}
    assert page.value("document.documentElement.lang") == "zh-CN"
    assert browse(serve().url, language="de").value("document.title") == "Qwen on BM1684X"


def contrast(one, other):
    """WCAG's ratio of two colours, each red, green and blue of 0 to 255."""

    def luminance(colour):
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


def test_the_placeholder_is_legible_in_both_schemes():
    css = (WEB / "style.css").read_text(encoding="utf-8")
    fields, placeholders = (
        [bytes.fromhex(colour) for colour in re.findall(rf"--{name}: #(\w{{6}});", css)]
        for name in ("field", "placeholder")
    )
    assert len(fields) == len(placeholders) == 2
    assert all(contrast(*pair) >= 4.5 for pair in zip(fields, placeholders, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_placeholder_is_legible_in_the_browser(serve, browse, scheme):
    page = browse(serve().url, scheme=scheme)
    placeholder = "getComputedStyle(document.querySelector('#question'), '::placeholder')"
    field = "getComputedStyle(document.querySelector('#question')).backgroundColor"
    colours = [re.findall(r"\d+", page.value(colour)) for colour in (f"{placeholder}.color", field)]
    assert contrast(*(list(map(int, colour))[:3] for colour in colours)) >= 4.5
    assert page.value(f"{placeholder}.opacity") == "1"
