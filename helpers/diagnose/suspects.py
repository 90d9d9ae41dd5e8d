"""The usual causes, tried: a block is computed in PyTorch as each of them would have it.

Many faults look alike from outside: a low cosine in one layer. What a net gave is therefore compared with what it would
give if the mask had the other sign, if query and key had changed places, and so on. The one that explains it has
its name.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from helpers.calibrate.rounding import rounded
from helpers.checkpoint.weights import Checkpoint
from helpers.diagnose.bands import LIMITS, figures
from helpers.diagnose.walk import PREFILL, Text, outputs_of
from helpers.export.modules import NetBuilder, load_weights, read_weights, rotary_tables

# Bases that models of this family and its neighbours have.
ROTARY_BASES = (1e3, 5e3, 1e4, 2.5e4, 5e4, 1e5, 5e5, 1e6, 5e6, 1e7)
GROUPS = (16, 32, 64, 128, 256)
# A cause is named where it leaves at most this share of the error, or no more than rounding and not a third of it.
EXPLAINED = 0.05
FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True)
class Cause:
    """name: for programs. tensor: where it sits, if that is known. sentence: what it is and where it comes from."""

    name: str
    sentence: str
    tensor: str = ""


@dataclass(frozen=True)
class _Suspect:
    cause: Cause
    changed: dict[str, torch.Tensor]
    inputs: list[np.ndarray]


class Suspects:
    """Names the cause of a block's error. checkpoint: patched, as it ought to be."""

    def __init__(self, checkpoint: Checkpoint, text: Text, seq_length: int):
        self.checkpoint, self.text, self.seq_length = checkpoint, text, seq_length
        self._builder = NetBuilder(checkpoint, seq_length)

    def cause(self, phase: str, net: str, inputs: list, found: list, expected: list, mode: str) -> Cause | None:
        """What explains the outputs of a block best, if anything does."""
        module = self._builder.module(net.replace("_cache", ""))
        load_weights(module, self.checkpoint, net)
        if not all(np.isfinite(array).all() for _, array in outputs_of(net, self.text, phase, found)):
            return self._overflow(module, inputs)

        def best(suspects: Iterable[_Suspect]) -> tuple[float, Cause | None]:
            scored = ((self._distance(phase, net, found, _run(module, s.changed, s.inputs)), s.cause) for s in suspects)
            return min(scored, key=lambda pair: pair[0], default=(np.inf, None))

        unexplained = self._distance(phase, net, found, expected)

        def explains(left: float) -> bool:
            return left <= max(EXPLAINED * unexplained, LIMITS[mode]) and 3 * left < unexplained

        # One at a time: another layer's weights may be a gigabyte.
        rounded = self._groups(module, inputs) if mode.startswith("int") else ()
        left, cause = best(itertools.chain(self._all(net, module, inputs), (suspect for *_, suspect in rounded)))
        if explains(left):
            return cause
        place = self._place(phase, net, module, found, expected)
        if place is None:
            return None
        name, row = place
        left, cause = best(_zeroed(module, inputs, name, row))
        if explains(left):
            return cause
        return Cause("weight", f"row {row} of {name} is damaged: a bit has flipped, or a file was cut", name)

    def other_groups(self, net: str, inputs: list, found: list, group: int, bits: int) -> Cause | None:
        """Where weights rounded in other groups, or to other bits, explain a prefill block at least twice as well."""
        module = self._builder.module(net)
        load_weights(module, self.checkpoint, net)
        left = {
            (size, b): (self._distance(PREFILL, net, found, _run(module, suspect.changed, inputs)), suspect.cause)
            for size, b, suspect in self._groups(module, inputs)
        }
        error, cause = min(left.values(), key=lambda pair: pair[0], default=(0, None))
        return cause if (group, bits) in left and 2 * error < left[group, bits][0] else None

    def _distance(self, phase: str, net: str, found: list, outputs: list) -> float:
        pairs = zip(*(outputs_of(net, self.text, phase, arrays) for arrays in (found, outputs)), strict=True)
        return float(np.mean([figures(f, o).nmse for (_, f), (_, o) in pairs]))

    def _all(self, net: str, module: nn.Module, inputs: list) -> Iterator[_Suspect]:
        weights = dict(module.named_parameters())
        states, positions, mask, *past = inputs

        def suspect(name, sentence, changed=None, tensor="", positions=positions, mask=mask):
            return _Suspect(Cause(name, sentence, tensor), changed or {}, [states, positions, mask, *past])

        yield suspect("mask_sign", "the mask has the other sign: it is subtracted, or 1 stands for hidden", mask=-mask)
        for step in (1, -1):
            seen = "one place too many" if step == 1 else "one place too few"
            yield suspect("mask_shift", f"the mask is off by one: a row sees {seen}", mask=np.roll(mask, step, axis=-1))
            moved = np.clip(positions + step, 0, self.seq_length - 1).astype(np.int32)
            yield suspect("position_shift", f"positions are off by {step:+d}: they count from 0", positions=moved)
        own = self.checkpoint.rotary_base
        for base in (base for base in ROTARY_BASES if base != own):
            cos, sin = rotary_tables(self.checkpoint.head_dim, base, self.seq_length)
            sentence = f"rotary base {base:g} in place of {own:g}: rotary_emb_base of another config.json was exported"
            yield suspect("rotary_base", sentence, {"cos": cos, "sin": sin}, "cos, sin")
        attention = {name: weights[f"layer.attn.c_attn.{name}"].chunk(3) for name in ("weight", "bias")}

        def joined(**parts):
            return {f"layer.attn.c_attn.{name}": torch.cat(three) for name, three in parts.items()}

        swapped = {name: (k, q, v) for name, (q, k, v) in attention.items()}
        sentence = "query and key have changed places in c_attn: a converter joined them in another order"
        yield suspect("query_key_swapped", sentence, joined(**swapped), "attn.c_attn")
        heads = {name: (q, k, v.roll(len(v) // 2, 0)) for name, (q, k, v) in attention.items()}
        sentence = "the values are those of another device's heads: the halves have changed places"
        yield suspect("other_heads", sentence, joined(**heads), "attn.c_attn")
        w1, w2 = (weights[f"layer.mlp.{name}.weight"] for name in ("w1", "w2"))
        sentence = "w1 and w2 have changed places: in Qwen w2 is the gate (llama's gate_proj), w1 is up_proj"
        yield suspect(
            "w1_w2_swapped", sentence, {"layer.mlp.w1.weight": w2, "layer.mlp.w2.weight": w1}, "mlp.w1, mlp.w2"
        )
        sentence = "{} is transposed: of a square matrix no shape tells"
        for name in (name for name, w in weights.items() if w.ndim == 2 and w.shape[0] == w.shape[1]):
            short = name.removeprefix("layer.").removesuffix(".weight")
            yield suspect("transposed", sentence.format(short), {name: weights[name].T.contiguous()}, short)
        parts = attention["weight"]
        for n, part in enumerate(("query", "key", "value")):
            if parts[n].shape[0] == parts[n].shape[1]:
                three = [p.T if n == m else p for m, p in enumerate(parts)]
                name = f"the {part} of attn.c_attn"
                yield suspect("transposed", sentence.format(name), joined(weight=three), "attn.c_attn")
        number = int(net.rpartition("_")[2])
        for other in (other for other in range(self.checkpoint.layers) if other != number):
            theirs = {name: tensor.float() for name, tensor in read_weights(self.checkpoint, f"block_{other}")}
            sentence = f"it has the weights of layer {other}: a loop counted wrong, or a file was copied to its name"
            yield suspect("other_layer", sentence, {name: theirs[name] for name in weights}, f"layer {other}")

    def _groups(self, module: nn.Module, inputs: list) -> Iterator[tuple[int, int, _Suspect]]:
        weights = {name: w for name, w in module.named_parameters() if w.ndim == 2}
        for size in (size for size in GROUPS if all(w.shape[1] % size == 0 for w in weights.values())):
            for bits in (4, 8):
                changed = {name: rounded(w.detach(), f"int{bits}", size) for name, w in weights.items()}
                sentence = f"its weights have {bits} bits in groups of {size}, where another size or mode was asked for"
                yield size, bits, _Suspect(Cause("group_size", sentence, "weights"), changed, inputs)

    def _overflow(self, module: nn.Module, inputs: list) -> Cause:
        largest: dict[str, float] = {}

        def look(name):
            return lambda _, given, out: (
                largest.update({f"input of {name}": float(given[0].abs().max())} if given else {})
                or largest.update({name: float(out.abs().max())} if torch.is_tensor(out) else {})
            )

        hooks = [
            part.register_forward_hook(look(name.removeprefix("layer.")))
            for name, part in module.named_modules()
            if isinstance(part, nn.Linear) or name.endswith(("ln_1", "ln_2"))
        ]
        _run(module, {}, inputs)
        for hook in hooks:
            hook.remove()
        name = max(largest, key=largest.get)
        if largest[name] > FLOAT16_LARGEST:
            return Cause(
                "float16_overflow",
                f"in float32 the {name} reaches {largest[name]:.0f}, float16 ends at {FLOAT16_LARGEST:.0f}: compute "
                "this layer in bfloat16",
                name,
            )
        return Cause("not_finite", "NaN or infinity, and in float32 nothing in it is large: weights are damaged")

    def _place(self, phase: str, net: str, module: nn.Module, found: list, expected: list) -> tuple[str, int] | None:
        """The one row of one matrix that is wrong, where the deviation has the shape of that."""
        (_, fs), (_, fk), (_, fv) = outputs_of(net, self.text, phase, found)
        (_, es), (_, ek), (_, ev) = outputs_of(net, self.text, phase, expected)
        hidden = self.checkpoint.heads * self.checkpoint.head_dim
        half = self.checkpoint.head_dim // 2
        for number, f, e in ((2, fv, ev), (1, fk, ek)):
            columns = _columns(f - e)
            if len(columns) == 1 or (number == 1 and len(columns) == 2 and abs(columns[0] - columns[1]) == half):
                return "layer.attn.c_attn.weight", number * hidden + int(columns[0])
        error = (fs.astype(np.float64) - es).reshape(-1, fs.shape[-1])  # its square may be past float32
        columns = _columns(error)
        if len(columns) == 1:
            return "layer.mlp.c_proj.weight", int(columns[0])
        _, strengths, directions = np.linalg.svd(error, full_matrices=False)
        if strengths[0] ** 2 < 0.9 * (strengths**2).sum():
            return None
        down = module.get_parameter("layer.mlp.c_proj.weight").detach().numpy()
        alike = np.abs(directions[0] @ down) / np.linalg.norm(down, axis=0)
        unit = int(alike.argmax())
        return ("layer.mlp.w1.weight", unit) if alike[unit] > 0.9 else None


def _columns(error: np.ndarray) -> np.ndarray:
    """The few columns that hold the error, where they stand out."""
    columns = error.shape[-1] if error.ndim == 2 else error[0, 0].size
    power = np.square(error.reshape(-1, columns), dtype=np.float64).sum(axis=0)
    order = np.argsort(power)[::-1]
    return np.array([c for c in order[:2] if power[c] > 0.1 * power.sum() and power[c] > 30 * np.median(power)])


def _zeroed(module: nn.Module, inputs: list, name: str, row: int) -> Iterator[_Suspect]:
    names = ["layer.mlp.w1.weight", "layer.mlp.w2.weight"] if ".w1." in name else [name]
    for name in names:
        weight = module.get_parameter(name).detach()
        for size in (size for size in GROUPS if weight.shape[1] % size == 0):
            for start in range(0, weight.shape[1], size):
                changed = weight.clone()
                changed[row, start : start + size] = 0
                sentence = (
                    f"the quantisation scale of {name.removeprefix('layer.')}, row {row}, columns {start} to "
                    f"{start + size - 1}, is 0: the file was damaged, or the group was all zeros when it was quantised"
                )
                yield _Suspect(Cause("scale_zeroed", sentence, name), {name: changed}, inputs)


def _run(module: nn.Module, changed: dict, inputs: list) -> list[np.ndarray]:
    arrays = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs)
    with torch.no_grad():
        return [tensor.numpy() for tensor in torch.func.functional_call(module, changed, arrays)]
