"""Compile the ONNX nets of a model to one bmodel for BM1684X, with TPU-MLIR.

    out/<mode>_<n>dev/<net>/       one net: its bmodel, its MLIR, the compiler's profile, a manifest
    out/<mode>_<n>dev/<net>.log    what the tools said
    out/<name>_<mode>_<n>dev.bmodel and .bmodel.json   all nets combined, and the manifest

Flags per net are those of the documented compile.sh (helpers.compile.options); the graph is changed in two places
(helpers.compile.graph).
"""

from collections.abc import Callable
from pathlib import Path

from helpers import artefacts, machine, toolchain
from helpers.bmodel import bmodel, model_tool
from helpers.checkpoint.vocabulary import copy_vocabulary
from helpers.compile.jobs import NetToCompile, compile_nets, in_order
from helpers.compile.needs import BMODEL_BYTES, work_of
from helpers.compile.options import check_name, net_settings
from helpers.compile.plan import check, plan_nets
from helpers.compile.profile import estimates
from helpers.cost import Work
from helpers.errors import UserError
from helpers.files import locked
from helpers.nets import weight_group

# What decides what the nets are combined to; for a net see helpers.compile.jobs.
_CODE = artefacts.code_of(
    "bmodel.model_tool", "compile.compiling", "compile.options", "compile.plan", "compile.profile"
)


def compile_model(
    onnx: str | Path,
    out: str | Path,
    name: str,
    mode: str,
    num_device: int = 1,
    addr_mode: str = "basic",
    dynamic: bool = False,
    jobs: int | None = None,
    scheduler: str | None = None,
    head_mode: str | None = None,
    log: Callable[[str], None] = machine.log,
) -> Path:
    """Compile all nets of an exported model; return out/<name>_<mode>_<n>dev.bmodel (…_dyn.bmodel where dynamic).

    onnx: folder of nets as `export` writes them. mode: bf16, int8 (W8BF16) or int4 (W4BF16, groups of 64).
    head_mode: of lm_head, where it is another: int8 while the blocks are int4, for one.
    jobs: nets at a time, by default one a core, fewer where memory is short. scheduler: address of a Dask cluster.
    log: gets a line of what it needs, and one of this machine's speed.
    The manifest has extra keys nets {net: {bytes, cycles, ms, ddr_bw, flops, seconds}}, estimates {first_token_ms,
    decode_ms} (None where a net is dynamic), layers, seq_length, config, tokenizer, by_heart, cost (of helpers.cost).
    Raises UserError for everything a user can cause, with a failing net's own error and the path of its log.
    """
    check_name(name)
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs is {jobs}, it must be 1 or more.")
    plan = plan_nets(onnx, num_device)
    check(plan, mode, num_device, addr_mode)
    check(plan, head_mode or mode, num_device, addr_mode)
    jobs = jobs or machine.cores()
    if scheduler is None:
        toolchain.require()
    out = Path(out).absolute()
    folder = out / f"{mode}_{num_device}dev"
    vocabulary = plan.manifest.get("tokenizer")
    target = out / f"{name}_{mode}_{num_device}dev{'_dyn' if dynamic else ''}.bmodel"
    tasks = [
        NetToCompile(
            net,
            onnx=plan.files[net].absolute(),
            signature=signature,
            folder=folder,
            settings=net_settings(net, mode, num_device, addr_mode, dynamic, head_mode),
            recorded={file: output["sha256"] for file, output in plan.manifest.get("outputs", {}).items()},
            threads=max(1, machine.cores() // jobs),
        )
        for net, signature in plan.nets.items()
    ]
    work = _work(tasks, target, jobs, scheduler, log)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = copy_vocabulary(Path(onnx) / vocabulary, out) if vocabulary else None
    busy = f"Another compile is running in {folder}: wait for it, or take another --out."
    with locked(folder / ".lock", busy), work:
        nets = compile_nets(tasks, jobs, scheduler, f"compile {mode}", work)
        bmodels = [record.pop("bmodel") for record in nets.values()]
        inputs = {net: record.pop("sha256") for net, record in nets.items()}
        extra = {
            "nets": nets,
            "estimates": estimates(nets),
            "layers": plan.layers,
            "seq_length": plan.seq_length,
            "config": plan.manifest.get("config"),
            "tokenizer": tokenizer,
            "by_heart": plan.manifest.get("by_heart"),
        }
        settings = {"name": name, "mode": mode, "num_device": num_device, "addr_mode": addr_mode, "dynamic": dynamic}
        settings |= {"via": "onnx"}
        if head_mode not in (None, mode):
            settings |= {"head_mode": head_mode}
        if not artefacts.up_to_date(target, inputs, settings, _CODE):
            with artefacts.building(
                target, kind="bmodel", inputs=inputs, settings=settings, code=_CODE, extra=extra
            ) as partial:
                model_tool.combine(bmodels, partial)
                bmodel.strip_time(partial)
                extra["cost"] = work.record()
    return target


def _work(tasks: list[NetToCompile], target: Path, jobs: int, scheduler: str | None, log: Callable) -> Work:
    """What is to do of the nets, and what that takes here. Raises UserError where memory or disk are not there."""
    to_do = [task for task in in_order(tasks) if not task.seems_made()]
    weights = {weight_group(task.net): task.needs.stays - BMODEL_BYTES for task in tasks}
    there = [target, *(task.folder / task.net / f"{task.net}.bmodel" for task in to_do)]
    work = work_of(
        f"Compiling to {target.name}",
        target.parent,
        [task.needs for task in to_do if scheduler is None],
        jobs,
        there=sum(file.stat().st_size for file in there if file.is_file()),
        combined=BMODEL_BYTES + sum(weights.values()) if to_do or not target.is_file() else 0,
    )
    work.announce("close other programs", "free some, or choose another --out", log)
    return work
