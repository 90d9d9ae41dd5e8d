"""Qwen's tokenizer: byte pairs over bytes, ChatML, and text that streams without broken characters.

The same for models that were converted: byte pairs of their own, special tokens at other ids, another split of text.

Needs tiktoken only, so that a box with a chip and nothing else can use it.
"""

from __future__ import annotations

import codecs
import itertools
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from helpers.checkpoint.vocabulary import GENUINE_RANKS, described, parse_ranks, read_vocabulary
from helpers.errors import UserError

# How text is split before pairs are merged: the patterns of the models' own tokenizers, named as in GGUF files.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": _SPLIT % r"\p{N}",  # also that of first-generation Qwen, in its tokenization_qwen.py
    "llama-bpe": _SPLIT % r"\p{N}{1,3}",
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Digits first, one by one, then GPT-2's on what is between them: blanks before a digit end such a piece.
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}

# Special tokens in Qwen's order; their ids follow the last rank. Only the whole vocabulary has the extra ones.
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EXTRA_SPECIALS = tuple(f"<|extra_{i}|>" for i in range(205))

# tiktoken ends its thread in a panic from about a million blanks on; 32768 tokens never hold this much text.
MAX_CHARACTERS = 500_000

# Qwen's own demonstrations and the tutorial's embedded model are prompted with this.
SYSTEM_PROMPT = "You are a helpful assistant."


class QwenTokenizer:
    """Text to ids and back. Make it with `QwenTokenizer.open`.

    specials: ids by name. endoftext, im_start, im_end: ids of three of them, None where a converted model has none.
    stop_ids: those that end an answer. path: the vocabulary file. vocabulary: its contents.
    """

    def __init__(self, vocabulary: bytes, path: Path):
        import tiktoken

        ranks, own = parse_ranks(vocabulary, path), described(vocabulary, path)
        names = CHATML_SPECIALS + (EXTRA_SPECIALS if len(ranks) == GENUINE_RANKS else ())
        if (split := own.get("split", "qwen2")) not in SPLITS:
            raise UserError(f"{path} says split {split!r}, {' or '.join(SPLITS)} was needed: convert the model again.")
        self.path, self.vocabulary = path, vocabulary
        self.specials = own["specials"] if own else {name: len(ranks) + i for i, name in enumerate(names)}
        self.endoftext, self.im_start, self.im_end = (self.specials.get(name) for name in CHATML_SPECIALS)
        self.stop_ids = tuple(own["stop_ids"]) if own else (self.im_end, self.im_start, self.endoftext)
        self._not_chatml, self._nfc = own.get("not_chatml"), own.get("nfc", True)
        self._matched = set(own.get("matched", ()))
        self._length = 1 + max(*ranks.values(), *self.specials.values())
        never = set(own.get("never_cut", ()))
        self._never_cut = {rank: token for token, rank in ranks.items() if rank in never}
        ranks = {token: rank for token, rank in ranks.items() if rank not in never}
        # A byte that the vocabulary lacks would end tiktoken; it gets an id that `encode` leaves out.
        lacking = (bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks)
        ranks |= {byte: self._length + i for i, byte in enumerate(lacking)}
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=SPLITS[split], mergeable_ranks=ranks, special_tokens=self.specials
        )

    @classmethod
    def open(cls, path: str | Path) -> QwenTokenizer:
        """Open a vocabulary file (qwen.tiktoken) or the checkpoint folder that has it.

        Raises UserError where there is no vocabulary, or what is there is not one.
        """
        return cls(*read_vocabulary(path))

    def __len__(self) -> int:
        """How many ids mean something: ranks and special tokens, without the padding of the model's vocab_size."""
        return self._length

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. A special token's name in it is text like any other, never the special id.

        Some converted models have names that are recognised in text, such as <tool_call>.
        Raises UserError for more text than any Qwen takes.
        """
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"The text has {len(text)} characters, at most {MAX_CHARACTERS} are taken: shorten it.")
        normal = _nfc(text) if self._nfc and not text.isascii() else text
        ids = self._encoding.encode(normal, allowed_special=self._matched, disallowed_special=())
        return [token for token in ids if token < self._length]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these ids; special tokens by their names, bytes that are not UTF-8 as U+FFFD."""
        return b"".join(self.token_bytes(token) for token in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; those of U+FFFD for an id that only pads the model's vocabulary."""
        try:
            return self._never_cut.get(token) or self._encoding.decode_single_token_bytes(token)
        except KeyError:
            return "\N{REPLACEMENT CHARACTER}".encode()

    def chatml(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation and the prompt for its answer, exactly as Qwen's make_context builds them.

        messages: {"role": "system" | "user" | "assistant", "content": str}, in order. Role and content are encoded
        apart, so no pair is merged across them.
        Raises UserError where a converted model was trained for another form of conversation.
        """
        self.require_chatml()
        newline = self.encode("\n")
        ids: list[int] = []
        for message in messages:
            ids += newline if ids else []
            ids += [self.im_start, *self.encode(message["role"]), *newline]
            ids += [*self.encode(message["content"]), self.im_end]
        return [*ids, *newline, self.im_start, *self.encode("assistant"), *newline]

    def require_chatml(self) -> None:
        """Raise UserError, with the reason, where a converted model was trained for another form of conversation."""
        if self._not_chatml:
            raise UserError(f"{self.path} is of a model to chat with in another way: {self._not_chatml}")

    def prompt(self, question: str) -> list[int]:
        """Ids of one question with the usual system prompt, ready for the answer."""
        return self.chatml([{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}])

    def stream(self) -> StreamDecoder:
        """A decoder for tokens that come one by one."""
        return StreamDecoder(self)


def _nfc(text: str) -> str:
    """NFC; marks are put in order first, which takes unicodedata time with the square of their number."""
    apart = "".join(unicodedata.normalize("NFD", character) for character in text)
    runs = itertools.groupby(apart, key=lambda character: unicodedata.combining(character) > 0)
    ordered = (character for _, run in runs for character in sorted(run, key=unicodedata.combining))
    return unicodedata.normalize("NFC", "".join(ordered))


class StreamDecoder:
    """Turns tokens into text as they come: a character split over tokens is held back until it is whole.

    The pieces and the end, joined, are what `decode` gives for all tokens at once.
    """

    def __init__(self, tokenizer: QwenTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        """What was held back: U+FFFD where a character was never finished, else nothing."""
        return self._decoder.decode(b"", final=True)
