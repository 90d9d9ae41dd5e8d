"""Chat and service with the embedded model on the real simulator."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from helpers.chat.session import ChatSession
from helpers.run.engines import open_engine
from helpers.run.generation import QwenRunner
from tests.unit.chromium import Page, find_chromium
from tests.unit.served import Served

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
# The documented example's two turns, which the embedded model knows by heart.
QUESTIONS = ["Hello, how are you?", "你知道深圳的历史吗?写一段小作文介绍下。"]
FEW = 6


@pytest.fixture(scope="module")
def expected(bmodel_tiny, tokenizer):
    """A chat of two turns from Python: [(tokens, text)]."""
    with open_engine(bmodel_tiny, engine="simulator") as engine:
        session = ChatSession(QwenRunner(engine), tokenizer)
        turns = []
        for question in QUESTIONS:
            text = "".join(session.ask(question))
            turns.append((session.last.tokens, text))
            assert session.last.finish_reason == "stop"
            assert len(session.last.timings.decode_s) == len(session.last.tokens)
            assert session.last.timings.first_token_s > 0
        assert turns[0][1] == "I am fine, thank you." and "深圳" in turns[1][1]
        return turns


@pytest.fixture(scope="module")
def server(bmodel_tiny):
    command = [sys.executable, "-m", "helpers", "serve", "--model", bmodel_tiny]
    server = Served([*command, "--engine", "simulator", "--port", "0", "--name", "tiny", "--waiting", "6"])
    yield server
    assert server.simulators()
    code = server.close()
    assert code == 0, "".join(server.log)
    assert "Traceback" not in "".join(server.log), "".join(server.log)


def client_of(server):
    return openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=600),
    )


# Command line


def test_one_question_on_the_command_line_is_one_json_object(bmodel_tiny, expected):
    command = [sys.executable, "-m", "helpers", "chat", "--model", bmodel_tiny, "--json"]
    command += ["--engine", "simulator", "--question", QUESTIONS[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert sorted(answer) == ["engine", "first_token_s", "kind", "text", "tokens", "tokens_per_s"]
    assert (answer["tokens"], answer["text"]) == expected[0]
    assert (answer["engine"], answer["kind"]) == ("simulator", "simulator wall")


def test_the_chat_runs_where_torch_and_the_tool_chain_cannot_be_imported(bmodel_tiny, expected):
    argv = ["chat", "--model", str(bmodel_tiny), "--tokenizer", str(TINY), "--json", "--engine", "simulator"]
    argv += ["--question", QUESTIONS[0]]
    # The simulator is found in tpu_mlir's folder, but tpu_mlir is not imported.
    script = (
        "import sys\nfor name in ('torch', 'transformers', 'onnx', 'onnxruntime', 'rich'): sys.modules[name] = None\n"
        f"from helpers.cli import main\ncode = main({argv!r})\nassert 'tpu_mlir' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == expected[0][0]


def test_a_conversation_through_a_pipe(bmodel_tiny, expected):
    command = [sys.executable, "-m", "helpers", "chat", "--model", bmodel_tiny, "--tokenizer", TINY]
    command += ["--engine", "simulator"]
    lines = "\n".join([*QUESTIONS, "exit"])
    done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, check=True)
    assert all(text in done.stdout for _, text in expected)


# Service


def test_the_openai_client_on_the_simulator(server, expected):
    with client_of(server) as client:
        messages = []
        for turn, question in enumerate(QUESTIONS):
            messages.append({"role": "user", "content": question})
            made = client.chat.completions.create(model="tiny", messages=messages, stream=bool(turn))
            if turn:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in made)
            else:
                text = made.choices[0].message.content
                assert made.usage.completion_tokens == len(expected[0][0])
            assert text == expected[turn][1]
            messages.append({"role": "assistant", "content": text})


def test_drawing_on_the_simulator_is_seeded(server):
    with client_of(server) as client:

        def draw(seed):
            made = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": QUESTIONS[0]}],
                max_tokens=FEW,
                temperature=2.0,
                top_p=1.0,
                seed=seed,
            )
            return made.choices[0].message.content

        assert draw(1) == draw(1)


def test_curl_with_the_documented_body_holds_a_chat_of_two_turns(server, expected):
    def curl(**body):
        command = ["curl", "-sSN", "--noproxy", "*", f"{server.url}/chat/completions", "-d", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    first = json.loads(curl(question=QUESTIONS[0], history=[], stream=False))
    assert first == {"data": expected[0][1]}
    second = {"question": QUESTIONS[1], "history": [QUESTIONS[0], first["data"]]}
    assert json.loads(curl(**second, stream=False)) == {"data": expected[1][1]}
    events = curl(**second, stream=True)
    *texts, last = [line[6:] for line in events.splitlines() if line.startswith("data: ")]
    assert len(texts) > 5 and texts[-1] == last == expected[1][1]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))


def test_the_page_on_the_simulator(server, expected):
    if find_chromium() is None:
        pytest.skip("no Chromium here to show the page: apt-get install chromium, or name one in $CHROMIUM")
    with Page(server.url) as page:
        for turn, question in enumerate(QUESTIONS):
            page.type("#question", question)
            page.press_enter()
            page.wait_for(f"document.querySelectorAll('#log .figures').length === {turn + 1}")
        answers = page.value("[...document.querySelectorAll('#log .assistant')].map((e) => e.textContent)")
        assert answers == [text for _, text in expected]
        assert page.value("document.querySelectorAll('#log .user').length") == 2
        assert page.value("document.querySelectorAll('#log .error').length") == 0


def test_a_simulator_that_is_killed_is_opened_again(server, expected):
    before = server.simulators()
    with client_of(server) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": QUESTIONS[1]}], stream=True
        )
        next(iter(stream))
        for simulator in before:
            os.kill(simulator, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="The engine failed"):
            list(stream)
        made = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": QUESTIONS[0]}])
    assert made.choices[0].message.content == expected[0][1]
    assert httpx.get(f"{server.url}/health", trust_env=False).json()["status"] == "ok"


def test_sigterm_while_an_answer_streams(bmodel_tiny):
    command = [sys.executable, "-m", "helpers", "serve", "--model", bmodel_tiny, "--engine", "simulator", "--port", "0"]
    server = Served([*command, "--name", "tiny"])
    simulators = server.simulators()
    with client_of(server) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": QUESTIONS[1]}], stream=True
        )
        next(iter(stream))
        code = server.close(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    assert code == 0 and "Traceback" not in "".join(server.log) and "ERROR" not in "".join(server.log), server.log
    assert simulators and not any(Path(f"/proc/{simulator}").exists() for simulator in simulators)


def crowd(url, clients, question, **more):
    """So many clients at once, every third of which leaves before its answer: statuses of the others."""

    def one(k):
        body = {"messages": [{"role": "user", "content": question}], "stream": bool(k % 2), **more}
        if k % 3 == 0:
            body = json.dumps(body).encode()
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=600) as leaving:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                leaving.sendall(head.encode() + body)
            return None
        with httpx.Client(trust_env=False, verify=False, timeout=600) as http:
            response = http.post(f"{url}/v1/chat/completions", json=body)
        done = response.status_code == 429 or '"finish_reason":' in response.text.replace(" ", "")
        assert done and (response.status_code == 429) == ("Retry-After" in response.headers), response.text
        return response.status_code

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return [status for status in pool.map(one, range(clients)) if status]


def test_fifty_clients_a_third_of_which_leave(server):
    statuses = crowd(server.url, 50, QUESTIONS[0], max_tokens=2)
    assert len(statuses) == 33 and set(statuses) <= {200, 429} and statuses.count(200) >= 1
    deadline = time.monotonic() + 600
    while (health := httpx.get(f"{server.url}/health", trust_env=False).json())["busy"] or health["waiting"]:
        assert time.monotonic() < deadline, health
        time.sleep(0.1)
    assert health["status"] == "ok"


def test_memory_does_not_grow():
    server = Served.fake("--waiting", "10")
    try:
        for _ in range(3):
            crowd(server.url, 50, "hello")
        before = server.resident_bytes()
        for _ in range(8):
            assert set(crowd(server.url, 50, "hello " * 50)) <= {200, 429}
        grown = server.resident_bytes() - before
        assert grown < 4e6, f"400 requests left {grown / 1e6:.1f} MB behind"
    finally:
        server.close()
