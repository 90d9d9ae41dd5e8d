"""Where a model to convert is: a GGUF file, or a folder as Hugging Face has it. Weights are read when asked for.

Both have the same few members, so that what converts need not know which it has:
file, place: what says the sizes, and what has the tensors, for errors. column: of the tables in architecture and
converting, 0 for a GGUF, 1 for Hugging Face.
kind: "llama" or "qwen2". tensors: (dtype, shape) by name; the dtype is the narrowest that holds every value exactly.
get(key): what the file says; None where it says nothing. read(name): one tensor. fields, of a GGUF: its keys.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from helpers.checkpoint.weights import WEIGHT_FILES, opened, weights_of
from helpers.errors import UserError
from helpers.files import json_object

if TYPE_CHECKING:
    import torch

KINDS = ("llama", "qwen2")
_WANTED = "llama or qwen2 was needed, special cases of first-generation Qwen: take another model"


class _Reader(gguf.GGUFReader):
    """gguf's own, which would read on after the end of a file: a damaged length costs it hours."""

    # Of a vocabulary of 150,000 tokens it takes 0.8 million readings.
    _left = 8_000_000

    def _get(self, offset, dtype, count=1, override_order=None):
        self._left -= 1
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data) or self._left < 0:
            raise ValueError("it says that it is longer")
        return super()._get(offset, dtype, count, override_order)


class Gguf:
    """A GGUF file, its tensors dequantised one by one.

    Raises UserError where it is none, is not whole, is one of several parts, or has a type gguf cannot dequantise.
    """

    column = 0

    def __init__(self, file: str | Path):
        self.file = self.place = Path(file)
        if not self.file.is_file():
            raise UserError(f"{file} is not a file: give a GGUF with --gguf.")
        with open(self.file, "rb") as start:
            if (magic := start.read(4)) != b"GGUF":
                what = f"begins with {magic!r}" if magic else "is empty"
                raise UserError(f"{file} is no GGUF file, it {what}: download the model again.")
        try:
            reader = _Reader(self.file)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise self._damaged(error) from None
        self.fields, self._tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}
        self.kind = self.get("general.architecture")
        if self.kind not in KINDS:
            raise UserError(f"{file} says general.architecture = {self.kind!r}; {_WANTED}.")
        if (parts := self.get("split.count") or 1) != 1:
            raise UserError(f"{file} is one of {parts} parts (split.count): join them, `llama-gguf-split --merge`.")
        self.tensors = {name: self._described(tensor) for name, tensor in self._tensors.items()}

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.file} ({self.file.stat().st_size} bytes) is cut off or damaged, or newer than this reader "
            f"({error}): download it again."
        )

    def _described(self, tensor: gguf.ReaderTensor) -> tuple[torch.dtype, tuple[int, ...]]:
        import torch

        kind = tensor.tensor_type
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise UserError(
                f"{self.file} has {tensor.name} as {kind.name}, which the package gguf cannot dequantise: take the "
                "model in another quantisation, Q8_0 for instance."
            ) from None
        narrow = {"F16": torch.float16, "BF16": torch.bfloat16}
        return narrow.get(kind.name, torch.float32), tuple(int(size) for size in reversed(tensor.shape))

    def get(self, key: str) -> object:
        try:
            value = self.fields[key].contents() if key in self.fields else None
        except UnicodeDecodeError as error:
            raise self._damaged(error) from None
        # 1e-05 was meant by the float32 that reads 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def read(self, name: str) -> torch.Tensor:
        import torch

        tensor, (dtype, shape) = self._tensors[name], self.tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values if values.flags.writeable else values.copy()).view(shape).to(dtype)


class Folder:
    """A folder with a config.json of Hugging Face's and safetensors, which may come later than it.

    Raises UserError where it is not whole.
    """

    column = 1

    def __init__(self, folder: str | Path):
        self.place, self.file = Path(folder), Path(folder) / "config.json"
        self._values = read_json(self.file)
        self.kind = self.get("model_type")
        if self.kind not in KINDS:
            raise UserError(f"{self.file} says model_type = {self.kind!r}; {_WANTED}.")

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        names = (name for name in WEIGHT_FILES if "safetensors" in name)
        if (weights := next((self.place / n for n in names if (self.place / n).is_file()), None)) is None:
            raise UserError(f"{self.place} has no safetensors ({' or '.join(WEIGHT_FILES[:2])}): download them.")
        return weights_of(weights)

    @functools.cached_property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        found = {}
        for file in sorted(set(self._files.values())):
            with opened(file, "np") as held:
                for name in (name for name, place in self._files.items() if place == file):
                    described = held.get_slice(name)
                    found[name] = self._dtype(name, described.get_dtype()), tuple(described.get_shape())
        return found

    def _dtype(self, name: str, dtype: str) -> torch.dtype:
        import torch

        dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        if dtype not in dtypes:
            raise UserError(
                f"{self._files[name]} has {name} as {dtype}, not as one of {', '.join(dtypes)}: take the weights that "
                "are not quantised."
            )
        return dtypes[dtype]

    def get(self, key: str) -> object:
        return self._values.get(key)

    def read(self, name: str) -> torch.Tensor:
        with opened(self._files[name]) as tensors:
            return tensors.get_tensor(name)


Source = Gguf | Folder


def read_json(file: Path) -> dict:
    """An object out of a JSON file; {} where there is no such file. Raises UserError where it holds something else."""
    return json_object(file, file.read_bytes()) if file.is_file() else {}
