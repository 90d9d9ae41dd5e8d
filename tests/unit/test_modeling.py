"""The checkpoint's own code, loaded as a module, with only the weights that are asked for.

That every public revision of Qwen's code loads is not tested here (none of it is in this repository); the
OLD_REVISION below asks for what those revisions ask for and transformers no longer has.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import machine
from helpers.checkpoint.modeling import build_model, load_modeling, make_config
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.checkpoint.weights import Checkpoint
from helpers.errors import UserError
from helpers.parity.hosts import OriginalModel, fits_in_memory

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "tiny"
FILES = ("config.json", "configuration_qwen.py", "modeling_qwen.py", "model.safetensors")

# Put before the tiny model's code: the imports and calls of Qwen's revisions that fail under transformers 5.
OLD_REVISION = """
from kernels.cpp_kernels import cache_autogptq_cuda_256
from .qwen_generation_utils import HistoryType
"""


@pytest.fixture
def copy(tmp_path):
    for name in FILES:
        shutil.copy(TINY / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def ids():
    tokenizer = QwenTokenizer.open(TINY)
    return tokenizer.chatml([{"role": "user", "content": "What is a bmodel?"}])


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_two_folders_are_two_modules_and_one_folder_is_one(copy):
    edit(copy / "modeling_qwen.py", "class QWenMLP", "MARK = 1\n\n\nclass QWenMLP")
    original, changed = load_modeling(TINY), load_modeling(copy)
    assert original is not changed and original.QWenBlock is not changed.QWenBlock
    assert hasattr(changed, "MARK") and not hasattr(original, "MARK")
    assert load_modeling(TINY) is original


def test_a_change_in_place_is_seen_at_once(copy):
    before = load_modeling(copy)
    status = (copy / "modeling_qwen.py").stat()
    # Same size, same time of change: what a bytecode cache would not notice.
    edit(copy / "modeling_qwen.py", "LOGN_POSITIONS = 32768", "LOGN_POSITIONS = 16384")
    os.utime(copy / "modeling_qwen.py", ns=(status.st_atime_ns, status.st_mtime_ns))
    after = load_modeling(copy)
    assert (before.LOGN_POSITIONS, after.LOGN_POSITIONS) == (32768, 16384)


def test_the_folder_is_left_as_it_was(copy):
    load_modeling(copy)
    build_model(copy)
    assert sorted(os.listdir(copy)) == sorted(FILES)


def test_code_of_old_revisions_gets_what_it_lacks(copy, ids):
    edit(copy / "modeling_qwen.py", "from torch import nn\n", "from torch import nn\n" + OLD_REVISION)
    edit(
        copy / "modeling_qwen.py",
        "        hidden_states = self.drop(hidden_states)\n",
        "        head_mask = self.get_head_mask(head_mask, self.config.num_hidden_layers)\n"
        "        hidden_states = self.drop(hidden_states)\n",
    )
    (copy / "qwen_generation_utils.py").write_text("HistoryType = list\n")
    with torch.inference_mode():
        logits = build_model(copy)(torch.tensor([ids])).logits
        assert torch.equal(logits, build_model(TINY)(torch.tensor([ids])).logits)
    # Nothing of it is left behind for other code to find.
    assert "kernels" not in sys.modules
    from transformers import PreTrainedModel

    assert not hasattr(PreTrainedModel, "get_head_mask")


def test_missing_and_broken_code_is_named(copy):
    (copy / "configuration_qwen.py").rename(copy / "elsewhere.py")
    with pytest.raises(UserError, match="configuration_qwen"):
        load_modeling(copy)
    (copy / "modeling_qwen.py").write_text("def broken(:\n")
    with pytest.raises(UserError, match="modeling_qwen.py cannot be imported .SyntaxError"):
        load_modeling(copy)
    (copy / "modeling_qwen.py").unlink()
    with pytest.raises(UserError, match="has no modeling_qwen.py"):
        load_modeling(copy)
    assert not [name for name in sys.modules if name.startswith("qwen_checkpoint") and "elsewhere" in name]


def test_a_library_that_fails_is_not_the_codes_fault(copy, tmp_path_factory, monkeypatch):
    """Whether it fails at once, deep within another, or after the code called something; and one that is absent."""
    libraries = tmp_path_factory.mktemp("libraries")
    monkeypatch.syspath_prepend(str(libraries))
    (libraries / "failing_library.py").write_text("raise KeyError('getpwuid(): uid not found: 12345')\n")
    (libraries / "lazy_library.py").write_text(
        "def use():\n"
        "    try:\n        import failing_library\n"
        "    except KeyError as error:\n        raise RuntimeError('no failing_library') from error\n"
    )
    original = (copy / "modeling_qwen.py").read_text(encoding="utf-8")
    for statement, library in (
        ("import failing_library", "failing_library.py"),
        ("import lazy_library\nlazy_library.use()", "lazy_library.py"),
        ("import absent_library.part", "absent_library"),
    ):
        (copy / "modeling_qwen.py").write_text(f"{statement}\n{original}", encoding="utf-8")
        with pytest.raises(UserError, match=f"modeling_qwen.py cannot be imported .*{library}.* If it is a library"):
            load_modeling(copy)
    for statement in ("import json\njson.loads('{')", "from transformers import NoSuchModel", "import torch.no_such"):
        (copy / "modeling_qwen.py").write_text(f"{statement}\n{original}", encoding="utf-8")
        with pytest.raises(UserError, match="modeling_qwen.py cannot be imported .*: take the .py files"):
            load_modeling(copy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_models_weights_are_the_checkpoints(dtype):
    model = build_model(TINY, dtype)
    assert isinstance(model, load_modeling(TINY).QWenLMHeadModel) and not model.training
    weights = Checkpoint.open(TINY).load("")
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name].to(getattr(torch, dtype))) for name in weights)
    assert {p.dtype for p in found.values()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in found.values())


def test_the_cache_gives_the_tokens_that_the_whole_sequence_gives(ids):
    original = OriginalModel(TINY)
    answer = original.greedy(ids, [], 12, 256)
    assert len(answer) == 12
    with torch.inference_mode():
        logits = original.model(torch.tensor([ids + answer])).logits[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == answer


def test_precision_and_gpu_options_of_the_config_do_not_reach_the_model(copy):
    edit(copy / "config.json", '"bf16": false', '"bf16": true')
    config = make_config(load_modeling(copy), Checkpoint.open(copy))
    assert (config.bf16, config.fp32, config.use_flash_attn) == (False, True, False)
    assert {p.dtype for p in build_model(copy).parameters()} == {torch.float32}


def test_a_config_that_the_code_refuses_is_one_sentence(copy):
    edit(copy / "config.json", '"bf16": false', '"bf16": false, "dtype": "nonsense"')
    with pytest.raises(UserError, match="modeling_qwen.py cannot build a block from its config.json .*nonsense"):
        make_config(load_modeling(copy), Checkpoint.open(copy))


def test_it_runs_without_a_warning():
    code = """
        import torch
        from helpers.checkpoint.modeling import build_model
        model = build_model("models/tiny")
        first = model(torch.tensor([[1, 2, 3]]), use_cache=True)
        model(torch.tensor([[4]]), past_key_values=first.past_key_values, use_cache=True)
    """
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", textwrap.dedent(code)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")


def test_a_light_import():
    code = "import sys, helpers.checkpoint.modeling; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("past", [False, True])
def test_padding_on_the_right_changes_nothing(ids, past):
    model = build_model(TINY)
    with torch.inference_mode():
        alone = model(torch.tensor([ids]), use_cache=past).logits
        padded = model(torch.tensor([ids + [0] * 20]), use_cache=past).logits[:, : len(ids)]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


def test_a_long_prompt_scales_the_rotation_and_the_query():
    """use_dynamic_ntk and use_logn_attn, at twice the trained length, as the paper's formulas have it."""
    module = load_modeling(TINY)
    config = make_config(module, Checkpoint.open(TINY))
    model = module.QWenModel(config)
    assert [model.get_ntk_alpha(n) for n in (100, 256, 257, 512, 513, 1025)] == [1, 1, 3, 3, 7, 15]
    cos, _ = model.rotary_emb(8, ntk_alpha=3)
    base = 10000 * 3 ** (32 / 30)
    assert cos[0, 5, 0, 1].item() == pytest.approx(torch.cos(torch.tensor(5 / base ** (2 / 32))).item(), abs=1e-6)
    logn = model.h[0].attn.logn_tensor.flatten()
    assert logn[:256].unique().tolist() == [1]
    assert logn[511].item() == pytest.approx(9 / 8)


def test_a_model_too_large_for_memory_is_streamed_and_says_the_same():
    whole, streamed = (OriginalModel(TINY, resident=resident) for resident in (True, False))
    ids = [3, 5, 7, 11, 200]
    (states, logits), (expected_states, expected_logits) = streamed.states(ids), whole.states(ids)
    np.testing.assert_array_equal(logits, expected_logits)
    np.testing.assert_array_equal(states, expected_states)
    assert streamed.greedy(ids, [], 4, 256) == whole.greedy(ids, [], 4, 256)
    assert sum(parameter.numel() for parameter in streamed.model.parameters()) == 0


@pytest.mark.hardware
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and torch's CUDA build")
@pytest.mark.parametrize("resident", [True, False])
def test_a_gpu_gives_the_cpus_tokens(resident, monkeypatch):
    ids = [3, 5, 7, 11, 200]
    on_gpu = OriginalModel(TINY, resident=resident)
    assert on_gpu.device.type == "cuda"
    found, (states, logits) = on_gpu.greedy(ids, [], 16, 256), on_gpu.states(ids)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on_cpu = OriginalModel(TINY)
    assert found == on_cpu.greedy(ids, [], 16, 256)
    expected_states, expected_logits = on_cpu.states(ids)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-3)
    np.testing.assert_allclose(states, expected_states, atol=1e-3)


def test_a_model_that_does_not_fit_half_of_the_free_memory_is_streamed(monkeypatch):
    checkpoint = Checkpoint.open(TINY)
    assert fits_in_memory(checkpoint, torch.device("cpu"))
    monkeypatch.setattr(machine, "free_memory", lambda: 8_000_000)
    assert not fits_in_memory(checkpoint, torch.device("cpu"))
