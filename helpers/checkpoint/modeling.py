"""A checkpoint's own modeling_qwen.py, loaded under a transformers that no longer supports it.

`AutoModelForCausalLM` cannot load first-generation Qwen with transformers 5: the code asks for packages and methods
that are gone. Loaded as an ordinary module it works, once the little that is missing is supplied, to this module only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.checkpoint.weights import Checkpoint
from helpers.errors import UserError

if TYPE_CHECKING:
    import torch


def load_modeling(folder: str | Path) -> types.ModuleType:
    """The checkpoint's modeling_qwen.py as a module (QWenLMHeadModel, QWenBlock, RMSNorm, …).

    Each content of a folder is a module of its own: the original and the patched code, and one file before and after
    patching in place, live side by side. Nothing is written into the folder.
    Raises UserError where the file is absent or cannot be imported.
    """
    folder = Path(folder).resolve()
    file = folder / "modeling_qwen.py"
    if not file.is_file():
        raise UserError(
            f"{folder} has no {file.name}, the code that comes with the checkpoint: download it beside the weights."
        )
    digest = hashlib.sha256(str(folder).encode())
    for source in sorted(folder.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    package = f"qwen_checkpoint_{digest.hexdigest()[:16]}"
    name = f"{package}.modeling_qwen"
    if name in sys.modules:
        return sys.modules[name]
    parent = types.ModuleType(package)
    parent.__path__ = [str(folder)]
    sys.modules[package] = parent
    try:
        with _importing():
            module = importlib.import_module(name)
        for needed in ("QWenPreTrainedModel", "QWenConfig", "QWenBlock"):
            getattr(module, needed)
    except Exception as error:
        sys.modules.pop(name, None)
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        place = [name for name in files if not name.startswith("<")][-1]
        raise UserError(
            f"{file} cannot be imported ({type(error).__name__}: {error}; raised in {place}): take the .py files from "
            "the checkpoint's repository again, all of one revision. If it is a library that fails, the environment is "
            "at fault: look at its HF_ variables, run `python -m helpers doctor`, and `make setup` to repair it."
        ) from error
    if not hasattr(module.QWenPreTrainedModel, "get_head_mask"):
        module.QWenPreTrainedModel.get_head_mask = _get_head_mask
    return module


def make_config(module: types.ModuleType, checkpoint: Checkpoint) -> object:
    """The module's QWenConfig for this checkpoint, in float32 and without the options that need a GPU."""
    off = ("bf16", "fp16", "use_flash_attn", "use_cache_quantization", "use_cache_kernel")
    settings = checkpoint.config | dict.fromkeys(off, False) | {"fp32": True}
    for key in ("architectures", "auto_map", "model_type", "transformers_version"):
        settings.pop(key, None)
    with _of_one_revision(module):
        return module.QWenConfig(**settings)


def make_block(module: types.ModuleType, config: object) -> torch.nn.Module:
    """A QWenBlock of the module, its weights as torch makes them."""
    # The constructor of August 2023 does not work without the number of the layer, for which it has no use.
    wants_number = "layer_idx" in inspect.signature(module.QWenBlock).parameters
    with _of_one_revision(module):
        return module.QWenBlock(config, **({"layer_idx": 1} if wants_number else {}))


@contextlib.contextmanager
def _of_one_revision(module: types.ModuleType) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{module.__file__} cannot build a block from its config.json ({type(error).__name__}: {error}): take both "
            "from the checkpoint's repository again, of one revision."
        ) from error


def build_model(folder: str | Path, dtype: str = "float32", device: torch.device | str = "cpu") -> torch.nn.Module:
    """The whole QWenLMHeadModel with its weights on the device, in evaluation mode, without gradients.

    Call it with ids [1, T] and use_cache=True: logits [1, T, V] and past_key_values, a tuple of (key, value), each
    [1, T, heads, head_dim], per layer.
    """
    import torch

    checkpoint = Checkpoint.open(folder)
    model = _empty_model(checkpoint)
    fill(model, checkpoint, "", getattr(torch, dtype), device)
    return model.to(device, getattr(torch, dtype)).eval().requires_grad_(False)


def build_streamed_model(folder: str | Path, device: torch.device | str = "cpu") -> torch.nn.Module:
    """As `build_model`, in float32, with the weights of one part at a time on the device.

    Each block, the embedding, the last norm and the head read theirs just before their own forward and give them up
    after it: slow, but in float32 the largest part of a 7B model is 2.5 GB, and all of it 31 GB.
    """
    import torch

    checkpoint = Checkpoint.open(folder)
    model = _empty_model(checkpoint)
    transformer = model.transformer
    parts = {f"transformer.h.{i}.": block for i, block in enumerate(transformer.h)}
    parts |= {"transformer.wte.": transformer.wte, "transformer.ln_f.": transformer.ln_f, "lm_head.": model.lm_head}

    def give_up(part: torch.nn.Module, *_: object) -> None:
        for parameter in part.parameters():
            parameter.data = torch.empty(0)

    for prefix, part in parts.items():
        give_up(part)
        part.register_forward_pre_hook(
            lambda part, _, prefix=prefix: fill(part, checkpoint, prefix, torch.float32, device)
        )
        part.register_forward_hook(give_up)
    return model.to(device).float().eval().requires_grad_(False)


def _empty_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """The checkpoint's QWenLMHeadModel, its weights as allocated: memory that nothing touches is not taken."""
    module = load_modeling(checkpoint.path)
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    # Old revisions warn of flash attention and of generate(): neither is used here.
    logging.set_verbosity_error()
    try:
        with no_init_weights():
            return module.QWenLMHeadModel(make_config(module, checkpoint))
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """While a checkpoint's code is imported: no bytecode is left, whose cache would miss a patch made within one
    second; and the kernels are there that some revisions import and no step here calls (CUDA, for a quantised cache).
    """
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    importlib.invalidate_caches()
    supplied = {}
    if importlib.util.find_spec("kernels") is None:
        supplied = {name: types.ModuleType(name) for name in ("kernels", "kernels.cpp_kernels")}
        supplied["kernels.cpp_kernels"].cache_autogptq_cuda_256 = None
    sys.modules.update(supplied)
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        for name in supplied:
            del sys.modules[name]


def _get_head_mask(self: object, head_mask: object, num_hidden_layers: int) -> list:
    return [None] * num_hidden_layers if head_mask is None else list(head_mask)


def fill(
    net: torch.nn.Module, checkpoint: Checkpoint, prefix: str, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Give every parameter its weights, on the device. Raises UserError where the checkpoint lacks one."""
    parameters = dict(net.named_parameters())
    for name, tensor in checkpoint.tensors(prefix):
        parameter = parameters.pop(name.removeprefix(prefix), None)
        # Files of old revisions hold buffers too (masked_bias, inv_freq); the code computes those itself.
        if parameter is not None:
            parameter.data = tensor.to(device=device, dtype=dtype)
    if parameters:
        raise UserError(f"The weights in {checkpoint.path} lack {', '.join(sorted(parameters)[:3])} under {prefix!r}.")
