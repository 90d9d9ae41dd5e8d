"""Artefacts that Sophgo offers ready-made, by its own download tool dfss.

dfss 1.10.9 runs a program of its own over SFTP: it measures its servers' speed first (two minutes, it says, three
times over where none answers), shows no total, does not resume and verifies nothing. So its silence is bounded, and
what it brings is verified by what it is: a bmodel, or an archive with checksums.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from helpers import artefacts, machine
from helpers.bmodel.bmodel import CHIP, read_bmodel
from helpers.errors import UserError
from helpers.fetch.places import earlier_fetch
from helpers.files import DISK_IS_FULL, sha256_file

MODEL = "qwen-7b"
DEFAULT_FOLDER = Path("out/prepared")
# Seconds without a byte, far above what a slow server takes: before the first one come three rounds of two minutes.
STALL = 1200.0

# Their places after "open@sophgo.com:", as the documentation of LLM-TPU and sophon-demo has them.
ARTEFACTS = {
    "onnx-512": "/LLM/qwen_512.zip",
    "onnx-8k": "/LLM/qwen_8k.zip",
    "onnx-8k-jacobi": "/LLM/qwen_8k_jacobi.zip",  # for lookahead
    "bmodel-int4": "/LLM/LLM-TPU/qwen-7b_int4_1dev.bmodel",  # addr_mode io_alone
    "bmodel-int4-none-addr": "/LLM/LLM-TPU/qwen-7b_int4_1dev_none_addr.bmodel",  # addr_mode basic
    "bmodel-int4-512": "/ext_model_information/LLM/LLM-TPU/qwen-7b_int4_1dev_seq512.bmodel",  # LLM-TPU of today
    "bmodel-int4-512-demo": "sophon-demo/Qwen/qwen/qwen-7b_int4_seq512_1dev.bmodel",
    "token-config": "sophon-demo/Qwen/token_config.zip",  # tokenizer files
}


def fetch_prepared(artefact: str | None, out: str | Path | None = None) -> Path:
    """Bring a prepared artefact here: a bmodel as a file in the folder `out`, an archive unpacked as the folder `out`.

    out: by default a place in out/prepared. What is there and whole is not fetched again.
    Raises UserError where dfss is absent, no server answers, it fails or falls silent, or what it brings is not whole.
    """
    if artefact not in ARTEFACTS:
        raise UserError(f"Which prepared artefact? Give --artefact, one of {', '.join(ARTEFACTS)}.")
    place = ARTEFACTS[artefact]
    name = PurePosixPath(place).name
    archive = name.endswith(".zip")
    target = Path(out or DEFAULT_FOLDER / artefact) if archive else Path(out or DEFAULT_FOLDER) / name
    settings = {"artefact": artefact, "place": place}
    previous = earlier_fetch(target, "prepared")
    if previous.get("settings") == settings and artefacts.is_whole(target, previous):
        machine.log(f"{target} is there already, whole.")
        return target
    if importlib.util.find_spec("dfss") is None:
        raise UserError("The package dfss, Sophgo's download tool, is absent: `pip install dfss` into this Python.")
    inputs: dict[str, str] = {}
    with artefacts.building(target, kind="prepared", inputs=inputs, settings=settings) as partial:
        # dfss cannot go on with half a file: it goes with the folder that this is built in.
        file = _run_tool(place, partial.parent)
        inputs[name] = sha256_file(file)
        if archive:
            unpack(file, partial)
        elif (chip := read_bmodel(file).chip).upper() != CHIP:
            raise UserError(f"{name} is for the chip {chip}, {CHIP} was needed: Sophgo offers another file by now.")
    return target


def next_step(artefact: str, path: Path) -> str:
    """What to do with an artefact that was fetched, in one line."""
    if artefact.startswith("onnx"):
        nets = next((block.parent for block in path.rglob("block_0.onnx")), path)
        return f"next: python -m helpers compile --name {MODEL} --mode int4 --onnx {nets} --out out/{MODEL}"
    model = path if artefact.startswith("bmodel") else "FILE.bmodel"
    return f"next: python -m helpers chat --model {model} --tokenizer FOLDER  (token-config's, or a checkpoint's)"


def _run_tool(place: str, folder: Path) -> Path:
    """Have dfss bring a file into the folder. Raises UserError where it fails, with what it said, or falls silent."""
    file = folder / PurePosixPath(place).name
    with tempfile.TemporaryFile() as said, tqdm(desc=file.name, unit="B", unit_scale=True) as bar:
        tool = subprocess.Popen(
            [sys.executable, "-m", "dfss", f"--url=open@sophgo.com:{place}"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            # dfss is a Python that starts a shell that starts a program: they end together.
            start_new_session=True,
        )
        try:
            since, status = time.monotonic(), None
            while status is None:
                status = tool.poll()
                size = sum(path.stat().st_size for path in folder.iterdir())
                if size != bar.n:
                    bar.update(size - bar.n)
                    since = time.monotonic()
                elif time.monotonic() - since > STALL:
                    raise UserError(
                        f"Sophgo's download server (dfss) fell silent: {size} bytes came, and none for {STALL:g} s. "
                        "Try again later or in another network, or make the artefact yourself from the checkpoint."
                    )
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tool.pid, signal.SIGKILL)
            tool.wait()
        said.seek(0)
        last = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()][-2:]
    if status != 0 or not file.is_file():
        raise UserError(
            f"Sophgo's download server did not give {file.name}; dfss said: {' | '.join(last) or 'nothing'}. Its port "
            "may be closed in your network, or the file was moved: try another network, look in the README of LLM-TPU, "
            "or make it yourself (`python -m helpers export`, `compile`)."
        )
    return file


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip archive into a new folder. Raises UserError where it is damaged or holds no file."""
    try:
        with zipfile.ZipFile(archive) as content:
            # Checks each member's CRC-32, makes no links, and leaves "/" and ".." before a name out.
            content.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        if getattr(error, "errno", None) in DISK_IS_FULL:
            raise
        raise UserError(f"{archive.name} is damaged or cannot be unpacked here ({error}): fetch it again.") from None
    if not any(path.is_file() for path in folder.rglob("*")):
        raise UserError(f"{archive.name} holds no file: Sophgo offers another one by now.")
