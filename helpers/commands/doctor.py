"""`python -m helpers doctor`: what this machine has, what it lacks, and the remedy."""

import json
import sys
from dataclasses import asdict

from helpers import doctor
from helpers.doctor import NOT_OK, OK, OPTIONAL, Check

_COLOURS = {OK: 32, NOT_OK: 31, OPTIONAL: 33}


def _print(rows: list[Check]) -> None:
    problems = sum(row.state == NOT_OK for row in rows)
    width = max(len(row.name) for row in rows)
    for row in rows:
        state = f"{row.state:8}"
        state = f"\x1b[{_COLOURS[row.state]}m{state}\x1b[0m" if sys.stdout.isatty() else state
        print(f"{state}  {row.name:{width}}  {row.found}")
        if row.remedy:
            print(f"{'':8}  {'':{width}}  -> {row.remedy}")
    print(f"{problems} NOT OK" if problems else "all that is needed is there")


def add_arguments(parser) -> None:
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
