"""Builds simulator_yield.c once on each machine, where it has a C compiler."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("simulator_yield.c")


def path() -> Path | None:
    """The shared library to preload, built at first use; None where there is no C compiler or it fails.

    The cache is $XDG_CACHE_HOME or ~/.cache; a file's name holds its source's digest, so an old one is never taken.
    """
    source = SOURCE.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-bm1684x"
    library = cache / f"simulator_yield-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(built), str(SOURCE), "-ldl"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            os.replace(built, library)
    except (OSError, subprocess.SubprocessError):
        return None
    return library
