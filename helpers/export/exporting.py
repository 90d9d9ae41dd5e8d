"""Write every net of a patched Qwen checkpoint as ONNX, one at a time, without ever holding the whole model.

A net is traced once per kind, without its weights; then each layer's file is that graph with its own weights attached,
streamed from the checkpoint tensor by tensor (helpers.export.tracing): more layers take no more memory.
"""

from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from helpers import artefacts, machine
from helpers.checkpoint.vocabulary import copy_vocabulary
from helpers.checkpoint.weights import Checkpoint
from helpers.errors import UserError
from helpers.export.modules import NetBuilder, checkpoint_prefixes, read_weights
from helpers.export.tracing import FLOAT32_BYTES, OPSET, WeightFile, attach_weights, keep_attention_unfused, trace
from helpers.files import sha256_file, write_json
from helpers.nets import CANDIDATES, net_groups, net_kind
from helpers.patching import patching

# What of these helpers decides the content of a net; the code of the model is among its inputs.
_CODE = artefacts.code_of(
    "export.exporting", "export.modules", "export.tracing", "nets", "checkpoint.modeling", "checkpoint.weights"
)
# torch, its exporter and one traced layer's activations; measured with benchmarks/export_memory.py.
_BASE_MEMORY = 1_000_000_000
# Of a block's attention scores, that are there at once while it is traced; measured for S from 2048 to 6000.
_SCORE_COPIES = 4


def export(
    model_path: str | Path,
    out: str | Path,
    seq_length: int,
    log: Callable[[str], None] = machine.log,
    rows: int = 1,
) -> Path:
    """Export all nets of a patched checkpoint for sequence length S to `out`/<net>.onnx.

    rows: R, new tokens that the decode nets and the head take at once; more than one is for helpers.run.lookahead.
    A group of nets whose inputs (code, config, weights), settings and exporter are unchanged and whose files are whole
    is skipped; a killed export goes on where it was.
    Raises UserError where the checkpoint is not a patched Qwen-1, S is not positive, or memory or disk are too small.
    """
    out = Path(out)
    checkpoint = Checkpoint.open(model_path)
    if not isinstance(seq_length, int) or seq_length < 1:
        raise UserError(f"seq_length is {seq_length}, it must be a whole number from 1 on (the documented one is 512).")
    if rows < 1:
        raise UserError(f"rows is {rows}, it must be 1, or 10 for lookahead decoding with its documented sizes.")
    patching.require_patched(checkpoint.path)
    trained = patching.trained_seq_length(checkpoint.path)
    for warning in patching.beyond_trained(seq_length, trained):
        log(f"warning: {warning}")
    log(check_room(checkpoint, out, seq_length, rows))
    files = [checkpoint.path / name for name in ("config.json", "modeling_qwen.py", "configuration_qwen.py")]
    code = {file.name: sha256_file(file) for file in files if file.exists()}
    settings = {"seq_length": seq_length, "opset": OPSET, "rows": rows, "candidates": CANDIDATES}
    builder = NetBuilder(checkpoint, seq_length)
    traced: dict[str, tuple] = {}
    groups = net_groups(checkpoint.layers, rows)
    out.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = copy_vocabulary(checkpoint.path, out)
    except UserError as error:
        log(f"warning: {error} The nets are exported all the same; chatting will want --tokenizer.")
        tokenizer = None
    for group, nets in tqdm(groups.items(), desc="export", unit="net group"):
        inputs = code | {prefix: checkpoint.digest(prefix) for prefix in checkpoint_prefixes(group)}
        artefact = out / f"{group}.onnx"
        if artefacts.up_to_date(artefact, inputs, settings, _CODE):
            continue
        with artefacts.building(artefact, kind="onnx", inputs=inputs, settings=settings, code=_CODE) as partial:
            weights = WeightFile(partial.with_name(f"{group}.weights"))
            if checkpoint_prefixes(group):
                weights.write(read_weights(checkpoint, group))
            for net in nets:
                kind = net_kind(net)
                if kind not in traced:
                    module = builder.module(kind)
                    graph = trace(module, kind, builder.example(kind, rows))
                    if kind == "block_cache" and rows > 1:
                        keep_attention_unfused(graph)
                    traced[kind] = (graph, module)
                model = attach_weights(*traced[kind], weights)
                partial.with_name(f"{net}.onnx").write_bytes(model.SerializeToString())
    manifests = [artefacts.read_manifest(out / f"{group}.onnx") for group in groups]
    write_json(
        out / artefacts.MANIFEST,
        {
            "kind": "onnx",
            "inputs": code,
            "settings": settings,
            "code": _CODE,
            "versions": machine.tool_versions(),
            "machine": manifests[0]["machine"],
            "seconds": round(sum(manifest["seconds"] for manifest in manifests), 3),
            "outputs": {name: entry for manifest in manifests for name, entry in manifest["outputs"].items()},
            "nets": {net: group for group, nets in groups.items() for net in nets},
            "seq_length": seq_length,
            "trained_seq_length": trained,
            "config": checkpoint.config,
            "tokenizer": tokenizer,
            "by_heart": checkpoint.by_heart,
        },
    )
    return out


def needed_bytes(checkpoint: Checkpoint, seq_length: int = 0, rows: int = 1) -> tuple[int, int]:
    """Bytes of memory and of disk that an export of the whole model needs; without S, those of its weights."""
    h, vocab = checkpoint.hidden_size, checkpoint.vocab_size
    block = 4 * h * h + 3 * h * checkpoint.intermediate_size
    disk = FLOAT32_BYTES * (checkpoint.layers * block + 2 * vocab * h)
    # The exporter copies what it traces, filled in or not: twice the weights of one net, in float32, for a moment.
    memory = _BASE_MEMORY + 2 * FLOAT32_BYTES * max(block, vocab * h)
    # Tracing runs the block once: the mask and the scores of all heads grow with the square of S.
    seen = max(seq_length * seq_length, rows * (seq_length + rows))
    return memory + _SCORE_COPIES * FLOAT32_BYTES * (checkpoint.heads + 1) * seen, disk


def check_room(checkpoint: Checkpoint, out: Path, seq_length: int, rows: int = 1) -> str:
    """One line saying what the export will need. Raises UserError where that is not there."""
    memory, disk = needed_bytes(checkpoint, seq_length, rows)
    free_memory, free_disk = machine.free_memory(), machine.free_disk(out)
    if free_memory < memory:
        scores = memory - needed_bytes(checkpoint)[0]
        raise UserError(
            f"The export needs {memory / 1e9:.1f} GB of memory, {free_memory / 1e9:.1f} GB are free: close other "
            "programs or add swap (a GPU does not help, since one net at a time is written), or take a smaller "
            f"--seq_length, {scores / 1e9:.1f} GB are for attention over {seq_length} tokens."
        )
    done = sum(p.stat().st_size for p in out.glob("*.weights")) if out.is_dir() else 0
    if free_disk + done < disk:
        raise UserError(
            f"The export needs {disk / 1e9:.3f} GB of disk, {free_disk / 1e9:.3f} GB are free on the disk that holds "
            f"{out}: free some or choose another --out."
        )
    minutes = max(1, round(disk / 150e6 / 60))
    return (
        f"{checkpoint.layers} layers: needs {memory / 1e9:.1f} GB of memory ({free_memory / 1e9:.1f} free), "
        f"{disk / 1e9:.2f} GB of disk ({free_disk / 1e9:.1f} free), about {minutes} min"
    )
