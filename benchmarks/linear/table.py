"""A run's cases as text for a terminal, and as the README's table in markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..cases import DTYPES
from .cases import WORKS
from .contestants import BY_NAME, CONTESTANTS
from .results import CaseResult, Measured, Results


def title(machine: dict[str, Any]) -> str:
    peers = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['backend']}, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}\n{peers or 'no peers installed'}"
    )


def lines(case: CaseResult) -> Iterator[str]:
    about = f"{case.rows:,} rows, D = {case.width:,}, {case.sequences} sequences, {case.active:.0%} of rows active"
    yield f"{case.id}: {case.title}; {about}"
    yield (
        f"  {'seconds':<36} {'median':>8} {'min':>8} {'max':>8} {'rounds':>6} {'products':>8} {'GFLOP/s':>8} "
        f"{'extra':>9} {'- grads':>9}"
    )
    for name, m in case.contestants.items():
        times = " ".join(f"{seconds:8.3f}" for seconds in (m.median, m.min, m.max))
        of_products = "" if m.times_products is None else f"{m.times_products:.2f}x"
        extra, beyond = (size(x) for x in (m.extra_bytes, m.beyond_gradients))
        yield (
            f"  {BY_NAME[name].label:<36} {times} {m.rounds:6} {of_products:>8} {m.flop_per_s / 1e9:8,.0f} "
            f"{extra:>9} {beyond:>9}"
        )
        if m.wrong:
            yield f"    wrong answer: {m.wrong}"
    for name, reason in case.errors.items():
        yield f"  {BY_NAME[name].label:<36} error: {reason.splitlines()[0][:150]}"
    for reason in dict.fromkeys(case.absent.values()):
        names = (BY_NAME[name].label.split(",")[0] for name, other in case.absent.items() if other == reason)
        yield f"  not here: {', '.join(names)}: {reason.splitlines()[0][:150]}"


def markdown(results: Results) -> str:
    """One table a vocabulary: a line a contestant, a column a work and dtype; time, memory beside the gradients."""
    return "\n\n".join(_table(results, vocab) for vocab in sorted({case.vocab for case in results.cases.values()}))


def _table(results: Results, vocab: int) -> str:
    cases = [
        case
        for work in WORKS
        for dtype in DTYPES
        if (case := results.cases.get(f"{work.name}-{dtype}-{vocab}")) is not None
    ]
    heads = [f"{case.work.replace('_', ' ')}, {case.dtype}" for case in cases]
    found = [f"| V = {vocab:,} | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for contestant in CONTESTANTS:
        cells = [_cell(case.contestants.get(contestant.name)) for case in cases]
        if any(cells):
            found.append(f"| {contestant.label} | " + " | ".join(cells) + " |")
    return "\n".join(found)


def _cell(measured: Measured | None) -> str:
    if measured is None:
        return ""
    time = f"{measured.median:.2f} s" if measured.median >= 1 else f"{measured.median * 1e3:,.0f} ms"
    memory = "" if measured.beyond_gradients is None else f", {size(measured.beyond_gradients)}"
    return f"{time}{memory}" + (" (wrong)" if measured.wrong else "")


def size(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
