"""Where the TPU-MLIR wheel is, whether it is well on this machine, and the environment its programs need.

Nothing here imports the wheel: importing it takes seconds, and a sick wheel would take this process with it.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.errors import UserError
from helpers.files import write_file
from helpers.home import private_folder

# The wheel bundles these three files of glibc and puts their folder first on the library path. Programs of a host
# with a newer glibc then load a mixture of both, and die; a host with an older glibc cannot do without them.
GLIBC_FILES = ("libc.so.6", "libm.so.6", "libpthread.so.0")
# Where they are: on the library path, or on none (on the same file system, so moving is a rename).
_GLIBC_FOLDERS = {"active": "lib/third_party", "aside": "lib/glibc-bundled"}
# What importing the wheel sets, in places of the wheel: what comes first in lists of paths, and single paths.
_LISTS = {
    "PATH": (
        *("bin", "python/tools", "python/utils", "python/test", "python/samples"),
        *("customlayer/python", "cross_toolchains/ppl_compile/bin"),
    ),
    "PYTHONPATH": ("", "python", "customlayer/python"),
    "LD_LIBRARY_PATH": ("lib", "lib/capi", "lib/third_party"),
}
_PATHS = {
    "TPUC_ROOT": "",
    "PPL_PROJECT_ROOT": "cross_toolchains/ppl_compile",
    "PPL_BUILD_PATH": "build/ppl",
    "PPL_RUNTIME_PATH": "cross_toolchains/ppl_compile/deps",
    "TPUKERNEL_CUSTOM_FIRMWARE_PATH": "lib/libcmodel_custom.so",
    "CUSTOM_LAYER_UNITTEST_DIR": "customlayer/test_if/unittest",
}
# What environment() sets for the wheel's programs.
VARIABLES = (*_LISTS, "OMP_NUM_THREADS", *_PATHS)
# What envsetup.sh of a source checkout sets, for programs that the wheel has too: not passed on.
SDK_VARIABLES = (
    *_PATHS,
    *("CUSTOM_LAYER_PATH", "PPL_INSTALL_PATH", "PPL_THIRD_PARTY_PATH", "PPL_WORK_PATH", "PPL_CACHE_PATH"),
    *("USING_CMODEL", "FORBID_GEN_RISCV_CODE"),
)
# The kernels of fused attention: the library that has them built takes a lock of everybody's in /tmp.
_KERNEL_LIBRARY = "libppl_host.so"
_EVERYBODYS_LOCK, _OWN_LOCK = b"/tmp/ppl_", b".././ppl_"


def is_plain(path: str | Path) -> bool:
    """Whether no shell, make, cmake or list of paths takes a character of a path for its own."""
    return re.fullmatch(r"[\w/.,+=@%-]*", str(path)) is not None


def plain_parent() -> str:
    """A folder for temporary ones, whose path is plain and which allows libraries to be loaded. Raises UserError."""
    folders = [folder for folder in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm") if folder]
    for folder in folders:
        usable = is_plain(folder) and os.access(folder, os.W_OK | os.X_OK)
        if usable and not os.statvfs(folder).f_flag & os.ST_NOEXEC:
            return os.path.abspath(folder)
    raise UserError(
        "TPU-MLIR needs a folder for temporary files that may be written, is not mounted noexec and has no special "
        f"characters in its name; {', '.join(folders)} will not do: set TMPDIR to another."
    )


@functools.cache
def _scratch() -> Path:
    return Path(private_folder(plain_parent(), "toolchain"))


def plain(path: Path) -> Path:
    """The path, or another way to it through a link in a temporary folder where its own is not plain."""
    if is_plain(path):
        return path
    root = Path(sys.prefix) if path.is_relative_to(sys.prefix) else path
    link = _scratch() / hashlib.sha256(bytes(root)).hexdigest()[:8]
    with contextlib.suppress(FileExistsError):
        link.symlink_to(root)
    return link / path.relative_to(root)


def wheel_path() -> Path:
    """The folder of the installed tpu_mlir package, by a plain path. Raises UserError where it is not installed."""
    spec = importlib.util.find_spec("tpu_mlir")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"TPU-MLIR is not installed for {sys.executable}: run `make setup` on x86-64 Linux.")
    return plain(Path(next(iter(spec.submodule_search_locations))))


def host_glibc() -> tuple[int, ...]:
    """Version of this machine's glibc, such as (2, 36); () where the C library is another one."""
    library, version = platform.libc_ver()
    return tuple(map(int, version.split(".")[:2])) if library == "glibc" else ()


def glibc_state(wheel: Path) -> tuple[str, bool, str]:
    """Where the wheel's own glibc files are ("active", "aside", "absent"), whether that suits this machine, and why."""
    there = (state for state, at in _GLIBC_FOLDERS.items() if any((wheel / at / name).exists() for name in GLIBC_FILES))
    state = next(there, "absent")
    libc = wheel / _GLIBC_FOLDERS.get(state, "") / "libc.so.6"
    found = re.search(rb"GNU C Library[^\n]*version (\d+)\.(\d+)", libc.read_bytes() if libc.is_file() else b"")
    host, bundle = host_glibc(), tuple(map(int, found.groups())) if found else ()
    shown = f"host {'.'.join(map(str, host)) or 'unknown'}, bundle {'.'.join(map(str, bundle)) or '?'} {state}"
    return state, not (state == "active" and host > bundle or state == "aside" and host and host < bundle), shown


def cure(wheel: Path) -> list[str]:
    """Move the wheel's glibc files aside if this machine's glibc is newer, back if it is older; return their names.

    They are kept in the wheel: the environment may be carried to another machine.
    Raises UserError where the folder cannot be written.
    """
    state, suits, found = glibc_state(wheel)
    if suits:
        return []
    source, target = (wheel / _GLIBC_FOLDERS[place] for place in (state, "aside" if state == "active" else "active"))
    moved = [name for name in GLIBC_FILES if (source / name).exists()]
    try:
        target.mkdir(exist_ok=True)
        for name in moved:
            os.replace(source / name, target / name)
    except OSError as error:
        raise UserError(
            f"The wheel's own glibc does not suit this machine ({found}) and cannot be moved ({error}): run "
            "`python -m helpers doctor --fix` as the user who owns the environment."
        ) from error
    return moved


def other_sdk() -> dict[str, str]:
    """Variables of the environment by which another TPU-MLIR would come between the wheel and its own files.

    envsetup.sh sets PROJECT_ROOT, INSTALL_PATH and BUILD_PATH, too: compiling reads none of them, and others set them.
    """
    wheel = os.path.realpath(wheel_path())
    found = {name: os.environ[name] for name in SDK_VARIABLES if os.environ.get(name)}
    return {name: value for name, value in found.items() if not os.path.realpath(value).startswith(wheel)}


@functools.cache
def own_kernel_library(locks: bool) -> Path | None:
    """The wheel's library that builds kernels, with a lock that is not everybody's; None for a wheel without it.

    As it comes, it opens a lock in /tmp that is named after the kernel, and stays: whoever is not its owner may not
    open it, on most systems whatever its mode (fs.protected_regular). locks: the lock is in the folder above the
    current one; else none is taken, by flock's name being that of a harmless function.
    """
    library = wheel_path() / "lib" / _KERNEL_LIBRARY
    if not library.is_file():
        return None
    code = library.read_bytes().replace(_EVERYBODYS_LOCK, _OWN_LOCK)
    code = code if locks else code.replace(b"\0flock\0", b"\0fsync\0")
    own = _scratch() / f"kernels-{hashlib.sha256(code).hexdigest()[:8]}" / _KERNEL_LIBRARY
    own.parent.mkdir(exist_ok=True)
    write_file(own, code)
    return own


def environment(threads: int | None = None, kernel_locks: bool = True) -> dict[str, str]:
    """The environment that the wheel's programs need, as importing tpu_mlir would set it, without another TPU-MLIR's.

    threads: OMP_NUM_THREADS for them. kernel_locks: whether processes that share a PPL_CACHE_PATH take turns, by a lock
    in the folder above their current one. The folder of this Python is on the PATH: cmake and ninja, without which the
    compiler silently loses its fused attention, are installed there.
    """
    wheel, kernels = wheel_path(), own_kernel_library(kernel_locks)
    # envsetup.sh has TPUC_ROOT in the checkout's folder install; its Python is beside that.
    places = [path.rstrip("/").removesuffix("/install") for path in other_sdk().values() if path.startswith("/")]
    foreign = tuple(f"{place}/" for place in places if place)
    own = {name: [wheel / folder for folder in folders] for name, folders in _LISTS.items()}
    own["PATH"].append(plain(Path(sys.executable).parent))
    if kernels:
        own["LD_LIBRARY_PATH"].insert(0, kernels.parent)
    env = {name: value for name, value in os.environ.items() if name not in SDK_VARIABLES}
    for name, folders in own.items():
        rest = [entry for entry in env.get(name, "").split(os.pathsep) if entry and not f"{entry}/".startswith(foreign)]
        env[name] = os.pathsep.join(map(str, [*folders, *rest]))
    env |= {name: str(wheel / place) for name, place in _PATHS.items()}
    # The wheel's own start-up warns of pkg_resources in every process: with PYTHONWARNINGS=error it would not start.
    env["PYTHONWARNINGS"] = "ignore"
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


def program(name: str) -> str | None:
    """Path of a program of this Python's folder or of the PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def missing_imports() -> list[str]:
    """Packages that the wheel imports and does not declare, and that are not installed."""
    undeclared = ("psutil", "pkg_resources", "torch", "onnx", "onnxsim", "onnxruntime", "transformers")
    return [name for name in undeclared if importlib.util.find_spec(name) is None]


def require() -> None:
    """Raises UserError, with the remedy, where the tool chain cannot work on this machine. Cures the glibc bundle."""
    wheel = wheel_path()
    cure(wheel)
    if missing := missing_imports():
        raise UserError(f"TPU-MLIR needs {', '.join(missing)}, which the environment lacks: run `make setup`.")
    for name in ("cmake", "ninja"):
        if not program(name):
            lost = f"{name} is not on the PATH, without it the compiler silently loses its fused attention"
            raise UserError(f"{lost}: run `make setup`.")


def require_parallel() -> str:
    """What GNU parallel, which llm_convert needs, says of itself. Raises UserError where there is none."""
    path = shutil.which("parallel")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout if path else ""
    if "GNU parallel" not in said:
        raise UserError(
            "The one-click converter (--via llm_convert) runs its jobs through GNU parallel, which is not installed "
            "(moreutils has another of that name): `apt-get install parallel`, or compile with --via onnx."
        )
    return said.splitlines()[0]
