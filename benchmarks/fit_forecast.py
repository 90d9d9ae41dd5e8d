"""Fit the three constants of helpers.forecast on published measurements, and say how good they are.

    python -m benchmarks.fit_forecast

Rows count whose model has the shape of first-generation Qwen, on one BM1684X of a board or a card. Each model weighs
the same, however many rows it has. Then one model is left out at a time and forecast from the others.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from helpers.compile.profile import FREQUENCY
from helpers.fetch.fetching import MODELS
from helpers.forecast import figures, forecasting
from helpers.forecast.forecasting import BANDWIDTH, PROGRAMS, Constants, cycle_seconds, figures_of
from helpers.forecast.shape import SIZES, Shape, shape_of

PUBLISHED = Path(figures.__file__).with_name("published.csv")
QWEN_7B = {size: getattr(MODELS["qwen-7b"], size) for size in SIZES}
# Sizes of their config.json. Keys and values have as many heads as queries, and the feed-forward is SwiGLU.
SHAPES = {
    "Qwen-7B-Chat": QWEN_7B,
    "Qwen1.5-7B-Chat": QWEN_7B,
    "MiniCPM-2B": dict(zip(SIZES, (2304, 5760, 40, 36, 122753), strict=True)),
    "Qwen1.5-1.8B-Chat": dict(zip(SIZES, (2048, 5504, 24, 16, 151936), strict=True)),
    "Qwen1.5-4B-Chat": dict(zip(SIZES, (2560, 6912, 40, 20, 151936), strict=True)),
    "Baichuan2-7B-Chat": QWEN_7B | {"vocab_size": 125696},
}


@dataclass(frozen=True)
class Row:
    """A published measurement with a shape. program: on the host, one of forecasting.PROGRAMS."""

    model: str
    board: str
    program: str
    shape: Shape
    first_token_s: float
    tokens_per_s: float
    source: str


def published_rows() -> list[Row]:
    """The rows of published.csv that have the shape of first-generation Qwen, a sequence length, and one device."""
    rows = []
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            mode = row["quantization"].split()[0] if row["quantization"] else ""
            # A slow RISC-V host has a card, too; where no board is told, it may be one.
            board = next((kind for kind in ("RISC-V", "SoC", "PCIe") if kind in row["board"]), "RISC-V")
            whole = row["model"] in SHAPES and mode in ("bf16", "int8", "int4") and row["devices"] == "1"
            if whole and board != "RISC-V" and row["seq_length"]:
                shape = shape_of(**SHAPES[row["model"]], mode=mode, seq_length=int(row["seq_length"]))
                numbers = [float(row[key] or "nan") for key in ("first_token_s", "tokens_per_s")]
                rows.append(Row(row["model"], board, program_of(row), shape, *numbers, row["source"]))
    return rows


def program_of(row: dict[str, str]) -> str:
    """The kind of program on the host, of a row of published.csv."""
    return "c++" if "C++" in row["runtime"] else "python"


def contradicted(rows: list[Row]) -> list[bool]:
    """Whether a row is a fifth off the median token/s of the rows whose blocks, mode and S are the same."""
    found = []
    for row in rows:
        same = replace(row.shape, vocab_size=1)
        median = np.median([other.tokens_per_s for other in rows if replace(other.shape, vocab_size=1) == same])
        found.append(bool(abs(np.log(row.tokens_per_s / median)) > np.log(1.2)))
    return found


def fit(rows: list[Row]) -> Constants:
    """The constants with the least mean of |log(forecast / published)|, over models, searched in steps.

    Of absolute errors, since some rows contradict others: squares would follow those that are farthest off.
    """
    shares, launches, passes = np.arange(0.5, 1.001, 0.01), np.arange(0, 1.001, 0.01) / 1e3, np.arange(0, 4.001, 0.1)
    decode = {program: np.zeros((len(passes), len(launches))) for program in PROGRAMS}
    for row in rows:
        token = sum(cycle_seconds(row.shape, figures_of(row.shape), "_cache").values())
        cache, started = passes * row.shape.cache_bytes / BANDWIDTH, launches * (row.shape.layers + 2)
        off = np.log((token + cache[:, None] + started) * row.tokens_per_s)
        decode[row.program] += _weight(row, rows) * np.abs(off)
    # Of each number of passes the best launch of each program.
    best = sum(of_program.min(axis=1) for of_program in decode.values()).argmin()
    launch_s = {program: float(launches[of_program[best].argmin()]) for program, of_program in decode.items()}
    prefill = np.zeros(len(shares))
    for row in rows:
        first = sum(cycle_seconds(row.shape, figures_of(row.shape), "").values())
        prefill += _weight(row, rows) * np.abs(np.log(first / shares / row.first_token_s))
    rounded = {program: round(launch, 5) for program, launch in launch_s.items()}
    return Constants(round(float(shares[prefill.argmin()]), 2), rounded, round(float(passes[best]), 1))


def _weight(row: Row, rows: list[Row]) -> float:
    """Each model weighs the same, however many rows it has."""
    return 1 / sum(other.model == row.model for other in rows)


def errors(rows: list[Row], constants: Constants) -> list[dict]:
    """A line a row: published and forecast, and forecast / published - 1."""
    lines = []
    for row in rows:
        found = forecasting.forecast(row.shape, constants, program=row.program)
        lines.append(
            {
                "model": row.model,
                "mode": row.shape.mode,
                "S": row.shape.seq_length,
                "board": row.board,
                "program": row.program,
                "first token, s": row.first_token_s,
                "forecast, s": found.first_token_s,
                "off, s": found.first_token_s / row.first_token_s - 1,
                "token/s": row.tokens_per_s,
                "forecast, token/s": found.tokens_per_s,
                "off, token/s": found.tokens_per_s / row.tokens_per_s - 1,
            }
        )
    return lines


def left_out(rows: list[Row]) -> list[dict]:
    """The same, each model forecast with constants that were fitted on the others."""
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        rest = fit([row for row in rows if row.model != model])
        lines += errors([row for row in rows if row.model == model], rest)
    return lines


def main() -> None:
    rows = published_rows()
    constants = fit(rows)
    print(constants, f"at {FREQUENCY / 1e9:.0f} GHz, from {len(rows)} rows")
    for title, lines in (("all rows", errors(rows, constants)), ("one model left out", left_out(rows))):
        print(title)
        for line in lines:
            print("  " + "  ".join(f"{v:9.3f}" if isinstance(v, float) else f"{v!s:16}" for v in line.values()))
        for key in ("off, s", "off, token/s"):
            off = np.abs([line[key] for line in lines if np.isfinite(line[key])])
            print(f"  {key}: median {np.median(off):.3f}, most {off.max():.3f}")


if __name__ == "__main__":
    main()
