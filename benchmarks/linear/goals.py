"""The goals of the losses from hidden states on a CPU, each with what was measured.

Run as `python -m benchmarks.linear.goals [results.json]`. Ratios are of medians within one run, at the large
vocabulary where nothing else is said.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .cases import VOCABS
from .contestants import PEERS
from .results import CaseResult, Measured, Results, load, newest
from .table import title

VOCAB = max(VOCABS)
Verdict = tuple[bool, str]


@dataclass(frozen=True)
class Goal:
    text: str
    judge: Callable[[Results], Verdict]  # KeyError where the run lacks it


def products(results: Results) -> Verdict:
    ratio = results.find("dense", "fp32", VOCAB).contestants["ours"].times_products
    if ratio is None:
        raise KeyError("bare matrix products")
    return ratio <= 1.1, f"{ratio:.3f}x"


def ahead_of_peers(results: Results) -> Verdict:
    """In every case that a peer finished with the right answer; the nearest is named."""
    found = [
        (peer.median / case.contestants["ours"].median, f"{name} in {case.id}")
        for case in results.cases.values()
        if "ours" in case.contestants
        for name, peer in _right_peers(case)
    ]
    if not found:
        raise KeyError("no peer took part")
    ratio, where = min(found)
    return ratio > 1.0, f"nearest: {where}, {ratio:.2f}x our time; {len(found)} comparisons"


def bf16_against_fp32(results: Results) -> Verdict:
    half, full = (results.find("dense", dtype, VOCAB).contestants["ours"].median for dtype in ("bf16", "fp32"))
    return half <= full, f"{half / full:.2f}x"


def inactive_against_dense(dtype: str) -> Callable[[Results], Verdict]:
    def judge(results: Results) -> Verdict:
        dense, inactive = (
            results.find(work, dtype, VOCAB).contestants["ours"].median for work in ("dense", "inactive")
        )
        return dense / inactive >= 1.4, f"{dense / inactive:.2f}x"

    return judge


def memory(dtype: str) -> Callable[[Results], Verdict]:
    def judge(results: Results) -> Verdict:
        found = results.find("dense", dtype, VOCAB).contestants
        ours, eager = found["ours"].beyond_gradients, found["eager"].extra_bytes  # at eager's peak there are none yet
        if ours is None or not eager:
            raise KeyError("memory")
        return ours <= eager / 10, f"{ours / 1e9:.2f} GB, {ours / eager:.3f} of torch eager's {eager / 1e9:.2f} GB"

    return judge


GOALS = (
    Goal("fp32, dense: <= 1.1x the bare matrix products", products),
    Goal("faster than every peer, in every case", ahead_of_peers),
    Goal("bf16 no slower than fp32, dense", bf16_against_fp32),
    *(
        Goal(f"{dtype}, inactive: >= 1.4x as fast as dense", inactive_against_dense(dtype))
        for dtype in ("fp32", "bf16")
    ),
    *(
        Goal(f"{dtype}, memory beside the gradients: <= 1/10 of torch eager", memory(dtype))
        for dtype in ("fp32", "bf16")
    ),
)


def _right_peers(case: CaseResult) -> Iterator[tuple[str, Measured]]:
    for name, measured in case.contestants.items():
        if name in PEERS and not measured.wrong:
            yield name, measured


def print_goals(results: Results) -> int:
    """How many are not met, unmeasured ones included."""
    missed = 0
    for goal in GOALS:
        met: bool | None = None
        try:
            met, text = goal.judge(results)
        except KeyError as missing:
            text = f"not in this run ({missing.args[0]})"
        missed += met is not True
        word = {True: "met", False: "MISSED", None: "?"}[met]
        print(f"{word:<7} {goal.text + ':':<66} {text}")
    return missed


def main() -> int:
    results = load(Path(sys.argv[1]) if len(sys.argv) > 1 else newest())
    print(title(results.machine), end="\n\n")
    return 1 if print_goals(results) else 0


if __name__ == "__main__":
    sys.exit(main())
