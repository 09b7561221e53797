"""The losses from hidden states against their own matrix products and against every library that starts there too.

    python -m benchmarks.linear                             25 minutes, 10 GB; writes results/linear-cpu-<name>.json
    python -m benchmarks.linear --smoke                     tiny sizes, half a minute: does it run at all?
    python -m benchmarks.linear --only dense bf16           cases whose names have all these words
    python -m benchmarks.linear --markdown [results.json]   the table of all cases, from results
    python -m benchmarks.linear --write                     the tables of docs/hidden-states.md, from committed results

The name of a results file has the processor and what multiplies bf16 there: mkl (AMX), native (the extension, by
AVX512-BF16) or float32 (neither). Without bf16 units, torch's product of bf16 logits and a head may take a hundred
times as long as in float32: who needs it is left out. A wrong answer is timed all the same, and marked. `make
bench-peers` installs the libraries; one that is not there is recorded as absent. `gpu_linear.py` measures the same
cases on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import context, kept_head, libraries
from .cases import (
    DENSE,
    DENSE_1024,
    FROZEN,
    INACTIVE,
    LINEAR_CASES,
    LINEAR_SMOKE,
    LINEAR_VOCABS,
    LINEAR_WORKS,
    Case,
    Problem,
    build,
    linear_smoke,
)
from .contestants import COMPILED, EAGER, PRODUCTS, Answer, Contestant, Run, on_logprobs, ours
from .gpu_page import filled
from .gpu_parts import table
from .race import HostMeter, Outcome, Rounds, admit, race
from .results import (
    REPOSITORY,
    arguments_of,
    committed,
    default_path,
    line,
    load,
    machine,
    newest,
    record,
    save,
    size,
    title,
)  # fmt: skip
from .sampled import DTYPES

KIND = "linear-cpu"
PAGE = REPOSITORY / "docs" / "hidden-states.md"
CALL_SECONDS = 100  # of one call, a compilation included
SLOWER = 10.0  # than in fp32: so much longer a dtype's products by torch may take
ROUNDS, SMOKE_ROUNDS = Rounds(least=2, most=6, seconds=40.0), Rounds(least=1, most=1)

# How to read the numbers; stored with them.
MEANINGS = {
    "products": "the matrix products that a loss needs (3, 2 with a frozen head, 1 without a gradient), of all rows",
    "times_products": "median / that of the products",
    "flop_per_s": "operations that arithmetic needs, on rows with a coefficient alone where it can be so, / median",
    "extra_bytes": "peak resident memory beyond the inputs, returned gradients included",
    "beyond_gradients": "extra_bytes less the returned gradients",
    "first_call_seconds": "of a contestant that compiles, on a cache that may be warm",
    "wrong": "what is wrong with the answer: timed all the same, and not to be compared",
}


def _gspo_on(name: str, label: str, find: Callable[[], libraries.Logprobs], compiles: bool = False) -> Contestant:
    """A library's log-probabilities, and GSPO in torch on top."""

    def logprobs(problem: Problem) -> Tensor:
        hidden, weight = problem.leaves
        return find()(hidden, weight, problem.token_ids)

    return Contestant(name, label, on_logprobs(logprobs), compiles=compiles)


OURS = Contestant("ours", "gspo-kernels", ours)
CONTESTANTS = (
    OURS,
    PRODUCTS,
    dataclasses.replace(EAGER, label="torch eager, all logits"),
    dataclasses.replace(COMPILED, label="torch.compile, all logits"),
    _gspo_on("cce", "cut-cross-entropy, torch_compile", libraries.cut_cross_entropy, compiles=True),
    Contestant("liger", "Liger, fused linear GRPO", libraries.liger_from_hidden),
    _gspo_on("trl", "TRL, chunked log-probabilities", libraries.trl),
    _gspo_on("torch", "torch linear_cross_entropy, chunked", libraries.torch_chunked),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
_COMPARED = ("ours", "products", "eager", "compile")  # with 1,024 rows
PEERS = tuple(c.name for c in CONTESTANTS if c not in (OURS, PRODUCTS))


def left_out(contestant: Contestant, case: Case) -> str:
    """Why a contestant says nothing new in a case, or "": minutes are spent where something is to be learned."""
    large = case.vocab == max(LINEAR_VOCABS)
    if case.work == DENSE_1024:
        return "" if contestant.name in _COMPARED else "measured with 2,048 rows"
    if contestant.name not in PEERS or case.work == DENSE:
        return ""
    if contestant.compiles and (large or case.work.gradient):
        return "compiled in the dense case alone, and at the small vocabulary for log-probabilities"
    if large and case.work.gradient:
        return "measured at the small vocabulary: no library looks at coefficients"
    return ""


def too_slow(contestant: Contestant, case: Case) -> str:
    """Why a call would take minutes, or "": it needs products of torch that crawl in this dtype on this processor."""
    if contestant.name == OURS.name or case.vocab < min(LINEAR_VOCABS):  # of a smoke run
        return ""
    work = case.work
    needed = (True, work.gradient, work.gradient and not work.frozen_head)
    this, fp32 = (sum(itertools.compress(products_seconds(dtype), needed)) for dtype in (case.dtype, "fp32"))
    if this <= SLOWER * fp32:
        return ""
    return f"torch's own products in {case.dtype} take {this / fp32:.0f} times as long as in fp32 here"


@functools.cache
def products_seconds(dtype: str) -> tuple[float, float, float]:
    """Of small products by torch, on one thread: logits, gradient of the hidden states, gradient of the weight."""
    hidden, weight = (torch.ones(rows, 1_024, dtype=DTYPES[dtype]) for rows in (64, 512))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        logits = hidden @ weight.T
        products = (lambda: hidden @ weight.T, lambda: logits @ weight, lambda: logits.T @ hidden)
        of_logits, of_hidden, of_weight = (min(HostMeter().timed(each) for _ in range(10)) for each in products)
    finally:
        torch.set_num_threads(threads)
    return of_logits, of_hidden, of_weight


def bounded(contestant: Contestant) -> Contestant:
    """Fails with TimeoutError in a call of more than `CALL_SECONDS`, as soon as its current torch operation ends."""

    def prepare(problem: Problem) -> Run:
        run = contestant.prepare(problem)

        def call() -> Answer | None:
            with _alarm(CALL_SECONDS):
                return run()

        return call

    return dataclasses.replace(contestant, prepare=prepare)


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError(f"a call takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measured(case: Case, rounds: Rounds) -> dict[str, Any]:
    problem = build(case)
    outcomes = race(
        problem,
        [bounded(contestant) for contestant in CONTESTANTS],
        rounds,
        why_not=lambda contestant: left_out(contestant, case) or too_slow(contestant, case),
        keep_wrong=True,
        warm_up=False,  # a call takes up to half a minute, and `warm_up` has been there before
        heap_kept=True,
    )
    return case_result(problem, outcomes)


def warm_up() -> None:
    """Libraries are loaded, and products made ready for each dtype, before anything counts."""
    for dtype in DTYPES:
        admit(build(linear_smoke(DENSE, dtype)), [c for c in CONTESTANTS if not c.compiles], keep_wrong=True)


def case_result(problem: Problem, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    case, products = problem.case, outcomes.get("products", Outcome()).seconds

    def of(name: str, outcome: Outcome) -> dict[str, Any]:
        median, extra = statistics.median(outcome.seconds), outcome.extra_bytes
        flops = case.work.products() * case.unit if name == "products" else problem.flops
        return {
            "times_products": median / statistics.median(products) if products else None,
            "flop_per_s": flops / median,
            "extra_bytes": extra,
            "beyond_gradients": None if extra is None else max(extra - outcome.gradient_bytes, 0),
            "first_call_seconds": outcome.compile_seconds,
            "wrong": outcome.wrong,
        }

    return record(problem, outcomes, of, width=case.width, active=problem.active)


def markdown(cases: Mapping[str, dict[str, Any]]) -> str:
    """One table a vocabulary: a line a contestant, a column a work and dtype; time, memory beside the gradients."""
    return "\n\n".join(_table(cases, vocab) for vocab in sorted({case["vocab"] for case in cases.values()}))


def _table(cases: Mapping[str, dict[str, Any]], vocab: int) -> str:
    ids = [f"{work.name}-{dtype}-{vocab}" for work in (*LINEAR_WORKS, DENSE_1024) for dtype in DTYPES]
    chosen = [cases[id] for id in ids if id in cases]
    heads = [f"{case['work'].replace('_', ' ')}, {case['dtype']}" for case in chosen]
    rows = [[c.label, *(_cell(case["contestants"].get(c.name)) for case in chosen)] for c in CONTESTANTS]
    return "\n".join(table([f"V = {vocab:,}", *heads], [row for row in rows if any(row[1:])]))


def _cell(m: dict[str, Any] | None) -> str:
    if m is None:
        return ""
    seconds = f"{m['median']:.2f} s" if m["median"] >= 1 else f"{m['median'] * 1e3:,.0f} ms"
    memory = "" if m["beyond_gradients"] is None else f", {size(m['beyond_gradients'])}"
    return f"{seconds}{memory}" + (" (wrong)" if m["wrong"] else "")


# ---- docs/hidden-states.md


def page_block(
    contents: Sequence[dict[str, Any]], contexts: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]] = ()
) -> str:
    """Of each machine a table of the cases with 2,048 rows and one of those with 1,024 rows, where it has them.

    `contexts`: results of context.py, whose tables stand below.
    """
    blocks = []
    for content in contents:
        cases, where = content["cases"], _machine(content["machine"])
        blocks.append(
            f"2,048 rows, D = 1,024, V = 151,936 on {where}. Seconds, and memory beside the returned gradients:"
        )
        blocks.append(_chosen(cases))
        lines = [
            [f"{vocab:,} {dtype}", *(f"{found[name]['median']:.2f}" if name in found else "" for name in _COMPARED)]
            for vocab in sorted(LINEAR_VOCABS)
            for dtype in DTYPES
            if (found := cases.get(f"{DENSE_1024.name}-{dtype}-{vocab}", {}).get("contestants"))
        ]
        if lines:
            blocks.append("The same machine with 1,024 rows, seconds:")
            blocks.append("\n".join(table(["V, dtype", *(BY_NAME[name].label for name in _COMPARED)], lines)))
    return "\n\n".join([*blocks, *map(kept_head.markdown, kept), *map(context.markdown, contexts)])


def _machine(about: dict[str, Any]) -> str:
    products = about.get("bf16_products_are", "")
    return ", ".join(filter(None, [f"{about['cores']} cores of {about['cpu']}", products, about["date"]]))


def _chosen(cases: Mapping[str, dict[str, Any]]) -> str:
    vocab = max(LINEAR_VOCABS)
    columns = {
        "fp32": (DENSE, "fp32"),
        "bf16": (DENSE, "bf16"),
        "fp32, 53% of rows inactive": (INACTIVE, "fp32"),
        "fp32, head frozen": (FROZEN, "fp32"),
    }
    chosen = [cases.get(f"{work.name}-{dtype}-{vocab}", {"contestants": {}}) for work, dtype in columns.values()]
    rows = [[c.label, *(_cell(case["contestants"].get(c.name)) for case in chosen)] for c in CONTESTANTS]
    return "\n".join(table(["", *columns], [row for row in rows if any(row[1:])]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = arguments_of("linear", __doc__, KIND)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose names have all these words")
    parser.add_argument("--write", action="store_true", help="the tables of docs/hidden-states.md, from all results")
    options = parser.parse_args(arguments)
    if options.write:
        PAGE.write_text(
            filled(PAGE.read_text(), page_block(committed(KIND), committed(context.KIND), committed(kept_head.KIND)))
        )
        return 0
    if options.markdown is not None:
        print(markdown(load(options.markdown if options.markdown.name else newest(KIND))["cases"]))
        return 0
    all_cases = LINEAR_SMOKE if options.smoke else LINEAR_CASES
    cases = [case for case in all_cases if all(word in case.id for word in options.only)]
    if not cases:
        raise SystemExit(f"no case has all of {', '.join(options.only)}: they are {', '.join(c.id for c in all_cases)}")
    about = machine(libraries.PACKAGES)
    print(title(about), flush=True)
    began, finished = time.perf_counter(), []
    if options.smoke:
        warm_up()
    for case in cases:
        finished.append(measured(case, SMOKE_ROUNDS) if options.smoke else _in_a_process(case))
        print(line(case.id, finished[-1]), flush=True)
    print("", markdown({case["id"]: case for case in finished}), sep="\n")
    for reason in dict.fromkeys(reason for case in finished for reason in case["absent"].values()):
        names = {name for case in finished for name, other in case["absent"].items() if other == reason}
        print(f"not here: {', '.join(sorted(names))}: {reason.splitlines()[0][:150]}")
    print(f"\n{time.perf_counter() - began:.0f} s")
    path = options.save or (None if options.smoke or options.only else default_path(KIND, by_products=True))
    if path:
        save(path, {"machine": about, "meanings": MEANINGS, "cases": finished})
        print(f"\nresults: {path}")
    failed = [case["id"] for case in finished if case["contestants"].get("ours", {"wrong": "failed"})["wrong"]]
    if failed:
        print(f"\ngspo-kernels failed or gave a wrong answer: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _in_a_process(case: Case) -> dict[str, Any]:
    """Of its own: what a case leaves in a heap would change what the next one seems to need."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), warm_up) as executor:
        return executor.submit(measured, case, ROUNDS).result()


if __name__ == "__main__":
    sys.exit(main())
