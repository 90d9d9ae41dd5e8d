"""Bring a checkpoint here, from a model hub or a folder, and let it in only when it is whole and the right one.

    out/checkpoints/<name>/              the checkpoint and its manifest: source, revision, hashes
    out/checkpoints/.<name>.download/    what has come so far; the next call goes on from there

Artefacts that Sophgo offers ready-made come through helpers.fetch.prepared.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import artefacts, machine
from helpers.checkpoint.modeling import import_huggingface
from helpers.checkpoint.vocabulary import read_vocabulary
from helpers.checkpoint.weights import Checkpoint, opened
from helpers.errors import UserError
from helpers.fetch import prepared
from helpers.fetch.hubs import HUBS, download
from helpers.fetch.places import earlier_fetch, require_space
from helpers.files import digest_of, locked, sha256_file
from helpers.patching import patching

KIND = "checkpoint"
DEFAULT_FOLDER = Path("out/checkpoints")
# What an export needs beside the weights; all revisions of the four models have these.
CODE = ("modeling_qwen.py", "configuration_qwen.py")
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
) -> Path:
    """Bring a checkpoint, or a prepared artefact, here; return its folder or file. Run again, it does what is lacking.

    name: one of MODELS; may be left out where source is a folder. source: "huggingface", "modelscope", "dfss" or a
    folder, which is verified in place, and copied only where `out` is given. revision: by default the pinned one.
    artefact: one of prepared.ARTEFACTS, by dfss.
    Raises UserError for everything a user can cause: no answer, no space, wrong bytes, not the model that was asked.
    """
    if artefact is not None or source == "dfss":
        if revision is not None or source not in ("huggingface", "dfss") or name not in (None, prepared.MODEL):
            raise UserError(
                f"An --artefact comes by dfss, is of {prepared.MODEL} and has no revision: give no more than --out."
            )
        return prepared.fetch_prepared(artefact, out)
    if name not in MODELS and (name is not None or source in HUBS):
        raise UserError(f"Which model? Give --name, one of {', '.join(MODELS)}.")
    if source not in HUBS:
        if revision is not None:
            raise UserError(f"--revision {revision} is of a hub, a folder has none: leave it out.")
        return _from_folder(Path(source), name, None if out is None else Path(out))
    return _from_hub(name, str(source), Path(out or DEFAULT_FOLDER / name), revision)


# From a hub


def _from_hub(name: str, source: str, out: Path, revision: str | None) -> Path:
    import_huggingface()
    from huggingface_hub.utils import filter_repo_objects

    model = MODELS[name]
    revision = revision or (model.commit if source == "huggingface" else "master")
    settings = {"name": name, "source": source, "repo": model.repo, "revision": revision}
    previous = earlier_fetch(out, KIND)
    if previous.get("settings") == settings and _is_there(out, previous, name):
        machine.log(f"{out} is there already, whole: {model.repo} at {previous['revision']}")
        return out
    if previous:
        machine.log(f"{out} is of another source or was changed since it was fetched: it is replaced.")
    downloads = out.parent / f".{out.name}.download"
    present = sum(path.stat().st_size for path in downloads.rglob("*") if path.is_file())
    reusable = sum(described["bytes"] for described in previous.get("outputs", {}).values())
    require_space(out.parent, model.weight_bytes - present - reusable, name)
    listing = HUBS[source](model.repo, revision)
    twice = ["pytorch_model*"] if any(file.path.endswith(".safetensors") for file in listing.files) else []
    files = list(filter_repo_objects(listing.files, ignore_patterns=NOT_NEEDED + twice, key=lambda file: file.path))
    downloads.mkdir(parents=True, exist_ok=True)
    busy = f"Another fetch is writing to {downloads}: wait for it, or give another --out."
    with locked(downloads / "lock", busy):
        # Files are named as in the repository: those of another hub or commit are others.
        folder = downloads / f"{source}-{digest_of(listing.commit)[:12]}"
        for file in files:
            # What an earlier fetch brought, and is still whole.
            if not (folder / file.path).exists() and file.is_in(out) and sha256_file(out / file.path) == file.sha256:
                _place(out / file.path, folder / file.path)
        require_space(out.parent, sum(file.size - file.bytes_in(folder) for file in files), name)
        download(listing, files, folder)
        with artefacts.building(
            out,
            kind=KIND,
            inputs={file.path: file.sha256 or file.git_blob or str(file.size) for file in files},
            settings=settings,
            extra={"revision": listing.commit, "host": listing.host},
        ) as partial:
            for file in files:
                _place(folder / file.path, partial / file.path)
            verify(partial, name, as_folder=out)
        shutil.rmtree(downloads)
    return out


def _is_there(out: Path, manifest: dict, name: str | None) -> bool:
    """Whether all that was fetched is still there, and is a whole checkpoint."""
    # Of what was patched since, patching keeps the originals, and knows what was edited.
    patched = patching.FILES if (out / patching.RECORD).exists() else ()
    outputs = {path: described for path, described in manifest.get("outputs", {}).items() if path not in patched}
    if not artefacts.is_whole(out, manifest | {"outputs": outputs}):
        return False
    try:
        verify(out, name)
    except UserError:
        return False
    return True


def _place(content: Path, target: Path) -> None:
    """A second name for the same bytes: a kill between here and the move-in must not cost the download."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(content, target)
    except OSError:
        # A file system without hard links.
        shutil.copyfile(content, target)


# From a folder


def _from_folder(source: Path, name: str | None, out: Path | None) -> Path:
    if not source.is_dir():
        raise UserError(f"{source} is neither a folder nor a source by name: give one, or {', '.join(HUBS)} or dfss.")
    verify(source, name)
    place, there = (out or source).resolve(), source.resolve()
    if place == there:
        return source
    if place in there.parents or there in place.parents:
        raise UserError(f"{source} and {out} lie one in the other, so no copy is made: give an --out elsewhere.")
    files = sorted(_files_in(source, ()))
    inputs = {path: sha256_file(source / path) for path in files}
    previous = earlier_fetch(out, KIND)
    if previous.get("inputs") == inputs and _is_there(out, previous, name):
        return out
    require_space(out.parent, sum((source / path).stat().st_size for path in files), name or source.name)
    with artefacts.building(out, kind=KIND, inputs=inputs, settings={"name": name, "source": "folder"}) as partial:
        for path in files:
            target = partial / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)
        verify(partial, name, as_folder=out)
    return out


def _files_in(folder: Path, above: tuple[Path, ...], prefix: str = "") -> Iterator[str]:
    """The files in a folder and below, by their paths from it, and what links there lead to.

    Raises UserError for a link that leads nowhere, or back to a folder that it lies in.
    """
    above = (*above, folder.resolve())
    for path in folder.iterdir():
        if path.name in (".git", artefacts.MANIFEST):
            continue
        if path.is_symlink() and (not path.exists() or path.resolve() in above):
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which is not there or holds the link itself: delete the "
                "link, or bring what it should lead to."
            )
        if path.is_dir():
            yield from _files_in(path, above, f"{prefix}{path.name}/")
        elif path.is_file():
            yield prefix + path.name


# Whole, and the right one


def verify(folder: str | Path, name: str | None = None, as_folder: Path | None = None) -> None:
    """See that a checkpoint is whole, without reading a weight.

    Every shard of the index is there, each safetensors header fits the file's size and the configuration's shapes,
    code and vocabulary are there; with `name`, its sizes are that model's. as_folder: the folder to name in errors.
    Raises UserError with what is wrong.
    """
    folder = Path(folder)
    try:
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
    except UserError as error:
        if as_folder is None:
            raise
        raise UserError(str(error).replace(str(folder), str(as_folder))) from None
