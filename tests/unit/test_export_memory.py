"""The export's memory and its behaviour when killed, each in a process of its own."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing import forkserver

import pytest

from benchmarks.export_memory import export_peak
from benchmarks.random_checkpoint import write
from helpers.files import sha256_file
from helpers.patching import patching

pytestmark = pytest.mark.slow


def run_export(checkpoint, out):
    """`python -m helpers export`; what it says is not of interest here."""
    from helpers.cli import main

    arguments = ["export", "--model_path", str(checkpoint), "--out", str(out), "--seq_length", "32"]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        raise SystemExit(main(arguments))


@pytest.fixture(scope="module")
def start():
    """Starts an export in a process of its own, forked from one that has imported all that takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["helpers.cli", "helpers.export.exporting", "torch._dynamo", "transformers.modeling_utils"]
    )
    with pytest.MonkeyPatch.context() as patch:
        # Of tqdm's semaphores in processes that are killed.
        patch.setenv("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        forkserver.ensure_running()

    def start(*arguments):
        process = context.Process(target=run_export, args=arguments)
        process.start()
        return process

    return start


def finished(process):
    process.join()
    return process.exitcode == 0


def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """A layer has 75 MB in float32 here: ten more of them held at once would be 750 MB. Peaks vary by 50 MB."""
    peaks = {}
    for layers in (2, 12):
        checkpoint = write(tmp_path / f"c{layers}", hidden=1024, heads=8, inner=4736, layers=layers, vocab=3008)
        patching.apply(checkpoint, seq_length=32)
        peaks[layers], _ = export_peak(checkpoint, tmp_path / f"o{layers}", 32)
    layer_bytes = 4 * (4 * 1024 * 1024 + 3 * 1024 * 4736)
    assert layer_bytes > 70e6
    assert peaks[12] < peaks[2] + 3 * layer_bytes, peaks


def test_killed_at_random_moments_an_export_ends_with_the_same_files(tmp_path, start):
    checkpoint = write(tmp_path / "checkpoint", hidden=256, heads=4, inner=688, layers=6)
    patching.apply(checkpoint, seq_length=32)
    assert finished(start(checkpoint, tmp_path / "alone"))

    def contents(folder):
        return {
            path.name: sha256_file(path) for path in folder.iterdir() if path.suffix in (".onnx", ".weights")
        }

    def there():
        return len(list((tmp_path / "killed").glob("*.onnx.json")))

    dice = random.Random(1)
    kills, progress = 0, []
    while kills < 10:
        # In the middle of the work, however fast the machine is: a few groups more are there, another has begun.
        enough = there() + dice.randint(0, 3)
        if enough >= 10:
            shutil.rmtree(tmp_path / "killed")
            enough = 0
        process = start(checkpoint, tmp_path / "killed")
        while process.is_alive() and not (there() >= enough and list((tmp_path / "killed").glob(".*partial"))):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.5))
        progress.append(there())
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
        if finished(process):
            assert contents(tmp_path / "killed") == contents(tmp_path / "alone")  # it was done before
        else:
            kills += 1
    print(f"groups of nets that were there at each moment: {progress}")
    assert finished(start(checkpoint, tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")
    assert not list((tmp_path / "killed").glob(".*partial"))
