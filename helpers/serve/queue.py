"""One chip, one request at a time: a bounded queue in front of a thread that owns the engine.

The event loop only submits and listens, so nothing on it ever waits for the chip; a listener that reads slowly,
or leaves, does not keep the chip from the next request.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import anyio

from helpers.chat.session import Answer
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.errors import UserError
from helpers.machine import log
from helpers.run.generation import QwenRunner, Sampling

# A prefill on the simulator takes minutes with a large model: nobody should wait for it to stop the service.
CLOSE_WITHIN_S = 5.0
CLOSING = "The service is shutting down."


class NoAnswer(Exception):
    """Why a request gets no answer, or no more of it."""


class QueueFull(NoAnswer):
    """As many requests run and wait as may. retry_after_s: a fair guess, whole seconds."""

    def __init__(self, waiting: int, retry_after_s: int):
        super().__init__(f"One request is answered at a time and {waiting} are waiting: try again later.")
        self.retry_after_s = retry_after_s


class EngineFailed(NoAnswer):
    """The engine died under this request, or could not be opened again."""

    retry_after_s = 5


class TimeLimit(NoAnswer):
    """The time limit passed before the first piece of the answer."""


@dataclass(eq=False)
class Job:
    """One request for an answer. Made on the event loop, run by the chip's thread, read on the event loop."""

    ids: Sequence[int]
    time_limit_s: float
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()

    def __post_init__(self):
        self.deadline = time.monotonic() + self.time_limit_s
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.started = False
        self.ended = False
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._pieces: deque[str] = deque()

    @property
    def finish_reason(self) -> str:
        """As OpenAI names it: an answer cut by the time limit ends for "length" too."""
        return "stop" if self.answer and self.answer.finish_reason == "stop" else "length"

    def over(self) -> bool:
        """Whether nobody waits for this answer any more."""
        return self.cancelled or time.monotonic() > self.deadline

    def push(self, piece: str) -> None:
        """From the chip's thread: hand over a piece of text."""
        self._pieces.append(piece)
        self._wake()

    def end(self, error: Exception | None = None) -> None:
        """From any thread: nothing more will come."""
        self.error, self.ended = error, True
        self._wake()

    def _wake(self) -> None:
        # The loop may be closed while the last request is being computed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._changed.set)

    async def pieces(self) -> AsyncIterator[str]:
        """Everything new since the last time, joined; a slow reader gets fewer and larger pieces.

        Raises EngineFailed, or TimeLimit where the limit passed before the first piece; past the limit later on,
        the iteration just ends.
        """
        given = False
        while True:
            self._changed.clear()
            ended = self.ended
            if new := "".join(self._pieces.popleft() for _ in range(len(self._pieces))):
                given = True
                yield new
                continue
            if ended and self.error:
                raise self.error
            remaining_s = self.deadline - time.monotonic()
            if ended or (given and remaining_s <= 0):
                return
            if remaining_s <= 0:
                raise self.too_late()
            # Not asyncio.wait_for: before Python 3.12 it forgets that it was cancelled where a piece comes meanwhile.
            with anyio.move_on_after(remaining_s):
                await self._changed.wait()

    def too_late(self) -> TimeLimit:
        where = "the answer's first token" if self.started else "its turn in the queue"
        return TimeLimit(f"The time limit of {self.time_limit_s:g} s passed while waiting for {where}.")


class ChipQueue:
    """Owns the engine in a thread of its own and answers jobs in order.

    open_runner: makes a QwenRunner on a fresh engine; called again after the engine died. waiting: how many
    requests may wait besides the one that runs.
    `state` is "ok", "reopening" (the engine died and is being opened) or "failed" (opening it did not work;
    `failure` says why, and the next request tries again).
    """

    def __init__(self, open_runner: Callable[[], QwenRunner], tokenizer: QwenTokenizer, waiting: int):
        self.tokenizer = tokenizer
        self.waiting_limit = waiting
        self.state = "reopening"
        self.failure: str | None = None
        self.answered = 0
        self._open_runner = open_runner
        self._runner: QwenRunner | None = None
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._typical_s = 1.0
        self._thread = threading.Thread(target=self._work, name="chip", daemon=True)

    def start(self) -> QwenRunner:
        """Open the engine and return its runner, to read its sizes (S, what it can do) but never to run it.

        Raises what opening raised.
        """
        self._open()
        self._thread.start()
        return self._runner

    def refuse(self) -> None:
        """From now on nothing is answered: what waits, and what runs, ends with EngineFailed at once."""
        with self._changed:
            self._closing = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.end(EngineFailed(CLOSING))
            self._waiting.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Refuse, stop after the token being computed, or after a while amid it, and close the engine."""
        self.refuse()
        self._thread.join(CLOSE_WITHIN_S)
        if self._thread.is_alive() and self._runner:
            self._runner.engine.close()
            self._thread.join(CLOSE_WITHIN_S)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return self._running is not None

    def check_room(self) -> None:
        """Raise QueueFull where one more request would be too many, EngineFailed where the service ends."""
        with self._changed:
            if self._closing:
                raise EngineFailed(CLOSING)
            # Counted together: before the thread has taken the first of a burst, all of it is waiting.
            if len(self._waiting) + (self._running is not None) > self.waiting_limit:
                retry = math.ceil(self._typical_s * (len(self._waiting) + 1))
                raise QueueFull(len(self._waiting), min(3600, max(1, retry)))

    def submit(self, job: Job) -> None:
        """Queue a job. Raises as `check_room` does."""
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this answer any more: leave the queue, or stop after the token being computed."""
        job.cancelled = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def _work(self) -> None:
        while job := self._next():
            self._answer(job)
            with self._changed:
                self._running = None
        with contextlib.suppress(Exception):
            if self._runner:
                self._runner.engine.close()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _answer(self, job: Job) -> None:
        if job.over():
            job.end(job.too_late())
            return
        if self._runner is None and not self._reopen():
            job.end(EngineFailed(self.failure))
            return
        job.started = True
        began = time.monotonic()
        try:
            job.answer = Answer(
                self._runner,
                self.tokenizer,
                job.ids,
                max_new_tokens=job.max_new_tokens,
                sampling=job.sampling,
                stop=job.stop,
                should_stop=lambda: job.over() or self._closing,
            )
            for piece in job.answer:
                job.push(piece)
        except Exception as error:
            if self._closing:
                job.end(EngineFailed(CLOSING))
                return
            # Prompts and settings are checked before they are queued: what fails here is the engine.
            log(f"the engine failed: {error!r}")
            reason = str(error) if isinstance(error, UserError) else repr(error)
            job.end(EngineFailed(f"The engine failed while answering, and is being opened again: {reason}"))
            with contextlib.suppress(Exception):
                self._runner.engine.close()
            self._runner = None
            self._reopen()
            return
        self._typical_s += 0.2 * (time.monotonic() - began - self._typical_s)
        if self._closing and job.answer.finish_reason == "cancelled":
            job.end(EngineFailed(CLOSING))
        elif job.answer.finish_reason == "cancelled" and not job.answer.text:
            job.end(job.too_late())
        else:
            self.answered += 1
            job.end()

    def _open(self) -> None:
        self._runner = self._open_runner()
        self.state, self.failure = "ok", None

    def _reopen(self) -> bool:
        self.state = "reopening"
        try:
            self._open()
        except Exception as error:
            self.state = "failed"
            self.failure = f"The engine could not be opened again: {error}"
            log(self.failure)
            self._refuse_waiting()
            return False
        log("the engine is open again")
        return True

    def _refuse_waiting(self) -> None:
        with self._changed:
            while self._waiting:
                self._waiting.popleft().end(EngineFailed(self.failure))
