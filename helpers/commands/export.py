"""`python -m helpers export`: write every net of a patched checkpoint as ONNX."""

from helpers.export.exporting import export


def add_arguments(parser) -> None:
    parser.add_argument("--model_path", "-m", required=True, help="folder of a patched checkpoint")
    parser.add_argument("--seq_length", "-s", type=int, default=512, help="compiled sequence length S (default 512)")
    parser.add_argument("--out", required=True, help="folder for the ONNX nets")
    parser.add_argument("--rows", type=int, default=1, help="rows of a decode step (default 1; 10 for lookahead)")


def run(args) -> int:
    folder = export(args.model_path, args.out, args.seq_length, rows=args.rows)
    print(folder)
    return 0
