"""Calibrating and evaluating, on a checkpoint of two layers and random weights, by the code that real models take."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers import machine
from helpers.calibrate import calibrating, folding
from helpers.calibrate.calibrating import calibrate
from helpers.calibrate.evaluate import Weights, evaluate, table
from helpers.calibrate.gptq import compensate, inverse_factor
from helpers.calibrate.layers import Layers, matrices
from helpers.calibrate.rounding import quantise, rounded
from helpers.calibrate.texts import PIECE, pieces_of, python_text, read_text
from helpers.checkpoint.modeling import build_model
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.checkpoint.weights import Checkpoint
from helpers.cli import main
from helpers.errors import UserError
from tests.unit.small_nets import write_random_checkpoint

TOKENS = 4 * PIECE


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Other tests take the other core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("calibrate") / "random")
    (folder / "tokenizer_config.json").write_text(json.dumps({"qwen_tokenizer_ranks": 500}))
    (folder / "qwen.tiktoken").unlink(missing_ok=True)
    # As in trained models, some of what goes into the products is much larger than the rest.
    generator, weights = torch.Generator().manual_seed(2), load_file(folder / "model.safetensors")
    for name in weights:
        if ".ln_" in name:
            weights[name] = torch.randn(weights[name].shape, generator=generator).exp().bfloat16()
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def calibrated(checkpoint):
    return calibrate(checkpoint, checkpoint.parent / "int4", tokens=TOKENS)


@pytest.fixture(scope="module")
def unseen(checkpoint):
    """Text that is not calibrated on, ids [2, T]."""
    return pieces_of(python_text(for_calibration=False), QwenTokenizer.open(checkpoint), 2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_layers_are_those_of_the_checkpoints_own_code(tiny, tokenizer):
    ids = torch.tensor([tokenizer.encode("What is a bank of local memory? A part of it.")])
    layers = Layers(Checkpoint.open(tiny), ids.shape[1])
    with torch.no_grad():
        right = build_model(tiny)(ids, output_hidden_states=True, use_cache=False).hidden_states
        states = layers.embed(ids)
        for i in range(layers.checkpoint.layers - 1):
            states = layers.block(layers.weights(f"transformer.h.{i}"), states)
            torch.testing.assert_close(states, right[i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("before", [name for name in folding.FOLDS if name != "ln_f"])
def test_a_fold_changes_no_output(checkpoint, before):
    layers = Layers(Checkpoint.open(checkpoint), 8)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 8, layers.checkpoint.hidden_size, generator=generator)
    weights = layers.weights("transformer.h.1")
    right = layers.block(weights, states)
    folded = dict(weights)
    inputs = folded[f"{folding.FOLDS[before][0]}.weight"].shape[1]
    folding.fold(folded, before, torch.rand(inputs, generator=generator) * 3 + 0.2)
    assert not torch.equal(folded[f"{folding.FOLDS[before][0]}.weight"], weights[f"{folding.FOLDS[before][0]}.weight"])
    torch.testing.assert_close(layers.block(folded, states), right, rtol=1e-4, atol=1e-4)


def test_nor_does_the_order_of_the_inner_values(checkpoint):
    layers = Layers(Checkpoint.open(checkpoint), 8)
    states = torch.randn(1, 8, layers.checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))
    weights, inner = layers.weights("transformer.h.0"), {}
    right = layers.block(weights, states, lambda name, seen, _: inner.update({name: seen[0]}))
    ordered = dict(weights)
    folding.order_inner(ordered, inner["mlp.c_proj"])
    assert not torch.equal(ordered["mlp.c_proj.weight"], weights["mlp.c_proj.weight"])
    torch.testing.assert_close(layers.block(ordered, states), right, rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 999),
    shift=st.sampled_from([0.0, 0.5, -2.0]),
    size=st.sampled_from([1e-9, 1e-3, 0.05, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_compiler_finds_the_compensated_weights_again(seed, shift, size, dtype):
    """Also of groups that are all zero, all equal, or far from zero; `compensate` looks at the codes itself."""
    generator = torch.Generator().manual_seed(seed)
    weight = size * (torch.randn(6, 128, generator=generator) + shift)
    weight[0], weight[1, :64] = 0, size
    inputs = torch.randn(200, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    found = compensate(weight, inverse_factor(inputs.T @ inputs), dtype)
    assert found.dtype == dtype and found.shape == weight.shape
    codes, grid = quantise(found, 4)
    assert (codes.amin(-1) == 0).all() and (codes.amax(-1) == 15).all()
    if dtype != torch.float16:  # which is coarser than bfloat16 where weights are tiny
        assert torch.equal(grid.values(codes).view_as(weight), rounded(found, "bf16"))


def test_compensating_beats_rounding_to_nearest():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    inputs = torch.randn(1000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    ours = rounded(compensate(weight, inverse_factor(inputs.T @ inputs), torch.float32), "int4")
    errors = [float((inputs @ (found - weight).T).norm()) for found in (ours, rounded(weight, "int4"))]
    assert errors[0] < 0.7 * errors[1]


def test_a_calibrated_checkpoint_is_the_same_in_layout_and_better_in_int4(checkpoint, calibrated, unseen):
    one, other = Checkpoint.open(checkpoint), Checkpoint.open(calibrated)
    assert one.names() == other.names() and (calibrated / "modeling_qwen.py").is_file()
    for name, tensor in other.tensors(""):
        (_, before), *_ = one.tensors(name)
        assert (tensor.dtype, tensor.shape) == (before.dtype, before.shape)
    rows = [
        Weights("bf16", checkpoint, "bf16"),
        Weights("int8", checkpoint, "int8"),
        Weights("int4", checkpoint, "int4"),
        Weights("calibrated", calibrated, "int4"),
        Weights("calibrated, in bf16", calibrated, "bf16"),
        Weights("int4, head int8", checkpoint, "int4", "int8"),
    ]
    costs = evaluate(checkpoint, rows, unseen)
    kl = {cost.label: cost.kl.value for cost in costs}
    assert kl["float32"] == 0 and kl["bf16"] < kl["int8"] < kl["calibrated"] < 0.6 * kl["int4"]
    assert kl["int4, head int8"] < kl["int4"]
    # Its weights are what int4 makes of them.
    assert kl["calibrated, in bf16"] == kl["calibrated"]
    own, first = costs[3].own, costs[3].accumulated[0]
    assert len(own) == one.layers and abs(own[0] - first) < 0.1 * first
    shown = table(costs)
    assert shown[0]["same token"] == "100.0 ± 0.0 %" and shown[3]["tokens"] == str(2 * PIECE)


def test_folds_alone_are_the_same_function_in_float(checkpoint, tmp_path, unseen):
    folded = calibrate(checkpoint, tmp_path / "folded", tokens=TOKENS, compensation=False)
    costs = evaluate(checkpoint, [Weights(m, folded, m) for m in ("bf16", "int4")], unseen)
    plain = evaluate(checkpoint, [Weights("int4", checkpoint, "int4")], unseen)[1]
    assert costs[1].kl.value < 0.02 * plain.kl.value and costs[2].kl.value < plain.kl.value


def test_a_head_in_int8_is_left_to_itself(checkpoint, tmp_path):
    out = calibrate(checkpoint, tmp_path / "out", head_mode="bf16", tokens=TOKENS)
    one, other = (Checkpoint.open(path).load("lm_head") for path in (checkpoint, out))
    assert torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert matrices(["lm_head.weight", "ln_1.weight"]) == ["lm_head.weight"]


def test_killed_it_goes_on_where_it_was(checkpoint, calibrated, tmp_path):
    out, code = (
        tmp_path / "int4",
        (
            "import os, signal, sys\nfrom helpers.calibrate import calibrating\n"
            "import torch\ntorch.set_num_threads(1)\n"
            "save = calibrating._save\n"
            "def _save(file, tensors):\n"
            "    if file.name == sys.argv[3]:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    save(file, tensors)\n"
            "calibrating._save = _save\n"
            f"calibrating.calibrate(sys.argv[1], sys.argv[2], tokens={TOKENS})\n"
        ),
    )
    for at in ("states.safetensors", "lm_head.safetensors"):
        done = subprocess.run([sys.executable, "-c", code, checkpoint, out, at], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not out.exists()
    kept = (out.with_name("int4.partial") / "block_1.safetensors").stat().st_mtime_ns
    calibrate(checkpoint, out, tokens=TOKENS)
    assert (out / "block_1.safetensors").stat().st_mtime_ns == kept
    assert contents(out) == contents(calibrated) and not out.with_name("int4.partial").exists()
    # And again: nothing is made anew.
    calibrate(checkpoint, out, tokens=TOKENS)
    assert (out / "block_1.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    "content, said", [(b"too short", "tokens, 1024 were needed"), ("Größe".encode("latin-1") * 999, "not UTF-8 text")]
)
def test_a_text_that_cannot_be_used(checkpoint, tmp_path, capsys, content, said):
    (tmp_path / "text").write_bytes(content)
    command = ["calibrate", "-m", checkpoint, "--out", tmp_path / "out", "--text", tmp_path / "text"]
    assert main([*map(str, command), "--tokens", str(TOKENS)]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_text_may_be_cut_within_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.calibrate.texts.MAX_CHARACTERS", 100)
    (tmp_path / "text").write_text("a" + "漢" * 500, encoding="utf-8")
    assert read_text(tmp_path / "text") == "a" + "漢" * 99


def test_a_checkpoint_is_calibrated_once(calibrated, tmp_path, capsys):
    assert json.loads((calibrated / "config.json").read_bytes())["calibrated"]["mode"] == "int4"
    before = contents(calibrated)
    assert main(["calibrate", "-m", str(calibrated), "--out", str(tmp_path / "again")]) == 2
    assert "is calibrated already" in capsys.readouterr().err
    assert contents(calibrated) == before and not (tmp_path / "again").exists()


@pytest.mark.parametrize("what, said", [("free_memory", "GB of memory, 0.0"), ("free_disk", "GB of disk, 0.000")])
def test_too_little_room_is_said_before_the_first_layer(checkpoint, tmp_path, monkeypatch, what, said):
    monkeypatch.setattr(machine, what, lambda *_: 1000)
    with pytest.raises(UserError, match=said):
        calibrate(checkpoint, tmp_path / "out", tokens=TOKENS)
    assert os.listdir(tmp_path) == []


def test_a_part_that_cannot_be_written_is_said_in_one_sentence(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            calibrating._save(tmp_path / "part.safetensors", {"weight": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "part.safetensors").exists()


def test_what_it_cannot_round_for(checkpoint, tmp_path):
    with pytest.raises(UserError, match="mode is 'bf16'"):
        calibrate(checkpoint, tmp_path / "out", mode="bf16")
    with pytest.raises(UserError, match="tokens is 9, it must be 256 or more"):
        calibrate(checkpoint, tmp_path / "out", tokens=9)
    with pytest.raises(UserError, match="holds something else"):
        calibrate(checkpoint, checkpoint)
    odd = tmp_path / "odd"
    shutil.copytree(checkpoint, odd)
    config = json.loads((odd / "config.json").read_bytes())
    (odd / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * 96}))
    with pytest.raises(UserError, match="96 inputs, which groups of 64 weights do not divide"):
        calibrate(odd, tmp_path / "out")


def test_the_two_halves_of_the_text_share_no_paragraph():
    halves = [set(python_text(half).split("\n\n")) for half in (True, False)]
    assert min(map(len, halves)) > 500 and not halves[0] & halves[1]
    assert calibrating.TOKENS % PIECE == 0
