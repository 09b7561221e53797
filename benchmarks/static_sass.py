"""Machine code of NVIDIA GPUs: instructions that nvdisasm prints, loops in them, the figures of a hot loop."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NVIDIA = ("sm_80", "sm_90", "sm_100")
ACCESS = 16  # bytes of the widest load and store
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

# LD and ST determine at run time which memory an address belongs to.
LOADS, STORES, LOCAL = ("LDG", "LDGSTS", "LDS", "LD"), ("STG", "STS", "ST"), ("LDL", "STL")
EXCHANGES = (
    "SHFL", "BAR", "REDUX", "CREDUX", "LDSM", "ATOM", "ATOMG", "ATOMS", "RED", "REDG", "MEMBAR", "SYNCS", "UCGABAR_ARV",
    "UCGABAR_WAIT",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    guard: str  # the predicate it runs under, such as "@!P0", or ""
    opcode: str  # such as "LDG.E.128"
    operands: str

    def __str__(self) -> str:
        return f"{self.guard} {self.opcode} {self.operands}".strip()

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def loaded(self) -> set[int]:
        """The registers that a load from global memory fills."""
        first = _REGISTER.match(self.operands)
        return set(range(int(first[1]), int(first[1]) + self.bytes // 4)) if self.base == "LDG" and first else set()

    @property
    def used(self) -> set[int]:
        """The registers that are read, each alone: of a pair or more the first."""
        operands = self.operands if self.base in STORES else self.operands.partition(",")[2]
        return {int(number) for number in _REGISTER.findall(operands)}

    @property
    def bytes(self) -> int:
        """How many a load or store moves for each thread."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((sizes[part] for part in self.opcode.split(".")[1:] if part in sizes), 4)


@dataclass(frozen=True)
class Loop:
    """The body of an innermost loop, along the path that moves the most bytes; of several, the shortest."""

    body: tuple[Instruction, ...]

    def count(self, *bases: str) -> int:
        return sum(i.base in bases for i in self.body)

    def accesses(self, *bases: str) -> list[Instruction]:
        """The accesses that are executed: ptxas adds some under "@!PT", which is never true."""
        return [i for i in self.body if i.base in bases and i.guard != "@!PT"]

    def moved(self, bases: Sequence[str]) -> int:
        return sum(i.bytes for i in self.accesses(*bases))

    @property
    def exponentials(self) -> int:
        return sum(i.opcode.startswith("MUFU.EX2") for i in self.body)

    @property
    def covered(self) -> int:
        """Exponentials between the last load and the first use of what was loaded, in this iteration or the next."""
        loads = [at for at, i in enumerate(self.body) if i.loaded]
        if not loads:
            return 0
        filled = set().union(*(self.body[at].loaded for at in loads))
        count = 0
        for instruction in (*self.body[loads[-1] + 1 :], *self.body[: loads[0]]):
            if instruction.used & filled:
                return count
            count += instruction.opcode.startswith("MUFU.EX2")
        return count

    @property
    def guarded(self) -> bool:
        """Whether its loads have a mask: these are not whole blocks."""
        return any(i.guard for i in self.accesses(*LOADS))

    @property
    def histogram(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in Counter(i.base for i in self.body).most_common())


_REGISTER = re.compile(r"\bR(\d+)\b")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_DESTINATION = re.compile(r"\.L_x_\d+")


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions that nvdisasm printed, and the labels with the index of the instruction each stands before."""
    instructions: list[Instruction] = []
    labels = {}
    for line in listing.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _LINE.match(line):
            instructions.append(Instruction((match[1] or "").strip(), match[2], match[3].strip()))
    return instructions, labels


def find_loops(listing: str) -> list[Loop]:
    """The innermost loops: from a label to the last branch back to it, with no such pair inside."""
    instructions, labels = parse(listing)
    targets = _branches(instructions, labels)
    ranges = _ranges(targets)
    innermost = [r for r in ranges if not any(r != q and r[0] <= q[0] and q[1] <= r[1] for q in ranges)]
    paths = (_main_path(instructions, targets, first, last) for first, last in innermost)
    return [Loop(tuple(path)) for path in paths if path]


def spills(listing: str) -> tuple[int, int]:
    """Accesses to local memory: in loops, nested ones too, and outside of all."""
    instructions, labels = parse(listing)
    ranges = _ranges(_branches(instructions, labels))
    local = [at for at, instruction in enumerate(instructions) if instruction.base in LOCAL]
    inside = sum(any(first <= at <= last for first, last in ranges) for at in local)
    return inside, len(local) - inside


def _branches(instructions: list[Instruction], labels: dict[str, int]) -> dict[int, int]:
    """The target of each branch, by the branch's index."""
    targets = {}
    for at, instruction in enumerate(instructions):
        if instruction.base == "BRA" and (match := _DESTINATION.search(instruction.operands)) and match[0] in labels:
            targets[at] = labels[match[0]]
    return targets


def _ranges(targets: dict[int, int]) -> list[tuple[int, int]]:
    """First and last instruction of each loop."""
    ends = {to: at for at, to in targets.items() if to < at}  # the last branch back to a label
    return sorted(ends.items())


def _main_path(instructions: list[Instruction], targets: dict[int, int], first: int, last: int) -> list[Instruction]:
    """The path from `first` to `last` that moves the most bytes; of several, the one with the fewest steps.

    [] if there is none: a branch back from code that was only placed later is no loop.
    """
    best: dict[int, tuple[int, int, int]] = {first: (0, 0, -1)}  # index -> (bytes, -steps before it, predecessor)
    for at in range(first, last):
        if at not in best:
            continue
        here = instructions[at]
        moves = here.bytes if here.base in (*LOADS, *STORES) else 0
        jump = targets.get(at)
        always = jump is not None and not here.guard and "P" not in here.operands.split("`")[0]
        for successor in ({jump} if always else {at + 1, jump}) - {None}:
            if successor is not None and at < successor <= last:
                best[successor] = max(best.get(successor, (-1, 0, -1)), (best[at][0] + moves, best[at][1] - 1, at))
    path, at = [], last if last in best else -1
    while at >= 0:
        path.append(instructions[at])
        at = best[at][2]
    return path[::-1]


# ---- figures


@dataclass(frozen=True)
class Hot:
    """A hot loop's numbers for each column; a thread does `elements` columns in an iteration.

    `covered`: an iteration's exponentials between its last load and the first use of what was loaded. It is 0 where a
    block is loaded, awaited and computed, and all of them where loads are issued before the block before is computed.
    """

    instructions: float
    mufu: float
    elements: int
    covered: int = 0


@dataclass(frozen=True)
class Figures:
    """What is known of a compiled kernel; `problems` is for the reader and not saved."""

    registers: int
    shared: int
    loops: dict[str, Hot] = field(default_factory=dict)
    wide_accesses: int | None = None  # AMD: 16-byte loads and stores in the whole kernel
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        kept = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "problems"}
        return kept if self.loops else {k: v for k, v in kept.items() if k != "loops"}

    @staticmethod
    def from_json(kept: dict[str, Any]) -> Figures:
        loops = {kind: Hot(**hot) for kind, hot in kept.get("loops", {}).items()}
        return Figures(**{**kept, "loops": loops})


def read_loops(
    listing: str,
    kinds: Sequence[str],
    columns_of: Callable[[Loop, str], int],
    budget: Callable[[str], float],
    blocks: str,
    exchanges: Sequence[str],
    check: Callable[[Loop, str], Iterable[str]] = lambda loop, kind: (),
) -> tuple[dict[str, Hot], list[str]]:
    """Figures of the hot loop of each kind, and what is wrong with them.

    `columns_of`: what an iteration of a loop does, 0 for a loop that is not of this kind or not over whole `blocks`. Of
    several the loop with the fewest instructions a column counts. `check` finds further faults.
    """
    loops, hot, problems = find_loops(listing), {}, []
    for kind in kinds:
        found = [(len(loop.body) / n, loop, n) for loop in loops if (n := columns_of(loop, kind))]
        if not found:
            problems.append(f"no {kind} loop over whole {blocks}")
            continue
        _, loop, columns = min(found, key=lambda each: each[0])
        wrong = []
        if narrow := [str(i) for i in loop.accesses(*LOADS, *STORES) if i.bytes < ACCESS]:
            wrong.append(f"{len(narrow)} accesses of less than 16 bytes, such as {narrow[0]}")
        if exchanged := [i.base for i in loop.body if i.base in exchanges]:
            wrong.append(f"lanes exchange data, {Counter(exchanged).most_common()}")
        if loop.exponentials and not loop.count("FFMA", "FFMA2"):
            wrong.append("no fused multiply-add")
        instructions, mufu = round(len(loop.body) / columns, 3), round(loop.count("MUFU") / columns, 4)
        if instructions > budget(kind):
            wrong.append(f"{instructions} instructions a column > {budget(kind):g} ({loop.histogram})")
        hot[kind] = Hot(instructions, mufu, columns, loop.covered)
        problems += [f"{kind} loop: {problem}" for problem in (*wrong, *check(loop, kind))]
    return hot, problems


# ---- a cubin


def disassemble(cubin: Path) -> str:
    return _tool("nvdisasm", "-c", str(cubin))


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Of each kernel, by its mangled name: REG, STACK, SHARED and others."""
    return read_resources(_tool("cuobjdump", "-res-usage", str(cubin)))


def read_resources(printed: str) -> dict[str, dict[str, int]]:
    _, *functions = re.split(r"^\s*Function (\S+):$", printed, flags=re.MULTILINE)
    return {
        symbol: {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        for symbol, usage in zip(functions[::2], functions[1::2], strict=True)
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
