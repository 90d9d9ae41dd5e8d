"""A conversation with a bmodel: history, limits, streaming and sampling; in the terminal and from Python.

numpy and tiktoken are all it needs (and `sophon.sail` on a chip): neither torch nor the tool chain. Where
`rich` is installed the terminal has colours and a spinner.
"""

import argparse
import atexit
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from helpers.artefacts import read_manifest
from helpers.bmodel.bmodel import read_bmodel
from helpers.checkpoint.tokenizer import SYSTEM_PROMPT, QwenTokenizer
from helpers.errors import UserError
from helpers.machine import log
from helpers.nets import CANDIDATES
from helpers.run.engines import ENGINES, open_engine
from helpers.run.generation import QwenRunner, Sampling
from helpers.run.latency import KINDS

MAX_TURNS = 10


class StopStrings:
    """Cuts a stream of text before the first of some strings, even where one spans several pieces."""

    def __init__(self, stops: Sequence[str]):
        # Each with, for every beginning of it, the length of the longest shorter beginning that this one ends with.
        self.stops: list[tuple[str, list[int]]] = []
        for stop in filter(None, stops):
            shorter = [0] * len(stop)
            for n in range(1, len(stop)):
                shorter[n] = _begun(stop, shorter, shorter[n - 1], stop[n])
            self.stops.append((stop, shorter))
        self.found = False
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain by now; what may be the beginning of a stop string is held back."""
        text = self._held + piece
        places = [place for stop, _ in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = 0
        for stop, shorter in self.stops:
            begun = 0
            for character in text[max(0, len(text) - len(stop) + 1) :]:
                begun = _begun(stop, shorter, begun, character)
            held = max(held, begun)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _begun(stop: str, shorter: list[int], begun: int, character: str) -> int:
    """How many characters of `stop` text ends with after one more, where it ended with `begun` (Knuth-Morris-Pratt)."""
    while begun and stop[begun] != character:
        begun = shorter[begun - 1]
    return begun + (stop[begun] == character)


class Answer:
    """One answer: iterate over it once for pieces of text without broken characters, then read its figures.

    tokens: ids without the stop token. text: what was yielded; a character that the last token left unfinished
    is not in it. prompt_tokens: count. finish_reason: "stop", "length" or "cancelled" (`should_stop` said so, or
    the iteration was given up). first_token_s and decode_s: seconds on this engine; `Engine.kind_of_time` says
    of which kind.
    Iterating raises UserError where the engine fails.
    """

    def __init__(
        self,
        runner: QwenRunner,
        tokenizer: QwenTokenizer,
        ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.prompt_tokens = len(ids)
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason = "cancelled"
        self.first_token_s = 0.0
        self.decode_s: list[float] = []
        self._runner = runner
        self._stops = StopStrings(stop)
        self._decoder = tokenizer.stream()
        self._ids = runner.generate(
            ids,
            stop_ids=tokenizer.stop_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            should_stop=should_stop,
        )

    @property
    def tokens_per_s(self) -> float:
        """Decode speed, the first token left out; 0 where there was no second one."""
        return len(self.decode_s) / sum(self.decode_s) if self.decode_s else 0.0

    def __iter__(self) -> Iterator[str]:
        try:
            for token in self._ids:
                self.tokens.append(token)
                yield from self._keep(self._stops.push(self._decoder.push(token)))
                if self._stops.found:
                    self.finish_reason = "stop"
                    return
            yield from self._keep(self._stops.end())
            self.finish_reason = self._runner.finish_reason
        finally:
            self._ids.close()
            timings = self._runner.timings
            self.first_token_s, self.decode_s = timings.first_token_s, list(timings.decode_s)

    def _keep(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece


def fit_history(
    tokenizer: QwenTokenizer,
    seq_length: int,
    system: str,
    history: Sequence[tuple[str, str]],
    question: str,
    reserve: int,
) -> tuple[list[int], int]:
    """Prompt ids of a question after as many of the latest turns as leave room, and how many were dropped.

    reserve: tokens to leave free for the answer while there are turns to drop; a question alone may use all S.
    Raises UserError where the question is empty, or too long even alone.
    """
    if not question.strip():
        raise UserError("The question is empty: type one.")

    def ids_without(dropped: int) -> list[int]:
        messages = [{"role": "system", "content": system}] if system else []
        for asked, answered in history[dropped:]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return tokenizer.chatml([*messages, {"role": "user", "content": question}])

    alone = ids_without(len(history))
    if len(alone) > seq_length:
        raise UserError(
            f"The question takes {len(alone)} tokens with the system prompt, this bmodel was compiled for "
            f"{seq_length} (S), the answer among them: shorten it, or compile with a larger --seq_length."
        )
    # Every turn adds tokens, so the fewest turns to drop can be found by halving.
    fewest, enough = 0, len(history)
    while fewest < enough:
        middle = (fewest + enough) // 2
        if len(ids_without(middle)) + reserve <= seq_length:
            enough = middle
        else:
            fewest = middle + 1
    return ids_without(enough), enough


class ChatSession:
    """A conversation of several turns with one bmodel.

    history: (question, answer) of the turns that are still remembered. dropped_turns: how many of the oldest the
    last question had to drop, and `notice` says so in a sentence (else None). last: the last Answer with its
    figures. max_turns: how many earlier turns are remembered at most; S tokens limit them too.
    """

    def __init__(
        self,
        runner: QwenRunner,
        tokenizer: QwenTokenizer,
        *,
        system: str = SYSTEM_PROMPT,
        max_turns: int = MAX_TURNS,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
    ):
        if max_turns < 0:
            raise UserError(f"The number of turns to remember is {max_turns}, it must be 0 or more.")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"The number of new tokens is {max_new_tokens}, it must be 1 or more.")
        self.runner = runner
        self.tokenizer = tokenizer
        self.system = system
        self.max_turns = max_turns
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.history: list[tuple[str, str]] = []
        self.dropped_turns = 0
        self.last: Answer | None = None
        self._answering = False
        self._stop = False

    @property
    def notice(self) -> str | None:
        if not self.dropped_turns:
            return None
        turns = "turn is" if self.dropped_turns == 1 else f"{self.dropped_turns} turns are"
        return (
            f"The oldest {turns} forgotten: at most {self.max_turns} are remembered, and only what fits "
            f"{self.runner.seq_length} tokens (S) with the answer."
        )

    def ask(self, question: str) -> Iterator[str]:
        """Answer a question, piece by piece; the turn joins the history when the answer ends or is stopped.

        Raises UserError at once where the question is empty or too long for S; nothing is changed then.
        """
        if self._answering:
            raise UserError("The last question is still being answered: wait for it, or stop it.")
        seq_length = self.runner.seq_length
        reserve = min(seq_length // 4, self.max_new_tokens or seq_length)
        remembered = self.history[max(0, len(self.history) - self.max_turns) :]
        ids, dropped = fit_history(self.tokenizer, seq_length, self.system, remembered, question, reserve)
        self.dropped_turns = dropped + len(self.history) - len(remembered)
        self.history = remembered[dropped:]
        self._stop = False
        self.last = Answer(
            self.runner,
            self.tokenizer,
            ids,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            should_stop=lambda: self._stop,
        )
        return self._pieces(question, self.last)

    def _pieces(self, question: str, answer: Answer) -> Iterator[str]:
        self._answering, failed = True, False
        try:
            yield from answer
        except Exception:
            failed = True
            raise
        finally:
            self._answering = False
            if answer.text and not failed:
                self.history.append((question, answer.text))

    def stop(self) -> None:
        """End the answer that is being given, from any thread, after the token that is being computed."""
        self._stop = True

    def clear(self) -> None:
        """Forget all turns."""
        self.history, self.dropped_turns = [], 0


def host_bytes() -> int:
    """Memory this process holds now, in bytes (resident set); 0 where /proc does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def figures(session: ChatSession) -> str:
    """First-token latency, speed and memory of the last answer in one line that names the kind of time."""
    answer, engine = session.last, session.runner.engine
    parts = [f"{len(answer.tokens)} tokens", f"first token {answer.first_token_s:.2f} s"]
    if answer.decode_s:
        parts.append(f"{answer.tokens_per_s:.2f} token/s")
    parts[-1] += f" ({KINDS[engine.kind_of_time]})"
    parts.append(f"memory: {engine.device_bytes / 1e6:.0f} MB on the device, {host_bytes() / 1e6:.0f} MB on the host")
    return " · ".join(parts)


class _Terminal:
    """Writes to people: with rich where it is installed, else plainly."""

    def __init__(self):
        try:
            from rich.console import Console

            self.console = Console(highlight=False)
        except ImportError:
            self.console = None

    def say(self, text: str, style: str = "dim") -> None:
        if self.console:
            self.console.print(text, style=style, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def question(self) -> str:
        if not (self.console and self.console.is_terminal):
            return input()
        # With it input() has a history, and arrows move in the line instead of joining the question.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401

            # What does not take room is between \1 and \2: readline has to know where the line begins.
            return input("\1\x1b[1;32m\2question ❯\1\x1b[0m\2 ")
        return self.console.input("[bold green]question ❯[/] ")

    def answer(self, pieces: Iterator[str]) -> None:
        """Stream an answer; until its first piece, show that work is under way."""
        first = ""
        if self.console and self.console.is_terminal:
            with self.console.status("reading the question"):
                first = next(pieces, "")
        self._write(first)
        for piece in pieces:
            self._write(piece)
        self._write("\n")

    def _write(self, piece: str) -> None:
        if self.console:
            self.console.print(piece, end="", markup=False, soft_wrap=True)
            self.console.file.flush()
        else:
            print(piece, end="", flush=True)


@contextlib.contextmanager
def _interrupt_stops(session: ChatSession) -> Iterator[None]:
    """Ctrl-C stops the answer, not the program; a second one leaves."""
    presses = 0

    def interrupted(signum, frame):
        nonlocal presses
        presses += 1
        session.stop()
        if presses > 1:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def as_typed(text: str) -> str:
    """What was typed, where the locale has hidden bytes in the text because it cannot say them; without a BOM.

    Those bytes are UTF-8 on nearly every terminal, LC_ALL=C or not; U+FFFD where they are not.
    """
    if any("\udc80" <= character <= "\udcff" for character in text):
        text = os.fsencode(text).decode("utf-8", "replace")
    return text.removeprefix("\ufeff")


def talk(session: ChatSession, terminal: _Terminal) -> None:
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
        with _interrupt_stops(session):
            terminal.answer(pieces)
        if session.last.finish_reason == "cancelled":
            terminal.say("(stopped)")
        elif session.last.finish_reason == "length":
            terminal.say("(cut: the limit of new tokens, or of S, is reached)")
        terminal.say(figures(session))


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What libraries print meanwhile goes to standard error: standard output is for one JSON object."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _print_object(value: dict) -> None:
    """Print a JSON object, escaped where the terminal lacks a character.

    What libraries print as the process ends goes to standard error.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text, flush=True)
    atexit.register(os.dup2, 2, 1)


def answer_object(answer: Answer, engine) -> dict:
    """What `chat --json` prints: tokens, text, engine, first_token_s, tokens_per_s, and the kind of time."""
    return {
        "tokens": answer.tokens,
        "text": answer.text,
        "engine": engine.name,
        "first_token_s": round(answer.first_token_s, 6),
        "tokens_per_s": round(answer.tokens_per_s, 6),
        "kind": engine.kind_of_time,
    }


def open_tokenizer(model: str | Path, tokenizer: str | None) -> QwenTokenizer:
    """The tokenizer asked for, or the one that the bmodel's manifest names.

    Raises UserError where neither is there, or the bmodel is none.
    """
    read_bmodel(Path(model))
    if tokenizer:
        return QwenTokenizer.open(tokenizer)
    try:
        named = read_manifest(model).get("tokenizer")
    except UserError:
        named = None
    if not named:
        raise UserError(
            f"{model} has no manifest that names its tokenizer: give --tokenizer, a checkpoint folder or a "
            "qwen.tiktoken."
        )
    return QwenTokenizer.open(Path(model).parent / named)


def device_ids(text: str) -> tuple[int, ...]:
    """`0` or `2,3` as given to --devid."""
    try:
        ids = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of device ids such as 0 or 2,3") from None
    if min(ids) < 0 or len(set(ids)) != len(ids):
        raise argparse.ArgumentTypeError(f"{text!r} names a device twice, or a negative one")
    return ids


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `chat` and `serve` both need to open a bmodel."""
    parser.add_argument("--model", required=True, metavar="FILE", help="the bmodel")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the one in the bmodel's manifest")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="auto: the chip if there is one")
    parser.add_argument("--devid", type=device_ids, default=(0,), metavar="N[,N]", help="e.g. 0 or 2,3")
    parser.add_argument("--system", default=SYSTEM_PROMPT, help="the system prompt; empty for none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--question", help="answer this one and leave")
    parser.add_argument("--json", action="store_true", help="with --question: print one JSON object")
    parser.add_argument("--max-turns", type=int, default=MAX_TURNS, help="earlier turns to remember")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: as many as fit S")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p)
    parser.add_argument("--top-k", type=int, default=Sampling.top_k, help=f"1 to {CANDIDATES}")
    parser.add_argument("--repetition-penalty", type=float, default=Sampling.repetition_penalty)
    parser.add_argument("--repetition-last-n", type=int, default=Sampling.repetition_last_n)
    parser.add_argument("--seed", type=int, default=Sampling.seed, help="of the draw")


def run(args: argparse.Namespace) -> None:
    if args.json and args.question is None:
        raise UserError("--json answers one question: give it with --question.")
    if sys.__stdout__ is None:
        raise UserError("Standard output is closed, and the answer goes there: leave it open, or write `> FILE`.")
    sampling = Sampling(
        args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.repetition_last_n, args.seed
    )
    tokenizer = open_tokenizer(args.model, args.tokenizer)
    with contextlib.ExitStack() as quiet:
        if args.json:
            quiet.enter_context(_stdout_to_stderr())
        with open_engine(args.model, engine=args.engine, devid=args.devid) as engine:
            log(engine.reason)
            session = ChatSession(
                QwenRunner(engine),
                tokenizer,
                system=as_typed(args.system),
                max_turns=args.max_turns,
                sampling=sampling,
                max_new_tokens=args.max_new_tokens,
            )
            if args.question is None:
                talk(session, _Terminal())
                return
            pieces = session.ask(as_typed(args.question))
            if not args.json:
                _Terminal().answer(pieces)
                log(figures(session))
                return
            for _ in pieces:
                pass
    _print_object(answer_object(session.last, engine))
