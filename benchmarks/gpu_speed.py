"""Whole losses from logits on a GPU: what is timed, who is timed, and how; each answer is checked first.

This package runs in Triton and in CUDA C++, beside torch, a copy, and two peers that start from logits. A peer gets
the layout that it takes: Liger the whole buffer [B, T + 1, V], contiguous, with its gradient over it; TRL the view
without the last position.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import gspo_kernels
from gspo_kernels.rows import cuda_rows

from .cases import Case, Problem, Work, build
from .contestants import BY_NAME as AT_HOME
from .contestants import Contestant, Run, Unfit, on_logprobs, ours
from .gpu_meter import finish, idle_seconds, launches, meter_of
from .gpu_parts import Context
from .libraries import liger_from_logits, trl_from_logits
from .race import Outcome, Rounds, Runs, admit, take_turns
from .results import line, record

# ---- what is timed

WORKS = {
    work.name: work
    for work in (
        Work("forward", "loss alone", gradient=False),
        Work("gspo", "GSPO, off-policy"),
        Work("gspo_on_policy", "GSPO, on-policy", on_policy=True),
        Work("grpo", "GRPO, a ratio per token, off-policy", objective="grpo"),
        Work("ppo", "PPO, one mean over all tokens, off-policy", objective="ppo"),
        Work("gspo_inactive", "GSPO, 45% of no advantage, 15% of the rest clipped", no_advantage=0.45, clipped=0.15),
        Work("gspo_kept", "GSPO, off-policy, 8 columns of a row kept", kept=8),
        Work("gspo_kept_on_policy", "GSPO, on-policy, 8 columns of a row kept", on_policy=True, kept=8),
    )
}


def build_named(device: str, name: str) -> Problem:
    """Of <work>-<dtype>-<vocabulary>-<rows>.

    Padded, and cut from logits with one position more, as `model(...).logits[:, :-1]` is: the layout that Liger takes
    (not with kept sets, which it does not take).
    Where the vocabulary is odd, rows of the logits and of a fresh gradient begin at every address, each at another one.
    """
    work, dtype, vocab, rows = name.split("-")
    sequences = 8 if device == "cpu" else 64
    spare = 0 if WORKS[work].kept else 1
    return build(Case(WORKS[work], dtype, int(vocab), "padded", sequences=sequences, spare=spare), int(rows), device)


def build_on(device: str, work: str, rows: int) -> Problem:
    """At a model's size: Qwen3's vocabulary, 64 responses; on a CPU at a tiny one."""
    return build_named(device, f"{work}-{'fp32-100' if device == 'cpu' else 'bf16-151936'}-{rows}")


# ---- who is timed


def _in_triton(problem: Problem, overwrite_logits: bool) -> Run:
    """On a GPU by name, because CUDA C++ is the default on some; on a CPU by the default backend."""
    return ours(problem, overwrite_logits, "triton" if problem.logits.is_cuda else None)


def _in_cuda(problem: Problem, overwrite_logits: bool) -> Run:
    if not problem.case.work.one_read:
        raise Unfit("left to Triton: a row's coefficient depends on other rows")
    reasons = cuda_rows.unsupported_reasons(problem.logits)
    if reasons:
        raise Unfit("; ".join(reasons))
    return ours(problem, overwrite_logits, "cuda")


def _copy(problem: Problem) -> Run:
    """As many bytes as the logits have, read and written: two units."""
    elements = problem.logits.numel()
    source, target = (x.view(-1)[:elements] for x in (problem.sampled.pristine[0], problem.sampled.working[0]))

    def copy() -> None:
        with torch.no_grad():
            target.copy_(source)

    return copy


def _both_ways(name: str, label: str, prepare: Callable[..., Run]) -> tuple[Contestant, Contestant]:
    over, fresh = (functools.partial(prepare, overwrite_logits=overwrite) for overwrite in (True, False))
    return (
        Contestant(name, f"{label}, gradient over the logits", over, overwrites=True),
        Contestant(f"{name}_fresh", f"{label}, fresh gradient", fresh, gradient_only=True),
    )


_TRITON = _both_ways("ours", "gspo-kernels", _in_triton)
_CUDA = _both_ways("ours_cuda", "gspo-kernels in CUDA C++", _in_cuda)
_TORCH = (AT_HOME["eager"], AT_HOME["compile"])
_THEIRS = (
    Contestant("liger", "Liger's triton_grpo_loss, gradient over the logits",
               functools.partial(liger_from_logits, inplace=True), overwrites=True, compiles=True),
    Contestant("trl", "TRL's fused log-probabilities, torch on top", on_logprobs(trl_from_logits), compiles=True),
)  # fmt: skip
_FLOOR = Contestant("copy", "memory copy", _copy, overwrites=True)

CONTESTANTS = (*_TRITON, *_TORCH, *_THEIRS, _FLOOR)  # of `speed`
ONE_READ = (*_TRITON, *_CUDA, _FLOOR)  # of `one_read`
BY_NAME = {contestant.name: contestant for contestant in (*CONTESTANTS, *_CUDA)}
OURS = tuple(contestant.name for contestant in (*_TRITON, *_CUDA))


def units(contestant: Contestant, problem: Problem) -> float:
    """Passes over the logits that go through memory.

    Triton's kernels cannot clip before a row's sum is complete: with a ratio per token they read a second time. Of the
    others it is the fewest that any algorithm takes.
    """
    if contestant is _FLOOR:
        return 2.0
    if contestant in _TRITON and problem.case.work.one_read and not problem.case.work.on_policy:
        return problem.visits + 1.0
    return problem.units


# ---- how they are timed

ROUNDS, IDLE_ROUNDS = Rounds(least=10, most=30, seconds=2.5), Rounds(least=5, most=5)
SMOKE_ROUNDS = Rounds(least=1, most=1)
COUNTED_ROWS = 1_024  # launches are counted at one size, they are the same at all
COMPILED_ROWS = 8_192  # torch.compile takes part at one size: half a minute of compilation for each


def speed(context: Context) -> bool:
    """Arguments: rows, then the items.

    Items are names of works. `<work>:ours` times this package and the copy alone: for a run that is short of time, or
    after somebody else's kernel broke the process.
    """
    rows, *items = context.arguments
    good = True
    for item, problem in problems(context, items, lambda name: build_on(context.device, name, int(rows))):
        name, _, only_ours = item.partition(":")
        why_not = functools.partial(_left_out, context, int(rows), bool(only_ours))
        good &= measure(context, problem, CONTESTANTS, ("cases", f"{name}-{rows}"), why_not)
    return good


def problems(context: Context, items: list[str], build: Callable[[str], Problem]) -> Iterator[tuple[str, Problem]]:
    """Builds each item's problem (by the word before a colon), and says which item runs and which has finished."""
    for item in items:
        context.at(f"{item}, building its inputs")
        yield item, build(item.partition(":")[0])
        context.finished(item)
        gc.collect()


def compete(
    context: Context,
    problem: Problem,
    contestants: Sequence[Contestant],
    key: str,
    rounds: Rounds,
    why_not: Callable[[Contestant], str],
    keep_wrong: bool = False,
) -> tuple[dict[str, Outcome], Runs]:
    """What becomes of each contestant, those that run measured in turn; `why_not` as in `admit`."""
    meter = meter_of(context.device)

    def about_to_call(contestant: Contestant) -> str:
        context.at(f"{key}, first calls of {contestant.name}")
        return why_not(contestant)

    outcomes, runs = admit(problem, contestants, meter, about_to_call, keep_wrong=keep_wrong)
    context.at(f"{key}, in turn: {', '.join(contestant.name for contestant, _ in runs)}")
    for name, seconds in take_turns(problem, runs, rounds, outcomes, meter).items():
        outcomes[name].seconds = seconds
    finish()
    return outcomes, runs


def measure(
    context: Context,
    problem: Problem,
    contestants: tuple[Contestant, ...],
    at: tuple[str, ...],
    why_not: Callable[[Contestant], str] = lambda contestant: "",
) -> bool:
    """Writes one case into the results at `at`, whose last word is its name; False if this package failed in it."""
    key, smoke = at[-1], context.smoke
    chosen = [c for c in contestants if problem.case.work.gradient or not c.gradient_only]
    outcomes, runs = compete(context, problem, chosen, key, SMOKE_ROUNDS if smoke else ROUNDS, why_not)
    idle_rounds, meter = SMOKE_ROUNDS if smoke else IDLE_ROUNDS, meter_of(context.device)
    idle = take_turns(problem, runs, idle_rounds, outcomes, meter, idle_seconds)
    finish()

    found = _record(problem, outcomes, idle)
    context.put(*at, value=found)
    context.say(line(key, found))
    if context.device == "cuda" and problem.rows == COUNTED_ROWS:
        _count_launches(context, problem, runs, at)
    return not any(name in found["errors"] for name in OURS)


def _left_out(context: Context, rows: int, only_ours: bool, contestant: Contestant) -> str:
    if only_ours and contestant.name not in (*OURS, "copy"):
        return "this package alone was measured here"
    if contestant.name == "compile" and context.smoke:
        return "not in a smoke run"
    return f"compiled at {COMPILED_ROWS:,} rows alone" if contestant.name == "compile" and rows != COMPILED_ROWS else ""


def _count_launches(context: Context, problem: Problem, runs: Runs, at: tuple[str, ...]) -> None:
    for contestant, run_once in runs:
        if contestant.name in OURS:
            context.at(f"{at[-1]}, counting launches of {contestant.name}")
            try:
                count = launches(run_once)
            except RuntimeError as error:  # no CUPTI, or one that is in use
                context.say(f"launches are not counted: {error}")
                return
            finally:
                problem.restore()
            context.put(*at, "contestants", contestant.name, "launches", value=count)


def _record(problem: Problem, outcomes: dict[str, Outcome], idle: dict[str, list[float]]) -> dict[str, Any]:
    copies = outcomes["copy"].seconds if "copy" in outcomes else []
    bandwidth = 2 * problem.logits_bytes / statistics.median(copies) if copies else None

    def of(name: str, outcome: Outcome) -> dict[str, Any]:
        median, extra = statistics.median(outcome.seconds), outcome.extra_bytes
        moved = units(BY_NAME[name], problem) * problem.logits_bytes
        return {
            "units": moved / problem.logits_bytes,
            "times_floor": median * bandwidth / moved if bandwidth else None,
            "bytes_per_second": moved / median,
            "idle_median": statistics.median(idle[name]) if idle.get(name) else None,
            "extra_bytes": extra,
            "extra_in_logits": None if extra is None else extra / problem.logits_bytes,
            "first_call_seconds": outcome.compile_seconds,
        }

    floor = problem.units * problem.logits_bytes / bandwidth if bandwidth else None
    size = problem.logits_bytes
    return record(problem, outcomes, of, logits_bytes=size, units=problem.units, floor_seconds=floor)


def one_read(context: Context) -> bool:
    """CUDA C++ beside Triton and a copy, in the cases for which one read of the logits is enough.

    Those at a model's size are on the pages. The others say whether CUDA C++ is ahead everywhere, also on rows that do
    not begin on 16-byte boundaries: then it becomes the default (`FASTER_ON` in gspo_kernels/rows/cuda_rows.py).
    Arguments: the items, `build_named`'s.
    """
    good = True
    logits = torch.zeros(1, 1, 8, dtype=torch.bfloat16, device=context.device)
    context.put("one_read", "explain", value=gspo_kernels.explain(logits).splitlines())
    for item, problem in problems(context, context.arguments, lambda name: build_named(context.device, name)):
        if not cuda_rows.unsupported_reasons(problem.logits):
            context.put("one_read", "layouts", item, value=_layout(problem))
        good &= measure(context, problem, ONE_READ, ("one_read", "cases", item))
    return good


def _layout(problem: Problem) -> Any:
    """Whether clusters of blocks hold a row in shared memory or a block reads it twice, and how many at once."""
    native: Any = cuda_rows._native
    dtype, index = str(problem.logits.dtype).removeprefix("torch."), problem.logits.device.index or 0
    return native.cuda_layout(dtype=dtype, vocab=problem.case.vocab, rows=problem.rows, device=index)
