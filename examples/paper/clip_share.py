"""Clipped responses and accuracy: which share of the responses a clip range that trains well clips.

From the record of `staleness.py`, which has to be there. A response is clipped if GSPO clips it, or if GRPO clips any
of its tokens. The table has the range that was best in each setting, and the one that `suggest_clip_range` reads from
the same trainings.

    python examples/paper/clip_share.py --output docs/paper
"""

from __future__ import annotations

import argparse
from typing import Any

import lab
from lab import COLORS, mean, ranged
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from staleness import ADAPTIVE, LOSSES, RANGES, SHARE, arms_of, best_of, chosen_of, settings_of, title_of

RECORD = "staleness"  # the experiment whose record this draws


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    settings = settings_of(record)
    lengths = len({tokens for tokens, _ in settings})
    title = "Accuracy at the end, by the share of responses that are clipped"
    figure, axes = lab.panels(len(settings) // lengths, title, lengths)
    for axis, (tokens, updates) in zip(axes, settings, strict=True):
        chosen, best = chosen_of(record, tokens, updates), best_of(record, tokens, updates)
        for loss in LOSSES:
            color, rate = COLORS[loss.lower()], chosen[best[loss]]["rate"]
            arms = [arm for name, each in arms_of(record, tokens, updates).items() if name in RANGES for arm in each]
            arms = [arm for arm in arms if arm["name"].startswith(loss)]
            axis.scatter(*points(arms), color=color, s=14, alpha=0.45, lw=0)
            at_best = [arm for arm in arms if arm["rate"] == rate and "dual" not in arm["name"]]
            axis.plot(*points(sorted(at_best, key=lambda arm: arm["clipped"])), color=color, marker="o", markersize=5)
        axis.set(
            title=f"{tokens} tokens, {updates} updates",
            xlabel="responses clipped",
            ylabel="accuracy",
            xlim=(0, None),
            ylim=(0, 1),
        )
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter(PercentFormatter(1, decimals=0))
    handles = [
        Line2D([], [], color=COLORS[loss.lower()], marker="o", label=f"{loss}, its best rate") for loss in LOSSES
    ]
    handles.append(Line2D([], [], color=lab.GREY, marker="o", ls="", markersize=4, alpha=0.5, label="other rates"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    arguments.name = "clip_share"
    lab.write(figure, arguments)


def points(arms: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [arm["clipped"] for arm in arms], [mean(arm["accuracy"]) for arm in arms]


def section(record: dict[str, Any]) -> str:
    titles = [
        "tokens",
        "updates per rollout",
        "loss",
        "best range",
        "rate",
        "responses clipped",
        "tokens clipped",
        "accuracy",
    ]
    titles += [f"range that clips {SHARE:.0%} there", f"accuracy, range adapted to {SHARE:.0%}"]
    rows = []
    for tokens, updates in settings_of(record):
        chosen, best = chosen_of(record, tokens, updates), best_of(record, tokens, updates)
        for loss in LOSSES:
            arm = chosen[best[loss]]
            low, high = arm["fit"]
            adapted = [chosen[name] for name in ADAPTIVE if name in chosen and name.startswith(loss)]
            rows.append(
                [
                    *(str(tokens), str(updates), loss, title_of(arm["name"])[5:], f"{arm['rate']:g}"),
                    f"{arm['clipped']:.0%}",
                    f"{100 * arm['clipped_tokens']:.2g}%",
                    ranged(arm["accuracy"], ".0%"),
                    f"{low:.2g}/{high:.2g}",
                    ranged(adapted[0]["accuracy"], ".0%") if adapted else "",
                ]
            )
    return lab.table(titles, rows, left=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments = lab.parse_study(parser, RECORD)
    draw(lab.load(arguments), arguments)


if __name__ == "__main__":
    main()
