"""A conversation with a bmodel: history, limits, stop strings, an answer piece by piece and its figures."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from helpers.artefacts import read_manifest
from helpers.checkpoint.tokenizer import SYSTEM_PROMPT, QwenTokenizer
from helpers.errors import UserError
from helpers.run.engines.base import Engine
from helpers.run.generation import QwenRunner, Sampling, Timings, check_prompt
from helpers.run.latency import KINDS

MAX_TURNS = 10
CUT = {"cancelled": "(stopped)\n", "length": "(cut: the limit of new tokens, or of S, is reached)\n"}


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
        self.found = bool(places)
        # With 4 strings of 1000 characters, the service's limit, the search takes some milliseconds at worst.
        held = range(max(0, len(text) + 1 - max(map(len, self.stops), default=0)), len(text))
        begun = (place for place in held if any(stop.startswith(text[place:]) for stop in self.stops))
        certain = min(places) if places else next(begun, len(text))
        self._held = "" if places else text[certain:]
        return text[:certain]

    def end(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


class Answer:
    """One answer: iterate over it once for pieces of text without broken characters, then read its figures.

    settings: of QwenRunner.generate. tokens: ids without the stop token. text: what was yielded; a character that
    the last token left unfinished is not in it. finish_reason: "stop", "length" or "cancelled" (`should_stop` said so,
    or the iteration was given up). Iterating raises UserError where the engine fails.
    """

    def __init__(
        self, runner: QwenRunner, tokenizer: QwenTokenizer, ids: Sequence[int], *, stop: Sequence[str] = (), **settings
    ):
        self.prompt_tokens = len(ids)
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason = "cancelled"
        self.timings = Timings()
        self._runner = runner
        self._stops = StopStrings(stop)
        self._decoder = tokenizer.stream()
        self._ids = runner.generate(ids, stop_ids=tokenizer.stop_ids, **settings)

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
    Raises UserError where the question is empty, or too long even alone.
    """
    if not question.strip():
        raise UserError("The question is empty: type one.")

    def messages_without(dropped: int) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": system}] if system else []
        for asked, answered in history[dropped:]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": question}]

    for dropped in range(max(0, len(history) - max_turns), len(history)):
        ids = tokenizer.chatml(messages_without(dropped))
        if len(ids) + reserve <= seq_length:
            return ids, dropped
    ids = tokenizer.chatml(messages_without(len(history)))
    check_prompt(ids, seq_length)
    return ids, len(history)


@dataclass(eq=False)
class ChatSession:
    """A conversation of several turns with one bmodel.

    max_turns: how many earlier turns are remembered at most; S tokens limit them too. history: (question, answer) of
    those that still are. dropped_turns: how many of the oldest the last question had to drop, and `notice` says so in
    a sentence (else None). last: the last Answer with its figures.
    """

    runner: QwenRunner
    tokenizer: QwenTokenizer
    _: KW_ONLY
    system: str = SYSTEM_PROMPT
    max_turns: int = MAX_TURNS
    sampling: Sampling | None = None
    max_new_tokens: int | None = None

    def __post_init__(self):
        for what, found, least in (("turns to remember", self.max_turns, 0), ("new tokens", self.max_new_tokens, 1)):
            if found is not None and found < least:
                raise UserError(f"The number of {what} is {found}, it must be {least} or more.")
        self.history: list[tuple[str, str]] = []
        self.dropped_turns = 0
        self.last: Answer | None = None
        self._answering = self._stop = False

    @property
    def notice(self) -> str | None:
        if not self.dropped_turns:
            return None
        return (
            f"The oldest turns are forgotten, {self.dropped_turns} this time: at most {self.max_turns} are remembered, "
            f"and only what fits {self.runner.seq_length} tokens (S) with the answer."
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
        settings = {"max_new_tokens": self.max_new_tokens, "sampling": self.sampling}
        self.last = Answer(self.runner, self.tokenizer, ids, should_stop=lambda: self._stop, **settings)
        return self._pieces(question, self.last)

    def _pieces(self, question: str, answer: Answer) -> Iterator[str]:
        self._answering = True
        try:
            yield from answer
        except GeneratorExit:
            pass  # given up: what was said counts
        finally:
            self._answering = False
        if answer.text:
            self.history.append((question, answer.text))

    def stop(self) -> None:
        """End the answer that is being given, from any thread, after the token that is being computed."""
        self._stop = True

    def clear(self) -> None:
        """Forget all turns."""
        self.history, self.dropped_turns = [], 0


def by_heart(bmodel: str | Path) -> dict | None:
    """Checkpoint.by_heart of the checkpoint that became this bmodel, from its manifest; None where it has none."""
    with contextlib.suppress(UserError):
        return read_manifest(bmodel).get("by_heart")
    return None


def figures(session: ChatSession) -> str:
    """Latency, speed and memory of the last answer, with their kind of time; first, whether it was stopped or cut."""
    answer, engine = session.last, session.runner.engine
    speed = f" · {answer.timings.tokens_per_s:.2f} token/s" if answer.timings.decode_s else ""
    host_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # resident
    return CUT.get(answer.finish_reason, "") + (
        f"{len(answer.tokens)} tokens · first token {answer.timings.first_token_s:.2f} s{speed} "
        f"({KINDS[engine.kind_of_time]}) · memory: {engine.device_bytes / 1e6:.0f} MB on the device, "
        f"{host_bytes / 1e6:.0f} MB on the host"
    )


def figures_object(answer: Answer, engine: Engine) -> dict:
    """The same figures for programs, to the microsecond: first_token_s, tokens_per_s, and the kind of time."""
    return {
        "first_token_s": round(answer.timings.first_token_s, 6),
        "tokens_per_s": round(answer.timings.tokens_per_s, 6),
        "kind": engine.kind_of_time,
    }
