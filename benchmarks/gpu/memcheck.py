"""Small calls of every kernel on rows that lie badly: what compute-sanitizer watches. Says nothing of the answers."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import gspo_kernels

VOCABS = (1, 7, 4_099)  # none, part, and more than a block; all odd, so that rows start at every address
SEQUENCES, TOKENS = 2, 3


def logits_of(layout: str, vocab: int, dtype: torch.dtype, device: str) -> Tensor:
    """A leaf that ends where its memory ends, or begins where it begins: a step too far leaves the allocation."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (SEQUENCES, TOKENS, vocab)
    if layout == "whole":
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    if layout == "unaligned":
        flat = torch.randn(SEQUENCES * TOKENS * vocab + 1, generator=generator, device=device).to(dtype)
        return flat[1:].view(shape).requires_grad_()
    longer = torch.randn(SEQUENCES, TOKENS + 1, vocab, generator=generator, device=device).to(dtype)
    return longer[:, :-1].requires_grad_()


def main(device: str) -> None:
    smoke = device == "cpu"
    calls = 0
    token_shape = (SEQUENCES, TOKENS)
    advantages = torch.tensor([1.0, -0.5], device=device)
    old = torch.full(token_shape, -2.0, device=device)
    mask = torch.tensor([[True, True, False], [True, True, True]], device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 1 if smoke else 3]:
        for vocab in VOCABS[1:2] if smoke else VOCABS:
            token_ids = torch.full(token_shape, vocab - 1, device=device)
            for layout in ("whole", "unaligned", "strided"):
                for overwrite in (False, True):
                    for loss in (gspo_kernels.gspo_loss, gspo_kernels.grpo_loss):
                        for old_logprobs, entropy_coef in ((old, 0.0), (None, 0.0), (old, 0.1)):
                            logits = logits_of(layout, vocab, dtype, device)
                            value = loss(
                                logits,
                                token_ids,
                                advantages,
                                old_logprobs,
                                mask=mask,
                                entropy_coef=entropy_coef,
                                overwrite_logits=overwrite,
                            ).loss
                            (value * 0.5).backward()  # a factor, so that the gradient known before is scaled
                            calls += 1
                logits = logits_of(layout, vocab, dtype, device).detach()
                gspo_kernels.token_logprobs(logits, token_ids, mask=mask)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} losses and their gradients ran")


if __name__ == "__main__":
    main("cpu" if "--smoke" in sys.argv else "cuda")
