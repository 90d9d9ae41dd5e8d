"""A model of llama or qwen2 architecture in first-generation Qwen's layout: renamed and reshaped, nothing approximated.

The code that goes with the weights is the embedded model's, so whatever is done to Qwen can be done to the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from helpers import artefacts, machine
from helpers.checkpoint.vocabulary import VOCABULARY, described
from helpers.checkpoint.weights import Checkpoint
from helpers.convert.architecture import Architecture, understand
from helpers.convert.sources import Source, read_json
from helpers.convert.tokenizing import vocabulary_of
from helpers.errors import UserError
from helpers.files import write_json

if TYPE_CHECKING:
    import torch

# Ours, and where it is in a GGUF, and on Hugging Face; several are put one below the other.
WHOLE = {
    "transformer.wte": ("token_embd", "model.embed_tokens"),
    "transformer.ln_f": ("output_norm", "model.norm"),
    "lm_head": ("output", "lm_head"),
}
LAYER = {
    "ln_1": ("attn_norm", "input_layernorm"),
    "attn.c_attn": ("attn_q attn_k attn_v", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    "attn.c_proj": ("attn_output", "self_attn.o_proj"),
    "ln_2": ("ffn_norm", "post_attention_layernorm"),
    "mlp.w1": ("ffn_up", "mlp.up_proj"),
    "mlp.w2": ("ffn_gate", "mlp.gate_proj"),
    "mlp.c_proj": ("ffn_down", "mlp.down_proj"),
}
LAYERS = "blk", "model.layers"


def theirs(name: str, source: Source, sizes: Architecture) -> list[str]:
    """Names of the tensors that one of ours is made of."""
    if name == "lm_head.weight" and sizes.tied:
        name = "transformer.wte.weight"
    *module, kind = name.split(".")
    if module[:2] != ["transformer", "h"]:
        return [f"{WHOLE['.'.join(module)][source.column]}.{kind}"]
    within = LAYER[".".join(module[3:])][source.column].split()
    return [f"{LAYERS[source.column]}.{module[2]}.{part}.{kind}" for part in within]


def assemble(name: str, source: Source, sizes: Architecture) -> torch.Tensor:
    """One of our tensors: theirs, with every key and value head repeated for each query head that shares it."""
    import torch

    parts = [source.read(part) for part in theirs(name, source, sizes) if part in source.tensors]
    if ".c_attn." not in name:
        return parts[0]
    if not parts:  # a bias that the model lacks
        return torch.zeros(3 * sizes.hidden_size)
    query, key, value = parts
    if not source.column and source.kind == "llama":
        query, key = halves(query, sizes.heads), halves(key, sizes.kv_heads)
    return torch.cat((query, repeated(key, sizes), repeated(value, sizes)))


def repeated(rows: torch.Tensor, sizes: Architecture) -> torch.Tensor:
    """Rows of the heads for keys or values, each head once for every query head that shares it."""
    return rows.unflatten(0, (sizes.kv_heads, -1)).repeat_interleave(sizes.heads // sizes.kv_heads, 0).flatten(0, 1)


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a GGUF of llama, which stores the two of a rotated pair side by side, with all first ones first.

    0 1 2 3 4 5 of a head become 0 2 4 1 3 5.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def configuration(sizes: Architecture) -> dict:
    """config.json of a first-generation Qwen of these sizes; what no size decides is as in the embedded model's."""
    return read_json(_MODEL / "config.json") | {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": 2 * sizes.inner,
        "kv_channels": sizes.hidden_size // sizes.heads,
        "layer_norm_epsilon": sizes.eps,
        "max_position_embeddings": min(sizes.context, _MOST_POSITIONS),
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "rotary_emb_base": sizes.rotary_base,
        "seq_length": sizes.context,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "vocab_size": sizes.vocab_size,
    }


# The rest writes it.

_MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny"
_CODE_FILES = "modeling_qwen.py", "configuration_qwen.py"
# The code keeps a mask of so many tokens squared, which is not exported.
_MOST_POSITIONS = 8192
CODE = artefacts.code_of("convert.architecture", "convert.converting", "convert.sources", "convert.tokenizing")
_SHARD_BYTES = 4_000_000_000
# Python with torch; and how many times the largest tensor is there while it is read and put together.
_BASE_MEMORY, _COPIES = 800_000_000, 3


class Conversion:
    """A model that was understood and can be written. Raises UserError where it cannot, before anything is written."""

    def __init__(self, source: Source):
        self.source, self.sizes = source, understand(source)
        sizes, self.config = self.sizes, configuration(self.sizes)
        if sizes.layers > len(source.tensors):  # nonsense would have no end of names
            raise UserError(
                f"{source.place} has {len(source.tensors)} tensors for {sizes.layers} layers: it is damaged."
            )
        self.shapes = Checkpoint(
            *(source.place, self.config, {}, sizes.layers, sizes.hidden_size, sizes.heads, self.config["kv_channels"]),
            *(sizes.inner, sizes.vocab_size, sizes.eps, sizes.rotary_base),
        ).shapes()
        self.dtypes = {name: self._dtype(name, shape) for name, shape in self.shapes.items()}
        self._require_all_used()
        self.vocabulary = vocabulary_of(source, sizes.vocab_size)

    @property
    def bytes(self) -> int:
        """Bytes of all weights as they will be written."""
        return sum(self._bytes(name) for name in self.shapes)

    def _bytes(self, name: str) -> int:
        size = self.dtypes[name].itemsize
        for length in self.shapes[name]:
            size *= length
        return size

    def _dtype(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        """The dtype of one of our tensors. Raises UserError where what it is made of is absent or has other shapes."""
        import torch

        parts = theirs(name, self.source, self.sizes)
        found = [self.source.tensors[part] for part in parts if part in self.source.tensors]
        if not found and name.endswith(".bias"):
            return torch.float32
        rows = [shape[0]]
        if len(parts) == 3:
            rows = [shape[0] // 3] + 2 * [shape[0] // 3 * self.sizes.kv_heads // self.sizes.heads]
        for part, length in zip(parts, rows, strict=True):
            dtype, has = self.source.tensors.get(part, (None, None))
            if has != (wanted := (length, *shape[1:])):
                raise UserError(
                    f"{self.source.place} has {part} {f'of shape {list(has)}' if has else 'not at all'}, but its sizes "
                    f"ask for {list(wanted)}: it is cut off or put together of two models; download it again."
                )
        dtypes = {dtype for dtype, _ in found}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _require_all_used(self) -> None:
        used = {part for name in self.shapes for part in theirs(name, self.source, self.sizes)}
        for name in sorted(self.source.tensors.keys() - used):
            if self.sizes.tied and name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                continue  # what old files hold and nothing reads
            raise UserError(
                f"{self.source.place} has a tensor {name}, for which first-generation Qwen has no place: the model "
                "cannot become one exactly; take one of llama or qwen2 architecture without."
            )

    def cannot_chat(self, folder: Path) -> str | None:
        """Why a model cannot be chatted with; None where it can."""
        description = described(self.vocabulary, folder / VOCABULARY)
        return description.get("refused") or description.get("not_chatml")

    def __str__(self) -> str:
        s = self.sizes
        return (
            f"{s.layers} layers, hidden size {s.hidden_size}, {s.heads} heads, {s.kv_heads} for keys, "
            f"{s.vocab_size} tokens: {self.bytes / 1e9:.2f} GB to write"
        )

    def check_memory(self) -> None:
        """Raise UserError where there is too little to convert the largest tensor."""
        needed = _BASE_MEMORY + _COPIES * max(4 * self._bytes(n) // self.dtypes[n].itemsize for n in self.shapes)
        if (free := machine.free_memory()) < needed:
            raise UserError(
                f"The conversion needs {needed / 1e9:.1f} GB of memory for the largest tensor, {free / 1e9:.1f} GB are "
                "free: close other programs or add swap."
            )

    def write(self, folder: Path) -> None:
        """Write the whole checkpoint into a new folder, one tensor in memory at a time."""
        folder.mkdir()
        for name in _CODE_FILES:
            shutil.copy(_MODEL / name, folder)
        write_json(folder / "config.json", self.config)
        (folder / VOCABULARY).write_bytes(self.vocabulary)
        shards: list[list[str]] = [[]]
        for name in self.shapes:
            if sum(map(self._bytes, shards[-1])) + self._bytes(name) > _SHARD_BYTES and shards[-1]:
                shards.append([])
            shards[-1].append(name)
        files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
        with tqdm(total=len(self.shapes), desc="convert", unit="tensor") as bar:
            for file, names in files.items():
                with open(folder / file, "wb") as out:
                    for piece in self._safetensors(names):
                        out.write(piece)
                        bar.update(isinstance(piece, memoryview))
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)

    def _safetensors(self, names: list[str]) -> Iterator[bytes | memoryview]:
        """The pieces of a safetensors file: the length of its header, the header, each tensor."""
        import torch

        codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            begin, end = end, end + self._bytes(name)
            header[name] = {"dtype": codes[self.dtypes[name]], "shape": self.shapes[name], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            tensor = assemble(name, self.source, self.sizes).to(self.dtypes[name]).contiguous()
            yield memoryview(tensor.view(-1).view(torch.uint8).numpy())
