"""Lookahead ("Jacobi") decoding: several tokens out of one step, and exactly those of plain greedy decoding.

One step feeds R = 1 + G(N-1) + W rows instead of one:

    row 0                    the current token, at position p
    rows 1 … G(N-1)          G guesses of N-1 tokens, each at p+1, p+2, …
    the last W rows          the window, at p+1 … p+W

Row 0 gives the next token as plain decoding would. A guess that begins with it is right so far, so the row of
its first token gives the token after that, and so on: up to N tokens a step. The window is where guesses come
from: what a step predicts after each of its tokens is what the next step feeds there, and the last N tokens
of one of its columns are an n-gram, remembered under its first token.

Published as lookahead decoding by Fu, Bailis, Stoica and Zhang (2024); W = N = G = 3 are the sizes of
Sophgo's demo.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from helpers.errors import UserError
from helpers.nets import MASKED
from helpers.run.engines.base import Engine
from helpers.run.generation import QwenRunner, Sampling, by_device, check_prompt


@dataclass(frozen=True)
class LookaheadSizes:
    """How much a step looks ahead: W window columns, n-grams of N tokens, G guesses.

    Raises UserError where W or G is below 1 or N below 2.
    """

    window: int = 3
    ngram: int = 3
    guesses: int = 3

    def __post_init__(self):
        if self.window < 1 or self.ngram < 2 or self.guesses < 1:
            raise UserError(f"Lookahead needs a window and guesses of 1 or more, n-grams of 2 or more, not {self}.")

    @property
    def rows(self) -> int:
        """R, the rows that one step feeds."""
        return 1 + self.guesses * (self.ngram - 1) + self.window

    @property
    def window_rows(self) -> slice:
        return slice(self.rows - self.window, self.rows)

    def guess_rows(self, guess: int) -> slice:
        start = 1 + guess * (self.ngram - 1)
        return slice(start, start + self.ngram - 1)


def step_positions(sizes: LookaheadSizes, position: int, seq_length: int) -> np.ndarray:
    """Positions of a step's rows, int32 [1,R], for a current token at `position`.

    Rows beyond the last position S-1 are given S-1, the last angle that the compiled rotation has: their
    results are never used.
    """
    ahead = np.zeros(sizes.rows, dtype=np.int32)
    for guess in range(sizes.guesses):
        ahead[sizes.guess_rows(guess)] = np.arange(1, sizes.ngram)
    ahead[sizes.window_rows] = np.arange(1, sizes.window + 1)
    return np.minimum(position + ahead, seq_length - 1)[None].astype(np.int32)


def step_mask(sizes: LookaheadSizes, position: int, seq_length: int) -> np.ndarray:
    """What each row of a step sees, float32 [1,1,R,S+R]: 0 where it looks, -9984 elsewhere.

    The first S columns are the cache, of which rows 0 … position-1 are filled; the last R are the step's own.
    Every row sees the past, row 0 and itself; a guess or the window also its own earlier tokens.
    """
    own = np.zeros((sizes.rows, sizes.rows), dtype=bool)
    own[:, 0] = True
    for block in [sizes.guess_rows(guess) for guess in range(sizes.guesses)] + [sizes.window_rows]:
        own[block, block] = np.tri(block.stop - block.start, dtype=bool)
    past = np.broadcast_to(np.arange(seq_length) < position, (sizes.rows, seq_length))
    sees = np.concatenate([past, own], axis=1)
    return np.where(sees, 0.0, MASKED).astype(np.float32)[None, None]


class NgramPool:
    """N-grams by their first token: at most `guesses` of each, no two alike, first in, first out."""

    def __init__(self, guesses: int):
        self._guesses = guesses
        self._tails: dict[int, deque[tuple[int, ...]]] = {}

    def add(self, ngram: Sequence[int]) -> None:
        first, *tail = (int(token) for token in ngram)
        tails = self._tails.setdefault(first, deque(maxlen=self._guesses))
        if tuple(tail) not in tails:
            tails.append(tuple(tail))

    def after(self, first: int) -> list[tuple[int, ...]]:
        """What was seen to follow `first`, oldest first: tuples of N-1 tokens."""
        return list(self._tails.get(first, ()))


@dataclass(frozen=True)
class Step:
    """What one step feeds: ids and positions int32 [1,R], mask float32 [1,1,R,S+R], the number of guesses."""

    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    guesses: int


@dataclass(frozen=True)
class Accepted:
    """What one step gave: 1 to N tokens, and whose keys and values to keep: (row of step, row of cache)."""

    tokens: list[int]
    commits: list[tuple[int, int]]


@dataclass
class Statistics:
    """How well it went. accepted: tokens that each step gave; guessed: real guesses that each step fed."""

    accepted: list[int] = field(default_factory=list)
    guessed: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.accepted)

    @property
    def tokens_per_step(self) -> float:
        """1.0 is what plain decoding gives; N is the most there can be."""
        return sum(self.accepted) / self.steps if self.steps else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the steps that gave more than the one token that plain decoding would."""
        return sum(count > 1 for count in self.accepted) / self.steps if self.steps else 0.0

    def speed_up(self, decode_ms: float, step_ms: float) -> float:
        """Tokens a second over plain decoding, if a plain step takes decode_ms and one of these step_ms."""
        return self.tokens_per_step * decode_ms / step_ms


class LookaheadState:
    """One answer in the making: feed `step()` to the nets, what they say to `verify()`, until `finished`.

    prompt: ids of the prefill, T of them; first: the token that the prefill gave, which stands at position T.
    seq_length: S, the rows of the cache. stop: ids that end the answer, of which it then has one as its last.
    max_tokens: most tokens in the answer, `first` included. The last token may stand at position S, one past
    the cache, for it is given and never fed.
    Raises UserError where T is 0 or over S.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        first: int,
        seq_length: int,
        *,
        stop: Iterable[int] = (),
        max_tokens: int | None = None,
        sizes: LookaheadSizes | None = None,
    ):
        check_prompt(prompt, seq_length)
        self.sizes = sizes or LookaheadSizes()
        self.seq_length = seq_length
        self.position = len(prompt)
        self.tokens = [int(first)]
        self.statistics = Statistics()
        self.pool = NgramPool(self.sizes.guesses)
        self._stop = frozenset(stop)
        self._room = seq_length + 1 - len(prompt)
        if max_tokens is not None:
            self._room = min(self._room, max_tokens)
        self._prompt = [int(token) for token in prompt]
        self._random = np.random.default_rng(0)  # the same prompt gives the same steps
        self._columns = deque(self._new_column() for _ in range(self.sizes.window))
        self._guesses: list[tuple[int, ...]] = []

    @property
    def finished(self) -> bool:
        return self.tokens[-1] in self._stop or len(self.tokens) >= self._room

    @property
    def current(self) -> int:
        """The last token given, whose key and value are not yet in the cache. It stands at `position`."""
        return self.tokens[-1]

    @property
    def window(self) -> list[int]:
        """The W tokens that the next step feeds at position+1 … position+W."""
        return [column[-1] for column in self._columns]

    def step(self) -> Step:
        """What to feed next. Rows without a guess repeat the current token and are not looked at."""
        sizes = self.sizes
        self._guesses = self.pool.after(self.current)
        ids = np.full(sizes.rows, self.current, dtype=np.int32)
        for guess, tail in enumerate(self._guesses):
            ids[sizes.guess_rows(guess)] = tail
        ids[sizes.window_rows] = self.window
        return Step(
            ids=ids[None],
            positions=step_positions(sizes, self.position, self.seq_length),
            mask=step_mask(sizes, self.position, self.seq_length),
            guesses=len(self._guesses),
        )

    def verify(self, predicted: Sequence[int]) -> Accepted:
        """Take the token that each of the R rows gave for the next place; say which are the answer's.

        Moves on: `tokens`, `position`, the window and the pool are the next step's afterwards.
        """
        predicted = np.asarray(predicted).reshape(-1)
        if len(predicted) != self.sizes.rows:
            raise ValueError(f"a step has {self.sizes.rows} rows, not {len(predicted)}")
        runs = [self._right_rows(predicted, guess) for guess in range(len(self._guesses))]
        rows = max(runs, key=len, default=[0])
        given: list[int] = []
        for row in rows[: self._room - len(self.tokens)]:
            given.append(int(predicted[row]))
            if given[-1] in self._stop:
                break
        commits = [(row, self.position + i) for i, row in enumerate(rows[: len(given)])]
        self.statistics.accepted.append(len(given))
        self.statistics.guessed.append(len(self._guesses))
        self._look_ahead(predicted[self.sizes.window_rows], len(given))
        self.tokens += given
        self.position += len(given)
        return Accepted(given, commits)

    def _right_rows(self, predicted: np.ndarray, guess: int) -> list[int]:
        """Row 0 and the rows of this guess whose tokens are what the row before predicted."""
        rows = [0]
        for row, token in enumerate(self._guesses[guess], start=self.sizes.guess_rows(guess).start):
            if token != predicted[rows[-1]]:
                break
            rows.append(row)
        return rows

    def _look_ahead(self, predicted: np.ndarray, moved: int) -> None:
        """Lengthen each column by what it predicted, remember the full ones, and move the window on.

        A column's prediction stands one place further, and so does the window after one token. Where a step
        gave more, the columns that the answer has overtaken go, and new ones begin at the far end.
        """
        for column, token in zip(self._columns, predicted, strict=True):
            column.append(int(token))
            if len(column) == self.sizes.ngram:
                self.pool.add(column)
        for _ in range(min(moved - 1, self.sizes.window)):
            self._columns.popleft()
            self._columns.append(self._new_column())

    def _new_column(self) -> deque[int]:
        """A column begins with a token drawn from the prompt: anything would do, this is at hand."""
        return deque([int(self._random.choice(self._prompt))], maxlen=self.sizes.ngram)


class LookaheadRunner(QwenRunner):
    """A Qwen bmodel whose decode nets take R rows in place of one; greedy only.

    The nets are those of helpers.run.generation but for `embedding_cache` (ids [1,R]), `block_cache_i` (states [1,R,H],
    positions [1,R], mask [1,1,R,S+R]; new keys and values [1,R,h,d]), `lm_head` on [R,H] and `greedy_head` on [R,V].
    A step's keys and values wait in the nets' own outputs; once it is known which rows are right, these are copied
    to the cache, within the device. A prefill uses the first row of `lm_head`.
    Raises UserError where the bmodel was compiled for another number of rows.
    """

    def __init__(self, engine: Engine, sizes: LookaheadSizes | None = None):
        self.sizes = sizes or LookaheadSizes()
        super().__init__(engine, rows=self.sizes.rows)
        self._new_rows = [[self._outputs(f"block_cache_{i}", n) for n in (1, 2)] for i in range(self.layers)]
        self.statistics = Statistics()

    def generate(
        self,
        ids: Sequence[int],
        *,
        on_step: Callable[[Step, Accepted], None] = lambda step, accepted: None,
        **options: object,
    ) -> Iterator[int]:
        """As QwenRunner.generate, and the very same tokens. `statistics` has the steps of the last answer.

        on_step sees what each step fed and what it gave. A step's time counts in equal parts for its tokens.
        Raises UserError where sampling is asked for.
        """
        self.statistics, self._on_step = Statistics(), on_step
        return super().generate(ids, **options)

    def steps(
        self, ids: Sequence[int], sampling: Sampling, stop_ids: frozenset[int], limit: int
    ) -> Iterator[list[int]]:
        if not sampling.greedy:
            raise UserError("Lookahead decoding is greedy: ask with temperature 0 and no repetition penalty.")
        self.prefill(ids)
        first = self.greedy_token()
        state = LookaheadState(ids, first, self.seq_length, stop=stop_ids, max_tokens=limit, sizes=self.sizes)
        self.statistics = state.statistics
        yield [first]
        while not state.finished:
            step = state.step()
            self.feed(step.ids, step.positions, step.mask, self._new_rows)
            accepted = state.verify(self.greedy_tokens())
            for new_rows, caches in zip(self._new_rows, self._caches, strict=True):
                for new, cache in zip(by_device(*new_rows), by_device(*caches), strict=True):
                    for row, place in accepted.commits:
                        self.engine.copy(self._cache_row(new, row), self._cache_row(cache, place))
            self.position = state.position
            self.visited += [int(step.ids[0, 0]), *accepted.tokens[:-1]]
            self._on_step(step, accepted)
            yield accepted.tokens
