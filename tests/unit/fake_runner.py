"""A runner without an engine, for what a chip cannot be made to do on demand: block, fail, answer at length."""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from helpers.generation import Timings


class FakeRunner:
    """Answers with the tokens of `reply(ids)`, `step_s` seconds each; `fail_after` tokens it raises like a dead engine.

    `answers` records, for each answer that began, the prompt, the sampling and how many tokens were computed.
    """

    def __init__(
        self,
        reply: Callable[[Sequence[int]], Sequence[int]],
        *,
        seq_length: int = 512,
        step_s: float = 0.0,
        fail_after: int | None = None,
        can_sample: bool = True,
    ):
        self.reply, self.seq_length, self.step_s, self.fail_after = reply, seq_length, step_s, fail_after
        self.can_sample = can_sample
        self.answers: list[dict] = []
        self.engine = SimpleNamespace(
            name="simulator", kind_of_time="simulator wall", reason="a fake", close=lambda: None
        )
        self.timings, self.finish_reason = Timings(), None

    def generate(self, ids, *, stop_ids=(), max_new_tokens=None, sampling=None, should_stop=lambda: False):
        self.timings, self.finish_reason = Timings(), "length"
        record = {"ids": list(ids), "sampling": sampling, "computed": 0}
        self.answers.append(record)
        room = self.seq_length - len(ids) + 1
        tokens = [*self.reply(ids), *list(stop_ids)[:1]]
        for token in tokens[: min(room, max_new_tokens or room)]:
            if should_stop():
                self.finish_reason = "cancelled"
                return
            if record["computed"] == self.fail_after:
                raise RuntimeError("the simulator's process died")
            time.sleep(self.step_s)
            record["computed"] += 1
            if record["computed"] == 1:
                self.timings.first_token_s = self.step_s
            else:
                self.timings.decode_s.append(self.step_s or 1e-6)
            if token in stop_ids:
                self.finish_reason = "stop"
                return
            yield token
