"""The project's goals for a GPU, each with what was measured: python -m benchmarks.gpu.goals [results.json]

Goals are shares of the speed of a copy measured in the same run, so that one table serves every GPU: a work that has to
move u passes over the logits reaches 90% where it moves them at 90% of the bytes a second of the copy. Ratios are of
medians within one run, and of peak memory.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import faster
from .runs import ROWS

FOLDER = Path(__file__).resolve().parents[1] / "results"
LAUNCHES = 4
SMALL = 64  # bytes a row
OTHERS = ("eager", "compile", "liger", "trl")
LINEAR_OTHERS = ("eager", "liger", "trl", "cce", "torch")

Content = dict[str, Any]
Judge = Callable[[Content], tuple[bool, str]]


@dataclass(frozen=True)
class Goal:
    text: str
    bound: str
    judge: Judge  # of a results file; KeyError where it lacks the measurement


def of_work(work: str) -> Callable[[Content], Content]:
    return lambda content: content["cases"][f"{work}-{ROWS}"]


def of_one_read(work: str) -> Callable[[Content], Content]:
    return lambda content: content["one_read"]["cases"][f"{work}-bf16-151936-{ROWS}"]


def reaches(share: float, units: float, case_of: Callable[[Content], Content], contestant: str = "ours") -> Judge:
    """A contestant moves `units` passes over the logits at this share of the speed of a copy, or faster."""

    def judge(content: Content) -> tuple[bool, str]:
        case = case_of(content)
        seconds = _contestant(case, contestant)["median"]
        found = share_of_copy(content, case, seconds, units)
        return found >= share, f"{found:.1%}, {seconds * 1e3:.3f} ms"

    return judge


def share_of_copy(content: Content, case: Content, seconds: float, units: float) -> float:
    """The copy is the case's own, timed in turn with the others, or where there is none that of the bandwidth part."""
    moved: float = case["logits_bytes"]
    copy = case["contestants"].get("copy")
    rate: float = 2 * moved / copy["median"] if copy else content["bandwidth"]["copy"]["bytes_per_second"]
    return units * moved / seconds / rate


def at_most(ratio: float, case_of: Callable[[Content], Content], of: Callable[[Content], Content]) -> Judge:
    """Our time in a case against our time in another."""

    def judge(content: Content) -> tuple[bool, str]:
        mine, other = (_contestant(find(content), "ours") for find in (case_of, of))
        return _ratio(mine, other, ratio)

    return judge


def of_linear(work: str) -> Callable[[Content], Content]:
    return lambda content: content["linear"]["cases"][work]


def linear_products(ratio: float) -> Judge:
    """Our time against that of the bare matrix products."""

    def judge(content: Content) -> tuple[bool, str]:
        case = of_linear("dense")(content)
        return _ratio(_contestant(case, "ours"), _contestant(case, "products"), ratio)

    return judge


def _ratio(mine: Content, other: Content, most: float) -> tuple[bool, str]:
    wrong = mine.get("wrong") or other.get("wrong")
    if wrong:
        return False, f"wrong answer: {wrong}"
    found = mine["median"] / other["median"]
    return found <= most, f"{found:.3f}x, {mine['median'] * 1e3:.3f} ms of {other['median'] * 1e3:.3f} ms"


def _contestant(case: Content, name: str) -> Content:
    if name not in case["contestants"]:
        raise KeyError(_why_absent({"": case}, name))
    found: Content = case["contestants"][name]
    return found


def launches(content: Content) -> tuple[bool, str]:
    """Of Triton's, from the profiles and the cases in which they are counted; those of CUDA C++ are named."""
    found = {name: p["launches"] for name, p in content.get("profile", {}).items() if "launches" in p}
    counts = {name: count for name, count in found.items() if "_cuda" not in name}
    counts |= _launches(content.get("cases", {}), "ours")
    if not counts:
        raise KeyError("launches")
    in_cuda = {name: count for name, count in found.items() if "_cuda" in name}
    in_cuda |= _launches(content.get("one_read", {}).get("cases", {}), "ours_cuda")
    text = _listed(counts)
    return max(counts.values()) <= LAUNCHES, f"{text}; in CUDA C++ {_listed(in_cuda)}" if in_cuda else text


def _launches(cases: Content, contestant: str) -> dict[str, int]:
    found = ((name, case["contestants"].get(contestant, {})) for name, case in cases.items())
    return {name: measured["launches"] for name, measured in found if "launches" in measured}


def _listed(counts: dict[str, int]) -> str:
    """4 (gspo, grpo), 3 (forward): works, without the sizes and ways that they were counted in."""
    works: dict[int, dict[str, None]] = {}
    for name, count in counts.items():
        works.setdefault(count, {})[re.sub("_fresh|_cuda|-.*", "", name)] = None
    return ", ".join(f"{count} ({', '.join(names)})" for count, names in sorted(works.items(), reverse=True))


def ahead(other: str, quantity: str) -> Judge:
    """Of one other contestant, in every case it finished; the nearest is named.

    Of memory, a difference of `SMALL` bytes a row is none: statistics and coefficients, nothing vocabulary-sized.
    """

    def judge(content: Content) -> tuple[bool, str]:
        nearest: tuple[float, str] | None = None
        missing, equal = [], []
        for name, case in _cases(content):
            ours = [c for n, c in case["contestants"].items() if n == _rival(other, case)]
            theirs = case["contestants"].get(other)
            if theirs is None or not ours:
                missing.append(name)
                continue
            mine = min(c[quantity] for c in ours)
            if quantity == "extra_bytes" and abs(theirs[quantity] - mine) <= SMALL * case["rows"]:
                equal.append(name)
                continue
            ratio = theirs[quantity] / (mine or 1)
            nearest = min(nearest or (ratio, name), (ratio, name))
        found = [f"nearest: {nearest[0]:.3g}x in {nearest[1]}"] if nearest else []
        found += [f"equal in {', '.join(equal)}"] if equal else []
        if not found:
            raise KeyError(_why_absent(content.get("cases", {}), other))
        found += [f"without {', '.join(missing)}"] if missing else []
        return nearest is None or nearest[0] > 1, "; ".join(found)

    return judge


def linear_ahead(other: str, quantity: str) -> Judge:
    """Of one other contestant, in every work from hidden states that it finished rightly; the nearest is named."""

    def judge(content: Content) -> tuple[bool, str]:
        ratios = []
        for work, case in content["linear"]["cases"].items():
            ours, theirs = (case["contestants"].get(name) for name in ("ours", other))
            if ours and ours["wrong"]:
                return False, f"wrong answer in {work}: {ours['wrong']}"
            if ours and theirs and not theirs["wrong"]:
                ratios.append(((theirs[quantity] + 1e-9) / (ours[quantity] + 1e-9), work))
        if not ratios:
            raise KeyError(_why_absent(content["linear"]["cases"], other))
        return min(ratios)[0] > 1, f"nearest: {min(ratios)[0]:.3g}x in {min(ratios)[1]}"

    return judge


def _rival(other: str, case: Content) -> str:
    """Like against like: those that make a fresh gradient against ours that does."""
    return "ours" if other == "liger" or "ours_fresh" not in case["contestants"] else "ours_fresh"


def _why_absent(cases: Content, other: str) -> str:
    reasons = [case[kind][other] for case in cases.values() for kind in ("absent", "errors") if other in case[kind]]
    return f"{other} was absent: {reasons[0]}" if reasons else other


GOALS = (
    Goal("forward, share of copy on 1u", ">= 90%", reaches(0.90, 1, of_work("forward"))),
    Goal("off-policy GSPO, forward and backward, on 3u", ">= 90%", reaches(0.90, 3, of_work("gspo"))),
    Goal("45% of no advantage, 15% of the rest clipped, against dense", "<= 0.85x",
         at_most(0.85, of_work("gspo_inactive"), of_work("gspo"))),
    Goal("on-policy GSPO in CUDA C++, on 2u", ">= 88%", reaches(0.88, 2, of_one_read("gspo_on_policy"), "ours_cuda")),
    Goal("GRPO, a ratio per token, in CUDA C++, on 2u", ">= 88%", reaches(0.88, 2, of_one_read("grpo"), "ours_cuda")),
    Goal("PPO in CUDA C++, on 2u", ">= 88%", reaches(0.88, 2, of_one_read("ppo"), "ours_cuda")),
    Goal("on-policy GSPO in Triton, on 2u", ">= 75%", reaches(0.75, 2, of_work("gspo_on_policy"))),
    Goal("GRPO, a ratio per token, in Triton, on 3u", ">= 90%", reaches(0.90, 3, of_work("grpo"))),
    Goal("PPO in Triton, on 3u", ">= 90%", reaches(0.90, 3, of_one_read("ppo"))),
    Goal("launches of forward and backward", f"<= {LAUNCHES}", launches),
    *(Goal(f"time against {other}, every case", "> 1x", ahead(other, "median")) for other in OTHERS),
    *(Goal(f"peak memory against {other}, every case", "> 1x", ahead(other, "extra_bytes")) for other in OTHERS),
    Goal("from hidden states, D = 4,096, dense, against bare products", "<= 1.1x", linear_products(1.1)),
    Goal("the same, 45% of no advantage and 15% clipped, against dense", "<= 0.7x",
         at_most(0.7, of_linear("inactive"), of_linear("dense"))),
    Goal("the same, head frozen, against dense", "<= 0.72x",
         at_most(0.72, of_linear("frozen_head"), of_linear("dense"))),
    *(Goal(f"linear, time against {other}", "> 1x", linear_ahead(other, "median")) for other in LINEAR_OTHERS),
    *(Goal(f"linear, memory against {other}", "> 1x", linear_ahead(other, "extra_bytes")) for other in LINEAR_OTHERS),
)  # fmt: skip


def print_goals(content: Content | None) -> int:
    """How many are not met, unmeasured ones included."""
    if content is None:
        print(f"no results of a GPU in {FOLDER}: python -m benchmarks.gpu")
    else:
        about = content.get("machine") or {}
        print(f"V = 151,936, {ROWS:,} rows, bf16; {about.get('gpu')}, torch {about.get('torch')},", end=" ")
        print(f"commit {about.get('commit')}, {about.get('date')}")
    missed = 0
    for goal in GOALS:
        met, text = None, "not measured"
        if content is not None:
            try:
                met, text = goal.judge(content)
            except (KeyError, TypeError, ZeroDivisionError) as error:
                detail = str(error.args[0]) if isinstance(error, KeyError) and "absent" in str(error) else ""
                text = f"not measured ({detail})" if detail else text
        missed += met is not True
        word = {True: "met", False: "MISSED", None: "?"}[met]
        print(f"{word:<7} {goal.text + ':':<64} {goal.bound:<10}  {text}")
    if content is not None:
        print(*faster.lines(content), sep="\n")
    return missed


def _cases(content: Content) -> Iterator[tuple[str, Content]]:
    yield from content.get("cases", {}).items()


def newest() -> Content | None:
    """The committed results of the latest date."""
    found: list[Content] = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("gpu-*.json"))]
    found = [content for content in found if content.get("machine")]
    return max(found, key=lambda content: str(content["machine"]["date"]), default=None)


def main() -> int:
    content = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else newest()
    return 1 if print_goals(content) else 0


if __name__ == "__main__":
    sys.exit(main())
