"""Clip fractions: what GSPO and GRPO clip, by token and by sequence, with off-policy depth, length and time.

Figure 2 of the GSPO paper, from the trainings of `stability.py`: it draws from their record, and has them run first
where the folder has none of the settings asked for. GSPO-token is left out: what it clips is what GSPO clips.

    python examples/paper/clipping.py                    # at once after stability.py, else as long as it
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lab
import stability
from lab import COLORS, NAMES
from matplotlib.lines import Line2D
from stability import UPDATES, chosen

RECORD = "stability"  # whose record this is drawn from
LOSSES = ("gspo", "grpo", "ppo")
UNITS = {"tokens": "-", "sequences": "--"}
FEWEST = 100  # responses that a point needs


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    figure, axes = lab.panels(3, "What each loss clips at its own range", len(UPDATES))
    for row, updates in enumerate(UPDATES):
        by_depth, by_length, by_stage = axes[3 * row : 3 * row + 3]
        steps = record["settings"]["steps"]
        for loss in LOSSES:
            clipping = [run["clipping"] for run in chosen(record, updates, loss)]
            for unit, line in UNITS.items():
                style = {"color": COLORS[loss], "linestyle": line}
                curve(by_depth, range(1, updates + 1), clipping, "depth", loss, unit, style)
                curve(by_length, [sum(each) / 2 for each in record["lengths"]], clipping, "length", loss, unit, style)
                stages = len(clipping[0]["stage"]["responses"])
                curve(
                    by_stage, [(i + 0.5) * steps / stages for i in range(stages)], clipping, "stage", loss, unit, style
                )
        by_depth.set(title="By update since the rollout", xlabel="update", ylabel=f"{updates} updates per rollout")
        by_length.set(title="By length of the response", xlabel="tokens")
        by_stage.set(title="Along the training", xlabel="step")
    for each in axes:
        each.set_yscale("log")
        each.set_ylim(1e-5, 1)
        each.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    handles = [Line2D([], [], color=COLORS[loss], label=NAMES[loss]) for loss in LOSSES]
    handles += [Line2D([], [], color=lab.GREY, linestyle=line, label=f"of {unit}") for unit, line in UNITS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    arguments.name = "clipping"
    lab.write(figure, arguments)


def curve(
    axes: Any,
    places: Sequence[float],
    clipping: list[dict[str, Any]],
    along: str,
    loss: str,
    unit: str,
    style: dict[str, Any],
) -> None:
    """Mean and range over seeds, where all of them have enough responses."""
    counts = zip(*(each[along]["responses"] for each in clipping), strict=True)
    kept = [i for i, count in enumerate(counts) if min(count) >= FEWEST]
    runs = [[each[along][loss][unit][i] or float("nan") for i in kept] for each in clipping]
    columns = list(zip(*runs, strict=True))
    x = [places[i] for i in kept]
    axes.plot(x, [sum(column) / len(column) for column in columns], marker=".", **style)
    axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=style["color"], alpha=0.15, lw=0)


def section(record: dict[str, Any]) -> str:
    lines = [
        "| updates per rollout | training | clipped at its own range: tokens | sequences"
        " | tokens at GSPO's range | at GRPO's | mean \\|log s\\| |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for updates in UPDATES:
        for loss in LOSSES:
            found = [run["clipping"]["all"] for run in chosen(record, updates, loss)]
            shares = [(loss, "tokens"), (loss, "sequences"), ("gspo", "tokens"), ("grpo", "tokens")]
            cells = [percent([each[rule][unit][0] for each in found]) for rule, unit in shares]
            drift = sum(each["drift"][0] for each in found) / len(found)
            lines.append(f"| {updates} | {NAMES[loss]} | {' | '.join(cells)} | {drift:.1e} |")
    lines.append("| 4 | GSPO, as the paper reports | 15% | | | | |")
    lines.append("| 4 | GRPO, as the paper reports | 0.13% | | | | |")
    return "\n".join(lines)


def percent(values: list[float]) -> str:
    """The mean over seeds, the least and the largest."""
    mean, low, high = (f"{100 * value:.2g}" for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean}% ({low} to {high})" if len(values) > 1 else f"{mean}%"


def main() -> None:
    arguments, settings = lab.parse(__doc__, RECORD, stability.SEEDS, stability.SETTINGS, stability.SMOKE)
    record = lab.load(arguments) if arguments.redraw else stability.recorded(arguments, settings)
    draw(record, arguments)


if __name__ == "__main__":
    main()
