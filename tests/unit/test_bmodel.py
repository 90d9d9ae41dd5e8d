import os
import socket
import struct
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.bmodel.bmodel import read_bmodel, require_qwen, strip_time
from helpers.bmodel.model_tool import combine
from helpers.compile import compiling
from helpers.errors import UserError
from tests.unit import small_nets


@pytest.fixture(scope="module")
def bmodel(tmp_path_factory):
    """A small Qwen bmodel, compiled."""
    folder = tmp_path_factory.mktemp("bmodel")
    onnx = small_nets.write_nets(folder / "onnx")
    return compiling.compile_model(onnx, folder / "out", "small", "int8", addr_mode="io_alone")


@pytest.fixture(scope="module")
def contents(bmodel):
    return bmodel.read_bytes()


def test_it_says_what_the_wheels_own_tool_says(bmodel):
    from helpers import toolchain

    tool = toolchain.wheel_path() / "bin" / "model_tool"
    said = subprocess.run(
        [tool, "--info", bmodel], env=toolchain.environment(), capture_output=True, text=True, check=True
    ).stdout
    read = read_bmodel(bmodel)
    shown = []
    for net in read.nets.values():
        for kind, tensors in (("input", net.info.inputs), ("output", net.info.outputs)):
            shown += [f"{kind}: {t.name}, [{', '.join(map(str, t.shape))}], {t.dtype}," for t in tensors]
    assert len(shown) > 20
    assert [line for line in shown if line not in said] == []
    assert f"weight: {read.weight_bytes}," in said
    assert f"chip: {read.chip}" in said.replace("  ", " ") or read.chip in said


def test_it_reads_address_modes_and_shapes(bmodel):
    read = read_bmodel(bmodel)
    assert (read.chip, read.device_num) == ("BM1684X", 1)
    assert read.nets["block_cache_0"].info.addr_mode == "io_alone"
    assert read.nets["block_0"].info.addr_mode == "basic"
    assert not read.nets["block_0"].info.dynamic
    shape = require_qwen(read)
    assert (shape.layers, shape.seq_length, shape.hidden_size) == (1, small_nets.S, small_nets.HIDDEN)
    assert (shape.heads, shape.head_dim) == (2, 32)
    assert read.nets["lm_head"].info.outputs[0].shape == (1, small_nets.VOCAB)
    assert shape.sampling and not shape.token_head
    assert shape.cache_bytes() == 2 * 2 * small_nets.S * small_nets.HIDDEN
    # The same weights for prefill and decode are in the file once.
    assert read.nets["block_0"].weights == read.nets["block_cache_0"].weights
    assert read.weight_bytes < sum(net.weight_bytes for net in read.nets.values())


def test_reading_needs_no_library_of_sophgo_nor_torch(bmodel):
    code = (
        "import sys; from helpers.bmodel.bmodel import read_bmodel, require_qwen\n"
        f"require_qwen(read_bmodel({str(bmodel)!r}))\n"
        "assert not {'torch', 'onnx', 'tpu_mlir', 'transformers', 'flatbuffers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"", "is not a bmodel .it is empty"),
        (lambda data: b"PK\x03\x04" + data[4:], "is not a bmodel"),
        (lambda data: data[:40], "is cut off"),
        (lambda data: data[: len(data) // 2], "is cut off"),
        (lambda data: data[:-1], "is cut off"),
        (lambda data: data[:64] + b"\xff" * 4000 + data[4064:], "is damaged"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, contents, change, message):
    path = tmp_path / "bad.bmodel"
    path.write_bytes(change(contents))
    with pytest.raises(UserError, match=message):
        read_bmodel(path)


def test_a_missing_file_and_a_folder_are_one_sentence(tmp_path):
    for path in (tmp_path / "none.bmodel", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_bmodel(path)


@pytest.mark.parametrize("command", [["info"], ["chat", "--question", "hi"], ["serve", "--port", "0"]])
def test_a_pipe_a_socket_or_a_device_is_refused_at_once(tmp_path, command):
    pipe, listening = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(listening))
        for path in (pipe, listening, "/dev/zero", tmp_path):
            done = subprocess.run(
                [sys.executable, "-m", "helpers", *command, "--model", path],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=600,  # where it is opened nothing ever comes
                check=False,
            )
            said = f"error: {path} cannot be read (it is no regular file): give the path of a .bmodel file.\n"
            assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_another_chip_is_refused(tmp_path, contents):
    path = tmp_path / "other.bmodel"
    assert contents.count(b"BM1684X\0") == 1
    path.write_bytes(contents.replace(b"BM1684X\0", b"BM1688X\0"))
    with pytest.raises(UserError, match="BM1688X, BM1684X is needed"):
        require_qwen(read_bmodel(path))


@pytest.mark.parametrize("lost", ["block_cache_0", "embedding", "lm_head", "greedy_head"])
def test_a_missing_net_is_named(tmp_path, bmodel, lost):
    folder = bmodel.parent / "int8_1dev"
    nets = [net for net in read_bmodel(bmodel).nets if net != lost]
    path = tmp_path / "less.bmodel"
    combine([folder / net / f"{net}.bmodel" for net in nets], path)
    with pytest.raises(UserError, match=f"lacks the net {lost}"):
        require_qwen(read_bmodel(path))


def test_a_model_of_another_kind_is_refused(tmp_path, bmodel):
    path = tmp_path / "head.bmodel"
    combine([bmodel.parent / "int8_1dev" / "greedy_head" / "greedy_head.bmodel"], path)
    with pytest.raises(UserError, match="lacks the net embedding"):
        require_qwen(read_bmodel(path))


def test_time_is_stripped_so_equal_inputs_give_equal_bytes(tmp_path, bmodel, contents):
    assert contents.count(b"Thu Jan  1 00:00:00 1970") == 1
    path = tmp_path / "copy.bmodel"
    path.write_bytes(contents.replace(b"Thu Jan  1 00:00:00 1970", b"Wed Jul 22 12:34:56 2026"))
    strip_time(path)
    assert path.read_bytes() == contents


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_read_or_refused(tmp_path, contents, data):
    described = struct.unpack_from("<I", contents, 8)[0]
    # Enough of the file for its description; the weights are not looked at.
    damaged = bytearray(contents[: 64 + described])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(damaged) - 4))
        value = data.draw(st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 300)))
        struct.pack_into("<I", damaged, at, value)
    path = tmp_path / "damaged.bmodel"
    path.write_bytes(damaged)
    with open(path, "r+b") as file:
        file.truncate(len(contents))
    try:
        require_qwen(read_bmodel(path))
    except UserError:
        pass


# The command `info`


def test_the_memory_report_counts_shared_weights_once(bmodel):
    from helpers.bmodel.report import memory_report

    report = memory_report(read_bmodel(bmodel))
    nets = report["nets"]
    assert report["weights"] < sum(net["weights"] for net in nets.values())
    assert report["scratch"] == max(net["scratch"] for net in nets.values())
    assert report["cache"] == 2 * 2 * small_nets.S * small_nets.HIDDEN
    assert report["total"] == sum(report[key] for key in ("weights", "instructions", "scratch", "cache"))


def test_info_on_the_command_line(bmodel, tmp_path):
    command = [sys.executable, "-m", "helpers", "info"]
    shown = subprocess.run([*command, "--model", bmodel], capture_output=True, text=True, check=True).stdout
    assert "block_cache_0" in shown and "io_alone" in shown and "1 layers" in shown
    (tmp_path / "no.bmodel").write_bytes(b"no")
    refused = subprocess.run([*command, "--model", tmp_path / "no.bmodel"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")
    assert len(refused.stderr.strip().splitlines()) == 1
