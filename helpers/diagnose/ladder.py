"""The ladder: original, patched, ONNX, compiled, loop. Each rung is fed what the rung before it was fed, net by net.

What a net then gives differs by the error that it adds itself. What the same net gives in the rung's own walk differs
by what has accumulated. The first tensor past its band names the rung, the layer and, where a usual cause explains
it, the cause.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from helpers import artefacts
from helpers.bmodel.bmodel import read_bmodel, require_qwen
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.checkpoint.weights import Checkpoint
from helpers.compile.options import Q_GROUP_SIZE, QUANTIZE
from helpers.diagnose.bands import Figures, figures
from helpers.diagnose.initializers import compare_initializers
from helpers.diagnose.loop import compare_loop, watch
from helpers.diagnose.suspects import Cause, Suspects
from helpers.diagnose.vocabulary import compare_vocabularies
from helpers.diagnose.walk import DECODE_AGAIN, PREFILL, Record, Text, outputs_of, walk, walk_original
from helpers.errors import UserError
from helpers.export.modules import checkpoint_prefixes
from helpers.nets import net_kind
from helpers.parity.hosts import EngineNets, OnnxNets, OriginalModel, TorchNets
from helpers.patching import patching
from helpers.run.engines import open_engine
from helpers.run.generation import QwenRunner, check_prompt

# An embedding that is only rounded has a cosine of 0.999 or more.
UNRELATED = 0.5
PATCHED, ONNX, COMPILED, LOOP = "patched", "onnx", "compiled", "loop"


@dataclass(frozen=True)
class Step:
    """One tensor of one net: what the net adds, and what has accumulated since the original."""

    rung: str
    phase: str
    net: str
    tensor: str
    added: Figures
    accumulated: Figures
    band: str


@dataclass(frozen=True)
class Finding:
    """The first fault. cause: of helpers.diagnose.suspects, or "unknown"."""

    rung: str
    net: str
    tensor: str
    cause: str
    sentence: str


@dataclass
class Report:
    """rungs: those that were climbed. found: None where all of them are healthy. inputs: golden, of the net found."""

    mode: str | None
    prompt_tokens: int
    rungs: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    found: Finding | None = None
    inputs: list[np.ndarray] | None = None

    def to_json(self) -> dict:
        """Everything but the inputs, as plain data."""
        return {name: value for name, value in asdict(replace(self, inputs=None)).items() if name != "inputs"}


def diagnose(
    checkpoint: str | Path,
    onnx: str | Path | None = None,
    bmodel: str | Path | None = None,
    prompt: str = "Hello, how are you?",
    *,
    patched: str | Path | None = None,
    make_runner: Callable = QwenRunner,
) -> Report:
    """Climb until a rung is not healthy.

    checkpoint: patched or not; its original is what all is compared with. patched: a copy with its own changes, to be
    looked at; by default patched here, by patches/. make_runner: (engine) -> the loop, with prefill(ids) and
    decode(token).
    Raises UserError where the artefacts are not of one model, or a bmodel cannot run here.
    """
    source = Checkpoint.open(checkpoint)
    seq_length = _same_model(source, onnx, bmodel)
    tokenizer = QwenTokenizer.open(checkpoint)
    ids = tokenizer.prompt(prompt)
    check_prompt(ids, seq_length - 2)
    with tempfile.TemporaryDirectory(prefix="qwen-diagnose-") as scratch:
        original, fresh = Path(scratch, "original"), Path(scratch, "patched")
        patching.apply(source.path.absolute(), out=original, seq_length=seq_length)
        patching.revert(original)
        patching.apply(source.path.absolute(), out=fresh, seq_length=seq_length)
        reference, text = walk_original(OriginalModel(original), ids, seq_length)
        ladder = _Ladder(reference, text, Suspects(Checkpoint.open(fresh), text, seq_length))
        ladder.report = Report(_mode(bmodel) if bmodel else None, len(ids))
        ladder.climb(PATCHED, TorchNets(patched or fresh, seq_length), "float32")
        if onnx and not ladder.report.found:
            ladder.climb(ONNX, OnnxNets(onnx), "float32", Path(onnx))
        if bmodel and not ladder.report.found:
            with open_engine(bmodel, "simulator") as engine:
                ladder.climb(COMPILED, EngineNets(engine), ladder.report.mode)
                if not ladder.report.found:
                    ladder.around(engine, make_runner, tokenizer, Path(bmodel).parent)
        return ladder.report


class _Ladder:
    """golden: the record of the rung below. report: what was found so far."""

    report: Report

    def __init__(self, reference: Record, text: Text, suspects: Suspects):
        self.reference, self.golden, self.text, self.suspects = reference, reference, text, suspects

    def climb(self, rung: str, nets, mode: str, folder: Path | None = None) -> None:
        self.report.rungs.append(rung)
        own = walk(nets, self.text)
        bar = tqdm([key for key in self.golden if key[0] != DECODE_AGAIN], desc=rung, unit="net", leave=False)
        for phase, net in bar:
            inputs, expected = self.golden[phase, net]
            found = nets.run(net, *inputs)
            steps = list(self._steps(rung, phase, net, mode, found, expected, own))
            self.report.steps += steps
            # A block computes its key and its value before its states.
            past = next((step for step in (*steps[1:], *steps[:1]) if step.added.past(mode)), None)
            block = net_kind(net).startswith("block")
            if past and rung == COMPILED and net == "embedding" and past.added.cosine < UNRELATED:
                raise UserError(
                    "The states that the bmodel's embedding gives have nothing to do with the checkpoint's (cosine "
                    f"{past.added.cosine:.2f}): they are of two different models, compile this one's export."
                )
            if past:
                cause = self.suspects.cause(phase, net, inputs, found, expected, mode) if block else None
                if folder and (cause is None or cause.name in ("weight", "not_finite")):
                    cause = compare_initializers(folder, net, self.suspects.checkpoint) or cause
                self.report.found = self._finding(rung, net, past, cause)
            elif block and phase == PREFILL and mode.startswith("int"):
                self._check_groups(net, inputs, found, mode)
            if self.report.found:
                self.report.inputs = inputs
                return
        self.golden = own

    def _steps(self, rung, phase, net, mode, found, expected, own: Record) -> Iterator[Step]:
        arrays = (found, expected, own[phase, net][1], self.reference[phase, net][1])
        for (name, f), (_, e), (_, o), (_, r) in zip(
            *(outputs_of(net, self.text, phase, a) for a in arrays), strict=True
        ):
            added = figures(f, e)
            yield Step(rung, phase, net, name, added, figures(o, r), added.band(mode))

    def _finding(self, rung: str, net: str, step: Step, cause: Cause | None) -> Finding:
        if cause is None:
            cause = Cause("unknown", f"none of the usual causes explains it; {_WHO_MADE[rung]}")
        where = f"{rung}: {net} is the first net past its band, in {step.tensor} ({step.phase})"
        return Finding(rung, net, cause.tensor or step.tensor, cause.name, f"{where}: {cause.sentence}.")

    def _check_groups(self, net: str, inputs: list, found: list, mode: str) -> None:
        if cause := self.suspects.other_groups(net, inputs, found, Q_GROUP_SIZE, 4 if mode == "int4" else 8):
            sentence = f"{COMPILED}: {net} is within its band, but {cause.sentence}."
            self.report.found = Finding(COMPILED, net, cause.tensor, cause.name, sentence)

    def around(self, engine, make_runner: Callable, tokenizer: QwenTokenizer, folder: Path) -> None:
        """The loop, from text to ids and from ids to what each net is given. The golden inputs are the last walk's."""
        self.report.rungs.append(LOOP)
        cause = None
        with contextlib.suppress(UserError):  # a bmodel may come without a vocabulary: `chat` then asks for one
            cause = compare_vocabularies(tokenizer, QwenTokenizer.open(folder))
        if cause:
            sentence = f"{LOOP}: the tokenizer in {folder}: {cause.sentence}."
            self.report.found = Finding(LOOP, "tokenizer", cause.tensor, cause.name, sentence)
            return
        if wrong := compare_loop(watch(engine, self.text, make_runner), self.golden, self.text):
            phase, net, tensor, cause = wrong
            sentence = (
                f"{LOOP}: {net} is the first net that is given something else, {tensor} ({phase}): {cause.sentence}."
            )
            self.report.found = Finding(LOOP, net, tensor, cause.name, sentence)


_WHO_MADE = {
    PATCHED: "compare modeling_qwen.py with what `python -m helpers patch` makes of the original",
    ONNX: "export this net again, and look at its graph with Netron",
    COMPILED: "compile this net again, and look one level deeper",
}


def _mode(bmodel: str | Path) -> str:
    """bf16, int8 or int4: of the manifest or, without one, of the file's name; else bf16."""
    with contextlib.suppress(UserError):
        if (mode := artefacts.read_manifest(bmodel)["settings"].get("mode")) in QUANTIZE:
            return mode
    name = Path(bmodel).name
    return next((mode for mode in QUANTIZE if mode in name), "bf16")


def _same_model(source: Checkpoint, onnx: str | Path | None, bmodel: str | Path | None) -> int:
    """S of the artefacts. Raises UserError where they are not of the checkpoint, or not of one another."""
    shape = (source.layers, source.hidden_size, source.heads, source.head_dim)
    lengths = {}
    if onnx:
        if not Path(onnx).is_dir():
            raise UserError(f"There is no folder {onnx}: give the one that `python -m helpers export` made.")
        nets = OnnxNets(onnx)
        lengths[onnx] = nets.seq_length
        config = artefacts.read_manifest(onnx).get("config") or {}
        if nets.layers != source.layers or config.get("hidden_size", source.hidden_size) != source.hidden_size:
            raise _another(onnx, f"{nets.layers} layers of hidden size {config.get('hidden_size')}", source)
        for group in ["embedding", *(f"block_{i}" for i in range(source.layers)), "lm_head"]:
            recorded = artefacts.read_manifest(Path(onnx) / f"{group}.onnx")["inputs"]
            for prefix in checkpoint_prefixes(group):
                if prefix in recorded and recorded[prefix] != source.digest(prefix):
                    raise _another(onnx, f"{group} of other weights (the SHA-256 of {prefix}* differs)", source)
    if bmodel:
        described = require_qwen(read_bmodel(bmodel))
        lengths[bmodel] = described.seq_length
        found = (described.layers, described.hidden_size, described.heads, described.head_dim)
        if found != shape:
            raise _another(bmodel, f"layers, hidden size, heads and head size {found}", source)
    if len(set(lengths.values())) > 1:
        raise UserError(f"{onnx} is for S = {lengths[onnx]}, {bmodel} for {lengths[bmodel]}: give those of one export.")
    return next(iter(lengths.values()), 0) or min(patching.SEQ_LENGTH, patching.trained_seq_length(source.path))


def _another(where, what: str, source: Checkpoint) -> UserError:
    shape = (source.layers, source.hidden_size, source.heads, source.head_dim)
    return UserError(
        f"{where} has {what}, the checkpoint {source.path} has {source.layers} layers of hidden size "
        f"{source.hidden_size} ({shape}): they are of two different models, give what was made from this checkpoint."
    )
