"""The Triton kernels, compiled for GPUs of NVIDIA and AMD in every way they are called, and figures of their code.

No kernel may have float64 in its PTX or spills to local memory, except for `SPILLS`.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .static_sass import (
    EXCHANGES,
    ITEM_BYTES,
    NVIDIA,
    Figures,
    Hot,
    Loop,
    disassemble,
    read_loops,
    resources,
    spills,
)  # fmt: skip

AMD = ("gfx942",)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CACHE = Path(__file__).resolve().parents[1] / "build" / "triton"

# Instructions a column, by what a hot loop does: "read" sums up a row, "write" writes a gradient. No budget have
# "shifted", which sums up a row that does not start on a 16-byte boundary, and "scale".
BUDGETS = {"read": 8.0, "write": 7.0}
# fp16 has no number low enough to stand for -inf at any temperature: one more instruction keeps 0 times -inf away.
BUDGETS_FP16 = {"read": 8.6, "write": 7.3}
# With the tanh of a softcap, which takes two instructions more where no instruction bounds two logits at once.
BUDGETS_CAPPED = {"read": 30.0, "write": 33.0}

# Spills outside of all loops happen once a row, which moves 600 KB, once a sequence or once a batch: they cost no time.
# On sm_100 a kernel that keeps blocks of a row in registers has them. Accesses a thread, bytes of its stack.
SPILLS = {
    "forward": (2, 8), "forward, capped": (5, 8), "forward_backward": (48, 128), "sequence": (6, 16),
    "kept_forward_backward": (2, 8), "batch, terms of GRPO": (10, 24), "batch, terms of CISPO": (4, 8),
}  # fmt: skip

TABLE = {  # a row's words: (kernel and variant, its loop)
    "statistics of a row: log-probability, entropy, logsumexp": ("forward, plain", "read"),
    "the same, of a row that starts off a 16-byte boundary": ("forward, plain", "shifted"),
    "gradient of a loss": ("backward, loss", "write"),
    "gradient of a loss from hidden states, out of float32 logits": ("backward, linear", "write"),
    "gradient with an entropy bonus": ("backward, everything", "write"),
    "on-policy, one launch: statistics": ("forward_backward, plain", "read"),
    "on-policy, one launch: gradient": ("forward_backward, plain", "write"),
    "with a softcap: statistics of a row": ("forward, capped", "read"),
    "with a softcap: gradient of a loss": ("backward, capped", "write"),
    "with a softcap, on-policy, one launch: statistics": ("forward_backward, capped", "read"),
    "with a softcap, on-policy, one launch: gradient": ("forward_backward, capped", "write"),
}


def budget(kind: str, dtype: str, capped: bool = False) -> float:
    return (BUDGETS_CAPPED if capped else BUDGETS_FP16 if dtype == "fp16" else BUDGETS).get(kind, math.inf)


@cache
def prepare() -> str:
    """Sets the environment so that Triton compiles as it does for a user; returns its version."""
    for name in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_DEFAULT_FP_FUSION"):
        os.environ.pop(name, None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    import triton

    return str(triton.__version__).split("+")[0]


# ---- what is compiled

# Types of the arguments as the launcher passes them; *T has the dtype of the logits. Nothing is specialised on the
# values of integers or the alignment of addresses. An argument that is missing here is a constant.
ROW_TYPES = {
    "logits": "*T", "outer_stride": "i64", "inner_stride": "i64", "inner": "i32", "vocab": "i32", "token_ids": "*i64",
    "mask": "*u8", "temperature": "*fp32", "row_indices": "*i64", "scale": "fp32", "scale_error": "fp32",
    "tanh_hi": "fp32", "tanh_lo": "fp32", "logprobs": "*fp32", "entropies": "*fp32", "lses": "*i64",
    "g_logprobs": "*fp32", "g_entropies": "*fp32",
    "g_lses": "*fp32", "factor": "*fp32", "counts": "*fp32", "counts_size": "i32", "gradient": "*T",
    "gradient_outer_stride": "i64", "gradient_inner_stride": "i64", "rows": "i32", "values": "*T", "loss": "*fp32",
    "numbers": "*fp32", "cu_seqlens": "*i32", "sequences": "i32", "kept_ids": "*i32", "kept_offsets": "*i64",
    "entries": "i64", "by_entry": "*T",
}  # fmt: skip
TOKEN_TYPES = {
    "logprobs": "*fp32", "old_logprobs": "*fp32", "ref_logprobs": "*fp32", "rollout_logprobs": "*fp32",
    "entropies": "*fp32", "advantages": "*fp32", "weights": "*fp32", "mask": "*u8", "cu_seqlens": "*i32",
    "group_tokens": "*fp32", "global_count": "*fp32", "tokens": "i32", "length": "i32",
    "sequences": "i32", "advantage_per_token": "i32", "weight_per_token": "i32", "p0": "fp32", "p1": "fp32",
    "p2": "fp32", "p3": "fp32", "max_log_ratio": "fp32", "beta": "fp32", "entropy_coef": "fp32", "normalizer": "fp32",
    "g_logprobs": "*fp32", "g_entropies": "*fp32", "token_advantages": "*fp32", "token_weights": "*fp32",
    "log_ratios": "*fp32", "clipped": "*i16", "partials": "*fp32", "loss": "*fp32", "scalars": "*fp32",
}  # fmt: skip

SPARSE_TYPES = {
    "hidden": "*T", "hidden_stride": "i64", "hidden_rows": "i64", "weight": "*T", "weight_stride": "i64",
    "weight_rows": "i64", "ids": "*i32", "offsets": "*i64", "rows": "*i64", "active": "*u8", "entries": "i64",
    "gradient": "*fp32", "order": "*i64", "destination": "*i64", "out": "*T", "out_stride": "i64", "out_rows": "i64",
    "depth": "i32",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way a kernel is called: which optional arguments are absent, which types differ from the usual ones."""

    kernel: str
    name: str
    absent: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    types: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    loops: tuple[str, ...] = ()  # the hot loops it must have
    objective: str = ""  # whose term is compiled in
    capped: bool = False  # whether logits have a softcap
    kept: bool = False  # whether there are rows that keep some columns alone


_CAP = ("tanh_hi", "tanh_lo")
_ROWS, _BF16 = ("mask", "temperature"), ("bf16",)
_PLACED, _GRADIENTS = (*_ROWS, "row_indices"), ("g_entropies", "g_lses", "factor")
_FP32 = {"logits": "*fp32"}  # out of a product, with a gradient in the dtype of its operands
_TOKENS = {"AGGREGATION": "sequence_mean", "ESTIMATOR": "k3", "KL_WEIGHTING": "none"}
_KEPT = ("token_advantages", "token_weights")
_OPTIONAL = (
    "old_logprobs", "ref_logprobs", "rollout_logprobs", "weights", "mask", "cu_seqlens", "group_tokens", "global_count",
    "g_entropies",
)  # fmt: skip
_UNKNOWN = ("logprobs", "entropies")
_TERMS = ("old_logprobs", "rollout_logprobs", *_KEPT, "log_ratios", "clipped")
_EVERYTHING = {"AGGREGATION": "group_mean", "KL_WEIGHTING": "ratio"}
_SUMS, _OPERANDS = {"out": "*fp32"}, {"hidden": "*fp32", "weight": "*fp32"}
_WIDE, _NARROW = {"ALIGNED": True}, {"ALIGNED": False}
OBJECTIVES = ("GSPO", "GSPOToken", "PPO", "GMPO", "SAPO", "CISPO", "TOPR", "DPPO", "DRO")  # every term and ratio
VARIANTS = (
    Variant("forward", "plain", _ROWS, loops=("read", "shifted")),
    Variant("forward", "masked", (), loops=("read", "shifted")),
    Variant("backward", "plain", (*_PLACED, "g_entropies", "g_lses", "factor", "counts"), loops=("write",)),
    Variant("backward", "entropy", (*_PLACED, "g_lses", "factor", "counts"), loops=("write",)),
    Variant("backward", "loss", (*_PLACED, "g_entropies", "g_lses"), loops=("write",)),
    Variant("backward", "everything", ("row_indices",), _BF16, loops=("write",)),
    Variant("backward", "linear", (*_ROWS, *_GRADIENTS), ("bf16", "fp16"), _FP32, loops=("write",)),
    Variant("forward_backward", "plain", _ROWS, loops=("read", "shifted", "write")),
    Variant("forward_backward", "masked", (), _BF16, loops=("read", "shifted", "write")),
    Variant("forward", "capped", _ROWS, loops=("read", "shifted"), capped=True),
    Variant("backward", "capped", (*_PLACED, "g_entropies", "g_lses"), loops=("write",), capped=True),
    Variant("backward", "capped everything", ("row_indices",), _BF16, loops=("write",), capped=True),
    Variant("backward", "capped linear", (*_ROWS, *_GRADIENTS), _BF16, _FP32, loops=("write",), capped=True),
    Variant("forward_backward", "capped", _ROWS, loops=("read", "shifted", "write"), capped=True),
    Variant("forward", "beside kept", _ROWS, _BF16, loops=("read", "shifted"), kept=True),
    Variant("backward", "beside kept", (*_PLACED, "g_entropies", "g_lses"), _BF16, loops=("write",), kept=True),
    Variant("forward_backward", "beside kept", _ROWS, _BF16, loops=("read", "shifted", "write"), kept=True),
    Variant("kept_forward", "plain", _ROWS, constants={"FORM": "every"}, kept=True),
    Variant("kept_forward", "gathered", ("temperature",), ("fp32",), constants={"FORM": "gathered"}, kept=True),
    Variant("kept_forward", "capped", (), _BF16, constants={"FORM": "some"}, capped=True, kept=True),
    Variant("kept_backward", "loss", (*_ROWS, "g_entropies", "g_lses"), constants={"FORM": "every"}, kept=True),
    Variant("kept_backward", "gathered", ("temperature",), ("fp32",), constants={"FORM": "gathered"}, kept=True),
    Variant("kept_backward", "capped", (), _BF16, constants={"FORM": "some"}, capped=True, kept=True),
    Variant("kept_forward_backward", "plain", _ROWS, constants={"FORM": "every"}, kept=True),
    Variant("kept_forward_backward", "gathered", _ROWS, ("fp32",), constants={"FORM": "gathered"}, kept=True),
    Variant("kept_forward_backward", "capped", (), _BF16, constants={"FORM": "some"}, capped=True, kept=True),
    Variant("kept_logits", "plain", ("active",), types=_SUMS, constants={**_WIDE, "ADD": False}),
    Variant("kept_logits", "any address", (), _BF16, _SUMS, {**_NARROW, "ADD": True}),
    Variant("kept_logits", "autocast", (), _BF16, {**_SUMS, **_OPERANDS}, {**_WIDE, "ADD": False}),
    Variant("hidden_gradient", "plain", ("active",), constants=_WIDE),
    Variant("hidden_gradient", "any address", (), _BF16, _SUMS, _NARROW),
    Variant("weight_gradient", "plain", ("active",), constants=_WIDE),
    Variant("weight_gradient", "any address", (), _BF16, _SUMS, _NARROW),
    Variant("scale", "plain", (), constants={"WHOLE": True}, loops=("scale",)),
    Variant("sequence", "GSPO", (*_OPTIONAL[1:], *_KEPT), ("fp32",), objective="GSPO"),
    Variant("sequence", "GSPO on-policy", (*_UNKNOWN, *_OPTIONAL, *_KEPT), ("fp32",), objective="GSPO"),
    *(Variant("sequence", f"{name} everything", _KEPT, ("fp32",), constants=_EVERYTHING, objective=name)
      for name in OBJECTIVES),
    Variant("sequence", "GRPO before the rows", (*_UNKNOWN, *_OPTIONAL), ("fp32",), objective="GRPO"),
    Variant("sequence", "DPPO before the rows", (*_UNKNOWN, *_OPTIONAL), ("fp32",), objective="DPPO"),
    Variant("batch", "off-policy", ("logprobs", "ref_logprobs", "entropies", "mask", *_TERMS), ("fp32",)),
    Variant("batch", "on-policy", _TERMS, ("fp32",)),
    *(Variant("batch", f"terms of {name}", (), ("fp32",), objective=name) for name in ("GRPO", "CISPO", "DPPO")),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    variant: Variant
    dtype: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.variant.kernel}, {self.variant.name}, {self.dtype}, {self.target}"

    @property
    def in_sample(self) -> bool:
        """All kernels for sm_90, in fp16 the plain ones; for other GPUs in one dtype alone, without a hot loop for AMD.

        Every kernel is so compiled in bf16 and fp32, every uncapped hot loop for each GPU, and for AMD everything but
        capped gradients and the terms of most objectives.
        """
        variant = self.variant
        if self.target == "sm_90":
            return self.dtype != "fp16" or variant.name == "plain"
        beside_kept = variant.kept and (variant.loops or variant.capped)  # as without
        few = variant.objective in ("", "GSPO", "DPPO") and (not variant.capped or variant.kernel == "forward")
        elsewhere = few if self.target in AMD else bool(variant.loops) and not variant.capped
        return elsewhere and not beside_kept and self.dtype == variant.dtypes[0]


def jobs(only: str = "", sample: bool = False) -> list[Job]:
    every = [Job(v, dtype, target) for v in VARIANTS for dtype in v.dtypes for target in (*NVIDIA, *AMD)]
    return [job for job in every if only in job.name and (job.in_sample or not sample)]


def launch(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compiler's options and the constants that a kernel is launched with."""
    import gspo_kernels
    from gspo_kernels.linear import triton_sparse
    from gspo_kernels.losses import triton_stage
    from gspo_kernels.rows import triton_rows

    kernel, nvidia = job.variant.kernel, job.target in NVIDIA
    if kernel in triton_stage.LAUNCH:
        of_stage = triton_stage.LAUNCH[kernel]
        options = {"num_warps": of_stage.num_warps, "enable_fp_fusion": True}
        constants = {"BLOCK": of_stage.elements, "TERM": None, **_TOKENS, **job.variant.constants}
        objective = getattr(gspo_kernels, job.variant.objective)() if job.variant.objective else None
        if objective is not None:
            constants |= triton_stage.functions_of(objective)
        at_once = triton_stage.tokens_at_once(objective, of_stage.elements)
        return options, {**constants, "TOKENS_AT_ONCE": at_once}
    if kernel in triton_sparse.LAUNCH:
        of_products = triton_sparse.LAUNCH[kernel]
        operand = job.variant.types.get("weight", f"*{job.dtype}").removeprefix("*")
        width = 16 // ITEM_BYTES[operand]
        sizes = triton_sparse.sizes(of_products, width, DTYPES[job.dtype], 32 if nvidia else 64)
        return {"num_warps": of_products.num_warps, "enable_fp_fusion": True}, {**sizes, **job.variant.constants}
    layout = triton_rows.LAUNCH[kernel]
    if job.variant.capped:
        layout = triton_rows.for_cap(layout)
    layout = triton_rows.for_form(layout, job.variant.constants.get("FORM"))
    element_size = ITEM_BYTES[job.dtype]
    sizes = triton_rows.sizes(kernel, layout, element_size, 32 if nvidia else 64)
    return triton_rows.compiler_options(layout, element_size, nvidia), {**sizes, "PTX": nvidia, **job.variant.constants}


def compile_kernel(job: Job) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gspo_kernels.linear import triton_sparse
    from gspo_kernels.losses import triton_stage_kernels
    from gspo_kernels.rows import triton_rows

    kernel = job.variant.kernel
    if kernel in triton_rows.LAUNCH:
        function, types = triton_rows.kernels()[kernel], ROW_TYPES
    elif kernel in triton_sparse.LAUNCH:
        function, types = triton_sparse.kernels()[kernel], SPARSE_TYPES
    else:
        function, types = getattr(triton_stage_kernels, f"{kernel}_kernel"), TOKEN_TYPES
    options, constants = launch(job)
    types = {**types, **job.variant.types}
    constants = {name: constants[name] for name in function.arg_names if name not in types}
    without = (*(() if job.variant.capped else _CAP), *(() if job.variant.kept else ("kept_offsets",)))
    absent = (*job.variant.absent, *without)
    constants |= dict.fromkeys(name for name in absent if name in function.arg_names)
    signature = {
        name: "constexpr" if name in constants else types[name].replace("T", job.dtype) for name in function.arg_names
    }
    if job.target in NVIDIA:
        target = GPUTarget("cuda", int(job.target.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", job.target, 64)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs={})
    return triton.compile(source, target=target, options=options)


# ---- figures

_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)


def kind_of(loop: Loop) -> str:
    """ "read", "write" and "scale" as in `Variant`; "zeros" only stores; or "other"."""
    if loop.count(*_STORES):
        return "zeros" if not loop.count(*_LOADS) else "write" if loop.exponentials else "scale"
    return "read" if loop.count(*_LOADS) and loop.exponentials else "other"


def read_sass(
    listing: str,
    ptx: str,
    kinds: Sequence[str],
    dtype: str,
    per_thread: int,
    read_bytes: int | None = None,
    allowed: int = 0,
    capped: bool = False,
) -> tuple[dict[str, Hot], list[str]]:
    """The hot loops over whole blocks, without a mask; and what is wrong with the kernel.

    `read_bytes`: the size of a number that is read, where its dtype is another one. `allowed`: accesses to local memory
    outside of loops.
    """
    item = ITEM_BYTES[dtype]
    read = item if read_bytes is None else read_bytes

    def columns(loop: Loop, kind: str) -> int:
        if kind_of(loop) != {"shifted": "read"}.get(kind, kind):
            return 0
        if kind == "scale":
            return loop.moved(_STORES) // item
        count = loop.exponentials // per_thread * per_thread  # a lane's running maximum costs one more
        fits = loop.moved(_LOADS) == count * read * (2 if kind == "shifted" else 1) and not loop.guarded
        return count if fits else 0

    # A lane keeps what it reads: shared memory is for exchanges.
    exchanges = (*EXCHANGES, "LDS", "STS")
    hot, problems = read_loops(listing, kinds, columns, lambda kind: budget(kind, dtype, capped), "blocks", exchanges)
    inside, outside = spills(listing)
    if inside or outside > allowed:
        problems.append(f"{inside + outside} accesses to local memory, {inside} of them in loops: spills")
    if ".f64" in ptx:
        problems.append(f"float64 in the PTX: {next(line.strip() for line in ptx.splitlines() if '.f64' in line)}")
    if set(kinds) & set(BUDGETS) and "fma.rn" not in ptx:
        problems.append("no fma in the PTX: is fusion on?")
    return hot, problems


def measure(job: Job) -> Figures:
    """Compiles and reads."""
    kernel = compile_kernel(job)
    if job.target in AMD:
        return _read_amd(kernel.asm["amdgcn"], kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = disassemble(Path(file.name))
        (usage,) = resources(Path(file.name)).values()
    _, constants = launch(job)
    per_thread = constants.get("REPEAT", 1) * constants.get("WIDTH", 1)
    read_bytes = ITEM_BYTES["fp32"] if job.variant.types.get("logits") == "*fp32" else None
    accesses, stack = SPILLS.get(f"{job.variant.kernel}, {job.variant.name}", SPILLS.get(job.variant.kernel, (0, 0)))
    hot, problems = read_sass(
        listing, kernel.asm["ptx"], job.variant.loops, job.dtype, per_thread, read_bytes, accesses, job.variant.capped
    )
    if usage["STACK"] > stack or usage["LOCAL"]:
        problems.append(f"{usage['STACK']} bytes of stack, {usage['LOCAL']} of local memory")
    return Figures(usage["REG"], kernel.metadata.shared, hot, None, tuple(problems))


def _read_amd(assembly: str, shared: int) -> Figures:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    problems = []
    if number("vgpr_spill_count") or number("private_segment_fixed_size"):  # scalar registers spill to vector registers
        problems.append(f"{number('vgpr_spill_count')} spills, {number('private_segment_fixed_size')} bytes of scratch")
    wide = len(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", assembly))
    return Figures(number("vgpr_count"), shared, {}, wide, tuple(problems))


def measure_or_say_why(job: Job) -> Figures:
    try:
        return measure(job)
    except Exception as error:
        return Figures(0, 0, problems=(f"does not compile: {type(error).__name__}: {error}",))
