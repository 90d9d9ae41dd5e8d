"""A conversation in the terminal, or over a pipe: a question a line. With `rich` it has colours and a spinner."""

import contextlib
import itertools
import signal
from collections.abc import Iterator

from helpers.chat.session import ChatSession, figures
from helpers.errors import UserError


class Terminal:
    """Writes to people: with rich where it is installed, else plainly."""

    def __init__(self):
        self.console = None
        with contextlib.suppress(ImportError):
            from rich.console import Console

            self.console = Console(highlight=False)

    def say(self, text: str, style: str | None = "dim", end: str = "\n") -> None:
        if self.console:
            self.console.print(text, style=style, end=end, markup=False, soft_wrap=True)
            self.console.file.flush()
        else:
            print(text, end=end, flush=True)

    def question(self) -> str:
        if not (self.console and self.console.is_terminal):
            return input()
        # With it input() has a history, and arrows move in the line instead of joining the question.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        # What does not take room is between \1 and \2: readline has to know where the line begins.
        return input("\1\x1b[1;32m\2question ❯\1\x1b[0m\2 ")

    def answer(self, pieces: Iterator[str]) -> None:
        """Stream an answer; until its first piece, show that work is under way."""
        first = ""
        if self.console and self.console.is_terminal:
            with self.console.status("reading the question"):
                first = next(pieces, "")
        for piece in itertools.chain([first], pieces, ["\n"]):
            self.say(piece, style=None, end="")


@contextlib.contextmanager
def interrupt_stops(session: ChatSession) -> Iterator[None]:
    """Ctrl-C stops the answer, not the program; a second one leaves."""

    def stop(signum, frame):
        session.stop()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def as_typed(text: str) -> str:
    """What was typed, where the locale has hidden bytes in the text because it cannot say them; without a BOM.

    Those bytes are UTF-8 on nearly every terminal, LC_ALL=C or not; U+FFFD where they are not.
    """
    return text.encode(errors="surrogateescape").decode(errors="replace").removeprefix("\ufeff")


def talk(session: ChatSession, terminal: Terminal) -> None:
    """Questions from the terminal (or from a pipe, a line each) until `exit` or end of input."""
    terminal.say("`clear` forgets the conversation, Ctrl-C stops an answer, `exit` leaves.")
    while True:
        try:
            question = as_typed(terminal.question())
        except EOFError:
            return
        except KeyboardInterrupt:
            terminal.say("\n`exit` leaves.")
            continue
        command = question.strip().lower()
        if command in ("exit", "quit"):
            return
        if command in ("clear", "reset"):
            session.clear()
            terminal.say("The conversation is forgotten.")
            continue
        try:
            pieces = session.ask(question)
        except UserError as error:
            terminal.say(str(error), style="red")
            continue
        if session.notice:
            terminal.say(session.notice, style="yellow")
        with interrupt_stops(session):
            terminal.answer(pieces)
        terminal.say(figures(session))
