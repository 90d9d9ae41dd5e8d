"""Which nets a folder of ONNX files has, and whether they make one model: what would fail after hours, said at once."""

from dataclasses import dataclass, field
from pathlib import Path

from helpers import artefacts
from helpers.compile import memory
from helpers.compile.options import check_options
from helpers.errors import UserError
from helpers.export.signature import Signature, read_signature
from helpers.nets import HEADS, TOPK_HEAD, count_layers, needed_nets


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


def check(plan: Plan, mode: str, num_device: int, addr_mode: str) -> None:
    """Raises UserError for what this model cannot be compiled with, and where its nets do not belong together."""
    check_options(mode, num_device, addr_mode, plan.heads, plan.hidden_size)
    if (vocabulary := plan.vocabulary) is not None and not vocabulary.is_file():
        raise UserError(
            f"{plan.folder} lacks {vocabulary.name}, the vocabulary that its manifest names: export again with `python "
            "-m helpers export`, which brings it back."
        )
    for kind, rows in (("block", plan.seq_length), ("block_cache", 1)):
        for i in range(plan.layers):
            _, states = next(iter(plan.nets[f"{kind}_{i}"].inputs.values()))
            wanted = (1, rows, plan.hidden_size)
            # A decode step may take several rows.
            if len(states) != 3 or states[2] != wanted[2] or (kind == "block" and states != wanted):
                raise UserError(
                    f"{plan.source(f'{kind}_{i}')} takes states {list(states)}, the other blocks say {list(wanted)}: "
                    "the folder mixes two exports; export again into an empty folder."
                )


def check_memory(plan: Plan) -> None:
    """Raises UserError where the largest net would not fit into the memory that is free now."""
    net = max(plan.nets, key=lambda net: plan.nets[net].weights_bytes)
    need, free = memory.needed(plan.nets[net].weights_bytes), memory.budget()
    if need > free:
        raise UserError(
            f"Compiling {net} needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: close other programs, "
            "add swap, or compile on a larger machine (--scheduler)."
        )
