"""A conversation with a bmodel: history, limits, stop strings, an answer piece by piece and its figures."""

import bisect
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from helpers.checkpoint.tokenizer import SYSTEM_PROMPT, QwenTokenizer
from helpers.errors import UserError
from helpers.run.engines.base import Engine
from helpers.run.generation import QwenRunner, Sampling, Timings
from helpers.run.latency import KINDS

MAX_TURNS = 10


class StopStrings:
    """Cuts a stream of text before the first of some strings, even where one spans several pieces."""

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.found = False
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain by now; what may be the beginning of a stop string is held back."""
        text = self._held + piece
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        certain = len(text) - max((begun(stop, text) for stop in self.stops), default=0)
        self._held = text[certain:]
        return text[:certain]

    def end(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def begun(stop: str, text: str) -> int:
    """With how many of the first characters of `stop`, not all of them, `text` ends."""
    # The most first: it is that where a long one nearly comes. With 1000 characters, the service's limit, this takes
    # less than a millisecond at worst.
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """One answer: iterate over it once for pieces of text without broken characters, then read its figures.

    tokens: ids without the stop token. text: what was yielded; a character that the last token left unfinished
    is not in it. prompt_tokens: count. finish_reason: "stop", "length" or "cancelled" (`should_stop` said so, or
    the iteration was given up). timings: seconds on this engine; `Engine.kind_of_time` says of which kind.
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
        self.timings = Timings()
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
            self.timings = self._runner.timings

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
    max_turns: int = MAX_TURNS,
) -> tuple[list[int], int]:
    """Prompt ids of a question after as many of the latest turns as leave room, and how many were dropped.

    reserve: tokens to leave free for the answer while there are turns to drop; a question alone may use all S.
    max_turns: more turns than these are never remembered. Raises UserError where the question is empty, or too long
    even alone.
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
    droppable = range(max(0, len(history) - max_turns), len(history))
    dropped = droppable.start + bisect.bisect_left(
        droppable, True, key=lambda dropped: len(ids_without(dropped)) + reserve <= seq_length
    )
    return ids_without(dropped), dropped


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
        ids, self.dropped_turns = fit_history(
            self.tokenizer, seq_length, self.system, self.history, question, reserve, self.max_turns
        )
        self.history = self.history[self.dropped_turns :]
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
    parts = [f"{len(answer.tokens)} tokens", f"first token {answer.timings.first_token_s:.2f} s"]
    if answer.timings.decode_s:
        parts.append(f"{answer.timings.tokens_per_s:.2f} token/s")
    parts[-1] += f" ({KINDS[engine.kind_of_time]})"
    parts.append(f"memory: {engine.device_bytes / 1e6:.0f} MB on the device, {host_bytes() / 1e6:.0f} MB on the host")
    return " · ".join(parts)


def figures_object(answer: Answer, engine: Engine) -> dict:
    """The same figures for programs, to the microsecond: first_token_s, tokens_per_s, and the kind of time."""
    return {
        "first_token_s": round(answer.timings.first_token_s, 6),
        "tokens_per_s": round(answer.timings.tokens_per_s, 6),
        "kind": engine.kind_of_time,
    }
