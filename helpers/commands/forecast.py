"""`python -m helpers forecast`: what the chip will do with a model, before you own one."""

import json
from dataclasses import asdict

from helpers.compile.options import QUANTIZE
from helpers.fetch.fetching import MODELS
from helpers.forecast import forecasting
from helpers.forecast.forecasting import PROGRAMS
from helpers.forecast.shape import HOSTS, SIZES, shape_of

HELP = {"intermediate_size": "feed-forward length of one branch: half of what Qwen's config.json says"}


def add_arguments(parser) -> None:
    parser.add_argument("--name", help=f"a model whose sizes are known: {', '.join(MODELS)}")
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int, help=HELP.get(size, "of the model's config.json"))
    parser.add_argument("--mode", default="int8", help=f"{', '.join(QUANTIZE)} (default int8)")
    parser.add_argument("--seq_length", type=int, default=512, help="S (default 512)")
    parser.add_argument("--num_device", type=int, default=1, help="devices that share the model (default 1)")
    parser.add_argument("--host", choices=HOSTS, help="whose memory is looked at: a board (soc) or a card (pcie)")
    parser.add_argument("--program", choices=PROGRAMS, default="python", help="on the host (default python)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args) -> None:
    sizes = {size: getattr(args, size) for size in SIZES}
    how = {"mode": args.mode, "seq_length": args.seq_length, "num_device": args.num_device}
    shape = shape_of(args.name, **sizes, **how)
    found = forecasting.forecast(shape, program=args.program)
    hosts = {args.host: found.fits[args.host]} if args.host else found.fits
    if args.json:
        print(json.dumps(asdict(shape) | asdict(found) | {"fits": hosts, "program": args.program}))
        return
    first, tokens = found.first_token_s_interval, found.tokens_per_s_interval
    print(f"first token  {found.first_token_s:8.3f} s        ({first[0]:.3f} to {first[1]:.3f})  {found.kind}")
    print(f"then         {found.tokens_per_s:8.2f} token/s  ({tokens[0]:.2f} to {tokens[1]:.2f})  {found.kind}")
    if shape.num_device > 1:
        print("             what passes between the devices is not counted")
    parts = ", ".join(f"{part} {count / 1e9:.2f}" for part, count in found.device_parts.items())
    print(f"memory       {found.device_bytes / 1e9:8.2f} GB       ({parts})")
    for host, fits in hosts.items():
        room = f"in the {HOSTS[host] * shape.num_device / 1e9:.1f} GB that a program gets there"
        if host == "soc" and not fits:
            room = "there: a board has one device" if shape.num_device > 1 else f"{room} (it can be divided otherwise)"
        print(f"{host:12} {'fits' if fits else 'does not fit'} {room}")
