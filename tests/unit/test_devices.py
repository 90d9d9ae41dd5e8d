"""Nets split over several devices: the parts of each run on the simulator, what they exchange is carried by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest

from helpers import toolchain
from helpers.bmodel.bmodel import read_bmodel
from helpers.compile import graph, jobs
from helpers.compile.options import net_settings
from helpers.nets import decode_mask, prefill_mask
from helpers.tensors import from_bf16, to_bf16
from tests.conftest import ROOT
from tests.unit import small_nets
from tests.unit.small_nets import S, outputs_on_simulator, task

HIDDEN, HEADS = 1024, 8
# 65 groups of 64: the devices' shares differ.
FF = 4160
TOKENS = 21


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """One block with matrices that the compiler finds worth splitting."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HIDDEN": HIDDEN, "HEADS": HEADS, "FF": FF}.items():
            patch.setattr(small_nets, name, value)
        return small_nets.write_nets(tmp_path_factory.mktemp("larger") / "onnx", nets=("block_0", "block_cache_0"))


@pytest.fixture(scope="module")
def compiled(nets, tmp_path_factory):
    """(net, mode, devices) -> record of the compiled net."""
    records = {}

    def compile_net(net, mode, devices):
        if (net, mode, devices) not in records:
            settings = net_settings(net, mode, devices, "io_alone", False)
            folder = tmp_path_factory.mktemp(f"{mode}_{devices}dev")
            records[net, mode, devices] = jobs.compile_net(task(nets, folder, net, settings))
        return records[net, mode, devices]

    return compile_net


def inputs_of(net):
    random = np.random.default_rng(0)

    def states(*shape):
        return to_bf16(random.standard_normal(shape).astype(np.float32))

    if net == "block_0":
        positions = np.zeros((1, S), np.int32)
        positions[0, :TOKENS] = np.arange(TOKENS)
        mask = to_bf16(prefill_mask(TOKENS, S))
        return {"input_states": states(1, S, HIDDEN), "position_ids": positions, "attention_mask": mask}
    past = (1, S, HEADS, HIDDEN // HEADS)
    return {
        "input_states": states(1, 1, HIDDEN),
        "position_ids": np.full((1, 1), TOKENS, np.int32),
        "attention_mask": to_bf16(decode_mask(TOKENS, S)),
        "history_k": states(*past),
        "history_v": states(*past),
    }


def run_parts(onnx, mode, devices, folder, inputs):
    """Outputs of each device's part in a net: states, key, value. inputs: name to array; the cache is cut by heads."""
    folder.mkdir()
    env = toolchain.environment(threads=1)
    env["PYTHONPATH"] = f"{ROOT}:{env['PYTHONPATH']}"
    command = [sys.executable, "-m", "tests.unit.device_parts", str(onnx), mode, str(devices)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    net = json.loads((folder / "parts.json").read_text())
    made = {}
    for name, part in sorted(net["parts"].items(), key=lambda item: (item[1]["step"], item[1]["device"])):
        share = slice(part["device"] * HEADS // devices, (part["device"] + 1) * HEADS // devices)
        arrays = []
        for source in part["inputs"]:
            if source in made:
                arrays.append(made[source])
            elif source.startswith("history"):
                arrays.append(inputs[source.removesuffix(f"_{part['device']}")][:, :, share])
            else:
                arrays.append(inputs[source])
        outputs = outputs_on_simulator(folder / f"{name}.bmodel", name, arrays)
        made |= dict(zip(part["outputs"], outputs, strict=True))
    return [[made[f"{output}_{device}"] for output in net["outputs"]] for device in range(devices)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, net, devices",
    [("bf16", "block_0", 2), ("int8", "block_0", 2), ("int8", "block_cache_0", 4), ("int4", "block_cache_0", 2)],
)
def test_what_several_devices_compute_is_what_one_does(nets, compiled, tmp_path, mode, net, devices):
    inputs = inputs_of(net)
    parts = run_parts(nets / f"{net}.onnx", mode, devices, tmp_path / "parts", inputs)
    expected = outputs_on_simulator(compiled(net, mode, 1)["bmodel"], net, list(inputs.values()))
    rows = TOKENS if net == "block_0" else 1
    states, *keys_and_values = (output[:, :rows] for output in expected)
    for whole, *shares in zip(keys_and_values, *(part[1:] for part in parts), strict=True):
        np.testing.assert_array_equal(np.concatenate([share[:, :rows] for share in shares], axis=2), whole)
    # The sum over devices is rounded to bfloat16 in another order.
    wanted = from_bf16(states)
    for part in parts:
        np.testing.assert_allclose(from_bf16(part[0][:, :rows]), wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("mode, net", [("int8", "block_0"), ("int4", "block_cache_0")])
def test_two_devices_share_the_heads_and_the_weights(compiled, mode, net):
    records = {devices: compiled(net, mode, devices) for devices in (1, 2)}
    read = read_bmodel(records[2]["bmodel"])
    assert read.device_num == 2
    info = read.nets[net].info
    # Device by device, as the runtime takes them: states, position, mask (past key, past value); states, key, value.
    count = 3 if net == "block_0" else 5
    assert [tensor.device for tensor in info.inputs] == [0] * count + [1] * count
    assert [tensor.device for tensor in info.outputs] == [0] * 3 + [1] * 3
    for tensor in (*info.inputs[3:count], *info.inputs[count + 3 :], *info.outputs[1:3], *info.outputs[4:]):
        assert tensor.shape[2:] == (4, 128)
    assert records[2]["cycles"] < 0.75 * records[1]["cycles"]


def test_projections_are_put_in_order_whatever_order_they_come_in():
    def net(order):
        lines = ['    %1 = "tpu.RMSNorm"(%arg0) : (t) -> t', '    %2 = "top.Input"(%arg1) : (t) -> t']
        for letter in order:
            number = {"q": 10, "k": 20, "v": 30}[letter]
            lines += [
                f'    %{number} = "top.Weight"() : () -> w loc(#{letter})',
                f'    %{number + 1} = "tpu.A16MatMul"(%1, %{number}) : (t, w) -> t loc(#{letter})',
            ]
        lines += [
            '    %40 = "tpu.Concat"(%2, %21) {axis = 1 : si32} : (t, t) -> t',
            '    %41 = "tpu.FAttention"(%11, %40, %31, %3) : (t, t, t, t) -> t',
        ]
        return "\n".join(lines)

    for order in ("vkq", "kqv", "qkv"):
        assert graph.order_projections(net(order)) == net("qkv")
    assert graph.order_projections("no attention\n%1") == "no attention\n%1"


def test_groups_are_paired_only_where_int8_weights_are_cut_along_them():
    def product(number, operand, bits, group):
        attributes = f"{{q_group_size = {group} : i64, w_transpose = true, weight_bits = {bits} : i64}}"
        types = "tensor<1x64xbf16>, tensor<2048x1024xsi8>, tensor<2048x16xbf16>, tensor<2048x16xui8>, none"
        return f'    %{number} = "tpu.A16MatMul"(%{operand}, %2) {attributes} : ({types}) -> t'

    def net(bits, group):
        lines = ['    %1 = "tpu.RMSNorm"(%arg0) : (t) -> t', '    %3 = "tpu.Cast"(%1) : (t) -> t']
        lines += [product(4, 3, bits, 64), '    %5 = "tpu.Mul"(%4, %4) : (t) -> t', product(6, 5, bits, group)]
        return "\n".join(lines)

    assert graph.pair_groups(net(8, 64)) == net(8, 128)
    assert graph.unpair_groups(net(8, 128)) == net(8, 64)
    assert graph.pair_groups(net(4, 64)) == graph.unpair_groups(net(4, 64)) == net(4, 64)
