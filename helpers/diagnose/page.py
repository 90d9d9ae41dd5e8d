"""The report as one page of text: a flow chart of the rungs, the figures of each net, and one sentence."""

from helpers.diagnose.bands import COLUMN, LIMITS
from helpers.diagnose.deeper import TOLERANCE, Deeper
from helpers.diagnose.ladder import COMPILED, LOOP, ONNX, PATCHED, Report, Step

_TITLES = {
    PATCHED: "patched checkpoint, in PyTorch",
    ONNX: "ONNX nets, in onnxruntime",
    COMPILED: "compiled nets, on the simulator",
    LOOP: "the loop: text to ids, ids to masks, positions and cache rows",
}


def page(report: Report) -> str:
    """One page. Of a net the worst of its tensors is shown."""
    lines = []
    if report.steps:
        lines += [f"original checkpoint, in PyTorch; {report.prompt_tokens} tokens of prompt, and two more", ""]
    for rung in report.rungs:
        faulty = report.found is not None and report.found.rung == rung
        mode = report.mode if rung == COMPILED else "float32"
        band = f", band {LIMITS[mode]:.0e} ({mode})" if any(step.rung == rung for step in report.steps) else ""
        lines += ["      |", "      v", f"[{'FAULT' if faulty else ' ok  '}] {_TITLES.get(rung, rung)}{band}"]
        steps = [step for step in report.steps if step.rung == rung]
        if steps:
            lines.append(
                f"        {'phase':8} {'net':16} {'tensor':14}     adds (NMSE, SQNR, cosine)    accumulated  band"
            )
        lines += [_line(max(of_net, key=_share)) for of_net in _by_net(steps)]
    lines += ["", report.found.sentence if report.found else "Healthy: every rung is within its band."]
    return "\n".join(lines)


def deeper_page(deeper: Deeper) -> str:
    """What the wheel's tools said of the net that was found."""
    name, (cosine, sqnr) = min(deeper.lowered.items(), key=lambda item: item[1][1])
    return "\n".join(
        [
            *("", *(f"  {command}" for command in deeper.commands)),
            f"lowering: of {len(deeper.lowered)} tensors {name} loses most, {sqnr:.1f} dB (cosine {cosine:.6f}).",
            f"commands: of {deeper.checked} results {len(deeper.wrong)} are past {TOLERANCE} (cosine, Euclidean)"
            + (f"; the first is {deeper.wrong[0]}." if deeper.wrong else ": for so coarse a look the net is healthy."),
        ]
    )


def _share(step: Step) -> float:
    """What its band goes by, up to a factor."""
    return max(step.added.nmse, step.added.column / COLUMN)


def _by_net(steps: list[Step]) -> list[list[Step]]:
    nets = dict.fromkeys((step.phase, step.net) for step in steps)
    return [[step for step in steps if (step.phase, step.net) == key] for key in nets]


def _line(step: Step) -> str:
    added = f"{step.added.nmse:8.1e} {step.added.sqnr:6.1f} dB {step.added.cosine:9.6f}"
    return f"        {step.phase:8} {step.net:16} {step.tensor:14} {added} {step.accumulated.nmse:12.1e}  {step.band}"
