import threading
from pathlib import Path

import pytest

from helpers.chat.box import ChatBox, chat_box, somebody_types
from helpers.chat.session import ChatSession, by_heart
from helpers.checkpoint.weights import Checkpoint
from tests.unit.fake_runner import FakeRunner


@pytest.fixture
def box_saying(tokenizer):
    def box(text, known=None, **runner):
        session = ChatSession(FakeRunner(lambda ids: tokenizer.encode(text), **runner), tokenizer)
        return ChatBox(session, known)

    return box


def test_a_conversation_in_the_box(box_saying):
    box = box_saying("a < b & 深圳")
    seen = []
    box._transcript.observe(lambda change: seen.append(change["new"]), "value")
    # As JupyterLab sends it: Enter first, then the text.
    box._question._handle_custom_msg({"event": "submit"}, [])
    box._question.value = "how are you?"
    box.wait()
    assert "how are you?" in box._transcript.value and "a &lt; b &amp; 深圳" in box._transcript.value
    assert "simulator wall time" in box._transcript.value
    assert len(seen) > 5, "it does not stream"
    assert box._question.value == "" and not box._send.disabled and box._stop.disabled
    box._question.value = "and now?"
    box._send.click()
    box.wait()
    assert [question for question, _ in box.session.history] == ["how are you?", "and now?"]
    box._clear.click()
    assert box._transcript.value == "" and box.session.history == []


def test_enter_asks_a_text_that_was_told_before(box_saying, monkeypatch):
    """The box was left and entered again: no text follows. One that is late is waited for."""
    box, answered = box_saying("a"), threading.Event()
    box._transcript.observe(lambda change: "first token" in change["new"] and answered.set(), "value")
    box._question.value = "before"
    assert box._transcript.value == ""
    box._question._handle_custom_msg({"event": "submit"}, [])
    assert answered.wait(300)
    box.wait()
    monkeypatch.setattr("helpers.chat.box.TEXT_STAYS_S", 0)
    box._question._handle_custom_msg({"event": "submit"}, [])
    box._question.value = "late"
    box.wait()
    assert [question for question, _ in box.session.history] == ["before", "late"]


def test_enter_without_a_text_says_so(box_saying, monkeypatch):
    box, said = box_saying("a"), threading.Event()
    box._transcript.observe(lambda change: "question is empty" in change["new"] and said.set(), "value")
    monkeypatch.setattr("helpers.chat.box.TEXT_COMES_S", 0)
    box._question._handle_custom_msg({"event": "submit"}, [])
    assert said.wait(300)


def test_stop_is_heard_while_it_answers(box_saying, monkeypatch):
    box, go_on = box_saying("word " * 500), threading.Event()
    runner = box.session.runner
    monkeypatch.setattr(runner, "reply", lambda ids, reply=runner.reply: go_on.wait(300) and reply(ids))
    box.send("talk")
    assert box._send.disabled and not box._stop.disabled
    box.send("a second question meanwhile is not asked")
    box._stop.click()
    go_on.set()
    box.wait()
    assert box.session.last.finish_reason == "cancelled" and len(box.session.runner.answers) == 1
    assert not box._send.disabled and box._stop.disabled
    assert "(stopped)\n" in box._transcript.value


def test_an_answer_that_was_cut_says_so_and_a_whole_one_says_nothing(box_saying):
    cut, whole = box_saying("word " * 200, seq_length=64), box_saying("word")
    for box in (cut, whole):
        box.send("talk")
        box.wait()
    assert "(cut: the limit" in cut._transcript.value and "(cut" not in whole._transcript.value
    assert "(stopped)" not in cut._transcript.value + whole._transcript.value


def test_what_the_model_knows_by_heart_is_said_and_offered(box_saying):
    known = {"answers": 313, "questions": ["what is a bmodel?", "什么是int8？"]}
    box = box_saying("a file", known)
    said, offered, *_ = box.view.children
    assert "answers to 313 questions" in said.value
    assert [button.description for button in offered.children] == known["questions"]
    seen = []
    box._transcript.observe(lambda change: seen.append([b.disabled for b in offered.children]), "value")
    offered.children[1].click()
    box.wait()
    assert box.session.history == [("什么是int8？", "a file")]
    assert [True, True] in seen and not any(button.disabled for button in offered.children)
    assert len(box_saying("a").view.children) == len(box.view.children) - 2


@pytest.mark.slow
def test_a_bmodel_tells_what_its_checkpoint_knew(bmodel_tiny, tmp_path):
    assert by_heart(bmodel_tiny) == Checkpoint.open(Path(__file__).parents[2] / "models" / "tiny").by_heart
    (tmp_path / "alone.bmodel").symlink_to(bmodel_tiny)
    assert by_heart(tmp_path / "alone.bmodel") is None


def test_errors_are_shown_in_the_box(box_saying):
    box = box_saying("a")
    box.send(" ")
    assert "question is empty" in box._transcript.value


@pytest.mark.slow
def test_where_nobody_types_it_answers_one_question_as_text(bmodel_tiny, tokenizer, capsys, monkeypatch):
    assert not somebody_types()
    chat_box(bmodel_tiny, tokenizer, engine="simulator", question="what is a bmodel?", max_new_tokens=4)
    out = capsys.readouterr().out
    assert out.startswith("> what is a bmodel?\n") and "4 tokens" in out and "simulator wall time" in out
