"""The checkpoint reader, on the embedded weights in every layout that real checkpoints come in."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoint.weights import Checkpoint
from helpers.errors import UserError

TINY = Path(__file__).parents[2] / "models" / "tiny"
BLOCK = "transformer.h.1"


@pytest.fixture(scope="module")
def weights():
    return load_file(TINY / "model.safetensors")


def halves(weights):
    names = sorted(weights)
    return {k: weights[k] for k in names[::2]}, {k: weights[k] for k in names[1::2]}


def write(folder: Path, weights: dict, layout: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TINY / "config.json", folder)
    bins = layout.startswith("bin")
    save = torch.save if bins else save_file
    stem, suffix = ("pytorch_model", ".bin") if bins else ("model", ".safetensors")
    if layout.endswith("sharded"):
        weight_map = {}
        for i, part in enumerate(halves(weights), start=1):
            name = f"{stem}-0000{i}-of-00002{suffix}"
            save(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    else:
        save(weights, folder / f"{stem}{suffix}")
    return folder


LAYOUTS = ["safetensors", "safetensors sharded", "bin", "bin sharded"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tmp_path, weights, layout):
    checkpoint = Checkpoint.open(write(tmp_path / "c", weights, layout))
    assert checkpoint.names() == sorted(weights)
    block = checkpoint.load(BLOCK)
    assert sorted(block) == sorted(name for name in weights if name.startswith(BLOCK + "."))
    assert all(torch.equal(block[name], weights[name]) for name in block)
    assert list(checkpoint.load("lm_head.weight")) == ["lm_head.weight"]
    original = Checkpoint.open(TINY)
    assert checkpoint.digest(BLOCK) == original.digest(BLOCK)
    assert checkpoint.digest("") == original.digest("")


def test_sizes_are_those_of_one_branch_and_one_head():
    checkpoint = Checkpoint.open(TINY)
    sizes = (checkpoint.layers, checkpoint.hidden_size, checkpoint.heads, checkpoint.head_dim)
    assert sizes == (4, 128, 4, 32)
    assert checkpoint.intermediate_size == 384 == checkpoint.config["intermediate_size"] // 2
    assert (checkpoint.vocab_size, checkpoint.eps, checkpoint.rotary_base) == (3008, 1e-6, 10000)


def test_august_keys_are_understood(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    for new, old in (
        ("hidden_size", "n_embd"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("intermediate_size", "ffn_hidden_size"),
    ):
        config[old] = config.pop(new)
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(folder).shapes() == Checkpoint.open(TINY).shapes()


def test_a_prefix_ends_at_a_dot(tmp_path, weights):
    more = weights | {"transformer.h.10.ln_1.weight": torch.ones(128)}
    checkpoint = Checkpoint.open(write(tmp_path / "c", more, "safetensors"))
    assert not any(name.startswith("transformer.h.10") for name in checkpoint.load(BLOCK))
    assert sorted(checkpoint.load(BLOCK)) == sorted(checkpoint.load(BLOCK + "."))


def test_only_the_named_shard_is_read(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "safetensors sharded")
    first, second = halves(weights)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"damaged")
    checkpoint = Checkpoint.open(folder)
    name = next(iter(first))
    assert torch.equal(checkpoint.load(name)[name], weights[name])
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors .* is damaged"):
        checkpoint.load(next(iter(second)))


@pytest.mark.parametrize("name", ["transformer.h.1.ln_2.weight", "transformer.h.1.attn.c_attn.bias"])
def test_one_bit_of_one_weight_changes_the_digest_of_its_block_only(tmp_path, weights, name):
    changed = dict(weights)
    bits = changed[name].clone().view(torch.int16)
    bits.view(-1)[7] ^= 1
    changed[name] = bits.view(torch.bfloat16)
    one = Checkpoint.open(write(tmp_path / "c", changed, "safetensors"))
    other = Checkpoint.open(TINY)
    assert one.digest(BLOCK) != other.digest(BLOCK)
    assert one.digest("transformer.h.2") == other.digest("transformer.h.2")


def test_the_same_bytes_by_another_name_or_of_another_dtype_have_another_digest(tmp_path, weights):
    one, two = f"{BLOCK}.mlp.w1.weight", f"{BLOCK}.mlp.w2.weight"
    turned = weights | {one: weights[two], two: weights[one]}
    halves = weights | {one: weights[one].view(torch.float16)}
    digests = {
        Checkpoint.open(write(tmp_path / str(number), tensors, "safetensors")).digest(BLOCK)
        for number, tensors in enumerate((weights, turned, halves))
    }
    assert len(digests) == 3


def test_what_a_config_leaves_out_is_what_the_checkpoints_own_code_takes(tmp_path, weights):
    from helpers.checkpoint import modeling

    folder = write(tmp_path / "c", weights, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    for key in ("layer_norm_epsilon", "rotary_emb_base", "no_bias"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    own = modeling.load_modeling(TINY).QWenConfig()
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.eps, checkpoint.rotary_base) == (own.layer_norm_epsilon, own.rotary_emb_base)


def test_not_a_checkpoint(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="no config.json"):
            Checkpoint.open(folder)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="not readable JSON"):
            Checkpoint.open(tmp_path)
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no weights"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("kind", "remedy"), [("qwen2", "llm_convert.py"), ("llama", "llm_convert.py"), ("bert", "Qwen-7B-Chat")]
)
def test_another_kind_of_model_is_sent_where_it_belongs(tmp_path, kind, remedy):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"{kind}.*{remedy}"):
        Checkpoint.open(tmp_path)


def test_a_quantised_checkpoint_is_refused(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(UserError, match="quantised already"):
        Checkpoint.open(folder)


def test_a_quantisation_of_nothing_is_none(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(folder).layers == 4


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_what_an_editor_puts_before_a_json_file_is_read(tmp_path, weights, encoding):
    folder = write(tmp_path / "c", weights, "bin sharded")
    for name in ("config.json", "pytorch_model.bin.index.json"):
        (folder / name).write_text((folder / name).read_text(), encoding=encoding)
    assert Checkpoint.open(folder).names() == sorted(weights)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="no config.json"):
        Checkpoint.open(tmp_path)


def changed_weights(weights):
    """What fine-tuning of the attention alone leaves."""
    return {name: tensor * 2 if "attn.c_attn" in name else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("old", LAYOUTS)
@pytest.mark.parametrize("new", LAYOUTS)
def test_two_whole_sets_of_weights_are_refused_until_one_is_moved_away(tmp_path, weights, old, new):
    if old == new:
        return
    files = {}
    for layout, content in ((old, weights), (new, changed_weights(weights))):
        before = set(tmp_path.glob("c/*"))
        write(tmp_path / "c", content, layout)
        names = sorted(path.name for path in set(tmp_path.glob("c/*")) - before if "-of-" not in path.name)
        files[layout] = names[-1]
    with pytest.raises(UserError, match="two whole sets of weights") as caught:
        Checkpoint.open(tmp_path / "c")
    assert all(file in str(caught.value) for file in files.values())
    (tmp_path / "c" / files[old]).rename(tmp_path / files[old])
    name = f"{BLOCK}.attn.c_attn.bias"
    assert torch.equal(Checkpoint.open(tmp_path / "c").load(name)[name], weights[name] * 2)
    (tmp_path / "c" / files[new]).unlink()
    (tmp_path / files[old]).rename(tmp_path / "c" / files[old])
    assert torch.equal(Checkpoint.open(tmp_path / "c").load(name)[name], weights[name])


def test_the_same_weights_in_both_formats_are_one_set(tmp_path, weights):
    write(tmp_path / "c", {name: tensor.float() for name, tensor in weights.items()}, "bin")
    checkpoint = Checkpoint.open(write(tmp_path / "c", weights, "safetensors sharded"))
    assert {file.suffix for file in checkpoint.files.values()} == {".safetensors"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_of_every_width_are_read(tmp_path, weights, dtype):
    checkpoint = Checkpoint.open(write(tmp_path / "c", {n: t.to(dtype) for n, t in weights.items()}, "safetensors"))
    for name, tensor in checkpoint.load(BLOCK).items():
        assert tensor.dtype == dtype and torch.equal(tensor, weights[name].to(dtype))


def test_sets_that_differ_in_their_last_layer_are_two(tmp_path, weights):
    write(tmp_path / "c", weights, "bin")
    write(tmp_path / "c", weights | {"transformer.h.3.attn.c_attn.weight": torch.zeros(384, 128)}, "safetensors")
    with pytest.raises(UserError, match="two whole sets of weights"):
        Checkpoint.open(tmp_path / "c")


def test_a_config_with_biases_wants_them(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"no_bias": False}))
    with pytest.raises(UserError, match="lack transformer.h.0.attn.c_proj.bias"):
        Checkpoint.open(folder)


def test_a_set_that_is_not_whole_is_no_choice(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "safetensors sharded")
    save_file({"lm_head.weight": weights["lm_head.weight"]}, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert Checkpoint.open(folder).files["lm_head.weight"].name.startswith("model-0000")
    save_file(weights, folder / "model.safetensors")
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert Checkpoint.open(folder).files["lm_head.weight"].name == "model.safetensors"


def test_parameters_in_a_bin_are_read_as_tensors(tmp_path, weights):
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}
    checkpoint = Checkpoint.open(write(tmp_path / "c", parameters, "bin sharded"))
    assert not any(tensor.requires_grad for tensor in checkpoint.load(BLOCK).values())
    assert checkpoint.digest("") == Checkpoint.open(TINY).digest("")


def test_a_bin_of_the_old_format_is_named_for_what_it_is(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "bin")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="pytorch_model.bin .* is damaged or .*_use_new_zipfile_serialization"):
        Checkpoint.open(folder)
    # The remedy of the message.
    torch.save(torch.load(folder / "pytorch_model.bin", weights_only=True), folder / "pytorch_model.bin")
    assert Checkpoint.open(folder).digest(BLOCK) == Checkpoint.open(TINY).digest(BLOCK)


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (torch.nn.Linear(1, 1), ".*Unsupported global.*Linear"),
        ([torch.ones(1)], "it holds a list"),
        ({"state_dict": {"a": torch.ones(1)}}, "it holds a dict"),
    ],
)
def test_a_bin_of_something_else_is_named_for_what_it_is(tmp_path, held, reason):
    shutil.copy(TINY / "config.json", tmp_path)
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"something else than tensors by name .{reason}") as caught:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 0, "128"])
def test_a_size_that_is_none_is_named(tmp_path, weights, value):
    folder = write(tmp_path / "c", weights, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": value}))
    with pytest.raises(UserError, match="num_hidden_layers"):
        Checkpoint.open(folder)


def test_missing_shards_are_named(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "bin sharded")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="lacks pytorch_model-00002-of-00002.bin of the 2"):
        Checkpoint.open(folder)


def test_a_missing_tensor_is_named(tmp_path, weights):
    less = {name: tensor for name, tensor in weights.items() if name != "transformer.h.3.mlp.w2.weight"}
    with pytest.raises(UserError, match="lack transformer.h.3.mlp.w2.weight"):
        Checkpoint.open(write(tmp_path / "c", less, "safetensors"))


def test_a_tensor_that_only_the_index_has_is_named(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "safetensors sharded")
    first, _ = halves(weights)
    name = next(iter(first))
    save_file({k: v for k, v in first.items() if k != name}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=f"model-00001-of-00002.safetensors .* does not contain tensor {name}"):
        Checkpoint.open(folder).load(name)


def test_a_shape_that_is_not_the_configurations_is_refused(tmp_path, weights):
    wrong = weights | {f"{BLOCK}.ln_1.weight": torch.ones(64)}
    checkpoint = Checkpoint.open(write(tmp_path / "c", wrong, "safetensors"))
    with pytest.raises(UserError, match=r"\[64\].*\[128\]"):
        checkpoint.load(BLOCK)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("contents", "message"),
    [(b"", "is damaged"), (b"\x10" * 99, "is damaged"), (b"version https://git-lfs.github.com/spec/v1\n", "LFS")],
)
def test_damaged_weights_are_said_to_be(tmp_path, name, contents, message):
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=message):
        Checkpoint.open(tmp_path)


def test_truncated_weights_are_said_to_be(tmp_path, weights):
    for layout, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        folder = write(tmp_path / layout, weights, layout)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="is damaged"):
            Checkpoint.open(folder)


def test_an_absent_prefix_is_an_error():
    with pytest.raises(UserError, match="no tensor 'transformer.h.9'"):
        Checkpoint.open(TINY).load("transformer.h.9")


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", ["qwen"]), ("hidden_size", True), ("kv_channels", "x"), ("kv_channels", None),
        ("layer_norm_epsilon", None), ("layer_norm_epsilon", float("nan")), ("rotary_emb_base", "x"),
        ("rotary_emb_base", 0), ("rotary_pct", 0.5),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_named(tmp_path, weights, key, value):
    folder = write(tmp_path / "c", weights, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=key):
        Checkpoint.open(folder)


def test_more_layers_than_there_are_tensors_are_not_looked_for_one_by_one(tmp_path, weights):
    folder = write(tmp_path / "c", weights, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(UserError, match="lack transformer.h.999999999.ln_1.weight"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_weights_that_are_quantised_without_saying_so_are_refused(tmp_path, weights, dtype):
    name = f"{BLOCK}.mlp.w1.weight"
    changed = weights | {name: weights[name].to(getattr(torch, dtype))}
    checkpoint = Checkpoint.open(write(tmp_path / "c", changed, "safetensors"))
    with pytest.raises(UserError, match=f"{name} as {dtype}.*not quantised"):
        checkpoint.load(BLOCK)


@pytest.mark.parametrize("index", ['{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_names_no_files_is_refused(tmp_path, index):
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="not a readable index"):
        Checkpoint.open(tmp_path)
