"""What a compiler makes of the Triton kernels, without a GPU: compiled for several, and their machine code read.

    python -m benchmarks.static_gate               against benchmarks/results/static.json; fails if a kernel got worse
    python -m benchmarks.static_gate --write       the figures into that file
    python -m benchmarks.static_gate --only WORD   kernels whose name has this word
    python -m benchmarks.static_gate --markdown    the README's table, from that file; compiles nothing

On NVIDIA the hot loops are found in what nvdisasm, part of Triton's package, prints. A hot loop walks whole blocks of
columns: it reads logits without a mask, all of them 16 bytes at a time, and its lanes exchange nothing. Held to account
are its instructions a column, whatever the Triton version; and, where the committed figures come from the Triton that
is installed, more instructions, special functions (MUFU) or registers than there. For AMD the kernels must compile.

Every kernel: no float64 in the PTX, no spills to local memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "static.json"
REPOSITORY = Path(__file__).resolve().parent.parent

NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ACCESS = 16  # bytes of the widest load and store

# Instructions a column, by what a hot loop does: "read" sums up a row, "write" writes a gradient. No budget have
# "shifted", which sums up a row that does not start on a 16-byte boundary, and "scale".
BUDGETS = {"read": 8.0, "write": 7.0}
# fp16 has no number low enough to stand for -inf at any temperature: one more instruction keeps 0 times -inf away.
BUDGETS_FP16 = {"read": 8.6, "write": 7.3}


def budget(kind: str, dtype: str) -> float:
    return (BUDGETS_FP16 if dtype == "fp16" else BUDGETS).get(kind, math.inf)


MORE_INSTRUCTIONS = 1.03
MORE_MUFU = 0.005
MORE_REGISTERS = 8

# ---- what is compiled

# Types of the arguments as the launcher sees them; *T has the dtype of the logits. Neither integers nor the alignment
# of addresses are specialised on. An argument that is missing here is a constant.
ROW_TYPES = {
    "logits": "*T", "outer_stride": "i32", "inner_stride": "i32", "inner": "i32", "vocab": "i32", "token_ids": "*i64",
    "mask": "*u8", "temperature": "*fp32", "places": "*i64", "scale": "fp32", "scale_error": "fp32",
    "logprobs": "*fp32", "entropies": "*fp32", "lses": "*i64", "g_logprobs": "*fp32", "g_entropies": "*fp32",
    "g_lses": "*fp32", "factor": "*fp32", "counts": "*fp32", "counts_size": "i32", "gradient": "*T",
    "gradient_outer_stride": "i32", "gradient_inner_stride": "i32", "values": "*T",
}  # fmt: skip
LONG_STRIDES = dict.fromkeys(("outer_stride", "gradient_outer_stride"), "i64")  # more than 2^31 elements
TOKEN_TYPES = {
    "logprobs": "*fp32", "old_logprobs": "*fp32", "ref_logprobs": "*fp32", "entropies": "*fp32", "advantages": "*fp32",
    "weights": "*fp32", "mask": "*u8", "cu_seqlens": "*i32", "global_count": "*fp32", "tokens": "i32", "length": "i32",
    "sequences": "i32", "eps_low": "fp32", "eps_high": "fp32", "dual_clip": "fp32", "max_log_ratio": "fp32",
    "beta": "fp32", "entropy_coef": "fp32", "normalizer": "fp32", "g_logprobs": "*fp32", "g_entropies": "*fp32",
    "log_ratios": "*fp32", "partials": "*fp32", "loss": "*fp32", "scalars": "*fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way a kernel is called: what is absent of its optional arguments, what differs from the usual types."""

    kernel: str
    name: str
    absent: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    types: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    loops: tuple[str, ...] = ()  # the hot loops it must have


_ROWS, _BF16 = ("mask", "temperature"), ("bf16",)
_PLACED, _GRADIENTS = (*_ROWS, "places"), ("g_entropies", "g_lses", "factor")
_FP32 = {"logits": "*fp32"}  # out of a product, with a gradient in the dtype of its operands
_TOKENS = {"AGGREGATION": "sequence_mean", "ESTIMATOR": "k3", "ADVANTAGE_PER_TOKEN": False, "WEIGHT_PER_TOKEN": False}
_PER_TOKEN = {"ADVANTAGE_PER_TOKEN": True, "WEIGHT_PER_TOKEN": True}
_OPTIONAL = ("old_logprobs", "ref_logprobs", "weights", "mask", "cu_seqlens", "global_count", "g_entropies")
_UNKNOWN = ("logprobs", "entropies")
VARIANTS = (
    Variant("forward", "plain", _ROWS, loops=("read", "shifted")),
    Variant("forward", "masked", (), loops=("read", "shifted")),
    Variant("forward", "long", _ROWS, _BF16, LONG_STRIDES, loops=("read", "shifted")),
    Variant("backward", "plain", (*_PLACED, "g_entropies", "g_lses", "factor", "counts"), loops=("write",)),
    Variant("backward", "entropy", (*_PLACED, "g_lses", "factor", "counts"), loops=("write",)),
    Variant("backward", "loss", (*_PLACED, "g_entropies", "g_lses"), loops=("write",)),
    Variant("backward", "everything", ("places",), _BF16, LONG_STRIDES, loops=("write",)),
    Variant("backward", "linear", (*_ROWS, *_GRADIENTS), ("bf16", "fp16"), _FP32, loops=("write",)),
    Variant("forward_backward", "plain", _ROWS, loops=("read", "shifted", "write")),
    Variant("forward_backward", "masked", (), _BF16, LONG_STRIDES, loops=("read", "shifted", "write")),
    Variant("scale", "plain", (), loops=("scale",)),
    Variant("sequence", "gspo", _OPTIONAL[1:], ("fp32",), constants={"RATIO": "sequence"}),
    Variant("sequence", "gspo on-policy", (*_UNKNOWN, *_OPTIONAL), ("fp32",), constants={"RATIO": "sequence"}),
    Variant("sequence", "gspo_token everything", (), ("fp32",), constants={"RATIO": "sequence_by_token", **_PER_TOKEN}),
    Variant("sequence", "ppo everything", (), ("fp32",), constants={"RATIO": "token", **_PER_TOKEN}),
    Variant("batch", "off-policy", ("logprobs", "ref_logprobs", "entropies", "mask"), ("fp32",)),
    Variant("batch", "on-policy", (), ("fp32",)),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    variant: Variant
    dtype: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.variant.kernel}, {self.variant.name}, {self.dtype}, {self.target}"


def jobs(only: str = "") -> list[Job]:
    every = [Job(v, dtype, target) for v in VARIANTS for dtype in v.dtypes for target in (*NVIDIA, *AMD)]
    return [job for job in every if only in job.name]


def launch(job: Job, num_warps: int | None = None, elements: int | None = None) -> tuple[int, dict[str, Any]]:
    """Warps and constants that a kernel is launched with, unless told otherwise."""
    from gspo_kernels import fused_stage
    from gspo_kernels.logprobs import triton_rows

    kernel = job.variant.kernel
    if kernel not in triton_rows.LAUNCH:
        block = elements or fused_stage._BLOCK
        return num_warps or fused_stage._NUM_WARPS, {"BLOCK": block, **_TOKENS, **job.variant.constants}
    usual = triton_rows.LAUNCH[kernel]
    layout = triton_rows.Launch(num_warps or usual.num_warps, elements or usual.elements)
    sizes = triton_rows.sizes(kernel, layout, ITEM_BYTES[job.dtype], 32 if job.target in NVIDIA else 64)
    return layout.num_warps, {**sizes, "PTX": job.target in NVIDIA, **job.variant.constants}


def compile_kernel(job: Job, num_warps: int | None = None, elements: int | None = None) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gspo_kernels import token_kernels
    from gspo_kernels.logprobs import triton_kernels, triton_rows

    rows = job.variant.kernel in triton_rows.LAUNCH
    function = getattr(triton_kernels if rows else token_kernels, f"{job.variant.kernel}_kernel")
    num_warps, constants = launch(job, num_warps, elements)
    types = {**(ROW_TYPES if rows else TOKEN_TYPES), **job.variant.types}
    constants = {name: constants[name] for name in function.arg_names if name not in types}
    constants |= dict.fromkeys(job.variant.absent)
    signature = {
        name: "constexpr" if name in constants else types[name].replace("T", job.dtype) for name in function.arg_names
    }
    if job.target in NVIDIA:
        target = GPUTarget("cuda", int(job.target.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", job.target, 64)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs={})
    return triton.compile(source, target=target, options={"num_warps": num_warps, "enable_fp_fusion": True})


# ---- SASS


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
    def bytes(self) -> int:
        """How many a load or store moves for each thread."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((sizes[part] for part in self.opcode.split(".")[1:] if part in sizes), 4)


_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_DESTINATION = re.compile(r"\.L_x_\d+")
_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)
_EXCHANGES = ("SHFL", "BAR", "REDUX", "LDS", "STS", "LDSM", "ATOM", "ATOMS", "RED", "MEMBAR")
_LOCAL = ("LDL", "STL")


@dataclass(frozen=True)
class Loop:
    """The body of an innermost loop, along the path that moves the most bytes; of several, the shortest."""

    body: tuple[Instruction, ...]

    def count(self, *bases: str) -> int:
        return sum(i.base in bases for i in self.body)

    @property
    def exponentials(self) -> int:
        return sum(i.opcode.startswith("MUFU.EX2") for i in self.body)

    def moved(self, bases: Sequence[str]) -> list[int]:
        return [i.bytes for i in self.body if i.base in bases]

    @property
    def kind(self) -> str:
        """ "read", "write" and "scale" as in `Variant`; "zeros" only stores; or "other"."""
        if self.count(*_STORES):
            return "zeros" if not self.count(*_LOADS) else "write" if self.exponentials else "scale"
        return "read" if self.count(*_LOADS) and self.exponentials else "other"

    @property
    def guarded(self) -> bool:
        """Whether its loads have a mask: these are not whole blocks."""
        return any(i.guard for i in self.body if i.base in _LOADS)

    @property
    def histogram(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in Counter(i.base for i in self.body).most_common())


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
    ends: dict[int, int] = {}
    targets = {}
    for at, instruction in enumerate(instructions):
        if instruction.base == "BRA" and (match := _DESTINATION.search(instruction.operands)) and match[0] in labels:
            targets[at] = labels[match[0]]
            if targets[at] < at:
                ends[targets[at]] = at
    ranges = sorted(ends.items())
    innermost = [r for r in ranges if not any(r != q and r[0] <= q[0] and q[1] <= r[1] for q in ranges)]
    return [Loop(tuple(_main_path(instructions, targets, first, last))) for first, last in innermost]


def _main_path(instructions: list[Instruction], targets: dict[int, int], first: int, last: int) -> list[Instruction]:
    """From `first` to `last`: of all paths those that move the most bytes, of these the one with the fewest steps."""
    best: dict[int, tuple[int, int, int]] = {first: (0, 0, -1)}  # index -> (bytes, -steps before it, predecessor)
    for at in range(first, last):
        if at not in best:
            continue
        here = instructions[at]
        moves = here.bytes if here.base in (*_LOADS, *_STORES) else 0
        jump = targets.get(at)
        always = jump is not None and not here.guard and "P" not in here.operands.split("`")[0]
        for successor in ({jump} if always else {at + 1, jump}) - {None}:
            if successor is not None and at < successor <= last:
                best[successor] = max(best.get(successor, (-1, 0, -1)), (best[at][0] + moves, best[at][1] - 1, at))
    path, at = [], last
    while at >= 0:
        path.append(instructions[at])
        at = best[at][2]
    return path[::-1]


# ---- figures


@dataclass(frozen=True)
class Hot:
    """A hot loop, for each column: `elements` of them a thread and iteration."""

    instructions: float
    mufu: float
    elements: int


@dataclass(frozen=True)
class Figures:
    """What is known of a compiled kernel; `problems` is for a reader, and not kept."""

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


def hot_loop(
    loops: Iterable[Loop], kind: str, dtype: str, per_thread: int, read_bytes: int | None = None
) -> tuple[Hot | None, list[str]]:
    """The loop over whole blocks: of this kind, without a mask; the shortest of several. And what is wrong with it.

    `read_bytes`: of a number that is read, where that is of another dtype.
    """
    item = ITEM_BYTES[dtype]
    read = item if read_bytes is None else read_bytes

    def columns(loop: Loop) -> int:
        if kind == "scale":
            return sum(loop.moved(_STORES)) // item
        return loop.exponentials // per_thread * per_thread  # a lane's running maximum costs one more

    def fits(loop: Loop) -> bool:
        if kind == "scale":
            return loop.kind == "scale"
        same = loop.kind == ("write" if kind == "write" else "read") and not loop.guarded and columns(loop) > 0
        return same and sum(loop.moved(_LOADS)) == columns(loop) * read * (2 if kind == "shifted" else 1)

    found = [loop for loop in loops if fits(loop)]
    if not found:
        return None, [f"no {kind} loop over whole blocks"]
    loop = min(found, key=lambda loop: len(loop.body) / columns(loop))
    n = columns(loop)
    problems = []
    narrow = [str(i) for i in loop.body if i.base in (*_LOADS, *_STORES) and i.bytes < ACCESS]
    if narrow:
        problems.append(f"{kind} loop: {len(narrow)} accesses of less than 16 bytes, such as {narrow[0]}")
    if exchanges := [i.base for i in loop.body if i.base in _EXCHANGES]:
        problems.append(f"{kind} loop: lanes exchange data, {Counter(exchanges).most_common()}")
    if kind != "scale" and not loop.count("FFMA", "FFMA2"):
        problems.append(f"{kind} loop: no fused multiply-add")
    hot = Hot(round(len(loop.body) / n, 3), round(loop.count("MUFU") / n, 4), n)
    if hot.instructions > budget(kind, dtype):
        over = f"{hot.instructions} instructions a column > {budget(kind, dtype):g}"
        problems.append(f"{kind} loop: {over} ({loop.histogram})")
    return hot, problems


def read_sass(
    listing: str, ptx: str, kinds: Sequence[str], dtype: str, per_thread: int, read_bytes: int | None = None
) -> tuple[dict[str, Hot], list[str]]:
    """The hot loops, and what no kernel may have."""
    loops, problems, hot = find_loops(listing), [], {}
    for kind in kinds:
        found, wrong = hot_loop(loops, kind, dtype, per_thread, read_bytes)
        problems += wrong
        if found is not None:
            hot[kind] = found
    local = sum(i.base in _LOCAL for i in parse(listing)[0])
    if local:
        problems.append(f"{local} accesses to local memory: spills")
    if ".f64" in ptx:
        problems.append(f"float64 in the PTX: {next(line.strip() for line in ptx.splitlines() if '.f64' in line)}")
    if set(kinds) & set(BUDGETS) and "fma.rn" not in ptx:
        problems.append("no fma in the PTX: is fusion on?")
    return hot, problems


def measure(job: Job, num_warps: int | None = None, elements: int | None = None) -> Figures:
    """Compiles and reads."""
    kernel = compile_kernel(job, num_warps, elements)
    if job.target in AMD:
        return _read_amd(kernel.asm["amdgcn"], kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = _tool("nvdisasm", "-c", file.name)
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
    _, constants = launch(job, num_warps, elements)
    per_thread = constants.get("REPEAT", 1) * constants.get("WIDTH", 1)
    read_bytes = ITEM_BYTES["fp32"] if job.variant.types.get("logits") == "*fp32" else None
    hot, problems = read_sass(listing, kernel.asm["ptx"], job.variant.loops, job.dtype, per_thread, read_bytes)
    if int(usage["STACK"]) or int(usage["LOCAL"]):
        problems.append(f"{usage['STACK']} bytes of stack, {usage['LOCAL']} of local memory")
    return Figures(int(usage["REG"]), kernel.metadata.shared, hot, None, tuple(problems))


def _read_amd(assembly: str, shared: int) -> Figures:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    problems = []
    if number("vgpr_spill_count") or number("private_segment_fixed_size"):  # scalar registers spill to vector registers
        problems.append(f"{number('vgpr_spill_count')} spills, {number('private_segment_fixed_size')} bytes of scratch")
    wide = len(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", assembly))
    return Figures(number("vgpr_count"), shared, {}, wide, tuple(problems))


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


# ---- the gate


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


def judge(measured: dict[str, Figures], committed: dict[str, Figures] | None) -> list[str]:
    """Complaints, one a line; `committed` is None where its figures come from another Triton."""
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


def load(path: Path = RESULTS) -> tuple[str, dict[str, Figures]]:
    """The Triton version of the committed figures, and these by name."""
    kept = json.loads(path.read_text())
    return kept["triton"], {name: Figures.from_json(figures) for name, figures in kept["figures"].items()}


def save(version: str, measured: dict[str, Figures], path: Path = RESULTS) -> None:
    """One line a kernel, in the order of `VARIANTS`."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(f.to_json())}" for name, f in measured.items())
    path.write_text(f'{{\n "triton": {json.dumps(version)},\n "figures": {{\n{lines}\n }}\n}}\n')


def show(name: str, figures: Figures) -> str:
    hot = "; ".join(
        f"{kind} {hot.instructions:.2f} instructions, {hot.mufu:.3f} MUFU" for kind, hot in figures.loops.items()
    )
    return f"{name:52} {figures.registers:4} registers {figures.shared:6} B shared  {hot}".rstrip()


README_ROWS = {  # a row's words: (kernel and variant, its loop)
    "statistics of a row: log-probability, entropy, logsumexp": ("forward, plain", "read"),
    "the same, of a row that starts off a 16-byte boundary": ("forward, plain", "shifted"),
    "gradient of a loss": ("backward, loss", "write"),
    "gradient of a loss from hidden states, out of float32 logits": ("backward, linear", "write"),
    "gradient with an entropy bonus": ("backward, everything", "write"),
    "on-policy, one launch: statistics": ("forward_backward, plain", "read"),
    "on-policy, one launch: gradient": ("forward_backward, plain", "write"),
}


def markdown() -> str:
    """The README's table: instructions a column of bf16 logits, registers a thread."""
    version, figures = load()
    lines = [f"| bf16, Triton {version} | " + " | ".join(NVIDIA) + " | budget |", "|---|" + "--:|" * (len(NVIDIA) + 1)]
    for words, (variant, kind) in README_ROWS.items():
        of_targets = [figures[f"{variant}, bf16, {target}"] for target in NVIDIA]
        cells = [f"{each.loops[kind].instructions:.1f} ({each.registers})" for each in of_targets]
        most = f"{BUDGETS[kind]:g}" if kind in BUDGETS else ""
        lines.append(f"| {words} | " + " | ".join(cells) + f" | {most} |")
    return "\n".join(lines)


def _measure_or_say_why(job: Job) -> Figures:
    try:
        return measure(job)
    except Exception as error:
        return Figures(0, 0, problems=(f"does not compile: {type(error).__name__}: {error}",))


@cache
def _prepare() -> str:
    """An environment in which Triton compiles what a user's Triton would; returns its version."""
    for name in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_DEFAULT_FP_FUSION"):
        os.environ.pop(name, None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(REPOSITORY / "build" / "triton"))
    import triton

    return str(triton.__version__).split("+")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_gate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} unless a budget is exceeded")
    parser.add_argument("--only", default="", metavar="WORD", help="variants whose name has this word")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the README's table and end")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(markdown())
        return 0
    if options.write and options.only:
        parser.error("--write writes all figures: leave out --only")
    chosen = jobs(options.only)
    if not chosen:
        parser.error(f"--only: no variant's name has {options.only!r}")

    version = _prepare()
    measured = {}
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(options.processes, mp_context=spawn, initializer=_prepare) as pool:
        for job, figures in zip(chosen, pool.map(_measure_or_say_why, chosen), strict=True):
            measured[job.name] = figures
            print(show(job.name, figures), flush=True)

    committed: dict[str, Figures] | None = None
    if not options.write and not RESULTS.exists():
        committed = {}
    elif not options.write:
        of_version, figures_of_version = load()
        committed = figures_of_version if of_version == version else None
        if committed is None:
            print(
                f"\nTriton is {version}, {RESULTS.name} has the figures of {of_version}: only the budgets are checked."
            )
    complaints = judge(measured, committed)
    print("", *complaints, f"{len(measured)} kernels, {len(complaints)} complaints, Triton {version}", sep="\n")
    if options.write and not complaints:
        save(version, measured)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
