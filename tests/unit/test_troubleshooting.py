"""docs/troubleshooting.md quotes what the code says: a text that no code prints any more is found here."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "troubleshooting.md"
BEFORE_OTHERS = "## What other programs say"


def texts(node: ast.AST) -> list[str]:
    """String literals under a node, each f-string as one text with … for what it fills in."""
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [text for child in ast.iter_child_nodes(node) for text in texts(child)]


@pytest.fixture(scope="module")
def said() -> list[str]:
    found = (ROOT / "setup.sh").read_text(encoding="utf-8").splitlines()
    for path in sorted((ROOT / "helpers").rglob("*.py")):
        found += texts(ast.parse(path.read_text(encoding="utf-8")))
    return found


def quoted() -> list[str]:
    """Texts in backticks in the first column of the tables on our own errors."""
    ours = DOCUMENT.read_text(encoding="utf-8").split(BEFORE_OTHERS)[0]
    cells = [line.split("|")[1] for line in ours.splitlines() if line.startswith("| ")]
    return [double or single for cell in cells for double, single in re.findall(r"``(.+?)``|`([^`]+)`", cell)]


def test_there_is_something_to_check():
    assert len(quoted()) > 40


@pytest.mark.parametrize("text", quoted())
def test_it_is_said(text, said):
    parts = [part.strip() for part in text.split("…") if len(part.strip()) > 3]
    pattern = ".*".join(re.escape(part) for part in parts)
    # What a quotation has filled in, the code has as a gap.
    assert any(re.search(pattern, literal, re.DOTALL) for literal in said), text


def test_the_chinese_one_has_the_same_entries():
    chinese = (ROOT / "docs" / "zh" / "troubleshooting.md").read_text(encoding="utf-8")
    assert [text for text in quoted() if f"`{text}`" not in chinese] == []
