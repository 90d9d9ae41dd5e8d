import pytest

from helpers import latency, plots
from helpers.engines import open_engine


def test_phases_name_every_net_of_a_token_in_order():
    phases = latency.phase_nets(2, ["lm_head", "greedy_head"])
    assert phases["prefill"] == ["embedding", "block_0", "block_1", "lm_head", "greedy_head"]
    assert phases["decode"] == ["embedding_cache", "block_cache_0", "block_cache_1", "lm_head", "greedy_head"]


def test_summary_is_median_and_p95_in_ms():
    figures = latency.summary([0.001 * value for value in range(1, 101)])
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
    figure = plots.latency_over_prompts(record, {"first_token_ms": 1.0, "decode_ms": 1.0})
    titles = [axis.get_title() for axis in figure.axes]
    assert all("simulator wall time, not the chip's" in title for title in titles)
    # The estimate of a chip is not drawn beside a simulator's own time.
    assert not any("cycle model" in text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts())
