"""One chip, one request at a time: a bounded queue in front of a thread that owns the engine.

The event loop only submits and listens, so nothing on it ever waits for the chip; a listener that reads slowly,
or leaves, does not keep the chip from the next request.
"""

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from helpers.chat.session import Answer
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.errors import UserError
from helpers.machine import log
from helpers.run.generation import QwenRunner
from helpers.serve.requests import ApiError

# A prefill on the simulator takes minutes with a large model: nobody should wait for it to stop the service.
CLOSE_WITHIN_S = 5.0
CLOSING = "The service is shutting down."


class EngineFailed(ApiError):
    """The engine died, could not be opened again, or is being closed."""

    def __init__(self, message: str):
        super().__init__(503, message, "engine_failed", Retry_After="5")


class Job:
    """One request for an answer. Made on the event loop, run by the chip's thread, read on the event loop.

    settings: of Answer. answer: from when the chip has begun with it. text: what has come so far. ended: nothing more
    will come, nor need it: the answer is whole, its time is over, or nobody waits for it any more.
    """

    def __init__(self, ids: Sequence[int], time_limit_s: float, **settings):
        self.ids, self.time_limit_s, self.settings = ids, time_limit_s, settings
        self.answer: Answer | None = None
        self.text = ""
        self.error: ApiError | None = None
        self.ended = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self.timer = self._loop.call_later(time_limit_s, self._time_is_over)

    @property
    def finish_reason(self) -> str:
        """As OpenAI names it: an answer cut by the time limit ends for "length" too."""
        return "stop" if self.answer.finish_reason == "stop" else "length"

    def push(self, piece: str) -> None:
        """From the chip's thread: hand over a piece of text."""
        self.text += piece
        self._wake()

    def end(self, error: ApiError | None = None) -> None:
        """From any thread, for the first reason that there is."""
        if not self.ended:
            self.error, self.ended = error, True
            self._wake()

    def _wake(self) -> None:
        # The loop may be closed while the last request is being computed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._changed.set)

    def _time_is_over(self) -> None:
        where = "the answer's first token" if self.answer else "its turn in the queue"
        message = f"The time limit of {self.time_limit_s:g} s passed while waiting for {where}."
        self.end(None if self.text else ApiError(504, message, "time_limit"))

    async def pieces(self) -> AsyncIterator[str]:
        """The answer from its beginning, as it comes; a slow reader gets fewer and larger pieces.

        Raises the ApiError that the job ended with: 503, or 504 where its time was over before the first piece. Later
        on the answer is just cut.
        """
        given = 0
        while True:
            self._changed.clear()
            ended, piece = self.ended, self.text[given:]
            if piece:
                given += len(piece)
                yield piece
            elif not ended:
                await self._changed.wait()
            elif self.error:
                raise self.error
            else:
                return


class ChipQueue:
    """Owns the engine in a thread of its own and answers jobs in order.

    open_runner: makes a QwenRunner on a fresh engine; called again after the engine died. waiting: how many requests
    may wait besides the one that runs. failure: why opening it again did not work; the next request tries once more.
    """

    def __init__(self, open_runner: Callable[[], QwenRunner], tokenizer: QwenTokenizer, waiting: int):
        self.tokenizer = tokenizer
        self.waiting_limit = waiting
        self.failure: str | None = None
        self.answered = 0
        self._open_runner = open_runner
        self._runner: QwenRunner | None = None
        self._jobs: deque[Job] = deque()  # the first is the one that the thread answers
        self._changed = threading.Condition()
        self._closing = False
        self._answer_s = 1.0  # what the last answer took
        self._thread = threading.Thread(target=self._work, name="chip", daemon=True)

    def start(self) -> QwenRunner:
        """Open the engine (raises what that raises). The runner is there to read its sizes, never to run it."""
        self._runner = self._open_runner()
        self._thread.start()
        return self._runner

    def refuse(self) -> None:
        """From now on nothing is answered: what waits, and what runs, ends with EngineFailed at once."""
        with self._changed:
            self._closing = True
            for job in self._jobs:
                job.end(EngineFailed(CLOSING))
            self._changed.notify_all()

    def close(self) -> None:
        """Refuse, stop after the token being computed, or after a while amid it, and close the engine."""
        self.refuse()
        self._thread.join(CLOSE_WITHIN_S)
        self._close_engine()
        self._thread.join(CLOSE_WITHIN_S)

    @property
    def state(self) -> str:
        """One of "ok", "reopening" (the engine died and is being opened) and "failed" (that did not work)."""
        return "ok" if self._runner else "failed" if self.failure else "reopening"

    @property
    def waiting(self) -> int:
        return max(0, len(self._jobs) - 1)

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def check_room(self) -> None:
        """Raise ApiError where one more request would be too many (429), or the service ends (503)."""
        if self._closing:
            raise EngineFailed(CLOSING)
        if len(self._jobs) > self.waiting_limit:
            message = f"One request is answered at a time and {self.waiting} are waiting: try again later."
            guess_s = math.ceil(self._answer_s * len(self._jobs))
            raise ApiError(429, message, "rate_limit_exceeded", Retry_After=str(guess_s))

    def submit(self, job: Job) -> None:
        """Queue a job. Raises as `check_room` does."""
        with self._changed:
            self.check_room()
            self._jobs.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this answer any more: leave the queue, or stop after the token being computed."""
        job.timer.cancel()
        job.end()
        with self._changed:
            if job in self._jobs and job is not self._jobs[0]:
                self._jobs.remove(job)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
            if self._closing:
                break
            job = self._jobs[0]
            if self._runner or self._reopen():
                self._answer(job)
            else:
                job.end(EngineFailed(self.failure))
            with self._changed:
                self._jobs.popleft()
        self._close_engine()

    def _answer(self, job: Job) -> None:
        try:
            job.answer = Answer(self._runner, self.tokenizer, job.ids, should_stop=lambda: job.ended, **job.settings)
            for piece in job.answer:
                job.push(piece)
        except Exception as error:
            # Prompts and settings are checked before they are queued: what fails here is the engine.
            reason = str(error) if isinstance(error, UserError) else repr(error)
            job.end(EngineFailed(f"The engine failed while answering, and is being opened again: {reason}"))
            self._close_engine()
            if not self._closing:
                log(f"the engine failed: {reason}")
                self._reopen()
            return
        if job.answer.tokens:
            self.answered += 1
            self._answer_s = job.answer.timings.first_token_s + sum(job.answer.timings.decode_s)
        job.end()

    def _reopen(self) -> bool:
        self.failure = None
        try:
            self._runner = self._open_runner()
        except Exception as error:
            self.failure = f"The engine could not be opened again: {error}"
        log(self.failure or "the engine is open again")
        return self._runner is not None

    def _close_engine(self) -> None:
        runner, self._runner = self._runner, None
        with contextlib.suppress(Exception):
            if runner:
                runner.engine.close()
