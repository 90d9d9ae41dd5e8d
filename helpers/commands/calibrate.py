"""`python -m helpers calibrate`: a checkpoint whose weights are chosen for the compiler's rounding to int4."""

from helpers import machine
from helpers.calibrate import calibrating


def add_arguments(parser) -> None:
    parser.add_argument("--model_path", "-m", required=True, help="folder of the checkpoint, patched or not")
    parser.add_argument("--out", required=True, help="folder for the calibrated checkpoint")
    parser.add_argument("--mode", default="int4", help="that it will be compiled in: int4")
    parser.add_argument("--head_mode", help="of lm_head: int4 (default); int8 or bf16 leave it alone")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to calibrate on (default: Python's own help topics)")
    parser.add_argument("--tokens", type=int, default=calibrating.TOKENS, help="of it (default %(default)s)")


def run(args) -> int:
    path = calibrating.calibrate(args.model_path, args.out, args.mode, args.head_mode, args.text, args.tokens)
    print(path)
    machine.log(f"next: python -m helpers patch --model_path {path}")
    return 0
