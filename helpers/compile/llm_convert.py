"""Compile with TPU-MLIR's one-click converter, as a yardstick: same weights, same mode, same S.

`llm_convert.py` refuses first-generation Qwen. Its arithmetic is that of Qwen 2: c_attn is q, k and v in one, mlp.w2 is
the gate and mlp.w1 the up projection. So the checkpoint is written once more under those names, and converted.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import artefacts, machine, toolchain
from helpers.bmodel import bmodel
from helpers.checkpoint.vocabulary import copy_vocabulary
from helpers.checkpoint.weights import Checkpoint
from helpers.compile.log import own_error, read_log
from helpers.compile.options import Q_GROUP_SIZE, QUANTIZE, check_name, check_options
from helpers.compile.profile import PROFILE, estimates, net_figures
from helpers.errors import UserError
from helpers.files import locked, write_json

_CODE = artefacts.code_of("compile.llm_convert", "checkpoint.weights", "compile.options", "compile.profile")
_RENAMED = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}

# Runs the converter with two things mended (tpu-mlir 1.30.2). For several devices its lm_head begins with the last
# norm, whose weight it forgets to write beside the lm_head's own ("failed to find tensor model.norm.weight to read").
# And it has no option for the addresses of the cache nets, which are always io_alone.
_RUNNER = """
import os, runpy, sys
import numpy, tpu_mlir
cache_mode, *sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from llm.LlmConverter import LlmConverter
from llm.LlmLoad import LlmLoad
save, submit = numpy.savez, LlmConverter.submit_deploy_task

def savez(file, *args, **arrays):
    if file == "lm_head_top_weights.npz":
        arrays["model.norm.weight"] = LlmLoad(sys.argv[sys.argv.index("-m") + 1]).read("model.norm.weight")
    return save(file, *args, **arrays)

def submit_deploy_task(self, *args, addr_mode="basic", **options):
    return submit(self, *args, addr_mode=cache_mode if addr_mode == "io_alone" else addr_mode, **options)

numpy.savez, LlmConverter.submit_deploy_task = savez, submit_deploy_task
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def qwen2_config(checkpoint: Checkpoint, seq_length: int) -> dict:
    """config.json of the same model in Qwen 2's terms."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": checkpoint.hidden_size,
        "intermediate_size": checkpoint.intermediate_size,
        "max_position_embeddings": seq_length,
        "num_attention_heads": checkpoint.heads,
        "num_key_value_heads": checkpoint.heads,
        "num_hidden_layers": checkpoint.layers,
        "rms_norm_eps": checkpoint.eps,
        "rope_theta": float(checkpoint.rotary_base),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": checkpoint.vocab_size,
    }


def qwen2_tensors(name: str, tensor) -> dict:
    """A tensor of a Qwen-1 checkpoint under Qwen 2's names: c_attn becomes three."""
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if match := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", stem):
        prefix, stem = f"model.layers.{match[1]}.", match[2]
    if stem == "attn.c_attn":
        pieces = zip("qkv", tensor.chunk(3, dim=0), strict=True)
        return {f"{prefix}self_attn.{letter}_proj.{kind}": piece for letter, piece in pieces}
    return {f"{prefix}{_RENAMED[stem]}.{kind}": tensor} if stem in _RENAMED else {}


def write_qwen2_checkpoint(checkpoint: Checkpoint, folder: Path, seq_length: int) -> None:
    """Write the checkpoint in Qwen 2's layout, one shard a layer, so that one layer is in memory at a time."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    layers = [f"transformer.h.{i}." for i in range(checkpoint.layers)]
    for prefix in [*layers, "transformer.wte.", "transformer.ln_f.", "lm_head."]:
        renamed = [qwen2_tensors(name, tensor) for name, tensor in checkpoint.load(prefix).items()]
        tensors = {name: part.clone() for tensors in renamed for name, part in tensors.items()}
        save_file(tensors, folder / f"{prefix}safetensors", {"format": "pt"})
    write_json(folder / "config.json", qwen2_config(checkpoint, seq_length))


def convert(
    model_path: str | Path,
    out: str | Path,
    name: str,
    mode: str,
    seq_length: int,
    num_device: int = 1,
    dynamic: bool = False,
    addr_mode: str = "io_alone",
) -> Path:
    """Compile a Qwen-1 checkpoint (patched or not) with llm_convert.py.

    Returns out/<name>_<mode>_<n>dev_llm_convert.bmodel; its manifest has the extra keys of compile_model's, and
    converter_seconds. addr_mode: of the cache nets; the converter by itself has io_alone. lm_head gives the token.
    Raises UserError where GNU parallel or the tool chain is missing, or the converter fails, with the path of its log.
    """
    check_name(name)
    if seq_length < 1:
        raise UserError(f"seq_length is {seq_length}, it must be a whole number from 1 on (the documented one is 512).")
    toolchain.require()
    toolchain.require_parallel()
    checkpoint = Checkpoint.open(model_path)
    check_options(mode, num_device, addr_mode, checkpoint.heads, checkpoint.hidden_size)
    out = Path(out).absolute()
    target = out / f"{name}_{mode}_{num_device}dev{'_dyn' if dynamic else ''}_llm_convert.bmodel"
    settings = {"name": name, "mode": mode, "num_device": num_device, "addr_mode": addr_mode, "dynamic": dynamic}
    settings |= {"seq_length": seq_length, "via": "llm_convert"}
    inputs = {"checkpoint": checkpoint.digest("")}
    if artefacts.up_to_date(target, inputs, settings, _CODE):
        return target
    out.mkdir(parents=True, exist_ok=True)
    extra: dict = {"config": checkpoint.config, "layers": checkpoint.layers, "seq_length": seq_length}
    extra["tokenizer"] = copy_vocabulary(checkpoint.path, out)
    with (
        artefacts.building(target, kind="bmodel", inputs=inputs, settings=settings, code=_CODE, extra=extra) as partial,
        # Not in the staging folder: all that is left there would become part of the artefact.
        tempfile.TemporaryDirectory(prefix="llm_convert.", dir=out) as scratch,
    ):
        work = Path(scratch)
        write_qwen2_checkpoint(checkpoint, work / "qwen2", seq_length)
        options = ["-s", str(seq_length), "-q", QUANTIZE[mode].lower(), "-g", str(Q_GROUP_SIZE), "-c", "bm1684x"]
        options += ["--num_device", str(num_device), *["--dynamic"] * dynamic]
        started = time.monotonic()
        _run(work, addr_mode, options, out / f"{target.stem}.log")
        extra["converter_seconds"] = round(time.monotonic() - started, 3)
        folder = work / "converted"
        (made,) = folder.glob("*.bmodel")
        bmodel.strip_time(made)
        shutil.move(made, partial)
        nets = bmodel.read_bmodel(partial).nets
        profiles = {net: next(folder.glob(f"*/{net}/{PROFILE}"), folder / PROFILE) for net in nets}
        extra["nets"] = {name: net_figures(net, profiles[name]) for name, net in nets.items()}
        extra["estimates"] = estimates(extra["nets"])
    return target


def _run(work: Path, addr_mode: str, options: list[str], log: Path) -> None:
    tool = toolchain.wheel_path() / "python" / "tools" / "llm_convert.py"
    folder = toolchain.plain(work)  # it passes paths on without quotes
    command = [sys.executable, "-c", _RUNNER, addr_mode, str(tool), "-m", str(folder / "qwen2")]
    command += ["-o", str(folder / "converted"), *options]
    with open(log, "wb") as file, locked(work / "lock") as locks, contextlib.ExitStack() as stack:
        # Its jobs, each in a folder of its own, take turns at the kernels; where they cannot, each makes its own.
        kernels = "../kernels/" if locks else "./kernels/"
        if not toolchain.is_plain(work):
            kernels = stack.enter_context(tempfile.TemporaryDirectory(dir=toolchain.plain_parent()))
        env = toolchain.environment() | {"PPL_CACHE_PATH": kernels}
        # Its scripts put the wheel's own libraries first.
        if library := toolchain.own_kernel_library(locks):
            env["LD_PRELOAD"] = f"{library} {env.get('LD_PRELOAD', '')}"
        process = subprocess.Popen(command, cwd=work, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait()
        finally:
            # Its jobs are in the same group; after a failure or Ctrl-C some may still run.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        # What a job of its said stands in a log of the job's own.
        logs = sorted((work / "converted").glob("*/*.log"))
        if failed := [path for path in logs if re.search("[Ee]rror|Assert", read_log(path))]:
            shutil.copy(failed[0], log)
        # On a full disk the converter goes on, and finds its own files broken later. What it wrote is still there.
        raise UserError(
            f"llm_convert.py failed: {own_error(read_log(log), status)} (its log is {log}; the disk has "
            f"{machine.free_disk(work) / 1e9:.2f} GB left: it can need ten times the checkpoint's size)"
        )
