"""`python -m helpers info --model FILE [--json]`: what a bmodel contains and what memory it needs on the device."""

import json

from helpers.bmodel.bmodel import read_bmodel
from helpers.bmodel.report import format_report, memory_report


def add_arguments(parser) -> None:
    parser.add_argument("--model", required=True, metavar="FILE", help="the bmodel")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def run(args) -> None:
    model = read_bmodel(args.model)
    print(json.dumps(memory_report(model)) if args.json else format_report(model))
