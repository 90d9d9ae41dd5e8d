"""Our compile against TPU-MLIR's one-click converter: wall time, and the compiler's own cycles a block.

    python -m benchmarks.compile_vs_llm_convert                          # the embedded model
    python -m benchmarks.compile_vs_llm_convert --hidden 4096 --heads 32 --layers 2 --inner 11008 --vocab 151936 \
        --seq_length 512 --modes int4                                    # two layers of Qwen-7B's size

Same weights, same mode, same S, same machine, one after the other. The converter reads the checkpoint itself, so our
export counts with the first of our compiles; writing the checkpoint in Qwen 2's layout does not count for it.
"""

import argparse
import shutil
from pathlib import Path

from benchmarks.compile_common import add_arguments, prepare, print_table, timed
from helpers import artefacts
from helpers.compile import compiling, llm_convert


def compare(checkpoint: Path, onnx: Path, out: Path, mode: str, args: argparse.Namespace) -> dict:
    """One mode both ways: seconds and cycles of the first prefill and decode block."""
    ours, seconds = timed(
        lambda: compiling.compile_model(onnx, out / "ours", "bench", mode, addr_mode="io_alone", jobs=args.jobs)
    )
    theirs = llm_convert.convert(checkpoint, out / "theirs", "bench", mode, args.seq_length)
    nets, converted = (artefacts.read_manifest(path) for path in (ours, theirs))
    # At 7B size what one mode leaves takes 15 GB.
    for path in (ours, theirs):
        shutil.rmtree(path.parent)
    return {
        "seconds": (seconds, converted["converter_seconds"]),
        **{
            kind: tuple(manifest["nets"][kind]["cycles"] for manifest in (nets, converted))
            for kind in ("block_0", "block_cache_0")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "out/benchmarks/llm_convert")
    args = parser.parse_args()
    out = Path(args.out)
    shutil.rmtree(out, ignore_errors=True)
    checkpoint, onnx, export_seconds = prepare(args, out)
    for mode in args.modes:
        result = compare(checkpoint, onnx, out, mode, args)
        ours, theirs = result["seconds"]
        rows = [[mode, "wall s, compile", ours, theirs, ours / theirs]]
        rows.append([mode, "wall s, with export", ours + export_seconds, theirs, (ours + export_seconds) / theirs])
        for kind, name in (("block_0", "cycles, prefill block"), ("block_cache_0", "cycles, decode block")):
            ours, theirs = result[kind]
            rows.append([mode, name, ours, theirs, ours / theirs])
        # At 7B size a mode takes minutes: its figures are not kept back for the next.
        print_table(rows, ["mode", "figure", "ours", "llm_convert", "ours / llm_convert"])
        print(flush=True)


if __name__ == "__main__":
    main()
