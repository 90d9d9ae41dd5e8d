"""model_tool of the TPU-MLIR wheel, which combines bmodels."""

import subprocess
from pathlib import Path

from helpers import toolchain
from helpers.errors import UserError


def combine(bmodels: list[str | Path], target: str | Path) -> None:
    """Combine bmodels to one with the wheel's model_tool; equal weights are stored once. Raises UserError."""
    program = toolchain.wheel_path() / "bin" / "model_tool"
    command = [str(program), "--combine", *map(str, bmodels), "-o", str(target)]
    done = subprocess.run(command, env=toolchain.environment(), capture_output=True, text=True, check=False)
    target = Path(target)
    if done.returncode or not target.is_file() or not target.stat().st_size:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise UserError(f"model_tool could not combine {len(bmodels)} bmodels: {said}")
