"""Where the TPU-MLIR wheel is, whether it is well on this machine, and the environment its programs need.

Nothing here imports the wheel: importing it takes seconds, and a sick wheel would take this process with it.
`python -m helpers.toolchain` cures what can be cured and prints the state of everything.
"""

import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from helpers.errors import UserError

# The wheel bundles these three files of glibc and puts their folder first on the library path. Programs of a host
# with a newer glibc then load a mixture of both, and die; a host with an older glibc cannot do without them.
GLIBC_FILES = ("libc.so.6", "libm.so.6", "libpthread.so.0")
# What environment() sets for the wheel's programs.
VARIABLES = (
    *("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TPUC_ROOT", "PPL_PROJECT_ROOT", "PPL_BUILD_PATH"),
    *("PPL_RUNTIME_PATH", "TPUKERNEL_CUSTOM_FIRMWARE_PATH", "CUSTOM_LAYER_UNITTEST_DIR"),
)
# Imported by the wheel, not declared by it.
UNDECLARED = ("psutil", "pkg_resources", "torch", "onnx", "onnxsim", "onnxruntime", "transformers")


@dataclass(frozen=True)
class Finding:
    """One line of the health report. remedy: what to do where it is not ok, else empty."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def wheel_path() -> Path:
    """The folder of the installed tpu_mlir package. Raises UserError where it is not installed."""
    spec = importlib.util.find_spec("tpu_mlir")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"TPU-MLIR is not installed for {sys.executable}: run `make setup` (its wheel needs Python 3.10 on x86-64 "
            "Linux)."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def wheel_version() -> str:
    """Installed version of the wheel. Raises UserError where there is none."""
    wheel_path()
    return metadata.version("tpu-mlir")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def host_glibc() -> tuple[int, ...]:
    """Version of this machine's glibc, such as (2, 36); () where the C library is another one."""
    try:
        return _version(os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (ValueError, OSError):
        return ()


def _third_party(wheel: Path) -> Path:
    return wheel / "lib" / "third_party"


def _aside(wheel: Path) -> Path:
    # Not on any library path; on the same file system, so moving is a rename.
    return wheel / "lib" / "glibc-bundled"


def _glibc_of(folder: Path) -> tuple[int, ...]:
    libc = folder / "libc.so.6"
    if not libc.is_file():
        return ()
    found = re.search(rb"GNU C Library[^\n]*version (\d+\.\d+)", libc.read_bytes())
    return _version(found[1].decode()) if found else ()


def glibc_state(wheel: Path | None = None) -> tuple[str, tuple[int, ...]]:
    """("active" | "aside" | "absent", version of the bundle or ()): where the wheel's own glibc files are."""
    wheel = wheel or wheel_path()
    if any((_third_party(wheel) / name).exists() for name in GLIBC_FILES):
        return "active", _glibc_of(_third_party(wheel))
    if any((_aside(wheel) / name).exists() for name in GLIBC_FILES):
        return "aside", _glibc_of(_aside(wheel))
    return "absent", ()


def _glibc_finding(wheel: Path) -> Finding:
    state, bundle = glibc_state(wheel)
    host = host_glibc()
    shown = f"host {'.'.join(map(str, host)) or 'unknown'}, bundle {'.'.join(map(str, bundle)) or '?'} {state}"
    if state == "active" and host > bundle:
        return Finding("glibc of the wheel", False, shown, "python -m helpers.toolchain moves it aside")
    if state == "aside" and host and host < bundle:
        return Finding("glibc of the wheel", False, shown, "python -m helpers.toolchain brings it back")
    return Finding("glibc of the wheel", True, shown)


def cure(wheel: Path | None = None) -> list[str]:
    """Move the wheel's glibc files aside if this machine's glibc is newer, back if it is older; return their names.

    They are kept in lib/glibc-bundled of the wheel: the environment may be carried to another machine.
    Raises UserError where the folder cannot be written.
    """
    wheel = wheel or wheel_path()
    finding = _glibc_finding(wheel)
    if finding.ok:
        return []
    source, target = _third_party(wheel), _aside(wheel)
    if glibc_state(wheel)[0] == "aside":
        source, target = target, source
    moved = [name for name in GLIBC_FILES if (source / name).exists()]
    try:
        target.mkdir(exist_ok=True)
        for name in moved:
            os.replace(source / name, target / name)
    except OSError as error:
        raise UserError(
            f"The wheel's own glibc does not suit this machine ({finding.found}) and cannot be moved ({error}): run "
            "`python -m helpers.toolchain` as the user who owns the environment."
        ) from error
    return moved


def environment(threads: int | None = None) -> dict[str, str]:
    """The environment that the wheel's programs need, as importing tpu_mlir would set it.

    threads: OMP_NUM_THREADS for them. The folder of this Python comes first on the PATH: cmake and ninja, without
    which the compiler silently loses its fused attention, are installed there.
    """
    wheel = wheel_path()
    ppl = wheel / "cross_toolchains" / "ppl_compile"
    python = wheel / "python"
    env = dict(os.environ)

    def prepend(name: str, *folders: Path) -> None:
        env[name] = os.pathsep.join([*map(str, folders), *filter(None, [env.get(name)])])

    prepend(
        "PATH",
        wheel / "bin",
        *(python / name for name in ("tools", "utils", "test", "samples")),
        wheel / "customlayer" / "python",
        ppl / "bin",
        Path(sys.executable).parent,
    )
    prepend("PYTHONPATH", wheel, python, wheel / "customlayer" / "python")
    prepend("LD_LIBRARY_PATH", wheel / "lib", wheel / "lib" / "capi", wheel / "lib" / "third_party")
    env.setdefault("TPUC_ROOT", str(wheel))
    env.setdefault("PPL_PROJECT_ROOT", str(ppl))
    env.setdefault("PPL_BUILD_PATH", str(wheel / "build" / "ppl"))
    env.setdefault("PPL_RUNTIME_PATH", str(ppl / "deps"))
    env.setdefault("TPUKERNEL_CUSTOM_FIRMWARE_PATH", str(wheel / "lib" / "libcmodel_custom.so"))
    env.setdefault("CUSTOM_LAYER_UNITTEST_DIR", str(wheel / "customlayer" / "test_if" / "unittest"))
    # The wheel's own start-up warns of pkg_resources in every process.
    env.setdefault("PYTHONWARNINGS", "ignore")
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def _bytecode_finding(wheel: Path) -> Finding:
    converter = wheel / "python" / "transform" / "OnnxConverter.py"
    compiled = Path(importlib.util.cache_from_source(str(converter))).exists()
    return Finding(
        "bytecode of the wheel",
        compiled,
        "compiled" if compiled else "not compiled: every start of a tool takes some 10 s longer",
        "" if compiled else f"python -m compileall -q -j 0 {wheel.parent}",
    )


def sophon_sail() -> tuple[str, str]:
    """("absent" | "placeholder" | "real", where): PyPI's `sophon` is an empty file, the real one comes with the SDK."""
    spec = importlib.util.find_spec("sophon")
    if spec is None or not spec.submodule_search_locations:
        return "absent", ""
    for folder in map(Path, spec.submodule_search_locations):
        if found := sorted(folder.glob("sail*.so")) + sorted(folder.glob("sail/*.so")):
            return "real", str(found[0])
        if (folder / "sail.py").is_file():
            kind = "real" if (folder / "sail.py").read_bytes().strip() else "placeholder"
            return kind, str(folder / "sail.py")
    return "placeholder", str(next(iter(spec.submodule_search_locations)))


def health() -> list[Finding]:
    """The state of everything that compiling needs, for the doctor; never raises."""
    findings = []
    machine = f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}"
    right = sys.version_info[:2] == (3, 10) and platform.machine() == "x86_64" and sys.platform == "linux"
    findings.append(
        Finding("python for the wheel", right, machine, "" if right else "it is built for Python 3.10, x86-64 Linux")
    )
    try:
        wheel = wheel_path()
        findings.append(Finding("tpu-mlir", True, wheel_version()))
        findings.append(_glibc_finding(wheel))
        findings.append(_bytecode_finding(wheel))
    except UserError:
        findings.append(Finding("tpu-mlir", False, "not installed", "make setup"))
    for name in ("cmake", "ninja"):
        found = _program(name)
        lost = "not found: the compiler would silently lose its fused attention"
        findings.append(Finding(name, bool(found), found or lost, "" if found else f"pip install {name}"))
    missing = [name for name in UNDECLARED if importlib.util.find_spec(name) is None]
    findings.append(
        Finding(
            "what the wheel imports",
            not missing,
            "missing: " + ", ".join(missing) if missing else "complete",
            "make setup" if missing else "",
        )
    )
    return findings


def require() -> None:
    """Raises UserError, with the remedy, where the tool chain cannot work on this machine. Cures the glibc bundle."""
    wheel = wheel_path()
    cure(wheel)
    if missing := [name for name in UNDECLARED if importlib.util.find_spec(name) is None]:
        raise UserError(f"TPU-MLIR needs {', '.join(missing)}, which the environment lacks: run `make setup`.")
    for name in ("cmake", "ninja"):
        if not _program(name):
            raise UserError(
                f"{name} is not on the PATH, without it the compiler silently loses its fused attention: run "
                f"`make setup`, or install the Python package {name}."
            )


def require_parallel() -> str:
    """Path of GNU parallel, which llm_convert needs. Raises UserError where it is missing or another `parallel`."""
    import subprocess

    path = shutil.which("parallel")
    if path:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if "GNU parallel" in answer.stdout:
            return path
    found = f"{path} is another program of that name" if path else "it is not installed"
    raise UserError(
        f"The one-click converter (--via llm_convert) runs its jobs through GNU parallel, and {found}: install it "
        "(Debian, Ubuntu: apt-get install parallel), or compile with --via onnx."
    )


def main() -> int:
    """Cure what can be cured, print the report; 0 if all is well."""
    for name in cure():
        print(f"moved {name}")
    findings = health()
    for finding in findings:
        print(f"{'OK    ' if finding.ok else 'NOT OK'}  {finding.name}: {finding.found}")
        if finding.remedy:
            print(f"        remedy: {finding.remedy}")
    return 0 if all(finding.ok for finding in findings) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
