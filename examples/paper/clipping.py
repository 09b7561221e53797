"""Clip fractions: what GSPO and GRPO clip, by token and by sequence, with off-policy depth, length and time.

Figure 2 of the GSPO paper, from the record of `stability.py`. Where the folder has no record with these settings, its
trainings run first. GSPO-token is left out, because it clips as GSPO does.

    python examples/paper/clipping.py                    # seconds after stability.py, otherwise as long as it
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lab
import stability
from lab import COLORS, NAMES, mean
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from stability import CLIPPING, chosen

RECORD = "stability"  # the experiment whose record this draws
UNITS = {"tokens": "-", "sequences": "--"}
FEWEST = 100  # responses needed for a point


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    steps = record["settings"]["steps"]
    figure, axes = lab.panels(
        3, "What each loss clips at its own range: mean and range of the seeds", len(record["arms"])
    )
    for row, (updates, rate) in enumerate(record["arms"]):
        by_depth, by_length, by_stage = axes[3 * row : 3 * row + 3]
        for loss in CLIPPING:
            found = [run["clipping"] for run in chosen(record, [updates, rate], loss)]
            stages = len(found[0]["stage"]["responses"])
            for unit, line in UNITS.items():
                curve(by_depth, range(1, updates + 1), found, "depth", loss, unit, line)
                curve(by_length, [sum(each) / 2 for each in record["lengths"]], found, "length", loss, unit, line)
                curve(by_stage, [(i + 0.5) * steps / stages for i in range(stages)], found, "stage", loss, unit, line)
        by_depth.set(xlabel="update since the rollout", ylabel=f"{updates} updates per rollout, rate {rate:g}")
        by_depth.set_xlim(0.5, updates + 0.5)
        by_depth.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        by_length.set(xlabel="length of the response, tokens")
        by_stage.set(xlabel="step of the training")
    for each in axes:
        each.set(yscale="log", ylim=(1e-4, 1))
        each.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    handles = [Line2D([], [], color=COLORS[loss], label=NAMES[loss]) for loss in CLIPPING]
    handles += [Line2D([], [], color=lab.GREY, linestyle=line, label=f"of {unit}") for unit, line in UNITS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    arguments.name = "clipping"
    lab.write(figure, arguments)


def curve(
    axes: Any, x: Sequence[float], runs: list[dict[str, Any]], along: str, loss: str, unit: str, line: str
) -> None:
    """Draws the points for which all runs have enough responses."""
    counts = zip(*(run[along]["responses"] for run in runs), strict=True)
    first = 1 if along == "depth" else 0  # the first update is on-policy and clips nothing, which has no logarithm
    kept = [i for i, count in enumerate(counts) if min(count) >= FEWEST][first:]
    values = [[run[along][unit][i] for i in kept] for run in runs]
    lab.spread(axes, [x[i] for i in kept], values, COLORS[loss], "", linestyle=line, marker=".")


def section(record: dict[str, Any]) -> str:
    lengths = record["lengths"]
    whole = [
        "| updates, rate | loss | tokens clipped | sequences with one | GSPO's range would clip of its tokens"
        " | GRPO's | mean \\|log s\\| |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    parts = [
        "| updates, rate | loss | tokens clipped: second update | last | "
        f"responses of {lengths[0][0]} to {lengths[0][1]} tokens | of {lengths[-1][0]} to {lengths[-1][1]} "
        "| first tenth of the training | last |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in record["arms"]:
        for loss in CLIPPING:
            found = [run["clipping"] for run in chosen(record, arm, loss)]

            name = f"| {arm[0]}, {arm[1]:g} | {NAMES[loss]} |"
            shown = [(loss, "tokens"), (loss, "sequences"), ("gspo", "tokens"), ("grpo", "tokens")]
            cells = [percent([run["all"][rule][unit] for run in found]) for rule, unit in shown]
            whole.append(f"{name} {' | '.join(cells)} | {mean([run['drift'] for run in found]):.4f} |")
            ends = [("depth", 1), ("depth", -1), ("length", 0), ("length", -1), ("stage", 0), ("stage", -1)]
            cells = [percent([run[along]["tokens"][index] for run in found]) for along, index in ends]
            parts.append(f"{name} {' | '.join(cells)} |")
    whole += ["| 4, the paper's | GSPO | 15% | | | | |", "| 4, the paper's | GRPO | 0.13% | | | | |"]
    return "\n".join([*whole, "", *parts])


def percent(values: list[float | None]) -> str:
    """Mean, smallest and largest over seeds, with two digits; empty where a seed has no such responses."""
    present = [100 * value for value in values if value is not None]
    if len(present) < len(values):
        return ""
    average, *others = f"{mean(present):.2g}", f"{min(present):.2g}", f"{max(present):.2g}"
    return f"{average}% ({' to '.join(others)})" if len(values) > 1 else f"{average}%"


def main() -> None:
    arguments, settings = lab.parse(__doc__, RECORD, stability.SEEDS, stability.SETTINGS, stability.SMOKE)
    record = lab.load(arguments) if arguments.redraw else stability.recorded(arguments, settings)
    draw(record, arguments)


if __name__ == "__main__":
    main()
