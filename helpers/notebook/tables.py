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


def cost_rows(cost: Mapping[str, Mapping[str, float]]) -> list[dict]:
    """What helpers.cost has put into a manifest, as rows: time, memory and disk, predicted and taken, and the error."""
    units = {"seconds": ("time, s", 1), "memory_bytes": ("memory, MB", 1e6), "disk_bytes": ("disk, MB", 1e6)}
    rows = []
    for key, (label, unit) in units.items():
        before, predicted, taken = (cost.get(name, cost["predicted"])[key] for name in ("before", "predicted", "taken"))
        error = round(100 * (predicted / taken - 1)) if taken else None
        named = {"before": before / unit, "after the first part": predicted / unit, "taken": taken / unit}
        rows.append({"": label, **{name: round(value, 1) for name, value in named.items()}, "error, %": error})
    return rows
