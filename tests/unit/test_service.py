"""The service over a real socket, with a runner that blocks, fails and answers on demand."""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import math
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from helpers.chat import MAX_TURNS
from helpers.errors import UserError
from helpers.service import add_arguments, is_loopback, listen
from helpers.service_api import CompletionRequest, Server, Settings, create_app
from helpers.service_queue import ChipQueue, EngineFailed
from tests.unit.chromium import Page, find_chromium
from tests.unit.fake_runner import FakeRunner

ROOT = Path(__file__).resolve().parents[2]
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

    def send(self, body, path="/v1/chat/completions", version="1.1", window=None):
        """A socket on which this was posted and nothing was read; window: its receive buffer, bytes."""
        body = json.dumps(body).encode()
        head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        client = socket.socket()
        client.settimeout(600)
        if window:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        client.connect(("127.0.0.1", self.port))
        client.sendall(head.encode() + body)
        return client


@pytest.fixture
def serve(tokenizer):
    with contextlib.ExitStack() as stack:

        def start(text=TEXT, waiting=16, open_runner=None, settings=None, endless=False, **runner):
            if endless:
                runner["seq_length"] = 1 << 40
            reply = itertools.cycle if endless else list
            fake = FakeRunner(lambda ids: reply(tokenizer.encode(text)), **runner)
            service = Service(tokenizer, fake, waiting, open_runner, **(settings or {}))
            stack.callback(service.close)
            return service

        yield start


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


# Keys and sizes


def test_the_api_key(serve):
    service = serve(settings={"api_key": "gehéim"})
    for path, body in (("/v1/chat/completions", ask()), ("/chat/completions", {"question": "q"})):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic gehéim".encode()}):
            response = service.http.post(path, json=body, headers=headers)
            assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
        good = {"Authorization": "Bearer gehéim".encode("latin-1")}
        assert service.http.post(path, json=body, headers=good).status_code == 200
    assert service.http.get("/v1/models").status_code == 401
    assert service.http.get("/health").status_code == 200
    assert service.http.get("/").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        service.openai.models.list()


def test_pages_of_other_sites_are_refused(serve):
    service = serve()
    for origin, status in ((service.url, 200), ("http://elsewhere.example", 403), ("null", 403)):
        response = service.http.post("/chat/completions", json={"question": "q"}, headers={"Origin": origin})
        assert response.status_code == status


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_that_is_too_long(serve, chunked):
    service = serve(settings={"max_body_bytes": 10_000})
    body = json.dumps({"question": "x" * 5_000_000}).encode()
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    response = service.http.post("/chat/completions", content=pieces if chunked else body)
    assert response.status_code == 413 and "10000" in response.json()["detail"]
    assert service.http.post("/chat/completions", json={"question": "q"}).status_code == 200


def test_only_this_machine_unless_told_otherwise():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with listen(parser.parse_args(["--model", "m"]).host, 0) as bound:
        assert is_loopback(bound)
        with pytest.raises(UserError, match="port"):
            listen("127.0.0.1", bound.getsockname()[1])
        with pytest.raises(UserError, match="65535"):
            listen("127.0.0.1", bound.getsockname()[1] + (1 << 16))
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


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_half_gets_its_answer(serve, stream, version):
    """As `nc -N` does; the first byte of the answer is the sign that the service has noticed."""
    service = serve(allowed=0)
    with service.send({"question": "q", "stream": stream}, "/chat/completions", version) as client:
        service.wait_until(lambda: service.queue.busy)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1, socket.MSG_PEEK) == b"H"
        service.allow()
        status, body = read_all(client)
        assert status == 200 and (
            body.endswith(f"event: done\ndata: {one_event(TEXT)}\n\n") if stream else TEXT in json.loads(body)["data"]
        )
        assert client.recv(1) == b"", "the connection is not closed"


def one_event(text):
    return text.replace("\n", "\ndata: ")


def test_requests_in_a_row_before_the_client_closes_its_half_are_all_answered(serve):
    service = serve()
    with socket.create_connection(("127.0.0.1", service.port), timeout=600) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        client.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert received.count(b"HTTP/1.1 200 OK") == 3 and received.count(b'"id":"tiny"') == 3


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("half", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"])
def test_half_sent_headers_are_dropped_and_nobody_else_is(serve, monkeypatch, before, half):
    monkeypatch.setattr("helpers.service_front.HEADERS_WITHIN_S", 0.5)
    service = serve(allowed=0)
    service.server.config.timeout_keep_alive = 0.5
    with service.send(ask()) as healthy:
        service.wait_until(lambda: service.queue.busy)
        with socket.create_connection(("127.0.0.1", service.port), timeout=600) as client:
            client.sendall(before + half)
            received = b"".join(iter(lambda: client.recv(1 << 16), b""))
            assert received.count(b"HTTP/1.1 200 OK") == bool(before)
        service.allow()
        assert read_all(healthy)[0] == 200


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
    monkeypatch.setattr("helpers.service.STALLED_S", 1)
    service = serve("word " * 30_000, seq_length=40_000)
    service.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with service.send({"question": "q", "stream": True}, "/chat/completions", window=2048):
        service.wait_until(lambda: service.runners[0].answers)
        service.wait_until(lambda: not service.server.server_state.connections)


@pytest.fixture
def limit(serve):
    """A time limit in seconds within which the chip can start on an answer, however busy this machine is."""
    service = serve("a")
    started = time.monotonic()
    for _ in range(5):
        service.http.post("/v1/chat/completions", json=ask())
    return max(1.0, 20 * (time.monotonic() - started))


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
    monkeypatch.setattr("helpers.service_queue.CLOSE_WITHIN_S", 0.3)
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
        yield lambda url: stack.enter_context(Page(url))


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
