"""Prefill, decode and sampling: on the real simulator, against PyTorch; and over numpy, against plain formulas."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.errors import UserError
from helpers.nets import MASKED, decode_mask, prefill_mask
from helpers.run.engines import open_engine
from helpers.run.generation import QwenRunner, Sampling, Timings
from helpers.run.lookahead import LookaheadRunner
from helpers.tensors import from_bf16
from tests.conftest import SEQ_LENGTH
from tests.unit.numpy_engine import NumpyEngine, RandomModel, rounded

VOCABULARY = 3008


@pytest.fixture(scope="module")
def runner(bmodel_tiny):
    with open_engine(bmodel_tiny, engine="simulator") as engine:
        yield QwenRunner(engine)


def test_prefill_mask_is_causal_and_hides_the_padding():
    mask = prefill_mask(3, 5)[0, 0]
    seen = mask == 0
    assert seen[:3, :3].tolist() == np.tril(np.ones((3, 3), bool)).tolist()
    assert not seen[3:].any() and not seen[:, 3:].any()
    assert set(np.unique(mask)) == {0.0, MASKED}


def test_decode_mask_shows_the_past_and_the_token_itself():
    mask = decode_mask(2, 4)[0, 0, 0]
    assert (mask == 0).tolist() == [True, True, False, False, True]


def test_masked_is_what_the_bmodel_contract_says():
    assert from_bf16(np.array([0xC61C], dtype=np.uint16))[0] == MASKED


@pytest.mark.slow
@pytest.mark.parametrize("addr_mode", ["io_alone", "basic"])
def test_int8_on_the_simulator_gives_pytorchs_tokens(
    addr_mode, compile_tiny, tiny, chat_prompt, stop_ids, demo_questions
):
    from helpers.parity.hosts import OriginalModel

    original = OriginalModel(tiny)
    with open_engine(compile_tiny("int8", addr_mode), engine="simulator") as engine:
        runner = QwenRunner(engine)
        for question in demo_questions[:2]:
            prompt = chat_prompt(question)
            expected = original.greedy(prompt, stop_ids, 24, runner.seq_length)
            assert list(runner.generate(prompt, stop_ids=stop_ids, max_new_tokens=24)) == expected


def test_no_keys_or_values_cross_to_the_host_in_a_decode_step(runner, chat_prompt, demo_questions):
    runner.prefill(chat_prompt(demo_questions[0]))
    token = runner.greedy_token()
    engine = runner.engine
    to_host, to_device = engine.bytes_to_host, engine.bytes_to_device
    runner.decode(token)
    runner.greedy_token()
    assert engine.bytes_to_host - to_host == 4  # the next token's id
    # The token's id, its position, and one mask of S + 1 bfloat16 values.
    assert engine.bytes_to_device - to_device == 4 + 4 + 2 * (runner.seq_length + 1)


def test_an_answer_ends_where_the_cache_is_full(runner):
    prompt = [1 + i % 200 for i in range(runner.seq_length - 2)]
    tokens = list(runner.generate(prompt))
    assert len(tokens) == 3 and runner.finish_reason == "length"
    with pytest.raises(UserError, match="full"):
        runner.decode(1)


def test_a_full_prompt_still_gets_one_token(runner):
    assert len(list(runner.generate([1] * runner.seq_length))) == 1


@pytest.mark.parametrize("length", [0, SEQ_LENGTH + 1])
def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(runner, length):
    moved = runner.engine.bytes_to_device
    with pytest.raises(UserError, match=rf"takes {length} tokens .* for {SEQ_LENGTH} \(S\)"):
        list(runner.generate([1] * length))
    assert runner.engine.bytes_to_device == moved


def test_sampling_is_seeded_and_follows_its_candidates(runner, tiny, chat_prompt, demo_questions):
    from helpers.parity.hosts import OriginalModel

    prompt = chat_prompt(demo_questions[0])
    hot = Sampling(temperature=5.0, top_p=1.0, seed=3)
    first = list(runner.generate(prompt, max_new_tokens=6, sampling=hot))
    again = list(runner.generate(prompt, max_new_tokens=6, sampling=hot))
    other = list(runner.generate(prompt, max_new_tokens=6, sampling=Sampling(temperature=5.0, top_p=1.0, seed=4)))
    assert first == again != other
    greedy = OriginalModel(tiny).greedy(prompt, [], 6, runner.seq_length)
    assert list(runner.generate(prompt, max_new_tokens=6, sampling=Sampling(temperature=1.0, top_k=1))) == greedy


def test_the_penalty_head_computes_what_its_definition_says(runner, chat_prompt, demo_questions, sample_head):
    runner.prefill(chat_prompt(demo_questions[0]))
    logits = runner.logits().astype(np.float64)
    best = int(logits.argmax())
    runner.visited = [best]
    # Divided by a large penalty, a positive logit falls behind the second.
    second = int(np.argsort(logits)[-2])
    token = runner.sample_token(Sampling(temperature=0.0, repetition_penalty=1000.0), np.random.default_rng(0))
    assert logits[best] > 0 and token == second
    # And all candidates, compiled and run on the simulated chip, as the net gives them in onnxruntime.
    for temperature, top_p in ((3.0, 0.8), (8.0, 0.1)):
        runner.sample_token(Sampling(temperature, top_p, repetition_penalty=2.0), np.random.default_rng(0))
        found = [runner.engine.read(runner.engine.output_tensor("penalty_sample_head", n)) for n in (0, 1)]
        expected = sample_head(SEQ_LENGTH)(logits[None], [[best] * SEQ_LENGTH], top_p, temperature, 2.0)
        np.testing.assert_allclose(found[0], expected[0], atol=0.01)
        assert (found[0] > 0.001).sum() == (expected[0] > 0.001).sum() >= 5
        assert found[1].tolist() == expected[1].tolist()


def penalised(logits, window, penalty):
    """Logits [V] with those of the window's tokens, once each, made less likely: as published for CTRL."""
    result = logits.astype(np.float64)
    for token in set(window):
        result[token] = result[token] * penalty if result[token] < 0 else result[token] / penalty
    return result


def distribution(logits, window, *, temperature, top_p, top_k, penalty):
    """Token -> probability, written from what the options promise: penalise, sort, heat, cut the nucleus, cut k."""
    logits = penalised(logits, window, penalty)
    tokens = np.argsort(-logits, kind="stable")[:50]
    weights = np.exp((logits[tokens] - logits[tokens[0]]) / temperature)
    weights /= weights.sum()
    reached = np.cumsum(weights)
    kept = [i for i in range(min(50, top_k)) if i < 5 or reached[i] < top_p]
    return {int(tokens[i]): weights[i] / weights[kept].sum() for i in kept}


@pytest.fixture(scope="module")
def sampler(sample_head):
    """A runner over a small random model and the real penalty_sample_head, S = 24: a draw takes no time."""
    return QwenRunner(NumpyEngine(RandomModel(VOCABULARY, seed=7), 24, sample_head=sample_head(24)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.6},
        {"top_p": 0.01},
        {"top_p": 0.9, "top_k": 7, "temperature": 0.7},
        {"temperature": 2.5},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 1.5, "repetition_last_n": 2, "top_k": 12},
        {"repetition_penalty": 0.7, "repetition_last_n": 100, "temperature": 0.5},
    ],
    ids=str,
)
def test_draws_are_spread_as_the_options_promise(sampler, settings):
    """Against plain numpy, with a tolerance of five standard deviations; the seed makes it the same every time."""
    options = {"temperature": 1.0, "top_p": 0.97, "top_k": 50, "repetition_penalty": 1.0, "repetition_last_n": 32}
    sampling = Sampling(**options | settings)
    # Of the likely tokens, with logits of both signs, some were said long ago, some of late, most never.
    prompt = [0, 1, 2, 16, 4, 90, 91, 92, 18, 5, 94, 17, 5]
    logits = np.full(VOCABULARY, -9.0, dtype=np.float32)
    logits[:60] = np.linspace(1.0, -3.0, 60)
    sampler.prefill(prompt)
    sampler.engine.write(sampler.engine.output_tensor("lm_head", 0), logits[None])
    expected = distribution(
        logits,
        prompt[-sampling.repetition_last_n :],
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        penalty=sampling.repetition_penalty,
    )
    random, draws = np.random.default_rng(11), 3000
    counts = np.bincount([sampler.sample_token(sampling, random) for _ in range(draws)], minlength=VOCABULARY)
    assert set(np.flatnonzero(counts)) <= expected.keys()
    for token, share in expected.items():
        assert abs(counts[token] / draws - share) <= 5 * np.sqrt(share * (1 - share) / draws) + 1e-9, token


@pytest.mark.parametrize("last_n", [1, 3, 6, 24])
def test_the_penalty_reaches_back_over_the_last_tokens_of_prompt_and_answer(sampler, last_n):
    prompt, penalty = [7, 8, 9, 10], 4.0
    sampling = Sampling(repetition_penalty=penalty, repetition_last_n=last_n)
    text, other = list(prompt), {"all of the text": False, "the prompt alone": False}
    for token in sampler.generate(prompt, sampling=sampling):
        logits = sampler.logits()
        assert token == int(penalised(logits, text[-last_n:], penalty).argmax()), text
        other["all of the text"] |= token != int(penalised(logits, text, penalty).argmax())
        other["the prompt alone"] |= token != int(penalised(logits, prompt[-last_n:], penalty).argmax())
        text.append(token)
    assert len(text) == sampler.seq_length + 1
    # Else this would have shown nothing: what is forgotten and what is remembered both decided here.
    assert other == {"all of the text": last_n < 24, "the prompt alone": True}


def test_a_prompt_forgets_what_was_said_before(sampler):
    sampling = Sampling(repetition_penalty=4.0)
    first = list(sampler.generate([7, 8, 9], sampling=sampling))
    list(sampler.generate([100, 101, 102], sampling=sampling))
    assert list(sampler.generate([7, 8, 9], sampling=sampling)) == first


def test_without_the_head_sampling_is_refused_and_greedy_is_not():
    runner = QwenRunner(NumpyEngine(RandomModel(60, seed=1), 8))
    with pytest.raises(UserError, match="no penalty_sample_head"):
        next(runner.generate([1], sampling=Sampling(temperature=1.0)))
    with pytest.raises(UserError, match="no penalty_sample_head"):
        next(runner.generate([1], sampling=Sampling(repetition_penalty=1.1)))
    assert len(list(runner.generate([1], sampling=Sampling(top_p=0.1, top_k=1, seed=1)))) == 8


def test_cancelling_stops_between_tokens(runner, chat_prompt, demo_questions):
    seen = []
    for token in runner.generate(chat_prompt(demo_questions[0]), should_stop=lambda: len(seen) >= 2):
        seen.append(token)
    assert len(seen) == 2 and runner.finish_reason == "cancelled"


def test_logits_are_those_of_the_whole_text_at_once():
    """Against the model without cache, positions handed on or masks of S rows: one causal pass over all tokens."""
    model = RandomModel(30, seed=4, width=16, layers=4, heads=4)
    runner, text = QwenRunner(NumpyEngine(model, 20)), [3, 1, 4, 1, 5]
    for token in runner.generate(text[:5]):
        # The engine keeps states in bfloat16 between its nets.
        states = rounded(model.embedding[text])
        for i in range(4):
            mask = np.triu(np.full((len(text), len(text)), -np.inf), 1)
            states = rounded(model.layer(i, states, np.arange(len(text)), mask)[0])
        logits = states[-1] @ model.head
        np.testing.assert_allclose(runner.logits(), logits, atol=0.02 * logits.std())
        text.append(token)
    assert len(text) == 21 and runner.finish_reason == "length" and runner.position == 20
    with pytest.raises(UserError, match="cache of 20 tokens is full"):
        runner.decode(text[-1])


def test_a_head_that_gives_tokens_gives_the_same():
    model = RandomModel(30, seed=4)
    for kind, rows in ((QwenRunner, 1), (LookaheadRunner, 10)):
        with_logits, without = (kind(NumpyEngine(model, 30, rows, token_head=way)) for way in (False, True))
        assert list(without.generate([3, 1])) == list(with_logits.generate([3, 1]))


@pytest.mark.parametrize("net", ["embedding", "embedding_cache", "lm_head", "block_cache_0", "block_cache_1"])
def test_a_bmodel_that_lacks_a_net_is_refused_by_its_name(net):
    engine = NumpyEngine(RandomModel(30, seed=4), 8)
    del engine.nets[net]
    with pytest.raises(UserError, match=f"lacks the net {net} "):
        QwenRunner(engine)


def test_before_its_first_answer_a_runner_has_nothing_to_tell():
    runner = QwenRunner(NumpyEngine(RandomModel(30, seed=4), 8))
    assert (runner.position, runner.visited, runner.timings, runner.finish_reason) == (0, [], Timings(), None)
    with pytest.raises(UserError, match="empty"):
        next(runner.generate([]))


def test_a_draw_is_as_random_as_its_seed(sampler):
    def answer(seed):
        hot = Sampling(temperature=20.0, top_p=1.0, seed=seed)
        return list(sampler.generate([7, 8, 9], sampling=hot, max_new_tokens=12))

    assert answer(3) == answer(3) != answer(4)
    assert answer(None) != answer(None)


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_stop_token_ends_the_answer_and_is_not_given(stop):
    runner = QwenRunner(NumpyEngine(RandomModel(30, seed=4), 20))
    whole = list(runner.generate([3, 1, 4]))
    assert whole.index(whole[stop]) == stop
    assert list(runner.generate([3, 1, 4], stop_ids=iter([999, whole[stop]]))) == whole[:stop]
    assert runner.finish_reason == "stop"


@pytest.mark.parametrize("limit", [0, 1, 4, 18, 100])
def test_an_answer_has_as_many_tokens_as_it_may(limit):
    runner = QwenRunner(NumpyEngine(RandomModel(30, seed=4), 20))
    assert len(list(runner.generate([3, 1, 4], max_new_tokens=limit))) == min(limit, 18)
    assert runner.finish_reason == "length"


def test_cancelling_is_asked_before_every_token():
    runner, seen = QwenRunner(NumpyEngine(RandomModel(30, seed=4), 20)), []
    assert list(runner.generate([3, 1, 4], should_stop=lambda: True)) == [] and runner.finish_reason == "cancelled"
    for token in runner.generate([3, 1, 4], should_stop=lambda: len(seen) == 2):
        seen.append(token)
    assert len(seen) == 2 and runner.finish_reason == "cancelled"


def test_the_time_of_every_token_is_told(monkeypatch):
    runner = QwenRunner(NumpyEngine(RandomModel(30, seed=4), 20))
    clock = (n * n for n in itertools.count())
    monkeypatch.setattr("helpers.run.generation.time", SimpleNamespace(perf_counter=clock.__next__))
    list(runner.generate([3, 1, 4], max_new_tokens=3))
    assert runner.timings == Timings(first_token_s=1, decode_s=[5, 9])
    assert runner.timings.tokens_per_s == pytest.approx(1 / 7) and Timings().tokens_per_s == 0


@pytest.mark.parametrize(
    "right",
    [
        {"temperature": 0}, {"temperature": 1000}, {"top_p": 1e-6}, {"top_p": 1}, {"top_k": 1}, {"top_k": 50},
        {"repetition_penalty": 0.001}, {"repetition_penalty": 1000}, {"repetition_last_n": 1}, {"seed": 0},
    ],
)  # fmt: skip
def test_sampling_takes_the_ends_of_its_ranges(right):
    Sampling(**right)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": 1000.5}, {"temperature": float("inf")}, {"top_p": 0}, {"top_p": 1.01},
        {"top_k": 0}, {"top_k": 51}, {"repetition_penalty": 0}, {"repetition_penalty": 1e-39},
        {"repetition_penalty": 1000.5}, {"repetition_last_n": 0}, {"seed": -1},
    ],
)  # fmt: skip
def test_sampling_outside_its_range_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"^{name} is {value}, it must be "):
        Sampling(**wrong)
