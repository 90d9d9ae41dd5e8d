"""`python -m helpers diagnose`: where garbage comes from, rung by rung from the checkpoint to the loop.

The exit code is 0 where all is healthy, 1 where a fault was found.
"""

import json
import os
import shlex
from pathlib import Path

from helpers.diagnose.alone import examine
from helpers.diagnose.deeper import go_deeper
from helpers.diagnose.ladder import COMPILED, diagnose
from helpers.diagnose.page import deeper_page, page
from helpers.errors import UserError


def add_arguments(parser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="the original or a patched copy: what all is compared with")
    parser.add_argument("--patched", metavar="DIR", help="a copy with changes of your own, to be looked at")
    parser.add_argument("--onnx", metavar="DIR", help="the exported nets")
    parser.add_argument("--bmodel", metavar="FILE", help="alone: what can be said without the others")
    parser.add_argument("--prompt", metavar="TEXT", default="Hello, how are you?", help="whose tokens go through")
    parser.add_argument("--deeper", metavar="DIR", help="look into a compiled net that was found; files stay there")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def run(args) -> int:
    if args.deeper and not (args.checkpoint and args.onnx and args.bmodel):
        raise UserError("--deeper DIR needs --checkpoint, --onnx and --bmodel: it compiles a net of them once more.")
    if args.deeper and os.path.exists(args.deeper):
        raise UserError(
            f"{args.deeper} is there already: give --deeper a new folder, for what the wheel's tools write."
        )
    if args.checkpoint:
        report = diagnose(args.checkpoint, args.onnx, args.bmodel, args.prompt, patched=args.patched)
    elif args.bmodel and not args.onnx:
        report = examine(args.bmodel, args.prompt)
    else:
        raise UserError("--checkpoint DIR is needed, what the others are compared with; or --bmodel FILE alone.")
    if args.json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
        return 1 if report.found else 0
    print(page(report))
    if report.inputs and report.found.rung == COMPILED and args.onnx:
        if args.deeper:
            print(deeper_page(go_deeper(args.onnx, args.bmodel, report.found.net, report.inputs, Path(args.deeper))))
        else:
            given = [f"--{n}={getattr(args, n)}" for n in ("checkpoint", "onnx", "bmodel", "prompt", "patched")]
            again = shlex.join(["python", "-m", "helpers", "diagnose", *(g for g in given if not g.endswith("=None"))])
            print(f"One level deeper, operation by operation: {again} --deeper DIR")
    return 1 if report.found else 0
