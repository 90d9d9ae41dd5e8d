"""A bmodel alone, with no checkpoint and no ONNX: what can be said of a file that somebody gave you."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helpers.bmodel.bmodel import read_bmodel, require_qwen
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.diagnose.ladder import Finding, Report
from helpers.diagnose.walk import PREFILL, Record, Text, outputs_of, walk
from helpers.nets import MASKED
from helpers.parity.hosts import EngineNets
from helpers.run.engines import open_engine

ALONE = "bmodel alone"
# Two tensors that ought to differ and are as near as this do not: bfloat16 has eight bits.
EQUAL = 1e-6


def examine(bmodel: str | Path, prompt: str, tokenizer: str | Path | None = None) -> Report:
    """Run a bmodel's nets on the simulator and look at what comes out. tokenizer: default, the one beside the file.

    Raises UserError where the file is no Qwen bmodel for this chip, or has no vocabulary beside it.
    """
    shape = require_qwen(read_bmodel(bmodel))
    words = QwenTokenizer.open(tokenizer or Path(bmodel).parent)
    prompts = [words.prompt(text)[-(shape.seq_length - 2) :] for text in (prompt, f"{prompt[::-1]} 0")]
    report = Report(None, len(prompts[0]), [ALONE])
    with open_engine(bmodel, "simulator") as engine:
        nets = EngineNets(engine)
        vocab_size = engine.nets["lm_head"].outputs[0].shape[-1]
        if not shape.token_head and words.im_end >= vocab_size:
            cause = f"<|im_end|> is {words.im_end}, the nets know {vocab_size} ids: the vocabulary of another model"
            report.found = Finding(ALONE, "tokenizer", "ids", "special_token", f"{ALONE}: {cause} lies beside it.")
            return report
        texts = [Text(ids, ids[:1]) for ids in prompts]
        walks = [walk(nets, text) for text in texts]
        report.found = (
            _not_finite(walks[0], texts[0])
            or _dead_head(walks[0], texts[0])
            or _blind(nets, walks[0], texts[0])
            or _deaf(walks)
            or _template(nets, words, shape.seq_length)
        )
    return report


def _finding(net: str, tensor: str, cause: str, what: str) -> Finding:
    return Finding(ALONE, net, tensor, cause, f"{ALONE}: {net}: {what}.")


def _not_finite(record: Record, text: Text) -> Finding | None:
    for (phase, net), (_, outputs) in record.items():
        for name, array in outputs_of(net, text, phase, outputs):
            if not np.isfinite(array).all():
                what = f"NaN or infinity in {name} ({phase}); usually float16, or a file that is damaged"
                return _finding(net, name, "not_finite", what)
    return None


def _dead_head(record: Record, text: Text) -> Finding | None:
    """A head whose keys or values are the same for every token."""
    for (phase, net), (_, outputs) in record.items():
        for name, array in outputs_of(net, text, phase, outputs)[1:]:
            dead = np.flatnonzero(np.ptp(array[0], axis=0).max(axis=-1) == 0) if phase == PREFILL else []
            if len(dead):
                what = f"{name} of head {dead[0]} is the same for every token: its weights are zero or were lost"
                return _finding(net, name, "dead_head", what)
    return None


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return float(((one - other) ** 2).sum()) <= EQUAL * float((one**2).sum())


def _blind(nets, record: Record, text: Text) -> Finding | None:
    """A block that gives the last token the same whether it may see the others or only itself."""
    last = len(text.ids) - 1
    for i in range(nets.layers):
        (states, positions, mask), (seen, *_) = record[PREFILL, f"block_{i}"]
        alone = np.full_like(mask, MASKED)
        np.einsum("...ii->...i", alone)[...] = 0
        if _same(nets.run(f"block_{i}", states, positions, alone)[0][0, last], seen[0, last]):
            what = "the mask changes nothing: attention does not look at it"
            return _finding(f"block_{i}", "attention_mask", "mask_not_used", what)
    return None


def _deaf(walks: Sequence[Record]) -> Finding | None:
    one, other = (record[PREFILL, "lm_head"][1][0] for record in walks)
    if _same(one, other):
        what = "two different prompts give the same: the token does not depend on the prompt"
        return _finding("lm_head", "m_logits", "prompt_not_used", what)
    return None


def _template(nets, words: QwenTokenizer, seq_length: int) -> Finding | None:
    """The special tokens' states: a model that was never trained with ChatML has zeros, or one row for all of them."""
    ids = np.zeros((1, seq_length), dtype=np.int32)
    ids[0, :3] = words.im_start, words.im_end, words.endoftext
    start, end, _ = nets.run("embedding", ids)[0][0, :3]
    if not start.any() or not end.any() or _same(start, end):
        what = "<|im_start|> and <|im_end|> have no states of their own: the model was not trained with ChatML"
        return _finding("embedding", "input_states", "chat_template", what)
    return None
