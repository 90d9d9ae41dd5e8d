"""The export's memory and its behaviour when killed, each in a process of its own."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.export_memory import export_peak
from benchmarks.random_checkpoint import write
from helpers import artefacts, patching

pytestmark = pytest.mark.slow


def command(checkpoint, out):
    arguments = ["-m", "helpers", "export", "--model_path", str(checkpoint), "--out", str(out), "--seq_length", "32"]
    return [sys.executable, *arguments]


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


def test_killed_at_random_moments_an_export_ends_with_the_same_files(tmp_path):
    checkpoint = write(tmp_path / "checkpoint", hidden=256, heads=4, inner=688, layers=6)
    patching.apply(checkpoint, seq_length=32)
    subprocess.run(command(checkpoint, tmp_path / "alone"), check=True, capture_output=True)

    def contents(folder):
        return {
            path.name: artefacts.sha256_file(path) for path in folder.iterdir() if path.suffix in (".onnx", ".weights")
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
        process = subprocess.Popen(
            command(checkpoint, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (there() >= enough and list((tmp_path / "killed").glob(".*partial"))):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.5))
        progress.append(there())
        process.send_signal(dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
        if process.wait() == 0:
            assert contents(tmp_path / "killed") == contents(tmp_path / "alone")  # it was done before
        else:
            kills += 1
    print(f"groups of nets that were there at each moment: {progress}")
    subprocess.run(command(checkpoint, tmp_path / "killed"), check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")
    assert not list((tmp_path / "killed").glob(".*partial"))
