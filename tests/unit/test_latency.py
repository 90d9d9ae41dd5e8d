import numpy as np
import pytest

from helpers import nets
from helpers.notebook import plots
from helpers.run import latency
from helpers.run.engines import open_engine
from tests.unit.numpy_engine import NumpyEngine, RandomModel


def test_phases_name_every_net_of_a_token_in_order():
    phases = nets.phase_nets(2, ["lm_head", "greedy_head"])
    assert phases["prefill"] == ["embedding", "block_0", "block_1", "lm_head", "greedy_head"]
    assert phases["decode"] == ["embedding_cache", "block_cache_0", "block_cache_1", "lm_head", "greedy_head"]


def test_summary_is_median_and_p95_in_ms():
    figures = latency.summary([0.001 * value for value in (*range(1, 100), 1000)])
    assert figures == {"median_ms": 50.5, "p95_ms": 95.05, "count": 100}
    assert latency.summary([])["count"] == 0


@pytest.mark.slow
def test_measuring_counts_repetitions_without_warm_up_and_names_its_kind(bmodel_tiny, tmp_path):
    with open_engine(bmodel_tiny, engine="simulator") as engine:
        record = latency.measure(engine, [8], new_tokens=2, warmup=1, repetitions=2)
    assert record["kind"] == "simulator wall"
    (prompt,) = record["prompts"]
    assert (prompt["tokens"], prompt["first_token"]["count"], prompt["decode"]["count"]) == (8, 2, 4)
    assert record["nets"]["block_0"]["count"] == 2 and record["nets"]["block_cache_3"]["count"] == 4


def test_figures_net_by_net_are_those_of_every_prompt():
    runs = []

    class Counting(NumpyEngine):
        def run(self, net, inputs, outputs):
            runs.append(net)
            super().run(net, inputs, outputs)

    engine = Counting(RandomModel(vocabulary=300, seed=1), seq_length=16)
    record = latency.measure(engine, [2, 8], new_tokens=3, warmup=1, repetitions=2)
    assert runs.count("block_0") == 2 * (1 + 2)
    assert [prompt["decode"]["count"] for prompt in record["prompts"]] == [6, 6]
    assert record["nets"]["block_0"]["count"] == 4 and record["nets"]["block_cache_1"]["count"] == 12


MS = {"embedding": 1.0, "block_0": 2.0, "embedding_cache": 0.5, "block_cache_0": 1.0, "lm_head": 0.5}


def test_shares_name_the_kind_of_time_or_set_kinds_side_by_side():
    one = plots.net_share({"int8": MS}, 1, "estimated")
    assert [axis.get_xlabel() for axis in one.axes] == ["ms, estimated by the compiler's cycle model"] * 2
    two = plots.net_share({"estimated": MS | {"greedy_head": None}, "measured": MS | {"greedy_head": 0.1}}, 1)
    for axis in two.axes:
        assert [text.get_text().replace("\n", " ") for text in axis.get_yticklabels()] == [
            "estimated by the compiler's cycle model",
            "measured on a chip",
        ]
    assert "greedy_head" in [text.get_text() for text in two.legends[0].get_texts()]


def test_the_ladder_has_no_mark_where_nothing_differs_and_no_line_over_nets_that_it_has_not():
    rung = {"embedding": {"max_abs": 0.0, "cosine": 1.0}, "block_0": {"max_abs": 1e-3, "cosine": 1 - 1e-12}}
    other = rung | {"lm_head": {"max_abs": 1e-2, "cosine": 0.999}}
    figure = plots.parity_ladder({"one": rung, "other": other})
    values = [line.get_ydata() for line in figure.axes[0].lines]
    assert [np.isnan(line).tolist() for line in values] == [[True, False, True], [True, False, False]]
    assert figure.axes[1].lines[0].get_ydata()[1] == pytest.approx(1e-12, rel=1e-3)
    for axis in plots.parity_ladder({"one": rung}).axes:
        low, high = axis.get_ylim()
        assert len([tick for tick in axis.get_yticks() if low <= tick <= high]) > 1
