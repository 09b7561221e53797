"""The losses from hidden states on a GPU: every work of `../linear/cases.py` at a model's size, checked, in turn.

Items are names of works, and `products`: how fast cuBLAS is, and what it costs that logits leave it in fp32.
`<work>:ours` times this package alone, for when somebody else broke the process.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import gspo_kernels

from ..linear.cases import DENSE, SMOKE_ROWS, SMOKE_VOCAB, SMOKE_WIDTH, WORKS, Case, Problem, Work, build
from ..linear.contestants import CONTESTANTS, PEERS, Contestant
from ..linear.results import case_result
from ..linear.turns import admit, words
from ..race import Rounds, take_turns
from .context import Context
from .meter import finish, meter_of

BY_NAME = {work.name: work for work in WORKS}
TAKING_PART = [c for c in CONTESTANTS if not c.compiles]
ROUNDS, SMOKE_ROUNDS = Rounds(least=5, most=20, seconds=6.0), Rounds(least=1, most=1)


def case_of(work: Work, smoke: bool = False) -> Case:
    if smoke:
        return Case(work, "bf16", SMOKE_VOCAB, SMOKE_ROWS, SMOKE_WIDTH)
    return Case(work, "bf16", 151_936, rows=8_192, width=4_096)


def run(context: Context) -> bool:
    """Arguments: the items."""
    good = True
    for item in context.arguments:
        name, _, only_ours = item.partition(":")
        context.at(f"{name}, building its inputs")
        work = DENSE if name == "products" else BY_NAME[name]
        problem = build(case_of(work, context.smoke), context.device)
        if name == "products":
            _products(context, problem)
        else:
            good &= _case(context, problem, bool(only_ours))
        context.finished(item)
        del problem
        gc.collect()
    return good


def _case(context: Context, problem: Problem, only_ours: bool) -> bool:
    work, meter = problem.case.work, meter_of(context.device)

    def why_not(contestant: Contestant) -> str:
        context.at(f"{work.name}, first calls of {contestant.name}")
        if contestant.loss_alone and not work.gradient:
            return "returns no log-probabilities"
        return "the process broke with all of them in it" if only_ours and contestant.name in PEERS else ""

    outcomes, runs = admit(problem, TAKING_PART, meter, why_not)
    context.at(f"{work.name}, in turn: {', '.join(contestant.name for contestant, _ in runs)}")
    rounds = SMOKE_ROUNDS if context.smoke else ROUNDS
    for name, seconds in take_turns(problem, runs, rounds, outcomes, meter).items():
        outcomes[name].seconds = seconds
    finish()
    found = asdict(case_result(problem, outcomes))
    context.put("linear", "cases", work.name, value=found)
    context.say(_line(work.name, found))
    return "ours" in found["contestants"] and not found["contestants"]["ours"]["wrong"]


def _products(context: Context, problem: Problem) -> None:
    """Each product alone, bf16 to bf16 and to fp32; and logits rounded to bf16 under this package's row kernels."""
    hidden, weight, token_ids = problem.inputs.hidden, problem.inputs.weight, problem.inputs.token_ids
    meter = meter_of(context.device)
    gradient = torch.zeros(len(hidden), len(weight), dtype=torch.bfloat16, device=hidden.device)
    pairs = {
        "logits": (hidden, weight.T),
        "hidden_gradient": (gradient, weight),
        "weight_gradient": (gradient.T, hidden),
    }

    def rounded_forward() -> None:
        gspo_kernels.token_logprobs(torch.mm(hidden, weight.T), token_ids)

    def exact_forward() -> None:
        gspo_kernels.linear_token_logprobs(hidden, weight, token_ids)

    works: dict[str, Callable[[], object]] = {"forward, bf16 logits": rounded_forward, "forward": exact_forward}
    for name, (left, right) in pairs.items():
        works[f"{name}, bf16"] = functools.partial(torch.mm, left, right)
        works[f"{name}, fp32"] = functools.partial(torch.mm, left, right, out_dtype=torch.float32)
    for name, work in works.items():
        context.at(f"products, {name}")
        try:
            with torch.no_grad():
                seconds = [meter.timed(work) for _ in range(2 if context.smoke else 8)][1:]
        except Exception as error:  # torch before 2.8, or a CPU, has no products into fp32
            meter.forget()
            context.put("linear", "products", name, value={"error": words(error)})
            continue
        median = statistics.median(seconds)
        found: dict[str, Any] = {"median": median, "min": min(seconds), "flop_per_s": 2 * problem.case.unit / median}
        context.put("linear", "products", name, value=found)
        context.say(f"{name}: {median * 1e3:.3f} ms, {found['flop_per_s'] / 1e12:.1f} TFLOP/s")


def _line(name: str, found: dict[str, Any]) -> str:
    parts = []
    for contestant, m in found["contestants"].items():
        wrong = ", WRONG" if m["wrong"] else ""
        parts.append(f"{contestant} {m['median'] * 1e3:.3f} ms ({m['flop_per_s'] / 1e12:.1f} TFLOP/s{wrong})")
    parts += [f"{contestant}: {error.splitlines()[0][:80]}" for contestant, error in found["errors"].items()]
    return f"{name}: {', '.join(parts)}"
