"""`python -m helpers serve`: a bmodel over HTTP, one request at a time."""

import argparse
import contextlib
import functools
import ipaddress
import os
import re
import resource
import signal
from pathlib import Path

from helpers.chat.session import by_heart
from helpers.commands.arguments import add_model_arguments, open_tokenizer
from helpers.errors import UserError
from helpers.machine import log
from helpers.run.engines import open_engine
from helpers.run.generation import QwenRunner
from helpers.run.latency import KINDS
from helpers.serve.access import Access, host_name

WAITING = 16
KEY_VARIABLE = "QWEN_SERVICE_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--name", help="the model's name over HTTP; default: the bmodel's file name")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--api-key", help=f"ask every client for it; better given as {KEY_VARIABLE}")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name to be reached by")
    parser.add_argument("--allow-origin", action="append", default=[], metavar="URL", help="whose pages may ask, or *")
    parser.add_argument("--forwarded-allow-ips", default="", metavar="IP[,IP]", help="whose X-Forwarded-* count, or *")
    parser.add_argument("--waiting", type=int, default=WAITING, help="requests that may wait; more get 429")
    parser.add_argument("--time-limit", type=float, default=600, metavar="S", help="seconds a request, waiting too")
    parser.add_argument("--max-body", type=int, default=1 << 19, metavar="BYTES", help="longest request")


def run(args: argparse.Namespace) -> None:
    try:
        from helpers.serve.api import Settings, create_app
        from helpers.serve.queue import ChipQueue
        from helpers.serve.server import Server, is_loopback, listen
    except ImportError as error:
        raise UserError(
            f"The service needs {error.name}, which is absent: pip install fastapi sse-starlette uvicorn."
        ) from None
    for name, least in (("waiting", 0), ("time_limit", 1), ("max_body", 1)):
        if not getattr(args, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be {least} or more.")
    api_key = read_key(args)
    # A service is ended by SIGTERM, in the same order as by Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with listen(args.host, args.port) as bound:
        access = read_access(args, is_loopback(bound), api_key is not None)
        tokenizer = open_tokenizer(args.model, args.tokenizer)
        engine = functools.partial(open_engine, args.model, engine=args.engine, devid=args.devid)
        queue = ChipQueue(lambda: QwenRunner(engine()), tokenizer, args.waiting)
        runner = queue.start()
        name = args.name or Path(args.model).stem
        settings = Settings(name, args.system, api_key, args.time_limit, args.max_body, access, by_heart(args.model))
        app = create_app(queue, runner, settings)
        # Each connection is a file: a burst of a thousand must not be cut at the usual soft limit of 1024.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        host, port = bound.getsockname()[:2]
        log(f"{name} on the {runner.engine.reason}\ntimes: {KINDS[runner.engine.kind_of_time]}")
        if api_key is None and not is_loopback(bound):
            log(f"warning: every machine that reaches {host} may use this service; {KEY_VARIABLE} sets a key.")
        log(f"listening on http://{host_name(host)}:{port}")
        try:
            # After its own orderly end uvicorn raises the signal that it was ended by once more.
            with contextlib.suppress(KeyboardInterrupt):
                Server(app, queue).run(sockets=[bound])
        finally:
            queue.close()
        log("stopped")


def read_key(args: argparse.Namespace) -> str | None:
    """The API key that clients must send, None for none. Raises UserError where no client can send it."""
    key = os.environ.get(KEY_VARIABLE) or None if args.api_key is None else args.api_key
    if key is not None and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", key):
        where = f"The API key in {KEY_VARIABLE}" if args.api_key is None else "The --api-key"
        raise UserError(f"{where} cannot be sent in a header: ASCII signs without blanks around them can.")
    return key


def read_access(args: argparse.Namespace, loopback: bool, has_key: bool) -> Access:
    """Who may ask. Raises UserError where an option is none. loopback: whether it listens on this machine only."""
    for origin in args.allow_origin:
        if origin in ("*", "null") and not has_key:
            remedy = f"set an API key ({KEY_VARIABLE}), or name the pages' origin."
            raise UserError(f"--allow-origin {origin} lets every page on the web ask: {remedy}")
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+", origin):
            raise UserError(f"--allow-origin is {origin!r}, an origin such as https://chat.example.com is needed.")
    for name in args.allow_host:
        if not re.fullmatch(r"[\w.-]+(:\d+)?|\[?[0-9a-fA-F:.]+\]?(:\d+)?", name, re.ASCII):
            raise UserError(f"--allow-host is {name!r}, a host name such as chat.example.com is needed.")
    try:
        names = ["0.0.0.0/0", "::/0"] if args.forwarded_allow_ips == "*" else args.forwarded_allow_ips.split(",")
        proxies = tuple(ipaddress.ip_network(name.strip(), strict=False) for name in names if name.strip())
    except ValueError as error:
        raise UserError(f"--forwarded-allow-ips: {error}; addresses such as 10.0.0.0/8 are needed.") from None
    hosts = frozenset(map(host_name, ["localhost", "127.0.0.1", "::1", args.host, *args.allow_host]))
    return Access(hosts if loopback or args.allow_host else None, tuple(args.allow_origin), proxies)
