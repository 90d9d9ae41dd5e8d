"""The doctor: what this machine has, what it lacks, and the remedy; every bug report can carry its output.

Three states: OK; NOT OK, where the tutorial cannot work without it; optional, where it can, and the line says what is
lost. A machine that has a chip and the real sophon.sail runs bmodels and need not be able to compile them.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote

from helpers import machine, toolchain
from helpers.errors import UserError
from helpers.run import sail_package

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "qwen-bm1684x-tutorial"  # as pyproject.toml has it
OK, NOT_OK, OPTIONAL = "OK", "NOT OK", "optional"
GB = 1e9
# Measured: compiling the embedded model takes 1.4 GB a net, its artefacts 0.5 GB; less than this cannot end well.
NEEDED_MEMORY = NEEDED_DISK = 2 * GB
# What PyPI's CUDA build of torch needs and the CPU build does not.
CUDA_ONLY = re.compile(r"(nvidia-|cuda-|triton$)")


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report. remedy: what to do where the state is not OK."""

    name: str
    state: str
    found: str
    remedy: str = ""


def _check(name: str, ok: object, found: str, remedy: str = "", needed: bool = False) -> Check:
    return Check(name, OK, found) if ok else Check(name, NOT_OK if needed else OPTIONAL, found, remedy)


def _run(*command: str | Path, seconds: float = 600, **options) -> tuple[str, str]:
    """How a program fails, empty where it does not, and what it prints. After so many seconds it is taken to hang."""
    options |= {"capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, timeout=seconds, check=False, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error), ""
    if not done.returncode:
        return "", done.stdout.strip()
    said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[0]
    return f"dies with {done.returncode}: {said}", ""


def check_toolchain(needed: bool = True) -> list[Check]:
    """The wheel, what it needs around it, and whether its compiler really starts here; never raises."""
    found = f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}"
    right = sys.version_info[:2] == (3, 10) and platform.machine() == "x86_64" and sys.platform == "linux"
    checks = [_check("python for the wheel", right, found, "it is built for Python 3.10, x86-64 Linux", needed)]
    try:
        checks += _check_wheel(toolchain.wheel_path(), needed)
    except UserError as error:
        checks.append(_check("tpu-mlir", False, str(error), "make setup", needed))
    for name in ("cmake", "ninja"):
        path = toolchain.program(name)
        lost = "not found: the compiler would silently lose its fused attention"
        checks.append(_check(name, path, path or lost, f"pip install {name}", needed))
    missing = toolchain.missing_imports()
    found = "missing: " + ", ".join(missing) if missing else "complete"
    return [*checks, _check("what the wheel imports", not missing, found, "make setup", needed)]


def _check_wheel(wheel: Path, needed: bool) -> list[Check]:
    _, suits, found = toolchain.glibc_state(wheel)
    fix = "python -m helpers doctor --fix"
    checks = [
        Check("tpu-mlir", OK, metadata.version("tpu-mlir")),
        _check("glibc of the wheel", suits, found, f"{fix} moves it aside, or brings it back", needed),
    ]
    if foreign := toolchain.other_sdk():
        # What follows from them is mended in toolchain.environment(); programs that are started by hand meet them.
        shown = "set and passed over: " + ", ".join(f"{name}={value}" for name, value in foreign.items())
        checks.append(Check("another TPU-MLIR", OPTIONAL, shown, f"unset {' '.join(foreign)}"))
    failure, _ = _run(wheel / "bin" / "tpuc-opt", "--version", env=toolchain.environment())
    return [*checks, _check("tpuc-opt", not failure, failure or "starts", f"{fix}, or make setup", needed)]


def check_pins(requirements: Path = ROOT / "requirements.txt", needed: bool = True) -> Check:
    """Whether the installed packages are those that requirements.txt pins."""

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE))
    installed = {canonical(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}
    cpu_build = installed.get("torch", "").endswith("+cpu")
    wrong = []
    for name, version in pins.items():
        found = installed.get(canonical(name))
        if found is None and not (cpu_build and CUDA_ONLY.match(name)):
            wrong.append(f"{name} is missing")
        elif found and found.split("+")[0] != version:
            wrong.append(f"{name} is {found}, pinned {version}")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    found = "; ".join(wrong[:3]) + more or f"all {len(pins)} packages as pinned"
    return _check("packages", not wrong, found, "make setup", needed)


def check_helpers_importable() -> Check:
    """Whether `import helpers` works in a notebook, whose working folder is notebooks/: installed, of this copy."""
    try:
        url = json.loads(metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}").get("url", "")
    except metadata.PackageNotFoundError:
        url = ""
    folder = unquote(url).removeprefix("file://")
    ok = folder == str(ROOT)
    found = "in every folder" if ok else f"of {folder}, another copy" if folder else "in this folder only"
    remedy = "make setup (conda: pip install --no-deps --no-build-isolation -e .)"
    return _check("import helpers", ok, found, remedy)


def check_cpu() -> Check:
    """Model and usable cores."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return Check("CPU", OK, f"{model[1].strip() if model else os.uname().machine}, {machine.cores()} cores")


def check_memory() -> Check:
    """Memory that is free for the compiler."""
    free, total = machine.memory()
    remedy = f"close programs: compiling needs {NEEDED_MEMORY / GB:.0f} GB, a 7B block 9 GB"
    return _check("memory", free >= NEEDED_MEMORY, f"{free / GB:.1f} of {total / GB:.1f} GB free", remedy, needed=True)


def check_disk(folder: Path = ROOT) -> Check:
    """Disk space where out/ is."""
    free = machine.free_disk(folder)
    remedy = f"free {NEEDED_DISK / GB:.0f} GB (a real 7B checkpoint with its nets: 60 GB), or use --out"
    return _check("disk", free >= NEEDED_DISK, f"{free / GB:.0f} GB free", remedy, needed=True)


def check_gpu() -> Check:
    """An NVIDIA GPU and the build of torch: PyTorch's own answers then come from it; nothing here needs one."""
    _, answer = _run("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    build = metadata.version("torch") if importlib.util.find_spec("torch") else "none"
    found = f"{'; '.join(answer.splitlines())} (torch {build})" if answer else "none; the CPU does everything"
    return _check("GPU", answer, found)


def check_c_compiler() -> Check:
    """A C compiler: for the simulator's yield library, and for the kernels that TPU-MLIR builds for fused attention."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    lost = "none; the simulator is several times slower, and attention is compiled without its fused kernels"
    return _check("C compiler", found, found or lost, "apt-get install gcc libc6-dev")


def check_parallel() -> Check:
    """GNU parallel, which only `compile --via llm_convert` uses."""
    try:
        return Check("GNU parallel", OK, toolchain.require_parallel())
    except UserError:
        return Check("GNU parallel", OPTIONAL, "none; compile --via llm_convert needs it", "apt-get install parallel")


def chip_devices(root: Path = Path("/")) -> list[str]:
    """Device files of Sophgo's driver: PCIe cards are bm-sophon0, 1, …; a board has one for its own chip."""
    return sorted(str(path) for path in (root / "dev").glob("bm-sophon[0-9]*"))


def check_driver(root: Path = Path("/")) -> Check:
    """Sophgo's driver and the devices that it offers."""
    proc = root / "proc" / "bmsophon"
    if devices := chip_devices(root):
        smi = "" if shutil.which("bm-smi") else "; no bm-smi on the PATH"
        return Check("sophon driver", OK, ", ".join(devices) + smi)
    if proc.exists():
        return Check("sophon driver", OPTIONAL, f"{proc} but no device", "dmesg | grep bmsophon; is the card seated?")
    return Check("sophon driver", OPTIONAL, "none; the simulator stands in for the chip")


def check_sail(driver: bool) -> Check:
    """sophon.sail, the empty package of PyPI told from the real one. driver: whether there is a device to use."""
    kind, where = sail_package.sophon_sail()
    sdk = "install the sophon-sail wheel of Sophgo's SDK for this Python"
    if kind == "placeholder":
        found = f"PyPI's empty placeholder ({where})"
        return _check("sophon.sail", False, found, f"pip uninstall sophon; {sdk}", driver)
    found = where or "not installed; it drives a chip"
    return _check("sophon.sail", kind == "real", found, sdk if driver else "", driver)


def checks() -> list[Check]:
    """Every check, in the order of the report."""
    driver = bool(chip_devices())
    sail = check_sail(driver)
    compiles = not (driver and sail.state == OK)
    this_machine = [check_cpu(), check_memory(), check_disk(), check_gpu(), check_c_compiler(), check_parallel()]
    here = [*check_toolchain(compiles), check_pins(needed=compiles), check_helpers_importable(), *this_machine]
    return [*here, check_driver(), sail]


def fix() -> list[str]:
    """Apply the cures that touch only this environment; return what was done. Raises UserError where they cannot be."""
    moved = toolchain.cure(toolchain.wheel_path()) if importlib.util.find_spec("tpu_mlir") else []
    return [f"glibc of the wheel: moved {', '.join(moved)}"] if moved else []
