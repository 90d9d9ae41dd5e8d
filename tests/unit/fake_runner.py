"""A runner without an engine, for what a chip cannot be made to do on demand: block, fail, answer at length."""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

from helpers.errors import UserError
from helpers.run.generation import Timings


class FakeRunner:
    """Answers with the tokens of `reply(ids)`, perhaps endless ones; `fail_after` tokens it raises like a dead engine.

    allowed: how many tokens it computes before it blocks amid the next, until `allow` lets it compute more, or the
    engine is closed. `answers` records, for each answer that began, the prompt, the sampling and how many tokens were
    computed.
    """

    def __init__(
        self,
        reply: Callable[[Sequence[int]], Iterable[int]],
        *,
        seq_length: int = 512,
        step_s: float = 0.0,
        allowed: float = math.inf,
        fail_after: int | None = None,
        can_sample: bool = True,
    ):
        self.reply, self.seq_length, self.step_s, self.fail_after = reply, seq_length, step_s, fail_after
        self.can_sample = can_sample
        self.answers: list[dict] = []
        self.engine = SimpleNamespace(
            name="simulator", kind_of_time="simulator wall", reason="a fake", device_bytes=0, close=self.close
        )
        self.timings, self.finish_reason = Timings(), None
        self._allowed, self._closed = allowed, False
        self._changed = threading.Condition()

    def allow(self, tokens: float = math.inf) -> None:
        """From any thread: so many more tokens may be computed."""
        with self._changed:
            self._allowed += tokens
            self._changed.notify_all()

    def close(self) -> None:
        """What is being computed ends at once, as with a process that is killed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _compute(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._allowed > 0 or self._closed)
            if self._closed:
                raise UserError("This engine is closed.")
            self._allowed -= 1
        time.sleep(self.step_s)

    def generate(self, ids, *, stop_ids=(), max_new_tokens=None, sampling=None, should_stop=lambda: False):
        self.timings, self.finish_reason = Timings(), "length"
        record = {"ids": list(ids), "sampling": sampling, "computed": 0}
        self.answers.append(record)
        room = self.seq_length - len(ids) + 1
        tokens = itertools.chain(self.reply(ids), list(stop_ids)[:1])
        for token in itertools.islice(tokens, min(room, max_new_tokens or room)):
            if should_stop():
                self.finish_reason = "cancelled"
                return
            if record["computed"] == self.fail_after:
                raise RuntimeError("the simulator's process died")
            self._compute()
            record["computed"] += 1
            if record["computed"] == 1:
                self.timings.first_token_s = self.step_s
            else:
                self.timings.decode_s.append(self.step_s or 1e-6)
            if token in stop_ids:
                self.finish_reason = "stop"
                return
            yield token
