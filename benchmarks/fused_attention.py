"""A decode block of several rows with the compiler's fused attention and without it: the cycle model's cycles.

    python -m benchmarks.fused_attention                                 # the embedded model
    python -m benchmarks.fused_attention --hidden 4096 --heads 32 --layers 1 --inner 11008 --vocab 3008 \
        --seq_length 512 --modes int4                                    # one layer of Qwen-7B's size

Addresses are io_alone. What `export --rows` writes is unfused; for the other the mask is the second operand again.
"""

import argparse
import shutil
from pathlib import Path

import onnx

from benchmarks.compile_common import add_arguments, prepare, print_table
from helpers.compile.jobs import NetToCompile, compile_nets
from helpers.compile.options import net_settings
from helpers.compile.plan import plan_nets

NET = "block_cache_0"


def fuse(path: Path) -> None:
    """Write the mask of a block as the second operand of its Add, as it was traced: attention is fused again."""
    model = onnx.load(path, load_external_data=False)
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    (add,) = (node for node in model.graph.node if softmax.input[0] in node.output)
    add.input[:] = [add.input[1], add.input[0]]
    onnx.save(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "out/benchmarks/fused_attention")
    parser.add_argument("--rows", type=int, default=10, help="new tokens that the block takes at once")
    args = parser.parse_args()
    out = Path(args.out)
    shutil.rmtree(out, ignore_errors=True)
    _, nets, _ = prepare(args, out)
    plan, file = plan_nets(nets, 1), (nets / f"{NET}.onnx").absolute()
    cycles: dict[tuple[str, str], int] = {}
    for way in ("unfused", "fused"):
        if way == "fused":
            fuse(file)
        for mode in args.modes:
            settings = net_settings(NET, mode, 1, "io_alone", dynamic=False)
            task = NetToCompile(NET, file, plan.nets[NET], (out / way / mode).absolute(), settings)
            task.folder.mkdir(parents=True)
            cycles[mode, way] = compile_nets([task], 1, None, f"{way}, {mode}")[NET]["cycles"]
    print_table(
        [[mode, cycles[mode, "fused"], cycles[mode, "unfused"]] for mode in args.modes],
        ["mode", "cycles, fused", "cycles, unfused"],
    )


if __name__ == "__main__":
    main()
