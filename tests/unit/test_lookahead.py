"""Lookahead decoding gives the tokens of plain greedy decoding, whatever the model, the sizes, the limits."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.errors import UserError
from helpers.run.generation import QwenRunner, Sampling
from helpers.run.lookahead import (
    LookaheadRunner,
    LookaheadSizes,
    LookaheadState,
    NgramPool,
    Statistics,
    step_mask,
    step_positions,
)
from helpers.tensors import to_bf16
from tests.unit.numpy_engine import NumpyEngine, RandomModel

PICTURE = """
x.........
xx........
xxx.......
x..x......
x..xx.....
x....x....
x....xx...
x......x..
x......xx.
x......xxx
"""


def test_sizes_of_the_documented_scheme():
    sizes = LookaheadSizes()
    assert sizes.rows == 10
    assert [sizes.guess_rows(g) for g in range(3)] == [slice(1, 3), slice(3, 5), slice(5, 7)]
    assert sizes.window_rows == slice(7, 10)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"ngram": 1}, {"guesses": 0}])
def test_sizes_that_look_nowhere_are_refused(wrong):
    with pytest.raises(UserError, match="or more"):
        LookaheadSizes(**wrong)


def test_positions_of_the_documented_scheme():
    positions = step_positions(LookaheadSizes(), 5, 64)
    assert positions.dtype == np.int32 and positions.shape == (1, 10)
    assert positions[0].tolist() == [5, 6, 7, 6, 7, 6, 7, 6, 7, 8]


def test_positions_stay_where_the_rotation_is_defined():
    assert step_positions(LookaheadSizes(), 63, 64).max() == 63


def test_mask_of_the_documented_scheme():
    mask = step_mask(LookaheadSizes(), 5, 8)
    assert mask.dtype == np.float32 and mask.shape == (1, 1, 10, 18)
    assert set(np.unique(to_bf16(mask))) == {0, 0xC61C}
    sees = mask[0, 0] == 0
    assert sees[:, :5].all() and not sees[:, 5:8].any()
    drawn = "\n".join("".join("x" if seen else "." for seen in row) for row in sees[:, 8:])
    assert drawn == PICTURE.strip()


def test_pool_is_first_in_first_out_without_duplicates():
    pool = NgramPool(2)
    for ngram in [(1, 2, 3), (1, 2, 4), (1, 2, 3), (7, 8, 9)]:
        pool.add(ngram)
    assert pool.after(1) == [(2, 3), (2, 4)] and pool.after(7) == [(8, 9)] and pool.after(2) == []
    pool.add((1, 5, 6))
    assert pool.after(1) == [(2, 4), (5, 6)]
    assert sum(len(pool.after(first)) for first in range(10)) == 3


class Machine:
    """A causal model with a cache of S rows, fed as the nets are: ids, positions and mask of R rows."""

    def __init__(self, seq_length, width):
        self.cache = [np.zeros((seq_length, *shape), dtype) for shape, dtype in width]
        self.seq_length = seq_length

    def rows(self, ids, positions, mask):
        """Token that each row predicts; `self.new` holds what the rows would put into the cache."""
        raise NotImplementedError

    def feed(self, ids, positions, mask):
        assert ids.dtype == positions.dtype == np.int32 and mask.dtype == np.float32
        count = ids.shape[1]
        assert ids.shape == positions.shape == (1, count)
        assert mask.shape == (1, 1, count, self.seq_length + count)
        assert 0 <= positions.min() and positions.max() < self.seq_length
        return self.rows(ids[0], positions[0], mask[0, 0])

    def commit(self, pairs):
        for cache, new in zip(self.cache, self.new, strict=True):
            for row, place in pairs:
                cache[place] = new[row]

    def feed_one(self, token, position):
        mask = np.full((1, 1, 1, self.seq_length + 1), -9984, np.float32)
        mask[..., :position] = 0
        mask[..., -1] = 0
        (predicted,) = self.feed(np.array([[token]], np.int32), np.array([[position]], np.int32), mask)
        self.commit([(0, position)])
        return int(predicted)

    def prefill(self, prompt):
        return [self.feed_one(token, place) for place, token in enumerate(prompt)][-1]


class HashMachine(Machine):
    """Two layers of integer arithmetic, exact in any order, with ties in most logits.

    What a row says depends on every row that it sees, or on the last `reach` positions only (short cycles).
    It refuses a mask that shows a row any position but 0 … its own, once each.
    """

    def __init__(self, seq_length, vocabulary, reach, seed):
        super().__init__(seq_length, [((3,), np.int64)])
        self.vocabulary, self.reach = vocabulary, reach
        self.multipliers = np.random.default_rng(seed).integers(1, 1 << 20, size=8) * 2 + 1

    def mix(self, *values):
        result = 0
        for multiplier, value in zip(self.multipliers, values, strict=False):
            result = (result * 31 + int(value) + 1) * int(multiplier) % 1_000_003
        return result

    def rows(self, ids, positions, mask):
        own = np.zeros((len(ids), 3), np.int64)
        own[:, 0], own[:, 2] = [self.mix(token) for token in ids], positions
        for layer in range(2):
            everything = np.concatenate([self.cache[0], own])
            states = []
            for row, position in enumerate(positions):
                seen = everything[mask[row] == 0]
                if position < self.seq_length - 1:
                    assert sorted(seen[:, 2]) == list(range(position + 1))
                near = seen[seen[:, 2] > position - self.reach]
                weights = 1 + position - near[:, 2]
                states.append(self.mix(layer, own[row, layer], int((near[:, layer] * weights**2).sum())))
            if layer == 0:
                own[:, 1] = states
        self.new = [own]
        logits = [[self.mix(state, token) % 3 for token in range(self.vocabulary)] for state in states]
        return np.argmax(logits, axis=1)


class Transformer(Machine):
    """Two layers, two heads, rotation by position, additive mask, softmax: as a real block, in float64."""

    def __init__(self, seq_length, vocabulary, seed):
        self.model = RandomModel(vocabulary, seed)
        rows = ((self.model.heads, self.model.head_dim), np.float64)
        super().__init__(seq_length, [rows] * (2 * len(self.model.layers)))

    def rows(self, ids, positions, mask):
        states, self.new = self.model.embedding[ids], []
        for i in range(len(self.model.layers)):
            states, *new = self.model.layer(i, states, positions, mask, *self.cache[2 * i : 2 * i + 2])
            self.new += new
        return np.argmax(states @ self.model.head, axis=1)


def plain(machine, prompt, stop=(), max_tokens=None):
    """Greedy decoding one token at a time; the answer ends with its stop token, if it came to one."""
    room = machine.seq_length + 1 - len(prompt)
    room = room if max_tokens is None else min(room, max_tokens)
    tokens = [machine.prefill(prompt)]
    while tokens[-1] not in stop and len(tokens) < room:
        tokens.append(machine.feed_one(tokens[-1], len(prompt) + len(tokens) - 1))
    return tokens


def ahead(machine, prompt, sizes, stop=(), max_tokens=None):
    first = machine.prefill(prompt)
    state = LookaheadState(prompt, first, machine.seq_length, stop=stop, max_tokens=max_tokens, sizes=sizes)
    while not state.finished:
        step, position = state.step(), state.position
        accepted = state.verify(machine.feed(step.ids, step.positions, step.mask))
        assert 1 <= len(accepted.tokens) == len(accepted.commits) <= sizes.ngram
        assert [place for _, place in accepted.commits] == list(range(position, state.position))
        machine.commit(accepted.commits)
    return state


all_sizes = st.builds(LookaheadSizes, window=st.integers(1, 4), ngram=st.integers(2, 5), guesses=st.integers(1, 4))


@st.composite
def tasks(draw):
    """A vocabulary, a cache, a prompt that may fill it, stop tokens, a limit: everything around the model."""
    vocabulary = draw(st.integers(2, 7))
    tokens = st.integers(0, vocabulary - 1)
    seq_length = draw(st.integers(2, 40))
    prompt = draw(st.lists(tokens, min_size=1, max_size=min(seq_length, 8)))
    if draw(st.booleans()):
        prompt = (prompt * seq_length)[: max(1, seq_length - draw(st.integers(0, 6)))]
    stop = draw(st.one_of(st.just(set()), st.sets(tokens, max_size=2)))
    limit = draw(st.one_of(st.none(), st.integers(1, 30)))
    return vocabulary, seq_length, prompt, stop, limit, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=150)
@given(tasks(), all_sizes, st.sampled_from([1, 2, 3, 100]))
def test_same_tokens_as_greedy_with_ties_and_cycles(task, sizes, reach):
    vocabulary, seq_length, prompt, stop, limit, seed = task
    expected = plain(HashMachine(seq_length, vocabulary, reach, seed), prompt, stop, limit)
    state = ahead(HashMachine(seq_length, vocabulary, reach, seed), prompt, sizes, stop, limit)
    assert state.tokens == expected


@settings(max_examples=100)
@given(tasks(), all_sizes)
def test_same_tokens_as_greedy_on_random_transformers(task, sizes):
    vocabulary, seq_length, prompt, stop, limit, seed = task
    expected = plain(Transformer(seq_length, vocabulary, seed), prompt, stop, limit)
    state = ahead(Transformer(seq_length, vocabulary, seed), prompt, sizes, stop, limit)
    assert state.tokens == expected


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("ngram", [2, 3, 4])
@pytest.mark.parametrize("guesses", [1, 2, 3])
def test_every_small_size_accepts_and_still_equals_greedy(window, ngram, guesses):
    sizes = LookaheadSizes(window, ngram, guesses)
    prompt, seq_length = [1, 2, 0, 3], 64
    expected = plain(HashMachine(seq_length, 5, 1, 3), prompt)
    state = ahead(HashMachine(seq_length, 5, 1, 3), prompt, sizes)
    assert state.tokens == expected and len(expected) == seq_length + 1 - len(prompt)
    assert max(state.statistics.accepted) == ngram
    assert state.statistics.tokens_per_step > (1 + ngram) / 2


@settings(max_examples=60)
@given(tasks(), all_sizes)
def test_the_cache_afterwards_is_that_of_plain_decoding(task, sizes):
    vocabulary, seq_length, prompt, stop, limit, seed = task
    one, many = (HashMachine(seq_length, vocabulary, 2, seed) for _ in range(2))
    plain(one, prompt, stop, limit)
    state = ahead(many, prompt, sizes, stop, limit)
    np.testing.assert_array_equal(many.cache[0][: state.position], one.cache[0][: state.position])


def count_upwards(**limits):
    """An answer 10, 11, 12, … whose window, begun at 20, knows in time that 21, 22, 23 follow 20."""
    state = LookaheadState([20], 10, 64, **limits)
    while not state.finished and len(state.tokens) < 18:
        state.verify(state.step().ids[0] + 1)
    return state


def test_a_run_is_accepted_whole():
    state = count_upwards()
    assert state.tokens == list(range(10, 10 + len(state.tokens)))
    assert state.statistics.accepted[10:12] == [3, 3]


def test_columns_that_the_answer_overtakes_go():
    state = LookaheadState([20], 10, 64)
    given = 0
    while given < 3:
        before = state.window
        given = len(state.verify(state.step().ids[0] + 1).tokens)
    assert state.window == [before[2] + 1, 20, 20]


@pytest.mark.parametrize("tails", list(itertools.permutations([(50, 51), (11, 51), (11, 12)])))
def test_the_longest_of_several_guesses_is_taken(tails):
    state = LookaheadState([20], 10, 64)
    for tail in tails:
        state.pool.add((10, *tail))
    assert state.verify(state.step().ids[0] + 1).tokens == [11, 12, 13]


def test_a_stop_token_inside_an_accepted_run_ends_the_answer():
    state = count_upwards(stop=[22])
    assert state.finished and state.tokens == list(range(10, 23))
    assert state.statistics.accepted[-1] == 2


def test_a_limit_inside_an_accepted_run_ends_the_answer():
    state = count_upwards(max_tokens=13)
    assert state.finished and state.tokens == list(range(10, 23))
    assert state.statistics.accepted[-1] == 2


def test_a_first_token_that_stops_needs_no_step():
    assert LookaheadState([1], 7, 8, stop=[7]).finished
    assert LookaheadState([1], 7, 8, max_tokens=1).finished
    assert LookaheadState([1] * 8, 7, 8).finished
    assert not LookaheadState([1] * 7, 7, 8).finished


@pytest.mark.parametrize("length", [0, 9])
def test_a_prompt_that_does_not_fit_is_refused(length):
    with pytest.raises(UserError, match=r"takes \d tokens .* 8 \(S\)"):
        LookaheadState([1] * length, 1, 8)


def test_rows_that_are_missing_are_noticed():
    state = LookaheadState([1], 2, 8)
    state.step()
    with pytest.raises(ValueError, match="10 rows"):
        state.verify([1])


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_the_same_prompt_gives_the_same_steps(seed):
    first, second = (ahead(HashMachine(30, 4, 2, seed), [1, 2, 3], LookaheadSizes()) for _ in range(2))
    assert first.statistics == second.statistics


def test_statistics():
    statistics = Statistics(accepted=[1, 3, 2, 1], guessed=[0, 1, 1, 0])
    assert statistics.steps == 4
    assert statistics.tokens_per_step == 7 / 4
    assert statistics.acceptance_rate == 0.5
    assert statistics.speed_up(decode_ms=2.0, step_ms=2.8) == pytest.approx(1.25)
    assert Statistics().tokens_per_step == 1.0 and Statistics().acceptance_rate == 0.0


def test_a_vocabulary_of_one_token_hits_up_to_the_last_row():
    state = ahead(HashMachine(12, 1, 2, 0), [0], LookaheadSizes())
    assert state.tokens == [0] * 12 and max(state.statistics.accepted) == 3


def answers(task, sizes):
    """Plain and lookahead runners over engines with the same model, after they answered the same prompt."""
    vocabulary, seq_length, prompt, stop, limit, seed = task
    model = RandomModel(vocabulary, seed)
    plain = QwenRunner(NumpyEngine(model, seq_length))
    ahead = LookaheadRunner(NumpyEngine(model, seq_length, sizes.rows), sizes)
    given = [list(runner.generate(prompt, stop_ids=stop, max_new_tokens=limit)) for runner in (plain, ahead)]
    return plain, ahead, *given


@settings(max_examples=100)
@given(tasks(), all_sizes)
def test_runner_gives_the_tokens_the_reason_and_the_cache_of_plain_decoding(task, sizes):
    plain, ahead, expected, found = answers(task, sizes)
    assert found == expected
    assert ahead.finish_reason == plain.finish_reason
    # The first token comes from the prefill, and a stop token is counted: nothing behind it is.
    assert 1 + sum(ahead.statistics.accepted) == len(found) + (ahead.finish_reason == "stop")
    # Plain decoding stops within a run of tokens that lookahead accepted as a whole: it may be short of their rows.
    filled = min(plain.position, ahead.position)
    for one, many in zip(plain._caches, ahead._caches, strict=True):
        for (a,), (b,) in zip(one, many, strict=True):
            np.testing.assert_array_equal(plain.engine.read(a)[:, :filled], ahead.engine.read(b)[:, :filled])
    assert ahead.visited[: len(plain.visited)] == plain.visited[: len(ahead.visited)]


def test_runner_counts_steps_and_shows_them():
    sizes, steps = LookaheadSizes(), []
    runner = LookaheadRunner(NumpyEngine(RandomModel(4, 1), 48, sizes.rows))
    assert runner.statistics == Statistics()
    tokens = list(runner.generate([1, 2, 3], on_step=lambda step, accepted: steps.append((step, accepted))))
    assert [step.guesses for step, _ in steps] == runner.statistics.guessed
    assert {0, sizes.guesses} <= set(runner.statistics.guessed) <= set(range(sizes.guesses + 1))
    assert [len(accepted.tokens) for _, accepted in steps] == runner.statistics.accepted
    assert 1 + sum(runner.statistics.accepted) == len(tokens) == len(runner.timings.decode_s) + 1
    assert max(runner.statistics.accepted) > 1


def test_the_time_of_a_step_is_shared_by_its_tokens(monkeypatch):
    runner = LookaheadRunner(NumpyEngine(RandomModel(4, 1), 48, LookaheadSizes().rows))
    monkeypatch.setattr("helpers.run.generation.time", SimpleNamespace(perf_counter=itertools.count(5).__next__))
    list(runner.generate([1, 2, 3]))
    assert max(runner.statistics.accepted) > 1 and runner.timings.first_token_s == 1
    assert sum(runner.timings.decode_s) == pytest.approx(runner.statistics.steps)


def test_no_key_or_value_visits_the_host():
    sizes, seq_length = LookaheadSizes(), 48
    runner = LookaheadRunner(NumpyEngine(RandomModel(4, 1), seq_length, sizes.rows))
    answer = runner.generate([1, 2, 3])
    next(answer)
    engine = runner.engine
    down, up, steps = engine.bytes_to_device, engine.bytes_to_host, runner.statistics.steps
    list(answer)
    steps = runner.statistics.steps - steps
    a_step = 4 * sizes.rows + 4 * sizes.rows + 2 * sizes.rows * (seq_length + sizes.rows)
    assert engine.bytes_to_device - down == steps * a_step
    assert engine.bytes_to_host - up == steps * 4 * sizes.rows


def test_a_bmodel_with_other_rows_is_refused():
    with pytest.raises(UserError, match="decodes 1 rows a step"):
        LookaheadRunner(NumpyEngine(RandomModel(4, 1), 8))


def test_plain_decoding_refuses_a_bmodel_for_lookahead():
    with pytest.raises(UserError, match="decodes 10 rows a step, 1 are needed"):
        QwenRunner(NumpyEngine(RandomModel(4, 1), 8, 10))


def test_sampling_is_refused():
    runner = LookaheadRunner(NumpyEngine(RandomModel(4, 1), 8, 10))
    with pytest.raises(UserError, match="greedy"):
        next(runner.generate([1], sampling=Sampling(temperature=1.0)))


def test_an_answer_can_be_cancelled():
    runner = LookaheadRunner(NumpyEngine(RandomModel(4, 1), 48, 10))
    asked = iter([False, False, True])
    tokens = list(runner.generate([1, 2], should_stop=lambda: next(asked)))
    assert runner.finish_reason == "cancelled" and runner.statistics.steps == 1
    assert len(tokens) == 1 + runner.statistics.accepted[0]
    assert list(runner.generate([1, 2], should_stop=lambda: True)) == []
    assert runner.finish_reason == "cancelled" and runner.statistics == Statistics()


@pytest.mark.parametrize("devices, head_devices", [(2, 1), (2, 2), (4, 1), (4, 4)])
def test_several_devices_give_the_tokens_and_the_cache_of_one(devices, head_devices):
    model, prompt, sizes = RandomModel(5, 3, width=16, layers=3, heads=4), [1, 2, 3, 1, 4], LookaheadSizes()
    for kind, rows in ((QwenRunner, 1), (LookaheadRunner, sizes.rows)):
        one = kind(NumpyEngine(model, 40, rows))
        many = kind(NumpyEngine(model, 40, rows, devices=devices, head_devices=head_devices))
        assert list(many.generate(prompt)) == list(one.generate(prompt))
        for layer, whole in zip(many._caches, one._caches, strict=True):
            for parts, (cache,) in zip(layer, whole, strict=True):
                parts = [many.engine.read(part) for part in parts]
                np.testing.assert_array_equal(np.concatenate(parts, axis=2), one.engine.read(cache))
