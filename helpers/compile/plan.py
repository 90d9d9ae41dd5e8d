"""Which nets a folder of ONNX files has, and whether they make one model: what would fail after hours, said at once."""

from dataclasses import dataclass
from pathlib import Path

from helpers import artefacts
from helpers.compile.options import check_options
from helpers.errors import UserError
from helpers.export.signature import Signature, read_signature
from helpers.nets import HEADS, TOPK_HEAD, count_layers, needed_nets, net_kind


@dataclass
class Plan:
    """The nets of a model, in the order they are combined. manifest: of their export; empty where there is none."""

    files: dict[str, Path]
    nets: dict[str, Signature]
    manifest: dict
    layers: int
    seq_length: int
    hidden_size: int
    heads: int


def plan_nets(onnx: str | Path, num_device: int = 1) -> Plan:
    """Look at a folder of ONNX nets, not at weights. Raises UserError where a net is missing or not readable."""
    folder = Path(onnx)
    found = {path.stem for path in folder.glob("*.onnx")}
    layers, heads = count_layers(found), ()
    manifest = artefacts.read_manifest(folder) if artefacts.manifest_path(folder).exists() else {}
    if num_device == 1 and found & set(HEADS):
        # Nets that decode several rows at once have no head to sample with.
        heads = HEADS if manifest.get("settings", {}).get("rows", 1) == 1 else HEADS[:1]
    files = {net: folder / f"{net}.onnx" for net in needed_nets(layers, heads)}
    if num_device > 1:
        # There lm_head gives the token, as documented.
        files["lm_head"] = folder / f"{TOPK_HEAD}.onnx"
    if missing := [path.name for path in files.values() if path.stem not in found]:
        raise UserError(
            f"{folder} lacks {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}: export the model again "
            "with `python -m helpers export`."
        )
    nets = {net: read_signature(path) for net, path in files.items()}
    cache = nets["block_cache_0"].inputs
    try:
        (_, (_, _, hidden_size)), _, _, (_, (_, seq_length, heads, _)), _ = cache.values()
    except ValueError:
        raise UserError(
            f"{folder}/block_cache_0.onnx has inputs {', '.join(cache)}, not states, position, mask, past key and past "
            "value: export it again."
        ) from None
    return Plan(files, nets, manifest, layers, seq_length, hidden_size, heads)


def check(plan: Plan, mode: str, num_device: int, addr_mode: str) -> None:
    """Raises UserError for what this model cannot be compiled with, and where its nets do not belong together."""
    check_options(mode, num_device, addr_mode, plan.heads, plan.hidden_size)
    for net in (net for net in plan.nets if net.startswith("block")):
        _, states = next(iter(plan.nets[net].inputs.values()))
        # A decode step may take several rows.
        rows = states[1:2] if net_kind(net) == "block_cache" else (plan.seq_length,)
        if states != (wanted := (1, *rows, plan.hidden_size)):
            raise UserError(
                f"{plan.files[net]} takes states {list(states)}, the other blocks say {list(wanted)}: the folder mixes "
                "two exports; export again into an empty folder."
            )
