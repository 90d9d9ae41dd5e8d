"""The real chain on the embedded model, made once and kept in out/tests: tests ask for the artefact they need.

Nothing here is mocked. A second run finds the artefacts up to date, by their manifests; so does the second worker of
pytest-xdist, which waits for the first.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny"
WORK = ROOT / "out" / "tests"
SEQ_LENGTH = 208  # the documented chat of two turns has 198

os.chdir(ROOT)
# Hypothesis would call an example wrong that takes 200 ms, and a strategy unfit that is slow: no verdict by the clock.
settings.register_profile("tutorial", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tutorial")
# A shell has what it starts with `&` ignore Ctrl-C, and so does all that is started from there: tests that press it
# would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Two workers share the cores: threads of PyTorch that wait for each other by spinning take them from the other one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end both of pytest-xdist's workers should have something to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# In CI a test that is skipped has shown nothing, and green would say that it had: only hardware may be absent there.
SKIPPED: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if os.environ.get("CI") and report.skipped and not ({"hardware", "wasxfail"} & {*report.keywords, *vars(report)}):
        SKIPPED.append(f"{report.nodeid}: {report.longrepr[-1]}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if SKIPPED and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    for line in SKIPPED:
        terminalreporter.write_line(f"error: skipped in CI for another reason than hardware: {line}", red=True)


@pytest.fixture
def preload(tmp_path):
    """C functions that stand in for the system's -> an environment for programs that are to meet them."""

    def environment(code: str) -> dict[str, str]:
        library = tmp_path / "preload.so"
        includes = "#define _GNU_SOURCE\n#include <errno.h>\n#include <string.h>\n#include <unistd.h>\n"
        command = [shutil.which("cc") or "gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=includes + code, text=True, check=True)
        return os.environ | {"LD_PRELOAD": str(library)}

    return environment


@pytest.fixture
def as_user():
    """(user id, writable folder) -> the beginning of a command line that runs the rest as that user.

    He may read everything (the environment may lie in a folder of root's) and write only what is his.
    """
    if os.getuid() != 0:
        pytest.skip("only root can become another user")

    def become(user: int, home: Path) -> list[str]:
        os.chown(home, user, user)
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        command += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
        return [*command, "env", f"HOME={home}"]

    return become


@pytest.fixture
def open_folder():
    """A temporary folder that every user may enter: pytest's own are for their owner."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def own_copy(tmp_path):
    """A copy of these helpers and patches, for commands that are to run with other code."""
    for name in ("helpers", "patches"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))

    class Copy:
        root = tmp_path / "copy"

        def edit(self, file: str, old: str, new: str) -> None:
            text = (self.root / file).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
            (self.root / file).write_text(text.replace(old, new), encoding="utf-8")

        def run(self, *arguments) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "helpers", *map(str, arguments)]
            return subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)

    return Copy()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded checkpoint, unpatched."""
    return TINY


@pytest.fixture(scope="session")
def demo_questions() -> list[str]:
    entries = json.loads((TINY / "demo_questions.json").read_text(encoding="utf-8"))
    return [entry["question"] for entry in entries]


@pytest.fixture(scope="session")
def tokenizer():
    from helpers.checkpoint.tokenizer import QwenTokenizer

    return QwenTokenizer.open(TINY)


@pytest.fixture(scope="session")
def chat_prompt(tokenizer):
    """question -> ids of the ChatML prompt with the usual system text."""
    return tokenizer.prompt


@pytest.fixture(scope="session")
def stop_ids(tokenizer) -> tuple[int, ...]:
    return tokenizer.stop_ids


@pytest.fixture(scope="session")
def in_turn() -> FileLock:
    """Held while an artefact that all workers use is made."""
    WORK.mkdir(parents=True, exist_ok=True)
    return FileLock(WORK / ".lock")


@pytest.fixture(scope="session")
def patched_tiny(in_turn) -> Path:
    """A patched copy of the embedded checkpoint, S = 208."""
    from helpers.patching import patching

    folder = WORK / "patched"
    with in_turn:
        patching.apply(TINY, out=folder, seq_length=SEQ_LENGTH)
    return folder


@pytest.fixture(scope="session")
def onnx_tiny(patched_tiny, in_turn) -> Path:
    """All ONNX nets of the embedded checkpoint, S = 208."""
    from helpers.export import exporting

    with in_turn:
        return exporting.export(patched_tiny, WORK / "onnx", SEQ_LENGTH)


@pytest.fixture(scope="session")
def sample_head(patched_tiny):
    """S -> penalty_sample_head as the code of now exports it, in onnxruntime: run(*inputs) -> probabilities, tokens.

    Traced here: a net of an earlier run in out/tests would hide what has changed since.
    """
    import numpy as np
    import onnxruntime

    from helpers.checkpoint.weights import Checkpoint
    from helpers.export import modules, tracing

    net = "penalty_sample_head"

    def fresh(seq_length: int):
        builder = modules.NetBuilder(Checkpoint.open(patched_tiny), seq_length)
        module = builder.module(net)
        graph = tracing.attach_weights(tracing.trace(module, net, builder.example(net)), module, None)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        kinds = {"tensor(int64)": np.int64, "tensor(float)": np.float32}

        def run(*inputs):
            wanted = zip(session.get_inputs(), inputs, strict=True)
            return session.run(None, {w.name: np.asarray(a, kinds[w.type]).reshape(w.shape) for w, a in wanted})

        return run

    return fresh


@pytest.fixture(scope="session")
def compile_tiny(onnx_tiny, in_turn):
    """(mode, addr_mode) -> bmodel of the embedded checkpoint for one device."""
    from helpers.compile import compiling

    def compiled(mode: str = "int8", addr_mode: str = "io_alone") -> Path:
        with in_turn:
            return compiling.compile_model(
                onnx_tiny, WORK / f"bmodel_{addr_mode}", name="tiny", mode=mode, addr_mode=addr_mode
            )

    return compiled


@pytest.fixture(scope="session")
def bmodel_tiny(compile_tiny) -> Path:
    """The embedded checkpoint's bf16 bmodel, io_alone: the one that the simulator runs fastest."""
    return compile_tiny("bf16")
