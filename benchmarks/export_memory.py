"""Peak memory and wall time of an export, by default of one Qwen-7B block with its embedding and head, S = 512.

    python -m benchmarks.export_memory [--hidden 4096 …] [--layers 1] [--seq_length 512] [--keep DIR]

The checkpoint has random weights; the export runs in a process of its own, whose peak resident memory is printed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.patching import patching


def export_peak(checkpoint: Path, out: Path, seq_length: int) -> tuple[int, float]:
    """Export in a process of its own; its peak resident memory in bytes and its wall time in s.

    A process begins with the peak of the one that started it, so a fresh Python stands between.
    """
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-m", "helpers", "export", "--model_path", str(checkpoint), "--out", str(out)]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--seq_length", str(seq_length)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) * 1024, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"hidden": 4096, "heads": 32, "layers": 1, "inner": 11008, "vocab": 151936}
    for size, default in sizes.items():
        parser.add_argument(f"--{size}", type=int, default=default)
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--keep", help="folder for checkpoint and nets; by default they are removed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.keep or scratch)
        checkpoint = folder / "checkpoint"
        chosen = [word for size in sizes for word in (f"--{size}", str(getattr(args, size)))]
        # Not in this process: what it once held would count for the processes that it starts.
        subprocess.run([sys.executable, "-m", "benchmarks.random_checkpoint", str(checkpoint), *chosen], check=True)
        patching.apply(checkpoint, seq_length=args.seq_length)
        peak, seconds = export_peak(checkpoint, folder / "onnx", args.seq_length)
        largest = max((folder / "onnx").glob("*.weights"), key=lambda path: path.stat().st_size)
    print(f"layers {args.layers}, hidden {args.hidden}, S {args.seq_length}: peak {peak / 1e9:.2f} GB, {seconds:.0f} s")
    print(f"largest weight file: {largest.name}")


if __name__ == "__main__":
    main()
