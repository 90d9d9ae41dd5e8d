"""Why a net did not compile, out of what the tools said."""

import re
from pathlib import Path

_NOISE = re.compile(
    r".*onnxruntime|ConstantFolding|#\d|PLEASE submit|Stack dump|\d+\.\s+Program arguments|\[Running\]|\[ *\]"
)
_ERROR = re.compile(
    r"error|assert|unreachable|abort|terminate|not support|unsupport|failed|exception|ended by SIG", re.IGNORECASE
)
_EXCEPTION = re.compile(r"^\w[\w.]*(Error|Exception|Interrupt)\b.*")


def read_log(path: Path) -> str:
    """The text of a log or a profile, empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def own_error(log: str, status: int) -> str:
    """The line of a net's log that says why it failed. status: its exit status, negative for a signal."""
    lines = [re.split(r"\r|\x08", line)[-1].strip() for line in log.splitlines()]
    lines = [line for line in lines if line and not _NOISE.match(line)]
    # The wheel's scripts end in such an exception when a program that they ran has said why it failed.
    if exceptions := [line for line in lines if _EXCEPTION.match(line) and "[!Error]" not in line]:
        return exceptions[-1].removeprefix("helpers.errors.UserError: ")[:500]
    telling = [line for line in lines if line.startswith("what():")] or [line for line in lines if _ERROR.search(line)]
    if telling:
        return telling[0][:500]
    how = f"status {status}" if status > 0 else f"signal {-status}"
    return f"it ended with {how}" + (f" after: {lines[-1][:300]}" if lines else " and said nothing")
