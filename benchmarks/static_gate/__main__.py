"""Compiles and reads the kernels, in several processes, and says what is wrong; see the package's docstring."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from . import __doc__ as about
from . import cuda_kernels, triton_kernels
from .figures import Figures
from .gate import RESULTS, Measured, judge, load, markdown, save, show
from .sass import NVIDIA


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_gate", description=(about or "").split("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help=f"write {RESULTS.name}, a compiler's part unless its kernels are at fault"
    )
    parser.add_argument("--only", default="", metavar="WORD", help="kernels whose name has this word")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/gpu.md and end")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(*markdown(), sep="\n\n")
        return 0
    if options.write and options.only:
        parser.error("--write writes all figures: leave out --only")

    nvcc = cuda_kernels.find_nvcc()
    measured = _measure(nvcc, options.only, options.processes)
    if not any(of_compiler.figures for of_compiler in measured.values()):
        parser.error(f"--only: no kernel's name has {options.only!r}")
    committed, complaints = load(), []
    print()
    for compiler, now in measured.items():
        then = committed.get(compiler, Measured(now.version, {}))
        comparable = then.version == now.version
        if not comparable and not options.write:
            has = f"{RESULTS.name} has the figures of {then.version}"
            print(f"{compiler} is {now.version}, {has}: only the budgets are checked.")
        wrong = judge(now.figures, then.figures if comparable and not options.write else None)
        complaints += wrong
        if options.write and not wrong:
            save({**load(), compiler: now})
    if nvcc is None:
        print("No nvcc on PATH or in CUDA_HOME/bin: the CUDA C++ kernels are not checked.")
    count = sum(len(of_compiler.figures) for of_compiler in measured.values())
    compilers = ", ".join(f"{compiler} {of_compiler.version}" for compiler, of_compiler in measured.items())
    print(*complaints, f"{count} kernels, {len(complaints)} complaints, {compilers}", sep="\n")
    return 1 if complaints else 0


def _measure(nvcc: str | None, only: str, processes: int) -> dict[str, Measured]:
    """By compiler, the kernels whose name has the word `only`; prints each."""
    measured = {"Triton": Measured(triton_kernels.prepare(), {})}
    if nvcc:
        measured["nvcc"] = Measured(cuda_kernels.release(nvcc), {})
    jobs = triton_kernels.jobs(only)

    def add(compiler: str, name: str, figures: Figures) -> None:
        measured[compiler].figures[name] = figures
        print(show(name, figures), flush=True)

    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=triton_kernels.prepare) as pool:
        by_nvcc = [pool.submit(cuda_kernels.measure, nvcc, target) for target in NVIDIA] if nvcc else []
        for job, figures in zip(jobs, pool.map(triton_kernels.measure_or_say_why, jobs), strict=True):
            add("Triton", job.name, figures)
        for name, figures in cuda_kernels.in_order(future.result() for future in by_nvcc).items():
            if only in name:
                add("nvcc", name, figures)
    return measured


if __name__ == "__main__":
    sys.exit(main())
