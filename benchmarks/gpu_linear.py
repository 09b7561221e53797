"""The losses from hidden states on a GPU: each work of the linear benchmarks at a model's size, checked, then timed."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gspo_kernels

from .cases import DENSE, LINEAR_WORKS, Case, Problem, Work, build, linear_case, linear_smoke
from .contestants import Contestant, ours
from .gpu_meter import meter_of
from .gpu_parts import Context
from .gpu_profile import kernels_of, medians, short, traced
from .gpu_speed import compete, problems
from .linear import CONTESTANTS, PEERS, case_result
from .race import Meter, Rounds, words
from .results import line
from .truth import WrongAnswer, check

BY_NAME = {work.name: work for work in LINEAR_WORKS}
PRODUCT_ROWS, SMOKE_PRODUCT_ROWS = (512, 1_024, 2_048, 4_096), (8,)
CALLS, SMOKE_CALLS = 3, 2
ROUNDS, SMOKE_ROUNDS = Rounds(least=5, most=20, seconds=4.0), Rounds(least=1, most=1)
# A row has 594 KiB, and a product of logits 512 rows. default_chunk_bytes of gspo_kernels/linear/products.py decides.
CHUNK_BYTES = {
    "dense": (640 << 20, 1280 << 20, 2560 << 20, 5120 << 20),
    "frozen_head": (320 << 20, 640 << 20, 1280 << 20, 2560 << 20),
    "forward": (320 << 20, 640 << 20, 1280 << 20, 2560 << 20),
}
SMOKE_CHUNK_BYTES = tuple(rows * linear_smoke(DENSE, "bf16").vocab * 4 for rows in (16, 64))


def case_of(work: Work, smoke: bool = False) -> Case:
    return linear_smoke(work, "bf16") if smoke else linear_case(work, "bf16", 151_936, rows=8_192, width=4_096)


def run(context: Context) -> bool:
    """Arguments: the items, which are names of works and four more.

    `products` times cuBLAS, and what float32 logits cost it. `rows` times the row kernels on float32 logits.
    `chunks_<work>` times a work with chunks of several sizes, `profile_<work>` each of its kernels. `<work>:ours` times
    this package and the bare products alone, after somebody else broke the process.
    """

    def built(name: str) -> Problem:
        work = BY_NAME.get(name.removeprefix("chunks_").removeprefix("profile_"), DENSE)
        return build(case_of(work, context.smoke), device=context.device)

    good = True
    for item, problem in problems(context, context.arguments, built):
        name, _, only_ours = item.partition(":")
        if name == "products":
            _products(context, problem)
        elif name == "rows":
            _rows(context, problem)
        elif name.startswith("chunks_"):
            good &= _chunks(context, problem)
        elif name.startswith("profile_"):
            _profile(context, problem)
        else:
            good &= _case(context, problem, bool(only_ours))
    return good


def taking_part(device: str) -> list[Contestant]:
    """Without those that take long to compile; on a GPU cut-cross-entropy has kernels of its own."""
    return [c for c in CONTESTANTS if not c.compiles or (c.name == "cce" and device == "cuda")]


def _case(context: Context, problem: Problem, only_ours: bool) -> bool:
    work, rounds = problem.case.work, SMOKE_ROUNDS if context.smoke else ROUNDS

    def why_not(contestant: Contestant) -> str:
        return "this package alone was measured here" if only_ours and contestant.name in PEERS else ""

    chosen = taking_part(context.device)
    outcomes, _ = compete(context, problem, chosen, work.name, rounds, why_not, keep_wrong=True)
    found = case_result(problem, outcomes)
    context.put("linear", "cases", work.name, value=found)
    context.say(line(work.name, found))
    return "ours" in found["contestants"] and not found["contestants"]["ours"]["wrong"]


def _products(context: Context, problem: Problem) -> None:
    """Each product alone, bf16 to bf16 and to fp32; and logits rounded to bf16 under this package's row kernels."""
    (hidden, weight), token_ids = problem.sampled.pristine, problem.sampled.token_ids
    meter = meter_of(context.device)
    gradient = torch.mm(hidden, weight.T)  # numbers as any: a GPU multiplies zeros faster
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
        _timed(context, meter, ("products", name), work, flop_per_s=2 * problem.case.unit)
    for count in SMOKE_PRODUCT_ROWS if context.smoke else PRODUCT_ROWS:
        for name, work in _in_products_of(count, hidden, weight, gradient).items():
            _timed(context, meter, ("products", f"{name}, {count} rows"), work, flop_per_s=2 * problem.case.unit)


def _in_products_of(count: int, hidden: Tensor, weight: Tensor, gradient: Tensor) -> dict[str, Callable[[], object]]:
    """The three products into float32, so many rows at a time; the head's gradient is added up by the product."""
    logits = torch.empty(count, len(weight), device=hidden.device)
    sums = torch.empty(weight.shape, device=weight.device)

    def of_logits() -> None:
        for rows in hidden.split(count):
            torch.mm(rows, weight.T, out_dtype=torch.float32, out=logits)

    def of_hidden() -> None:
        for rows in gradient.split(count):
            torch.mm(rows, weight, out_dtype=torch.float32)

    def of_weight() -> None:
        for i, (rows, of_rows) in enumerate(zip(gradient.split(count), hidden.split(count), strict=True)):
            torch.addmm(sums, rows.T, of_rows, out_dtype=torch.float32, beta=float(i > 0), out=sums)

    return {"logits": of_logits, "hidden_gradient": of_hidden, "weight_gradient": of_weight}


def _rows(context: Context, problem: Problem) -> None:
    """The row kernels on a usual chunk: float32 logits, and the same rows in bf16, half the bytes."""
    count = 16 if context.smoke else 2_048
    (hidden, weight), token_ids = problem.sampled.pristine, problem.sampled.token_ids[:count]
    rounded = torch.mm(hidden[:count], weight.T)
    advantages = torch.ones(1, device=hidden.device)
    root = torch.ones((), device=hidden.device)
    meter = meter_of(context.device)
    for dtype in (torch.float32, torch.bfloat16):
        logits = rounded.to(dtype)[None].requires_grad_()
        old = gspo_kernels.token_logprobs(logits, token_ids[None]).logprobs.detach()

        def forward(logits: Tensor = logits) -> None:
            with torch.no_grad():
                gspo_kernels.token_logprobs(logits, token_ids[None])

        def both(logits: Tensor = logits, old: Tensor = old) -> None:
            loss = gspo_kernels.gspo_loss(logits, token_ids[None], advantages, old).loss
            torch.autograd.grad(loss, logits, root)

        size, kind = logits.numel() * logits.element_size(), str(dtype).removeprefix("torch.")
        for name, passes, work in (("forward", 1, forward), ("forward and gradient", 3, both)):
            _timed(context, meter, ("rows", f"{name}, {kind}"), work, bytes_per_second=passes * size)


def _profile(context: Context, problem: Problem) -> None:
    """Each kernel's time in one call."""
    work, run_once = problem.case.work.name, ours(problem)
    run_once()
    context.at(f"{work}, under the profiler")
    try:
        found = medians(traced(context, run_once, problem, SMOKE_CALLS if context.smoke else CALLS))
        for kernel in found["kernels"]:
            kernel["name"] = short(kernel["name"])
        context.say(f"{work}: {found['device_seconds'] * 1e3:.3f} ms of kernels; {kernels_of(found)}")
    except Exception as error:  # no CUPTI, or one that is in use
        found = {"error": words(error)}
    context.put("linear", "profile", work, value=found)


def _chunks(context: Context, problem: Problem) -> bool:
    """A work with chunks of several sizes, each answer checked."""
    meter, good, work = meter_of(context.device), True, problem.case.work.name
    for chunk_bytes in SMOKE_CHUNK_BYTES if context.smoke else CHUNK_BYTES[work]:
        name = str(chunk_bytes)
        run = ours(problem, chunk_bytes=chunk_bytes)
        context.at(f"chunks of {chunk_bytes} bytes")
        wrong = ""
        try:
            answer, extra = meter.peak_extra_bytes(run)
            if answer is not None:
                check(problem, *answer)
            del answer
        except WrongAnswer as error:
            wrong, good = str(error), False
        except Exception as error:  # out of memory, for one
            meter.forget()
            context.put("linear", "chunks", work, name, value={"error": words(error)})
            continue
        _timed(context, meter, ("chunks", work, name), run, {"extra_bytes": extra, "wrong": wrong})
    return good


def _timed(
    context: Context,
    meter: Meter,
    at: tuple[str, ...],
    work: Callable[[], object],
    more: dict[str, Any] | None = None,
    **amounts: float,
) -> None:
    """Writes the time, `more`, and each amount per second."""
    context.at(", ".join(at))
    try:
        seconds = [meter.timed(work) for _ in range(2 if context.smoke else 8)][1:]
        median = statistics.median(seconds)
        rates = {name: amount / median for name, amount in amounts.items()}
        found: dict[str, Any] = {"median": median, "min": min(seconds), **rates}
        said = [f"{median * 1e3:.3f} ms", *(f"{rate / 1e12:.3f} T {name}" for name, rate in rates.items())]
        context.say(f"{', '.join(at)}: {', '.join(said)}")
    except Exception as error:  # torch before 2.8, or a CPU, has no products into fp32
        meter.forget()
        found = {"error": words(error)}
    context.put("linear", *at, value={**found, **(more or {})})
