"""A first-generation Qwen checkpoint on disk: its configuration and its weights, read tensor by tensor.

Nothing here builds a model. A 7B checkpoint has 15 GB of weights and each net of it needs only a few of them, so
tensors are read by name, from safetensors or PyTorch .bin files, single or sharded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.errors import UserError
from helpers.files import json_object

if TYPE_CHECKING:
    import torch

# Places where weights are looked for, in this order of preference; an index names the shards.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

# As torch and safetensors call them. Others hold numbers that are not the weights' own values: they are quantised, and
# the scales are elsewhere.
WEIGHT_DTYPES = ("bfloat16", "float16", "float32", "float64", "BF16", "F16", "F32", "F64")

# The August 2023 revisions of Qwen call four keys otherwise.
OLD_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was found to be one. Make it with `Checkpoint.open`.

    config is config.json as it stands; files maps each tensor's name to the file that holds it.
    intermediate_size is that of one branch of SwiGLU (w1 or w2): half of what config.json says.
    """

    path: Path
    config: dict
    files: dict[str, Path]
    layers: int
    hidden_size: int
    heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    eps: float
    rotary_base: float

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the configuration and the list of tensors; no weight is read.

        Raises UserError where the folder is not a whole first-generation Qwen checkpoint, with what is wrong, and
        where it has two whole sets of weights.
        """
        path = Path(folder)
        config = _read_config(path)

        def positive(key: str, default: float | None = None, kinds: tuple[type, ...] = (int,)):
            value = config.get(key, config.get(OLD_KEYS.get(key), default))
            if type(value) not in kinds or not 0 < value < math.inf:
                raise UserError(
                    f"{path / 'config.json'} says {key} = {value!r}, a positive {kinds[-1].__name__} was needed: "
                    "take config.json from the checkpoint's own repository again."
                )
            return value

        if (part := config.get("rotary_pct", 1.0)) != 1.0:
            raise UserError(
                f"{path / 'config.json'} says rotary_pct = {part!r}: these nets rotate whole heads (1.0), as Qwen does."
            )
        hidden, heads = positive("hidden_size"), positive("num_attention_heads")
        checkpoint = cls(
            path=path,
            config=config,
            files={},
            layers=positive("num_hidden_layers"),
            hidden_size=hidden,
            heads=heads,
            head_dim=positive("kv_channels", hidden // heads),
            intermediate_size=positive("intermediate_size") // 2,
            vocab_size=positive("vocab_size"),
            eps=positive("layer_norm_epsilon", 1e-6, (int, float)),
            rotary_base=positive("rotary_emb_base", 10000, (int, float)),
        )
        return replace(checkpoint, files=checkpoint._find_weights())

    @property
    def by_heart(self) -> dict | None:
        """Of a memoriser with its corpus: {"answers": how many it has learnt, "questions": some of them}; else None."""
        try:
            corpus = (self.path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
            some = json.loads((self.path / "demo_questions.json").read_text(encoding="utf-8"))
            # In a dialogue only the last question is new: the one before it stands alone, too.
            answers = sum(len(json.loads(line).get("questions", ["last"])) for line in corpus)
            return {"answers": answers, "questions": [entry["question"] for entry in some]}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def _find_weights(self) -> dict[str, Path]:
        """The file of each tensor, from the one whole set of weights that there is."""
        whole, faults = {}, []
        for file in (self.path / name for name in WEIGHT_FILES if (self.path / name).is_file()):
            try:
                files = weights_of(file)
                self._require_all(files)
                whole[file] = files
            except UserError as error:
                faults.append(error)
        if not whole:
            none = UserError(
                f"{self.path} has no weights: model.safetensors or pytorch_model.bin, or the index of their shards, "
                "was needed; download them (`git lfs pull`, or `python -m helpers fetch`)."
            )
            raise (faults or [none])[0]
        (first, files), *others = whole.items()
        for other in others:
            # Hubs offer the same weights in both formats: those are one set.
            if first.name.split(".")[1] == other[0].name.split(".")[1] or not self._same(files, other[1]):
                raise UserError(
                    f"{self.path} has two whole sets of weights, {first.name} and {other[0].name}, and only one can be "
                    "meant: move one of these two files to another folder, and what the other one says is taken."
                )
        return files

    def _require_all(self, names: Collection[str]) -> None:
        # A number of layers that is nonsense would have no end of names.
        last = f"transformer.h.{self.layers - 1}.ln_1.weight"
        missing = [last] if self.layers > len(names) else [name for name in self.shapes() if name not in names]
        if missing:
            raise UserError(
                f"The weights in {self.path} lack {_listed(missing)}, which a first-generation Qwen of {self.layers} "
                "layers has: download the checkpoint again, or take the config.json that belongs to these weights."
            )

    def _same(self, one: dict[str, Path], other: dict[str, Path]) -> bool:
        """Whether two sets have the same matrix where every way of fine-tuning changes it, or one cannot be read."""
        import torch

        name = f"transformer.h.{self.layers - 1}.attn.c_attn.weight"
        try:
            with opened(one[name]) as first, opened(other[name]) as second:
                return torch.equal(*(tensors.get_tensor(name).bfloat16() for tensors in (first, second)))
        except UserError:
            return True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the configuration asks for, by Qwen's own names, and its shape."""
        hidden, inner, projection = self.hidden_size, self.intermediate_size, self.heads * self.head_dim
        block = {
            "ln_1.weight": (hidden,),
            "attn.c_attn.weight": (3 * projection, hidden),
            "attn.c_attn.bias": (3 * projection,),
            "attn.c_proj.weight": (projection, hidden),
            "ln_2.weight": (hidden,),
            "mlp.w1.weight": (inner, hidden),
            "mlp.w2.weight": (inner, hidden),
            "mlp.c_proj.weight": (hidden, inner),
        }
        if not self.config.get("no_bias", True):
            matrices = {name: shape for name, shape in block.items() if name.startswith(("attn.c_proj.", "mlp."))}
            block |= {name.replace("weight", "bias"): shape[:1] for name, shape in matrices.items()}
        return {
            "transformer.wte.weight": (self.vocab_size, hidden),
            **{f"transformer.h.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()},
            "transformer.ln_f.weight": (hidden,),
            "lm_head.weight": (self.vocab_size, hidden),
        }

    def names(self) -> list[str]:
        """Names of all tensors in the weight files, sorted."""
        return sorted(self.files)

    def load(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names are `prefix` or lie under it ("transformer.h.1" is not "transformer.h.10").

        Returns full names and tensors in the dtype of the file; an empty prefix means all of them. Only these are
        read. Raises UserError where none is there, where a file is damaged or a shape is not the configuration's.
        """
        return dict(self.tensors(prefix))

    def tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """As `load`, one tensor at a time, so that no more than one need be in memory."""
        under = prefix.rstrip(".") + "."
        wanted = [name for name in self.names() if not prefix or name == prefix or name.startswith(under)]
        if not wanted:
            raise UserError(f"The weights in {self.path} have no tensor {prefix!r}: they have {_listed(self.names())}.")
        shapes = self.shapes()
        for file in dict.fromkeys(self.files[name] for name in wanted):
            with opened(file) as tensors:
                for name in (name for name in wanted if self.files[name] == file):
                    tensor = tensors.get_tensor(name)
                    self._require(name, str(tensor.dtype).removeprefix("torch."), tensor.shape, shapes)
                    yield name, tensor

    def check_files(self) -> None:
        """See that the weight files are whole and have what the configuration asks for, without reading a weight.

        Needs no torch. Of .bin files only the end is looked at, which a copy that was cut off lacks.
        Raises UserError with what is wrong.
        """
        shapes = self.shapes()
        for file in sorted(set(self.files.values())):
            if file.suffix != ".safetensors":
                if not zipfile.is_zipfile(file):
                    raise _damaged(file, "cut short, or not PyTorch's")
                continue
            with opened(file, "np") as tensors:
                for name in (name for name in self.names() if self.files[name] == file):
                    described = tensors.get_slice(name)
                    self._require(name, described.get_dtype(), described.get_shape(), shapes)

    def _require(self, name: str, dtype: str, shape: Sequence[int], shapes: dict[str, tuple[int, ...]]) -> None:
        if name in shapes and dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{self.files[name]} has {name} as {dtype}, not as one of {', '.join(WEIGHT_DTYPES[:4])}: take the "
                "checkpoint whose weights are not quantised, TPU-MLIR quantises them."
            )
        if name in shapes and tuple(shape) != shapes[name]:
            raise UserError(
                f"{self.files[name]} has {name} of shape {list(shape)}, but {self.path / 'config.json'} asks for "
                f"{list(shapes[name])}: the two are not of the same model; take both from one repository."
            )

    def digest(self, prefix: str) -> str:
        """SHA-256 over names, dtypes, shapes and raw bytes of the tensors under `prefix`, independent of the shards."""
        import torch

        each = {}
        for name, tensor in self.tensors(prefix):
            digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            each[name] = digest.hexdigest()
        return hashlib.sha256("".join(each[name] for name in sorted(each)).encode()).hexdigest()


def _read_config(path: Path) -> dict:
    file = path / "config.json"
    if not file.is_file():  # a pipe would be waited for
        raise UserError(
            f"{path} has no config.json, so it is not a checkpoint: give the folder that holds config.json, "
            "modeling_qwen.py and the weights; models/tiny is one."
        )
    config = json_object(file, file.read_bytes())
    if (kind := config.get("model_type")) != "qwen":
        raise UserError(
            f"{file} says model_type {kind!r}; first-generation Qwen ('qwen') was needed: take Qwen-1.8B-Chat, "
            "Qwen-7B-Chat, Qwen-14B-Chat or models/tiny. `python -m helpers fetch --source FOLDER` converts models of "
            "llama and qwen2 architecture; TPU-MLIR's own llm_convert.py takes many of the others."
        )
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{path} is quantised already (quantization_config in its config.json); unquantised weights were needed: "
            "take the checkpoint without -Int4 or -Int8 in its name, TPU-MLIR quantises it."
        )
    return config


def weights_of(file: Path) -> dict[str, Path]:
    """The file of each tensor, of the shards that an index names or of a single file."""
    if not file.name.endswith(".index.json"):
        with opened(file, "np") as tensors:
            return dict.fromkeys(tensors.keys(), file)
    shards = json_object(file, file.read_bytes()).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{file} is not a readable index (its weight_map names no files): download it again.")
    path = file.parent
    missing = sorted({shard for shard in shards.values() if not (path / shard).is_file()})
    if missing:
        raise UserError(
            f"{path} lacks {_listed(missing)} of the {len(set(shards.values()))} weight files that {file.name} names: "
            "download them (`git lfs pull`, or `python -m helpers fetch`)."
        )
    return {tensor: path / shard for tensor, shard in shards.items()}


class _Bin(dict):
    """The tensors of a .bin file by name, with safe_open's way to ask for one."""

    def __init__(self, file: Path):
        import torch

        held = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if isinstance(held, dict):
            # A parameter that was saved as one is a plain tensor here.
            super().__init__((k, tensor.detach()) for k, tensor in held.items() if isinstance(tensor, torch.Tensor))
        if not self:
            raise RuntimeError(f"it holds a {type(held).__name__}")

    def get_tensor(self, name: str) -> torch.Tensor:
        if name not in self:
            raise RuntimeError(f"it does not contain tensor {name}")
        return self[name]


@contextlib.contextmanager
def opened(file: Path, framework: str = "pt"):
    """An open weight file, which has keys() and get_tensor(name): safetensors' safe_open, or what a .bin file holds.

    framework: of safetensors, "np" needs no torch. safe_open compares the header with the file's size.
    Raises UserError, here or where a tensor is asked for, where the file is not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework=framework) as tensors:
                yield tensors
        else:
            yield _Bin(file)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: object) -> UserError:
    with open(file, "rb") as data:
        if data.read(40).startswith(b"version https://git-lfs"):
            return UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in {file.parent}.")
    lines = str(error).splitlines() or [type(error).__name__]
    # Of a pickle that torch will not load its first line says how to load it all the same.
    reason = next((line.strip() for line in lines if "Unsupported global" in line), lines[0])
    return UserError(
        f"{file} ({file.stat().st_size} bytes) is damaged or holds something else than tensors by name ({reason}): "
        "download it again, or write it again as safetensors or with torch.save(model.state_dict(), FILE)."
    )


def _listed(names: list[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
