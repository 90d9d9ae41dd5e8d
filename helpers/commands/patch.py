"""`python -m helpers patch`: change Qwen's code so that it exports; --revert takes it back."""

from helpers import machine
from helpers.errors import UserError
from helpers.patching import patching


def add_arguments(parser) -> None:
    parser.add_argument("--model_path", "-m", required=True, help="folder of the checkpoint")
    parser.add_argument("--out", help="make a patched copy here (weights are linked) and leave the checkpoint alone")
    parser.add_argument("--seq_length", "-s", type=int, help="S for config.json (default 512)")
    parser.add_argument("--only", nargs="+", metavar="PATCH", help="these patches only, by number or name")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--revert", action="store_true", help="take the patches back")
    what.add_argument("--status", action="store_true", help="show what each patch has done or would do")


def run(args) -> int:
    if args.status:
        print(*patching.status(args.model_path), sep="\n")
        return 0
    if args.revert:
        if args.out or args.seq_length:
            raise UserError("--revert takes back what is in --model_path: it goes without --out and --seq_length.")
        report = patching.revert(args.model_path, only=args.only)
    else:
        report = patching.apply(args.model_path, out=args.out, seq_length=args.seq_length, only=args.only)
    for warning in report.warnings:
        machine.log(f"warning: {warning}")
    print(report)
    return 0
