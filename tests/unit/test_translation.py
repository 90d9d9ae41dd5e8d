"""The Chinese pages have the same commands, sections and tables as the English ones; no page has a dead link."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    ROOT / "README.md": ROOT / "docs" / "zh" / "README.md",
    ROOT / "docs" / "troubleshooting.md": ROOT / "docs" / "zh" / "troubleshooting.md",
}
PAIRS = pytest.mark.parametrize(("english", "chinese"), PAGES.items(), ids=[page.stem for page in PAGES])


def lines(page: Path, pattern: str) -> list[str]:
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE)


@PAIRS
def test_commands_are_the_same(english, chinese):
    assert lines(english, r"^    .+$") == lines(chinese, r"^    .+$")


def test_rows_and_their_figures_are_the_same():
    """The README's figures are measured anew now and then; its Chinese page says that the English one counts."""
    english, chinese = list(PAGES.items())[1]
    for left, right in zip(lines(english, r"^\|.*$"), lines(chinese, r"^\|.*$"), strict=True):
        numbers = [sorted(re.findall(r"\d+(?:\.\d+)?", row)) for row in (left, right)]
        assert numbers[0] == numbers[1], left


@pytest.mark.parametrize(
    "page", [page for pair in PAGES.items() for page in pair], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_links_lead_somewhere(page):
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in lines(page, r"^#+ (.+)$")
    }
    for link in lines(page, r"\]\(([^)]+)\)"):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif "://" not in link:
            assert (page.parent / link.split("#")[0]).exists(), link
