"""`python -m helpers chat`: talk with a bmodel, on the chip or on the simulator."""

import argparse
import json
import os
import sys
from dataclasses import fields
from typing import TextIO

from helpers.chat.session import MAX_TURNS, Answer, ChatSession, figures, figures_object
from helpers.chat.terminal import Terminal, as_typed, talk
from helpers.commands.arguments import add_model_arguments, open_tokenizer
from helpers.errors import UserError
from helpers.machine import log
from helpers.nets import CANDIDATES
from helpers.run.engines import open_engine
from helpers.run.engines.base import Engine
from helpers.run.generation import QwenRunner, Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--question", help="answer this one and leave")
    parser.add_argument("--json", action="store_true", help="with --question: print one JSON object")
    parser.add_argument("--max-turns", type=int, default=MAX_TURNS, help="earlier turns to remember")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: as many as fit S")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p)
    parser.add_argument("--top-k", type=int, default=Sampling.top_k, help=f"1 to {CANDIDATES}")
    parser.add_argument("--repetition-penalty", type=float, default=Sampling.repetition_penalty)
    parser.add_argument("--repetition-last-n", type=int, default=Sampling.repetition_last_n)
    parser.add_argument("--seed", type=int, default=Sampling.seed, help="of the draw")


def run(args: argparse.Namespace) -> None:
    if args.json and args.question is None:
        raise UserError("--json answers one question: give it with --question.")
    if sys.__stdout__ is None:
        raise UserError("Standard output is closed, and the answer goes there: leave it open, or write `> FILE`.")
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    tokenizer = open_tokenizer(args.model, args.tokenizer)
    settings = {"max_turns": args.max_turns, "sampling": sampling, "max_new_tokens": args.max_new_tokens}
    out = take_stdout() if args.json else sys.stdout
    with open_engine(args.model, engine=args.engine, devid=args.devid) as engine:
        log(engine.reason)
        session = ChatSession(QwenRunner(engine), tokenizer, system=as_typed(args.system), **settings)
        if args.question is None:
            talk(session, Terminal())
        elif args.json:
            for _ in session.ask(as_typed(args.question)):
                pass
            print(json.dumps(answer_object(session.last, engine), ensure_ascii=False), file=out, flush=True)
        else:
            Terminal().answer(session.ask(as_typed(args.question)))
            log(figures(session))


def take_stdout() -> TextIO:
    """Standard output for one JSON object, in UTF-8: what libraries print from now on goes to standard error."""
    sys.stdout.flush()
    out = open(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def answer_object(answer: Answer, engine: Engine) -> dict:
    """What `chat --json` prints: tokens, text, engine, first_token_s, tokens_per_s, and the kind of time."""
    return {"tokens": answer.tokens, "text": answer.text, "engine": engine.name, **figures_object(answer, engine)}
