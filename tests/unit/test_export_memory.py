"""The export's memory and its behaviour when killed, each in a process of its own."""

import random
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
    started = time.monotonic()
    subprocess.run(command(checkpoint, tmp_path / "alone"), check=True, capture_output=True)
    seconds = time.monotonic() - started
    dice = random.Random(1)
    kills = 0
    for _ in range(10):
        process = subprocess.Popen(
            command(checkpoint, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Most of the time goes into imports, before anything is written: aim at the second half.
        time.sleep(seconds * dice.uniform(0.5, 1.0))
        process.send_signal(dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
        kills += process.wait() != 0
    subprocess.run(command(checkpoint, tmp_path / "killed"), check=True, capture_output=True)
    assert kills >= 5

    def contents(folder):
        return {
            path.name: artefacts.sha256_file(path) for path in folder.iterdir() if path.suffix in (".onnx", ".weights")
        }

    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")
    assert not list((tmp_path / "killed").glob(".*partial"))
