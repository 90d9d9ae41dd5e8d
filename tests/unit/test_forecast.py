"""The forecast: the cycles of the model that is compiled, near what was published; what is no model is said."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import fit_forecast
from helpers import artefacts
from helpers.checkpoint.weights import Checkpoint
from helpers.errors import UserError
from helpers.fetch.fetching import MODELS
from helpers.forecast import compiling, figures, forecasting
from helpers.forecast.shape import SIZES, shape_of
from helpers.nets import net_kind
from tests.conftest import SEQ_LENGTH

FORECAST = [sys.executable, "-m", "helpers", "forecast"]


@pytest.fixture(scope="session")
def shape_of_tiny(tiny):
    checkpoint = Checkpoint.open(tiny)
    return shape_of(**{size: getattr(checkpoint, size) for size in SIZES}, mode="bf16", seq_length=SEQ_LENGTH)


def test_nets_of_random_weights_cost_what_the_models_own_do(shape_of_tiny, bmodel_tiny, tmp_path, in_turn):
    with in_turn:
        found = forecasting.figures_of(shape_of_tiny, tmp_path)
    nets = artefacts.read_manifest(bmodel_tiny)["nets"]
    compiled = {net_kind(net): record["cycles"] for net, record in nets.items()}
    assert {kind: nets["cycles"] for kind, nets in found.items()} == {kind: compiled[kind] for kind in figures.KINDS}
    # And what was compiled once is known from then on.
    assert set(map(lambda kind: figures.key_of(kind, shape_of_tiny), figures.KINDS)) <= figures.known(tmp_path).keys()


def test_the_estimate_of_a_compiled_model_and_its_forecast_differ_by_the_constants_alone(shape_of_tiny, bmodel_tiny):
    estimates = artefacts.read_manifest(bmodel_tiny)["estimates"]
    nets = artefacts.read_manifest(bmodel_tiny)["nets"]
    kinds = {net_kind(net): record for net, record in nets.items()}
    first, token = (sum(forecasting.cycle_seconds(shape_of_tiny, kinds, suffix).values()) for suffix in ("", "_cache"))
    assert first * 1e3 == pytest.approx(estimates["first_token_ms"])
    assert token * 1e3 == pytest.approx(estimates["decode_ms"])
    constants = forecasting.Constants(prefill_share=0.5, launch_s={"python": 0.001, "c++": 0.0}, cache_passes=0)
    waiting = forecasting.phase_seconds(shape_of_tiny, kinds, "", constants)
    assert sum(waiting.values()) == pytest.approx(2 * first)
    started = {
        program: sum(forecasting.phase_seconds(shape_of_tiny, kinds, "_cache", constants, program).values())
        for program in forecasting.PROGRAMS
    }
    assert started["c++"] == pytest.approx(token)
    assert started["python"] == pytest.approx(token + 0.001 * (shape_of_tiny.layers + 2))


def test_the_constants_are_those_of_the_fit():
    assert fit_forecast.fit(fit_forecast.published_rows()) == forecasting.CONSTANTS


def test_published_rows_are_near_their_forecast():
    rows = fit_forecast.published_rows()
    lines = fit_forecast.errors(rows, forecasting.CONSTANTS)
    assert len(lines) == 14 and {line["model"] for line in lines} == set(fit_forecast.SHAPES)
    first, tokens = (np.abs([line[key] for line in lines]) for key in ("off, s", "off, token/s"))
    agreeing = tokens[~np.array(fit_forecast.contradicted(rows))]
    assert np.median(tokens) <= 0.15 and agreeing.max() <= 0.25 and first.max() <= 0.25
    # The intervals are as wide as the fit was off.
    assert first.max() <= forecasting.FIRST_TOKEN_SPREAD - 1 and agreeing.max() <= forecasting.TOKENS_SPREAD - 1


def test_rows_that_contradict_others_are_those_far_from_the_rest_of_their_kind():
    rows = fit_forecast.published_rows()
    found = [row for row, far in zip(rows, fit_forecast.contradicted(rows), strict=True) if far]
    assert [(row.model, row.tokens_per_s) for row in found] == [("Qwen-7B-Chat", 12.37), ("Baichuan2-7B-Chat", 7.603)]


def test_a_model_left_out_is_forecast_from_the_others():
    rows = fit_forecast.published_rows()
    assert len(fit_forecast.left_out(rows)) == len(rows)


def test_the_command_prints_one_object_with_what_was_asked():
    done = subprocess.run(
        [*FORECAST, "--name", "qwen-7b", "--mode", "int4", "--host", "soc", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["kind"] == "estimated" and found["fits"] == {"soc": True}
    for key in ("first_token_s", "tokens_per_s"):
        low, high = found[f"{key}_interval"]
        assert 0 < low < found[key] < high
    assert found["device_bytes"] == sum(found["device_parts"].values()) > MODELS["qwen-7b"].weight_bytes / 4
    # The vocabulary is bfloat16 in all modes, the cache has keys and values of all layers.
    assert found["device_parts"]["KV cache"] == 2 * 2 * 32 * 512 * 4096


def test_the_sizes_by_hand_are_the_model_by_name():
    model = MODELS["qwen-7b"]
    sizes = [word for size in SIZES for word in (f"--{size}", str(getattr(model, size)))]
    outputs = [
        subprocess.check_output([*FORECAST, *which, "--mode", "int8", "--json"])
        for which in (sizes, ["--name", "qwen-7b"])
    ]
    assert outputs[0] == outputs[1]


SMALL = "--hidden_size 256 --intermediate_size 512 --layers 2 --heads 4 --vocab_size 3008".split()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--name", "qwen-70b"], "No size is known for qwen-70b"),
        (["--name", "qwen-7b", "--layers", "3"], "leave --layers out"),
        (["--hidden_size", "256"], "is missing"),
        ([*SMALL, "--heads", "3"], "--heads 3 does not divide --hidden_size 256"),
        ([*SMALL, "--layers", "0"], "--layers is 0"),
        ([*SMALL, "--mode", "int4", "--intermediate_size", "500"], "groups of 64"),
        ([*SMALL, "--mode", "int4", "--hidden_size", "160"], "groups of 64"),
        ([*SMALL, "--mode", "int2"], "mode is 'int2'"),
        ([*SMALL, "--num_device", "3"], "num_device 3 does not divide the 4 attention heads"),
        ([*SMALL, "--seq_length", "1000000"], "S = 1000000 takes 2002.0 GB of memory of a device"),
    ],
)
def test_what_no_such_model_has_is_one_sentence(arguments, told):
    done = subprocess.run([*FORECAST, *arguments], capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and told in errors[0] and "Traceback" not in done.stderr


def test_a_disk_without_room_is_said_before_the_first_net(monkeypatch, tmp_path, shape_of_tiny):
    monkeypatch.setattr(compiling.machine, "free_disk", lambda _: 1000)
    with pytest.raises(UserError, match="on the disk that holds"):
        compiling.compile_figures(shape_of_tiny, ["block"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_entry_of_the_atlas_has_figures_or_what_the_compiler_said():
    for key, entry in json.loads(figures.ATLAS.read_text(encoding="utf-8")).items():
        assert entry.keys() in ({"error"}, {"cycles", "weight_bytes", "instruction_bytes", "scratch_bytes"}), key


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("seq_length", [512, 2048, 8192])
@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["qwen-1_8b", "qwen-7b", "qwen-14b"])
def test_the_atlas_answers_for_every_documented_point(name, mode, seq_length, devices, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "compile_figures", lambda *_: pytest.fail("it is compiled"))
    found = forecasting.forecast(shape_of(name, mode=mode, seq_length=seq_length, num_device=devices), out=tmp_path)
    assert 0 < found.first_token_s < 60 and 1 < found.tokens_per_s < 60
