"""Compile the ONNX nets of a model to one bmodel for BM1684X, with the real TPU-MLIR.

    out/<mode>_<n>dev/<net>/       one net: its bmodel, its MLIR, the compiler's profile, a manifest
    out/<mode>_<n>dev/<net>.log    what the tools said
    out/<name>_<mode>_<n>dev.bmodel and .bmodel.json   all nets combined, and the manifest

Flags per net are those of the documented compile.sh; what differs is how they are run, and changes to the graph that
the compiler's own cycles and the simulator's bits justify (helpers.compile.graph).
"""

import subprocess
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

from helpers import artefacts, machine, toolchain
from helpers.bmodel import bmodel
from helpers.checkpoint.vocabulary import copy_vocabulary
from helpers.compile import jobs as net_jobs
from helpers.compile.profile import estimates
from helpers.errors import UserError
from helpers.export.signature import Signature, read_signature
from helpers.files import locked
from helpers.nets import HEADS, TOPK_HEAD, count_layers, needed_nets, net_kind
from helpers.tensors import ADDR_MODES

# Documented: --quantize W8BF16 for int8, W4BF16 --q_group_size 64 for int4. 64 is the tools' default for W8 too.
QUANTIZE = {"bf16": "BF16", "int8": "W8BF16", "int4": "W4BF16"}
Q_GROUP_SIZE = 64
# The documented sequence length.
SEQ_LENGTH = 512
# What of these helpers decides what the nets are combined to; for a net see helpers.compile.jobs.
_CODE = artefacts.code_of("compile.compiling", "compile.profile")


@dataclass
class Plan:
    """The nets of a model, in the order they are combined, and what their signatures say of the model."""

    folder: Path
    nets: dict[str, Signature]
    layers: int
    seq_length: int
    hidden_size: int
    heads: int
    num_device: int = 1
    manifest: dict = field(default_factory=dict)

    def source(self, net: str) -> Path:
        """The ONNX file of a net. With several devices lm_head gives the token, as documented."""
        return self.folder / f"{TOPK_HEAD if net == 'lm_head' and self.num_device > 1 else net}.onnx"

    @property
    def vocabulary(self) -> Path | None:
        """The vocabulary that goes with the nets, beside them; None where their manifest names none."""
        name = self.manifest.get("tokenizer")
        return self.folder / Path(name).name if name else None


def plan_nets(onnx: str | Path, num_device: int = 1) -> Plan:
    """Look at a folder of ONNX nets without reading weights.

    Raises UserError where a net is missing, is not readable or has another shape than its contract.
    """
    folder = Path(onnx)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of ONNX nets: make one with `python -m helpers export`.")
    found = {path.stem for path in folder.glob("*.onnx")}
    if not found:
        raise UserError(f"{folder} has no .onnx files: make them with `python -m helpers export`.")
    layers, heads = count_layers(found), ()
    manifest = artefacts.read_manifest(folder) if artefacts.manifest_path(folder).exists() else {}
    if num_device == 1 and found & set(HEADS):
        # Nets that decode several rows at once are exported without a head to sample with.
        heads = HEADS if manifest.get("settings", {}).get("rows", 1) == 1 else HEADS[:1]
    names = needed_nets(layers, heads)
    plan = Plan(folder, {}, layers, 0, 0, 0, num_device, manifest)
    missing = [plan.source(net).stem for net in names if plan.source(net).stem not in found]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(f'{net}.onnx' for net in missing[:4])}"
            f"{' and more' if len(missing) > 4 else ''}: export the model again with `python -m helpers export`."
        )
    plan.nets = {net: read_signature(plan.source(net)) for net in names}
    cache = list(plan.nets["block_cache_0"].inputs.values())
    try:
        (_, (_, _, plan.hidden_size)), (_, (_, plan.seq_length, plan.heads, _)) = cache[0], cache[3]
    except (IndexError, ValueError):
        raise UserError(
            f"{folder}/block_cache_0.onnx has inputs {', '.join(plan.nets['block_cache_0'].inputs)}; needed are states "
            "[1,1,H], position, mask, past key and past value [1,S,h,d]: export it again."
        ) from None
    return plan


def check_options(mode: str, num_device: int, addr_mode: str, heads: int, hidden_size: int) -> None:
    """Raises UserError for what a model of this size cannot be compiled with."""
    if mode not in QUANTIZE:
        raise UserError(f"mode is {mode!r}, it must be one of {', '.join(QUANTIZE)}.")
    if addr_mode not in ADDR_MODES:
        raise UserError(f"addr_mode is {addr_mode!r}, it must be one of {', '.join(ADDR_MODES)}.")
    if num_device < 1:
        raise UserError(f"num_device is {num_device}, it must be 1 or more.")
    if heads % num_device:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"num_device {num_device} does not divide the {heads} attention heads, which are split over the devices: "
            f"take one of {fitting}."
        )
    if mode == "int4" and hidden_size % Q_GROUP_SIZE:
        raise UserError(
            f"int4 quantises in groups of {Q_GROUP_SIZE} weights, which does not divide the hidden size "
            f"{hidden_size}: take int8 or bf16."
        )


def check(plan: Plan, mode: str, num_device: int, addr_mode: str) -> None:
    """What would fail after hours, said at once. Raises UserError."""
    check_options(mode, num_device, addr_mode, plan.heads, plan.hidden_size)
    if (vocabulary := plan.vocabulary) is not None and not vocabulary.is_file():
        raise UserError(
            f"{plan.folder} lacks {vocabulary.name}, the vocabulary that its manifest names: export again with `python "
            "-m helpers export`, which brings it back."
        )
    expected = {
        f"block_{i}": (1, plan.seq_length, plan.hidden_size) for i in range(plan.layers)
    } | {f"block_cache_{i}": (1, 1, plan.hidden_size) for i in range(plan.layers)}
    for net, shape in expected.items():
        found = next(iter(plan.nets[net].inputs.values()))[1]
        if len(found) != 3 or found[2] != shape[2] or (not net.startswith("block_cache") and found != shape):
            raise UserError(
                f"{plan.source(net)} takes states {list(found)}, the other blocks say {list(shape)}: the folder mixes "
                "two exports; export again into an empty folder."
            )


def check_name(name: str) -> None:
    """Raises UserError where a name cannot begin a file's name: the file would be elsewhere, or nowhere."""
    if not name.strip() or name.startswith(".") or "/" in name or "\0" in name or len(name.encode()) > 100:
        raise UserError(
            f"The name {name[:120]!r} cannot begin a file's name: give a short one without slashes, such as qwen-7b."
        )


def net_settings(net: str, mode: str, num_device: int, addr_mode: str, dynamic: bool) -> dict:
    """The compiler's settings for one net, as documented in compile.sh.

    io_alone is for block_cache only: its inputs are the cache, which must outlive a run. dynamic is for prefill
    (embedding and blocks): decode nets have one row whatever the prompt.
    """
    kind = net_kind(net)
    embedding, block = kind.startswith("embedding"), kind.startswith("block")
    cache, head = kind == "block_cache", net in HEADS
    quantize = "F32" if head else "BF16" if embedding else QUANTIZE[mode]
    return {
        "quantize": quantize,
        "q_group_size": Q_GROUP_SIZE if quantize.startswith("W") else 0,
        "quant_input": not head,
        "quant_output": embedding or block,
        "num_device": 1 if head else num_device,
        "addr_mode": addr_mode if cache else "basic",
        "dynamic": dynamic and not cache and net != "embedding_cache" and (embedding or block),
        "merge_cache": cache,
        # The pass that splits a net over devices looks for the rotation in its long form.
        "fuse_rotation": block and num_device == 1,
    }


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
    progress=None,
) -> Path:
    """Compile all nets of an exported model; return out/<name>_<mode>_<n>dev.bmodel (…_dyn.bmodel where dynamic).

    onnx: folder of nets as `export` writes them. mode: bf16, int8 (W8BF16) or int4 (W4BF16, groups of 64).
    jobs: nets at a time, by default one a core, fewer where memory is short. scheduler: address of a Dask cluster.
    progress: a tqdm class. Nets that are there already, made from the same inputs, are not compiled again.
    The manifest has extra keys nets {net: {bytes, cycles, ms, ddr_bw, flops, seconds}}, estimates {first_token_ms,
    decode_ms} (the compiler's cycle model, None where a net is dynamic), config, seq_length, tokenizer.
    Raises UserError for everything a user can cause, with a failing net's own error and the path of its log.
    """
    check_name(name)
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs is {jobs}, it must be 1 or more.")
    plan = plan_nets(onnx, num_device)
    check(plan, mode, num_device, addr_mode)
    jobs = jobs or machine.cores()
    if scheduler is None:
        toolchain.require()
        check_memory(plan)
    out = Path(out).absolute()
    folder = out / f"{mode}_{num_device}dev"
    folder.mkdir(parents=True, exist_ok=True)
    target = out / f"{name}_{mode}_{num_device}dev{'_dyn' if dynamic else ''}.bmodel"
    tasks = [
        {
            "net": net,
            "onnx": str(plan.source(net).absolute()),
            "files": [
                str(plan.source(net).absolute().with_name(name))
                for name in [plan.source(net).name, *sorted(sig.external)]
            ],
            "recorded": {k: v["sha256"] for k, v in plan.manifest.get("outputs", {}).items()},
            "folder": str(folder),
            "settings": net_settings(net, mode, num_device, addr_mode, dynamic),
            "memory": net_jobs.needed_memory(sig.weights_bytes),
            "weights": sig.weights_bytes,
            "shapes": sorted(sig.inputs.items()),
            "threads": max(1, machine.cores() // jobs),
        }
        for net, sig in plan.nets.items()
    ]
    busy = f"Another compile is running in {folder}: wait for it, or take another --out."
    with locked(folder / ".lock", busy):
        records = _run(tasks, jobs, scheduler, f"compile {mode}", progress)
        nets = {
            net: {k: records[net][k] for k in ("bytes", "cycles", "ms", "ddr_bw", "flops", "seconds")}
            for net in plan.nets
        }
        extra = {"nets": nets, "estimates": estimates(nets), "layers": plan.layers, "seq_length": plan.seq_length}
        extra |= {"config": plan.manifest.get("config")}
        extra |= {"tokenizer": copy_vocabulary(plan.vocabulary, out) if plan.vocabulary else None}
        settings = {
            "name": name,
            "mode": mode,
            "num_device": num_device,
            "addr_mode": addr_mode,
            "dynamic": dynamic,
            "via": "onnx",
        }
        inputs = {net: records[net]["sha256"] for net in plan.nets}
        if not artefacts.up_to_date(target, inputs, settings, _CODE):
            with artefacts.building(
                target, kind="bmodel", inputs=inputs, settings=settings, code=_CODE, extra=extra
            ) as partial:
                combine([records[net]["bmodel"] for net in plan.nets], partial)
                bmodel.strip_time(partial)
    return target


def check_memory(plan: Plan) -> None:
    """Raises UserError where the largest net would not fit into the memory that is free now."""
    net = max(plan.nets, key=lambda net: plan.nets[net].weights_bytes)
    need, free = net_jobs.needed_memory(plan.nets[net].weights_bytes), net_jobs.memory_budget()
    if need > free:
        raise UserError(
            f"Compiling {net} needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: close other programs, "
            "add swap, or compile on a larger machine (--scheduler)."
        )


def _run(tasks: list[dict], jobs: int, scheduler: str | None, title: str, progress) -> dict[str, dict]:
    from tqdm.auto import tqdm

    records: dict[str, dict] = {}
    with (
        (progress or tqdm)(total=len(tasks), desc=title, unit="net") as bar,
        net_jobs.executor(jobs, scheduler) as pool,
    ):
        # The first of each kind goes first: those after it find its kernels (helpers.compile.worker), and the prefill
        # block takes longest.
        first = ("block_0", "block_cache_0")
        ordered = sorted(tasks, key=lambda task: first.index(task["net"]) if task["net"] in first else len(first))
        futures = [pool.submit(net_jobs.compile_net, task) for task in ordered]
        for future in as_completed(futures):
            record = future.result()
            records[record["net"]] = record
            bar.set_postfix_str(record["net"], refresh=False)
            bar.update()
    return records


def combine(bmodels: list[str | Path], target: str | Path) -> None:
    """Combine bmodels to one with the wheel's model_tool; equal weights are stored once. Raises UserError."""
    program = toolchain.wheel_path() / "bin" / "model_tool"
    command = [str(program), "--combine", *map(str, bmodels), "-o", str(target)]
    done = subprocess.run(command, env=toolchain.environment(), capture_output=True, text=True, check=False)
    target = Path(target)
    if done.returncode or not target.is_file() or not target.stat().st_size:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise UserError(f"model_tool could not combine {len(bmodels)} bmodels: {said}")


def add_arguments(parser) -> None:
    parser.add_argument("--name", required=True, help="name of the model, such as qwen-7b: begins the file's name")
    parser.add_argument("--mode", default="int8", help="bf16, int8 (default) or int4")
    parser.add_argument("--via", choices=("onnx", "llm_convert"), default="onnx", help="onnx (default)")
    parser.add_argument("--onnx", help="folder of ONNX nets, from `export`")
    parser.add_argument("--model_path", help="folder of the checkpoint, for --via llm_convert")
    parser.add_argument("--seq_length", type=int, help="S; the ONNX nets have theirs, --via llm_convert takes 512")
    parser.add_argument("--out", required=True, help="folder for the bmodel and the nets' own folders")
    parser.add_argument("--num_device", type=int, default=1, help="devices to split the model over (default 1)")
    parser.add_argument(
        "--addr_mode",
        help="of the cache nets: basic (default) or io_alone (default of --via llm_convert, as the converter has it)",
    )
    parser.add_argument(
        "--dynamic", nargs="?", type=int, choices=(0, 1), const=1, default=0, help="prefill takes any length up to S"
    )
    parser.add_argument("--jobs", type=int, help="nets at a time (default: one a core, as memory allows)")
    parser.add_argument("--scheduler", help="address of a Dask scheduler that sends the nets to many machines")


def run(args) -> int:
    common = {"num_device": args.num_device, "dynamic": bool(args.dynamic)}
    if args.via == "llm_convert":
        from helpers.compile import llm_convert

        if not args.model_path:
            raise UserError("--via llm_convert needs --model_path DIR, the folder of the checkpoint.")
        seq_length = SEQ_LENGTH if args.seq_length is None else args.seq_length
        common |= {"addr_mode": args.addr_mode or "io_alone"}
        target = llm_convert.convert(args.model_path, args.out, args.name, args.mode, seq_length, **common)
    else:
        if not args.onnx:
            raise UserError("--onnx DIR is needed: the folder that `python -m helpers export` made.")
        compiled = plan_nets(args.onnx, args.num_device).seq_length
        if args.seq_length not in (None, compiled):
            raise UserError(
                f"The nets in {args.onnx} are for a sequence length of {compiled}, {args.seq_length} was asked for: "
                f"export again with --seq_length {args.seq_length}."
            )
        common |= {"addr_mode": args.addr_mode or "basic", "jobs": args.jobs, "scheduler": args.scheduler}
        target = compile_model(args.onnx, args.out, args.name, args.mode, **common)
    manifest = artefacts.read_manifest(target)
    if manifest["estimates"]:
        first, decode = manifest["estimates"]["first_token_ms"], manifest["estimates"]["decode_ms"]
        machine.log(f"estimated by the compiler's cycle model: first token {first:.2f} ms, decode {decode:.2f} ms")
    print(target)
    return 0
