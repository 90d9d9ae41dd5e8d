"""The arguments that `chat` and `serve` share: which bmodel, with which tokenizer, on which engine."""

import argparse
import re
from pathlib import Path

from helpers.artefacts import read_manifest
from helpers.bmodel.bmodel import read_bmodel
from helpers.checkpoint.tokenizer import SYSTEM_PROMPT, QwenTokenizer
from helpers.errors import UserError
from helpers.run.engines import ENGINES


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="FILE", help="the bmodel")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the one in the bmodel's manifest")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="auto: the chip if there is one")
    parser.add_argument("--devid", type=device_ids, default=(0,), metavar="N[,N]", help="e.g. 0 or 2,3")
    parser.add_argument("--system", default=SYSTEM_PROMPT, help="the system prompt; empty for none")


def device_ids(text: str) -> tuple[int, ...]:
    """`0` or `2,3` as given to --devid."""
    ids = tuple(map(int, text.split(","))) if re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")) else ()
    if not ids or len(set(ids)) != len(ids):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different device ids such as 0 or 2,3")
    return ids


def open_tokenizer(model: str | Path, tokenizer: str | None) -> QwenTokenizer:
    """The tokenizer asked for, or the one that the bmodel's manifest names.

    Raises UserError where neither is there, or it is of a model that is not chatted with in ChatML; what is no bmodel
    is said to be none.
    """
    if tokenizer:
        return _for_chat(tokenizer)
    try:
        named = read_manifest(model).get("tokenizer")
    except UserError:
        named = None
    if not named:
        read_bmodel(Path(model))
        remedy = "give --tokenizer, a checkpoint folder or a qwen.tiktoken."
        raise UserError(f"{model} has no manifest that names its tokenizer: {remedy}")
    return _for_chat(Path(model).parent / named)


def _for_chat(path: str | Path) -> QwenTokenizer:
    tokenizer = QwenTokenizer.open(path)
    tokenizer.require_chatml()  # before a bmodel is loaded, which takes its time
    return tokenizer
