"""compute-sanitizer, where it is installed, over small calls of every kernel on badly aligned rows.

memcheck watches every kernel; racecheck those in CUDA C++, whose blocks read each other's memory. The sanitizer slows
kernels by ten to fifty times and Triton compiles each kernel for a dtype. So there is one call for each path through
each kernel and each kind of address, not one for every combination.

    python -m benchmarks.gpu_sanitizer [--cuda] [--smoke]    the calls: all, of CUDA C++ alone, on a CPU
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gspo_kernels
from gspo_kernels.rows import cuda_rows

from .gpu_parts import ABSENT, REPOSITORY, Absent, Context

_FOUND = 99


def run(context: Context) -> bool:
    """Argument: memcheck or racecheck."""
    (check,) = context.arguments
    script = [sys.executable, "-m", "benchmarks.gpu_sanitizer", *(["--cuda"] if check == "racecheck" else [])]
    if context.smoke:
        return subprocess.run([*script, "--smoke"], cwd=REPOSITORY).returncode in (0, ABSENT)
    tool = _tool()
    if tool is None:
        raise Absent("compute-sanitizer is neither on PATH nor under CUDA_HOME")
    command = [tool, "--tool", check, "--error-exitcode", str(_FOUND), "--print-limit", "20", *script]
    # Each tensor in an allocation of its own: an access beyond it must not land in another tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=context.left() - 5).returncode
    except subprocess.TimeoutExpired:
        context.put("sanitizer", check, value={"tool": tool, "outcome": "not finished in its time"})
        return False
    if code == ABSENT:
        raise Absent(f"{check}: no CUDA C++ kernels run here")
    outcome = {0: "no errors", _FOUND: "errors: see the log"}.get(code, f"exit code {code}")
    context.put("sanitizer", check, value={"tool": tool, "outcome": outcome})
    context.say(f"{check}: {outcome}")
    return code == 0


def _tool() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    homes = [home for home in (CUDA_HOME, os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    places = ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer")
    found = [str(path) for home in homes for place in places if (path := Path(home) / place).exists()]
    return shutil.which("compute-sanitizer") or next(iter(found), None)


# ---- the calls that it watches; their answers are not checked

Loss = Callable[..., gspo_kernels.LossOutput]
VOCABS = (7, 4_099)  # a part of a block, and more than one; odd, so that rows start at every address
LAYOUTS = ("whole", "unaligned", "strided")
SEQUENCES, TOKENS = 2, 3
DTYPES = (torch.bfloat16, torch.float32)
# The loss, whether on-policy, the coefficient of an entropy bonus, whether the gradient is over the logits.
TRITON_CALLS: tuple[tuple[Loss, bool, float, bool], ...] = (
    (gspo_kernels.gspo_loss, False, 0.0, True),
    (gspo_kernels.gspo_loss, True, 0.0, False),
    (gspo_kernels.grpo_loss, False, 0.1, False),
)
CUDA_CALLS: tuple[tuple[Loss, bool, float, bool], ...] = (
    (gspo_kernels.gspo_loss, True, 0.0, True),
    (gspo_kernels.grpo_loss, False, 0.0, False),
)
# A row in one block and in several of a cluster; more rows than clusters, so that one's memory serves the next.
CLUSTERS, CLUSTERED_TOKENS = (7, 50_001), 300
BEYOND, BEYOND_TOKENS = 600_001, 40  # in fp32 more than a cluster holds
_GROUP = 16  # bytes that the kernels read at once


def logits_of(layout: str, tokens: int, vocab: int, dtype: torch.dtype, device: str) -> Tensor:
    """A leaf that ends where its allocation ends ("whole"), or begins one element into its allocation ("unaligned").

    Allocations are rounded up to 16 bytes: the kernels read whole groups of 16, up to 12 bytes beyond the last column.
    A GPU's allocations are at least as large, but the sanitizer checks single bytes.
    """
    generator = torch.Generator(device).manual_seed(0)
    begin = 1 if layout == "unaligned" else 0
    shape = SEQUENCES, tokens + (layout == "strided"), vocab
    count, group = SEQUENCES * shape[1] * vocab, _GROUP // dtype.itemsize
    memory = torch.empty(-(-(begin + count) // group) * group, dtype=dtype, device=device)
    memory.normal_(generator=generator)
    logits = memory[begin : begin + count].view(shape)
    return (logits[:, :-1] if layout == "strided" else logits).detach().requires_grad_()


def mask_of(logits: Tensor) -> Tensor:
    mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    mask[0, -1] = False
    return mask


def call(
    loss: Loss, on_policy: bool, entropy_coef: float, overwrite: bool, logits: Tensor, backend: str | None
) -> None:
    shape, device = logits.shape[:2], logits.device
    value = loss(
        logits,
        torch.full(shape, logits.shape[2] - 1, device=device),
        torch.tensor([1.0, -0.5], device=device),  # with ratios far below 1 the second is clipped
        None if on_policy else torch.full(shape, -2.0, device=device),
        mask=mask_of(logits),
        entropy_coef=entropy_coef,
        overwrite_logits=overwrite,
        backend=backend,
    ).loss
    (value * 0.5).backward()  # a factor, so that the gradient known before is scaled


def in_triton(device: str) -> int:
    """Returns the number of calls. On a CPU it uses the default backend."""
    vocabs, backend = (VOCABS, "triton") if device == "cuda" else (VOCABS[:1], None)
    every = [*itertools.product(DTYPES, vocabs, LAYOUTS, TRITON_CALLS)]
    for dtype, vocab, layout, each in every:
        call(*each, logits_of(layout, TOKENS, vocab, dtype, device), backend)
    return len(every)


def in_cuda(device: str, sizes: list[tuple[int, int]]) -> int:
    """Losses of one read; `sizes`: tokens and columns. Large rows once for each dtype, small ones in every layout."""
    every = [
        (dtype, tokens, vocab, layout, each)
        for dtype, (tokens, vocab) in itertools.product(DTYPES, sizes)
        for layout, each in itertools.product(LAYOUTS if vocab == min(CLUSTERS) else LAYOUTS[1:2], CUDA_CALLS)
    ]
    for dtype, tokens, vocab, layout, each in every:
        call(*each, logits_of(layout, tokens, vocab, dtype, device), "cuda")
    return len(every)


def main(device: str, only_cuda: bool) -> int:
    reasons = cuda_rows.unsupported_reasons(torch.zeros(1, 1, 8, device=device))
    sizes = [(CLUSTERED_TOKENS, vocab) for vocab in CLUSTERS]
    if only_cuda and reasons:
        print(f"no CUDA C++: {'; '.join(reasons)}")
        return ABSENT
    if not only_cuda:
        print(f"{in_triton(device)} losses and their gradients ran", flush=True)
        sizes.append((BEYOND_TOKENS, BEYOND))
    print(f"no CUDA C++: {'; '.join(reasons)}" if reasons else f"{in_cuda(device, sizes)} in CUDA C++", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main("cpu" if "--smoke" in sys.argv else "cuda", "--cuda" in sys.argv))
