"""`python -m helpers diagnose`: where garbage comes from, rung by rung from the checkpoint to the loop.

The exit code is 0 where all is healthy, 1 where a fault was found.
"""

import json

from helpers.diagnose.alone import examine
from helpers.diagnose.ladder import diagnose
from helpers.diagnose.page import page
from helpers.errors import UserError


def add_arguments(parser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="the original or a patched copy: what all is compared with")
    parser.add_argument("--patched", metavar="DIR", help="a copy with changes of your own, to be looked at")
    parser.add_argument("--onnx", metavar="DIR", help="the exported nets")
    parser.add_argument("--bmodel", metavar="FILE", help="alone: what can be said without the others")
    parser.add_argument("--prompt", metavar="TEXT", default="Hello, how are you?", help="whose tokens go through")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def run(args) -> int:
    if args.checkpoint:
        report = diagnose(args.checkpoint, args.onnx, args.bmodel, args.prompt, patched=args.patched)
    elif args.bmodel and not args.onnx:
        report = examine(args.bmodel, args.prompt)
    else:
        raise UserError("--checkpoint DIR is needed, what the others are compared with; or --bmodel FILE alone.")
    print(json.dumps(report.to_json(), ensure_ascii=False) if args.json else page(report))
    return 1 if report.found else 0
