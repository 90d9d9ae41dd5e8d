"""The shared library of simulator_yield.c, as bytes: kept from an earlier time, or built by a C compiler of here."""

import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("simulator_yield.c")
# The file takes a compiler a tenth of a second. Only one that hangs is given up.
COMPILER_SECONDS = 300
DIGEST_BYTES = 32


def kept_file() -> Path:
    """Where the library is kept. The name holds the source's digest, so one of an older source is never taken."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-bm1684x"
    return cache / f"simulator_yield-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"


def candidates() -> Iterator[bytes | str]:
    """Libraries, the likeliest first, and in a sentence why one could not be had. Whether one loads is to be tried."""
    if library := _kept(kept_file()):
        yield library
    compilers = {}
    named = os.environ.get("CC", "")
    try:
        named = shlex.split(named)
    except ValueError:  # a quote that is not closed: it may be of the program's name
        named = [named]
    for command in (named, ["cc"], ["gcc"], ["clang"]):
        if command and (program := shutil.which(command[0])):
            compilers.setdefault((os.path.realpath(program), *command[1:]), (program, *command[1:]))
    if not compilers:
        yield "No C compiler (cc) was found: install one"
    for compiler in compilers.values():
        yield _built(compiler, SOURCE)


def keep(library: bytes) -> None:
    """Keep a library that was loaded for the next time, where this machine lets us."""
    file = kept_file()
    if _kept(file) == library:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            partial = Path(folder) / file.name
            partial.write_bytes(library + hashlib.sha256(library).digest())
            partial.chmod(0o644)
            os.replace(partial, file)
    except OSError:
        pass


def _kept(file: Path) -> bytes | None:
    """The library that was kept; None where there is none, it is damaged, or somebody else can have written it."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
            content = opened.read()
    except OSError:
        return None
    library, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    return library if hashlib.sha256(library).digest() == digest else None


@functools.cache
def _built(compiler: tuple[str, ...], source: Path) -> bytes | str:
    """The library that a compiler makes, or why it makes none; each compiler is asked once in a process."""
    failure = ""
    # Where a full disk leaves one folder without room, another may have some.
    for folder in (tempfile.gettempdir(), kept_file().parent, "/dev/shm"):
        try:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / "simulator_yield.so"
                done = subprocess.run(
                    [*compiler, "-O2", "-shared", "-fPIC", "-o", str(built), str(source), "-ldl"],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    env=os.environ | {"TMPDIR": scratch, "LC_ALL": "C"},
                    timeout=COMPILER_SECONDS,
                    check=False,
                )
                if done.returncode == 0:
                    return built.read_bytes()
                lines = done.stderr.decode(errors="replace").split("\n")
                said = next((line for line in lines if "error" in line), f"it ended with code {done.returncode}")
        except subprocess.TimeoutExpired:
            return f"{compiler[0]} gave no answer in {COMPILER_SECONDS} s"
        except OSError as error:
            said = str(error)
        failure = failure or f"{compiler[0]} could not build it: {said}"
    return failure
