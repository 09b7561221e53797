"""The CUDA C++ kernels, compiled by nvcc from csrc/cuda/rows.cu, and figures of each template instance's code.

A hot loop processes whole vectors of 16 bytes: "copy" copies them to shared memory, "read" sums up a row, "write"
writes a gradient. A kernel may compute in float64 outside its hot loops, once a row, but must not use local memory.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .static_sass import (
    ACCESS,
    EXCHANGES,
    ITEM_BYTES,
    LOADS,
    LOCAL,
    NVIDIA,
    STORES,
    Figures,
    Loop,
    disassemble,
    parse,
    read_loops,
    resources,
)  # fmt: skip

SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "rows.cu"
NVCC_FLAGS = tuple((SOURCE.parent / "nvcc.options").read_text().split())

BUDGETS = {"read": 6.0, "write": 6.0}  # instructions a column, of any dtype; "copy" has none
BUDGETS_CAPPED = {"read": 27.0, "write": 31.0}  # with the tanh of a softcap


def budget(kind: str, dtype: str, capped: bool = False) -> float:
    return (BUDGETS_CAPPED if capped else BUDGETS).get(kind, math.inf)


@dataclass(frozen=True)
class Kernel:
    """Instances of a kernel that have this word among their template's arguments."""

    name: str
    word: str
    loops: tuple[str, ...]  # the hot loops they must have
    load: str  # the instruction by which "read" and "write" read a row
    targets: tuple[str, ...] = NVIDIA  # where they are launched
    capped: bool = False  # whether the logits have a softcap


CLUSTERS = ("sm_90", "sm_100")
KERNELS = (
    Kernel("one_read", "Resident", ("copy", "read", "write"), "LDS", CLUSTERS),
    Kernel("one_read", "Again", ("read", "write"), "LDG"),
    Kernel("one_read", "Resident", ("copy", "read", "write"), "LDS", CLUSTERS, capped=True),
    Kernel("one_read", "Again", ("read", "write"), "LDG", capped=True),
)

TABLE = {  # a row's words: (kernel and word, its loop)
    "statistics of a row out of shared memory": ("one_read, Resident", "read"),
    "its gradient": ("one_read, Resident", "write"),
    "statistics of a row, where there are no clusters": ("one_read, Again", "read"),
    "its gradient, the row read again": ("one_read, Again", "write"),
    "with a softcap: statistics of a row out of shared memory": ("one_read, Resident capped", "read"),
    "with a softcap: its gradient": ("one_read, Resident capped", "write"),
}

# ---- names

_CAPS = {"NoCap": "", "TanhCap": "capped"}  # what a name says of them, behind its first word
_DTYPES = {"BFloat16": "bf16", "Float16": "fp16", "float": "fp32"}
_TOKEN = re.compile(r"L[a-z](?P<value>\d+)E|S[0-9A-Z]*_|(?P<length>\d+)|(?P<letter>\w)")


def demangle(symbol: str) -> tuple[str, tuple[str, ...]]:
    """A function's name and the arguments of its template, without namespaces and repeated types."""
    if not symbol.startswith("_Z"):
        return symbol, ()
    path: list[str] = []
    arguments: list[str] = []
    depth, at = 0, len("_Z")
    while token := _TOKEN.match(symbol, at):
        at = token.end()
        if token["value"]:
            arguments.append(token["value"])
        elif token["length"]:
            at += int(token["length"])
            (arguments if depth > 1 else path).append(symbol[token.end() : at])
        elif token["letter"]:
            depth += (token["letter"] in "NI") - (token["letter"] == "E")
            if token["letter"] == "f":
                arguments.append("float")
            if depth == 0:
                break
    return path[-1], tuple(arguments)


@dataclass(frozen=True)
class Instance:
    kernel: str
    words: tuple[str, ...]  # of its template, but for the dtype
    dtype: str
    target: str

    @staticmethod
    def of(symbol: str, target: str) -> Instance:
        kernel, arguments = demangle(symbol)
        dtypes = [_DTYPES[word] for word in arguments if word in _DTYPES]
        words = [word for word in arguments if word not in _DTYPES and word not in _CAPS]
        words[1:1] = [_CAPS[word] for word in arguments if _CAPS.get(word)]
        return Instance(kernel, tuple(words), dtypes[0] if dtypes else "", target)

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.kernel, " ".join(self.words), self.dtype, self.target)))

    @property
    def row(self) -> Kernel | None:
        """Of the table."""
        return next(
            (row for row in KERNELS
             if row.name == self.kernel and row.word in self.words and row.capped == ("capped" in self.words)),
            None,
        )  # fmt: skip


# ---- figures


def columns_of(loop: Loop, kind: str, dtype: str) -> int:
    """How many columns an iteration does; 0 for a loop that is not of this kind, or not over whole vectors."""
    width = ACCESS // ITEM_BYTES[dtype]

    def columns(*bases: str) -> int:
        return sum(i.bytes == ACCESS for i in loop.accesses(*bases)) * width

    exponentials = loop.exponentials
    if kind == "copy":
        return columns("LDGSTS") if exponentials == 0 else 0
    if any(i.guard for i in loop.accesses("LDG", "LDS", "LD")):  # these are not whole groups
        return 0
    read, stored = columns("LDG", "LDS", "LD"), columns("STG", "ST")
    if kind == "write":
        return read if read == exponentials == stored else 0
    looks = exponentials - read  # at the running maximum: one for one or more vectors
    return read if 0 < looks <= read // width and not loop.accesses("STG", "ST") else 0


def split(listing: str) -> dict[str, str]:
    """The parts of nvdisasm's listing, by the kernel's mangled name."""
    _, *parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def read_kernel(listing: str, usage: dict[str, int], row: Kernel, dtype: str) -> Figures:
    def check(loop: Loop, kind: str) -> Iterator[str]:
        meant = (row.load, "LDGSTS", "STG", "STS")
        if strange := [i for i in loop.accesses(*LOADS, *STORES, *LOCAL) if i.base not in meant]:
            kinds = Counter(i.base for i in strange).most_common()
            yield f"memory not by {row.load} and STG, {kinds}, such as {strange[0]}"
        # A call of a label is a way out of the loop.
        if any(i.base == "CALL" and ".L_x_" not in i.operands for i in loop.body):
            yield "calls a function"
        if doubles := [str(i) for i in loop.body if re.match(r"D(ADD|FMA|MUL|SETP)\b|.*(\.F64|64H)", i.opcode)]:
            yield f"float64, {len(doubles)} times, such as {doubles[0]}"

    hot, problems = read_loops(
        listing,
        row.loops,
        lambda loop, kind: columns_of(loop, kind, dtype),
        lambda kind: budget(kind, dtype, row.capped),
        "vectors",
        EXCHANGES,
        check,
    )
    body, *called = re.split(r"^(\$\S+):$", listing, flags=re.MULTILINE)
    functions = [(row.name, body)] + [
        (demangle(symbol.split("$")[-1])[0], text) for symbol, text in zip(called[::2], called[1::2], strict=True)
    ]
    for function, text in functions:
        if local := sum(i.base in LOCAL for i in parse(text)[0]):
            problems.append(f"{local} accesses to local memory in {function}")
    if usage["STACK"] or usage["LOCAL"]:
        problems.append(f"{usage['STACK']} bytes of stack, {usage['LOCAL']} of local memory")
    return Figures(usage["REG"], usage["SHARED"], hot, None, tuple(problems))


def read_cubin(listing: str, usages: dict[str, dict[str, int]], target: str) -> dict[str, Figures]:
    """By name: the kernels launched on this target, those that `KERNELS` lacks, and those that the cubin lacks."""
    figures, seen = {}, set()
    for symbol, text in split(listing).items():
        instance = Instance.of(symbol, target)
        row = instance.row
        if row is None or not instance.dtype:
            figures[instance.name] = Figures(0, 0, problems=("KERNELS does not say what loops it must have",))
        elif target in row.targets:
            seen.add((row, instance.dtype))
            figures[instance.name] = read_kernel(text, usages[symbol], row, instance.dtype)
    for row in KERNELS:
        for dtype in ITEM_BYTES:
            if target in row.targets and (row, dtype) not in seen:
                words = (row.word, "capped") if row.capped else (row.word,)
                name = Instance(row.name, words, dtype, target).name
                figures[name] = Figures(0, 0, problems=(f"not in {SOURCE.name}",))
    return figures


def in_order(of_targets: Iterable[dict[str, Figures]]) -> dict[str, Figures]:
    """The figures of several targets, with an instance's targets next to each other."""
    every = {name: figures for of_target in of_targets for name, figures in of_target.items()}

    def order(name: str) -> tuple[list[str], int]:
        *words, target = name.split(", ")
        return words, NVIDIA.index(target)

    return {name: every[name] for name in sorted(every, key=order)}


# ---- nvcc


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def release(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]  # type: ignore[index]


def measure(nvcc: str, target: str) -> dict[str, Figures]:
    """Compiles and reads."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "rows.cubin"
        architecture = f"arch={target.replace('sm', 'compute')},code={target}"
        command = [nvcc, *NVCC_FLAGS, "-gencode", architecture, "-cubin", str(SOURCE), "-o", str(cubin)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return read_cubin(disassemble(cubin), resources(cubin), target)
        except subprocess.CalledProcessError as error:
            said = f"{Path(error.cmd[0]).name}: {(error.stderr or error.stdout).strip()}"
            return {f"{SOURCE.name}, {target}": Figures(0, 0, problems=(f"does not compile: {said}",))}
