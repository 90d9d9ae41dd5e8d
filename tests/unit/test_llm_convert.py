"""The one-click converter on a Qwen-1 checkpoint under Qwen 2's names."""

import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from helpers import artefacts, toolchain
from helpers.bmodel.bmodel import read_bmodel, require_qwen
from helpers.checkpoint.weights import Checkpoint
from helpers.compile import llm_convert
from helpers.errors import UserError
from helpers.parity.hosts import OriginalModel
from helpers.run.engines import open_engine
from helpers.run.generation import QwenRunner


def raise_interrupted(*arguments):
    """It was begun anew."""
    raise InterruptedError


needs_parallel = pytest.mark.skipif(not shutil.which("parallel"), reason="GNU parallel is not installed")


def test_every_tensor_gets_qwen2s_name_and_keeps_its_numbers(tiny, tmp_path):
    checkpoint = Checkpoint.open(tiny)
    llm_convert.write_qwen2_checkpoint(checkpoint, tmp_path, 256)
    written = {}
    for shard in tmp_path.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            written |= {name: file.get_tensor(name) for name in file.keys()}
    layer = checkpoint.load("transformer.h.1.")
    query, key, value = layer["transformer.h.1.attn.c_attn.weight"].chunk(3)
    prefix = "model.layers.1"
    for name, tensor in {
        f"{prefix}.self_attn.q_proj.weight": query,
        f"{prefix}.self_attn.k_proj.weight": key,
        f"{prefix}.self_attn.v_proj.weight": value,
        f"{prefix}.mlp.gate_proj.weight": layer["transformer.h.1.mlp.w2.weight"],
        f"{prefix}.mlp.up_proj.weight": layer["transformer.h.1.mlp.w1.weight"],
        f"{prefix}.mlp.down_proj.weight": layer["transformer.h.1.mlp.c_proj.weight"],
        f"{prefix}.self_attn.o_proj.weight": layer["transformer.h.1.attn.c_proj.weight"],
    }.items():
        assert torch.equal(written[name], tensor), name
    # c_attn.weight and .bias become three each.
    assert len(written) == len(checkpoint.shapes()) + 4 * checkpoint.layers
    assert sum(t.numel() for t in written.values()) == sum(np.prod(s) for s in checkpoint.shapes().values())


def test_without_gnu_parallel_it_is_one_sentence(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None: None if name == "parallel" else "/x")
    with pytest.raises(UserError, match="GNU parallel.*apt-get install parallel"):
        llm_convert.convert(tiny, tmp_path, "tiny", "int8", 256)


@pytest.mark.parametrize(
    "arguments, message",
    [({"mode": "w8"}, "must be one of"), ({"num_device": 3}, "4 attention"), ({"addr_mode": "x"}, "basic, io_alone")],
)
def test_a_wrong_setting_is_refused(tiny, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(toolchain, "require_parallel", lambda: "parallel")
    with pytest.raises(UserError, match=message):
        llm_convert.convert(tiny, tmp_path, "tiny", **{"mode": "int8", "seq_length": 64, **arguments})


@needs_parallel
@pytest.mark.slow
@pytest.mark.parametrize("mode, num_device, addr_mode", [("int8", 1, "io_alone"), ("int4", 2, "basic")])
def test_it_makes_a_qwen_bmodel(
    tiny, tmp_path, monkeypatch, mode, num_device, addr_mode, chat_prompt, demo_questions, stop_ids
):
    out = tmp_path / "a b;:'\"&("  # what a shell, make or cmake takes for its own

    def convert():
        return llm_convert.convert(tiny, out, "tiny", mode, 64, num_device=num_device, addr_mode=addr_mode)

    path = convert()
    assert path.name == f"tiny_{mode}_{num_device}dev_llm_convert.bmodel"
    read = read_bmodel(path)
    assert read.device_num == num_device
    assert {read.nets[f"block_cache_{i}"].info.addr_mode for i in range(4)} == {addr_mode}
    shape = require_qwen(read)
    # Of a model this small the compiler splits nothing: each device does all of the work.
    assert (shape.layers, shape.seq_length, shape.heads, shape.token_head) == (4, 64, 4, True)
    manifest = artefacts.read_manifest(path)
    assert manifest["estimates"]["decode_ms"] > 0
    assert manifest["nets"]["block_0"]["cycles"] > 1000
    made = path.stat().st_mtime_ns
    assert convert().stat().st_mtime_ns == made
    assert not list(out.glob("llm_convert.*"))
    assert manifest["code"] == llm_convert._CODE
    with pytest.raises(InterruptedError), monkeypatch.context() as patched:
        patched.setitem(llm_convert._CODE, "llm_convert", "0" * 64)
        patched.setattr(llm_convert, "write_qwen2_checkpoint", raise_interrupted)
        convert()
    if num_device == 1:
        prompt = chat_prompt(demo_questions[0])
        with open_engine(path, engine="simulator") as engine:
            found = list(QwenRunner(engine).generate(prompt, stop_ids=stop_ids))
        assert found == OriginalModel(tiny).greedy(prompt, stop_ids, 64, 64) != []
