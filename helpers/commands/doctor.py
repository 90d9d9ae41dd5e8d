"""`python -m helpers doctor`: the report of helpers.doctor, as a table or as JSON."""

import importlib.util
import json
import sys
from dataclasses import asdict

from helpers import doctor
from helpers.doctor import NOT_OK, OK, OPTIONAL, Check


def _print(rows: list[Check]) -> None:
    problems = sum(row.state == NOT_OK for row in rows)
    verdict = f"{problems} NOT OK" if problems else "all that is needed is there"
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        styles = {OK: "green", NOT_OK: "bold red", OPTIONAL: "yellow"}
        table = Table(box=None, padding=(0, 1), header_style="bold")
        for heading in ("", "what", "found"):
            table.add_column(heading)
        for row in rows:
            found = Text(row.found)
            if row.remedy:
                found.append(f"\n→ {row.remedy}", style="cyan")
            table.add_row(Text(row.state, style=styles[row.state]), row.name, found)
        console = Console()
        console.print(table)
        console.print(Text(verdict, style="bold red" if problems else "bold green"))
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.state:8}  {row.name:{width}}  {row.found}")
        if row.remedy:
            print(f"{'':8}  {'':{width}}  -> {row.remedy}")
    print(verdict)


def add_arguments(parser) -> None:
    """Arguments of `python -m helpers doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--fix", action="store_true", help="first apply the cures that touch only this environment")


def run(args) -> int:
    """Print the report; 0 if nothing that is needed is NOT OK, else 1."""
    fixed = doctor.fix() if args.fix else []
    rows = doctor.checks()
    ok = all(row.state != NOT_OK for row in rows)
    if args.json:
        print(json.dumps({"ok": ok, "fixed": fixed, "checks": [asdict(row) for row in rows]}, indent=1))
    else:
        for line in fixed:
            print(f"fixed     {line}")
        _print(rows)
    return 0 if ok else 1
