"""The same comparison on real revisions of Qwen's code, which this repository does not contain.

python -m tests.unit.revisions.public DIR     # a table; DIR/<name>/modeling_qwen.py for each revision
QWEN_REVISIONS=DIR pytest tests/unit/test_patching.py -k public
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from helpers.errors import UserError
from helpers.files import sha256_file
from helpers.patching import patching
from tests.unit.revisions import blocks

ROWS = 16

# Stand-ins for files that some repositories leave out; a block needs nothing of them.
CONFIGURATION = """\
from transformers import PretrainedConfig


class QWenConfig(PretrainedConfig):
    model_type = "qwen"

    def __init__(self, **settings):
        self.__dict__.update(settings)
        super().__init__()
"""
GENERATION = "HistoryType = make_context = decode_tokens = get_stop_words_ids = StopWordsLogitsProcessor = None\n"


@dataclass(frozen=True)
class Result:
    """One revision: the patches that it needed, the differences, or why it was refused."""

    sha256: str
    patches: list[str]
    prefill: float | None = None
    decode: float | None = None
    refused: str = ""


def measure(revision: Path) -> Result:
    """Patch a copy of a revision and compare one small block before and after: prefill and decode, padded and not."""
    digest = sha256_file(revision / "modeling_qwen.py")
    with tempfile.TemporaryDirectory() as root:
        before, after = Path(root) / "original", Path(root) / "patched"
        before.mkdir()
        for file in revision.glob("*.py"):
            shutil.copy(file, before)
        for name, text in (("configuration_qwen.py", CONFIGURATION), ("qwen_generation_utils.py", GENERATION)):
            if not (before / name).exists():
                (before / name).write_text(text)
        blocks.make_small(before)
        try:
            steps = patching.apply(before, out=after, seq_length=ROWS).steps
        except UserError as error:
            return Result(digest, [], refused=str(error))
        found = [
            blocks.agreement(blocks.load_block(before), blocks.load_block(after), tokens, ROWS)
            for tokens in (1, 5, ROWS - 2, ROWS)
        ]
    applied = [step.patch.name for step in steps if step.state == patching.APPLIED]
    return Result(digest, applied, max(f.prefill for f in found), max(f.decode for f in found))


def revisions(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/modeling_qwen.py"))


def main(root: str) -> None:
    print("| revision | modeling_qwen.py | patches | prefill | decode |")
    print("| --- | --- | --- | --- | --- |")
    for revision in revisions(Path(root)):
        result = measure(revision)
        numbers = " ".join(name[:2] for name in result.patches)
        if result.refused:
            why = result.refused.splitlines()[0].split("left as it was: ")[-1].split(", line ")[0]
            differences = f"refused by {result.refused.split()[1]} | {why}"
        else:
            differences = f"{result.prefill:.0e} | {result.decode:.0e}"
        print(f"| {revision.name} | `{result.sha256[:12]}` | {numbers} | {differences} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
