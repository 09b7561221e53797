"""Small calls of every kernel on rows that lie badly: what compute-sanitizer watches. Says nothing of the answers.

With --cuda those in CUDA C++ alone, and of them those that share memory; with --smoke on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import gspo_kernels
from gspo_kernels.logprobs import cuda_rows

from .parts import ABSENT

Loss = Callable[..., gspo_kernels.LossOutput]
VOCABS = (1, 7, 4_099)  # none, part, and more than a block; all odd, so that rows start at every address
LAYOUTS = ("whole", "unaligned", "strided")
SEQUENCES, TOKENS = 2, 3
# A row in one block and in several of a cluster; more rows than clusters, so that one's memory serves the next.
CLUSTERS, CLUSTERED_TOKENS = (7, 50_001), 300
BEYOND, BEYOND_TOKENS = 600_001, 100  # in fp32 more than a cluster holds


def logits_of(layout: str, tokens: int, vocab: int, dtype: torch.dtype, device: str) -> Tensor:
    """A leaf that ends where its memory ends, or begins where it begins: a step too far leaves the allocation."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (SEQUENCES, tokens, vocab)
    if layout == "whole":
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    if layout == "unaligned":
        flat = torch.randn(SEQUENCES * tokens * vocab + 1, generator=generator, device=device).to(dtype)
        return flat[1:].view(shape).requires_grad_()
    longer = torch.randn(SEQUENCES, tokens + 1, vocab, generator=generator, device=device).to(dtype)
    return longer[:, :-1].requires_grad_()


def mask_of(logits: Tensor) -> Tensor:
    mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    mask[0, -1] = False
    return mask


def call(
    loss: Loss, logits: Tensor, on_policy: bool, entropy_coef: float, overwrite: bool, backend: str | None
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
    """On a CPU: whatever runs there."""
    calls = 0
    backend = "triton" if device == "cuda" else None
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if device == "cuda" else 1]:
        for vocab in VOCABS if device == "cuda" else VOCABS[1:2]:
            for layout in LAYOUTS:
                for overwrite in (False, True):
                    for loss in (gspo_kernels.gspo_loss, gspo_kernels.grpo_loss):
                        for on_policy, entropy_coef in ((False, 0.0), (True, 0.0), (False, 0.1)):
                            logits = logits_of(layout, TOKENS, vocab, dtype, device)
                            call(loss, logits, on_policy, entropy_coef, overwrite, backend)
                            calls += 1
                logits = logits_of(layout, TOKENS, vocab, dtype, device).detach()
                token_ids = torch.full((SEQUENCES, TOKENS), vocab - 1, device=device)
                gspo_kernels.token_logprobs(logits, token_ids, mask=mask_of(logits), backend=backend)
    return calls


def in_cuda(device: str, sizes: list[tuple[int, int]]) -> int:
    """Where one pass does; `sizes`: tokens and columns."""
    calls = 0
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, vocab in sizes:
            for layout in LAYOUTS:
                for overwrite in (False, True):
                    for loss in (gspo_kernels.gspo_loss, gspo_kernels.grpo_loss, gspo_kernels.ppo_loss):
                        on_policy = loss is gspo_kernels.gspo_loss
                        call(loss, logits_of(layout, tokens, vocab, dtype, device), on_policy, 0.0, overwrite, "cuda")
                        calls += 1
    return calls


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
