"""The loop around the nets: a runner is watched, and what it gives each net is set beside what the contract asks."""

from collections.abc import Callable

import numpy as np

from helpers.diagnose.bands import figures
from helpers.diagnose.suspects import Cause
from helpers.diagnose.walk import PHASES, PREFILL, Record, Text
from helpers.nets import HEADS, INPUT_NAMES, net_kind
from helpers.run.engines.base import DeviceTensor, Engine
from helpers.run.generation import QwenRunner
from helpers.tensors import from_bf16

# Inputs come from the same nets on the same engine: they are equal, but for a step through float32 on the host.
SAME = 1e-6


class WatchedEngine:
    """An engine that writes down what each net was given and what it gave; else the engine itself."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.runs: list[tuple[str, list[np.ndarray], list[np.ndarray]]] = []

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def run(self, net: str, inputs: list[DeviceTensor], outputs: list[DeviceTensor]) -> None:
        given = [self._array(tensor) for tensor in inputs]
        self._engine.run(net, inputs, outputs)
        self.runs.append((net, given, [self._array(tensor) for tensor in outputs]))

    def _array(self, tensor: DeviceTensor) -> np.ndarray:
        array = self._engine.read(tensor)
        return from_bf16(array) if tensor.dtype == "bfloat16" else array


def watch(engine: Engine, text: Text, make_runner: Callable[[Engine], QwenRunner] = QwenRunner) -> Record:
    """A runner's prefill and two decode steps. It may be any with `prefill(ids)` and `decode(token)`."""
    watched, record = WatchedEngine(engine), {}
    runner = make_runner(watched)
    steps = [lambda: runner.prefill(text.ids), *(lambda token=token: runner.decode(token) for token in text.fed)]
    for phase, step in zip(PHASES, steps, strict=False):
        watched.runs = []
        step()
        record |= {(phase, net): (given, gave) for net, given, gave in watched.runs if net not in HEADS}
    return record


def compare_loop(found: Record, expected: Record, text: Text) -> tuple[str, str, str, Cause] | None:
    """(phase, net, tensor, cause) of the first input that is not what the contract asks for; None where all are."""
    for (phase, net), (wanted, _) in expected.items():
        if (phase, net) not in found:
            return phase, net, "", Cause("net_not_run", f"the loop does not run {net}")
        given = found[phase, net][0]
        for name, g, w in zip(INPUT_NAMES[net_kind(net)], given, wanted, strict=True):
            g, w = _of_use(name, np.asarray(g).reshape(np.shape(w)), np.asarray(w), text, phase, net)
            if figures(g, w).nmse > SAME:
                return phase, net, name, _cause(name, g, w, net)
    return None


def _of_use(name: str, g, w, text: Text, phase: str, net: str):
    """Without the rows of padding, and without what of the cache is masked."""
    if name in ("history_k", "history_v"):
        rows = np.s_[:, : len(text.ids) + PHASES.index(phase) - 1]
    elif name == "attention_mask" and phase == PREFILL:
        rows = np.s_[:, :, : len(text.ids)]
    else:
        rows = np.s_[:, text.rows(phase, net)]
    return g[rows], w[rows]


def _cause(name: str, g: np.ndarray, w: np.ndarray, net: str) -> Cause:
    if name == "position_ids":
        steps = set((g.astype(int) - w).ravel().tolist())
        if len(steps) == 1:
            return Cause("position_shift", f"positions are off by {steps.pop():+d}: they count from 0", name)
        return Cause("position", "positions do not count from 0 on", name)
    if name == "attention_mask":
        if np.array_equal(g, -w):
            return Cause("mask_sign", "the mask has the other sign: 0 is seen, -9984 is hidden", name)
        more = set(((g > -1).sum(-1) - (w > -1).sum(-1)).ravel().tolist())
        if more <= {-1, 0, 1}:
            sees = "one place too many" if 1 in more else "one place too few" if -1 in more else "another place"
            return Cause("mask_shift", f"the mask is off by one: a row sees {sees}", name)
        return Cause("mask", "the mask shows other places than the contract says", name)
    if name in ("history_k", "history_v"):
        halves = np.roll(g, g.shape[2] // 2, axis=2)
        if figures(halves, w).nmse <= SAME:
            which = "values" if name == "history_v" else "keys"
            sentence = f"the {which} are those of another device's heads: device k has heads k·h/n to (k+1)·h/n - 1"
            return Cause("other_heads", sentence, name)
        wrong = [row for row in range(w.shape[1]) if figures(g[:, row], w[:, row]).nmse > SAME]
        sentence = (
            f"cache row {wrong[0]} is not what the layer gave for it: the new row of position p belongs in row p, the "
            "prompt's rows in 0 to count - 1"
        )
        near = [
            figures(g[:, row], w[:, row + step]).nmse
            for step in (-1, 1)
            for row in wrong
            if 0 <= row + step < w.shape[1]
        ]
        empty = not np.any(g[:, wrong[0]])
        return Cause(
            "cache_row" if empty or min(near, default=1) <= SAME or len(wrong) == 1 else "cache", sentence, name
        )
    if name == "input_ids":
        return Cause("ids", "other ids than those of the prompt and of the tokens fed", name)
    if net == "lm_head":
        return Cause("head_row", "lm_head is given another row than that of the last token", name)
    return Cause("states", "the states are not those that the net before it gave", name)
