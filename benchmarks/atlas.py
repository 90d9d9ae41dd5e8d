"""Fill helpers/forecast/atlas.json: what the compiler says of every net of the documented models, modes and lengths.

    python -m benchmarks.atlas [--names qwen-7b] [--modes int4] [--seq_lengths 512 2048] [--devices 1 2]

What is there already is not compiled again, so it can be stopped and run again. Where the compiler refuses a net, the
atlas has what it said. About two minutes a point on two idle cores, 12 GB of memory for the heads of the larger models.
"""

import argparse
from pathlib import Path

from helpers.compile.options import QUANTIZE
from helpers.errors import UserError
from helpers.files import write_json
from helpers.forecast import figures
from helpers.forecast.compiling import compile_figures
from helpers.forecast.shape import Shape, shape_of


def points(names: list[str], modes: list[str], lengths: list[int], devices: list[int]) -> list[Shape]:
    """All combinations, the cheapest first."""
    return [
        shape_of(name, mode=mode, seq_length=length, num_device=count)
        for count in devices
        for length in lengths
        for name in names
        for mode in modes
    ]


def fill(shapes: list[Shape], out: Path = figures.OUT) -> None:
    """Compile what is missing of the shapes; after each, the atlas is written anew."""
    for number, shape in enumerate(shapes, start=1):
        there = figures.known(out)
        missing = [kind for kind in figures.KINDS if figures.key_of(kind, shape) not in there]
        print(f"{number} of {len(shapes)}: {shape}: {', '.join(missing) or 'there'}", flush=True)
        for kinds in (("embedding", "embedding_cache"), ("block", "block_cache"), ("lm_head",)):
            if wanted := [kind for kind in kinds if kind in missing]:
                try:
                    there |= compile_figures(shape, wanted, out)
                except UserError as error:
                    if "did not compile" not in str(error):
                        raise  # of this machine, not of the shape
                    there |= {
                        figures.key_of(kind, shape): {"error": str(error).partition(" (its log")[0]} for kind in wanted
                    }
        write_json(figures.ATLAS, dict(sorted(there.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", default=["qwen-1_8b", "qwen-7b", "qwen-14b"])
    parser.add_argument("--modes", nargs="+", default=list(QUANTIZE))
    parser.add_argument("--seq_lengths", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    fill(points(args.names, args.modes, args.seq_lengths, args.devices))


if __name__ == "__main__":
    main()
