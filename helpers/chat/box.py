"""A chat box for notebooks: streams in JupyterLab, plain text where nobody can type (papermill)."""

import html
import threading
from collections.abc import Sequence
from pathlib import Path

import ipywidgets
from IPython import get_ipython
from IPython.display import display

from helpers.chat.session import ChatSession, by_heart, figures
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.errors import UserError
from helpers.run.engines import open_engine
from helpers.run.generation import QwenRunner

# After Enter: how long until a text that is there already is asked as it is, and how long to wait for one.
TEXT_STAYS_S = 0.3
TEXT_COMES_S = 30.0
KNOWN = "This model knows the answers to {} questions by heart, and nothing else. Some of them:"
STYLE = {
    "question": "font-weight:600;margin-top:.6em",
    "answer": "",
    "note": "opacity:.7;font-size:85%",
    "error": "color:var(--jp-error-color1, firebrick)",
}


def somebody_types() -> bool:
    """Whether this runs in a notebook with somebody at the keyboard: papermill's clients allow no input."""
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


class ChatBox:
    """The box over a session: `view` is the widget. Answers come in a thread, so that Stop is heard meanwhile."""

    def __init__(self, session: ChatSession, known: dict | None = None):
        self.session = session
        self._shown: list[tuple[str, str]] = []
        self._entered: threading.Timer | None = None
        self._thread: threading.Thread | None = None
        self._transcript = ipywidgets.HTML()
        self._question = ipywidgets.Text(placeholder="Ask something", continuous_update=False, layout={"flex": "1"})
        self._question.on_msg(self._submitted)
        self._question.observe(lambda change: change["new"] and self._text_is_whole(), "value")
        buttons = [ipywidgets.Button(description=name) for name in ("Send", "Stop", "Clear")]
        self._send, self._stop, self._clear = buttons
        self._send.on_click(lambda _: self.send(self._question.value))
        self._stop.on_click(lambda _: session.stop())
        self._clear.on_click(lambda _: self.clear())
        rows = (self._transcript, ipywidgets.HBox([self._question, *buttons]))
        self.view = ipywidgets.VBox(rows)
        self._offered = []
        if known:  # of Checkpoint.by_heart
            said = ipywidgets.HTML(KNOWN.format(known["answers"]))
            self._offered = [ipywidgets.Button(description=q, layout={"width": "auto"}) for q in known["questions"]]
            for button in self._offered:
                button.on_click(lambda button: self.send(button.description))
            self.view.children = (said, ipywidgets.Box(self._offered, layout={"flex_flow": "row wrap"}), *rows)
        self._busy(False)

    def _submitted(self, widget: object, content: dict, buffers: list) -> None:
        if content.get("event") == "submit":
            # The browser tells that Enter was pressed just before it tells the text; not at all what it told before.
            wait = TEXT_STAYS_S if self._question.value else TEXT_COMES_S
            self._entered = threading.Timer(wait, self._text_is_whole)
            self._entered.daemon = True
            self._entered.start()

    def _text_is_whole(self) -> None:
        entered, self._entered = self._entered, None
        if entered:
            entered.cancel()
            self.send(self._question.value)

    def send(self, question: str) -> None:
        """Ask; returns at once."""
        if self._thread and self._thread.is_alive():
            return
        self._show("question", question)
        try:
            pieces = self.session.ask(question)
        except UserError as error:
            self._show("error", str(error))
            return
        self._question.value = ""
        if self.session.notice:
            self._show("note", self.session.notice)
        self._busy(True)
        self._thread = threading.Thread(target=self._answer, args=(pieces,), name="chat box", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the answer is given."""
        if self._thread:
            self._thread.join()

    def clear(self) -> None:
        self.session.stop()
        self.wait()
        self.session.clear()
        self._shown.clear()
        self._draw()

    def close(self) -> None:
        """Stop, take the box away, close the engine."""
        self.session.stop()
        self.wait()
        self.view.close()
        self.session.runner.engine.close()

    def _answer(self, pieces) -> None:
        self._show("answer", "…")
        try:
            for _ in pieces:
                self._shown[-1] = ("answer", self.session.last.text)
                self._draw()
            self._show("note", figures(self.session))
        except UserError as error:
            self._show("error", str(error))
        finally:
            self._busy(False)

    def _busy(self, busy: bool) -> None:
        for button in (self._send, *self._offered):
            button.disabled = busy
        self._stop.disabled = not busy

    def _show(self, kind: str, text: str) -> None:
        self._shown.append((kind, text))
        self._draw()

    def _draw(self) -> None:
        self._transcript.value = "".join(
            f'<div style="white-space:pre-wrap;line-height:1.5;{STYLE[kind]}">{html.escape(text)}</div>'
            for kind, text in self._shown
        )


_last: ChatBox | None = None


def chat_box(
    bmodel: str | Path,
    tokenizer: QwenTokenizer,
    *,
    engine: str = "auto",
    devid: Sequence[int] = (0,),
    question: str,
    **settings,
) -> None:
    """Display a box to chat with a bmodel; where nobody can type, answer `question` as plain text instead.

    settings: of ChatSession. The engine stays open for the box, until the next one is made.
    Raises UserError where the bmodel cannot be opened.
    """
    global _last
    if _last:
        _last.close()
        _last = None
    opened = open_engine(bmodel, engine=engine, devid=devid)
    session = ChatSession(QwenRunner(opened), tokenizer, **settings)
    if somebody_types():
        _last = ChatBox(session, by_heart(bmodel))
        display(_last.view)
        return
    with opened:
        print(f"> {question}")
        for piece in session.ask(question):
            print(piece, end="", flush=True)
        print(f"\n{figures(session)}")
