"""Draws the README's plot from committed results and prints the table of docs/cpu.md; it measures nothing itself.

python -m benchmarks.plot [results.json] [plot.png]
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import WORKS
from .contestants import BY_NAME, CONTESTANTS
from .gpu_parts import table
from .results import load, newest, size
from .sampled import DTYPES

VOCAB, LAYOUT = 151_936, "padded"
LABELS = {
    "eager": "torch eager",
    "compile": "torch.compile",
    "ours_fresh": "gspo-kernels",
    "ours": "with overwrite_logits",
}
# From Okabe and Ito's palette: apart for every kind of colour vision, and by lightness in print.
COLOURS = {"eager": "#B8B8B8", "compile": "#56B4E9", "ours_fresh": "#E69F00", "ours": "#C04A00"}
TIMES = "\N{MULTIPLICATION SIGN}"
INK, FAINT = "#222222", "#707070"
GAP = 1.1  # between the bars of one dtype and those of the next


def figure(results: dict[str, Any]) -> Figure:
    """Time and peak extra memory of loss and gradient, at the largest vocabulary."""
    cases = [results["cases"].get(f"forward_backward-{dtype}-{VOCAB}-{LAYOUT}") for dtype in DTYPES]
    if not all(case and case["contestants"].keys() >= LABELS.keys() | {"copy"} for case in cases):
        raise SystemExit(f"the results lack forward_backward at V = {VOCAB:,}, {LAYOUT}: run all the benchmarks")
    plt.rcParams.update({"font.size": 10, "text.color": INK, "xtick.color": FAINT, "ytick.color": INK})
    title: dict[str, Any] = {"loc": "left", "fontsize": 10.5, "color": INK, "pad": 8}
    drawing, (times, memory) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.3, 1), sharey=True)
    _draw_times(times, cases)
    _draw_memory(memory, cases)
    times.set_title("Time of loss and gradient", **title)
    memory.set_title("Peak memory beyond the logits, gradient included", **title)
    for axes in (times, memory):
        axes.tick_params(length=0)
        axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "bottom", "left"):
            axes.spines[side].set_visible(False)
    times.set_yticks([y for i in range(len(cases)) for y in _heights(i)], list(LABELS.values()) * len(cases))
    times.invert_yaxis()
    for i, case in enumerate(cases):
        times.text(-0.27, sum(_heights(i)) / len(LABELS), case["dtype"], transform=times.get_yaxis_transform(),
                   ha="right", va="center", fontsize=12, weight="bold")  # fmt: skip

    about = results["machine"]
    sizes = f"{results['rows']:,} tokens {TIMES} {VOCAB:,} vocabulary"
    drawing.suptitle(f"GSPO straight from the logits: {sizes}", x=0.012, ha="left", fontsize=13, weight="bold")
    note = (
        f"{about['cpu']}, {about['threads']} threads, {about['backend']}, torch {about['torch']}, "
        f"gspo-kernels {about['gspo_kernels']} at {about['commit']}, {about['date']}. "
        "Medians of one run; lines from min to max."
    )
    drawing.text(0.012, 0.02, note, fontsize=7.5, color=FAINT)
    drawing.tight_layout(rect=(0, 0.04, 1, 0.98), w_pad=2.0)
    return drawing


def _heights(block: int) -> list[float]:
    return [block * (len(LABELS) + GAP) + i for i in range(len(LABELS))]


def _draw_times(axes: Axes, cases: list[dict[str, Any]]) -> None:
    longest = max(case["contestants"][name]["max"] for case in cases for name in LABELS) * 1e3
    for i, case in enumerate(cases):
        found = case["contestants"]
        for y, name in zip(_heights(i), LABELS, strict=True):
            m = found[name]
            axes.barh(y, m["median"] * 1e3, height=0.78, color=COLOURS[name])
            axes.plot([m["min"] * 1e3, m["max"] * 1e3], [y, y], color=INK, linewidth=0.9, alpha=0.7)
            text = f"{m['median'] * 1e3:,.0f} ms"
            if name.startswith("ours"):
                eager, compiled = (found[other]["median"] / m["median"] for other in ("eager", "compile"))
                text += f"   {eager:.1f}{TIMES} as fast as eager, {compiled:.1f}{TIMES} compile"
            end = max(m["median"], m["max"]) * 1e3
            _write(axes, end + longest * 0.015, y, text, bold=name == "ours")
        copy = case["copy_seconds"] * 1e3
        heights = _heights(i)
        top, bottom = heights[0] - 0.6, heights[-1] + 0.6
        axes.plot([copy] * 2, [top, bottom], color=INK, linewidth=1.4, linestyle=(0, (3, 2)))
        text = f"memory copy of the same bytes: {copy:,.0f} ms"
        _write(axes, copy + longest * 0.01, bottom + 0.2, text, size=8)
    axes.set_xlim(0, longest * 1.18)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e3:g} s" if x else "0")


def _draw_memory(axes: Axes, cases: list[dict[str, Any]]) -> None:
    largest = max(case["contestants"][name]["extra_bytes"] or 0 for case in cases for name in LABELS) / 1e9
    for i, case in enumerate(cases):
        for y, name in zip(_heights(i), LABELS, strict=True):
            extra = case["contestants"][name]["extra_bytes"] or 0
            axes.barh(y, extra / 1e9, height=0.78, color=COLOURS[name])
            text = size(extra)
            if extra >= 1e8:
                text += f"   {extra / case['logits_bytes']:.1f} {TIMES} logits"
            _write(axes, extra / 1e9 + largest * 0.02, y, text, bold=name == "ours")
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlim(0, largest * 1.4)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g} GB" if x else "0")


def _write(axes: Axes, x: float, y: float, text: str, *, bold: bool = False, size: float = 9) -> None:
    """Beside a bar, over the grid."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
    axes.text(x, y, text, va="center", fontsize=size, weight="bold" if bold else "normal", bbox=box, zorder=1.5)


def markdown(results: dict[str, Any]) -> str:
    """Every work at the largest vocabulary: time, and peak memory beyond the inputs."""
    names = [c.name for c in CONTESTANTS if c.name != "copy"]
    rows = []
    for work, dtype in itertools.product(WORKS, DTYPES):
        if case := results["cases"].get(f"{work.name}-{dtype}-{VOCAB}-{LAYOUT}"):
            copy = "" if case["copy_seconds"] is None else f"{case['copy_seconds'] * 1e3:,.0f} ms"
            rows.append([work.title, dtype, *(_cell(case["contestants"].get(name)) for name in names), copy])
    heads = ["work", "dtype", *(BY_NAME[name].label for name in names), "memory copy of the same bytes"]
    return "\n".join(table(heads, rows, "---|---|"))


def _cell(m: dict[str, Any] | None) -> str:
    if m is None:
        return ""
    return f"{m['median'] * 1e3:,.0f} ms" + ("" if m["extra_bytes"] is None else f", {size(m['extra_bytes'])}")


def main(arguments: list[str]) -> None:
    source = Path(arguments[0]) if arguments else newest("cpu")
    results, target = load(source), Path(arguments[1]) if len(arguments) > 1 else source.with_suffix(".png")
    options: dict[str, Any] = {"metadata": {"Software": None}}  # the same results give the same bytes
    figure(results).savefig(target, dpi=160, facecolor="white", **options)
    print(markdown(results))
    print(f"drawn from {source}: {target}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
