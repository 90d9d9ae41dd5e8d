"""Tables for people: Markdown in a notebook."""

from collections.abc import Iterable, Mapping

from IPython.display import Markdown, display


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows of equal keys as a Markdown table; numbers to the right, floats with four digits, a dash for None."""
    rows = list(rows)
    names = list(rows[0])
    numeric = [all(isinstance(row[name], int | float | None) for row in rows) for name in names]
    lines = [names, ["---:" if right else "---" for right in numeric]]
    lines += [[_cell(row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(rows: Iterable[Mapping[str, object]]) -> None:
    """Display rows as a table in a notebook."""
    display(Markdown(markdown(rows)))
