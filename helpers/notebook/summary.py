"""out/summary.json: the figures of a whole run, to which each notebook gives its part. Its keys are an interface."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError

from helpers.errors import UserError
from helpers.files import locked, write_json

SUMMARY = "summary.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Tokens(_Part):
    """Ids of an answer, by what computed it."""

    pytorch: list[int] = Field(min_length=1)
    patched: list[int] = Field(min_length=1)
    onnxruntime: list[int] = Field(min_length=1)
    bf16: list[int] = Field(min_length=1)
    int8: list[int] = Field(min_length=1)
    int4: list[int] = Field(min_length=1)


class Question(_Part):
    question: str = Field(min_length=1)
    answer: str
    tokens: Tokens


class Parity(_Part):
    max_abs: NonNegativeFloat
    cosine: float = Field(ge=-1.0001, le=1.0001)


class Estimate(_Part):
    first_token_ms: NonNegativeFloat
    decode_ms: NonNegativeFloat


class Summary(_Part):
    """What a complete summary holds. parity: {rung: {net: …}}; bytes: {file: …}; wall_s: {notebook: …}."""

    model: str = Field(min_length=1)
    engine: str = Field(min_length=1)
    versions: dict[str, str] = Field(min_length=1)
    questions: list[Question] = Field(min_length=1)
    parity: dict[str, dict[str, Parity]] = Field(min_length=1)
    bytes: dict[str, NonNegativeInt] = Field(min_length=1)
    estimates: dict[str, Estimate] = Field(min_length=1)
    wall_s: dict[str, NonNegativeFloat] = Field(min_length=1)


def record(out: str | Path, section: dict) -> dict:
    """Merge a notebook's part into out/summary.json, and return the whole.

    Dictionaries are merged key by key, `questions` by their `question`; anything else is replaced. The file is
    replaced in whole, and two that record at once lose nothing.
    Raises ValueError for a key that the summary does not have.
    """
    if unknown := sorted(set(section) - set(Summary.model_fields)):
        raise ValueError(f"the summary has no {', '.join(unknown)}; it has {', '.join(Summary.model_fields)}")
    path = Path(out) / SUMMARY
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(".summary.lock")):
        try:
            summary = json.loads(path.read_bytes()) if path.exists() else {}
            if not isinstance(summary, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise UserError(f"{path} is not a summary ({error}): delete it, the notebooks write it anew.") from None
        _merge(summary, json.loads(json.dumps(section)))
        write_json(path, summary)
    return summary


def _merge(into: dict, part: dict) -> None:
    for key, value in part.items():
        if key == "questions":
            questions = {entry["question"]: entry for entry in into.setdefault(key, [])}
            for entry in value:
                if known := questions.get(entry["question"]):
                    _merge(known, entry)
                else:
                    into[key].append(entry)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def check_summary(summary: dict) -> list[str]:
    """What a complete out/summary.json lacks or has wrong."""
    try:
        Summary.model_validate_json(json.dumps(summary))
    except ValidationError as error:
        return [f"summary.json, {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return []
