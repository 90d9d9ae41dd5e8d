"""Figures of nets that no atlas has: exported with random weights at the real size, and compiled."""

import json
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from helpers import artefacts, machine, toolchain
from helpers.bmodel.bmodel import read_bmodel
from helpers.checkpoint.weights import Checkpoint
from helpers.compile.jobs import NetToCompile, compile_nets
from helpers.compile.needs import needs_of, work_of
from helpers.compile.options import net_settings
from helpers.cost import Work
from helpers.errors import UserError
from helpers.export.modules import NetBuilder
from helpers.export.signature import read_signature
from helpers.export.tracing import FLOAT32_BYTES, WeightFile, attach_weights, trace
from helpers.files import digest_of
from helpers.forecast.figures import CODE, EMBEDDING_ROWS, OUT, key_of
from helpers.forecast.shape import Shape
from helpers.nets import TOPK_HEAD, net_kind, weight_group
from helpers.patching import patching

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny"  # its code is that of every size
# Seconds to export: the exporter's start, a net, a million weights; bytes of the exporter. Measured on 2 cores.
_START, _A_NET, _A_MILLION, _BASE_MEMORY = 2.0, 0.5, 0.05, 150_000_000


def compile_figures(shape: Shape, kinds: Collection[str], out: Path = OUT) -> dict[str, dict]:
    """Compile kinds of nets of a shape; {key: figures}. Says before what it takes. Raises UserError as figures_of."""
    try:
        toolchain.require()
    except UserError as error:
        size = f"hidden size {shape.hidden_size}, S = {shape.seq_length}, {shape.mode}, {shape.num_device} devices"
        raise UserError(f"{', '.join(kinds)} of {size} were never compiled, and cannot be here. {error}") from None
    work = _expected(shape, kinds, out)
    work.announce("close other programs, add swap, or take a smaller shape", "free some, or run it on another disk")
    out.mkdir(parents=True, exist_ok=True)
    place = out / f"{digest_of([asdict(shape), sorted(kinds)])[:16]}.figures.json"
    extra: dict = {}
    building = artefacts.building(place, kind="forecast", inputs={}, settings=asdict(shape), code=CODE, extra=extra)
    with work, building as partial:
        scratch = partial.parent / "work"
        try:
            found = _compile(shape, tuple(kinds), scratch, work)
        finally:
            extra["cost"] = work.record()
            shutil.rmtree(scratch, ignore_errors=True)
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _expected(shape: Shape, kinds: Collection[str], out: Path) -> Work:
    """What compiling these kinds takes. The nets are written first, one at a time; all goes at the end."""
    nets = []
    for kind in kinds:
        quantize = net_settings(kind, shape.mode, shape.num_device, "io_alone", dynamic=False)["quantize"]
        nets.append(needs_of(_net(kind), FLOAT32_BYTES * _weights(kind, shape), quantize))
    groups = {weight_group(kind): FLOAT32_BYTES * _weights(kind, shape) for kind in kinds}
    start = _START + sum(_A_NET + _A_MILLION * _weights(kind, shape) / 1e6 for kind in kinds)
    what = f"Compiling {', '.join(kinds)} at S = {shape.seq_length} in {shape.mode}"
    return work_of(what, out, nets, machine.cores(), beside=sum(groups.values()), own=_BASE_MEMORY, start=start)


def _weights(kind: str, shape: Shape) -> int:
    if kind.startswith("embedding"):
        return EMBEDDING_ROWS * shape.hidden_size
    return shape.vocab_size * shape.hidden_size if kind == "lm_head" else shape.block_weights


def _compile(shape: Shape, kinds: tuple[str, ...], scratch: Path, work: Work) -> dict[str, dict]:
    tasks = [
        NetToCompile(
            net,
            onnx=path,
            signature=read_signature(path),
            folder=(scratch / "nets").absolute(),
            settings=net_settings(net, shape.mode, shape.num_device, "io_alone", dynamic=False),
            threads=1,
        )
        for net, path in _export(shape, kinds, scratch)
    ]
    records = compile_nets(tasks, machine.cores(), None, f"compile {shape.mode}", work)
    found = {}
    for net, record in records.items():
        (compiled,) = read_bmodel(record["bmodel"]).nets.values()
        found[key_of(_kind(net), shape)] = {
            "cycles": record["cycles"],
            "weight_bytes": compiled.weight_bytes,
            "instruction_bytes": compiled.instruction_bytes,
            "scratch_bytes": compiled.scratch_bytes,
        }
    return found


def _net(kind: str) -> str:
    return f"{kind}_0" if kind.startswith("block") else kind


def _kind(net: str) -> str:
    return "lm_head" if net == TOPK_HEAD else net_kind(net)


def _export(shape: Shape, kinds: tuple[str, ...], work: Path) -> Iterator[tuple[str, Path]]:
    """Write nets of random weights as ONNX, those of one group over the same weights; (net, file) of each."""
    code = work / "code"
    code.mkdir(parents=True)
    for file in (*MODEL.glob("*_qwen.py"), MODEL / "config.json"):
        shutil.copy(file, code)
    patching.apply(code, seq_length=shape.seq_length)
    config = json.loads((code / "config.json").read_text(encoding="utf-8"))
    for group in ("embedding", "block", "lm_head"):
        if not (nets := [kind for kind in kinds if kind.startswith(group)]):
            continue
        builder = NetBuilder(_checkpoint(shape, code, config, rows=group == "embedding"), shape.seq_length)
        weights = WeightFile(work / f"{group}.weights")
        for kind in nets:
            traced = TOPK_HEAD if kind == "lm_head" and shape.num_device > 1 else kind
            module = _without_values(builder.module(traced))
            if not weights.places:
                weights.write(_random(module))
            net = _net(kind)
            path = work.absolute() / f"{net}.onnx"
            with torch.device("meta"):
                example = builder.example(traced)
            graph = trace(module, traced, example)
            path.write_bytes(attach_weights(graph, module, weights).SerializeToString())
            yield net, path


def _checkpoint(shape: Shape, code: Path, config: dict, rows: bool) -> Checkpoint:
    vocabulary = EMBEDDING_ROWS if rows else shape.vocab_size
    config = config | {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        "kv_channels": shape.head_dim,
        "num_hidden_layers": 1,
        "intermediate_size": 2 * shape.intermediate_size,
        "vocab_size": vocabulary,
        "seq_length": shape.seq_length,
    }
    sizes = {"hidden_size": shape.hidden_size, "heads": shape.heads, "head_dim": shape.head_dim}
    sizes |= {"intermediate_size": shape.intermediate_size, "vocab_size": vocabulary, "layers": 1}
    return Checkpoint(code, config, files={}, eps=1e-6, rotary_base=10000, **sizes)


def _without_values(module: nn.Module) -> nn.Module:
    """The module on torch's meta device: traced there nothing is computed. Scores of S = 8192 would take 35 GB.

    Its tables of cosines and sines become weights: a constant that has no values is none.
    """
    for name, table in list(module.named_buffers(recurse=False)):
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(table, requires_grad=False))
    return module.to("meta")


def _random(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights about as large as a model's own, around 0; those of a norm around 1."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=random).mul_(0.02)
        yield name, values + 1 if "ln_" in name and name.endswith("weight") else values
