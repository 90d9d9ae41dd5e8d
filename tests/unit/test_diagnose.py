"""The fault ladder: healthy models in all modes, and sixteen faults in real artefacts, each at its rung and layer."""

import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from helpers import cli
from helpers.bmodel import model_tool
from helpers.bmodel.bmodel import read_bmodel
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.checkpoint.weights import Checkpoint
from helpers.compile import compiling, server
from helpers.compile.jobs import NetToCompile, compile_net
from helpers.compile.options import net_settings
from helpers.diagnose.alone import examine
from helpers.diagnose.bands import LIMITS
from helpers.diagnose.deeper import go_deeper
from helpers.diagnose.ladder import diagnose
from helpers.diagnose.walk import Text, walk
from helpers.export import exporting
from helpers.export.signature import read_signature
from helpers.parity.hosts import OnnxNets
from helpers.patching import patching
from helpers.run.generation import QwenRunner
from helpers.tensors import from_bf16, to_bf16
from tests.conftest import WORK
from tests.unit.small_nets import write_random_checkpoint

pytestmark = pytest.mark.slow
S, RANKS, HIDDEN = 64, 500, 128
MODES = ("bf16", "int8", "int4")


class Small:
    """A model of two layers with random weights: checkpoint, patched copy, ONNX nets, a bmodel of each mode."""

    def __init__(self, folder: Path):
        self.checkpoint = write_checkpoint(folder / "checkpoint")
        self.patched, self.onnx = folder / "patched", WORK / "diagnose" / "onnx"
        patching.apply(self.checkpoint, out=self.patched, seq_length=S)
        exporting.export(self.patched, self.onnx, S)

    def bmodel(self, mode: str) -> Path:
        return compiling.compile_model(self.onnx, WORK / "diagnose" / "bmodel", "small", mode, addr_mode="io_alone")


def write_checkpoint(folder: Path, **config) -> Path:
    write_random_checkpoint(folder, **config)
    (folder / "qwen.tiktoken").unlink(missing_ok=True)
    described = folder / "tokenizer_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"qwen_tokenizer_ranks": RANKS}))
    assert len(QwenTokenizer.open(folder)) == RANKS + 3
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory, in_turn):
    with in_turn:
        return Small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def bmodels(small, in_turn):
    with in_turn:
        return {mode: small.bmodel(mode) for mode in MODES}


@pytest.fixture
def edited(small, tmp_path):
    """(change of a loaded graph, nets) -> a folder of ONNX nets in which it was made."""

    def edit(change, *nets: str) -> Path:
        folder = tmp_path / "onnx"
        shutil.copytree(small.onnx, folder)
        for net in nets:
            model = onnx.load(str(folder / f"{net}.onnx"))
            change(model.graph)
            onnx.save(model, str(folder / f"{net}.onnx"))
        return folder

    return edit


def weight(graph, name: str):
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def rewrite(name: str, change):
    """A change of one weight: array -> array."""

    def on(graph) -> None:
        tensor = weight(graph, name)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), name))

    return on


def found(report, rung: str, net: str, cause: str) -> str:
    finding = report.found
    assert finding is not None, "called healthy"
    assert (finding.rung, finding.net, finding.cause) == (rung, net, cause), finding.sentence
    assert rung in finding.sentence and net in finding.sentence
    return finding.sentence


# Healthy ones.


@pytest.mark.parametrize("mode", MODES)
def test_a_healthy_model_is_healthy(small, bmodels, mode):
    report = diagnose(small.checkpoint, small.onnx, bmodels[mode])
    assert report.found is None and report.rungs == ["patched", "onnx", "compiled", "loop"] and report.mode == mode
    worst = max(step.added.nmse for step in report.steps if step.rung == "compiled")
    print(mode, f"worst {worst:.1e} of {LIMITS[mode]:.1e}")
    # A band four times as wide as what is seen here, or less, would call a healthy model ill.
    assert LIMITS[mode] / 30 < worst < LIMITS[mode] / 3


def test_the_embedded_model_is_healthy(tiny, onnx_tiny, bmodel_tiny):
    assert diagnose(tiny, onnx_tiny, bmodel_tiny).found is None


def test_a_patched_checkpoint_is_taken_as_well(small):
    report = diagnose(small.patched, small.onnx)
    assert report.found is None and report.rungs == ["patched", "onnx"]


# Faults in the patched code and in the ONNX nets.


def test_mask_sign(small, tmp_path):
    folder = tmp_path / "patched"
    patching.apply(small.checkpoint, out=folder, seq_length=S)
    code = folder / "modeling_qwen.py"
    right = "attn_weights = attn_weights + attention_mask"
    assert right in code.read_text(encoding="utf-8")
    code.write_text(code.read_text(encoding="utf-8").replace(right, right.replace("+", "-")), encoding="utf-8")
    found(diagnose(small.checkpoint, patched=folder), "patched", "block_0", "mask_sign")


def test_wrong_rotary_base(small, tmp_path):
    """The nets were exported with another model's config.json; the weights are the same."""
    folder = tmp_path / "patched"
    patching.apply(write_checkpoint(tmp_path / "other", rotary_emb_base=1_000_000), out=folder, seq_length=S)
    nets = exporting.export(folder, tmp_path / "onnx", S)
    sentence = found(diagnose(small.checkpoint, nets), "onnx", "block_0", "rotary_base")
    assert "1e+06" in sentence and "10000" in sentence and "in past_k" in sentence


def swap_query_key(array):
    query, key, value = np.split(array, 3)
    return np.concatenate([key, query, value])


def test_query_and_key_swapped(small, edited):
    def change(graph):
        for part in ("weight", "bias"):
            rewrite(f"layer.attn.c_attn.{part}", swap_query_key)(graph)

    found(
        diagnose(small.checkpoint, edited(change, "block_1", "block_cache_1")), "onnx", "block_1", "query_key_swapped"
    )


def test_w1_and_w2_swapped(small, edited):
    def change(graph):
        one, two = (weight(graph, f"layer.mlp.{name}.weight") for name in ("w1", "w2"))
        one.name, two.name = two.name, one.name

    found(diagnose(small.checkpoint, edited(change, "block_0", "block_cache_0")), "onnx", "block_0", "w1_w2_swapped")


def test_one_matrix_transposed(small, edited):
    change = rewrite("layer.attn.c_proj.weight", np.transpose)
    sentence = found(diagnose(small.checkpoint, edited(change, "block_1")), "onnx", "block_1", "transposed")
    assert "attn.c_proj" in sentence


def test_a_fault_of_the_decode_net_alone_is_found_there(small, edited):
    change = rewrite("layer.attn.c_proj.weight", np.transpose)
    found(diagnose(small.checkpoint, edited(change, "block_cache_1")), "onnx", "block_cache_1", "transposed")


def test_exponent_bit_flipped(small, edited):
    def flip(array):
        array = array.copy()
        array.view(np.uint32)[5, 7] ^= 1 << 27
        return array

    change = rewrite("layer.mlp.w1.weight", flip)
    sentence = found(diagnose(small.checkpoint, edited(change, "block_1")), "onnx", "block_1", "exponent_bit")
    assert "layer.mlp.w1.weight[5, 7]" in sentence


def test_weights_of_another_layer(small, edited):
    folder = edited(None)
    shutil.copy(folder / "block_0.weights", folder / "block_1.weights")
    assert "layer 0" in found(diagnose(small.checkpoint, folder), "onnx", "block_1", "other_layer")


def test_float16_overflow(tmp_path):
    """A feed-forward whose product is large, as in real models, and a net that computes it in float16."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    for name, factor in (("w1", 512), ("w2", 512), ("c_proj", 2**-18)):
        tensors[f"transformer.h.1.mlp.{name}.weight"] *= factor
    save_file(tensors, checkpoint / "model.safetensors")
    patching.apply(checkpoint, out=tmp_path / "patched", seq_length=S)
    nets = exporting.export(tmp_path / "patched", tmp_path / "onnx", S)
    assert diagnose(checkpoint, nets).found is None
    model = onnx.load(str(nets / "block_1.onnx"))
    nodes, make = model.graph.node, onnx.helper.make_node
    down = next(node for node in nodes if node.name == "/layer/mlp/c_proj/MatMul")
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    # onnxruntime takes two casts in a row for nothing.
    between = [
        make("Cast", [down.input[0]], ["in_half"], to=half),
        make("Reshape", ["in_half", "flat"], ["flat_half"]),
        make("Cast", ["flat_half"], ["flat_single"], to=single),
        make("Reshape", ["flat_single", "whole"], ["in_single"]),
    ]
    for name, shape in (("flat", [-1]), ("whole", [1, S, -1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(shape, dtype=np.int64), name))
    down.input[0] = "in_single"
    place = list(nodes).index(down)
    for node in reversed(between):
        nodes.insert(place, node)
    onnx.save(model, str(nets / "block_1.onnx"))
    assert "mlp.c_proj" in found(diagnose(checkpoint, nets), "onnx", "block_1", "float16_overflow")


# Faults in the compiled nets.


def test_one_quantisation_scale_zeroed(small, bmodels, tmp_path):
    row = 2 * HIDDEN + 5  # of the values
    weights = Checkpoint.open(small.checkpoint).load("transformer.h.1.attn.c_attn.weight")
    (matrix,) = weights.values()
    groups = matrix.float().reshape(3 * HIDDEN, -1, 64)
    scales = to_bf16(((groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 255).numpy())
    # The scales of a row lie side by side, the next row's eight bytes on.
    one, other = (re.escape(scales[r].tobytes()) for r in (row, row + 1))
    data = bytearray(bmodels["int8"].read_bytes())
    places = [match.start() for match in re.finditer(one + b".{4}" + other, bytes(data), re.DOTALL)]
    assert 1 <= len(places) <= 2
    for place in places:
        data[place : place + 2] = b"\0\0"
    (tmp_path / "small_int8.bmodel").write_bytes(data)
    report = diagnose(small.checkpoint, small.onnx, tmp_path / "small_int8.bmodel")
    sentence = found(report, "compiled", "block_1", "scale_zeroed")
    assert f"attn.c_attn.weight, row {row}, columns 0 to 63" in sentence


@pytest.fixture
def recompiled(small, bmodels, tmp_path):
    """(mode, net, folder of ONNX, settings) -> that mode's bmodel, in which one net was compiled anew."""

    def build(mode: str, net: str, nets: Path, **settings) -> Path:
        folder, file = tmp_path / "nets", nets / f"{net}.onnx"
        folder.mkdir()
        settings = net_settings(net, mode, 1, "io_alone", False) | settings
        try:
            other = compile_net(NetToCompile(net, file, read_signature(file), folder, settings))["bmodel"]
        finally:
            server.close_all()
        own = bmodels[mode].parent / f"{mode}_1dev"
        parts = {path.name: str(path / f"{path.name}.bmodel") for path in own.iterdir() if path.is_dir()}
        parts = {name: part for name, part in sorted(parts.items()) if Path(part).exists()}
        model_tool.combine(list((parts | {net: other}).values()), tmp_path / f"small_{mode}.bmodel")
        shutil.copy(small.onnx / "qwen.tiktoken", tmp_path)
        return tmp_path / f"small_{mode}.bmodel"

    return build


def test_int4_groups_of_the_wrong_size(small, recompiled):
    bmodel = recompiled("int4", "block_1", small.onnx, q_group_size=32)
    report = diagnose(small.checkpoint, small.onnx, bmodel)
    assert "groups of 32" in found(report, "compiled", "block_1", "group_size")


def test_weights_of_another_layer_and_one_level_deeper(small, bmodels, tmp_path, capsys):
    """A bmodel in which layer 1 has layer 0's weights; the wheel's tools find the first operation that has weights."""
    bmodel = tmp_path / bmodels["int8"].name
    data = bytearray(bmodels["int8"].read_bytes())
    nets, binaries = read_bmodel(bmodels["int8"]).nets, sum(struct.unpack_from("<II", data, 4))
    (right, size), (wrong, _) = (next(iter(nets[f"block_{i}"].weights)) for i in (0, 1))
    data[binaries + wrong : binaries + wrong + size] = data[binaries + right : binaries + right + size]
    bmodel.write_bytes(data)
    shutil.copy(bmodels["int8"].with_name(f"{bmodel.name}.json"), tmp_path)
    given = ["--checkpoint", str(small.checkpoint), "--onnx", str(small.onnx), "--bmodel", str(bmodel)]
    assert cli.main(["diagnose", *given]) == 1
    said = capsys.readouterr().out
    assert "compiled: block_1 is the first" in said and "weights of layer 0" in said
    assert said.splitlines()[-1].endswith("--deeper DIR")
    assert cli.main(["diagnose", *given, "--deeper", str(tmp_path / "deeper")]) == 1
    lowering, commands = capsys.readouterr().out.splitlines()[-2:]
    assert re.match(r"lowering: of \d\d tensors \S+ loses most, (3|4)\d", lowering)
    assert re.match(r"commands: of \d\d results [1-9]\d* are past .* the first is /layer/ln_1/", commands), commands


def test_one_level_deeper_a_healthy_net_is_healthy(small, bmodels, tmp_path):
    inputs = walk(OnnxNets(small.onnx), Text([1, 2, 3], [4, 5]))["decode", "block_cache_1"][0]
    deeper = go_deeper(small.onnx, bmodels["int8"], "block_cache_1", inputs, tmp_path / "deeper")
    assert deeper.wrong == [] and deeper.checked > 20 and len(deeper.lowered) > 20
    assert min(sqnr for _, sqnr in deeper.lowered.values()) > 20


# Faults in the loop.


class MaskOffByOne(QwenRunner):
    def feed(self, ids, positions, mask, new_rows):
        super().feed(
            ids, positions, np.concatenate([np.roll(mask[..., :-1], -1, axis=-1), mask[..., -1:]], -1), new_rows
        )


class PositionOffByOne(QwenRunner):
    def feed(self, ids, positions, mask, new_rows):
        super().feed(ids, positions + 1, mask, new_rows)


class CacheRowOffByOne(QwenRunner):
    def _cache_row(self, cache, position):
        return super()._cache_row(cache, position + 1)


class OtherDevicesHeads(QwenRunner):
    def prefill(self, ids):
        super().prefill(ids)
        for _, (values,) in self._caches:
            array = from_bf16(self.engine.read(values))
            self.engine.write(values, to_bf16(np.roll(array, array.shape[2] // 2, axis=2)))


class StaleStates(QwenRunner):
    """It forgets that states go from one memory to the other and back."""

    def prefill(self, ids):
        super().prefill(ids[:-1])


@pytest.mark.parametrize(
    ("runner", "net", "cause"),
    [
        (MaskOffByOne, "block_cache_0", "mask_shift"),
        (PositionOffByOne, "block_cache_0", "position_shift"),
        (CacheRowOffByOne, "block_cache_0", "cache_row"),
        (OtherDevicesHeads, "block_cache_0", "other_heads"),
        (StaleStates, "embedding", "ids"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_of_the_loop(small, bmodels, runner, net, cause):
    report = diagnose(small.checkpoint, bmodel=bmodels["bf16"], make_runner=runner)
    found(report, "loop", net, cause)


@pytest.fixture
def beside(bmodels, tmp_path):
    """Lines of a vocabulary -> the bf16 bmodel with another one beside it."""

    def copy(lines: list[bytes]) -> Path:
        (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
        for path in (bmodels["bf16"], bmodels["bf16"].with_name(bmodels["bf16"].name + ".json")):
            shutil.copy(path, tmp_path)
        return tmp_path / bmodels["bf16"].name

    return copy


def test_wrong_vocabulary(small, beside):
    lines = (small.onnx / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    (one, a), (other, b) = (line.split() for line in lines[300:302])
    lines[300:302] = [other + b" " + a + b"\n", one + b" " + b + b"\n"]
    sentence = found(diagnose(small.checkpoint, bmodel=beside(lines)), "loop", "tokenizer", "vocabulary")
    assert "2 ids" in sentence and "300 is" in sentence


def test_wrong_special_token(small, beside):
    lines = (small.onnx / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    sentence = found(diagnose(small.checkpoint, bmodel=beside(lines[:-1])), "loop", "tokenizer", "special_token")
    assert f"<|im_start|> is {RANKS} " in sentence and f"in the checkpoint {RANKS + 1}" in sentence


# A bmodel alone.


def spoilt(bmodel: Path, tmp_path: Path, old: bytes, new: bytes) -> Path:
    """A copy with its vocabulary, in which bytes were changed wherever they stand."""
    data = bmodel.read_bytes()
    assert old in data and len(old) == len(new)
    shutil.copy(bmodel.with_name("qwen.tiktoken"), tmp_path)
    (tmp_path / bmodel.name).write_bytes(data.replace(old, new))
    return tmp_path / bmodel.name


def test_a_healthy_bmodel_alone(bmodels, capsys):
    assert examine(bmodels["bf16"], "Hello").found is None
    assert cli.main(["diagnose", "--bmodel", str(bmodels["bf16"]), "--prompt", "Hello", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["found"] is None


def test_nan_in_a_bmodel_alone(small, bmodels, tmp_path):
    (norm,) = Checkpoint.open(small.checkpoint).load("transformer.h.1.ln_1.weight").values()
    row = to_bf16(norm.float().numpy()).tobytes()
    report = examine(spoilt(bmodels["bf16"], tmp_path, row, b"\xc0\x7f" * (len(row) // 2)), "Hello")
    found(report, "bmodel alone", "block_1", "not_finite")


def test_a_dead_head_in_a_bmodel_alone(edited, recompiled):
    def dead(array):
        array = array.copy()
        array[2 * HIDDEN + 32 : 2 * HIDDEN + 64] = 0
        return array

    nets = edited(rewrite("layer.attn.c_attn.weight", dead), "block_1")
    sentence = found(examine(recompiled("bf16", "block_1", nets), "Hello"), "bmodel alone", "block_1", "dead_head")
    assert "past_v of head 1" in sentence


def test_a_mask_that_is_not_looked_at_in_a_bmodel_alone(edited, recompiled):
    def ignore(graph):
        nodes = graph.node
        add = next(node for node in nodes if "attention_mask" in node.input)
        graph.initializer.append(numpy_helper.from_array(np.array([1e-20], dtype=np.float32), "hardly"))
        nodes.insert(list(nodes).index(add), onnx.helper.make_node("Mul", ["attention_mask", "hardly"], ["nothing"]))
        add = next(node for node in nodes if node.op_type == "Add" and "attention_mask" in node.input)
        add.input[:] = ["nothing" if name == "attention_mask" else name for name in add.input]

    bmodel = recompiled("bf16", "block_0", edited(ignore, "block_0"))
    found(examine(bmodel, "Hello"), "bmodel alone", "block_0", "mask_not_used")


def test_a_token_that_does_not_depend_on_the_prompt_in_a_bmodel_alone(edited, recompiled):
    nets = edited(rewrite("ln_f.weight", np.zeros_like), "lm_head")
    found(examine(recompiled("bf16", "lm_head", nets), "Hello"), "bmodel alone", "lm_head", "prompt_not_used")


def test_special_tokens_without_states_in_a_bmodel_alone(small, bmodels, tmp_path):
    (embedding,) = Checkpoint.open(small.checkpoint).load("transformer.wte.weight").values()
    rows = to_bf16(embedding.float().numpy())[RANKS + 1 : RANKS + 3].tobytes()
    report = examine(spoilt(bmodels["bf16"], tmp_path, rows, bytes(len(rows))), "Hello")
    found(report, "bmodel alone", "embedding", "chat_template")


# Bad input, and the command.


def refused(capsys, *arguments) -> str:
    assert cli.main(["diagnose", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_artefacts_of_two_models_are_refused(small, tiny, bmodels, tmp_path, capsys):
    assert "two different models" in refused(capsys, "--checkpoint", tiny, "--onnx", small.onnx)
    assert "two different models" in refused(capsys, "--checkpoint", tiny, "--bmodel", bmodels["bf16"])
    other = write_checkpoint(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.h.1.mlp.w1.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    assert "block_1 of other weights" in refused(capsys, "--checkpoint", other, "--onnx", small.onnx)


def test_a_bmodel_of_the_same_shape_with_other_weights_is_refused(small, bmodels, tmp_path, capsys):
    (embedding,) = Checkpoint.open(small.checkpoint).load("transformer.wte.weight").values()
    rows = to_bf16(embedding.float().numpy())
    bmodel = spoilt(bmodels["bf16"], tmp_path, rows.tobytes(), rows[::-1].tobytes())
    assert cli.main(["diagnose", "--checkpoint", str(small.checkpoint), "--bmodel", str(bmodel)]) == 2
    assert "two different models" in capsys.readouterr().err


def test_another_chip_and_missing_folders_are_refused(small, bmodels, tmp_path, capsys):
    shutil.copy(bmodels["bf16"].with_name("qwen.tiktoken"), tmp_path)
    data = bmodels["bf16"].read_bytes()
    (tmp_path / "other.bmodel").write_bytes(data.replace(b"BM1684X\0", b"BM1688\0\0", 1))
    for arguments in ([], ["--checkpoint", small.checkpoint]):
        assert "BM1684X" in refused(capsys, *arguments, "--bmodel", tmp_path / "other.bmodel")
    assert "no folder" in refused(capsys, "--checkpoint", small.checkpoint, "--onnx", tmp_path / "none")
    given = "--checkpoint", small.checkpoint, "--onnx", small.onnx, "--bmodel", bmodels["bf16"]
    assert "needs --checkpoint" in refused(capsys, *given[:2], "--deeper", tmp_path / "new")
    assert "is there already" in refused(capsys, *given, "--deeper", tmp_path)
    refused(capsys, "--checkpoint", tmp_path / "none")
    refused(capsys, "--checkpoint", small.checkpoint, "--bmodel", tmp_path / "none.bmodel")
    assert "--checkpoint DIR" in refused(capsys, "--onnx", small.onnx)


def test_the_page_and_its_exit_code(small, edited, capsys):
    nets = edited(rewrite("layer.attn.c_proj.weight", np.transpose), "block_1")
    assert cli.main(["diagnose", "--checkpoint", str(small.checkpoint), "--onnx", str(nets)]) == 1
    page = capsys.readouterr().out
    assert "[ ok  ] patched" in page and "[FAULT] ONNX" in page and "attn.c_proj is transposed" in page
    assert len(page.splitlines()) < 60
