"""Rounding in PyTorch is the compiler's own: the bytes of its bmodels, and the bits that the simulator computes."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from helpers.calibrate.gptq import compensate, inverse_factor
from helpers.calibrate.rounding import BITS, grid_between, quantise, round_half_away, rounded
from helpers.compile import jobs
from helpers.compile.options import net_settings
from helpers.nets import decode_mask, prefill_mask
from helpers.tensors import from_bf16, to_bf16
from tests.unit import small_nets
from tests.unit.small_nets import HIDDEN, S, outputs_on_simulator, task

NETS = ("lm_head", "block_0", "block_cache_0")


def edge_groups(generator):
    """Groups that a model seldom has, a row each: float32 [12, 64]."""
    noise = torch.randn(12, 64, generator=generator)
    noise[0] = 0
    noise[1] = 0.25  # without a range, and far from zero
    noise[2] = noise[2].abs() + 3  # zero lies outside of the range, and so do the codes
    noise[3] = -noise[3].abs() - 3
    noise[4] *= 1e-7
    noise[5] *= 1e4
    noise[6] = torch.arange(64) % 31 / 2 - 7.5  # every second weight is halfway between two codes of int4
    noise[7] = torch.arange(64) * 4 % 511 / 2 - 127.5
    noise[8] = -0.0
    noise[9, 5] = 100
    return noise


def matrices(model):
    return [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and "MatMul" in tensor.name]


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Nets with odd groups in the head, and calibrated ones; the same with weights as int8 and int4 round them; what
    was in them."""
    root = tmp_path_factory.mktemp("rounding")
    small_nets.write_nets(root / "onnx", nets=NETS)
    weights = {}
    for net in NETS:
        model = onnx.load(root / "onnx" / f"{net}.onnx")
        weights[net] = [torch.tensor(numpy_helper.to_array(tensor).T) for tensor in matrices(model)]
        if net == "lm_head":
            generator = torch.Generator().manual_seed(3)
            inputs = torch.randn(200, HIDDEN, generator=generator)
            weights[net][0][:12] = edge_groups(generator)
            factor = inverse_factor(inputs.T @ inputs)
            weights[net][0][64:128] = compensate(weights[net][0][64:128], factor, torch.float32)
        for folder, mode in (("onnx", None), ("int8", "int8"), ("int4", "int4")):
            (root / folder).mkdir(exist_ok=True)
            for tensor, weight in zip(matrices(model), weights[net], strict=True):
                values = rounded(weight, mode) if mode else weight
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values.T.numpy()), tensor.name))
            onnx.save(model, root / folder / f"{net}.onnx")
    return root, weights


def compiled(root, onnx_folder, net, mode):
    return jobs.compile_net(
        task(root / onnx_folder, root / f"{onnx_folder}_{mode}", net, net_settings(net, mode, 1, "basic", False))
    )["bmodel"]


def inputs_of(net):
    generator = np.random.default_rng(1)
    states, past = generator.normal(size=(1, S, HIDDEN)), generator.normal(size=(2, 1, S, 2, HIDDEN // 2))
    positions = np.arange(S, dtype=np.int32)[None]
    if net == "lm_head":
        return [to_bf16(states[0, :1])]
    if net == "block_0":
        return [to_bf16(states), positions, to_bf16(prefill_mask(20, S))]
    return [to_bf16(states[:, :1]), positions[:, 20:21], to_bf16(decode_mask(20, S)), *map(to_bf16, past)]


def on_lanes(parameters):
    """A row's scales or zero points [rows, groups] as the compiler stores them: row i on lane i % 64."""
    rows, groups = parameters.shape
    lanes = min(64, rows)
    return parameters.reshape(rows // lanes, lanes, groups).swapaxes(0, 1).tobytes()


@pytest.mark.parametrize(
    "net, mode", [("lm_head", "int8"), ("lm_head", "int4"), ("block_0", "int8"), ("block_cache_0", "int4")]
)
def test_the_bmodel_has_just_these_bytes_and_computes_just_these_bits(nets, net, mode):
    root, weights = nets
    bmodel = compiled(root, "onnx", net, mode)
    with open(bmodel, "rb") as file:
        content = file.read()
    for weight in weights[net]:
        # The compiler makes three products of c_attn.
        for part in weight.split(HIDDEN) if len(weight) == 3 * HIDDEN and net != "lm_head" else [weight]:
            codes, grid = quantise(part, BITS[mode])
            codes = codes.reshape(part.shape).numpy().astype(np.uint8)
            assert (codes[:, ::2] | codes[:, 1::2] << 4 if mode == "int4" else codes).tobytes() in content
            assert on_lanes(to_bf16(grid.scale.numpy())) in content
            assert on_lanes(grid.zero.numpy().astype(np.uint8)) in content
    found = outputs_on_simulator(bmodel, net, inputs_of(net))
    expected = outputs_on_simulator(compiled(root, mode, net, "bf16"), net, inputs_of(net))
    for ours, theirs in zip(found, expected, strict=True):
        values = from_bf16(ours) if ours.dtype == np.uint16 else ours
        assert np.isfinite(values).all() and np.any(values)
        np.testing.assert_array_equal(ours, theirs)


def test_halves_are_rounded_away_from_zero():
    below = np.nextafter(np.float32(0.5), np.float32(0))
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -2.5, float(below), -float(below), 3.0, 1e9])
    assert round_half_away(values).tolist() == [1, 2, 3, -1, -3, 0, 0, 3, 1e9]


def test_a_grid_holds_its_ends():
    grid = grid_between(torch.tensor([-1.0]), torch.tensor([2.0]), 4)
    assert grid.zero == 5 and grid.codes(torch.tensor([[-1.0, 0, 2.0]]), 4).tolist() == [[0, 5, 15]]
