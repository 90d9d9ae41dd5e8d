import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from helpers import artefacts, machine
from helpers.checkpoint.weights import Checkpoint
from helpers.cost import Cost
from helpers.errors import UserError
from helpers.export import exporting, modules, tracing
from helpers.files import sha256_file
from helpers.nets import prefill_mask
from helpers.parity.chain import HostChain, parity
from helpers.parity.hosts import OnnxNets, OriginalModel, TorchNets
from helpers.patching import patching
from tests.conftest import SEQ_LENGTH
from tests.unit.small_nets import write_random_checkpoint


@pytest.fixture(scope="module")
def prompt(chat_prompt, demo_questions):
    return chat_prompt(demo_questions[0])


def test_every_net_is_there_with_its_contract(onnx_tiny, patched_tiny):
    c = Checkpoint.open(patched_tiny)
    s, h, d, size, vocab = SEQ_LENGTH, c.heads, c.head_dim, c.hidden_size, c.vocab_size
    contract = {
        "embedding": ([[1, s]], [[1, s, size]]),
        "embedding_cache": ([[1, 1]], [[1, 1, size]]),
        "block_3": ([[1, s, size], [1, s], [1, 1, s, s]], [[1, s, size], [1, s, h, d], [1, s, h, d]]),
        "block_cache_3": (
            [[1, 1, size], [1, 1], [1, 1, 1, s + 1], [1, s, h, d], [1, s, h, d]],
            [[1, 1, size], [1, 1, h, d], [1, 1, h, d]],
        ),
        "lm_head": ([[1, size]], [[1, vocab]]),
        "lm_head_with_topk": ([[1, size]], [[1, 1]]),
        "greedy_head": ([[1, vocab]], [[1, 1]]),
        "penalty_sample_head": ([[1, vocab], [1, s], [1], [1], [1]], [[1, 50], [1, 50]]),
    }
    inputs, cache = ["input_states", "position_ids", "attention_mask"], ["hidden_states", "past_k", "past_v"]
    names = {
        "block_3": (inputs, cache),
        "block_cache_3": ([*inputs, "history_k", "history_v"], cache),
        "penalty_sample_head": (["m_logits", "input_ids", "top_p", "temperature", "penalty"], ["probs", "token"]),
    }
    outputs = artefacts.read_manifest(onnx_tiny)["outputs"]
    assert outputs.keys() == {path.name for path in onnx_tiny.iterdir() if path.suffix in (".onnx", ".weights")}
    for net, shapes in contract.items():
        model = onnx.load(onnx_tiny / f"{net}.onnx", load_external_data=False)
        # The one that the documented export has and TPU-MLIR's front end was made for.
        assert [entry.version for entry in model.opset_import] == [15]
        graph = model.graph
        found = tuple([value.name for value in values] for values in (graph.input, graph.output))
        assert found == names.get(net, found)
        onnx.checker.check_model(str(onnx_tiny / f"{net}.onnx"))
        found = tuple(
            [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values]
            for values in (graph.input, graph.output)
        )
        assert found == shapes, net
        # The checker does not look whether an operator takes such types.
        onnxruntime.InferenceSession(str(onnx_tiny / f"{net}.onnx"), providers=["CPUExecutionProvider"])
        # The compiler fuses attention where the mask is the second operand.
        masked = [node.input[1] for node in graph.node if node.op_type == "Add" and "attention_mask" in node.input]
        assert masked == ["attention_mask"] * net.startswith("block")


def test_onnx_agrees_with_pytorch_net_by_net_and_in_the_chain(patched_tiny, onnx_tiny, prompt, stop_ids, tiny):
    chain = HostChain(TorchNets(patched_tiny, SEQ_LENGTH), record={})
    first = int(chain.prefill(prompt).argmax())
    chain.decode(first)
    assert all(f["max_abs"] < 1e-4 for f in parity(chain.record, OnnxNets(onnx_tiny), tokens=len(prompt)).values())
    expected = OriginalModel(tiny).greedy(prompt, stop_ids, 96, SEQ_LENGTH)
    assert HostChain(OnnxNets(onnx_tiny)).greedy(prompt, stop_ids, 96) == expected


@pytest.mark.parametrize("base, trained", [(1_000_000, 16), (100_000, 16), (10_000, 12)])
def test_nets_rotate_scale_and_normalise_as_the_checkpoint_says(base, trained, tmp_path):
    """Outputs of the ONNX nets, position by position, against the checkpoint's own code in PyTorch.

    A decode net's past of S rows looks longer than what the model was trained for, and Qwen's code would scale its
    query. Here nothing in config.json says so: then the code's own default does, which the patch does not see.
    """
    settings = {"rotary_emb_base": base, "seq_length": trained, "layer_norm_epsilon": 0.02}
    checkpoint = write_random_checkpoint(tmp_path / "random", **settings)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["use_logn_attn"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    patched = tmp_path / "patched"
    patching.apply(checkpoint, out=patched, seq_length=16)
    said = []
    folder = exporting.export(patched, tmp_path / "onnx", 16, log=said.append)
    assert any("trained for" in line for line in said) == (trained < 16)
    assert artefacts.read_manifest(folder)["trained_seq_length"] == trained
    nets = {"embedding", "embedding_cache", *(f"{kind}_{i}" for kind in ("block", "block_cache") for i in (0, 1))}
    nets |= {"lm_head", "lm_head_with_topk", "greedy_head", "penalty_sample_head"}
    written = {path.stem for path in folder.glob("*.onnx")}
    groups = artefacts.read_manifest(folder)["nets"]
    assert written == groups.keys() == nets >= set(groups.values())
    chain, original = HostChain(OnnxNets(folder)), OriginalModel(checkpoint)
    text = np.random.default_rng(0).integers(0, 512, trained).tolist()
    found = [chain.prefill(text[: trained // 2])] + [chain.decode(token) for token in text[trained // 2 :]]
    for count, logits in enumerate(found, start=trained // 2):
        np.testing.assert_allclose(logits, original.states(text[:count])[1], atol=2e-4, err_msg=f"{count} tokens")
    states = np.random.default_rng(1).normal(size=(1, 128))
    logits = chain.nets.run("lm_head", states)[0]
    for net, value in (("lm_head_with_topk", states), ("greedy_head", logits)):
        assert chain.nets.run(net, value)[0].tolist() == [[logits.argmax()]], net


def test_a_decode_step_of_several_rows_gives_what_each_would_alone(tmp_path):
    checkpoint, patched = write_random_checkpoint(tmp_path / "random"), tmp_path / "patched"
    patching.apply(checkpoint, out=patched, seq_length=16)
    folder, rows, past = exporting.export(patched, tmp_path / "onnx", 16, rows=3), 3, 6
    blocks = {f"{kind}_{i}" for kind in ("block", "block_cache") for i in (0, 1)}
    wanted = {"embedding", "embedding_cache", "lm_head", "greedy_head"} | blocks
    assert {path.stem for path in folder.glob("*.onnx")} == set(artefacts.read_manifest(folder)["nets"]) == wanted
    text = np.random.default_rng(0).integers(0, 512, past + rows).tolist()
    nets = OnnxNets(folder)
    states = nets.run("embedding", np.array([text[:past] + [0] * 10]))[0]
    new = nets.run("embedding_cache", np.array([text[past:]]))[0]
    mask = np.full((1, 1, rows, 16 + rows), -9984.0)
    mask[..., :past] = 0
    mask[..., 16:][..., np.tri(rows, dtype=bool)] = 0
    for i in (0, 1):
        places = np.minimum(np.arange(16), past)[None]
        states, *cache = nets.run(f"block_{i}", states, places, prefill_mask(past, 16))
        new, *_ = nets.run(f"block_cache_{i}", new, np.arange(past, past + rows)[None], mask, *cache)
        # An Add with the mask in front is none that the compiler would fuse.
        graph = onnx.load(folder / f"block_cache_{i}.onnx", load_external_data=False).graph
        assert [node.input[0] for node in graph.node if node.op_type == "Add" and "attention_mask" in node.input] == [
            "attention_mask"
        ]
    logits, original = nets.run("lm_head", new[0])[0], OriginalModel(checkpoint)
    for row in range(rows):
        expected = original.states(text[: past + row + 1])[1]
        np.testing.assert_allclose(logits[row], expected, atol=2e-4, err_msg=f"row {row}")
    assert nets.run("greedy_head", logits)[0].tolist() == logits.argmax(axis=1)[:, None].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.5])
def test_the_sampling_head_computes_its_formula(sample_head, penalty):
    """The net as the code of now makes it, in onnxruntime, for all logits of a vocabulary; tokens without a tie."""
    random, size = np.random.default_rng(2), 3008
    head = sample_head(40)
    # The best logits of 3008 are 3 above the mean: all of them positive, some, none.
    for top_p, temperature, mean in ((0.8, 1.0, 0), (0.3, 0.6, -2.8), (0.05, 3.0, -6), (0.999, 0.2, -2.8)):
        logits = np.float32(random.normal(mean, 1, size))
        # Likely tokens of both signs, some of them twice, and others of no consequence.
        said = np.concatenate([np.argsort(-logits)[:30:2], random.integers(0, size, 22), np.argsort(-logits)[:6:2]])
        probabilities, tokens = head(logits[None], said[None], top_p, temperature, penalty)
        wanted = logits.astype(np.float64)
        for token in set(said.tolist()):
            wanted[token] *= penalty if wanted[token] < 0 else 1 / penalty
        order = np.argsort(-wanted)[:50]
        weights = np.exp((wanted[order] - wanted[order[0]]) / temperature)
        kept = (np.cumsum(weights) / weights.sum() < top_p) | (np.arange(50) < 5)
        assert probabilities.shape == tokens.shape == (1, 50) and tokens[0].tolist() == order.tolist()
        np.testing.assert_allclose(probabilities[0], weights * kept / (weights * kept).sum(), atol=1e-6)


@pytest.mark.parametrize("net", ["block_2", "lm_head", "embedding"])
def test_one_corrupted_weight_turns_parity_red(net, onnx_tiny, patched_tiny, prompt, tmp_path):
    folder = tmp_path / "onnx"
    shutil.copytree(onnx_tiny, folder)
    weights = folder / f"{net}.weights"
    values = np.fromfile(weights, dtype=np.float32)
    # A used one: for the embedding a row of the prompt, elsewhere any.
    index = prompt[0] * 128 if net == "embedding" else len(values) // 2
    values[index] += 1.0
    values.tofile(weights)
    chain = HostChain(TorchNets(patched_tiny, SEQ_LENGTH), record={})
    chain.prefill(prompt)
    figures = parity(chain.record, OnnxNets(folder), tokens=len(prompt))
    assert figures[net]["max_abs"] > 1e-3
    assert all(f["max_abs"] < 1e-4 for other, f in figures.items() if other != net)


def test_a_second_export_writes_nothing_and_a_damaged_file_is_written_again(onnx_tiny, patched_tiny, tmp_path):
    folder = tmp_path / "onnx"
    shutil.copytree(onnx_tiny, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    whole = sha256_file(folder / "block_1.weights")
    with open(folder / "block_1.weights", "r+b") as file:
        file.write(b"\xff")
    exporting.export(patched_tiny, folder, SEQ_LENGTH)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {
        "block_1.onnx", "block_1.onnx.json", "block_1.weights", "block_cache_1.onnx", "manifest.json"
    }  # fmt: skip
    assert sha256_file(folder / "block_1.weights") == whole


def test_weights_config_and_code_that_changed_are_exported_anew(tmp_path):
    """Into one folder from one checkpoint after the other; what the nets of a change have in common stays."""
    from safetensors.torch import load_file, save_file

    def changed(name, **config):
        checkpoint = write_random_checkpoint(tmp_path / name, **config)
        tensors = load_file(checkpoint / "model.safetensors")
        for weight in ("transformer.ln_f.weight", "lm_head.weight", "transformer.h.1.mlp.w1.weight"):
            if name == weight:
                tensors[weight][-1] += 1
        save_file(tensors, checkpoint / "model.safetensors")
        code = checkpoint / "modeling_qwen.py"
        if name == "code":
            assert code.read_text().count("F.silu(") == 1
            code.write_text(code.read_text().replace("F.silu(", "F.relu("))
        patching.apply(checkpoint, out=tmp_path / "patched" / name, seq_length=16)
        exporting.export(tmp_path / "patched" / name, tmp_path / "onnx", 16)
        return {path.name: path.read_bytes() for path in (tmp_path / "onnx").iterdir() if path.suffix != ".json"}

    def differing(before, after):
        return {name for name in before if before[name] != after[name]}

    (tmp_path / "patched").mkdir()
    first = changed("first")
    blocks = {f"{kind}_{i}.onnx" for kind in ("block", "block_cache") for i in (0, 1)}
    assert differing(first, changed("transformer.ln_f.weight")) == {"lm_head.weights"}
    assert differing(first, changed("lm_head.weight")) == {"lm_head.weights"}
    assert differing(first, changed("transformer.h.1.mlp.w1.weight")) == {"block_1.weights"}
    assert differing(first, changed("code")) == blocks
    assert differing(first, changed("again")) == set()
    heads = {"lm_head.onnx", "lm_head_with_topk.onnx"}
    assert differing(first, changed("config", layer_norm_epsilon=0.02)) == blocks | heads


def test_a_weight_file_has_every_value_at_a_page_of_its_own(tmp_path, monkeypatch):
    """In pieces, as weights of more than 64 MB are written."""
    import torch

    monkeypatch.setattr(tracing, "_COPY_BYTES", 4 * 7)
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(14), "c": torch.randn(1)}
    weights = tracing.WeightFile(tmp_path / "weights")
    weights.write(tensors.items())
    content = (tmp_path / "weights").read_bytes()
    for name, (offset, length) in weights.places.items():
        assert offset % 4096 == 0
        found = np.frombuffer(content[offset : offset + length], dtype="<f4")
        np.testing.assert_array_equal(found, tensors[name].float().reshape(-1).numpy())


def test_a_weight_that_the_exporter_drops_or_the_checkpoint_lacks_is_an_error(patched_tiny):
    import torch

    builder = modules.NetBuilder(Checkpoint.open(patched_tiny), 64)
    module = builder.module("embedding")
    graph = tracing.trace(module, "embedding", builder.example("embedding"))
    module.unused = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="dropped weights: unused"):
        tracing.attach_weights(graph, module, tracing.WeightFile(None))
    less = {name: file for name, file in builder.checkpoint.files.items() if name != "transformer.h.1.ln_1.weight"}
    with pytest.raises(UserError, match="lack ln_1.weight under 'transformer.h.1.'"):
        modules.load_weights(builder.module("block_1"), replace(builder.checkpoint, files=less), "block_1")


def test_what_is_written_already_needs_no_room(onnx_tiny, patched_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda path: 10**5)
    before = json.loads((onnx_tiny / "manifest.json").read_bytes())["cost"]
    said = []
    exporting.export(patched_tiny, onnx_tiny, SEQ_LENGTH, log=said.append)
    assert said == []  # nothing is to do
    assert json.loads((onnx_tiny / "manifest.json").read_bytes())["cost"] == before
    with pytest.raises(UserError, match="needs 0.006 GB of disk, 0.000 GB are free on the disk that holds"):
        exporting.export(patched_tiny, tmp_path, SEQ_LENGTH)


def test_the_manifest_has_what_was_predicted_beside_what_it_took(patched_tiny, tmp_path):
    folder = exporting.export(patched_tiny, tmp_path / "onnx", 16)
    cost = json.loads((folder / "manifest.json").read_bytes())["cost"]
    written = sum(path.stat().st_size for path in folder.glob("*.weights"))
    assert written <= cost["taken"]["disk_bytes"] < 2 * written
    assert 0.5 < cost["predicted"]["disk_bytes"] / cost["taken"]["disk_bytes"] < 2
    # The first group has told how fast this machine is.
    assert cost["before"] | {"seconds": 0} == cost["predicted"] | {"seconds": 0}
    assert cost["taken"]["seconds"] > 0 and cost["taken"]["memory_bytes"] > 0


def test_what_is_half_there_needs_half(onnx_tiny, patched_tiny, tmp_path):
    folder = tmp_path / "onnx"
    shutil.copytree(onnx_tiny, folder)
    settings = json.loads((folder / "manifest.json").read_bytes())["settings"]
    checkpoint = Checkpoint.open(patched_tiny)
    assert exporting.expected(checkpoint, folder, {}, settings).before == Cost(0, 0, 0)
    (folder / "block_1.weights").unlink()
    part = exporting.expected(checkpoint, folder, {}, settings).before
    whole = exporting.expected(checkpoint, tmp_path / "none", {}, settings).before
    assert 0 < 4 * part.disk_bytes < whole.disk_bytes and 0 < part.seconds < whole.seconds
    # What is there from another length goes when its successor comes.
    longer = exporting.expected(checkpoint, folder, {}, settings | {"seq_length": 512}).before
    assert longer.disk_bytes < whole.disk_bytes / 2


def test_another_sequence_length_is_another_export(patched_tiny, tmp_path):
    folder = exporting.export(patched_tiny, tmp_path / "onnx", 64)
    assert json.loads((folder / "manifest.json").read_text())["seq_length"] == 64
    shape = onnx.load(folder / "block_0.onnx", load_external_data=False).graph.input[2].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in shape] == [1, 1, 64, 64]


@pytest.mark.parametrize("seq_length", [0, -1])
def test_a_sequence_length_that_is_none_is_refused(seq_length, patched_tiny, tmp_path):
    with pytest.raises(UserError, match="seq_length"):
        exporting.export(patched_tiny, tmp_path, seq_length)


def test_an_unpatched_checkpoint_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="patch"):
        exporting.export(tiny, tmp_path, SEQ_LENGTH)


def test_too_little_memory_and_disk_are_said_before_anything_is_written(patched_tiny, tmp_path, monkeypatch):

    monkeypatch.setattr(machine, "free_memory", lambda: 10**8)
    with pytest.raises(UserError, match="memory"):
        exporting.export(patched_tiny, tmp_path / "onnx", SEQ_LENGTH)
    monkeypatch.undo()
    monkeypatch.setattr(machine, "free_disk", lambda path: 10**5)
    with pytest.raises(UserError, match="disk"):
        exporting.export(patched_tiny, tmp_path / "onnx", SEQ_LENGTH)
    assert not (tmp_path / "onnx").exists()


def test_what_it_says_to_need_is_what_an_export_takes(onnx_tiny, patched_tiny):
    """Disk: the files that were written. Memory: what was measured for Qwen-7B's size, see README.md."""
    checkpoint = Checkpoint.open(patched_tiny)
    written = sum(path.stat().st_size for path in onnx_tiny.glob("*.weights"))
    assert exporting.needed_bytes(checkpoint)[1] == pytest.approx(written, rel=0.02)
    large = replace(checkpoint, hidden_size=4096, heads=32, intermediate_size=11008, vocab_size=151936)
    # 5.8 GB resident in all, of which a process that has imported torch begins with 0.56 (its libraries are of files).
    assert 5.2e9 < exporting.needed_bytes(large, 512)[0] < 1.15 * 5.2e9
    # A block is the largest net where the vocabulary is small, and attention where S is large: more of it needs more.
    small = replace(large, vocab_size=1000)
    assert 0.9e9 < exporting.needed_bytes(small, 512)[0] < exporting.needed_bytes(large, 512)[0]
    longer = [exporting.needed_bytes(small, length)[0] - exporting.needed_bytes(small)[0] for length in (2048, 4096)]
    assert longer[0] > 32 * 2048**2 * 4 and longer[1] == pytest.approx(4 * longer[0])


def test_weights_that_are_equal_stay_apart(patched_tiny, tmp_path):
    """Two norms of ones: the exporter would store one and alias the other, and the compiler then knows only one."""
    builder = modules.NetBuilder(Checkpoint.open(patched_tiny), 64)
    module = builder.module("block")
    graph = tracing.trace(module, "block", builder.example("block"))
    assert {name for name, _ in module.named_parameters()} <= {value.name for value in graph.graph.input}


def test_a_sequence_length_beyond_the_memory_is_refused(patched_tiny, tmp_path):
    with pytest.raises(UserError, match="take a smaller --seq_length, [0-9.]+ GB are for attention over 1000000"):
        exporting.export(patched_tiny, tmp_path / "onnx", 1_000_000)
    assert not (tmp_path / "onnx").exists()


def test_code_that_lacks_a_class_is_one_sentence(patched_tiny, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(patched_tiny, folder)
    (folder / "patches.json").unlink()
    code = (folder / "modeling_qwen.py").read_text()
    (folder / "modeling_qwen.py").write_text(code.replace("class RMSNorm(", "class Norm("))
    with pytest.raises(UserError, match="cannot build a block from its config.json .NameError"):
        exporting.export(folder, tmp_path / "onnx", 64)
    (folder / "modeling_qwen.py").write_text(code.replace("class QWenPreTrainedModel(", "class Pre("))
    with pytest.raises(UserError, match="cannot be imported"):
        exporting.export(folder, tmp_path / "onnx", 64)


def test_nets_of_another_version_of_the_exporting_code_are_made_anew(patched_tiny, tmp_path, own_copy):
    out = tmp_path / "onnx"

    def export():
        done = own_copy.run("export", "--model_path", patched_tiny, "--out", out, "--seq_length", 16)
        assert done.returncode == 0, done.stderr
        return done.stderr, {path.name: path.read_bytes() for path in out.glob("*.onnx")}

    said, first = export()
    assert "made anew" not in said
    own_copy.edit("helpers/export/modules.py", "seen < 0, seen * penalty", "seen > 0, seen * penalty")
    said, second = export()
    assert said.count("made anew") == 1 and "exporting" in said
    assert [name for name in first if first[name] != second[name]] == ["penalty_sample_head.onnx"]
    assert "made anew" not in export()[0]
    own_copy.edit("helpers/nets.py", "\nCANDIDATES = 50", "\nCANDIDATES = 40")
    _, third = export()
    assert [name for name in second if second[name] != third[name]] == ["penalty_sample_head.onnx"]


def test_a_checkpoint_that_other_code_patched_is_patched_anew_before_it_is_exported(tiny, tmp_path, own_copy):
    folder = tmp_path / "patched"
    export = ("export", "--model_path", folder, "--out", tmp_path / "onnx", "--seq_length", 16)
    patch = ("patch", "--model_path", tiny, "--out", folder)
    assert own_copy.run(*patch).returncode == 0
    before = (folder / "modeling_qwen.py").read_bytes()
    own_copy.edit("patches/02_constant_scale.py", 'f"({ast.unparse(divisor.args[1])})"', "'((self.head_dim ** 0.5))'")
    done = own_copy.run(*export)
    assert done.returncode == 2 and "was patched by other code" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "modeling_qwen.py").read_bytes() == before
    assert own_copy.run(*patch).returncode == 0
    assert (folder / "modeling_qwen.py").read_bytes() != before
    assert own_copy.run(*export).returncode == 0
    assert own_copy.run("patch", "--model_path", folder, "--revert").returncode == 0
    assert (folder / "modeling_qwen.py").read_bytes() == (tiny / "modeling_qwen.py").read_bytes()


def test_a_folder_that_may_only_be_read_and_is_up_to_date_is_no_failure(
    patched_tiny, onnx_tiny, tiny, as_user, open_folder
):
    home, onnx, patched = open_folder / "home", open_folder / "onnx", open_folder / "patched"
    home.mkdir()
    shutil.copytree(onnx_tiny, onnx)
    shutil.copytree(patched_tiny, patched)
    before = {path: path.stat().st_mtime_ns for folder in (onnx, patched) for path in folder.rglob("*")}
    for command in (
        ["export", "--model_path", patched, "--out", onnx, "--seq_length", SEQ_LENGTH],
        ["patch", "--model_path", patched],
    ):
        line = [*as_user(12345, home), sys.executable, "-m", "helpers", *map(str, command)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("lost", ["manifest.json", "qwen.tiktoken", "lm_head.onnx"])
def test_a_disk_that_is_full_is_named(patched_tiny, onnx_tiny, tmp_path, preload, lost):
    """Where there is no room the system refuses to write, and names no file."""
    full = shutil.copytree(onnx_tiny, tmp_path / "full")
    (full / lost).unlink()
    environment = preload(
        """
        #include <stdio.h>
        #include <sys/syscall.h>
        ssize_t write(int file, const void *bytes, size_t count) {
            char link[64], path[4096] = {0};
            snprintf(link, sizeof link, "/proc/self/fd/%d", file);
            if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, "/full/")) { errno = ENOSPC; return -1; }
            return syscall(SYS_write, file, bytes, count);
        }
        """
    )
    command = [sys.executable, "-m", "helpers", "export", "--model_path", patched_tiny, "--out", full]
    command += ["--seq_length", str(SEQ_LENGTH)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ") and "No space left on" in error and str(full) in error
