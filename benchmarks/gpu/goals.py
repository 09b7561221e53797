"""The project's goals for a GPU, each with what was measured: python -m benchmarks.gpu.goals [results.json]

Times are goals for an H200; on another GPU they are held against the same multiple of the floor that its own copy
bandwidth sets or, from hidden states, its own matrix products. Ratios are of medians within one run, and of peak
memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import faster

FOLDER = Path(__file__).resolve().parents[1] / "results"
H200 = "NVIDIA H200"
H200_COPY = 4.3e12  # bytes per second, for which the goals were set
ROWS = 8_192
LOGITS_BYTES = ROWS * 151_936 * 2
LAUNCHES = 4
OTHERS = ("eager", "compile", "liger", "trl")
PRODUCTS_RATE = 788e12  # operations per second of bf16 products on an H200, for which the goals were set
LINEAR_OTHERS = ("eager", "liger", "trl", "torch")

Content = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    text: str
    bound: str
    judge: Callable[[Content], tuple[bool, str]]  # of a results file; KeyError where it lacks the measurement


def within(work: str, milliseconds: float) -> Callable[[Content], tuple[bool, str]]:
    """Our better way in time: over the logits or, for a loss alone, the only one."""
    return _within(lambda content: content["cases"][f"{work}-{ROWS}"], "ours", milliseconds)


def cuda_within(work: str, milliseconds: float) -> Callable[[Content], tuple[bool, str]]:
    """The same of CUDA C++."""
    name = f"{work}-bf16-151936-{ROWS}"
    return _within(lambda content: content["one_read"]["cases"][name], "ours_cuda", milliseconds)


def _within(
    case_of: Callable[[Content], Content], contestant: str, milliseconds: float
) -> Callable[[Content], tuple[bool, str]]:
    def judge(content: Content) -> tuple[bool, str]:
        case = case_of(content)
        if contestant not in case["contestants"]:
            raise KeyError(_why_absent({"": case}, contestant))
        ours = case["contestants"][contestant]
        seconds = ours["median"]
        text = f"{seconds * 1e3:.3f} ms, {ours['times_floor'] or 0:.2f} of its floor"
        if str(content["machine"]["gpu"]).startswith(H200):
            return seconds * 1e3 <= milliseconds, text
        allowed = milliseconds / 1e3 * H200_COPY / _copy(content)
        return seconds <= allowed, f"{text}; the same multiple of this GPU's floor is {allowed * 1e3:.3f} ms"

    return judge


def launches(content: Content) -> tuple[bool, str]:
    """Of Triton's; those of CUDA C++ are named."""
    counts = _launches(content.get("cases", {}), "ours")
    if not counts:
        raise KeyError("launches")
    text = _listed(counts)
    in_cuda = _launches(content.get("one_read", {}).get("cases", {}), "ours_cuda")
    return max(counts.values()) <= LAUNCHES, f"{text}; in CUDA C++ {_listed(in_cuda)}" if in_cuda else text


def _launches(cases: Content, contestant: str) -> dict[str, int]:
    found = ((name, case["contestants"].get(contestant, {})) for name, case in cases.items())
    return {name: measured["launches"] for name, measured in found if "launches" in measured}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def ahead(other: str, quantity: str) -> Callable[[Content], tuple[bool, str]]:
    """Of one other contestant, in every case it finished; the nearest is named."""

    def judge(content: Content) -> tuple[bool, str]:
        nearest: tuple[float, str] | None = None
        missing = []
        for name, case in _cases(content):
            ours = [c for n, c in case["contestants"].items() if n == _rival(other, case)]
            theirs = case["contestants"].get(other)
            if theirs is None or not ours:
                missing.append(name)
                continue
            ratio = (theirs[quantity] + 1) / (min(c[quantity] for c in ours) + 1) if quantity == "extra_bytes" else (
                theirs[quantity] / min(c[quantity] for c in ours)
            )  # fmt: skip
            nearest = min(nearest or (ratio, name), (ratio, name))
        if nearest is None:
            raise KeyError(_why_absent(content.get("cases", {}), other))
        text = f"nearest: {nearest[0]:.3g}x in {nearest[1]}" + (f"; without {', '.join(missing)}" if missing else "")
        return nearest[0] > 1, text

    return judge


def linear_within(work: str, milliseconds: float) -> Callable[[Content], tuple[bool, str]]:
    def judge(content: Content) -> tuple[bool, str]:
        cases = content["linear"]["cases"]
        ours = cases[work]["contestants"]["ours"]
        if ours["wrong"]:
            return False, f"wrong answer: {ours['wrong']}"
        text = f"{ours['median'] * 1e3:.1f} ms, {ours['flop_per_s'] / 1e12:.0f} TFLOP/s"
        if str(content["machine"]["gpu"]).startswith(H200):
            return ours["median"] * 1e3 <= milliseconds, text
        rate = cases["dense"]["contestants"]["products"]["flop_per_s"]
        allowed = milliseconds / 1e3 * PRODUCTS_RATE / rate
        return ours["median"] <= allowed, f"{text}; at the speed of this GPU's products {allowed * 1e3:.1f} ms"

    return judge


def linear_ahead(other: str, quantity: str) -> Callable[[Content], tuple[bool, str]]:
    """Of one other contestant, in every work from hidden states that it finished rightly; the nearest is named."""

    def judge(content: Content) -> tuple[bool, str]:
        ratios = []
        for work, case in content["linear"]["cases"].items():
            ours, theirs = (case["contestants"].get(name) for name in ("ours", other))
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
    Goal("forward", "<= 0.64 ms", within("forward", 0.64)),
    Goal("off-policy GSPO, forward and backward", "<= 1.93 ms", within("gspo", 1.93)),
    Goal("the same, 45% of no advantage, 15% of the rest clipped", "<= 1.60 ms", within("gspo_inactive", 1.60)),
    Goal("on-policy GSPO, in Triton", "<= 1.60 ms", within("gspo_on_policy", 1.60)),
    Goal("on-policy GSPO, in CUDA C++", "<= 1.30 ms", cuda_within("gspo_on_policy", 1.30)),
    Goal("GRPO, a ratio per token, in Triton", "<= 1.60 ms", within("grpo", 1.60)),
    Goal("GRPO, a ratio per token, in CUDA C++", "<= 1.30 ms", cuda_within("grpo", 1.30)),
    Goal("PPO, one mean over all tokens, in CUDA C++", "<= 1.30 ms", cuda_within("ppo", 1.30)),
    Goal("launches of forward and backward", f"<= {LAUNCHES}", launches),
    *(Goal(f"time against {other}, every case", "> 1x", ahead(other, "median")) for other in OTHERS),
    *(Goal(f"peak memory against {other}, every case", "> 1x", ahead(other, "extra_bytes")) for other in OTHERS),
    Goal("from hidden states, D = 4,096, dense", "<= 41.5 ms", linear_within("dense", 41.5)),
    Goal("the same, 45% of no advantage, 15% of the rest clipped", "<= 27 ms", linear_within("inactive", 27.0)),
    Goal("the same, head frozen", "<= 28 ms", linear_within("frozen_head", 28.0)),
    *(Goal(f"linear, time against {other}", "> 1x", linear_ahead(other, "median")) for other in LINEAR_OTHERS),
    *(Goal(f"linear, memory against {other}", "> 1x", linear_ahead(other, "extra_bytes")) for other in LINEAR_OTHERS),
)


def print_goals(content: Content | None) -> int:
    """How many are not met, unmeasured ones included."""
    if content is None:
        print(f"no results of a GPU in {FOLDER}: python -m benchmarks.gpu")
    else:
        about = content.get("machine") or {}
        print(f"V = 151,936, {ROWS:,} rows, bf16; {about.get('gpu')}, torch {about.get('torch')},", end=" ")
        print(f"commit {about.get('commit')}, {about.get('date')}")
        if not str(about.get("gpu")).startswith(H200):
            print("not an H200: times are held against the same multiple of the floor")
    missed = 0
    for goal in GOALS:
        met, text = None, "not measured"
        if content is not None:
            try:
                met, text = goal.judge(content)
            except (KeyError, TypeError) as error:
                detail = str(error.args[0]) if isinstance(error, KeyError) and "absent" in str(error) else ""
                text = f"not measured ({detail})" if detail else text
        missed += met is not True
        word = {True: "met", False: "MISSED", None: "?"}[met]
        print(f"{word:<7} {goal.text + ':':<58} {goal.bound:<10}  {text}")
    if content is not None:
        print(*faster.lines(content), sep="\n")
    return missed


def _cases(content: Content) -> Iterator[tuple[str, Content]]:
    yield from content.get("cases", {}).items()


def _copy(content: Content) -> float:
    found: float = content["bandwidth"]["copy"]["bytes_per_second"]
    return found


def newest() -> Content | None:
    """An H200's results if there are any, else those of the latest date."""
    found: list[Content] = [json.loads(path.read_text()) for path in FOLDER.glob("gpu-*.json")]
    found = [content for content in found if content.get("machine")]
    found.sort(key=lambda content: (str(content["machine"].get("gpu")).startswith(H200), content["machine"]["date"]))
    return found[-1] if found else None


def main() -> int:
    content = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else newest()
    return 1 if print_goals(content) else 0


if __name__ == "__main__":
    sys.exit(main())
