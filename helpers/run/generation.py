"""Prefill, decode and sampling of a Qwen bmodel over any engine: numpy only, nothing above the engine's interface.

Which nets there are and what they take says helpers.nets; S, H, h, d, V and R are explained there.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from helpers.errors import UserError
from helpers.nets import CANDIDATES, decode_mask, prefill_mask, qwen_shape
from helpers.run.engines.base import DeviceTensor, Engine
from helpers.tensors import to_bf16

# One tensor a device, in their order.
OnDevices = list[DeviceTensor]


class QwenRunner:
    """A Qwen bmodel in an engine. Keys and values never leave the device.

    Prefill writes each layer's keys and values [1,S,h,d] where that layer's decode net reads its past; a decode
    step's new row goes straight to row p of it, through a view.
    position: tokens in the cache. visited: their ids. timings, finish_reason: of the last answer.
    Raises UserError where a net is missing, or was compiled for another number of rows a decode step.
    """

    def __init__(self, engine: Engine, rows: int = 1):
        nets = engine.nets
        shape = qwen_shape(nets, "The bmodel")
        if shape.rows != rows:
            raise UserError(
                f"The bmodel decodes {shape.rows} rows a step, {rows} are needed here (1 to chat, more for lookahead): "
                f"take another bmodel, or `export --rows {rows}` and compile again."
            )
        self.engine = engine
        self.layers, self.seq_length, self.hidden_size = shape.layers, shape.seq_length, shape.hidden_size
        self.devices = len(nets["block_0"].inputs) // 3
        self.head_gives_token, self.can_sample = shape.token_head, shape.sampling
        self.position = 0
        self.visited: list[int] = []
        self.timings = Timings()
        self.finish_reason: str | None = None
        self._head_input = [engine.input_tensor("lm_head", k) for k in range(len(nets["lm_head"].inputs))]
        self._head_output = [engine.output_tensor("lm_head", k) for k in range(len(nets["lm_head"].outputs))]
        # Of each layer: its keys and its values.
        self._caches = [[self._inputs(f"block_cache_{i}", n) for n in (3, 4)] for i in range(self.layers)]
        self._row = (1, 1, *self._caches[0][0][0].shape[2:])
        # What each layer's decode net reads; behind the last, what lm_head reads.
        self._states = [self._inputs(f"block_cache_{i}", 0) for i in range(self.layers)]
        after = self._outputs(f"block_cache_{self.layers - 1}", 0)
        for k, tensor in enumerate(self._head_input):
            after[k] = engine.view(tensor, 0, (1, rows, self.hidden_size))
        self._states.append(after)

    def generate(
        self,
        ids: Sequence[int],
        *,
        stop_ids: Iterable[int] = (),
        max_new_tokens: int | None = None,
        sampling: "Sampling | None" = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[int]:
        """Answer a prompt, token by token; the stop token itself is not yielded.

        Afterwards `finish_reason` is "stop" (a stop token), "length" (max_new_tokens or S) or "cancelled"
        (`should_stop` said so), and `timings` holds seconds.
        Raises UserError, before anything runs, where the prompt is empty or longer than S.
        """
        check_prompt(ids, self.seq_length)
        stop_ids = frozenset(stop_ids)
        left = self.seq_length - len(ids) + 1  # the last token is given, and never fed
        if max_new_tokens is not None:
            left = min(left, max_new_tokens)
        self.timings, self.finish_reason = Timings(), "length"
        steps = self.steps(ids, sampling or Sampling(), stop_ids, left)
        first = True
        while left > 0:
            if should_stop():
                self.finish_reason = "cancelled"
                return
            started = time.perf_counter()
            tokens = next(steps)
            seconds = time.perf_counter() - started
            if first:
                self.timings.first_token_s, first = seconds, False
            else:
                self.timings.decode_s += [seconds / len(tokens)] * len(tokens)
            for token in tokens:
                if token in stop_ids:
                    self.finish_reason = "stop"
                    return
                yield token
            left -= len(tokens)

    def steps(
        self, ids: Sequence[int], sampling: "Sampling", stop_ids: frozenset[int], limit: int
    ) -> Iterator[list[int]]:
        """What an answer is made of, without end: the tokens of the prefill, then of each decode step; here one each.

        stop_ids, limit: beyond them nobody takes a token. A step that may give several heeds them.
        """
        random = np.random.default_rng(sampling.seed)
        self.prefill(ids)
        while True:
            token = self.greedy_token() if sampling.greedy else self.sample_token(sampling, random)
            yield [token]
            self.decode(token)

    def prefill(self, ids: Sequence[int]) -> None:
        """Run a whole prompt: afterwards the caches hold its keys and values and lm_head its last row's logits."""
        check_prompt(ids, self.seq_length)
        engine, count = self.engine, len(ids)
        padded, positions = np.zeros((2, 1, self.seq_length), dtype=np.int32)
        padded[0, :count] = ids
        positions[0, :count] = np.arange(count)
        # All layers compute in the memory of the first; states go from its input to its output and back.
        states, after = self._inputs("block_0", 0), self._outputs("block_0", 0)
        self._embed("embedding", padded, states)
        position_inputs, mask_inputs = (self._inputs("block_0", n) for n in (1, 2))
        self._write(position_inputs, positions)
        self._write(mask_inputs, to_bf16(prefill_mask(count, self.seq_length)))
        for i in range(self.layers):
            inputs = by_device(states, position_inputs, mask_inputs)
            engine.run(f"block_{i}", inputs, by_device(after, *self._caches[i]))
            states, after = after, states
        last_row = (count - 1) * self.hidden_size
        for tensor, head_input in zip(states, self._head_input, strict=False):
            row = engine.view(tensor, last_row, (1, 1, self.hidden_size))
            engine.copy(row, engine.view(head_input, 0, row.shape))
        engine.run("lm_head", self._head_input, self._head_output)
        self.position, self.visited = count, list(ids)

    def decode(self, token: int) -> None:
        """Feed one token: its keys and values join the cache, lm_head holds the logits of what follows."""
        if self.position >= self.seq_length:
            raise UserError(f"The cache of {self.seq_length} tokens is full: the answer ends here.")
        new_rows = [[[self._cache_row(c, self.position) for c in cache] for cache in layer] for layer in self._caches]
        ids, positions = (np.array([[number]], dtype=np.int32) for number in (token, self.position))
        self.feed(ids, positions, decode_mask(self.position, self.seq_length), new_rows)
        self.position += 1
        self.visited.append(int(token))

    def feed(self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, new_rows: list[list[OnDevices]]) -> None:
        """Run the decode nets on R new rows: lm_head then holds what follows each of them.

        ids, positions: int32 [1,R]. mask: additive, float32 [1,1,R,S+R]. new_rows: of each layer, the tensors
        [1,R,h,d] that take the new keys, and those that take the new values.
        """
        self._embed("embedding_cache", ids, self._states[0])
        first_positions, first_masks = (self._inputs("block_cache_0", n) for n in (1, 2))
        self._write(first_positions, positions)
        self._write(first_masks, to_bf16(mask))
        for i in range(self.layers):
            own_positions, own_masks = (self._inputs(f"block_cache_{i}", n) for n in (1, 2))
            if i:
                # With io_alone a net reads only its own memory; position and mask are handed on inside the device.
                for source, target in zip(first_positions + first_masks, own_positions + own_masks, strict=True):
                    self.engine.copy(source, target)
            inputs = by_device(self._states[i], own_positions, own_masks, *self._caches[i])
            self.engine.run(f"block_cache_{i}", inputs, by_device(self._states[i + 1], *new_rows[i]))
        self.engine.run("lm_head", self._head_input, self._head_output)

    def greedy_tokens(self) -> np.ndarray:
        """The most likely next token after each row last fed: int32 [R]. After a prefill only the first counts."""
        token = self._head_output[0]
        if not self.head_gives_token:
            token = self.engine.output_tensor("greedy_head", 0)
            self.engine.run("greedy_head", [self._head_output[0]], [token])
        return self.engine.read(token).reshape(-1)

    def greedy_token(self) -> int:
        """The most likely next token after the last prefill or decode."""
        return int(self.greedy_tokens()[0])

    def logits(self) -> np.ndarray:
        """Logits after the last prefill or decode: float32 [V]. For lessons and parity; chatting never reads them."""
        return self.engine.read(self._head_output[0]).reshape(-1)

    def sample_token(self, sampling: "Sampling", random: np.random.Generator) -> int:
        """Draw the next token: the chip sorts and weighs 50 candidates, the host draws one of them.

        Raises UserError where the bmodel has no penalty_sample_head.
        """
        if not self.can_sample:
            raise UserError(
                "This bmodel has no penalty_sample_head: ask with temperature 0, or compile with both heads."
            )
        engine = self.engine
        window = self.visited[-sampling.repetition_last_n :]
        # The net penalises every id it is given, so the rest is filled with one that is in the window anyway.
        ids = np.full((1, self.seq_length), window[-1], dtype=np.int32)
        ids[0, : len(window)] = window
        numbers = (sampling.top_p, max(sampling.temperature, 1e-3), sampling.repetition_penalty)
        inputs = [engine.input_tensor("penalty_sample_head", k) for k in range(1, 5)]
        engine.write(inputs[0], ids)
        for tensor, number in zip(inputs[1:], numbers, strict=True):
            engine.write(tensor, np.full(tensor.shape, number, dtype=np.float32))
        outputs = [engine.output_tensor("penalty_sample_head", k) for k in range(2)]
        engine.run("penalty_sample_head", [self._head_output[0], *inputs], outputs)
        weights, tokens = (engine.read(tensor).reshape(-1)[: sampling.top_k] for tensor in outputs)
        if sampling.temperature == 0:
            return int(tokens[0])
        weights = weights.astype(np.float64)
        return int(random.choice(tokens, p=weights / weights.sum()))

    def _inputs(self, net: str, index: int) -> OnDevices:
        count = len(self.engine.nets[net].inputs) // self.devices
        return [self.engine.input_tensor(net, count * k + index) for k in range(self.devices)]

    def _outputs(self, net: str, index: int) -> OnDevices:
        count = len(self.engine.nets[net].outputs) // self.devices
        return [self.engine.output_tensor(net, count * k + index) for k in range(self.devices)]

    def _write(self, tensors: OnDevices, values: np.ndarray) -> None:
        for tensor in tensors:
            self.engine.write(tensor, values)

    def _embed(self, net: str, ids: np.ndarray, states: OnDevices) -> None:
        info = self.engine.nets[net]
        inputs = [self.engine.input_tensor(net, k) for k in range(len(info.inputs))]
        self._write(inputs, ids.reshape(inputs[0].shape))
        self.engine.run(net, inputs, states[: len(info.outputs)])

    def _cache_row(self, cache: DeviceTensor, position: int) -> DeviceTensor:
        _, _, heads, head_dim = self._row
        return self.engine.view(cache, position * heads * head_dim, self._row)


def check_prompt(ids: Sequence[int], seq_length: int) -> None:
    """Raise UserError where a prompt is empty or longer than S."""
    if not 0 < len(ids) <= seq_length:
        raise UserError(
            f"The question takes {len(ids)} tokens with what stands before it, this bmodel was compiled for "
            f"{seq_length} (S), the answer among them: give it 1 to S, or compile with a larger --seq_length."
        )


def by_device(*tensors: OnDevices) -> list[DeviceTensor]:
    """[a of device 0, a of 1], [b of 0, b of 1] -> a and b of device 0, then a and b of 1: as a net takes them."""
    return [tensor for device in zip(*tensors, strict=True) for tensor in device]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy.

    top_p: smallest nucleus, 0 < top_p <= 1. top_k: at most this many candidates, 1..50.
    repetition_penalty: > 1 makes tokens of the last `repetition_last_n` less likely. seed: of the draw.
    """

    temperature: float = 0.0
    top_p: float = 0.8
    top_k: int = CANDIDATES
    repetition_penalty: float = 1.0
    repetition_last_n: int = 32
    seed: int | None = None

    def __post_init__(self):
        checks = (
            # Beyond these bounds the head, in float32, divides by zero or infinity and has no probabilities left.
            (0 <= self.temperature <= 1000, "temperature", "0 to 1000", self.temperature),
            (0 < self.top_p <= 1, "top_p", "over 0, at most 1", self.top_p),
            (1 <= self.top_k <= CANDIDATES, "top_k", f"1 to {CANDIDATES}", self.top_k),
            (0.001 <= self.repetition_penalty <= 1000, "repetition_penalty", "0.001 to 1000", self.repetition_penalty),
            (self.repetition_last_n >= 1, "repetition_last_n", "1 or more", self.repetition_last_n),
            (self.seed is None or self.seed >= 0, "seed", "0 or more", self.seed),
        )
        for good, name, needed, found in checks:
            if not good:
                raise UserError(f"{name} is {found}, it must be {needed}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 and self.repetition_penalty == 1


@dataclass
class Timings:
    """Seconds of one answer on this engine; what kind of time that is, `Engine.kind_of_time` says.

    first_token_s: of the prefill and its token; decode_s: of each further token. A runner makes one for each answer.
    """

    first_token_s: float = 0.0
    decode_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Decode speed, the first token left out; 0 where there was no second one."""
        return len(self.decode_s) / sum(self.decode_s) if self.decode_s else 0.0
