"""`python -m helpers fetch`: bring a checkpoint or a prepared artefact to this machine."""

from helpers.fetch import prepared
from helpers.fetch.fetching import DEFAULT_FOLDER, MODELS, fetch
from helpers.machine import log


def add_arguments(parser) -> None:
    parser.add_argument("--name", choices=MODELS, help="the model; not needed with a folder or --artefact")
    parser.add_argument(
        "--source",
        default="huggingface",
        metavar="huggingface|modelscope|dfss|FOLDER",
        help="where from (default: huggingface; HF_ENDPOINT names a mirror); a folder is verified in place",
    )
    parser.add_argument("--out", metavar="DIR", help=f"default: {DEFAULT_FOLDER}/NAME")
    parser.add_argument("--revision", help="commit, tag or branch on the hub (default: the pinned one)")
    parser.add_argument(
        "--artefact",
        choices=prepared.ARTEFACTS,
        help="one of Sophgo's prepared artefacts of Qwen-7B-Chat instead of a checkpoint; needs the package dfss",
    )


def run(args) -> None:
    path = fetch(args.name, args.source, args.out, args.revision, args.artefact)
    print(path)
    if args.artefact:
        log(prepared.next_step(args.artefact, path))
    else:
        log(f"next: python -m helpers patch --model_path {path}")
