"""The shared library of simulator_yield.c, which a C compiler of this machine makes in some fifty milliseconds."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("simulator_yield.c")
# Only a compiler that hangs is given up.
COMPILER_SECONDS = 60


def libraries(folder: Path) -> Iterator[int | str]:
    """For each compiler, in turn: the library it made, as a file descriptor, or why there is none, in a sentence.

    folder: to work in. Whether a library is loaded is to be tried: CC may be for another machine. The descriptor is
    closed when the next one is asked for.
    """
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quote that is not closed
        named = []
    compilers = [command for command in (named, ["cc"], ["gcc"], ["clang"]) if command and shutil.which(command[0])]
    if not compilers:
        yield "No C compiler (cc) was found: install one"
    for command in compilers:
        built = folder / "simulator_yield.so"
        try:
            subprocess.run(
                [*command, "-O2", "-shared", "-fPIC", "-o", built, SOURCE, "-ldl"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=os.environ | {"TMPDIR": str(folder), "LC_ALL": "C"},
                timeout=COMPILER_SECONDS,
                check=True,
            )
            library = _opened(built)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").splitlines()
            said = next((line for line in lines if "error" in line), f"it ended with code {error.returncode}")
            yield f"{command[0]} could not build it: {said}"
        except (OSError, subprocess.TimeoutExpired) as error:
            yield f"{command[0]} could not build it: {error}"
        else:
            with os.fdopen(library):
                yield library


def _opened(built: Path) -> int:
    """A copy on no disk, which no mount forbids to run; the file itself where the system has or allows no such copy."""
    try:
        copy = os.memfd_create("simulator_yield")
    except (AttributeError, OSError):
        return os.open(built, os.O_RDONLY)
    with open(copy, "wb", closefd=False) as file:
        file.write(built.read_bytes())
    return copy
