"""Text to calibrate on and to evaluate on, in pieces of one length."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import torch

from helpers.checkpoint.tokenizer import MAX_CHARACTERS, QwenTokenizer
from helpers.errors import UserError

# T: tokens of a piece.
PIECE = 256


def python_text(for_calibration: bool) -> str:
    """Python's own help topics: their first half is for calibrating, the second for evaluating. No paragraph is in
    both."""
    topics = pydoc_data.topics.topics
    # Topics quote each other.
    paragraphs = list(dict.fromkeys("\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")))
    half = len(paragraphs) // 2
    return "\n\n".join(paragraphs[:half] if for_calibration else paragraphs[half:])


def read_text(file: str | Path) -> str:
    """The beginning of a user's text. Raises UserError where it is not UTF-8."""
    with open(file, "rb") as source:
        content = source.read(4 * MAX_CHARACTERS)
    try:
        return content.decode("utf-8-sig")[:MAX_CHARACTERS]
    except UnicodeDecodeError as error:
        # A character may have been cut at the end of what was read.
        if len(content) == 4 * MAX_CHARACTERS and error.start > len(content) - 4:
            return content[: error.start].decode("utf-8-sig")[:MAX_CHARACTERS]
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02X}): save it as UTF-8, or name "
            "another file."
        ) from None


def pieces_of(text: str, tokenizer: QwenTokenizer, pieces: int, where: object = "The text") -> torch.Tensor:
    """Pieces of a text, evenly spread over it: ids [pieces, PIECE]. Raises UserError where it has not as many."""
    ids = tokenizer.encode(text)
    whole = len(ids) // PIECE
    if whole < pieces:
        raise UserError(
            f"{where} has {len(ids)} tokens, {pieces * PIECE} were needed: take a longer one, or ask for fewer with "
            "--tokens."
        )
    places = torch.linspace(0, whole - 1, pieces).long()
    return torch.tensor(ids[: whole * PIECE]).view(whole, PIECE)[places]
