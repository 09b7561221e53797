"""What compilers make of the GPU kernels, without a GPU: compiled for several, and their machine code read.

    python -m benchmarks.static_gate               against benchmarks/results/static.json; fails if a kernel got worse
    python -m benchmarks.static_gate --sample      what is compiled for sm_90, and some kernels for other GPUs
    python -m benchmarks.static_gate --write       the figures into that file
    python -m benchmarks.static_gate --only WORD   kernels whose name has this word
    python -m benchmarks.static_gate --markdown    the tables of docs/gpu.md, from that file; compiles nothing

On NVIDIA the hot loops are found in the output of nvdisasm, which is part of Triton's package (`static_sass.py`). A hot
loop processes whole blocks of columns: it reads logits without a mask, 16 bytes at a time, and its lanes exchange
nothing. Its instructions a column have a budget with any compiler. Where the committed figures are of the installed
compiler, more instructions, special functions (MUFU) or registers than there are a failure as well.

`static_triton.py` compiles with Triton, for AMD too, where the kernels must compile; `static_cuda.py` with nvcc,
where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import static_cuda, static_triton
from .gpu_parts import table
from .static_sass import NVIDIA, Figures

RESULTS = Path(__file__).resolve().parent / "results" / "static.json"

MORE_INSTRUCTIONS = 1.03
MORE_MUFU = 0.005
MORE_REGISTERS = 8
LESS_COVERED = 0.75


@dataclass(frozen=True)
class Measured:
    """What a compiler of this version made, by the kernels' names."""

    version: str
    figures: dict[str, Figures]


def regressions(now: Figures, then: Figures) -> Iterator[str]:
    """What got worse since the committed figures."""
    if now.registers > then.registers + MORE_REGISTERS:
        yield f"{now.registers} registers; committed {then.registers}"
    if then.wide_accesses and not now.wide_accesses:
        yield f"no accesses of 16 bytes; committed {then.wide_accesses}"
    for kind in now.loops.keys() & then.loops.keys():
        a, b = now.loops[kind], then.loops[kind]
        if a.instructions > b.instructions * MORE_INSTRUCTIONS:
            yield f"{kind} loop: {a.instructions} instructions a column; committed {b.instructions}"
        if a.mufu > b.mufu + MORE_MUFU:
            yield f"{kind} loop: {a.mufu} MUFU a column; committed {b.mufu}"
        if a.covered < b.covered * LESS_COVERED:
            yield f"{kind} loop: {a.covered} exponentials while loads are under way; committed {b.covered}"


def judge(measured: dict[str, Figures], committed: dict[str, Figures] | None) -> list[str]:
    """Complaints, one a line; `committed` is None where its figures come from another compiler."""
    complaints = []
    for name, figures in measured.items():
        wrong = list(figures.problems)
        if committed is not None:
            if name in committed:
                wrong += regressions(figures, committed[name])
            else:
                wrong.append("not in the committed figures: add it by --write")
        complaints += [f"{name}: {problem}" for problem in wrong]
    return complaints


def load(path: Path = RESULTS) -> dict[str, Measured]:
    """The committed figures by compiler; {} if there is no file."""
    if not path.exists():
        return {}
    return {
        compiler: Measured(kept["version"], {name: Figures.from_json(each) for name, each in kept["figures"].items()})
        for compiler, kept in json.loads(path.read_text()).items()
    }


def save(by_compiler: dict[str, Measured], path: Path = RESULTS) -> None:
    """One line a kernel, in the order in which they were measured."""

    def written(measured: Measured) -> str:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(f.to_json())}" for name, f in measured.figures.items())
        return f'{{"version": {json.dumps(measured.version)}, "figures": {{\n{lines}\n }}}}'

    compilers = ",\n".join(f" {json.dumps(name)}: {written(measured)}" for name, measured in by_compiler.items())
    path.write_text(f"{{\n{compilers}\n}}\n")


def show(name: str, figures: Figures) -> str:
    hot = "; ".join(
        f"{kind} {hot.instructions:.2f} instructions, {hot.mufu:.3f} MUFU, {hot.covered} covered"
        for kind, hot in figures.loops.items()
    )
    return f"{name:52} {figures.registers:4} registers {figures.shared:6} B shared  {hot}".rstrip()


def markdown() -> list[str]:
    """The tables of docs/gpu.md, one a compiler: instructions a column of bf16 logits, registers a thread."""
    committed = load()
    kernels = {"Triton": static_triton, "nvcc": static_cuda}
    return [
        _table(compiler, committed[compiler], of_compiler.TABLE, of_compiler.budget)
        for compiler, of_compiler in kernels.items()
        if compiler in committed
    ]


def _table(
    compiler: str, measured: Measured, rows: dict[str, tuple[str, str]], budget: Callable[[str, str, bool], float]
) -> str:
    lines = []
    for words, (kernel, kind) in rows.items():
        cells = [words]
        for target in NVIDIA:
            name = re.compile(rf"{kernel}\b[^,]*, bf16, {target}")  # nvcc's have their numbers of threads, too
            found = [figures for known, figures in measured.figures.items() if name.fullmatch(known)]
            cells.append(f"{found[0].loops[kind].instructions:.1f} ({found[0].registers})" if found else "")
        most = budget(kind, "bf16", "capped" in kernel)
        lines.append([*cells, f"{most:g}" if math.isfinite(most) else ""])
    return "\n".join(table([f"bf16, {compiler} {measured.version}", *NVIDIA, "budget"], lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_gate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--write", action="store_true", help=f"write {RESULTS.name}, a compiler's part unless its kernels are at fault"
    )
    parser.add_argument(
        "--sample", action="store_true", help="what is compiled for sm_90, and some kernels for other GPUs"
    )
    parser.add_argument("--only", default="", metavar="WORD", help="kernels whose name has this word")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/gpu.md and end")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(*markdown(), sep="\n\n")
        return 0
    if options.write and (options.only or options.sample):
        parser.error("--write writes all figures: leave out --only and --sample")

    nvcc = static_cuda.find_nvcc()
    measured = _measure(nvcc, options.only, options.sample, options.processes)
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


def _measure(nvcc: str | None, only: str, sample: bool, processes: int) -> dict[str, Measured]:
    """By compiler, the kernels whose name has the word `only`; prints each."""
    measured = {"Triton": Measured(static_triton.prepare(), {})}
    if nvcc:
        measured["nvcc"] = Measured(static_cuda.release(nvcc), {})
    jobs = static_triton.jobs(only, sample)

    def add(compiler: str, name: str, figures: Figures) -> None:
        measured[compiler].figures[name] = figures
        print(show(name, figures), flush=True)

    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=static_triton.prepare) as pool:
        targets = ("sm_90",) if sample else NVIDIA
        by_nvcc = [pool.submit(static_cuda.measure, nvcc, target) for target in targets] if nvcc else []
        for job, figures in zip(jobs, pool.map(static_triton.measure_or_say_why, jobs), strict=True):
            add("Triton", job.name, figures)
        for name, figures in static_cuda.in_order(future.result() for future in by_nvcc).items():
            if only in name:
                add("nvcc", name, figures)
    return measured


if __name__ == "__main__":
    sys.exit(main())
