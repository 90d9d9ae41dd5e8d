"""Write every net of a patched Qwen checkpoint as ONNX, one at a time, without ever holding the whole model.

A net is traced once per kind, without its weights; then each layer's file is that graph with its own weights attached,
streamed from the checkpoint tensor by tensor (helpers.export.tracing): more layers take no more memory.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from helpers import artefacts, machine
from helpers.checkpoint.vocabulary import copy_vocabulary
from helpers.checkpoint.weights import Checkpoint
from helpers.cost import Work
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
# Beside torch: Qwen's code, the exporter, a traced layer's activations, weights on their way to the disk. Measured.
_BASE_MEMORY = 130_000_000
# How often a net's weights are there while it is traced, filled in or not: of one that fits into one message of ONNX,
# and of a larger one. Measured with heads of 0.03 to 0.5 GB, and of 2.5 GB.
_COPIES, _MESSAGE = (3, 2), 2 << 30
# Of a block's attention scores, that are there at once while it is traced; measured for S from 2048 to 6000.
_SCORE_COPIES = 4
# Seconds, measured on 2 cores: to import Qwen's code, for a trace, a weight that is in it, a weight that is written, an
# operation of the block, which runs once while it is traced.
_START, _A_TRACE, _TRACED, _WRITTEN, _COMPUTED = 2.0, 0.2, 3e-8, 3.5e-8, 3e-11


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
    settings = {"seq_length": seq_length, "opset": OPSET, "rows": rows, "candidates": CANDIDATES}
    files = [checkpoint.path / name for name in ("config.json", "modeling_qwen.py", "configuration_qwen.py")]
    code = {file.name: sha256_file(file) for file in files if file.exists()}
    work = expected(checkpoint, out, code, settings)
    scores = work.before.memory_bytes - needed_bytes(checkpoint)[0]
    work.announce(
        "close other programs or add swap (a GPU does not help, since one net at a time is written), or take a smaller "
        f"--seq_length, {scores / 1e9:.1f} GB are for attention over {seq_length} tokens",
        "free some or choose another --out",
        log,
    )
    builder = NetBuilder(checkpoint, seq_length)
    traced: dict[str, tuple] = {}
    groups = net_groups(checkpoint.layers, rows)
    out.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = copy_vocabulary(checkpoint.path, out)
    except UserError as error:
        log(f"warning: {error} The nets are exported all the same; chatting will want --tokenizer.")
        tokenizer = None
    cost = None
    with contextlib.suppress(UserError):
        cost = artefacts.read_manifest(out).get("cost")  # stays where nothing is to do
    with work:
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
            work.done(group)
            cost = work.record()
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
            "cost": cost,
        },
    )
    return out


def needed_bytes(checkpoint: Checkpoint, seq_length: int = 0, rows: int = 1) -> tuple[int, int]:
    """Bytes of memory and of disk that an export of the whole model needs; without S, those of its weights."""
    weights = _weights(checkpoint, rows)
    copied = [_COPIES[FLOAT32_BYTES * count >= _MESSAGE] * FLOAT32_BYTES * count for count in weights.values()]
    memory = _BASE_MEMORY + max(copied)
    # Tracing runs the block once: the mask and the scores of all heads grow with the square of S.
    seen = max(seq_length * seq_length, rows * (seq_length + rows))
    return memory + _SCORE_COPIES * FLOAT32_BYTES * (checkpoint.heads + 1) * seen, FLOAT32_BYTES * sum(weights.values())


def _weights(checkpoint: Checkpoint, rows: int = 1) -> dict[str, int]:
    """{group of nets: how many weights it has}."""
    h, ends = checkpoint.hidden_size, checkpoint.vocab_size * checkpoint.hidden_size
    sizes = {"block": 4 * h * h + 3 * h * checkpoint.intermediate_size, "embedding": ends, "lm_head": ends}
    return {group: sizes.get(net_kind(group), 0) for group in net_groups(checkpoint.layers, rows)}


def expected(checkpoint: Checkpoint, out: Path, code: dict[str, str], settings: dict) -> Work:
    """What an export to `out` takes: of the groups that are not there, as far as can be said without reading them."""
    rows, length = settings["rows"], settings["seq_length"]
    weights, groups = _weights(checkpoint, rows), net_groups(checkpoint.layers, rows)
    to_do = [
        group for group in groups if not artefacts.up_to_date(out / f"{group}.onnx", code, settings, _CODE, read=False)
    ]
    seconds = {group: _WRITTEN * weights[group] for group in to_do}
    for kind, group in {net_kind(group): group for group in reversed(to_do)}.items():
        seconds[group] += len(groups[group]) * (_A_TRACE + _TRACED * weights[group])
        if kind == "block":
            seconds[group] += _START + _COMPUTED * length * (2 * weights[group] + 4 * length * checkpoint.hidden_size)
    # What was there from another export goes when its successor comes.
    disk = [FLOAT32_BYTES * weights[group] for group in to_do]
    replaced = sum(path.stat().st_size for group in to_do if (path := out / f"{group}.weights").is_file())
    memory, _ = needed_bytes(checkpoint, length, rows)
    return Work("The export", out, seconds, memory, max([0, sum(disk) - replaced, *disk]))
