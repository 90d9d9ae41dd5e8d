"""A model's vocabulary as tiktoken ranks, its special tokens, how it splits text, and whether it talks ChatML.

A token's id is its rank: pairs are merged in the order of ids. Vocabularies of which that is not true, and those of
SentencePiece, are refused for text; the model is converted all the same, and the reason stands in its vocabulary.
"""

import base64
import json
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from helpers.checkpoint.tokenizer import CHATML_SPECIALS, SPLITS
from helpers.convert.sources import Gguf, Source, read_json
from helpers.errors import UserError

# Kinds of tokens in a GGUF: gguf.TokenType.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
# Of GGUF's names for ways to split text (tokenizer.ggml.pre), those that are another's by another name.
_SAME_SPLIT = {"starcoder": "smollm", "refact": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_SAME_SPLIT |= {"deepseek-r1-qwen": "qwen2"}
_NFC = ("qwen2",)


class RefusedError(Exception):
    """Why text cannot be cut as the model's own tokenizer cuts it."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones of Latin-1 for themselves, those from U+0100 on for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def vocabulary_of(source: Source, rows: int) -> bytes:
    """The contents of qwen.tiktoken for a model, of whose embedding there are so many rows.

    Raises UserError where vocabulary and weights disagree, and where it cannot be read.
    """
    alphabet = byte_alphabet()
    try:
        ids, description, merges = (_of_gguf if isinstance(source, Gguf) else _of_folder)(source, rows)
        description["never_cut"] = _never_cut(ids, merges)
        if unknown := {letter for text in ids for letter in text} - alphabet.keys():
            raise RefusedError(f"its tokens have {min(unknown)!r}, which is no letter of GPT-2's alphabet of bytes.")
    except RefusedError as reason:
        ids, description = {}, {"refused": f"{reason} The model itself is converted."}
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"The vocabulary of {source.file} cannot be read ({error!r}): download it again.") from None
    lines = [b"# " + json.dumps(description).encode()]
    for text, token in sorted(ids.items(), key=lambda entry: entry[1]):
        lines.append(base64.b64encode(bytes(alphabet[letter] for letter in text)) + b" %d" % token)
    return b"\n".join(lines) + b"\n"


def _of_gguf(source: Gguf, rows: int) -> tuple[dict[str, int], dict, list | None]:
    def said(key: str) -> object:
        return source.get(f"tokenizer.ggml.{key}")

    tokens, kind = said("tokens") or [], said("model")
    if len(tokens) not in (0, rows) or source.get(f"{source.kind}.vocab_size") not in (None, rows):
        raise UserError(
            f"{source.file} has a vocabulary of {len(tokens)} tokens (vocab_size says "
            f"{source.get(f'{source.kind}.vocab_size')}) and weights for {rows}: they are of two models."
        )
    if kind != "gpt2":
        what = "SentencePiece" if kind == "llama" else "another kind"
        raise RefusedError(f"its vocabulary is of {what} (tokenizer.ggml.model = {kind!r}), byte pairs were needed.")
    pre = said("pre") or source.kind  # which old files do not say
    split = _SAME_SPLIT.get(pre, pre)
    if split not in SPLITS:
        raise RefusedError(f"its text is split in a way that is not known here (tokenizer.ggml.pre = {pre!r}).")
    kinds = said("token_type") or [NORMAL] * len(tokens)
    ids = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == NORMAL}
    specials = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind in (CONTROL, USER_DEFINED)}
    matched = [text for text, i in specials.items() if kinds[i] == USER_DEFINED]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    words = {word: tokens[i] for word, name in names.items() if (i := said(f"{name}_token_id")) is not None}
    stops = [said("eos_token_id"), said("eot_token_id")]
    template, merges = source.get("tokenizer.chat_template"), said("merges") if split != "llama-bpe" else None
    return ids, _description(split, split in _NFC, specials, matched, stops, template, words), merges


def _of_folder(source: Source, rows: int) -> tuple[dict[str, int], dict, list | None]:
    folder: Path = source.place
    held, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    if not held:
        raise RefusedError("it came without a tokenizer.json.")
    model, added = held.get("model") or {}, held.get("added_tokens") or []
    specials = {token["content"]: token["id"] for token in added}
    ids = {text: i for text, i in (model.get("vocab") or {}).items() if text not in specials}
    if (highest := max([-1, *ids.values(), *specials.values()])) >= rows:
        raise UserError(
            f"{folder} has a vocabulary up to id {highest} and weights for {rows}: they are of two models; take all "
            "files from one repository."
        )
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise RefusedError(f"its tokenizer.json is of the kind {model.get('type')}, byte pairs were needed.")
    split, normalizer = _split_of(held.get("pre_tokenizer")), held.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise RefusedError(f"its tokenizer.json changes text before it is cut ({json.dumps(normalizer)[:80]}).")
    matched = [token["content"] for token in added if not token.get("special")]
    said = [which.get("eos_token_id") for which in (read_json(folder / "generation_config.json"), source)]
    stops = [stop for ids_ in said for stop in (ids_ if isinstance(ids_, list) else [ids_])]
    words = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items() if k.endswith("_token")}
    template = settings.get("chat_template")
    if (file := folder / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    stops.append(specials.get(words.get("eos_token")))
    merges = model["merges"] if not model.get("ignore_merges") else None
    return ids, _description(split, normalizer is not None, specials, matched, stops, template, words), merges


def _split_of(pre: dict | None) -> str:
    """The name of what a tokenizer.json's pre_tokenizer does. Raises RefusedError where it is none of SPLITS."""
    steps = [pre or {}] if (pre or {}).get("type") != "Sequence" else pre["pretokenizers"]
    *before, last = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    last, gpt2 = {"use_regex": True} | last, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    for name, pattern in SPLITS.items():
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        if before == [split] and last == gpt2 | {"use_regex": False}:
            return name
    if before == [{"type": "Digits", "individual_digits": True}] and last == gpt2:
        return "smollm"
    if not before and last == gpt2:
        return "gpt-2"
    raise RefusedError(f"its tokenizer.json splits text in a way that is not known here ({json.dumps(pre)[:120]}).")


def _never_cut(ids: dict[str, int], merges: list | None) -> list[int]:
    """Ids of tokens that no merge ("a b", or [a, b]) makes. None: tokens are taken whole before pairs are merged.

    Raises RefusedError where merging by ids would not be merging in the order of `merges`.
    """
    if not merges:
        return []
    made = [ids.get("".join(merge.split(" ")) if isinstance(merge, str) else "".join(merge), -1) for merge in merges]
    if min(made) < 0 or made != sorted(made):
        raise RefusedError("its pairs are merged in another order than that of their ids.")
    return sorted({token for text, token in ids.items() if len(text) > 1} - set(made))


def _description(
    split: str, nfc: bool, specials: dict[str, int], matched: list[str], stops: list, template: object, words: dict
) -> dict:
    chatml = [specials[name] for name in CHATML_SPECIALS[::-1] if name in specials]
    return {
        "split": split,
        "nfc": nfc,
        "specials": specials,
        "matched": matched,
        "stop_ids": list(dict.fromkeys(i for i in [*stops, *chatml] if i is not None)),
        "not_chatml": _not_chatml(specials, template, words),
    }


def _not_chatml(specials: dict[str, int], template: object, words: dict) -> str | None:
    """Why a model cannot be talked to in ChatML; None where it can, and where it has the tokens and no template."""
    if lacking := [name for name in CHATML_SPECIALS[1:] if name not in specials]:
        return f"its vocabulary has no {' and no '.join(lacking)}, with which ChatML marks a turn."
    if template is None:
        return None
    if not isinstance(template, str):  # several by name; the one without a name of its own is for conversation
        named = {t["name"]: t["template"] for t in template if isinstance(t, dict)}
        template = named.get("default", "")
    messages = [{"role": role, "content": f"Text of {role}."} for role in ("system", "user", "assistant", "user")]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    expected += "<|im_start|>assistant\n"
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: ""}
    try:
        said = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **words)
    except Exception as error:  # it is a program of its own
        return f"its chat template cannot be read ({error})."
    return None if said == expected else f"its chat template writes {said[:60]!r}…, ChatML is {expected[:40]!r}…."


def _raise(message: str) -> None:
    raise TemplateError(message)
