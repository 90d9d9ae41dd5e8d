import codecs
import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.chat.session import Answer, ChatSession, StopStrings, fit_history
from helpers.chat.terminal import Terminal, talk
from helpers.checkpoint.tokenizer import SYSTEM_PROMPT
from helpers.commands.arguments import device_ids, open_tokenizer
from helpers.commands.chat import answer_object
from helpers.errors import UserError
from helpers.run.generation import Sampling, Timings
from tests.unit.fake_runner import FakeRunner

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"


def runner_saying(tokenizer, text, **settings):
    return FakeRunner(lambda ids: tokenizer.encode(text), **settings)


# Stop strings


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.text("ab", min_size=1, max_size=4))
def test_stop_string_cuts_wherever_the_pieces_are_cut(pieces, stop):
    stops = StopStrings([stop])
    given_out = ""
    for piece in pieces:
        given_out += stops.push(piece)
        if stops.found:
            break
    given_out += stops.end()
    assert given_out == "".join(pieces).split(stop)[0]
    assert stops.found == (stop in "".join(pieces))


def test_without_stop_strings_nothing_is_held_back():
    assert StopStrings([]).push("text") == "text"


# An answer


def test_pieces_never_hold_a_broken_character(tokenizer):
    text = "深圳的历史 🙂🏽 naïve — 什么是BM1684X？"
    assert len(tokenizer.encode("🙂")) > 1, "no character here is split over tokens"
    answer = Answer(runner_saying(tokenizer, text), tokenizer, [1])
    assert "".join(answer) == text == answer.text
    assert "\N{REPLACEMENT CHARACTER}" not in answer.text
    assert answer.finish_reason == "stop"
    assert answer.tokens == tokenizer.encode(text)


def test_a_character_cut_by_the_limit_is_not_shown(tokenizer):
    whole = tokenizer.encode("🙂")
    assert len(whole) > 1
    answer = Answer(runner_saying(tokenizer, "🙂"), tokenizer, [1], max_new_tokens=len(whole) - 1)
    assert list(answer) == []
    assert answer.finish_reason == "length" and len(answer.tokens) == len(whole) - 1


def test_a_stop_string_ends_the_answer_and_the_computation(tokenizer):
    runner = runner_saying(tokenizer, "one two three four five six seven")
    answer = Answer(runner, tokenizer, [1], stop=[" three"])
    assert "".join(answer) == "one two" and answer.finish_reason == "stop"
    assert runner.answers[0]["computed"] < len(tokenizer.encode("one two three four five six seven"))


@pytest.mark.parametrize("name", ["im_end", "im_start", "endoftext"])
def test_every_token_that_ends_a_turn_ends_the_answer(tokenizer, name):
    tokens = [*tokenizer.encode("one two"), getattr(tokenizer, name), *tokenizer.encode(" three")]
    answer = Answer(FakeRunner(lambda ids: tokens), tokenizer, [1])
    assert "".join(answer) == answer.text == "one two" and answer.finish_reason == "stop"
    assert answer.tokens == tokenizer.encode("one two")


def test_what_might_have_become_a_stop_string_is_given_at_the_end(tokenizer):
    answer = Answer(runner_saying(tokenizer, "one two thr"), tokenizer, [1], stop=[" three"])
    assert "".join(answer) == "one two thr" and answer.finish_reason == "stop"


def test_an_answer_tells_its_figures_also_where_it_is_given_up(tokenizer):
    answer = Answer(runner_saying(tokenizer, "one two three", step_s=0.001), tokenizer, [1, 2, 3])
    assert (answer.prompt_tokens, answer.finish_reason, answer.timings) == (3, "cancelled", Timings(0, []))
    pieces = iter(answer)
    assert next(pieces) + next(pieces) == answer.text
    pieces.close()
    assert (answer.finish_reason, answer.timings) == ("cancelled", Timings(0.001, [0.001]))


def test_settings_reach_the_runner(tokenizer):
    sampling = Sampling(temperature=0.5)
    runner = runner_saying(tokenizer, "one two three")
    assert len(list(ChatSession(runner, tokenizer, sampling=sampling, max_new_tokens=1).ask("count"))) == 1
    assert runner.answers[0]["sampling"] is sampling and runner.answers[0]["computed"] == 1


# History


history = st.lists(st.tuples(st.text("xy 深", max_size=12), st.text("xy 深", max_size=12)), max_size=6)


@given(history, st.integers(20, 120), st.integers(1, 40))
def test_the_fewest_turns_are_dropped(tokenizer, history, seq_length, reserve):
    def length(dropped):
        messages = [{"role": "system", "content": "s"}]
        for asked, answered in history[dropped:]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return len(tokenizer.chatml([*messages, {"role": "user", "content": "q"}]))

    if length(len(history)) > seq_length:
        with pytest.raises(UserError, match="tokens"):
            fit_history(tokenizer, seq_length, "s", history, "q", reserve)
        return
    ids, dropped = fit_history(tokenizer, seq_length, "s", history, "q", reserve)
    fitting = [n for n in range(len(history)) if length(n) + reserve <= seq_length]
    assert dropped == (fitting[0] if fitting else len(history))
    assert len(ids) == length(dropped) <= seq_length


def test_turns_reach_the_model_in_order(tokenizer):
    runner = runner_saying(tokenizer, "fine")
    session = ChatSession(runner, tokenizer)
    for question in ("how are you?", "and now?"):
        assert "".join(session.ask(question)) == "fine"
    expected = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "how are you?"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "and now?"},
    ]
    assert runner.answers[1]["ids"] == tokenizer.chatml(expected)
    assert session.notice is None


def test_the_oldest_turns_are_dropped_and_it_says_so(tokenizer):
    session = ChatSession(runner_saying(tokenizer, "a long answer " * 4), tokenizer, max_turns=50)
    session.runner.seq_length = 120
    for turn in range(4):
        list(session.ask(f"question {turn}"))
    assert session.dropped_turns >= 1
    assert "oldest" in session.notice and "120" in session.notice
    assert session.history[-1][0] == "question 3"
    assert len(session.history) < 4
    session.clear()
    assert session.notice is None and session.history == []


@pytest.mark.parametrize("above", [0, 1])
@pytest.mark.parametrize("limited", [False, True])
def test_a_quarter_is_kept_free_or_what_the_answer_may_take(tokenizer, limited, above):
    """An earlier turn is dropped where it leaves one token too few, and not before."""
    runner = runner_saying(tokenizer, "a")
    session = ChatSession(runner, tokenizer, max_new_tokens=5 if limited else None)
    list(session.ask("first"))
    list(session.ask("second"))
    (turn,) = session.history[:1]
    said = [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    system = {"role": "system", "content": SYSTEM_PROMPT}
    length = len(tokenizer.chatml([system, *said, {"role": "user", "content": "second"}]))
    room = next(s for s in range(length, 4 * length) if s - min(s // 4, 5 if limited else s) == length)
    assert limited or room % 4, "here a fraction of a token would make no difference"
    runner.seq_length = room - above
    session.history = [turn]
    list(session.ask("second"))
    assert session.dropped_turns == above and len(session.history) == 2 - above


def test_a_question_may_take_all_tokens_and_not_one_more(tokenizer):
    length = len(tokenizer.chatml([{"role": "user", "content": "how are you?"}]))
    runner = runner_saying(tokenizer, "a", seq_length=length)
    session = ChatSession(runner, tokenizer, system="")
    assert list(session.ask("how are you?")) == ["a"]
    assert runner.answers[0]["ids"] == tokenizer.chatml([{"role": "user", "content": "how are you?"}])
    runner.seq_length -= 1
    with pytest.raises(UserError, match=f"takes {length} tokens .* {length - 1} .S"):
        session.ask("how are you?")


def test_settings_of_a_session_have_ends(tokenizer):
    runner = runner_saying(tokenizer, "a")
    session = ChatSession(runner, tokenizer, max_turns=0, max_new_tokens=1)
    assert session.notice is None and session.last is None and session.history == []
    for _ in range(2):
        list(session.ask("q"))
    assert len(runner.answers[0]["ids"]) == len(runner.answers[1]["ids"]) and session.dropped_turns == 1
    with pytest.raises(UserError, match="turns to remember is -1"):
        ChatSession(runner, tokenizer, max_turns=-1)
    with pytest.raises(UserError, match="new tokens is 0"):
        ChatSession(runner, tokenizer, max_new_tokens=0)


def test_max_turns_limits_what_is_remembered(tokenizer):
    session = ChatSession(runner_saying(tokenizer, "a"), tokenizer, max_turns=1)
    for turn in range(3):
        list(session.ask(f"question {turn}"))
    assert session.dropped_turns == 1 and [question for question, _ in session.history] == ["question 1", "question 2"]


def test_what_cannot_fit_alone_is_refused_with_both_numbers(tokenizer):
    session = ChatSession(runner_saying(tokenizer, "a", seq_length=64), tokenizer)
    list(session.ask("short"))
    with pytest.raises(UserError, match=r"takes \d+ tokens .* 64 \(S\)"):
        session.ask("very long " * 100)
    assert len(session.history) == 1 and len(session.runner.answers) == 1


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(tokenizer, question):
    with pytest.raises(UserError, match="empty"):
        ChatSession(runner_saying(tokenizer, "a"), tokenizer).ask(question)


def test_stop_keeps_what_was_said(tokenizer):
    session = ChatSession(runner_saying(tokenizer, "one two three four"), tokenizer)
    pieces = session.ask("count")
    first = next(pieces)
    session.stop()
    rest = "".join(pieces)
    assert rest == "" and session.last.finish_reason == "cancelled"
    assert session.history == [("count", first)]
    assert "".join(session.ask("again")) == "one two three four"


def test_two_answers_at_once_are_refused(tokenizer):
    session = ChatSession(runner_saying(tokenizer, "one two three"), tokenizer)
    pieces = session.ask("count")
    next(pieces)
    with pytest.raises(UserError, match="still being answered"):
        session.ask("more")
    pieces.close()
    assert "".join(session.ask("more")) == "one two three"


def test_an_engine_that_fails_leaves_the_history_as_it_was(tokenizer):
    session = ChatSession(runner_saying(tokenizer, "one two three", fail_after=2), tokenizer)
    with pytest.raises(RuntimeError):
        list(session.ask("count"))
    assert session.history == []


def test_clear_forgets(tokenizer):
    session = ChatSession(runner_saying(tokenizer, "a"), tokenizer)
    list(session.ask("b"))
    session.clear()
    assert session.history == []


# Terminal


def talk_about(lines, session, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    out = io.StringIO()
    with redirect_stdout(out):
        talk(session, Terminal())
    return out.getvalue()


def test_a_conversation_in_the_terminal(tokenizer, monkeypatch):
    session = ChatSession(runner_saying(tokenizer, "fine [thanks]"), tokenizer)
    out = talk_about(["how are you?", "", "clear", "and now?", "exit", "never asked"], session, monkeypatch)
    assert out.count("fine [thanks]") == 2
    assert "question is empty" in out and "forgotten" in out
    assert "first token" in out and "simulator wall time" in out and "MB on the device" in out
    assert [question for question, _ in session.history] == ["and now?"]


def test_ctrl_c_stops_the_answer_not_the_program(tokenizer, monkeypatch):
    presses = iter([False, False, True])

    def reply(ids):
        for token in tokenizer.encode("one two three four five six"):
            if next(presses, False):
                os.kill(os.getpid(), signal.SIGINT)
            yield token

    class Slow(FakeRunner):
        def generate(self, ids, **settings):
            for token in reply(ids):
                if settings["should_stop"]():
                    self.finish_reason = "cancelled"
                    return
                yield token
            self.finish_reason = "stop"

    session = ChatSession(Slow(reply), tokenizer)
    out = talk_about(["count", "again"], session, monkeypatch)
    assert "(stopped)" in out and "one two three four five six" in out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_arrows_move_in_the_question():
    pytest.importorskip("readline")
    ours, theirs = pty.openpty()
    script = "from helpers.chat.terminal import Terminal; print('asked', Terminal().question().encode())"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"},
    ):
        os.close(theirs)
        seen = b""
        while "❯".encode() not in seen:
            seen += os.read(ours, 1000)
        os.write(ours, "深的\x1b[D圳\n".encode())
        # When the last of the other side closes, Linux ends the reading with an error.
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 1000):
                seen += piece
    os.close(ours)
    assert f"asked {'深圳的'.encode()}" in seen.decode(errors="replace")


# Command line


def test_json_needs_a_question(capsys):
    from helpers.cli import main

    assert main(["chat", "--model", "none.bmodel", "--json"]) == 2
    assert "--question" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["x", "0,0", "-1", ""])
def test_device_ids_that_are_none(text, capsys):
    from helpers.cli import main

    with pytest.raises(SystemExit):
        main(["chat", "--model", "none.bmodel", f"--devid={text}"])
    assert "--devid" in capsys.readouterr().err


def test_device_ids():
    assert device_ids("2,3") == (2, 3)


def chat_in_shell(redirected, bmodel, *arguments, stdin="", **environment):
    """`python -m helpers chat` as a shell runs it, with its redirections: the real bmodel on the simulator."""
    command = [sys.executable, "-m", "helpers", "chat", "--engine", "simulator", "--model", str(bmodel)]
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$@" {redirected}', "bash", *command, "--max-new-tokens", "3", *arguments],
        cwd=ROOT,
        input=stdin.encode(),
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
CHINESE = "你知道深圳的历史吗?写一段小作文介绍下。"


def test_json_is_utf_8_on_a_terminal_without_its_characters(bmodel_tiny, tokenizer):
    done = chat_in_shell("", bmodel_tiny, "--json", "--question", CHINESE, **ASCII)
    value = json.loads(done.stdout.decode("utf-8"))
    assert value["text"] == tokenizer.decode(value["tokens"]) and not value["text"].isascii()
    # The question arrived too: it gets the answer that the embedded model has learnt.
    entries = json.loads((TINY / "demo_questions.json").read_text(encoding="utf-8"))
    (learnt,) = (entry["answer"] for entry in entries if entry["question"] == CHINESE)
    assert learnt.startswith(value["text"].rstrip("\ufffd")) and value["text"] in done.stdout.decode("utf-8")


@pytest.mark.parametrize("environment", [ASCII, {"PYTHONIOENCODING": "utf-8"}], ids=["ascii", "utf-8"])
def test_a_piped_question_is_what_was_typed(tokenizer, environment):
    """Whatever the locale, after the byte-order mark that some editors write, with a byte that is no UTF-8."""
    script = (
        "import helpers.chat.terminal as chat, helpers.cli as cli\n"
        "class Terminal(chat.Terminal):\n"
        "    def say(self, text, style=''): pass\n"
        "class Session:\n"
        "    def ask(self, question): raise chat.UserError(print(ascii(question)) or '')\n"
        "cli._run = lambda argv: chat.talk(Session(), Terminal())\n"
        "cli.main([])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        input="\ufeff深圳\nnaïve".encode() + b" \xe4\xb8\n",
        env=os.environ | environment,
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode("ascii").splitlines() == [ascii("深圳"), ascii("naïve \ufffd")]


@pytest.mark.parametrize(
    "redirected, arguments, code, out, err",
    [
        ("<&-", (), 0, "`exit` leaves", "simulator"),
        ("<&-", ("--question", "Hello, how are you?"), 0, "I am", "simulator"),
        (">&-", ("--question", "Hello, how are you?"), 2, "", "error: Standard output is closed"),
        (">&-", ("--json", "--question", "Hello, how are you?"), 2, "", "error: Standard output is closed"),
        ("2>&-", ("--json", "--question", "Hello, how are you?"), 0, '{"tokens": [', ""),
        ("| head -1", (), (0, 1), "`exit` leaves", "simulator"),
    ],
)
def test_a_stream_that_is_closed_is_no_traceback(bmodel_tiny, redirected, arguments, code, out, err):
    # 1 where the reader had left before all was said, 0 where the pipe took it.
    done = chat_in_shell(redirected, bmodel_tiny, *arguments, stdin="Hello, how are you?\n" * 3)
    said, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode in (code if isinstance(code, tuple) else (code,)) and "Traceback" not in errors, errors
    assert out in said and err in errors and (out or not said)
    if "--json" in arguments and not code:
        assert json.loads(said)["text"]


def test_a_manifest_and_a_vocabulary_with_a_byte_order_mark_are_read(bmodel_tiny, tokenizer, tmp_path):
    name = bmodel_tiny.name
    (tmp_path / name).write_bytes(bmodel_tiny.read_bytes())
    for marked in (f"{name}.json", "qwen.tiktoken"):
        (tmp_path / marked).write_bytes(codecs.BOM_UTF8 + bmodel_tiny.with_name(marked).read_bytes())
    opened = open_tokenizer(tmp_path / name, None)
    assert opened.specials == tokenizer.specials and opened.encode("深圳 Hello") == tokenizer.encode("深圳 Hello")


def test_what_libraries_print_does_not_reach_standard_output(tmp_path):
    script = (
        "import ctypes\nfrom helpers.commands.chat import take_stdout\nlibc = ctypes.CDLL(None)\n"
        "libc.strdup.restype = ctypes.c_void_p\n"
        "libc.__cxa_atexit(libc.puts, ctypes.c_void_p(libc.strdup(b'at exit')), None)\n"
        "out = take_stdout()\nprint('python'); libc.puts(b'library')\nprint('{}', file=out, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
    assert all(text in done.stderr for text in ("library", "python", "at exit"))


def test_chat_imports_without_torch_and_the_tool_chain():
    absent = ["torch", "transformers", "onnx", "onnxruntime", "tpu_mlir", "rich", "fastapi", "IPython"]
    script = (
        f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
        "import helpers.commands.chat as chat\nchat.Terminal().say('plain')\n"
        f"chat.open_tokenizer(None, {str(TINY)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "plain\n"), done.stderr


def test_the_object_has_just_the_documented_keys(tokenizer):
    runner = runner_saying(tokenizer, "fine again", step_s=0.0012345678)
    answer = Answer(runner, tokenizer, [1])
    list(answer)
    value = json.loads(json.dumps(answer_object(answer, runner.engine)))
    assert sorted(value) == ["engine", "first_token_s", "kind", "text", "tokens", "tokens_per_s"]
    assert value["kind"] == "simulator wall" and value["tokens"] == tokenizer.encode("fine again")
    assert value["first_token_s"] == 0.001235 and value["tokens_per_s"] == 810.000066


@pytest.mark.parametrize(
    ("flag", "value"),
    [("temperature", "-1"), ("top-p", "0"), ("top-k", "51"), ("repetition-last-n", "0"), ("seed", "-1")],
)
def test_settings_out_of_range_are_one_sentence(flag, value, capsys):
    from helpers.cli import main

    assert main(["chat", "--model", "none.bmodel", "--question", "q", f"--{flag}={value}"]) == 2
    assert flag.replace("-", "_") in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_a_file_that_is_no_bmodel(command, capsys):
    from helpers.cli import main

    for model in ("none.bmodel", str(ROOT / "Makefile")):
        assert main([command, "--model", model, *(["--port", "0"] if command == "serve" else [])]) == 2
        assert model in capsys.readouterr().err
