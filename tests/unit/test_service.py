"""The service over a real socket, with a runner that blocks, fails and answers on demand."""

import argparse
import asyncio
import contextlib
import http.client
import json
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
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=False)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.Client(trust_env=False, timeout=30, verify=False),
        )

    def close(self):
        self.http.close()
        self.openai.close()
        self.server.should_exit = True
        self.thread.join()
        self.queue.close()
        self.socket.close()

    def wait_until(self, condition, seconds=10):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)


@pytest.fixture
def serve(tokenizer):
    with contextlib.ExitStack() as stack:

        def start(text=TEXT, waiting=16, open_runner=None, settings=None, **runner):
            fake = FakeRunner(lambda ids: tokenizer.encode(text), **runner)
            service = Service(tokenizer, fake, waiting, open_runner, **(settings or {}))
            stack.callback(service.close)
            return service

        yield start


def ask(content="hello", **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **more}


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
    service = serve(step_s=0.01)
    with service.http.stream("POST", "/chat/completions", json={**DOCUMENTED, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(sse(response))
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
    service = serve("", step_s=2)
    first = threading.Thread(target=service.http.post, args=("/v1/chat/completions",), kwargs={"json": ask()})
    first.start()
    service.wait_until(lambda: service.runners[0].answers)
    for _ in range(5):
        assert service.http.get("/health").json()["busy"]
    assert service.runners[0].answers[0]["computed"] == 0, "the chip was done before the loop answered"
    first.join()


def test_one_request_at_a_time_in_order(serve, tokenizer):
    service = serve(step_s=0.005)
    queue, prompts, clients = service.queue, [], []
    for k in range(6):
        prompts.append(tokenizer.chatml([{"role": "user", "content": f"question {k}"}]))
        body = {"question": f"question {k}"}
        clients.append(threading.Thread(target=service.http.post, args=("/chat/completions",), kwargs={"json": body}))
        clients[-1].start()
        service.wait_until(lambda k=k: queue.answered + queue.busy + queue.waiting > k)
    for client in clients:
        client.join()
    answers = service.runners[0].answers
    assert [answer["ids"] for answer in answers] == prompts
    assert [answer["computed"] for answer in answers] == [len(service.runners[0].reply([])) + 1] * 6


def test_a_thousand_requests_at_once(serve):
    service = serve("a", waiting=7, step_s=0.02)
    body = json.dumps(ask()).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"

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
    service = serve(waiting=0, step_s=0.2)
    with service.http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as response:
        assert response.status_code == 200
        with pytest.raises(openai.RateLimitError, match="waiting"):
            service.openai.chat.completions.create(**ask())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_chip(serve, stream):
    # It would take 40 s.
    service = serve("word " * 2000, step_s=0.02, seq_length=4096)
    with contextlib.suppress(httpx.ReadTimeout):
        with service.http.stream("POST", "/v1/chat/completions", json=ask(stream=stream), timeout=0.3) as response:
            for _ in zip(range(5), response.iter_lines(), strict=False):
                pass
    service.wait_until(lambda: not service.queue.busy)
    assert 0 < service.runners[0].answers[0]["computed"] < 1500


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_never_answered(serve, stream):
    service = serve("word " * 400, step_s=0.05)
    with service.http.stream("POST", "/v1/chat/completions", json=ask("first", stream=True)):
        with contextlib.suppress(httpx.ReadTimeout):
            service.http.post("/v1/chat/completions", json=ask("second", stream=stream), timeout=0.2)
        service.wait_until(lambda: service.queue.waiting == 0)
        assert service.queue.busy
    assert len(service.runners[0].answers) == 1


def asking_for_a_stream(service, window):
    """A socket with so small a receive buffer, on which the documented request was sent and nothing was read."""
    body = json.dumps({"question": "q", "stream": True}).encode()
    asking = socket.socket()
    asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    asking.connect(("127.0.0.1", service.port))
    asking.sendall(b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    return asking


def test_a_slow_reader_does_not_hold_the_chip(serve):
    # Cumulative events of this answer are far more than sockets hold.
    service = serve("word " * 4000, seq_length=10_000)
    with asking_for_a_stream(service, window=32 << 10) as slow:
        service.wait_until(lambda: service.runners[0].answers)
        started = time.monotonic()
        assert service.http.post("/v1/chat/completions", json=ask(max_tokens=2)).status_code == 200
        assert time.monotonic() - started < 5
        # It gets the whole answer in the end.
        slow.settimeout(10)
        response = http.client.HTTPResponse(slow)
        response.begin()
        *_, last, end = response.read().decode().split("\n\n")
        assert last == f"event: done\ndata: {'word ' * 4000}" and end == ""


def test_a_client_that_reads_slowly_but_steadily_is_not_given_up(serve, monkeypatch):
    """What the kernel holds for a client counts as taken: it must not be more than a slow one takes in the time."""
    monkeypatch.setattr("helpers.service_api.SEND_TIMEOUT_S", 0.5)
    service = serve("word " * 12_000, seq_length=60_000)
    with asking_for_a_stream(service, window=16 << 10) as slow:
        slow.settimeout(10)
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            assert (piece := slow.recv(48 << 10)), f"given up after {len(received)} bytes"
            received += piece
            time.sleep(0.04)
    assert b"event: done\ndata: " + b"word " * 12_000 in received


def test_a_client_that_reads_nothing_is_disconnected(serve, monkeypatch):
    monkeypatch.setattr("helpers.service_api.SEND_TIMEOUT_S", 0.3)
    monkeypatch.setattr("helpers.service.STALLED_S", 1)
    service = serve("word " * 30_000, seq_length=40_000)
    service.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with asking_for_a_stream(service, window=2048):
        service.wait_until(lambda: service.runners[0].answers)
        service.wait_until(lambda: not service.server.server_state.connections)


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit_in_the_queue(serve, stream):
    service = serve(step_s=2, settings={"time_limit_s": 1})
    first = threading.Thread(target=service.http.post, args=("/v1/chat/completions",), kwargs={"json": ask()})
    first.start()
    service.wait_until(lambda: service.queue.busy)
    response = service.http.post("/v1/chat/completions", json=ask(stream=stream))
    assert response.status_code == 504 and "queue" in response.json()["error"]["message"]
    assert response.elapsed.total_seconds() < 1.9
    first.join()
    assert len(service.runners[0].answers) == 1


def test_the_time_limit_before_the_first_token(serve):
    service = serve(step_s=2, settings={"time_limit_s": 1})
    response = service.http.post("/chat/completions", json={"question": "q"})
    assert response.status_code == 504 and "first token" in response.json()["detail"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit_cuts_an_answer(serve, stream):
    service = serve("word " * 200, step_s=0.05, settings={"time_limit_s": 1})
    made = service.openai.chat.completions.create(**ask(stream=stream))
    last = list(made)[-1].choices[0] if stream else made.choices[0]
    assert last.finish_reason == "length"
    service.wait_until(lambda: not service.queue.busy, 1)


# An engine that dies


def test_an_engine_that_dies_is_opened_again(serve, tokenizer):
    def fake(**settings):
        return FakeRunner(lambda ids: tokenizer.encode("one two three four"), step_s=0.05, **settings)

    fresh = iter([fake(fail_after=0), fake(fail_after=3), fake(fail_after=3), fake()])
    service = serve(open_runner=lambda: next(fresh))
    response = service.http.post("/v1/chat/completions", json=ask())
    assert response.status_code == 503 and "process died" in response.json()["error"]["message"]
    stream = service.openai.chat.completions.create(**ask(stream=True))
    with pytest.raises(openai.APIError, match="process died"):
        list(stream)
    with service.http.stream("POST", "/chat/completions", json={"question": "q", "stream": True}) as response:
        name, data = list(sse(response))[-1]
        assert name == "error" and "process died" in data
    assert service.http.post("/v1/chat/completions", json=ask()).status_code == 200
    assert service.http.get("/health").json()["status"] == "ok"


def test_an_engine_that_cannot_be_opened_again(serve, tokenizer, monkeypatch):
    monkeypatch.setattr("helpers.service_queue.REOPEN_AFTER_S", 0.5)
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
    time.sleep(0.6)
    assert service.http.post("/v1/chat/completions", json=ask()).status_code == 200
    assert service.http.get("/health").status_code == 200


def test_stopping_does_not_wait_for_a_long_prefill(tokenizer, monkeypatch):
    monkeypatch.setattr("helpers.service_queue.CLOSE_WITHIN_S", 0.3)
    killed = threading.Event()

    class Prefilling(FakeRunner):
        def generate(self, ids, **settings):
            self.answers.append(ids)
            assert killed.wait(20), "nobody closed the engine"
            raise UserError("This engine is closed.")
            yield

    runner = Prefilling(lambda ids: [])
    runner.engine.close = killed.set
    service = Service(tokenizer, runner)
    responses = []
    client = threading.Thread(target=lambda: responses.append(service.http.post("/v1/chat/completions", json=ask())))
    client.start()
    service.wait_until(lambda: runner.answers)
    service.queue.close()
    client.join()
    assert responses[0].status_code == 503 and "shutting down" in responses[0].text
    assert len(service.runners) == 1, "the engine was opened again"
    service.close()


def test_who_waits_when_the_service_ends_is_told(serve):
    service = serve("word " * 100, step_s=0.05)
    responses = {}

    def post(k, **more):
        responses[k] = httpx.post(f"{service.url}/v1/chat/completions", json=ask(**more), trust_env=False, timeout=30)

    clients = [threading.Thread(target=post, args=(k,), kwargs={"stream": k != 1}) for k in range(3)]
    for k, client in enumerate(clients):
        client.start()
        service.wait_until(lambda k=k: service.queue.busy + service.queue.waiting == k + 1)
    service.wait_until(lambda: service.runners[0].answers[0]["computed"] > 3)
    started = time.monotonic()
    service.server.should_exit = True
    for client in clients:
        client.join()
    assert time.monotonic() - started < 2
    assert responses[0].status_code == 200 and "shutting down" in responses[0].text.splitlines()[-2]
    assert [responses[k].status_code for k in (1, 2)] == [503, 503]
    with pytest.raises(EngineFailed, match="shutting down"):
        service.queue.check_room()


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
    service = serve("<b>fine</b> 深圳 🙂\nand well", step_s=0.03)
    page = browse(service.url)
    page.wait_for("document.querySelector('#about').textContent.includes('tiny on the simulator')")
    page.type("#question", "how are you?")
    page.press_enter()
    page.wait_for("document.querySelector('#log .assistant')?.textContent.length > 3")
    assert texts(page, "assistant") != ["<b>fine</b> 深圳 🙂\nand well"], "it does not stream"
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
    service = serve("word " * 200, step_s=0.03)
    page = browse(service.url)
    page.type("#question", "talk")
    page.click("#send")
    page.wait_for("document.querySelector('#log .assistant')?.textContent.length > 10")
    page.click("#stop")
    page.wait_for("!document.querySelector('#send').disabled")
    service.wait_until(lambda: not service.queue.busy, 2)
    assert service.runners[0].answers[0]["computed"] < 200
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
    service = serve("word\n" * 400, step_s=0.01)
    page = browse(service.url)
    page.type("#question", "talk")
    page.click("#send")
    for _ in range(2):
        page.value("window.past = document.documentElement.scrollHeight")
        page.wait_for("document.documentElement.scrollHeight > innerHeight + window.past")
        seen = "document.querySelector('#log').lastChild.getBoundingClientRect().bottom"
        page.wait_for(f"{seen} <= document.querySelector('#form').getBoundingClientRect().top", 2)
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
