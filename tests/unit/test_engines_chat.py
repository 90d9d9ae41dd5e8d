"""The embedded model's chat over the engines: the same tokens, no keys and values on the host, few packages."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import simulator_speed
from helpers.errors import UserError
from helpers.run.engines import open_engine
from helpers.run.generation import QwenRunner
from tests.unit.test_engines import BLOCKED, DOUBLE, ROOT

TINY = ROOT / "models" / "tiny"


def closure(requirements) -> set[str]:
    """Names of the distributions that installing these requirements brings, extras left out."""
    found, open_ = set(), [line for line in requirements if line.strip() and not line.lstrip().startswith("#")]
    while open_:
        requirement = open_.pop()
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        if name in found or "extra ==" in requirement:
            continue
        found.add(name)
        try:
            open_ += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            pass  # for another platform or Python
    return found


def chat(bmodel, question, engine):
    """What `chat --json` answers in a process that can import neither torch nor the tool chain; and what it loaded."""
    argv = ["chat", "--model", str(bmodel), "--tokenizer", str(TINY), "--json", "--engine", engine]
    code = f"""
from helpers.cli import main
import json
code = main({[*argv, "--question", question]!r})
assert not set(blocked) & set(sys.modules), set(blocked) & set(sys.modules)
loaded = {{name.split(".")[0] for name in set(sys.modules) - at_start}}
print(json.dumps(sorted(loaded)), file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; at_start = set(sys.modules)\n" + BLOCKED + code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(DOUBLE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("addr_mode", ["io_alone", "basic"])
def test_chip_and_simulator_give_the_same_answer(compile_tiny, demo_questions, addr_mode):
    bmodel = compile_tiny(addr_mode=addr_mode)
    question = demo_questions[0]
    simulated, _ = chat(bmodel, question, "simulator")
    on_chip, loaded = chat(bmodel, question, "auto")
    assert (simulated["engine"], on_chip["engine"]) == ("simulator", "chip")
    assert on_chip["tokens"] == simulated["tokens"] and len(on_chip["tokens"]) > 3
    assert on_chip["text"] == simulated["text"]
    distributions = importlib.metadata.packages_distributions()
    packages = {name.lower() for module in loaded - {"helpers"} for name in distributions.get(module, ())}
    allowed = closure((ROOT / "requirements-device.txt").read_text().splitlines())
    assert {"numpy", "tiktoken"} <= {name.replace("_", "-") for name in packages} <= allowed


@pytest.mark.parametrize("addr_mode", ["io_alone", "basic"])
@pytest.mark.parametrize("kind", ["simulator", "chip"])
def test_no_key_or_value_crosses_in_decode(compile_tiny, chat_prompt, demo_questions, kind, addr_mode, monkeypatch):
    if kind == "chip":
        monkeypatch.syspath_prepend(str(DOUBLE))
        monkeypatch.delitem(sys.modules, "sophon", raising=False)
        monkeypatch.delitem(sys.modules, "sophon.sail", raising=False)
    with open_engine(compile_tiny(addr_mode=addr_mode), engine=kind) as engine:
        runner = QwenRunner(engine)
        runner.prefill(chat_prompt(demo_questions[0]))
        token = runner.greedy_token()
        for _ in range(2):
            before = (engine.bytes_to_device, engine.bytes_to_host)
            runner.decode(token)
            token = runner.greedy_token()
            to_device = engine.bytes_to_device - before[0]
            to_host = engine.bytes_to_host - before[1]
            # An id and a position of 4 bytes, a bf16 mask of S + 1; a token of 4 bytes.
            assert (to_device, to_host) == (4 + 4 + 2 * (runner.seq_length + 1), 4)


def test_the_benchmark_measures_and_compares_tokens(compile_tiny, monkeypatch):
    bmodel = str(compile_tiny())
    result = simulator_speed.compare(bmodel, tokens=1, repetitions=2, ways=["yield"])
    assert result["kind"] == "simulator wall" and result["ways"]["yield"]["tokens_per_s"] > 0
    assert "| yield | " in simulator_speed.table(result)
    runs = iter(result["runs"]["yield"])
    monkeypatch.setattr(simulator_speed, "measure", lambda *arguments: {**next(runs), "tokens": [next(different)]})
    different = iter((1, 2))
    with pytest.raises(UserError, match="differ"):
        simulator_speed.compare(bmodel, tokens=1, repetitions=2, ways=["yield"])
