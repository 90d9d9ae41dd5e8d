"""What the compiler's cycle model says of each kind of net at a size: out of the atlas, or compiled now.

Cycles depend on shapes, not on values. So one block of random weights stands for all layers of a model, a file of a few
hundred MB for a checkpoint of 15 GB. `atlas.json` beside this file has what was compiled before; what is compiled on
this machine is kept in out/forecast.
"""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from helpers import artefacts, machine, toolchain
from helpers.bmodel.bmodel import read_bmodel
from helpers.checkpoint.weights import Checkpoint
from helpers.compile import memory
from helpers.compile.jobs import NetToCompile, compile_nets
from helpers.compile.options import net_settings
from helpers.errors import UserError
from helpers.export.modules import NetBuilder
from helpers.export.signature import read_signature
from helpers.export.tracing import WeightFile, attach_weights, trace
from helpers.files import digest_of
from helpers.forecast.shape import Shape
from helpers.nets import TOPK_HEAD, net_kind
from helpers.patching import patching

ATLAS = Path(__file__).with_name("atlas.json")
OUT = Path("out/forecast")
MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny"  # its code is that of every size
KINDS = ("embedding", "embedding_cache", "block", "block_cache", "lm_head")
# Rows of an embedding that is compiled for its cycles: a net reads S rows, however many there are.
EMBEDDING_ROWS = 3008
_CODE = artefacts.code_of("forecast.figures", "compile.graph", "compile.options", "compile.worker", "export.modules")


def key_of(kind: str, shape: Shape) -> str:
    """What a kind of net depends on, as one word: `block h4096 i11008 a32 s512 int4 d1`."""
    h, s, of = f"h{shape.hidden_size}", f"s{shape.seq_length}", f"{shape.mode} d{shape.num_device}"
    return {
        "embedding": f"embedding {h} {s} d{shape.num_device}",
        "embedding_cache": f"embedding_cache {h} d{shape.num_device}",
        "block": f"block {h} i{shape.intermediate_size} a{shape.heads} {s} {of}",
        "block_cache": f"block_cache {h} i{shape.intermediate_size} a{shape.heads} {s} {of}",
        "lm_head": f"lm_head {h} v{shape.vocab_size} {of}",
    }[kind]


def known(out: Path = OUT) -> dict[str, dict]:
    """All figures that there are, by their keys: of the atlas, and of what was compiled on this machine."""
    figures = json.loads(ATLAS.read_text(encoding="utf-8")) if ATLAS.is_file() else {}
    for path in sorted(out.glob("*.figures.json")):
        manifest = artefacts.manifest_path(path)
        if manifest.is_file() and artefacts.read_manifest(path).get("code") == _CODE:
            figures.update(json.loads(path.read_bytes()))
    return figures


def figures_of(shape: Shape, out: Path = OUT) -> dict[str, dict]:
    """{kind of net: {cycles, weight_bytes, instruction_bytes, scratch_bytes}} of a model of this shape.

    What is not known is compiled, which takes minutes, and kept in `out`. Sizes in bytes, over all devices; cycles at
    1 GHz, of one device.
    Raises UserError where memory or disk do not suffice, or with what the compiler says.
    """
    there = known(out)
    missing = [kind for kind in KINDS if key_of(kind, shape) not in there]
    if missing:
        there |= compile_figures(shape, missing, out)
    found = {kind: there[key_of(kind, shape)] for kind in KINDS}
    if refused := [figures["error"] for figures in found.values() if "error" in figures]:
        raise UserError(f"The compiler does not take this shape: {refused[0]}")
    return found


def compile_figures(shape: Shape, kinds: Iterable[str], out: Path = OUT) -> dict[str, dict]:
    """Compile kinds of nets of a shape with random weights; {key: figures}. Says before what it will take."""
    toolchain.require()
    needs = {kind: 4 * _weights(kind, shape) for kind in kinds}
    largest = max(needs, key=needs.__getitem__)
    # Tracing holds attention's scores of all heads at once.
    scores = 16 * (shape.heads + 1) * shape.seq_length**2 if needs.keys() & {"block"} else 0
    memory.require(f"{largest} of this size", max(memory.needed(needs[largest]), 10**9 + scores), memory.budget())
    disk = 3 * sum(needs.values())
    if disk > machine.free_disk(out):
        raise UserError(
            f"Compiling these nets needs {disk / 1e9:.1f} GB on the disk that holds {out}, which has "
            f"{machine.free_disk(out) / 1e9:.1f} GB free: free some."
        )
    out.mkdir(parents=True, exist_ok=True)
    place = out / f"{digest_of([asdict(shape), sorted(kinds)])[:16]}.figures.json"
    machine.log(
        f"compiling {', '.join(kinds)} of this size: {memory.needed(needs[largest]) / 1e9:.1f} GB of memory, "
        f"{disk / 1e9:.1f} GB of disk"
    )
    with artefacts.building(place, kind="forecast", inputs={}, settings=asdict(shape), code=_CODE) as partial:
        work = partial.parent / "work"
        try:
            found = _compile(shape, tuple(kinds), work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _weights(kind: str, shape: Shape) -> int:
    if kind.startswith("embedding"):
        return EMBEDDING_ROWS * shape.hidden_size
    return shape.vocab_size * shape.hidden_size if kind == "lm_head" else shape.block_weights


def _compile(shape: Shape, kinds: tuple[str, ...], work: Path) -> dict[str, dict]:
    tasks = [
        NetToCompile(
            net,
            onnx=path,
            signature=read_signature(path),
            folder=(work / "nets").absolute(),
            settings=net_settings(net, shape.mode, shape.num_device, "io_alone", dynamic=False),
            threads=1,
        )
        for net, path in _export(shape, kinds, work)
    ]
    began = time.monotonic()
    records = compile_nets(tasks, machine.cores(), None, f"compile {shape.mode}")
    machine.log(f"compiled in {time.monotonic() - began:.0f} s")
    found = {}
    for net, record in records.items():
        (compiled,) = read_bmodel(record["bmodel"]).nets.values()
        found[key_of(_kind(net), shape)] = {
            "cycles": record["cycles"],
            "weight_bytes": compiled.weight_bytes,
            "instruction_bytes": compiled.instruction_bytes,
            "scratch_bytes": compiled.scratch_bytes,
            "seconds": record["seconds"],
        }
    return found


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
            module = builder.module(traced)
            if not weights.places:
                weights.write(_random(module))
            net = f"{kind}_0" if kind.startswith("block") else kind
            path = work.absolute() / f"{net}.onnx"
            graph = trace(module, traced, builder.example(traced))
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


def _random(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that differ from each other: the exporter stores equal ones once."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=random).mul_(0.02)
        yield name, values + 1 if "ln_" in name and name.endswith("weight") else values
