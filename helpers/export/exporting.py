"""Write every net of a patched Qwen checkpoint as ONNX, one at a time, without ever holding the whole model.

A net is traced once per kind with weights that are never filled in (`export_params=False` leaves each weight as a
named input); then each layer's file is that graph with its own weights attached as external data, streamed from the
checkpoint tensor by tensor. So memory does not grow with the number of layers, nor with float32 copies of a layer.
`block_i` and `block_cache_i` are two graphs over one weight file; so are `embedding` and `embedding_cache`.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path

from helpers import artefacts, machine
from helpers.checkpoint.vocabulary import copy_vocabulary
from helpers.checkpoint.weights import Checkpoint
from helpers.errors import UserError
from helpers.files import sha256_file, write_json
from helpers.nets import CANDIDATES, INPUT_NAMES, OUTPUT_NAMES, net_groups, net_kind

# The operator set that the documented export uses, and TPU-MLIR's front end was made for.
OPSET = 15
# Candidates that survive top_p whatever their probability (documented penalty_sample_head).
MIN_TOKENS_TO_KEEP = 5
FLOAT32_BYTES = 4
# What of these helpers decides the content of a net; the code of the model is among its inputs.
_CODE = artefacts.code_of("export.exporting", "nets", "checkpoint.modeling", "checkpoint.weights")
_COPY_BYTES = 64 << 20
# torch, its exporter and one traced layer's activations; measured with benchmarks/export_memory.py.
_BASE_MEMORY = 1_000_000_000
# Of a block's attention scores, that are there at once while it is traced; measured for S from 2048 to 6000.
_SCORE_COPIES = 4


def rotary_tables(head_dim: int, base: float, seq_length: int):
    """Cosine and sine of the rotary embedding: two float32 tensors [S, d], as Qwen's RotaryEmbedding makes them."""
    import torch

    inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))
    freqs = torch.outer(torch.arange(seq_length).float(), inv_freq)
    table = torch.cat((freqs, freqs), dim=-1)
    return table.cos(), table.sin()


def _net_modules():
    """The modules that are exported. Defined in a function: importing this module must not import torch."""
    import torch
    from torch import nn

    class Embedding(nn.Module):
        """ids [1,T] -> states [1,T,H]"""

        def __init__(self, wte):
            super().__init__()
            self.wte = wte

        def forward(self, input_ids):
            return self.wte(input_ids).float()

    class Block(nn.Module):
        """states [1,S,H], positions [1,S], mask [1,1,S,S] -> states, key, value [1,S,h,d]

        With a past (key, value [1,S,h,d], mask [1,1,R,S+R]) the R new rows see it, and only
        their own key and value [1,R,h,d] come back.
        """

        def __init__(self, layer, cos, sin):
            super().__init__()
            self.layer = layer
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

        def forward(self, states, position_ids, attention_mask, past_k=None, past_v=None):
            rotary = [self.cos[position_ids].unsqueeze(2), self.sin[position_ids].unsqueeze(2)]
            states, (key, value) = self.layer(
                states,
                rotary_pos_emb_list=[rotary],
                layer_past=None if past_k is None else (past_k, past_v),
                attention_mask=attention_mask,
                use_cache=True,
            )
            return states.float(), key.float(), value.float()

    class LmHead(nn.Module):
        """states [R,H] -> logits [R,V]"""

        def __init__(self, ln_f, lm_head):
            super().__init__()
            self.ln_f, self.lm_head = ln_f, lm_head

        def forward(self, states):
            return self.lm_head(self.ln_f(states)).float()

    class LmHeadWithTopK(LmHead):
        """states [1,H] -> token [1,1]"""

        def forward(self, states):
            return torch.topk(super().forward(states), 1)[1]

    class GreedyHead(nn.Module):
        """logits [R,V] -> token [R,1]"""

        def forward(self, logits):
            return torch.topk(logits, 1)[1]

    class PenaltySampleHead(nn.Module):
        """logits [1,V], ids [1,S], top_p [1], temperature [1], penalty [1] -> probabilities [1,50], tokens [1,50]"""

        def __init__(self):
            super().__init__()
            weighed = torch.ones(1, CANDIDATES)
            weighed[0, :MIN_TOKENS_TO_KEEP] = 0
            self.register_buffer("weighed", weighed, persistent=False)

        def forward(self, logits, input_ids, top_p, temperature, penalty):
            seen = torch.gather(logits, 1, input_ids)
            seen = torch.where(seen < 0, seen * penalty, seen / penalty)
            logits = torch.scatter(logits, 1, input_ids, seen)
            logits, tokens = torch.topk(logits, CANDIDATES)
            logits = logits / temperature
            # 0 is under any top_p. A sum of truth values would say the same, but is no valid ONNX.
            inside = logits.softmax(dim=1).cumsum(dim=1) * self.weighed < top_p
            logits = torch.where(inside, logits, torch.tensor([-1000.0]))
            return logits.softmax(dim=1), tokens

    return Embedding, Block, LmHead, LmHeadWithTopK, GreedyHead, PenaltySampleHead


def _without_weights(make: Callable):
    """A float32 module whose weights were never filled in, so that their memory is never touched."""
    import torch
    from transformers.initialization import no_init_weights

    with no_init_weights():
        module = make()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            # The exporter stores equal weights once, and the others would be lost.
            parameter.view(-1)[0] = number
    return module


class NetBuilder:
    """Builds the modules of one checkpoint's nets, with or without weights, and their example inputs."""

    def __init__(self, checkpoint: Checkpoint, seq_length: int):
        from helpers.checkpoint import modeling

        self.checkpoint, self.seq_length = checkpoint, seq_length
        self.module = modeling.load_modeling(checkpoint.path)
        self.config = modeling.make_config(self.module, checkpoint)
        (self.embedding, self.block, self.lm_head, self.lm_head_with_topk, self.greedy, self.penalty) = _net_modules()

    def layer(self):
        """A QWenBlock in float32 whose weights hold whatever the memory held."""
        from helpers.checkpoint import modeling

        layer = _without_weights(lambda: modeling.make_block(self.module, self.config))
        # Within the trained length Qwen's log-n scaling is exactly 1; but a decode step's key is padded to S + 1
        # rows, which the code would take for a longer text. Patch 06 takes it out of config.json, where it is in it.
        layer.attn.use_logn_attn = False
        return layer.eval()

    def block_net(self, layer=None):
        """The exported block around a QWenBlock (default: one without weights)."""
        config = self.checkpoint
        tables = rotary_tables(config.head_dim, config.rotary_base, self.seq_length)
        return self.block(layer or self.layer(), *tables).eval()

    def head_net(self, kind):
        ln_f = _without_weights(lambda: self.module.RMSNorm(self.checkpoint.hidden_size, eps=self.checkpoint.eps))
        return kind(ln_f, self._linear()).eval()

    def _linear(self):
        from torch import nn

        return _without_weights(lambda: nn.Linear(self.checkpoint.hidden_size, self.checkpoint.vocab_size, bias=False))

    def embedding_net(self):
        from torch import nn

        wte = _without_weights(lambda: nn.Embedding(self.checkpoint.vocab_size, self.checkpoint.hidden_size))
        return self.embedding(wte).eval()

    def example(self, net: str, rows: int = 1) -> tuple:
        """Inputs to trace a net with: zeros of the shapes of the net's contract (`rows` new tokens for *_cache)."""
        import torch

        c, s = self.checkpoint, self.seq_length
        past = (1, s, c.heads, c.head_dim)
        return {
            "embedding": lambda: (torch.zeros(1, s, dtype=torch.int32),),
            "embedding_cache": lambda: (torch.zeros(1, rows, dtype=torch.int32),),
            "block": lambda: (
                torch.zeros(1, s, c.hidden_size),
                torch.zeros(1, s, dtype=torch.int32),
                torch.zeros(1, 1, s, s),
            ),
            "block_cache": lambda: (
                torch.zeros(1, rows, c.hidden_size),
                torch.zeros(1, rows, dtype=torch.int32),
                torch.zeros(1, 1, rows, s + rows),
                torch.zeros(past),
                torch.zeros(past),
            ),
            "lm_head": lambda: (torch.zeros(rows, c.hidden_size),),
            "lm_head_with_topk": lambda: (torch.zeros(rows, c.hidden_size),),
            "greedy_head": lambda: (torch.zeros(rows, c.vocab_size),),
            "penalty_sample_head": lambda: (
                torch.zeros(1, c.vocab_size),
                torch.zeros(1, s, dtype=torch.int64),
                torch.ones(1),
                torch.ones(1),
                torch.ones(1),
            ),
        }[net]()


def trace(module, net: str, example: tuple):
    """Trace a module to an onnx.ModelProto whose weights are named inputs without data.

    Shape arithmetic is folded by onnxsim, which sees a graph of some kilobytes: the weights are not in it.
    """
    import warnings

    import onnx
    import onnxsim
    import torch

    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns of shape comparisons in Qwen's code that are constant for a fixed S, and of its own age.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            file,
            export_params=False,
            do_constant_folding=False,
            input_names=INPUT_NAMES[net],
            output_names=OUTPUT_NAMES[net],
            opset_version=OPSET,
            dynamo=False,
        )
    graph, checked = onnxsim.simplify(onnx.load_from_string(file.getvalue()))
    if not checked:
        raise ValueError(f"onnxsim changed what {net} computes")
    return graph


def keep_attention_unfused(graph) -> None:
    """Write the additive mask as the first operand of its Add, in place: the compiler then sees no attention to fuse.

    Its fused attention works in blocks as long as the rows are many. For 10 rows that is 8 by 8, and the block costs
    102,680 cycles at the embedded size, 18,718 unfused; 2.94 and 2.43 ms at Qwen-7B's size (int4, S = 512).
    Raises ValueError where the graph has no softmax over a masked sum.
    """
    made_by = {output: node for node in graph.graph.node for output in node.output}
    inputs = {value.name for value in graph.graph.input}
    for softmax in (node for node in graph.graph.node if node.op_type == "Softmax"):
        add = made_by.get(softmax.input[0])
        if add is not None and add.op_type == "Add" and add.input[1] in inputs:
            add.input[:] = [add.input[1], add.input[0]]
            return
    raise ValueError("the block has no softmax over scores to which a mask is added")


class WeightFile:
    """A file of float32 tensors at page-aligned offsets, and their places in it."""

    def __init__(self, path: Path):
        self.path = path
        self.places: dict[str, tuple[int, int]] = {}

    def write(self, tensors: dict) -> None:
        """Append tensors (any float dtype, widened to float32 in pieces of 64 MB)."""
        with open(self.path, "wb") as file:
            for name, tensor in tensors.items():
                file.write(b"\0" * (-file.tell() % 4096))
                offset = file.tell()
                flat = tensor.reshape(-1)
                step = _COPY_BYTES // FLOAT32_BYTES
                for start in range(0, flat.numel(), step):
                    file.write(flat[start : start + step].float().numpy().tobytes())
                self.places[name] = (offset, file.tell() - offset)


def attach_weights(graph, module, weights: WeightFile | None):
    """A copy of a traced graph with its weights, from a weight file by reference; buffers are constants in it already.

    Raises ValueError where the graph leaves out a weight of the module.
    """
    import onnx
    from onnx import TensorProto

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    parameters = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if lost := sorted(parameters.keys() - {value.name for value in model.graph.input}):
        raise ValueError(f"the exporter dropped weights: {', '.join(lost)}")
    kept = []
    for value in model.graph.input:
        if value.name in parameters:
            offset, length = weights.places[value.name]
            tensor = TensorProto(name=value.name, data_type=TensorProto.FLOAT, dims=parameters[value.name])
            tensor.data_location = TensorProto.EXTERNAL
            for key, entry in (("location", weights.path.name), ("offset", str(offset)), ("length", str(length))):
                tensor.external_data.add(key=key, value=entry)
            model.graph.initializer.append(tensor)
        else:
            kept.append(value)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def checkpoint_prefixes(group: str) -> dict[str, str]:
    """Where a group's weights are in the checkpoint: prefix there to prefix in the exported module."""
    if group.startswith("block_"):
        return {f"transformer.h.{group.removeprefix('block_')}.": "layer."}
    return {
        "embedding": {"transformer.wte.": "wte."},
        "lm_head": {"transformer.ln_f.": "ln_f.", "lm_head.": "lm_head."},
    }.get(group, {})


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
    """One line saying what the export will need. Raises UserError, with the remedy, where that is not there."""
    memory, disk = needed_bytes(checkpoint, seq_length, rows)
    free_memory, free_disk = machine.free_memory(), machine.free_disk(out)
    giga = 1e9
    if free_memory < memory:
        scores = memory - needed_bytes(checkpoint)[0]
        raise UserError(
            f"The export needs {memory / giga:.1f} GB of memory, {free_memory / giga:.1f} GB are free: "
            + (
                f"take a smaller --seq_length, {scores / giga:.1f} GB are for attention over {seq_length} tokens."
                if scores > memory / 2
                else "close other programs or add swap; a GPU does not help, since one net at a time is written."
            )
        )
    done = sum(p.stat().st_size for p in out.glob("*.weights")) if out.is_dir() else 0
    if free_disk + done < disk:
        raise UserError(
            f"The export needs {disk / giga:.3f} GB of disk, {free_disk / giga:.3f} GB are free on the disk that holds "
            f"{out}: free some or choose another --out."
        )
    minutes = max(1, round(disk / 150e6 / 60))
    return (
        f"{checkpoint.layers} layers: needs {memory / giga:.1f} GB of memory ({free_memory / giga:.1f} free), "
        f"{disk / giga:.2f} GB of disk ({free_disk / giga:.1f} free), about {minutes} min"
    )


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
    from tqdm.auto import tqdm

    from helpers.patching import patching

    out = Path(out)
    checkpoint = Checkpoint.open(model_path)
    if not isinstance(seq_length, int) or seq_length < 1:
        raise UserError(f"seq_length is {seq_length}, it must be a whole number from 1 on (the documented one is 512).")
    if rows < 1:
        raise UserError(f"rows is {rows}, it must be 1, or 10 for lookahead decoding with its documented sizes.")
    patching.require_patched(checkpoint.path)
    trained = patching.trained_seq_length(checkpoint.path)
    if seq_length > trained:
        log(
            f"warning: seq_length {seq_length} is more than the {trained} this model was trained for; beyond that "
            "Qwen scales its rotary embedding, which these nets do not: expect worse answers there."
        )
    log(check_room(checkpoint, out, seq_length, rows))
    code = {
        name: sha256_file(checkpoint.path / name)
        for name in ("config.json", "modeling_qwen.py", "configuration_qwen.py")
        if (checkpoint.path / name).exists()
    }
    settings = {"seq_length": seq_length, "opset": OPSET, "rows": rows, "candidates": CANDIDATES}
    builder = NetBuilder(checkpoint, seq_length)
    traced: dict[str, tuple] = {}
    groups = net_groups(checkpoint.layers, rows)
    out.mkdir(parents=True, exist_ok=True)
    for group, nets in tqdm(groups.items(), desc="export", unit="net group"):
        prefixes = checkpoint_prefixes(group)
        inputs = code | {prefix: checkpoint.digest(prefix) for prefix in prefixes}
        artefact = out / f"{group}.onnx"
        if artefacts.up_to_date(artefact, inputs, settings, _CODE):
            continue
        with artefacts.building(artefact, kind="onnx", inputs=inputs, settings=settings, code=_CODE) as partial:
            weights = WeightFile(partial.with_name(f"{group}.weights"))
            if prefixes:
                weights.write(_renamed(checkpoint, prefixes))
            for net in nets:
                kind = net_kind(net)
                if kind not in traced:
                    module = net_module(builder, kind)
                    graph = trace(module, kind, builder.example(kind, rows))
                    if kind == "block_cache" and rows > 1:
                        keep_attention_unfused(graph)
                    traced[kind] = (graph, module)
                _save(attach_weights(*traced[kind], weights), partial.with_name(f"{net}.onnx"))
    _write_folder_manifest(out, checkpoint, code, settings, trained)
    return out


def net_module(builder: NetBuilder, net: str):
    """The module that is exported as a net, its weights not filled in."""
    kind = net_kind(net)
    if kind.startswith("embedding"):
        return builder.embedding_net()
    if kind.startswith("block"):
        return builder.block_net()
    return {
        "lm_head": lambda: builder.head_net(builder.lm_head),
        "lm_head_with_topk": lambda: builder.head_net(builder.lm_head_with_topk),
        "greedy_head": lambda: builder.greedy().eval(),
        "penalty_sample_head": lambda: builder.penalty().eval(),
    }[kind]()


def load_weights(module, checkpoint: Checkpoint, prefixes: dict[str, str]) -> None:
    """Fill a net's module from the checkpoint. Raises RuntimeError where a parameter is not in it.

    Buffers are computed by the code; files of old revisions hold some of them too.
    """
    import torch

    tensors = {name: tensor.float() for name, tensor in _renamed(checkpoint, prefixes).items()}
    with torch.no_grad():
        missing, _ = module.load_state_dict(tensors, strict=False)
    if lost := sorted(set(missing) & {name for name, _ in module.named_parameters()}):
        raise RuntimeError(f"the checkpoint has no {', '.join(lost)}")


def _renamed(checkpoint: Checkpoint, prefixes: dict[str, str]) -> dict:
    return {
        ours + name.removeprefix(theirs): tensor
        for theirs, ours in prefixes.items()
        for name, tensor in checkpoint.load(theirs).items()
    }


def _save(model, path: Path) -> None:
    with open(path, "wb") as file:
        file.write(model.SerializeToString())
        file.flush()
        os.fsync(file.fileno())


def _write_folder_manifest(out: Path, checkpoint: Checkpoint, code: dict, settings: dict, trained: int) -> None:
    groups = net_groups(checkpoint.layers, settings["rows"])
    manifests = {group: artefacts.read_manifest(out / f"{group}.onnx") for group in groups}
    write_json(
        out / artefacts.MANIFEST,
        {
            "kind": "onnx",
            "inputs": code,
            "settings": settings,
            "code": _CODE,
            "versions": machine.tool_versions(),
            "machine": next(iter(manifests.values()))["machine"],
            "seconds": round(sum(m["seconds"] for m in manifests.values()), 3),
            "outputs": {name: entry for m in manifests.values() for name, entry in m["outputs"].items()},
            "nets": {net: group for group, nets in groups.items() for net in nets},
            "seq_length": settings["seq_length"],
            "trained_seq_length": trained,
            "config": checkpoint.config,
            "tokenizer": _vocabulary_beside(out, checkpoint),
        },
    )


def _vocabulary_beside(out: Path, checkpoint: Checkpoint) -> str | None:
    try:
        return copy_vocabulary(checkpoint.path, out)
    except UserError as error:
        machine.log(f"warning: {error} The nets are exported all the same; chatting will want --tokenizer.")
        return None


def add_arguments(parser) -> None:
    parser.add_argument("--model_path", "-m", required=True, help="folder of a patched checkpoint")
    parser.add_argument("--seq_length", "-s", type=int, default=512, help="compiled sequence length S (default 512)")
    parser.add_argument("--out", required=True, help="folder for the ONNX nets")
    parser.add_argument("--rows", type=int, default=1, help="rows of a decode step (default 1; 10 for lookahead)")


def run(args) -> int:
    folder = export(args.model_path, args.out, args.seq_length, rows=args.rows)
    print(folder)
    return 0
