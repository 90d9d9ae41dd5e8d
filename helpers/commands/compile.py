"""`python -m helpers compile`: compile the ONNX nets, or a checkpoint, to one bmodel for BM1684X."""

from helpers import artefacts, machine
from helpers.compile import compiling, llm_convert
from helpers.compile.plan import plan_nets
from helpers.errors import UserError


def add_arguments(parser) -> None:
    parser.add_argument("--name", required=True, help="name of the model, such as qwen-7b: begins the file's name")
    parser.add_argument("--mode", default="int8", help="bf16, int8 (default) or int4")
    parser.add_argument("--head_mode", help="of lm_head, where it is another (--via onnx only)")
    parser.add_argument("--via", choices=("onnx", "llm_convert"), default="onnx", help="onnx (default)")
    parser.add_argument("--onnx", help="folder of ONNX nets, from `export`")
    parser.add_argument("--model_path", help="folder of the checkpoint, for --via llm_convert")
    parser.add_argument("--seq_length", type=int, help="S; the ONNX nets have theirs, --via llm_convert takes 512")
    parser.add_argument("--out", required=True, help="folder for the bmodel and the nets' own folders")
    parser.add_argument("--num_device", type=int, default=1, help="devices to split the model over (default 1)")
    parser.add_argument(
        "--addr_mode",
        help="of the cache nets: basic (default) or io_alone (default of --via llm_convert, as the converter has it)",
    )
    parser.add_argument(
        "--dynamic", nargs="?", type=int, choices=(0, 1), const=1, default=0, help="prefill takes any length up to S"
    )
    parser.add_argument("--jobs", type=int, help="nets at a time (default: one a core, as memory allows)")
    parser.add_argument("--scheduler", help="address of a Dask scheduler that sends the nets to many machines")


def run(args) -> int:
    common = {"num_device": args.num_device, "dynamic": bool(args.dynamic)}
    if args.via == "llm_convert":
        if not args.model_path:
            raise UserError("--via llm_convert needs --model_path DIR, the folder of the checkpoint.")
        if args.head_mode:
            raise UserError("--head_mode goes with --via onnx: the converter has one mode for all nets, leave it out.")
        seq_length = 512 if args.seq_length is None else args.seq_length
        common |= {"addr_mode": args.addr_mode or "io_alone"}
        target = llm_convert.convert(args.model_path, args.out, args.name, args.mode, seq_length, **common)
    else:
        if not args.onnx:
            raise UserError("--onnx DIR is needed: the folder that `python -m helpers export` made.")
        compiled = plan_nets(args.onnx, args.num_device).seq_length
        if args.seq_length not in (None, compiled):
            raise UserError(
                f"The nets in {args.onnx} are for a sequence length of {compiled}, {args.seq_length} was asked for: "
                f"export again with --seq_length {args.seq_length}."
            )
        common |= {"addr_mode": args.addr_mode or "basic", "jobs": args.jobs, "scheduler": args.scheduler}
        common |= {"head_mode": args.head_mode}
        target = compiling.compile_model(args.onnx, args.out, args.name, args.mode, **common)
    manifest = artefacts.read_manifest(target)
    if manifest["estimates"]:
        first, decode = manifest["estimates"]["first_token_ms"], manifest["estimates"]["decode_ms"]
        machine.log(f"estimated by the compiler's cycle model: first token {first:.2f} ms, decode {decode:.2f} ms")
    print(target)
    return 0
