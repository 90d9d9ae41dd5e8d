"""Our compile against the commands of the documented compile.sh, run one after the other.

    python -m benchmarks.compile_vs_documented                           # the embedded model, int8

For each net model_transform.py and model_deploy.py are started anew, as the script does; then model_tool combines.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.compile_common import add_arguments, prepare, print_table, timed
from helpers import artefacts, machine, toolchain
from helpers.bmodel.model_tool import combine
from helpers.compile import compiling
from helpers.compile.options import net_settings
from helpers.compile.plan import plan_nets
from helpers.compile.profile import PROFILE, read_profile


def documented(onnx: Path, out: Path, mode: str) -> dict[str, int | None]:
    """Compile all nets as documented; cycles of each."""
    tools = toolchain.wheel_path() / "python" / "tools"
    plan = plan_nets(onnx)
    cycles, bmodels = {}, []
    for net in plan.nets:
        folder = out / net
        folder.mkdir(parents=True)
        settings = net_settings(net, mode, 1, "basic", False)
        flags = [] if settings["quantize"] == "F32" else ["--quantize", settings["quantize"]]
        flags += ["--q_group_size", "64"] if settings["quantize"] == "W4BF16" else []
        flags += [f"--{name}" for name in ("quant_input", "quant_output") if settings[name]]
        source = ["--model_name", net, "--model_def", str(plan.files[net].absolute())]
        commands = [
            ["model_transform.py", *source, "--mlir", f"{net}.mlir"],
            ["model_deploy.py", "--mlir", f"{net}.mlir", *flags, "--chip", "bm1684x", "--model", f"{net}.bmodel"],
        ]
        for script, *arguments in commands:
            with open(folder / f"{script}.log", "wb") as log:
                command = [sys.executable, str(tools / script), *arguments]
                environment = toolchain.environment(machine.cores())
                subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True)
        cycles[net] = (read_profile(folder / PROFILE) or {}).get("cycles")
        bmodels.append((folder / f"{net}.bmodel").absolute())
    combine(bmodels, out / "documented.bmodel")
    return cycles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "out/benchmarks/documented")
    parser.set_defaults(modes=["int8"])
    args = parser.parse_args()
    out = Path(args.out)
    shutil.rmtree(out, ignore_errors=True)
    _, onnx, _ = prepare(args, out)
    rows = []
    for mode in args.modes:
        target, ours = timed(lambda mode=mode: compiling.compile_model(onnx, out, "bench", mode, jobs=args.jobs))
        cycles, theirs = timed(lambda mode=mode: documented(onnx, out / f"documented_{mode}", mode))
        rows.append([mode, "wall s", ours, theirs, ours / theirs])
        nets = artefacts.read_manifest(target)["nets"]
        for net in ("block_0", "block_cache_0"):
            rows.append([mode, f"cycles, {net}", nets[net]["cycles"], cycles[net], nets[net]["cycles"] / cycles[net]])
    print_table(rows, ["mode", "figure", "ours", "documented", "ours / documented"])


if __name__ == "__main__":
    main()
