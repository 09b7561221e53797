"""The same inputs through this package, TRL, verl, Liger and torch, in one process, on whatever device there is.

    make bench-peers                                 installs the libraries; a missing one is left out, and named
    python -m benchmarks.peers                       tables on the terminal: six minutes, 10 GB
    python -m benchmarks.peers --write cpu-<name>    and benchmarks/results/peers-cpu-<name>.json, and docs/peers.md
    python -m benchmarks.peers --smoke               tiny sizes: does it run at all?

Everybody's answer is compared with float64 (`truth.py`): on ragged batches, which are also timed, and on hard cases
(`HARD`). Nobody is disqualified: the tables say what a library answers. Log-probabilities and losses are each library's
own functions (`libraries.py`); only its trainer is left out.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import libraries
from .cases import HARD_CASES, PEER_CASES, PEER_SMOKE, Case, Problem, build
from .contestants import COMPILED, EAGER, OVERWRITES, Contestant, Run, Unfit, on_logprobs, ours
from .gpu_meter import meter_of
from .gpu_parts import table
from .race import Outcome, Rounds, race
from .results import FOLDER, REPOSITORY, arguments_of, load, machine, newest, record, save
from .sampled import exact_logprobs, sample
from .truth import distance, exact_gradients

ROUNDS, SMOKE_ROUNDS = Rounds(least=5, most=9, seconds=20.0), Rounds(least=1, most=1)
RIGHT = 1e-4  # of a hard case's gradient and, by the mean advantage, of its loss: fp32 leaves 1e-6
PAGE = REPOSITORY / "docs" / "peers.md"


def _contestants(ours: Contestant, liger: Callable[[Problem], Run]) -> tuple[Contestant, ...]:
    return (
        ours,
        Contestant("trl", "TRL", on_logprobs(libraries.trl_batch, libraries.trl_loss)),
        Contestant("verl", "verl", on_logprobs(libraries.verl_batch, libraries.verl_loss)),
        Contestant("liger", "Liger", liger),
        EAGER,
        COMPILED,
    )


CONTESTANTS = {
    "logits": _contestants(
        Contestant("ours", "gspo-kernels", OVERWRITES, overwrites=True), libraries.liger_from_logits
    ),
    "hidden": _contestants(Contestant("ours", "gspo-kernels", ours), libraries.liger_from_hidden),
}
LABELS = {contestant.name: contestant.label for contestant in CONTESTANTS["logits"]}


def measured(case: Case, device: str, smoke: bool) -> dict[str, Any]:
    """Each one's distance from the truth and peak memory, then as many rounds of all as there is time for."""
    problem, start = build(case, device=device), start_of(case)
    outcomes = race(
        problem, CONTESTANTS[start], SMOKE_ROUNDS if smoke else ROUNDS, meter_of(device), judge=distance, heap_kept=True
    )
    exact_gradients.cache_clear()

    def of(name: str, outcome: Outcome) -> dict[str, Any]:
        judged = outcome.judged
        return {"loss_error": judged.loss, "gradient_error": judged.gradient, "extra_bytes": outcome.extra_bytes}

    unmasked = int(problem.mask.sum())
    found = record(
        problem, outcomes, of, start=start, objective=case.work.objective, width=case.width, unmasked=unmasked
    )
    found["id"] = f"{start}-{case.work.name}-{case.dtype}-{case.vocab}"
    found["absent"] |= found.pop("errors")
    return found


def start_of(case: Case) -> str:
    return "logits" if case.from_logits else "hidden"


# ---- hard cases


@dataclass(frozen=True)
class Hard:
    title: str
    change: Callable[[Problem], Problem | None] = lambda problem: None  # in place, or another problem
    vocab: int = 1_000
    starts: tuple[str, ...] = ("logits", "hidden")
    loss_counts: bool = True  # False: the paper's loss is infinite here, and any finite one will do


def _mask_out(which: Any) -> Callable[[Problem], None]:
    return lambda problem: problem.mask.__setitem__(which, False)


def _overflow(advantage: float) -> Callable[[Problem], None]:
    def change(problem: Problem) -> None:
        assert problem.old_logprobs is not None
        problem.old_logprobs[0] -= 100.0
        problem.advantages[0] = advantage

    return change


def _nan_in_padding(problem: Problem) -> None:
    problem.sampled.pristine[0][~problem.mask.flatten()] = math.nan


def _nan_in_old_padding(problem: Problem) -> None:
    assert problem.old_logprobs is not None
    problem.old_logprobs[~problem.mask] = math.nan


def _forbidden_block(problem: Problem) -> Problem:
    """Of 64 columns, as a filter of the vocabulary leaves it; no sampled token is in it."""
    ids = problem.token_ids
    problem.sampled.pristine[0][:, 200:264] = -math.inf
    ids[(ids >= 200) & (ids < 264)] = 0
    return dataclasses.replace(problem, old_logprobs=(_logprobs(problem)[0].view(ids.shape) - 1e-4).float())


def _advantages_by_token(problem: Problem) -> Problem:
    """GSPO-token: each token's own advantage, of a mean that is not zero."""
    steps = torch.linspace(-1.0, 1.0, problem.mask.shape[1], device=problem.mask.device)
    work = dataclasses.replace(problem.case.work, objective="gspo_token")
    case = dataclasses.replace(problem.case, work=work)
    return dataclasses.replace(problem, case=case, advantages=problem.advantages[:, None] + steps)


HARD = {
    "empty_response": Hard("a response without an unmasked token", _mask_out(1)),
    "nothing_at_all": Hard("no unmasked token in the batch", _mask_out(slice(None))),
    "overflow_clipped": Hard("a log-ratio of 100, advantage above 0", _overflow(1.0)),
    "overflow_unclipped": Hard("a log-ratio of 100, advantage below 0", _overflow(-1.0), loss_counts=False),
    "nan_in_padding": Hard("NaN in the padding's logits or hidden states", _nan_in_padding),
    "nan_in_old_padding": Hard("NaN in the padding's old log-probabilities", _nan_in_old_padding),
    "forbidden_block": Hard("64 columns of -inf", _forbidden_block, starts=("logits",)),
    "advantages_by_token": Hard("advantages by token (GSPO-token)", _advantages_by_token),
    "odd_vocabulary": Hard("V = 1,001", vocab=1_001),
}


def build_hard(name: str, start: str, device: str = "cpu") -> Problem:
    sample.cache_clear()  # tensors of earlier hard cases have been changed
    problem = build(dataclasses.replace(HARD_CASES[start], vocab=HARD[name].vocab), device=device)
    problem = HARD[name].change(problem) or problem
    problem.restore()
    logprobs, lse = _logprobs(problem)
    sample.cache_clear()
    return dataclasses.replace(
        problem, sampled=dataclasses.replace(problem.sampled, logprobs=logprobs, lse=lse)
    ).solved()


def _logprobs(problem: Problem) -> tuple[Tensor, Tensor]:
    """Of what the inputs are now, in float64."""
    ids = problem.sampled.token_ids
    if not problem.case.from_logits:
        hidden, weight = problem.sampled.pristine
        return exact_logprobs(hidden, weight, ids)
    exact = problem.sampled.pristine[0].double()
    lse = exact.logsumexp(1)
    return exact.gather(1, ids[:, None])[:, 0] - lse, lse


def hard_cases(start: str, device: str) -> dict[str, dict[str, str]]:
    """By case and contestant, what became of it."""
    found: dict[str, dict[str, str]] = {}
    for name, hard in HARD.items():
        if start not in hard.starts:
            continue
        problem = build_hard(name, start, device)
        found[name] = {}
        for contestant in CONTESTANTS[start]:
            if contestant.compiles:  # another way to run torch eager, and 20 seconds a case
                continue
            try:
                answer = contestant.prepare(problem)()
                assert answer is not None
                found[name][contestant.name] = in_words(problem, *answer, hard.loss_counts)
            except Unfit:
                found[name][contestant.name] = ""
            except Exception as error:
                found[name][contestant.name] = type(error).__name__
            finally:
                problem.restore()
    return found


def in_words(problem: Problem, loss: Tensor, gradients: tuple[Tensor, ...], loss_counts: bool = True) -> str:
    """What became of a hard case: right, right but for a factor, wrong by how much, or not finite and where."""
    trouble = [] if bool(loss.isfinite()) else [f"loss {'NaN' if bool(loss.isnan()) else 'inf'}"]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        nan = any(bool(gradient.isnan().any()) for gradient in gradients)
        trouble.append(f"gradient {'NaN' if nan else 'inf'}")
    if trouble:
        return ", ".join(trouble)
    away = distance(problem, loss, gradients)
    worst = max(away.gradient.values())
    if worst <= RIGHT:
        if loss_counts and away.loss > RIGHT:
            return f"loss off by {away.loss:.0%} of an advantage"
        return "right" if loss_counts else "finite, no gradient from it"
    exact = exact_gradients(problem)
    product = sum(float((g.double().reshape(e.shape) * e).sum()) for g, e in zip(gradients, exact, strict=True))
    square = sum(float((e * e).sum()) for e in exact)
    factor = product / square if square else math.nan
    if factor > 0 and max(distance(problem, loss, gradients, factor).gradient.values()) <= RIGHT:
        return f"{factor:.3g} times the gradient"
    return f"gradient off by {worst:.0%}" if worst < 100 else "gradient off by more than 100 times"


# ---- tables: for the terminal, and between the markers of docs/peers.md


def blocks(found: dict[str, Any]) -> dict[str, str]:
    cases = found["cases"].values()
    return {
        "machine": _machine(found["machine"]),
        **{f"from_{start}": "\n\n".join(_case(c) for c in cases if c["start"] == start) for start in CONTESTANTS},
        **{f"hard_{start}": "\n".join(_hard(of_start)) for start, of_start in found["hard"].items()},
    }


def fill(page: str, found: dict[str, Any]) -> str:
    """The page with every `<!-- name --> ... <!-- end -->` as `blocks` has it."""
    known = blocks(found)
    pattern = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)
    return pattern.sub(lambda match: f"<!-- {match[1]} -->\n{known[match[1]]}\n<!-- end -->", page)


def _machine(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in about["packages"].items())
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    commit = f"commit {about['commit']}, {about['date']}"
    return f"{where}, {about['backend']} backend, torch {about['torch']}, {commit}; {versions}."


def _case(case: dict[str, Any]) -> str:
    width = f", D = {case['width']}" if case["width"] else ""
    what = "logits" if case["start"] == "logits" else "hidden states and weight"
    parts = list(next(iter(case["contestants"].values()))["gradient_error"])
    rows = []
    for name, label in LABELS.items():
        if m := case["contestants"].get(name):
            errors = [f"{m['gradient_error'][part]:.1e}" for part in parts]
            memory = "" if m["extra_bytes"] is None else f"{m['extra_bytes'] / 1e9:.2f} GB"
            rows.append([label, f"{m['loss_error']:.1e}", *errors, f"{m['median'] * 1e3:,.0f} ms", memory])
        else:
            rows.append([label, case["absent"].get(name, "failed"), *[""] * (len(parts) + 2)])
    about = (
        f"{case['objective'].upper()}, {what} in {case['dtype']}, V = {case['vocab']:,}{width}, {case['rows']} tokens, "
        f"{case['unmasked']} of them unmasked:"
    )
    heads = ["", "loss off by", *(f"gradient, {part}" for part in parts), "time", "memory"]
    return "\n".join([about, "", *table(heads, rows)])


def _hard(cases: dict[str, Any]) -> list[str]:
    names = [name for name in LABELS if any(case.get(name) for case in cases.values())]
    rows = [[HARD[key].title, *(case.get(name) or "-" for name in names)] for key, case in cases.items()]
    return table(["", *(LABELS[name] for name in names)], rows, right="---|")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = arguments_of("peers", __doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--write", metavar="NAME", help="results/peers-<NAME>.json, and the tables of docs/peers.md")
    options = parser.parse_args(arguments)
    began, cases = time.perf_counter(), []
    for case in PEER_SMOKE if options.smoke else PEER_CASES:
        print(f"{start_of(case)}, {case.id} ...", file=sys.stderr, flush=True)
        cases.append(measured(case, options.device, options.smoke))
    about = machine(libraries.PACKAGES)
    if options.device.startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name()
    hard = {start: hard_cases(start, options.device) for start in CONTESTANTS}
    found: dict[str, Any] = {"machine": about, "cases": {case["id"]: case for case in cases}, "hard": hard}
    print("\n\n".join(blocks(found).values()))
    print(f"\n{time.perf_counter() - began:.0f} s")
    if options.write:
        path = FOLDER / f"peers-{options.write}.json"
        save(path, {**found, "cases": cases})
        PAGE.write_text(fill(PAGE.read_text(), load(newest("peers"))))
        print(f"results: {path}; the newest results fill in the tables of {PAGE}")
    return 0 if all("ours" in case["contestants"] for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
