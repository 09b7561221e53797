"""What was measured against the committed figures, the file that keeps these, and the tables of docs/gpu.md of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import cuda_kernels, triton_kernels
from .figures import Figures
from .sass import NVIDIA

RESULTS = Path(__file__).resolve().parents[1] / "results" / "static.json"

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
    """The committed figures by their compiler; none if there is no file."""
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
    rooms = {"Triton": triton_kernels, "nvcc": cuda_kernels}
    return [
        _table(compiler, committed[compiler], room.TABLE, room.budget)
        for compiler, room in rooms.items()
        if compiler in committed
    ]


def _table(
    compiler: str, measured: Measured, rows: dict[str, tuple[str, str]], budget: Callable[[str, str], float]
) -> str:
    title = f"| bf16, {compiler} {measured.version} | " + " | ".join(NVIDIA) + " | budget |"
    lines = [title, "|---|" + "--:|" * (len(NVIDIA) + 1)]
    for words, (kernel, kind) in rows.items():
        cells = []
        for target in NVIDIA:
            name = re.compile(rf"{kernel}\b[^,]*, bf16, {target}")  # nvcc's have their numbers of threads, too
            found = [figures for known, figures in measured.figures.items() if name.fullmatch(known)]
            cells.append(f"{found[0].loops[kind].instructions:.1f} ({found[0].registers})" if found else "")
        most = budget(kind, "bf16")
        cells.append(f"{most:g}" if math.isfinite(most) else "")
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
