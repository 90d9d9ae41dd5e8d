"""Pictures of the notebooks. Every axis has its unit, every picture of time says which kind of time it shows.

Importing this module sets matplotlib's style: no background, and ink that is read on a white page and on a dark one.
A page is 9.6 inches wide; what is wider is shown smaller.
"""

import base64
import html
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator

from helpers.nets import MASKED, count_layers, net_kind, phase_nets, weight_group
from helpers.run.latency import KINDS

_GREY, _BLUE, _ORANGE, _GREEN, _PURPLE = "#9aa5b1", "#2f6db5", "#e08e2b", "#6aa84f", "#b35c9e"
# By the weights that a net has: those of a prompt and of a token have the same colour.
_COLOURS = {
    "embedding": _GREY,
    "block": _BLUE,
    "lm_head": _ORANGE,
    "greedy_head": _GREEN,
}


# A contrast of 4.3 on white, and on the #111111 of JupyterLab's dark theme.
INK = "#797979"
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "patch.edgecolor")
plt.rcParams.update(dict.fromkeys(_INKED, INK) | {"figure.facecolor": "none", "axes.facecolor": "none"})


def _figure(width: float, height: float, columns: int = 1, **kwargs):
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        return plt.subplots(1, columns, figsize=(width, height), layout="constrained", **kwargs)


def _name_rows(axis, names: Sequence[str], **kwargs) -> None:
    axis.set_yticks(range(len(names)), names, **kwargs)
    axis.invert_yaxis()


def _legend_below(figure, handles, columns: int) -> None:
    figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=columns)


def _kind(net: str) -> str:
    return net_kind(weight_group(net))


def show(figure, path: str | Path, alt: str) -> None:
    """Write a figure as PNG (120 dpi), its folder made if absent, and show that PNG in the notebook.

    alt: what the figure shows, in words, for who cannot see it. It is in HTML beside the PNG, since nbconvert and
    JupyterLab prefer that, and have no alternative text for a PNG.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)  # else the notebook shows it a second time
    data = base64.b64encode(Path(path).read_bytes()).decode()
    width = int(100 * figure.get_figwidth())
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" width="{width}">'
    display({"image/png": data, "text/html": image, "text/plain": alt}, raw=True)


def _draw_mask(axis, mask: np.ndarray, rows: Iterable, title: str) -> None:
    axis.imshow(mask, cmap="gray", vmin=MASKED, vmax=0)
    axis.spines[:].set_visible(True)  # what may be seen is as white as the page
    axis.set_yticks(range(len(mask)), rows)
    axis.set(title=title, xlabel="column: key", ylabel="row: query")


def step_mask(mask: np.ndarray, rows: list[str], title: str):
    """The mask of one lookahead step, its own rows framed. mask: [R,S+R], the cache on the left; rows: their names."""
    figure, axis = _figure(8.5, 4.6)
    _draw_mask(axis, mask, rows, title)
    own = len(rows)
    cache = mask.shape[1] - own
    columns = [f"cache {place}" for place in range(cache)] + rows
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    axis.vlines(np.arange(len(columns)) + 0.5, -0.5, own - 0.5, color="#888888", linewidth=0.4)
    axis.hlines(np.arange(own) + 0.5, -0.5, len(columns) - 0.5, color="#888888", linewidth=0.4)
    axis.add_patch(Rectangle((cache - 0.5, -0.5), own, own, fill=False, edgecolor=_ORANGE, linewidth=2, zorder=3))
    return figure


def tokens_of_steps(accepted: dict[str, list[int]], chosen: str):
    """Tokens of each answer after each lookahead step, beside plain decoding; and what each step of one answer gave.

    accepted: {label: [tokens of a step, …]}, without the first token, which the prefill gives. chosen: one of its keys.
    """
    figure, (every, one) = _figure(9.6, 3.8, columns=2, width_ratios=(1, 1.4))
    for label, counts in accepted.items():
        every.plot(np.cumsum([1, *counts]), label=label)
    most = max(map(len, accepted.values()))
    every.plot([0, most], [1, most + 1], color=INK, linestyle="--", linewidth=1, label="plain decoding")
    every.set(xlabel="step", ylabel="tokens so far", title="every answer, step by step")
    every.legend(fontsize=9, frameon=False)
    counts = accepted[chosen]
    colours = [_BLUE if count > 1 else _GREY for count in counts]
    one.bar(range(1, len(counts) + 1), counts, color=colours, width=0.9)
    one.set(xlabel="step", ylabel="tokens accepted", yticks=range(max(counts) + 1), title=chosen)
    return figure


def net_share(ms: dict[str, dict[str, float]], layers: int, kind: str | None = None):
    """Each net's share of the first token's and of a further token's time: one bar a label, stacked by net.

    ms: {label: {net: ms}}, None where there is no figure. kind: a key of helpers.run.latency.KINDS; left out where the
    labels are such keys themselves, to set one kind beside another.
    """
    if kind is None:
        ms = {textwrap.fill(KINDS[label], 18): nets for label, nets in ms.items()}
    figure, axes = _figure(9.6, 1.6 + 0.55 * len(ms), columns=2)
    phases = {"prefill": "first token (prefill)", "decode": "each further token (decode)"}
    drawn = set()
    for axis, (phase, title) in zip(axes, phases.items(), strict=True):
        for row, figures in enumerate(ms.values()):
            nets = phase_nets(layers, [net for net, value in figures.items() if value is not None])[phase]
            lengths = np.array([figures[net] for net in nets])
            starts = np.cumsum(lengths) - lengths
            total = lengths.sum()
            colours = [_COLOURS[_kind(net)] for net in nets]
            axis.barh([row] * len(nets), lengths, left=starts, color=colours, edgecolor="white", linewidth=0.6)
            axis.annotate(f" {total:,.0f} ms" if total >= 1000 else f" {total:.3g} ms", (total, row), va="center")
            drawn |= set(map(_kind, nets))
        _name_rows(axis, list(ms))
        axis.margins(x=0.24)
        axis.set(xlabel=f"ms, {KINDS[kind]}" if kind else "ms", title=title)
    patches = [Patch(color=colour, label=net) for net, colour in _COLOURS.items() if net in drawn]
    _legend_below(figure, patches, columns=4)
    return figure


def token_times(seconds: dict[str, list[float]], kind: str):
    """Time of each token of an answer: the first, with the prefill in it, then one decode step each.

    seconds: {label: [s, …]}, the first entry being the first-token latency.
    """
    figure, axis = _figure(9, 3.6)
    for label, values in seconds.items():
        axis.plot(range(1, len(values) + 1), np.asarray(values) * 1e3, marker="o", markersize=3, label=label)
    axis.set(yscale="log", xlabel="token of the answer", ylabel="ms", title=f"Token by token: {KINDS[kind]}")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter("")
    axis.legend(frameon=False)
    axis.grid(axis="y", alpha=0.3)
    return figure


def parity_ladder(parity: dict[str, dict[str, dict[str, float]]]):
    """Largest absolute difference and distance from cosine 1 of every net, one mark a rung of the ladder.

    A logarithmic axis has no place for 0: where nothing differs there is no mark.
    """
    figure, axes = _figure(9.6, 4.8, columns=2)
    names = {net for rung in parity.values() for net in rung}
    in_order = [net for phase in phase_nets(count_layers(names), names).values() for net in phase]
    nets = [net for net in dict.fromkeys([*in_order, *sorted(names)]) if net in names]
    for axis, label, title in (
        (axes[0], "largest absolute difference", "Parity, net by net"),
        (axes[1], "1 − cosine similarity", "(no mark: no difference, or not compared)"),
    ):
        for rung, figures in parity.items():
            there = [figures.get(net, {"max_abs": np.nan, "cosine": np.nan}) for net in nets]
            values = np.array([1 - f["cosine"] if axis is axes[1] else f["max_abs"] for f in there])
            values[values <= 0] = np.nan
            axis.plot(values, marker="o", markersize=5, linestyle="none", label=rung)
        axis.set(yscale="log", xlim=(-0.5, len(nets) - 0.5), ylabel=label, title=title)
        axis.set_xticks(range(len(nets)), nets, rotation=90, fontsize=9)
        # Whole decades: else an axis of less than one may have no number.
        low, high = np.log10(axis.get_ylim())
        axis.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))
        axis.grid(axis="y", alpha=0.3)
    _legend_below(figure, axes[0].lines, columns=3)
    return figure


def net_costs(nets: dict[str, dict], title: str):
    """Cycles and size of every net of a bmodel. nets: {net: {"cycles", "bytes"}}."""
    figure, axes = _figure(9.6, 0.8 + 0.27 * len(nets), columns=2, sharey=True)
    for axis, key, label in (
        (axes[0], "cycles", f"thousand cycles, {KINDS['estimated']}"),
        (axes[1], "bytes", "kB of bmodel"),
    ):
        thousands = [(costs[key] or 0) / 1e3 for costs in nets.values()]
        # "block_cache, each of 4" has the colour of a block.
        colours = [_COLOURS.get(_kind(net.partition(",")[0]), _PURPLE) for net in nets]
        axis.barh(range(len(nets)), thousands, color=colours)
        axis.set_xlabel(label)
    _name_rows(axes[0], list(nets), fontsize=9)
    axes[0].set_title(title)
    return figure


def timeline(profiles: dict[str, list[dict]], marked: dict[str, dict[str, list[dict]]], title: str):
    """When the compute unit and the data movement of a net are busy, by the compiler's cycle model: two rows a mode.

    profiles: {mode: commands} from helpers.compile.profile.commands. marked: {what: {mode: commands}}, two at most,
    each in a colour of its own.
    """
    figure, axis = _figure(9.6, 1.6 + 0.8 * len(profiles))
    rows = [f"{mode}, {part}" for mode in profiles for part in ("compute", "data movement")]
    colours = dict(zip(marked, (_ORANGE, _PURPLE), strict=False))
    for place, (mode, commands) in enumerate(profiles.items()):
        moves = [command for command in commands if command["bytes"] is not None]
        compute = [command for command in commands if command["bytes"] is None]
        chosen = [(0, _GREEN, compute), (1, _BLUE, moves)]
        for row, colour, some in chosen + [(1, colours[what], of[mode]) for what, of in marked.items()]:
            bars = [(command["start"], command["cycles"]) for command in some]
            axis.broken_barh(bars, (2 * place + row - 0.4, 0.8), color=colour)
    _name_rows(axis, rows)
    axis.set(xlabel=f"cycle, {KINDS['estimated']} (1 GHz)", title=title)
    named = {"compute": _GREEN, **colours, "other data movement": _BLUE}
    _legend_below(figure, [Patch(color=colour, label=what) for what, colour in named.items()], len(named))
    return figure
