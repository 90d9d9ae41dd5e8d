"""What the compile benchmarks share: a checkpoint, its nets, and a table."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.random_checkpoint import TINY, write
from helpers.export import exporting
from helpers.patching import patching

SIZES = ("hidden", "heads", "layers", "inner", "vocab")


def add_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """Which checkpoint, and where to work. Without --hidden it is the embedded one."""
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int, help="of a checkpoint with random weights; default: models/tiny")
    parser.add_argument("--seq_length", type=int, default=256)
    parser.add_argument("--modes", nargs="+", default=["int8", "int4", "bf16"])
    parser.add_argument("--jobs", type=int, help="nets at a time, as for `compile`")
    parser.add_argument("--out", default=folder, help="folder to work in; what is there is made again")


def prepare(args: argparse.Namespace, out: Path) -> tuple[Path, Path, float]:
    """(patched checkpoint, folder of ONNX nets, seconds of the export)"""
    checkpoint = out / "checkpoint"
    if args.hidden:
        write(checkpoint, **{size: getattr(args, size) for size in SIZES if getattr(args, size)})
        patching.apply(checkpoint, seq_length=args.seq_length)
    else:
        patching.apply(TINY, out=checkpoint, seq_length=args.seq_length)
    rows = getattr(args, "rows", 1)
    (_, seconds) = timed(lambda: exporting.export(checkpoint, out / "onnx", args.seq_length, rows=rows))
    return checkpoint, out / "onnx", seconds


def timed(function: Callable):
    """(result, wall seconds)"""
    started = time.monotonic()
    return function(), time.monotonic() - started


def print_table(rows: list[list], header: list[str]) -> None:
    """A table in Markdown."""
    texts = [header, ["---"] * len(header)]
    texts += [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    for row in texts:
        print("| " + " | ".join(row) + " |")
