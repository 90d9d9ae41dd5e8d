"""How fast the simulator answers, with its threads scheduled in each of two ways, measured side by side.

    python -m benchmarks.simulator_speed --model FILE.bmodel [--tokens 4] [--repetitions 3] [--json OUT.json]

The ways take turns, so that whatever else the machine does falls on all of them alike. Simulator wall time: it says
nothing about a chip's. The tokens must be the same each time.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from helpers.errors import UserError
from helpers.files import write_json
from helpers.run.engines.simulator import SimulatorEngine
from helpers.run.generation import QwenRunner

MEANING = {
    "yield": "preloaded library: a thread that polls offers its core",
    "plain": "as the wheel brings it",
}
PROMPT = [3, 5, 7, 11, 13]


def processor_seconds(engine: SimulatorEngine) -> float:
    """Processor time that the simulator's process has taken, all of its threads together."""
    fields = Path(f"/proc/{engine._worker._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(model: str, scheduling: str, tokens: int) -> dict:
    """One fresh engine: seconds of a prefill, seconds of each decoded token, processor seconds of both, the tokens."""
    with SimulatorEngine(model, scheduling) as engine:
        if engine.scheduling != scheduling:
            raise UserError(f"The simulator's threads cannot be made to yield. {engine.no_yield}.")
        runner = QwenRunner(engine)
        runner.prefill(PROMPT)
        answer = [runner.greedy_token()]
        busy = processor_seconds(engine)
        started = time.perf_counter()
        runner.prefill(PROMPT)
        answer.append(runner.greedy_token())
        prefill = time.perf_counter() - started
        decode = []
        for _ in range(tokens):
            started = time.perf_counter()
            runner.decode(answer[-1])
            answer.append(runner.greedy_token())
            decode.append(time.perf_counter() - started)
        return {
            "prefill_s": prefill,
            "decode_s": decode,
            "processor_s": processor_seconds(engine) - busy,
            "tokens": answer,
        }


def compare(model: str, tokens: int, repetitions: int, ways: list[str]) -> dict:
    """Measurements of each way, in turns. Raises UserError where two of them differ in a token."""
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for repetition in range(repetitions):
        for way in ways:
            print(f"{repetition + 1}/{repetitions} {way}", file=sys.stderr, flush=True)
            found[way].append(measure(model, way, tokens))
    answers = {tuple(run["tokens"]) for runs in found.values() for run in runs}
    if len(answers) != 1:
        raise UserError(f"The tokens differ between runs: {answers}.")
    summary = {}
    for way, runs in found.items():
        decode = [seconds for run in runs for seconds in run["decode_s"]]
        summary[way] = {
            "prefill_s": statistics.median(run["prefill_s"] for run in runs),
            "token_s": statistics.median(decode),
            "tokens_per_s": 1 / statistics.median(decode),
            "processor_s": statistics.median(run["processor_s"] for run in runs),
            "best_tokens_per_s": 1 / min(decode),
        }
    return {
        "model": Path(model).name,
        "kind": "simulator wall",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "repetitions": repetitions,
        "tokens": tokens,
        "ways": summary,
        "runs": found,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(result: dict) -> str:
    """The summary as a Markdown table; ratios are to the slowest way's medians."""
    ways = result["ways"]
    base = ways.get("plain") or max(ways.values(), key=lambda way: way["token_s"])
    lines = [
        f"{result['model']} on {result['processor']}, {result['cores']} cores, load {result['load_average']:.1f}; "
        f"simulator wall time, median of {result['repetitions']} prefills and "
        f"{result['repetitions'] * result['tokens']} tokens",
        "",
        "| threads | prefill | ratio | token/s | ratio | best token/s | processor time | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for way, found in ways.items():
        lines.append(
            f"| {way} | {found['prefill_s']:.2f} s | {base['prefill_s'] / found['prefill_s']:.1f} "
            f"| {found['tokens_per_s']:.2f} | {base['token_s'] / found['token_s']:.1f} "
            f"| {found['best_tokens_per_s']:.2f} | {found['processor_s']:.2f} s | {MEANING[way]} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Qwen bmodel for one device")
    parser.add_argument("--tokens", type=int, default=4, help="decoded in each repetition")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=MEANING, default=list(MEANING))
    parser.add_argument("--json", help="write everything that was measured to this file")
    args = parser.parse_args()
    try:
        result = compare(args.model, args.tokens, args.repetitions, args.ways)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
