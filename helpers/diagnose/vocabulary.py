"""From text to ids: whether the vocabulary beside the nets is the one that the checkpoint was trained with."""

from pathlib import Path

from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.diagnose.suspects import Cause


def compare_vocabularies(own: QwenTokenizer, other: QwenTokenizer) -> Cause | None:
    """own: the checkpoint's. None where every id means the same in both."""
    if own.vocabulary == other.vocabulary:
        return None
    ranks = min(own.endoftext, other.endoftext)
    wrong = [token for token in range(ranks) if own.token_bytes(token) != other.token_bytes(token)]
    if wrong:
        one, two = (t.token_bytes(wrong[0]).decode("utf-8", "replace") for t in (own, other))
        return Cause(
            "vocabulary",
            f"{len(wrong)} ids mean something else than in the checkpoint, {wrong[0]} is {two!r} for {one!r}: the "
            "vocabulary of another model lies beside it",
            Path(other.path).name,
        )
    return Cause(
        "special_token",
        f"<|im_start|> is {other.im_start} and <|im_end|> is {other.im_end}, in the checkpoint {own.im_start} and "
        f"{own.im_end}: the special tokens follow the last rank, and the vocabulary has {other.endoftext} ranks for "
        f"{own.endoftext}",
        Path(other.path).name,
    )
