"""Pictures of the notebooks. Every axis has its unit, every picture of time says which kind of time it shows."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from matplotlib.patches import Rectangle

from helpers.nets import MASKED, phase_nets
from helpers.run.latency import KINDS

_COLOURS = {
    "embedding": "#9aa5b1",
    "block": "#2f6db5",
    "lm_head": "#e08e2b",
    "greedy_head": "#6aa84f",
}


def _figure(width=8.0, height=4.0, columns=1, **kwargs):
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", **kwargs)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_below(figure, axis, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=9, ncols=columns)


def show(figure, path: str | Path, alt: str = "") -> None:
    """Write a figure as PNG (120 dpi), its folder made if absent, and show that PNG in the notebook.

    alt: what the figure shows, in words, for who cannot see it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)  # else the notebook shows it a second time
    display(Image(filename=str(path), width=int(100 * figure.get_figwidth()), alt=alt or None))


def _draw_mask(axis, mask: np.ndarray, rows: Iterable, title: str) -> None:
    axis.imshow(mask, cmap="gray", vmin=MASKED, vmax=0)
    axis.spines[:].set_visible(True)  # what may be seen is as white as the page
    axis.set_yticks(range(len(mask)), rows)
    axis.set(title=title, xlabel="column: key", ylabel="row: query")


def masks(pictures: dict[str, tuple[Iterable, np.ndarray]]):
    """Attention masks side by side: white is 0, black is MASKED. pictures: {title: (labels of the rows, mask)}."""
    widths = [mask.shape[1] / mask.shape[0] for _, mask in pictures.values()]
    figure, axes = _figure(9, 3.2, columns=len(pictures), width_ratios=widths)
    for axis, (title, (rows, mask)) in zip(np.atleast_1d(axes), pictures.items(), strict=True):
        _draw_mask(axis, mask, rows, title)
    return figure


def step_mask(mask: np.ndarray, rows: list[str], title: str):
    """The mask of one lookahead step, its own rows framed. mask: [R,S+R], the cache on the left; rows: their names."""
    figure, axis = _figure(8.5, 4.6)
    _draw_mask(axis, mask, rows, title)
    cache = mask.shape[1] - len(rows)
    columns = [f"cache {place}" for place in range(cache)] + rows
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    axis.vlines(np.arange(len(columns)) + 0.5, -0.5, len(rows) - 0.5, color="#888888", linewidth=0.4)
    axis.hlines(np.arange(len(rows)) + 0.5, -0.5, len(columns) - 0.5, color="#888888", linewidth=0.4)
    axis.add_patch(
        Rectangle((cache - 0.5, -0.5), len(rows), len(rows), fill=False, edgecolor="#e08e2b", linewidth=2, zorder=3)
    )
    return figure


def tokens_of_steps(accepted: dict[str, list[int]], chosen: str):
    """Tokens of each answer after each lookahead step, beside plain decoding; and what each step of one answer gave.

    accepted: {label: [tokens of a step, …]}, without the first token, which the prefill gives. chosen: one of its keys.
    """
    figure, axes = _figure(11, 3.8, columns=2, width_ratios=(1, 1.4))
    for label, counts in accepted.items():
        axes[0].plot(np.cumsum([1, *counts]), label=label)
    most = max(map(len, accepted.values()))
    axes[0].plot([0, most], [1, most + 1], color="black", linestyle="--", linewidth=1, label="plain decoding")
    axes[0].set(xlabel="step", ylabel="tokens so far", title="every answer, step by step")
    axes[0].legend(fontsize=8)
    counts = accepted[chosen]
    colours = ["#2f6db5" if count > 1 else "#9aa5b1" for count in counts]
    axes[1].bar(range(1, len(counts) + 1), counts, color=colours, width=0.9)
    axes[1].set(xlabel="step", ylabel="tokens accepted", yticks=range(max(counts) + 1), title=chosen)
    return figure


def _kind_of_net(net: str) -> str:
    return "block" if net.startswith("block") else net.replace("embedding_cache", "embedding")


def _order_of_net(net: str) -> tuple:
    kind, _, number = net.rpartition("_")
    order = ("embedding", "block", "embedding_cache", "block_cache", "lm_head")
    name = kind if number.isdigit() else net
    return order.index(name) if name in order else len(order), int(number) if number.isdigit() else 0


def net_share(ms: dict[str, dict[str, float]], layers: int, kind: str | None = None):
    """Each net's share of the first token's and of a further token's time: one bar a label, stacked by net.

    ms: {label: {net: ms}}, None where there is no figure. kind: a key of helpers.run.latency.KINDS; left out where the
    labels are such keys themselves, to set one kind beside another.
    """
    if kind is None:
        ms = {textwrap.fill(KINDS[label], 18): nets for label, nets in ms.items()}
    figure, axes = _figure(11, 1.6 + 0.55 * len(ms), columns=2)
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        seen = set()
        for row, nets in enumerate(ms.values()):
            left = 0.0
            for net in phase_nets(layers, [net for net, value in nets.items() if value is not None])[phase]:
                group = _kind_of_net(net)
                axis.barh(
                    row,
                    nets[net],
                    left=left,
                    color=_COLOURS[group],
                    edgecolor="white",
                    linewidth=0.6,
                    label=None if group in seen else group,
                )
                seen.add(group)
                left += nets[net]
            axis.annotate(f" {left:,.0f} ms" if left >= 1000 else f" {left:.3g} ms", (left, row), va="center")
        axis.set_yticks(range(len(ms)), list(ms))
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_xlabel(f"ms, {KINDS[kind]}" if kind else "ms", fontsize=9)
        axis.set_title({"prefill": "first token (prefill)", "decode": "each further token (decode)"}[phase])
    _legend_below(figure, axes[0], columns=4)
    return figure


def token_times(seconds: dict[str, list[float]], kind: str):
    """Time of each token of an answer: the first, with the prefill in it, then one decode step each.

    seconds: {label: [s, …]}, the first entry being the first-token latency.
    """
    figure, axis = _figure(9, 3.6)
    for label, values in seconds.items():
        axis.plot(range(1, len(values) + 1), np.asarray(values) * 1e3, marker="o", markersize=3, label=label)
    axis.set_yscale("log")
    axis.set_xlabel("token of the answer")
    axis.set_ylabel("ms")
    axis.set_title(f"Token by token: {KINDS[kind]}")
    axis.legend(frameon=False)
    axis.grid(axis="y", alpha=0.3)
    return figure


def parity_ladder(parity: dict[str, dict[str, dict[str, float]]]):
    """Largest absolute difference and distance from cosine 1 of every net, one mark a rung of the ladder.

    A logarithmic axis has no place for 0: where nothing differs there is no mark.
    """
    figure, axes = _figure(12, 4.8, columns=2)
    nets = sorted({net for rung in parity.values() for net in rung}, key=_order_of_net)
    for axis, key, label in (
        (axes[0], "max_abs", "largest absolute difference"),
        (axes[1], "cosine", "1 − cosine similarity"),
    ):
        for rung, figures in parity.items():
            values = np.array([figures[net][key] if net in figures else np.nan for net in nets])
            values = 1 - values if key == "cosine" else values
            values[values <= 0] = np.nan
            axis.plot(values, marker="o", markersize=5, linestyle="none", alpha=0.8, label=rung)
        axis.set_yscale("log")
        axis.set_xticks(range(len(nets)), nets, rotation=90, fontsize=8)
        axis.set_xlim(-0.5, len(nets) - 0.5)
        # Whole decades: else an axis of less than one may have no number.
        low, high = np.log10(axis.get_ylim())
        axis.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_title("Parity, net by net")
    axes[1].set_title("(no mark: no difference, or not compared)", fontsize=9)
    _legend_below(figure, axes[0], columns=3)
    return figure


def net_costs(nets: dict[str, dict], title: str):
    """Cycles and size of every net of a bmodel. nets: {net: {"cycles", "bytes"}}."""
    figure, axes = _figure(11, 0.6 + 0.24 * len(nets), columns=2, sharey=True)
    names = list(nets)
    for axis, key, scale, label in (
        (axes[0], "cycles", 1e3, "thousand cycles, estimated by the compiler's cycle model"),
        (axes[1], "bytes", 1e3, "kB of bmodel"),
    ):
        axis.barh(
            range(len(names)),
            [(nets[name][key] or 0) / scale for name in names],
            color=[_COLOURS.get(_kind_of_net(name), "#b35c9e") for name in names],
        )
        axis.set_xlabel(label, fontsize=9)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_title(title)
    return figure


def timeline(profiles: dict[str, list[dict]], marked: dict[str, list[dict]], title: str):
    """When the compute unit and the data movement of a net are busy, by the compiler's cycle model: two rows a mode.

    profiles: {mode: commands} from helpers.compile.profile.commands. marked: {mode: commands} in another colour.
    """
    figure, axis = _figure(11, 1.2 + 0.8 * len(profiles))
    rows = {}
    for mode, commands in profiles.items():
        moves = [command for command in commands if command["bytes"] is not None]
        compute = [command for command in commands if command["bytes"] is None]
        for part, colour, chosen in (
            ("compute", "#6aa84f", compute),
            ("data movement", "#2f6db5", moves),
            ("data movement", "#e08e2b", marked[mode]),
        ):
            row = rows.setdefault(f"{mode}, {part}", len(rows))
            axis.broken_barh([(c["start"], c["cycles"]) for c in chosen], (row - 0.4, 0.8), color=colour)
    axis.set_yticks(list(rows.values()), list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("cycle, estimated by the compiler's cycle model (1 GHz); orange: small loads beside the weights")
    axis.set_title(title)
    return figure


def latency_over_prompts(record: dict, estimate_ms: dict[str, float] | None = None):
    """Median and p95 of first-token latency over prompt lengths, beside the compiler's estimate where it is the chip's.

    record: from helpers.run.latency.measure. estimate_ms: drawn only beside a measurement on a chip.
    """
    figure, axes = _figure(10, 3.6, columns=2)
    lengths = [prompt["tokens"] for prompt in record["prompts"]]
    for axis, key, title in ((axes[0], "first_token", "first token"), (axes[1], "decode", "each further token")):
        medians = [prompt[key]["median_ms"] for prompt in record["prompts"]]
        tails = [prompt[key]["p95_ms"] for prompt in record["prompts"]]
        axis.plot(lengths, medians, marker="o", label="median")
        axis.plot(lengths, tails, marker="^", linestyle=":", label="p95")
        if estimate_ms and record["kind"] == "measured":
            axis.axhline(estimate_ms[f"{key}_ms"], color="#888", linestyle="--", label=KINDS["estimated"])
        # The axis begins at 0, and no mark is cut off at its top.
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set_xlabel("tokens of the prompt")
        axis.set_ylabel("ms")
        axis.set_title(f"{title}: {KINDS[record['kind']]}", fontsize=10)
        axis.legend(frameon=False)
    return figure
