"""Changing Qwen's own code so that it exports, and taking the change back.

The changes are the files in `patches/`, one a change, in the order of their numbers. What was there before is kept in
`patches.json` in the checkpoint's folder, so that every change can be taken back byte for byte. Files are replaced
whole: a patching that is killed leaves each file as it was or as it will be, and the same command goes on from there.
"""

import filecmp
import hashlib
import json
import os
import runpy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from helpers.errors import UserError
from helpers.files import json_object, link_or_copy, write_file, write_json
from helpers.patching.passages import MisfitError, NotNeededError, Source

FOLDER = Path(__file__).resolve().parents[2] / "patches"
RECORD = "patches.json"
FILES = ("modeling_qwen.py", "config.json")
# The documented sequence length.
SEQ_LENGTH = 512

APPLIED, NOT_APPLIED, NOT_NEEDED, MISFIT = "applied", "not applied", "not needed", "does not fit"


@dataclass(frozen=True)
class Patch:
    """One file of `patches/`: its name, the file it changes and the change itself."""

    name: str
    file: str
    change: Callable

    def outcome(self, text: str, seq_length: int) -> tuple[str, str, str]:
        """(state, note, the text afterwards) of trying it on a text."""
        try:
            python = self.file.endswith(".py")
            return APPLIED, "", self.change(Source(text)).text if python else self.change(text, seq_length)
        except NotNeededError as reason:
            return NOT_NEEDED, str(reason), text
        except MisfitError as reason:
            return MISFIT, str(reason), text


@dataclass(frozen=True)
class Step:
    """What one patch does to one checkpoint: its state (one of the constants above), a note, the text around it."""

    patch: Patch
    state: str
    note: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.patch.name:32} {self.state:12} {self.note}".rstrip()


@dataclass(frozen=True)
class Report:
    """What `apply` and `revert` did: the folder, the steps, the files that were written, what to be told."""

    folder: Path
    steps: list[Step]
    changed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = f"changed: {', '.join(self.changed)}" if self.changed else "nothing to change"
        return "\n".join([*map(str, self.steps), f"{self.folder}: {done}"])


@cache
def all_patches() -> tuple[Patch, ...]:
    """The patches in the order of application."""
    modules = {path.stem: runpy.run_path(str(path)) for path in sorted(FOLDER.glob("[0-9]*.py"))}
    return tuple(Patch(name, module["FILE"], module["change"]) for name, module in modules.items())


def apply(
    model_path: str | Path,
    out: str | Path | None = None,
    seq_length: int | None = None,
    only: Iterable[str] | None = None,
) -> Report:
    """Patch a checkpoint's modeling_qwen.py and config.json, in place or in a copy.

    out: a folder for a patched copy whose other files are links to the checkpoint's own (no weights are copied).
    seq_length: S for config.json; by default what it was patched for before, else 512 or, if less, the trained length.
    only: names or numbers of patches, in addition to those that are applied already; by default all.
    Applying again changes nothing. Raises UserError, with every file as it was, where a patch does not fit, where a
    file was edited since it was patched, and where the folder is not a checkpoint or cannot be written.
    """
    source = Path(model_path)
    target = source if out is None else Path(out)
    if seq_length is not None and (not isinstance(seq_length, int) or seq_length < 1):
        raise UserError(f"seq_length is {seq_length}; a whole number from 1 on was needed (the documented one is 512).")
    originals, record = _read(source)
    copying = target.absolute() != source.absolute()
    if copying:
        record = _read(target)[1] if (target / RECORD).exists() else {}
    trained = trained_seq_length(source)
    length = seq_length or record.get("seq_length") or min(SEQ_LENGTH, trained)
    steps = plan(originals, length, _chosen(only) | set(record.get("patches", ())))
    _check_plan(source, steps)
    if copying:
        _link(source, target, originals, follows=bool(record))
    warnings = beyond_trained(length, trained)
    if "self.audio = " in originals["modeling_qwen.py"]:
        warnings.append("this is Qwen-Audio: only its language model is patched and compiled, it reads text alone.")
    return Report(target, steps, _write(target, originals, steps, length), warnings)


def revert(model_path: str | Path, only: Iterable[str] | None = None) -> Report:
    """Take patches back, all or only some, byte for byte. A checkpoint that is not patched is left alone.

    Raises UserError where a file was edited since it was patched: nothing is overwritten then.
    """
    folder = Path(model_path)
    originals, record = _read(folder)
    if not record:
        return Report(folder, [], warnings=[f"{folder} has no {RECORD}: there is nothing to take back."])
    remaining = set(record["patches"]) - _chosen(only)
    steps = plan(originals, record["seq_length"], remaining)
    changed = _write(folder, originals, steps, record["seq_length"])
    if not remaining:
        (folder / RECORD).unlink()
    return Report(folder, steps, changed)


def status(model_path: str | Path) -> list[Step]:
    """What each patch has done, or would do, to a checkpoint. Changes nothing."""
    folder = Path(model_path)
    originals, record = _read(folder)
    length = record.get("seq_length") or min(SEQ_LENGTH, trained_seq_length(folder))
    steps = plan(originals, length, set(record.get("patches", ())))
    current = {name: _text(folder / name) for name in FILES}
    if current == _results(originals, steps):
        return steps
    # A patching was killed between its record and its files.
    note = "patching was interrupted: run it again"
    return [replace(s, state=NOT_APPLIED, note=note) if s.state == APPLIED else s for s in steps]


def plan(originals: dict[str, str], seq_length: int, chosen: set[str] | None = None) -> list[Step]:
    """What the chosen patches (default: all) make of the original texts of FILES, patch by patch."""
    texts = dict(originals)
    steps = []
    for patch in all_patches():
        before = texts[patch.file]
        state, note, after = patch.outcome(before, seq_length)
        if state == MISFIT:
            # Of the file as it is, where it does not fit either: patches before this one have moved the lines.
            unpatched_state, unpatched_note, _ = patch.outcome(originals[patch.file], seq_length)
            note = unpatched_note if unpatched_state == MISFIT else note
        if state == APPLIED and chosen is not None and patch.name not in chosen:
            state, after = NOT_APPLIED, before
        texts[patch.file] = after
        steps.append(Step(patch, state, note, before, after))
    return steps


def require_patched(model_path: str | Path) -> None:
    """Raise UserError unless a checkpoint's files are such that no patch has anything to change in them.

    Files that were patched by hand, as the documentation shows, are as good.
    """
    folder = Path(model_path)
    texts = {name: _text(folder / name) for name in FILES}
    config = json_object(folder / "config.json", texts["config.json"].encode())
    steps = plan(texts, config.get("seq_length", SEQ_LENGTH))
    _check_plan(folder, steps)
    if missing := [step.patch.name for step in steps if step.state == APPLIED]:
        raise UserError(
            f"{folder} is not patched: {', '.join(missing)} had to be applied first. Run `python -m helpers patch "
            f"--model_path {folder}`, with --out to leave this folder as it is."
        )
    try:
        originals, record = _read(folder)
    except UserError:
        return  # edited since: its owner's, as what was patched by hand without a record
    if record and texts != _results(originals, plan(originals, record["seq_length"], set(record["patches"]))):
        raise UserError(
            f"{folder} was patched by other code than this repository's own of today: run `python -m helpers patch` "
            f"again, as it was made ({RECORD} there has the originals, and nothing else is touched)."
        )


def trained_seq_length(model_path: str | Path) -> int:
    """The sequence length the model was trained for: config.json's before patching.

    Raises UserError where the folder is not a checkpoint.
    """
    folder = Path(model_path)
    file = folder / "config.json"
    length = json_object(file, _read(folder)[0][file.name].encode()).get("seq_length")
    if type(length) is not int or length < 1:
        raise UserError(f"{file} says seq_length = {length!r}; the trained length was needed there.")
    return length


def beyond_trained(seq_length: int, trained: int) -> list[str]:
    """What to warn of where S is more than the length the model was trained for; else nothing."""
    if seq_length <= trained:
        return []
    return [
        f"seq_length {seq_length} is more than the {trained} this model was trained for; beyond that Qwen scales its "
        "attention and rotation, which compiled nets do not: expect worse answers there."
    ]


def _chosen(only: Iterable[str] | None) -> set[str]:
    """Names of patches, of their names or numbers; by default all."""
    known = {key: patch.name for patch in all_patches() for key in (patch.name, patch.name.split("_")[0])}
    only = known if only is None else list(only)
    if unknown := [wanted for wanted in only if wanted not in known]:
        raise UserError(f"There is no patch {unknown[0]!r}; there are {', '.join(sorted(set(known.values())))}.")
    return {known[wanted] for wanted in only}


def _check_plan(folder: Path, steps: list[Step]) -> None:
    for step in steps:
        if step.state == MISFIT:
            raise UserError(
                f"Patch {step.patch.name} does not fit {folder / step.patch.file}, which was left as it was: "
                f"{step.note}\nTake the file of a published revision of Qwen-1.8B, 7B, 14B or 72B."
            )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path.parent} has no {path.name}: a folder with a first-generation Qwen checkpoint (config.json, "
            "modeling_qwen.py, the weights) was needed."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read ({error}): download it again.") from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(folder: Path) -> tuple[dict[str, str], dict]:
    """The texts of FILES before any patch, and the record ({} where there is none).

    Raises UserError where a file is neither as it was before patching nor as patching left it.
    """
    record_path = folder / RECORD
    if not record_path.exists():
        return {name: _text(folder / name) for name in FILES}, {}
    try:
        record = json.loads(record_path.read_bytes())
        originals = {name: record["files"][name]["original"] for name in FILES}
        known = {name: {_sha256(originals[name]), *record["files"][name]["patched_sha256"]} for name in FILES}
        if not isinstance(record["patches"], list) or not isinstance(record["seq_length"], int):
            raise TypeError("its patches or its seq_length are not what they should be")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{record_path} is not a readable record of patches ({error}): take modeling_qwen.py and config.json from "
            f"the checkpoint's repository again, delete {RECORD} and patch again."
        ) from None
    for name, accepted in known.items():
        # A file that is missing is one to restore.
        if (folder / name).exists() and _sha256(_text(folder / name)) not in accepted:
            raise UserError(
                f"{folder / name} was edited after it was patched, and was left as it is. To go back to the original, "
                f"move the edited file away and run `python -m helpers patch --revert`, which restores it; to keep the "
                f"edited file as your own original, delete {record_path}."
            )
    return originals, record


def _results(originals: dict[str, str], steps: list[Step]) -> dict[str, str]:
    """The texts of FILES that the steps end in."""
    return originals | {step.patch.file: step.after for step in steps}


def _write(folder: Path, originals: dict[str, str], steps: list[Step], seq_length: int) -> list[str]:
    """Bring FILES to what the steps end in; return the names of those that changed.

    The record goes first and accepts each file both as it is and as it will be, so that no moment of being killed
    leaves a file that the record does not know.
    """
    results = _results(originals, steps)
    current = {name: _text(folder / name) for name in FILES if (folder / name).exists()}
    patches = [step.patch.name for step in steps if step.state == APPLIED]
    files = {}
    for name in FILES:
        accepted = {_sha256(texts[name]) for texts in (current, results) if name in texts} - {_sha256(originals[name])}
        files[name] = {"patched_sha256": sorted(accepted), "original": originals[name]}
    for abandoned in folder.glob(".*.partial"):
        abandoned.unlink()
    write_json(folder / RECORD, {"patches": patches, "seq_length": seq_length, "files": files})
    for name in FILES:
        write_file(folder / name, results[name].encode())
    return [name for name in FILES if current.get(name) != results[name]]


def _link(source: Path, target: Path, originals: dict[str, str], follows: bool) -> None:
    """Make `target` a copy of a checkpoint: links to every file of `source` but FILES.

    follows: a copy that was made before, in which what has changed since is linked anew. Raises UserError where
    `target` is none and holds something else.
    """
    files = [file for file in sorted(source.iterdir()) if file.is_file() and not file.name.startswith(".")]
    places = {file: target / file.name for file in files if file.name not in (*FILES, RECORD)}
    there = [(file, place) for file, place in places.items() if place.exists()]
    # Of links to one file none is read.
    others = [file.name for file, place in there if not file.samefile(place) and not filecmp.cmp(file, place, False)]
    ours = [name for name in FILES if (target / name).exists() and _text(target / name) != originals[name]]
    if not follows and (foreign := [*others, *ours]):
        raise UserError(
            f"{target} has another {foreign[0]} than {source}: give --out a folder that does not exist, or delete this "
            "one."
        )
    target.mkdir(parents=True, exist_ok=True)
    for file, place in places.items():
        if file.name in others or not place.exists():
            partial = target / f".{file.name}.{os.getpid()}.partial"
            link_or_copy(file.resolve(), partial, os.link, os.symlink)  # a hard link does not reach another disk
            os.replace(partial, place)
