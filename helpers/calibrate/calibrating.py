"""Write a checkpoint that is the same function and that the compiler's rounding to int4 hurts less.

    out.partial/<part>.safetensors    a part's new weights: embedding, block_0, …, lm_head
    out.partial/states.safetensors    what goes into the next block, in float32 and after the rounding so far
    out                               all of it, whole, with the checkpoint's other files

A part at a time is in memory; a calibration that is killed goes on with the part at which it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from helpers import artefacts, machine
from helpers.calibrate.folding import FOLDS, fold, order_inner, search_scales
from helpers.calibrate.gptq import compensate, inverse_factor
from helpers.calibrate.layers import HEAD, Layers
from helpers.calibrate.rounding import rounded
from helpers.calibrate.texts import PIECE, pieces_of, python_text, read_text
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.checkpoint.weights import WEIGHT_FILES, Checkpoint, opened
from helpers.compile.options import Q_GROUP_SIZE, QUANTIZE
from helpers.cost import Work
from helpers.errors import UserError
from helpers.files import digest_of, locked, sha256_file, write_json

# The key of config.json that says what a checkpoint's weights were made for.
MARK = "calibrated"
_KIND = "calibrated checkpoint"
TOKENS = 4096
_CODE = artefacts.code_of(*(f"calibrate.{name}" for name in ("calibrating", "folding", "gptq", "layers", "rounding")))
# Seconds of one core: a weight, an operation, a column of a matrix; bytes beside those of torch. Measured with blocks
# of 0.2 and 3 million weights.
_SECONDS, _OPERATION, _COLUMN, _BASE_MEMORY = 0.45e-6, 4.5e-11, 2.2e-4, 30_000_000


def calibrate(
    model_path: str | Path,
    out: str | Path,
    mode: str = "int4",
    head_mode: str | None = None,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    folds: bool = True,
    compensation: bool = True,
) -> Path:
    """Write a checkpoint to `out` whose weights are chosen for int4; return `out`.

    Same layout, code and dtypes as the one at model_path. head_mode: int8 or bf16 leaves lm_head alone. text: a file
    to calibrate on, in place of Python's own help topics. folds, compensation: the ingredients.
    Raises UserError for everything a user can cause.
    """
    checkpoint, out = Checkpoint.open(model_path), Path(out)
    if mode != "int4" or (head_mode or mode) not in QUANTIZE:
        raise UserError(
            f"mode is {mode!r} and head_mode {head_mode!r}: int4 was needed, the only one that costs enough, and for "
            f"the head one of {', '.join(QUANTIZE)}."
        )
    if tokens < PIECE:
        raise UserError(f"tokens is {tokens}, it must be {PIECE} or more: a few thousand calibrate well.")
    if MARK in checkpoint.config:
        raise UserError(
            f"{checkpoint.path} is calibrated already ({MARK} in its config.json): name the checkpoint that it was "
            "made from."
        )
    for inputs in (checkpoint.hidden_size, checkpoint.heads * checkpoint.head_dim, checkpoint.intermediate_size):
        if inputs % Q_GROUP_SIZE:
            raise UserError(
                f"{checkpoint.path} has a product with {inputs} inputs, which groups of {Q_GROUP_SIZE} weights do not "
                "divide: this model cannot be compiled in int4 or int8, take bf16."
            )
    if out.exists() and any(out.iterdir()) and not _made_here(out):
        raise UserError(f"{out} holds something else than a calibrated checkpoint: name another folder for --out.")
    source = python_text(for_calibration=True) if text is None else read_text(text)
    pieces = pieces_of(source, QwenTokenizer.open(checkpoint.path), tokens // PIECE, text or "Python's own help text")
    settings = {"mode": mode, "head_mode": head_mode or mode, "folds": folds, "compensation": compensation}
    weight_files = sorted(set(checkpoint.files.values()))
    inputs = {file.name: sha256_file(file) for file in [*weight_files, *_other_files(checkpoint)]}
    inputs["ids"] = digest_of(pieces.tolist())
    if artefacts.up_to_date(out, inputs, settings, _CODE):
        return out
    work = out.with_name(f"{out.name}.partial")
    record = {"inputs": inputs, "settings": settings, "code": _CODE}
    costs = expected(checkpoint, work, pieces.numel(), settings, begun=_is_of(work, record))
    costs.announce("close other programs, add swap, or ask for fewer --tokens", "free some or choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    busy = f"Another calibration writes to {out}: wait for it, or take another --out."
    with locked(work / ".lock", busy), costs:
        _begin(work, record)
        with torch.no_grad():
            _calibrate_parts(checkpoint, pieces, settings, work, costs)
        config = checkpoint.config | {MARK: settings | {"tokens": pieces.numel()}}
        extra: dict = {}
        with artefacts.building(out, kind=_KIND, **record, extra=extra) as partial:
            _finish(checkpoint, work, partial, config)
            extra["cost"] = costs.record()
    shutil.rmtree(work)
    return out


def _made_here(out: Path) -> bool:
    with contextlib.suppress(UserError):
        return artefacts.read_manifest(out).get("kind") == _KIND
    return False


def _is_of(work: Path, record: dict) -> bool:
    """Whether what lies in the folder was made from these inputs."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((work / "record.json").read_bytes()) == json.loads(json.dumps(record))
    return False


def _begin(work: Path, record: dict) -> None:
    """Empty the folder of what was made from something else."""
    if not _is_of(work, record):
        for old in work.glob("*.safetensors"):
            old.unlink()
        write_json(work / "record.json", record)


def _calibrate_parts(checkpoint: Checkpoint, pieces: torch.Tensor, settings: dict, work: Path, costs: Work) -> None:
    layers = Layers(checkpoint, PIECE)
    states_file = work / "states.safetensors"
    kept = load_file(states_file) if states_file.is_file() else {}
    done = int(kept.get("done", 0))
    golden, states = kept.get("golden"), kept.get("states")
    with tqdm(total=checkpoint.layers + 2, initial=done, desc="calibrate", unit="part") as progress:
        if done == 0:
            golden = states = layers.embed(pieces)
            _save(work / "embedding.safetensors", checkpoint.load("transformer.wte"))
        for part in range(max(1, done), checkpoint.layers + 1):
            progress.update(part - progress.n)
            prefix = f"transformer.h.{part - 1}."
            weights, golden, states = calibrate_block(layers, prefix, golden, states, settings)
            _save(work / f"block_{part - 1}.safetensors", _as_before(checkpoint, prefix, weights))
            # Last: whoever finds these states finds the weights that made them.
            _save(states_file, {"golden": golden, "states": states, "done": torch.tensor(part + 1)})
            costs.done(f"block_{part - 1}")
        progress.update(checkpoint.layers + 1 - progress.n)
        if not (work / f"{HEAD}.safetensors").is_file():
            _save(work / f"{HEAD}.safetensors", calibrate_head(layers, golden, states, settings))
        progress.update()


def calibrate_block(
    layers: Layers, prefix: str, golden: torch.Tensor, states: torch.Tensor, settings: dict
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The new weights of a block, in float32; what comes out of it in float32, and what comes out when it is rounded.

    golden, states: what goes into it, likewise [pieces, T, H].
    """
    weights, mode = layers.weights(prefix), settings["mode"]
    dtypes = {name.removeprefix(prefix): tensor.dtype for name, tensor in layers.checkpoint.tensors(prefix)}
    inputs: dict[str, torch.Tensor] = {}
    golden = layers.block(weights, golden, lambda name, seen, _: inputs.update({name: seen.flatten(0, 1)}))
    if settings["folds"]:
        for before, products in FOLDS.items():
            if products[0] in inputs:
                inputs[products[0]] = _fold(weights, before, inputs[products[0]], mode)
        order_inner(weights, inputs["mlp.c_proj"])
    right = (inputs["attn.c_attn"] @ weights["attn.c_attn.weight"].T).mean(0)
    inputs.clear()
    factor = None

    def choose(name: str, seen: torch.Tensor, _: torch.Tensor) -> None:
        """Round a product's weights just before it runs: what follows is calibrated on what it will get."""
        nonlocal factor
        matrix = f"{name}.weight"
        if settings["compensation"]:
            # c_attn has a bias, which makes up for what is the same for all tokens. w2 has the inputs of w1.
            mean = seen.flatten(0, 1).mean(0) if name == "attn.c_attn" else 0
            factor = factor if name == "mlp.w2" else _factor(seen - mean)
            weights[matrix] = compensate(weights[matrix], factor, dtypes[matrix])
        chosen[matrix], weights[matrix] = weights[matrix], rounded(weights[matrix], mode)
        if settings["compensation"] and name == "attn.c_attn":
            bias = weights["attn.c_attn.bias"] + right - weights[matrix] @ mean
            weights["attn.c_attn.bias"] = bias.to(dtypes["attn.c_attn.bias"]).float()

    chosen: dict[str, torch.Tensor] = {}
    states = layers.block(weights, states, choose)
    return weights | chosen, golden, states


def calibrate_head(
    layers: Layers, golden: torch.Tensor, states: torch.Tensor, settings: dict
) -> dict[str, torch.Tensor]:
    """The new ln_f and lm_head, as the checkpoint has them: golden, states [pieces, T, H] go into them."""
    norm, matrix = "transformer.ln_f.weight", f"{HEAD}.weight"
    before = {name: tensor for prefix in (norm, matrix) for name, tensor in layers.checkpoint.tensors(prefix)}
    mode = settings["head_mode"]
    if mode != "int4":
        return before
    weights = {"ln_f.weight": before[norm].float(), matrix: before[matrix].float()}
    if settings["folds"]:
        _fold(weights, "ln_f", layers.norm(golden, weights["ln_f.weight"]).flatten(0, 1), mode)
    if settings["compensation"]:
        factor = _factor(layers.norm(states, weights["ln_f.weight"]))
        weights[matrix] = compensate(weights[matrix], factor, before[matrix].dtype)
    return {norm: weights["ln_f.weight"].to(before[norm].dtype), matrix: weights[matrix].to(before[matrix].dtype)}


def _fold(weights: dict[str, torch.Tensor], before: str, inputs: torch.Tensor, mode: str) -> torch.Tensor:
    """Search and fold scales; return the inputs [tokens, K] as they are then."""
    scales = search_scales([weights[f"{name}.weight"] for name in FOLDS[before]], inputs, inputs.T @ inputs, mode)
    fold(weights, before, scales)
    return inputs / scales


def _factor(inputs: torch.Tensor) -> torch.Tensor:
    inputs = inputs.flatten(0, -2)
    return inverse_factor(inputs.T @ inputs)


def _as_before(checkpoint: Checkpoint, prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block's weights by the checkpoint's own names and in its dtypes."""
    return {name: weights[name.removeprefix(prefix)].to(tensor.dtype) for name, tensor in checkpoint.tensors(prefix)}


def _save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, file)
    except SafetensorError as error:
        raise UserError(
            f"{file} cannot be written ({error}): free some space, or choose another --out, and run the same command "
            "again; what was finished is kept."
        ) from None


def _other_files(checkpoint: Checkpoint) -> list[Path]:
    """What lies in the checkpoint's folder beside its weights."""
    weights = {*WEIGHT_FILES, artefacts.MANIFEST, *(file.name for file in checkpoint.files.values())}
    return [file for file in sorted(checkpoint.path.iterdir()) if file.is_file() and file.name not in weights]


def _finish(checkpoint: Checkpoint, work: Path, partial: Path, config: dict) -> None:
    """Put the whole checkpoint together in the folder `partial`."""
    partial.mkdir()
    for file in _other_files(checkpoint):
        shutil.copy(file, partial)
    write_json(partial / "config.json", config)
    shards, total = {}, 0
    for part in ("embedding", *(f"block_{i}" for i in range(checkpoint.layers)), HEAD):
        file = partial / f"{part}.safetensors"
        try:
            os.link(work / file.name, file)
        except OSError:  # a disk without links
            shutil.copy(work / file.name, file)
        with opened(file, "np") as tensors:
            shards |= dict.fromkeys(tensors.keys(), file.name)
        total += file.stat().st_size
    write_json(partial / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": shards})
    Checkpoint.open(partial).check_files()


def expected(checkpoint: Checkpoint, work: Path, tokens: int, settings: dict, begun: bool = False) -> Work:
    """What calibrating takes. begun: what lies in the folder `work` is of this calibration."""
    h, f, vocab = checkpoint.hidden_size, checkpoint.intermediate_size, checkpoint.vocab_size
    block, head = 4 * h * h + 3 * h * f, vocab * h
    # A block twice in float32, four matrices of the widest product's Hessian, what goes into and out of the products.
    memory = _BASE_MEMORY + 4 * max(2 * block + 4 * max(f, h) ** 2 + tokens * (12 * h + 4 * f), 2 * head + 4 * h * h)
    states = 4 * 2 * tokens * h  # there twice while they are written, before the head is
    files = sum(file.stat().st_size for file in set(checkpoint.files.values()))
    disk = files + max(states, 2 * states - 2 * head)
    # A weight of a block multiplies every token four times; a column of a matrix is one step after the other.
    each = _SECONDS + _OPERATION * (4 * tokens + f)
    parts = {f"block_{i}": block * each / machine.cores() + _COLUMN * (4 * h + f) for i in range(checkpoint.layers)}
    parts[HEAD] = (settings["head_mode"] == "int4") * (head * _SECONDS / machine.cores() + _COLUMN * h)
    there = {file.stem: file.stat().st_size for file in work.glob("*.safetensors")}
    to_do = {part: seconds for part, seconds in parts.items() if not (begun and part in there)}
    return Work("Calibrating", work, to_do, memory, max(disk - sum(there.values()), 0))
