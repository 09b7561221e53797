"""Runs all cases, prints what came of them, and with --write keeps it; see the package's docstring."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..gpu_meter import meter_of
from ..memory import keep_freed_memory
from ..race import Meter, Outcome, Rounds, note, take_turns
from .contestants import Contestant, Run, Unfit, starting_from
from .inputs import CASES, HARD, SMOKE, Case, Inputs, build, build_hard
from .results import about, save
from .table import PAGE, fill, terminal
from .truth import Truth, distance, in_words, solve

ROUNDS = {False: Rounds(least=5, most=9, seconds=20.0), True: Rounds(least=1, most=1)}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    began = time.perf_counter()
    cases = {}
    for case in SMOKE if options.smoke else CASES:
        print(f"{case.id} ...", file=sys.stderr, flush=True)
        cases[case.id] = _measured(case, options.device, options.smoke)
    hard = {start: _hard(start, options.device) for start in ("logits", "hidden")}
    found = {"machine": about(options.device), "cases": cases, "hard": hard}
    print(terminal(found))
    print(f"\n{time.perf_counter() - began:.0f} s")
    if options.write:
        path = save(options.write, found)
        PAGE.write_text(fill(PAGE.read_text(), found))
        print(f"results: {path}; the tables of {PAGE} are theirs")
    ours = [case["contestants"].get("ours") for case in cases.values()]
    return 0 if all(ours) else 1


def _measured(case: Case, device: str, smoke: bool) -> dict[str, Any]:
    """Each one's distance from the truth and peak memory, then as many rounds of all as there is time for."""
    inputs, meter = build(case, device), meter_of(device)
    truth = solve(inputs)
    entrants, absent, found, outcomes = starting_from(case.start), {}, {}, {}
    runs: list[tuple[Contestant, Run]] = []
    for contestant in entrants:
        outcome = outcomes[contestant.name] = Outcome()
        try:
            run, found[contestant.name] = _first(inputs, truth, contestant, meter)
        except Exception as error:  # a peer may fail in any way on versions that it does not know
            note(error, outcome, meter)
            absent[contestant.name] = _reason(error)
        else:
            runs.append((contestant, run))
        finally:
            inputs.restore()
    del truth
    keep_freed_memory(True)  # between calls, as allocators made for training do
    try:
        for name, seconds in take_turns(inputs, runs, ROUNDS[smoke], outcomes, meter).items():
            if outcomes[name].error is None:
                found[name] |= {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    finally:
        keep_freed_memory(False)
    return {
        "start": case.start,
        "objective": case.objective,
        "dtype": case.dtype,
        "vocab": case.vocab,
        "width": case.width,
        "rows": inputs.mask.numel(),
        "unmasked": int(inputs.mask.sum()),
        "input_bytes": sum(values.numel() * values.element_size() for values in inputs.pristine),
        "contestants": found,
        "absent": absent,
    }


def _first(inputs: Inputs, truth: Truth, contestant: Contestant, meter: Meter) -> tuple[Run, dict[str, Any]]:
    run = contestant.prepare(inputs)
    run()  # compiles, loads
    inputs.restore()
    (loss, gradients), extra = meter.peak_extra_bytes(run)
    away = distance(inputs, truth, loss, gradients)
    return run, {"loss": float(loss), "loss_error": away.loss, "gradient_error": away.gradient, "extra_bytes": extra}


def _hard(start: str, device: str) -> dict[str, dict[str, str]]:
    """By case and contestant, what became of it."""
    found: dict[str, dict[str, str]] = {}
    for name, hard in HARD.items():
        if start not in hard.starts:
            continue
        inputs = build_hard(name, start, device)
        truth = solve(inputs)
        found[name] = {}
        for contestant in starting_from(start):
            if contestant.compiles:  # another way to run torch eager, and 20 seconds a case
                continue
            try:
                found[name][contestant.name] = in_words(inputs, truth, *contestant.prepare(inputs)())
            except Unfit:
                found[name][contestant.name] = ""
            except ModuleNotFoundError:
                continue
            except Exception as error:
                found[name][contestant.name] = f"{type(error).__name__}"
            finally:
                inputs.restore()
    return found


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="The same inputs through this package and its peers."
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--write", metavar="NAME", help="results/peers-<NAME>.json, and the tables of docs/peers.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
