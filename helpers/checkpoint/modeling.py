"""A checkpoint's own modeling_qwen.py, loaded under a transformers that no longer supports it.

`AutoModelForCausalLM` cannot load first-generation Qwen with transformers 5: the code asks for packages and methods
that are gone. Loaded as an ordinary module it works, once the little that is missing is supplied, to this module only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from helpers.checkpoint.weights import Checkpoint
from helpers.errors import UserError

if TYPE_CHECKING:
    import torch

MODELING = "modeling_qwen"

# Modules that some revision imports at its top level and no step here calls: CUDA kernels for the quantised cache.
ABSENT_MODULES = {"kernels": {}, "kernels.cpp_kernels": {"cache_autogptq_cuda_256": None}}


def load_modeling(folder: str | Path) -> types.ModuleType:
    """The checkpoint's modeling_qwen.py as a module (QWenLMHeadModel, QWenBlock, RMSNorm, …).

    Each content of a folder is a module of its own: the original and the patched code, and one file before and after
    patching in place, live side by side. Nothing is written into the folder.
    Raises UserError where the file is absent or cannot be imported.
    """
    check_huggingface_variables()
    folder = Path(folder).resolve()
    file = folder / f"{MODELING}.py"
    if not file.is_file():
        raise UserError(
            f"{folder} has no {file.name}: the code that came with the checkpoint was needed; download it beside the "
            "weights."
        )
    digest = hashlib.sha256(str(folder).encode())
    for source in sorted(folder.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    package = f"qwen_checkpoint_{digest.hexdigest()[:16]}"
    name = f"{package}.{MODELING}"
    if name in sys.modules:
        return sys.modules[name]
    parent = types.ModuleType(package)
    parent.__path__ = [str(folder)]
    sys.modules[package] = parent
    try:
        with _found_in(folder, package), _absent_modules():
            module = importlib.import_module(name)
        for needed in ("QWenPreTrainedModel", "QWenConfig", "QWenBlock"):
            getattr(module, needed)
    except Exception as error:
        for loaded in [other for other in sys.modules if other.split(".")[0] == package]:
            del sys.modules[loaded]
        if library := _failing_library(error, folder, package):
            raise UserError(
                f"{file} needs {library}, which cannot be imported ({type(error).__name__}: {error}): the environment "
                "is at fault, not the checkpoint; run `python -m helpers doctor`, and `make setup` to repair it."
            ) from error
        raise UserError(
            f"{file} cannot be imported ({type(error).__name__}: {error}): take the .py files from the checkpoint's "
            "repository again, all of one revision."
        ) from error
    if not hasattr(module.QWenPreTrainedModel, "get_head_mask"):
        module.QWenPreTrainedModel.get_head_mask = _get_head_mask
    return module


def check_huggingface_variables() -> None:
    """Raises UserError, naming the variable, where one keeps huggingface_hub, and so transformers, from its import."""
    for variable in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        try:
            int(os.environ.get(variable, "0"))
        except ValueError:
            raise UserError(
                f"{variable} is {os.environ[variable]!r}, a whole number of seconds was needed: unset it, or set it "
                "to one."
            ) from None
    try:
        urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError as error:
        raise not_an_address("HF_ENDPOINT", os.environ["HF_ENDPOINT"], error) from None


def not_an_address(variable: str, address: str, fault: object) -> UserError:
    """What to say of a variable of the environment that should hold an address."""
    return UserError(
        f"{variable} is {address!r}, which is not an address ({fault}): unset it, or set it to https://HOST."
    )


def _failing_library(error: BaseException, folder: Path, package: str) -> str | None:
    """Name of the library whose import failed; None where the folder's own code did."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        root = error.name.partition(".")[0]
        if root != package and importlib.util.find_spec(root) is None:
            return root
    cause: BaseException | None = error
    while cause:
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        files = [frame for frame in frames if frame.f_code.co_name == "<module>" and "__file__" in frame.f_globals]
        # The innermost module that was being imported.
        if files and Path(files[-1].f_globals["__file__"]).parent != folder:
            return files[-1].f_globals["__name__"]
        cause = cause.__cause__ or cause.__context__
    return None


def make_config(module: types.ModuleType, checkpoint: Checkpoint) -> object:
    """The module's QWenConfig for this checkpoint, in float32 and without the options that need a GPU."""
    settings = checkpoint.config | {
        "bf16": False,
        "fp16": False,
        "fp32": True,
        "use_flash_attn": False,
        "use_cache_quantization": False,
        "use_cache_kernel": False,
    }
    for key in ("architectures", "auto_map", "model_type", "transformers_version"):
        settings.pop(key, None)
    try:
        return module.QWenConfig(**settings)
    except Exception as error:
        raise _unbuildable(checkpoint.path, error) from error


def make_block(module: types.ModuleType, config: object) -> torch.nn.Module:
    """A QWenBlock of the module, its weights as torch makes them."""
    # The constructor of August 2023 does not work without the number of the layer, for which it has no use.
    wants_number = "layer_idx" in inspect.signature(module.QWenBlock).parameters
    try:
        return module.QWenBlock(config, **({"layer_idx": 1} if wants_number else {}))
    except Exception as error:
        raise _unbuildable(Path(module.__file__).parent, error) from error


def _unbuildable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"The code in {folder} cannot build a block from its config.json ({type(error).__name__}: {error}): take both "
        "from the checkpoint's repository again, of one revision."
    )


def build_block(
    module: types.ModuleType, checkpoint: Checkpoint, layer: int, dtype: torch.dtype | str = "float32"
) -> torch.nn.Module:
    """Layer number `layer` as the module's QWenBlock, in evaluation mode, without gradients.

    Only this layer's weights are read. dtype: of weights and buffers, e.g. "bfloat16".
    """
    config = make_config(module, checkpoint)
    with _uninitialised():
        block = make_block(module, config)
    return _filled(block, checkpoint, f"transformer.h.{layer}.", dtype)


def build_model(
    folder: str | Path, dtype: torch.dtype | str = "float32", device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """The whole QWenLMHeadModel with its weights on the device, in evaluation mode, without gradients.

    Call it with ids [1, T] and use_cache=True: logits [1, T, V] and past_key_values, a tuple of (key, value), each
    [1, T, heads, head_dim], per layer.
    """
    checkpoint = Checkpoint.open(folder)
    return _filled(_empty_model(checkpoint), checkpoint, "", dtype, device)


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
            lambda part, _, prefix=prefix: _fill(part, checkpoint, prefix, torch.float32, device)
        )
        part.register_forward_hook(give_up)
    return model.to(device).float().eval().requires_grad_(False)


def _empty_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """The checkpoint's QWenLMHeadModel, its weights not filled in."""
    module = load_modeling(checkpoint.path)
    config = make_config(module, checkpoint)
    with _uninitialised():
        return module.QWenLMHeadModel(config)


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source as it is now: a bytecode cache would miss a patch made within one second."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


@contextlib.contextmanager
def _found_in(folder: Path, package: str) -> Iterator[None]:
    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None):
            parent, _, stem = name.rpartition(".")
            file = folder / f"{stem}.py"
            if parent == package and file.is_file():
                return importlib.util.spec_from_file_location(name, file, loader=_SourceLoader(name, str(file)))
            return None

    sys.meta_path.insert(0, Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)


@contextlib.contextmanager
def _absent_modules() -> Iterator[None]:
    supplied = []
    for name, attributes in ABSENT_MODULES.items():
        root = name.split(".")[0]
        if root in supplied or (root not in sys.modules and importlib.util.find_spec(root) is None):
            module = types.ModuleType(name)
            module.__dict__.update(attributes)
            sys.modules[name] = module
            supplied.append(name)
    try:
        yield
    finally:
        for name in supplied:
            del sys.modules[name]


def _get_head_mask(self: object, head_mask: object, num_hidden_layers: int) -> list:
    return [None] * num_hidden_layers if head_mask is None else list(head_mask)


@contextlib.contextmanager
def _uninitialised() -> Iterator[None]:
    """Leave weights as they were allocated: memory that nothing touches is never taken from the machine."""
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    # Old revisions warn of flash attention and of generate(): neither is used here.
    logging.set_verbosity_error()
    try:
        with no_init_weights():
            yield
    finally:
        logging.set_verbosity(verbosity)


def _fill(
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


def _filled(
    net: torch.nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
) -> torch.nn.Module:
    import torch

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    _fill(net, checkpoint, prefix, dtype, device)
    return net.to(device, dtype).eval().requires_grad_(False)
