"""The real tool chain on a Qwen of one layer (tests.unit.small_nets)."""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from helpers import artefacts, machine, toolchain
from helpers.bmodel.bmodel import read_bmodel, strip_time
from helpers.compile import compiling, graph, jobs, memory, server
from helpers.compile.log import own_error
from helpers.compile.memory import MemoryGate
from helpers.compile.needs import needs_of
from helpers.compile.options import net_settings
from helpers.compile.plan import check, plan_nets
from helpers.compile.profile import PROFILE, estimates, read_profile
from helpers.cost import Cost, Work
from helpers.errors import UserError
from helpers.export.signature import Signature, read_signature
from helpers.files import locked, sha256_file, write_json
from tests.unit import small_nets
from tests.unit.small_nets import outputs_on_simulator, task

AS_DOCUMENTED = {"merge_cache": False, "fuse_rotation": False}
NETS = ["embedding", "embedding_cache", "lm_head", "greedy_head", "penalty_sample_head", "block_0", "block_cache_0"]


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    return small_nets.write_nets(tmp_path_factory.mktemp("nets") / "onnx")


@pytest.fixture(scope="module")
def compiled(nets):
    return compiling.compile_model(nets, nets.parent / "out", "small", "int8")


def linked_copy(nets, target):
    target.mkdir()
    for path in nets.iterdir():
        os.link(path, target / path.name)
    return target


def assert_same_blocks(out, compiled):
    """The nets for which the compiler builds kernels; of others some bytes depend on where the wheel lies."""
    for net in ("block_0", "block_cache_0"):
        ours, theirs = (path / "int8_1dev" / net / f"{net}.bmodel" for path in (out, compiled.parent))
        assert ours.read_bytes() == theirs.read_bytes()


def random_inputs(bmodel, net):
    generator = np.random.default_rng(1)
    arrays = []
    for tensor in read_bmodel(bmodel).nets[net].info.inputs:
        if tensor.dtype == "int32":
            arrays.append(generator.integers(0, small_nets.S, tensor.shape, dtype=np.int32))
        else:
            values = generator.standard_normal(tensor.shape).astype(np.float32)
            arrays.append((values.view(np.uint32) >> 16).astype(np.uint16))
    return arrays


# What comes out


def test_the_file_has_the_documented_name_and_a_manifest(compiled):
    assert compiled.name == "small_int8_1dev.bmodel"
    assert list(read_bmodel(compiled).nets) == NETS
    manifest = artefacts.read_manifest(compiled)
    assert set(manifest["nets"]) == set(NETS) == set(manifest["inputs"])
    for net in ("block_0", "block_cache_0", "lm_head"):
        record = manifest["nets"][net]
        file = read_bmodel(compiled.parent / "int8_1dev" / net / f"{net}.bmodel")
        alone = file.nets[net]
        assert alone.weight_bytes + alone.instruction_bytes + file.kernel_bytes < file.file_bytes
        assert record["bytes"] == alone.weight_bytes + alone.instruction_bytes
        assert record["cycles"] > 1000 and 0 < record["ddr_bw"] < 100
        assert record["ms"] == pytest.approx(record["cycles"] / 1e6)
    kinds = {"first_token_ms": ["embedding", "block_0", "lm_head"]}
    kinds["decode_ms"] = ["embedding_cache", "block_cache_0", "lm_head"]
    for key, parts in kinds.items():
        assert manifest["estimates"][key] == pytest.approx(sum(manifest["nets"][p]["ms"] for p in parts), abs=1e-5)


def test_a_net_s_own_folder_has_its_bmodel_its_mlir_and_the_profile(compiled):
    for net in ("block_0", "greedy_head"):
        made = {path.name for path in (compiled.parent / "int8_1dev" / net).iterdir()}
        assert made - {PROFILE} == {f"{net}.bmodel", f"{net}.mlir", "manifest.json"}
    assert "top.Input" in (compiled.parent / "int8_1dev" / "block_0" / "block_0.mlir").read_text()


def test_what_crosses_to_the_chip_has_the_documented_types(compiled):
    nets = {name: net.info for name, net in read_bmodel(compiled).nets.items()}
    states = "bfloat16"
    sampling = (["float32", "int32", "float32", "float32", "float32"], ["float32", "int32"])
    found = {name: tuple([t.dtype for t in side] for side in (net.inputs, net.outputs)) for name, net in nets.items()}
    assert found == {
        "embedding": (["int32"], [states]),
        "embedding_cache": (["int32"], [states]),
        "block_0": ([states, "int32", states], [states] * 3),
        "block_cache_0": ([states, "int32", states, states, states], [states] * 3),
        "lm_head": ([states], ["float32"]),
        "greedy_head": (["float32"], ["int32"]),
        "penalty_sample_head": sampling,
    }


DOCUMENTED = {
    "bf16": "--quantize BF16",
    "int8": "--quantize W8BF16 --q_group_size 64",  # the tools' own size of a group
    "int4": "--quantize W4BF16 --q_group_size 64",
}


@pytest.mark.parametrize("mode", DOCUMENTED)
@pytest.mark.parametrize("addr_mode", ["basic", "io_alone"])
def test_each_net_has_the_flags_of_the_documented_script(mode, addr_mode):
    past = " --addr_mode io_alone" if addr_mode == "io_alone" else ""
    flags = dict.fromkeys(("embedding", "embedding_cache"), "--quantize BF16 --quant_input --quant_output")
    flags |= dict.fromkeys(("greedy_head", "penalty_sample_head"), "--quantize F32")
    flags["lm_head"] = f"{DOCUMENTED[mode]} --quant_input"
    flags["block_7"] = f"{DOCUMENTED[mode]} --quant_input --quant_output"
    flags["block_cache_7"] = flags["block_7"] + past
    for net, documented in flags.items():
        found = net_settings(net, mode, 1, addr_mode, False)
        given = f"--quantize {found['quantize']}"
        given += f" --q_group_size {found['q_group_size']}" * bool(found["q_group_size"])
        given += " --quant_input" * found["quant_input"] + " --quant_output" * found["quant_output"]
        assert given + f" --addr_mode {found['addr_mode']}" * (found["addr_mode"] != "basic") == documented, net
        assert found["num_device"] == 1 and not found["dynamic"]


def test_the_head_may_have_a_mode_of_its_own():
    modes = {net: net_settings(net, "int4", 1, "basic", False, "int8")["quantize"] for net in NETS}
    assert modes == {net: net_settings(net, "int4", 1, "basic", False)["quantize"] for net in NETS} | {
        "lm_head": "W8BF16"
    }


def test_what_is_dynamic_takes_a_prompt_and_nothing_else_is():
    dynamic = {net for net in NETS if net_settings(net, "int8", 1, "basic", True)["dynamic"]}
    assert dynamic == {"embedding", "block_0"}


def test_a_second_compile_makes_nothing(nets, compiled, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in compiled.parent.rglob("*.bmodel")}
    monkeypatch.setattr(server, "CompilerServer", None)  # not even begun
    compiling.compile_model(nets, compiled.parent, "small", "int8")
    assert before == {path: path.stat().st_mtime_ns for path in compiled.parent.rglob("*.bmodel")}


def test_another_setting_makes_only_what_it_concerns(nets, compiled):
    folder = compiled.parent / "int8_1dev"
    before = {net: (folder / net / f"{net}.bmodel").stat().st_mtime_ns for net in NETS}
    compiling.compile_model(nets, compiled.parent, "small", "int8", addr_mode="io_alone")
    after = {net: (folder / net / f"{net}.bmodel").stat().st_mtime_ns for net in NETS}
    assert [net for net in NETS if before[net] != after[net]] == ["block_cache_0"]
    assert read_bmodel(compiled).nets["block_cache_0"].info.addr_mode == "io_alone"
    compiling.compile_model(nets, compiled.parent, "small", "int8")


@pytest.mark.parametrize("mode, dynamic", [("bf16", False), ("int4", False), ("int4", True)])
def test_the_other_modes_compile(nets, tmp_path, mode, dynamic):
    path = compiling.compile_model(nets, tmp_path, "small", mode, dynamic=dynamic)
    assert path.name == f"small_{mode}_1dev{'_dyn' if dynamic else ''}.bmodel"
    read = read_bmodel(path)
    assert read.nets["block_0"].info.dynamic == read.nets["embedding"].info.dynamic == dynamic
    assert not read.nets["block_cache_0"].info.dynamic
    assert (artefacts.read_manifest(path)["estimates"] is None) == dynamic


@pytest.mark.slow
@pytest.mark.parametrize("net, quantize", [("block_cache_0", "int4"), ("lm_head", "int8")])
def test_bytes_are_those_of_the_documented_commands(nets, tmp_path, net, quantize):
    """One call of the compiler on a net whose weights bypassed the simplifier, against the two documented scripts."""
    settings = net_settings(net, quantize, 1, "basic", False) | AS_DOCUMENTED
    record = jobs.compile_net(task(nets, tmp_path / "ours", net, settings))
    tools = toolchain.wheel_path() / "python" / "tools"
    flags = {"int8": ["W8BF16"], "int4": ["W4BF16", "--q_group_size", "64"]}[quantize]
    flags += ["--quant_input"] + ["--quant_output"] * net.startswith("block")
    transform = ["--model_name", net, "--model_def", nets / f"{net}.onnx", "--mlir", f"{net}.mlir"]
    deploy = ["--mlir", f"{net}.mlir", "--quantize", *flags, "--chip", "bm1684x", "--model", f"{net}.bmodel"]
    for script, arguments in (("model_transform.py", transform), ("model_deploy.py", deploy)):
        command = [sys.executable, tools / script, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=toolchain.environment(1), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    strip_time(tmp_path / f"{net}.bmodel")
    assert Path(record["bmodel"]).read_bytes() == (tmp_path / f"{net}.bmodel").read_bytes()


@pytest.mark.parametrize(
    "edit, net, mode, addr_mode",
    [
        ("merge_cache", "block_cache_0", "int8", "basic"),
        ("merge_cache", "block_cache_0", "int8", "io_alone"),
        ("fuse_rotation", "block_0", "bf16", "basic"),
        ("fuse_rotation", "block_cache_0", "int8", "basic"),
    ],
)
def test_each_edit_of_the_graph_costs_fewer_cycles_and_no_bit(nets, tmp_path, edit, net, mode, addr_mode):
    settings = net_settings(net, mode, 1, addr_mode, False)
    assert settings[edit]
    plain_settings = settings | AS_DOCUMENTED
    edited = jobs.compile_net(task(nets, tmp_path / "edited", net, plain_settings | {edit: True}))
    plain = jobs.compile_net(task(nets, tmp_path / "plain", net, plain_settings))
    mark = {"merge_cache": "only_merge = true", "fuse_rotation": '"top.Rope"'}[edit]
    marks = [(tmp_path / folder / net / f"{net}.mlir").read_text().count(mark) for folder in ("edited", "plain")]
    assert marks == [2, 0]
    assert edited["cycles"] < plain["cycles"]
    inputs = random_inputs(edited["bmodel"], net)
    results = [outputs_on_simulator(record["bmodel"], net, inputs) for record in (edited, plain)]
    assert len(results[0]) == 3 and np.any(results[0][0])
    for ours, documented in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, documented)


def test_only_a_past_that_is_used_once_is_merged():
    def net(past="%1", uses="", returned="%9"):
        return (
            '    %1 = "top.Input"(%arg0) : (x) -> x loc(#1)\n    %2 = "top.Add"(%arg1) : (x) -> x\n'
            f'    %3 = "top.Concat"({past}, %2) {{axis = 1 : si32, only_merge = false}} : (x) -> x loc(#2)\n'
            f"{uses}    return {returned} : x\n"
        )

    assert graph.merge_cache(net()) == net().replace("only_merge = false", "only_merge = true")
    for other in ({"past": "%2"}, {"uses": '    %4 = "top.Mul"(%1, %2) : (x) -> x\n'}, {"returned": "%3"}):
        assert graph.merge_cache(net(**other)) == net(**other)


def rotation(lower_offset=0, upper_offset=4, constant="-1.0", other="%1", row=0, step=1):
    slice_of = f"{{{{offset = [0, {row}, 0, {{at}}], steps = [1, 1, 1, {step}]}}}} : (t) -> t loc(#s)"
    slice_of = f'"top.Slice"({{x}}, %0) {slice_of}'
    return "\n".join(
        [
            '    %0 = "top.None"() : () -> none loc(#n)',
            '    %1 = "top.Input"(%arg0) : (t) -> t loc(#1)',
            '    %2 = "top.Input"(%arg1) : (t) -> t loc(#2)',
            '    %3 = "top.Input"(%arg2) : (t) -> t loc(#3)',
            f"    %4 = {slice_of.format(x='%1', at=upper_offset)}",
            f"    %5 = {slice_of.format(x=other, at=lower_offset)}",
            f'    %6 = "top.MulConst"(%4) {{const_val = {constant} : f64}} : (t) -> t loc(#m)',
            '    %7 = "top.Concat"(%6, %5) {axis = 3 : si32} : (t, t) -> t loc(#c)',
            '    %8 = "top.Mul"(%1, %2) : (t, t) -> t loc(#8)',
            '    %9 = "top.Mul"(%7, %3) : (t, t) -> t loc(#9)',
            '    %10 = "top.Add"(%8, %9) : (t, t) -> t loc(#10)',
            "    return %10 : t",
        ]
    )


def test_a_rotation_is_recognised_by_what_it_computes():
    text = graph.fuse_rotation(rotation())
    assert text.count("top.Rope") == 1
    assert '%10 = "top.Rope"(%1, %3, %2)' in text and text.splitlines()[4].endswith("loc(#10)")
    assert "Slice" not in text and "Concat" not in text
    wrongs = ({"constant": "1.0"}, {"lower_offset": 4}, {"upper_offset": 0}, {"other": "%2"}, {"row": 1}, {"step": 2})
    for wrong in wrongs:
        assert graph.fuse_rotation(rotation(**wrong)) == rotation(**wrong)


def test_weights_that_are_computed_with_are_refused(tmp_path):
    """Scaled weights: the bypass cannot fold them."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((192, 192)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["w", "two"], ["w2"]),
            helper.make_node("MatMul", ["input_states", "w2"], ["y"]),
        ],
        "scaled",
        [helper.make_tensor_value_info("input_states", TensorProto.FLOAT, [1, 192])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 192])],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(np.float32([2]), "two")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, tmp_path / "scaled.onnx")
    settings = net_settings("greedy_head", "int8", 1, "basic", False)
    with pytest.raises(UserError, match="scaled did not compile: Mul computes something from weights alone: export"):
        jobs.compile_net(task(tmp_path, tmp_path / "out", "scaled", settings))


# What goes wrong


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "int7"}, "must be one of bf16, int8, int4"),
        ({"head_mode": "int7"}, "must be one of bf16, int8, int4"),
        ({"addr_mode": "io_together"}, "must be one of basic, io_alone"),
        ({"num_device": 0}, "num_device 0 does not divide the 2"),
        ({"num_device": 2}, "lacks lm_head_with_topk.onnx"),
        ({"jobs": -1}, "jobs is -1, it must be 1 or more"),
        ({"name": "a/b"}, "cannot begin a file's name"),
        ({"name": ".."}, "cannot begin a file's name"),
        ({"name": ""}, "cannot begin a file's name"),
        ({"name": "x" * 300}, "cannot begin a file's name"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(nets, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        compiling.compile_model(nets, tmp_path, **{"name": "small", "mode": "int8", **arguments})
    assert not any(tmp_path.iterdir())


def test_devices_must_divide_the_heads(nets):
    with pytest.raises(UserError, match="does not divide the 2 attention heads.*take one of 1, 2"):
        check(plan_nets(nets), "bf16", 3, "basic")


def test_a_model_too_small_to_be_split_is_refused(nets, tmp_path):
    linked = linked_copy(nets, tmp_path / "onnx")
    os.link(nets / "lm_head.onnx", linked / "lm_head_with_topk.onnx")
    with pytest.raises(UserError, match="does not split block_0 over 2 devices.*too small"):
        compiling.compile_model(linked, tmp_path / "out", "small", "bf16", num_device=2, jobs=1)


def test_int4_needs_a_hidden_size_of_whole_groups(nets):
    plan = plan_nets(nets)
    plan.hidden_size = 96
    with pytest.raises(UserError, match="groups of 64.*hidden size 96"):
        check(plan, "int4", 1, "basic")


def test_documented_options_are_taken(nets, tmp_path):
    from helpers.cli import main

    out = ["--onnx", str(nets), "--out", str(tmp_path), "--name", "tiny"]
    assert main(["compile", *out, "--dynamic", "1"]) == 0  # int8 without --mode
    assert (tmp_path / "tiny_int8_1dev_dyn.bmodel").exists()
    assert artefacts.read_manifest(tmp_path / "tiny_int8_1dev_dyn.bmodel")["settings"]["addr_mode"] == "basic"
    assert main(["compile", *out, "--seq_length", "7"]) == 2


@pytest.mark.parametrize("lost", ["block_cache_0", "lm_head", "penalty_sample_head"])
def test_a_missing_net_is_named_at_once(nets, tmp_path, lost):
    folder = linked_copy(nets, tmp_path / "onnx")
    (folder / f"{lost}.onnx").unlink()
    with pytest.raises(UserError, match=f"lacks {lost}.onnx"):
        compiling.compile_model(folder, tmp_path / "out", "small", "int8")


def test_a_folder_without_nets_is_one_sentence(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="helpers export"):
            compiling.compile_model(folder, tmp_path / "out", "small", "int8")


def test_a_truncated_net_is_refused_before_anything_runs(nets, tmp_path):
    folder = linked_copy(nets, tmp_path / "onnx")
    whole = (folder / "block_0.onnx").read_bytes()
    (folder / "block_0.onnx").unlink()
    (folder / "block_0.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="block_0.onnx is cut off or not an ONNX file"):
        compiling.compile_model(folder, tmp_path / "out", "small", "int8")
    assert not (tmp_path / "out").exists()


def test_a_net_changed_after_its_export_is_refused(nets, tmp_path):
    folder = linked_copy(nets, tmp_path / "onnx")
    exported = sha256_file(folder / "block_0.onnx")
    outputs = {"block_0.onnx": {"sha256": exported[:-1] + ("1" if exported[-1] == "0" else "0")}}
    (folder / "manifest.json").write_text(json.dumps({"outputs": outputs}))
    with pytest.raises(UserError, match="block_0.onnx is not what the export wrote"):
        compiling.compile_model(folder, tmp_path / "out", "small", "int8")


def test_weights_changed_after_the_export_are_refused(nets, tmp_path):
    folder = linked_copy(nets, tmp_path / "onnx")
    model, path = onnx.load(folder / "block_0.onnx"), folder / "block_0.onnx"
    path.unlink()
    onnx.save(model, str(path), save_as_external_data=True, location="block_0.weights", size_threshold=0)
    outputs = {name: {"sha256": sha256_file(folder / name)} for name in ("block_0.onnx", "block_0.weights")}
    (folder / "manifest.json").write_text(json.dumps({"outputs": outputs}))
    with open(folder / "block_0.weights", "r+b") as file:
        file.write(b"\x7f")
    with pytest.raises(UserError, match="block_0.weights is not what the export wrote"):
        compiling.compile_model(folder, tmp_path / "out", "small", "int8")


def test_a_file_that_is_written_in_place_is_read_again(tmp_path):
    path = tmp_path / "net.weights"
    digests = set()
    for second, content in enumerate((b"first", b"fIrst")):
        path.write_bytes(content)
        os.utime(path, (second, second))
        digests.add(jobs.NetToCompile("net", path, Signature({}, {}, set(), 0), tmp_path, {}).inputs()[path.name])
    assert len(digests) == 2


def test_nets_of_two_exports_in_one_folder_are_refused(nets, tmp_path):
    for net, at in (("block", 1), ("block", 2), ("block_cache", 2)):
        folder = linked_copy(nets, tmp_path / f"{net}{at}")
        for kind in ("block", "block_cache"):
            model = onnx.load(nets / f"{kind}_0.onnx")
            if kind == net:
                model.graph.input[0].type.tensor_type.shape.dim[at].dim_value += 8
            onnx.save(model, folder / f"{kind}_1.onnx")
        with pytest.raises(UserError, match=f"{net}_1.onnx takes states .* mixes two exports"):
            compiling.compile_model(folder, tmp_path / "out", "small", "int8")


def test_a_missing_vocabulary_is_said_before_anything_runs(nets, tmp_path):
    folder = linked_copy(nets, tmp_path / "onnx")
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": "qwen.tiktoken"}))
    with pytest.raises(UserError, match="no vocabulary at .*qwen.tiktoken"):
        compiling.compile_model(folder, tmp_path / "out", "small", "int8")
    assert not list((tmp_path / "out").glob("*/*"))


def test_a_net_that_fails_on_a_full_disk_says_so(nets, tmp_path, monkeypatch):
    broken = task(nets, tmp_path / "out", "lm_head", {"quantize": "BF16", "recipe": "none of the others"})
    with pytest.raises(UserError, match="lm_head did not compile: KeyError"):
        jobs.compile_net(broken)
    monkeypatch.setattr(machine, "free_disk", lambda path: 30_000_000)
    with pytest.raises(UserError, match="lm_head did not compile: KeyError.*lm_head.log; the disk has 0.03 GB left"):
        jobs.compile_net(broken)


def test_kernels_that_were_left_half_built_are_built_anew(tmp_path, monkeypatch):
    from helpers.compile.worker import _kernels

    cache = tmp_path / "caches" / "cache"
    for number, full in enumerate((True, False)):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        with contextlib.suppress(OSError):
            with _kernels(cache) as kernels:
                assert not os.listdir(kernels)
                Path(kernels, "kernel").write_text("ha")
                if full:
                    raise OSError("no space left: as where the process is killed, what was written stays")
                Path(kernels, "kernel").write_text("half and half")
    with _kernels(cache) as kernels:
        assert Path(kernels, "kernel").read_text() == "half and half"
    assert not os.path.exists("kernels")
    assert list(cache.parent.iterdir()) == [cache]


def test_a_disk_without_locks_and_links_compiles_with_one_warning(nets, compiled, tmp_path, preload):
    """Lustre and NFS are often mounted without locks, exFAT has no links."""
    environment = preload(
        """
        int flock(int file, int operation) { errno = ENOSYS; return -1; }
        int symlink(const char *to, const char *path) { errno = EPERM; return -1; }
        int link(const char *to, const char *path) { errno = EPERM; return -1; }
        """
    )
    done = subprocess.run(command(nets, tmp_path / "out"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning:") == 1 and "has no file locks (Function not implemented)" in done.stderr
    assert_same_blocks(tmp_path / "out", compiled)


def test_users_compile_one_after_the_other_and_at_once(nets, compiled, as_user, open_folder):
    """The compiler would leave locks in /tmp that only their owner may open."""

    def started(user):
        out = open_folder / str(user)
        out.mkdir()
        return subprocess.Popen([*as_user(user, out), *command(nets, out)], stderr=subprocess.PIPE, text=True)

    for users in ([12345], [12346, 12347]):
        for user, process in [(user, started(user)) for user in users]:
            _, said = process.communicate()
            assert process.returncode == 0, said
            assert_same_blocks(open_folder / str(user), compiled)
    assert not [path for path in Path("/tmp").glob("ppl_*.lock") if path.stat().st_uid in range(12345, 12348)]


def test_a_folder_that_may_only_be_read_and_is_up_to_date_is_no_failure(nets, compiled, as_user, open_folder):
    out, home = open_folder / "out", open_folder / "home"
    shutil.copytree(compiled.parent, out)
    home.mkdir()
    done = subprocess.run([*as_user(12345, home), *command(nets, out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert done.stdout == f"{out / compiled.name}\n"


def test_nets_of_another_version_of_the_compiling_code_are_made_anew(nets, compiled, tmp_path, own_copy):
    out = shutil.copytree(compiled.parent, tmp_path / "out")

    def compile():
        done = own_copy.run(*command(nets, out)[3:])
        assert done.returncode == 0, done.stderr
        return done.stderr, (out / compiled.name).read_bytes()

    said, content = compile()
    assert "made anew" not in said and content == compiled.read_bytes()
    own_copy.edit("helpers/compile/graph.py", ', "only_merge = true")', ', "only_merge = false")')
    said, content = compile()
    assert said.count("made anew") == 1 and "compile.graph" in said
    assert content != compiled.read_bytes()
    # A manifest of before there was such a key counts as one of other code.
    manifest = artefacts.read_manifest(out / "int8_1dev" / "lm_head")
    del manifest["code"]
    write_json(out / "int8_1dev" / "lm_head" / "manifest.json", manifest)
    said, after = compile()
    assert said.count("made anew") == 1 and after == content
    assert "code" in artefacts.read_manifest(out / "int8_1dev" / "lm_head")


@pytest.mark.parametrize("name", ["a b", "a'b&(c", "a;b", "a:b", 'a"b\\c'])
def test_any_name_of_a_folder_will_do_for_out_and_for_the_wheel(nets, compiled, tmp_path, name):
    """The wheel's scripts pass paths on without quotes; make and cmake have characters of their own."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "tpu_mlir").symlink_to(toolchain.wheel_path())
    code = (
        "import runpy, sys\nsys.path.insert(0, sys.argv.pop(1))\n"
        "runpy.run_module('helpers', run_name='__main__', alter_sys=True)\n"
    )
    whole = [sys.executable, "-c", code, str(tmp_path / name), *command(nets, tmp_path / name / "out")[3:]]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_blocks(tmp_path / name / "out", compiled)


def test_another_sdk_in_the_environment_changes_nothing(nets, compiled, tmp_path):
    """A source checkout of TPU-MLIR sets these by its envsetup.sh, as is documented."""
    checkout, ppl = tmp_path / "tpu-mlir", tmp_path / "tpu-mlir" / "third_party" / "ppl"
    for tool in ("bin/tpuc-opt", "bin/ppl-compile", "bin/ppl_jit.sh", "bin/cmake"):
        (ppl / tool).parent.mkdir(parents=True, exist_ok=True)
        (ppl / tool).write_text("#!/bin/sh\nexit 1\n")
        (ppl / tool).chmod(0o755)
    (checkout / "python" / "transform").mkdir(parents=True)
    (checkout / "python" / "transform" / "__init__.py").write_text("raise ImportError('of the checkout')\n")
    environment = os.environ | {
        "PROJECT_ROOT": str(checkout),
        "TPUC_ROOT": str(checkout / "install"),
        "PPL_PROJECT_ROOT": str(ppl),
        "PPL_RUNTIME_PATH": str(ppl / "deps"),
        "PPL_CACHE_PATH": "/nonexistent/",
        "PATH": f"{ppl / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout / "python"),
    }
    done = subprocess.run(command(nets, tmp_path / "out"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_blocks(tmp_path / "out", compiled)


@pytest.mark.parametrize("net", ["block_0", "lm_head", "penalty_sample_head", "greedy_head"])
def test_bytes_do_not_depend_on_the_path(nets, tmp_path, monkeypatch, net):
    """What the chip's scalar core runs has three bytes that are never set: they are what the layout of memory makes."""
    settings = net_settings(net, "int8", 1, "basic", False)
    made = set()
    for number, more in enumerate(["", ":/nowhere", ":/" + "nowhere" * 9]):
        monkeypatch.setenv("PATH", os.environ["PATH"] + more)
        server.close_all()  # a server has the PATH of its start
        folder = tmp_path / ("nowhere" * number + "a")
        made.add(jobs.compile_net(task(nets, folder, net, settings))["sha256"])
    server.close_all()
    assert len(made) == 1


def test_a_failing_net_gives_its_own_error_and_its_log_and_the_others_stay(nets, tmp_path):
    folder = linked_copy(nets, tmp_path / "onnx")
    model = onnx.load(folder / "block_cache_0.onnx")
    model.graph.node[-1].op_type = "Erfinv"
    (folder / "block_cache_0.onnx").unlink()
    onnx.save(model, folder / "block_cache_0.onnx")
    with pytest.raises(UserError, match="block_cache_0 did not compile: .*Erfinv.*its log is") as caught:
        compiling.compile_model(folder, tmp_path / "out", "small", "int8", jobs=1)
    assert (tmp_path / "out" / "int8_1dev" / "block_cache_0.log").stat().st_size
    assert str(tmp_path) in str(caught.value)
    done = tmp_path / "out" / "int8_1dev"
    assert (done / "block_0" / "block_0.bmodel").exists()
    assert not list(done.glob("*/block_cache_0.bmodel")) and not list(done.glob(".*partial"))


def test_too_little_memory_is_said_before_anything_runs(nets, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "budget", lambda: 100_000_000)
    with pytest.raises(UserError, match="needs 0.[0-9] GB of memory, 0.1 GB are free"):
        compiling.compile_model(nets, tmp_path / "out", "small", "int8")


def test_memory_is_looked_at_for_the_largest_net_and_for_each_one_where_it_compiles(nets, tmp_path, monkeypatch):
    plan = plan_nets(nets)
    needs = [needs_of(net, signature.weights_bytes, "BF16") for net, signature in plan.nets.items()]
    largest = max(needs, key=lambda need: need.memory)
    monkeypatch.setattr(memory, "gate", memory.gate)  # what a compile leaves goes with this test
    monkeypatch.setattr(memory, "budget", lambda: largest.memory - 1)
    with pytest.raises(UserError, match=f"Compiling {largest.net} needs"):
        compiling.compile_model(nets, tmp_path / "out", "small", "bf16")
    # Where a scheduler sends the nets to other machines, each of these looks for itself.
    monkeypatch.setattr(compiling, "_work", lambda *_: Work("nothing", tmp_path, {}, 0, 0))
    with pytest.raises(UserError, match=f"Compiling {largest.net} needs"):
        compiling.compile_model(nets, tmp_path / "out", "small", "bf16", jobs=1)
    assert not server._servers
    assert not (tmp_path / "out" / "bf16_1dev" / "greedy_head").exists()  # the others are never made


def test_too_little_disk_is_said_before_anything_runs(nets, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda path: 1_000_000)
    said = "small_int8_1dev.bmodel needs 0.0[0-9]+ GB of disk, 0.001 GB are free on the disk that holds .*: free some"
    with pytest.raises(UserError, match=said):
        compiling.compile_model(nets, tmp_path / "out", "small", "int8")
    assert not (tmp_path / "out").exists()


def test_the_manifest_has_what_was_predicted_beside_what_it_took(nets, tmp_path):
    made = compiling.compile_model(nets, tmp_path, "small", "int8")
    cost = artefacts.read_manifest(made)["cost"]
    stays = sum(path.stat().st_size for path in tmp_path.rglob("*.bmodel"))
    # What nets take for a while is looked at ten times a second: a short peak is seen, or not.
    assert stays <= cost["taken"]["disk_bytes"] < 2 * stays
    assert 0.5 < cost["predicted"]["disk_bytes"] / cost["taken"]["disk_bytes"] < 2
    # The first net has told how fast this machine is.
    assert cost["before"] | {"seconds": 0} == cost["predicted"] | {"seconds": 0}
    assert cost["taken"]["seconds"] > 0 and cost["taken"]["memory_bytes"] > 0


def test_what_is_there_already_needs_nothing_and_what_another_machine_compiles_only_room_to_combine(
    compiled, nets, tmp_path, monkeypatch
):
    works = []
    work = compiling._work
    monkeypatch.setattr(compiling, "_work", lambda *args: works.append(work(*args)) or works[-1])
    before = artefacts.read_manifest(compiled)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "free_disk", lambda path: 0)
        compiling.compile_model(nets, compiled.parent, "small", "int8")
    assert works[0].before == Cost(0, 0, 0) and artefacts.read_manifest(compiled) == before
    monkeypatch.setattr(memory, "budget", lambda: 0)
    for scheduler, told in ((None, "needs .* of memory"), ("tcp://127.0.0.1:9", "No Dask scheduler answers")):
        with pytest.raises(UserError, match=told):
            compiling.compile_model(nets, tmp_path / "out", "small", "int8", scheduler=scheduler)
    (combining,) = works[1:]
    assert combining.before.disk_bytes == pytest.approx(compiled.stat().st_size, rel=0.3)
    assert combining.before.memory_bytes == 0


def test_weights_are_read_from_their_place_in_a_file(tmp_path):
    from helpers.compile.frontend import take_weights

    arrays = {name: np.random.default_rng(1).random((200, 100), np.float32) + i for i, name in enumerate("abc")}
    graph = helper.make_graph([], "weights", [], [], [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph), str(path), save_as_external_data=True, location="net.weights", size_threshold=0)
    assert (tmp_path / "net.weights").stat().st_size >= 3 * 200 * 100 * 4
    found = take_weights(onnx.load(path, load_external_data=False), tmp_path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_memory_needed_covers_what_was_measured():
    # Qwen-7B, S = 512, int4: a block, the embedding, lm_head.
    for net, weights, quantize, peak in (
        ("block_0", 810_000_000, "W4BF16", 1.72e9),
        ("embedding", 2_489_319_424, "BF16", 7.54e9),
        ("lm_head", 2_489_335_808, "W4BF16", 8.62e9),
    ):
        assert peak < needs_of(net, weights, quantize).memory < 1.3 * peak


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=12))
def test_the_gate_never_lets_more_in_than_fits(needs):
    gate, lock, used, most = MemoryGate(10), threading.Lock(), 0, 0

    def job(need):
        nonlocal used, most
        with gate.room_for("a net", need):
            with lock:
                used += need
                most = max(most, used)
            time.sleep(0.001)
            with lock:
                used -= need

    threads = [threading.Thread(target=job, args=(need,)) for need in needs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert used == 0 and most <= 10


def test_what_takes_all_of_the_memory_runs_and_what_takes_more_never_does():
    gate = MemoryGate(10)
    with gate.room_for("lm_head", 10):
        pass
    with pytest.raises(UserError, match="Compiling lm_head needs"), gate.room_for("lm_head", 11):
        pytest.fail("there is no room")


def test_two_compiles_in_one_folder_are_kept_apart(nets, compiled):
    with locked(compiled.parent / "int8_1dev" / ".lock"):
        with pytest.raises(UserError, match="Another compile is running"):
            compiling.compile_model(nets, compiled.parent, "small", "int8")


@pytest.mark.parametrize(
    "log, told",
    [
        ("x\nloc(\"a\"): error: 'top.Add' op is wrong\n#0 0x1\nStack dump:\n", "'top.Add' op is wrong"),
        ('[Running]: tpuc-opt error\ntpuc-opt: f.cpp:7: void f(): Assertion `0 && "no"\' failed.\n', "Assertion `0"),
        ("Traceback (most recent call last):\n  File\nRuntimeError: Erfinv Op not support now\n", "Erfinv Op"),
        ("failed to find tensor w to read\n#1 0x2\nRuntimeError: [!Error]: tpuc-opt a.mlir\n", "tensor w to read"),
        ("all well\ntpuc-opt was ended by SIGKILL\n", "tpuc-opt was ended by SIGKILL"),
        ("terminate called\n  what():  Procecss 7: Failed to open: /tmp/a.lock\n", "Failed to open: /tmp/a.lock"),
        ("all well\n", "status 3 after: all well"),
        ("", "status 3 and said nothing"),
    ],
)
def test_the_telling_line_of_a_log_is_found(log, told):
    assert told in own_error(log, 3)


# Killed and interrupted


def command(nets, out):
    arguments = ["--name", "small", "--mode", "int8", "--onnx", str(nets), "--out", str(out)]
    return [sys.executable, "-m", "helpers", "compile", *arguments]


def left_running(folder):
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                where = os.readlink(process / "cwd") + (process / "cmdline").read_bytes().decode()
            except OSError:
                continue
            if str(folder) in where and int(process.name) != os.getpid():
                found.append(where)
    return found


def assert_nothing_left_running(folder):
    deadline = time.monotonic() + 300
    while left_running(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_running(folder) == []


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(nets, compiled, tmp_path):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    moments = random.Random(seed)
    out = tmp_path / "out"

    def made():
        return len(list(out.glob("*/*/manifest.json")))

    kills, progress = 0, []
    while kills < 10:
        # In the middle of the work, however fast the machine is: a few nets more are made, another has begun.
        enough = made() + moments.randint(0, 3)
        if enough >= len(NETS):
            shutil.rmtree(out)
            enough = 0
        process = subprocess.Popen(command(nets, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (made() >= enough and list(out.glob("*/.*partial"))):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
        progress.append(made())
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            assert (out / compiled.name).read_bytes() == compiled.read_bytes()  # it was done before
        else:
            kills += 1
        assert_nothing_left_running(tmp_path)
    print(f"nets that were made at each moment: {progress}")
    subprocess.run(command(nets, out), check=True, capture_output=True)
    assert (out / compiled.name).read_bytes() == compiled.read_bytes()
    assert not list(out.rglob(".*partial"))


def test_a_server_that_is_killed_is_said_and_the_next_net_gets_another(nets, tmp_path):
    server.close_all()
    killed = server.own(tmp_path / "log")
    killed._process.kill()
    with pytest.raises(UserError, match="TPU-MLIR's tool chain ended.*signal 9.*make doctor"):
        killed.run(tmp_path / "log", 1)
    settings = net_settings("greedy_head", "int8", 1, "basic", False)
    assert Path(jobs.compile_net(task(nets, tmp_path, "greedy_head", settings))["bmodel"]).is_file()
    assert server.own(tmp_path / "log") is not killed


def test_ctrl_c_ends_everything_and_says_one_line(nets, tmp_path):
    process = subprocess.Popen(command(nets, tmp_path / "out"), stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "int8_1dev" / "embedding.log"
    while not log.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 130
    assert "interrupted" in said and "Traceback" not in said
    assert_nothing_left_running(tmp_path)


def test_the_command_line_gives_one_line_for_bad_input(tmp_path):
    done = subprocess.run(command(tmp_path / "none", tmp_path / "out"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1


# Many machines


@pytest.mark.slow
def test_a_dask_cluster_makes_the_same_bytes(nets, compiled, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path)
    ) as cluster:
        path = compiling.compile_model(nets, tmp_path / "out", "small", "int8", scheduler=cluster.scheduler_address)
    assert path.read_bytes() == compiled.read_bytes()


@pytest.mark.slow
def test_a_net_that_fails_on_a_dask_worker_tells_why(nets, tmp_path):
    from distributed import LocalCluster

    folder = linked_copy(nets, tmp_path / "onnx")
    model = onnx.load(folder / "lm_head.onnx")
    model.graph.node[-1].op_type = "Erfinv"
    (folder / "lm_head.onnx").unlink()
    onnx.save(model, folder / "lm_head.onnx")
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path)
    ) as cluster:
        with pytest.raises(UserError, match="lm_head did not compile: .*Erfinv"):
            compiling.compile_model(folder, tmp_path / "out", "small", "int8", scheduler=cluster.scheduler_address)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense", "http://127.0.0.1:8786"])
def test_no_scheduler_is_one_sentence(nets, tmp_path, address):
    with pytest.raises(UserError, match=f"No Dask scheduler answers at {address}"):
        compiling.compile_model(nets, tmp_path, "small", "int8", scheduler=address)
    gc.collect()


# The parts that read


def test_a_signature_needs_the_weights_file(tmp_path, nets):
    onnx.save(
        onnx.load(nets / "lm_head.onnx"),
        str(tmp_path / "lm_head.onnx"),
        save_as_external_data=True,
        location="head.weights",
        size_threshold=0,
    )
    assert read_signature(tmp_path / "lm_head.onnx").external == {"head.weights"}
    (tmp_path / "head.weights").unlink()
    with pytest.raises(UserError, match="keeps its weights in head.weights"):
        read_signature(tmp_path / "lm_head.onnx")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bytes_are_a_signature_or_refused(nets, tmp_path_factory, data):
    contents = bytearray((nets / "greedy_head.onnx").read_bytes())
    for _ in range(data.draw(st.integers(0, 5))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "net.onnx"
    path.write_bytes(contents[: data.draw(st.integers(0, len(contents)))])
    try:
        read_signature(path)
    except UserError:
        pass


def test_profiles_of_several_subnets_are_added(tmp_path):
    path = tmp_path / "profile.txt"
    text = "TCYC : {}\nGDMA SUMMARY : |\nDDR BW USAGE : {}%\n####\nflops: 500, runtime: 1ms\n"
    path.write_text(text.format(300, 10.0) + text.format(100, 50.0))
    assert read_profile(path) == {"cycles": 400, "ms": 0.0004, "ddr_bw": 20.0, "flops": 500}
    path.write_text("")
    assert read_profile(path) is None
    assert read_profile(tmp_path / "none") is None


def test_no_estimate_where_a_block_has_no_cycles():
    nets = {"embedding": {"ms": 1.0}, "embedding_cache": {"ms": 0.5}, "lm_head": {"ms": 2.0}}
    nets |= {"block_0": {"ms": 3.0}, "block_1": {"ms": 3.0}, "block_cache_0": {"ms": 1.0}, "block_cache_1": {"ms": 1.0}}
    assert estimates(nets) == {"first_token_ms": 9.0, "decode_ms": 4.5}
    assert estimates(nets | {"block_1": {"ms": None}}) is None
