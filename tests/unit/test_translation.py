"""The Chinese pages have the same commands, sections and tables as the English ones."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    ROOT / "README.md": ROOT / "docs" / "zh" / "README.md",
    **{
        ROOT / "docs" / f"{name}.md": ROOT / "docs" / "zh" / f"{name}.md"
        for name in ("troubleshooting", "glossary", "qwen-7b-on-a-chip")
    },
}


def each(pages: dict[Path, Path]):
    return pytest.mark.parametrize(("english", "chinese"), pages.items(), ids=[page.stem for page in pages])


def lines(page: Path, pattern: str) -> list[str]:
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE)


@each(PAGES)
def test_commands_are_the_same(english, chinese):
    assert lines(english, r"^    .+$") == lines(chinese, r"^    .+$")


@each(PAGES)
def test_sections_and_pictures_are_as_many(english, chinese):
    for pattern in (r"^(#+) ", r"^(!)\["):
        assert lines(english, pattern) == lines(chinese, pattern)


@each({page: chinese for page, chinese in PAGES.items() if page.stem != "README"})
def test_rows_and_their_figures_are_the_same(english, chinese):
    """The README's figures are measured anew now and then; its Chinese page says that the English one counts."""
    for left, right in zip(lines(english, r"^\|.*$"), lines(chinese, r"^\|.*$"), strict=True):
        numbers = [sorted(re.findall(r"\d+(?:\.\d+)?", row)) for row in (left, right)]
        assert numbers[0] == numbers[1], left
