"""Lookahead on the real chain: exported, compiled, run on the simulator; the tokens are those of plain decoding."""


import numpy as np
import pytest

from helpers import artefacts
from helpers.compile import compiling
from helpers.errors import UserError
from helpers.export import exporting, tracing
from helpers.patching import patching
from helpers.run import lookahead
from helpers.run.engines import open_engine
from helpers.run.generation import QwenRunner
from helpers.run.lookahead import LookaheadRunner, LookaheadSizes, NgramPool
from tests.conftest import SEQ_LENGTH, WORK
from tests.unit.small_nets import write_random_checkpoint

pytestmark = pytest.mark.slow
ROWS = LookaheadSizes().rows
FOLDER = WORK / "lookahead"


@pytest.fixture(scope="module")
def onnx(patched_tiny):
    return exporting.export(patched_tiny, FOLDER / "onnx", SEQ_LENGTH, rows=ROWS)


@pytest.fixture(scope="module")
def bmodel(onnx):
    return compiling.compile_model(onnx, FOLDER / "bmodel", name="tiny", mode="int8", addr_mode="io_alone")


@pytest.fixture(scope="module")
def runner(bmodel):
    with open_engine(bmodel, engine="simulator") as engine:
        yield LookaheadRunner(engine)


def test_nets_have_the_rows_of_the_documented_scheme(runner):
    nets = runner.engine.nets
    assert nets["embedding_cache"].inputs[0].shape == (1, ROWS)
    assert [t.shape for t in nets["block_cache_0"].inputs][:3] == [
        (1, ROWS, 128),
        (1, ROWS),
        (1, 1, ROWS, SEQ_LENGTH + ROWS),
    ]
    assert nets["block_cache_0"].outputs[1].shape == (1, ROWS, 4, 32)
    assert nets["lm_head"].inputs[0].shape == (ROWS, 128)
    assert nets["greedy_head"].outputs[0].shape == (ROWS, 1)
    assert "penalty_sample_head" not in nets


def test_demo_questions_get_the_tokens_of_pytorch(runner, tiny, demo_questions, chat_prompt, stop_ids):
    """The ordinary int8 bmodel gives these tokens too (test_generation); notebook 06 asks every question."""
    from helpers.parity.hosts import OriginalModel

    original, steps, given = OriginalModel(tiny), 0, 0
    for question in (demo_questions[0], demo_questions[-1]):
        prompt = chat_prompt(question)
        expected = original.greedy(prompt, stop_ids, 32, SEQ_LENGTH)
        assert list(runner.generate(prompt, stop_ids=stop_ids, max_new_tokens=32)) == expected
        steps += runner.statistics.steps
        given += sum(runner.statistics.accepted)
    assert given / steps > 1.2


def test_a_step_costs_little_more_than_a_token(bmodel, compile_tiny):
    """Estimated. The compiler's fused attention would make it five times as much."""
    step = artefacts.read_manifest(bmodel)["estimates"]["decode_ms"]
    token = artefacts.read_manifest(compile_tiny("int8"))["estimates"]["decode_ms"]
    assert step < 1.5 * token


def test_up_to_the_last_row_of_the_cache(runner, monkeypatch):
    prompt = [1 + i % 200 for i in range(SEQ_LENGTH - 3)]
    found = list(runner.generate(prompt))
    assert len(found) == 4 and runner.finish_reason == "length"
    monkeypatch.setattr(lookahead, "NgramPool", Forgetful)
    assert list(runner.generate(prompt)) == found


def test_an_ordinary_bmodel_is_refused(bmodel_tiny):
    with open_engine(bmodel_tiny, engine="simulator") as engine, pytest.raises(UserError, match="decodes 1 rows"):
        LookaheadRunner(engine)


class Forgetful(NgramPool):
    """Remembers nothing: then every step gives one token, as plain decoding does."""

    def add(self, ngram):
        pass


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint")
    patched = folder.with_name("patched")
    patching.apply(folder, out=patched, seq_length=64)
    return patched


def unfused(trace):
    """tracing.trace, whose decode block computes its attention as the one for several rows does."""

    def traced(module, net, example):
        graph = trace(module, net, example)
        if net == "block_cache":
            tracing.keep_attention_unfused(graph)
        return graph

    return traced


def test_random_weights_get_the_tokens_of_one_row_at_a_time(random_checkpoint, tmp_path, monkeypatch):
    """Bit for bit: next tokens of random weights are near ties, which the fused attention's other rounding turns."""
    bmodels = {}
    for rows in (1, ROWS):
        with monkeypatch.context() as patch:
            if rows == 1:
                patch.setattr(exporting, "trace", unfused(tracing.trace))
            nets = exporting.export(random_checkpoint, tmp_path / f"onnx{rows}", 64, rows=rows)
        bmodels[rows] = compiling.compile_model(
            nets, tmp_path / f"bmodel{rows}", name="random", mode="bf16", addr_mode="io_alone"
        )
    with (
        open_engine(bmodels[1], engine="simulator") as one,
        open_engine(bmodels[ROWS], engine="simulator") as many,
    ):
        plain, ahead = QwenRunner(one), LookaheadRunner(many)
        accepted = []
        for seed in range(2):
            prompt = np.random.default_rng(seed).integers(0, 512, 8).tolist()
            found = list(ahead.generate(prompt, max_new_tokens=40))
            accepted += ahead.statistics.accepted
            assert found == list(plain.generate(prompt, max_new_tokens=40))
        assert max(accepted) > 1
