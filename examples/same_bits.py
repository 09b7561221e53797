"""Trainer and engine with equal log-probabilities, to the bit: a policy that has not moved has ratio 1, and no other.

An inference engine scores tokens in batches of its own size. If both take log-probabilities from hidden states by this
package, a token's is the same number in both, whatever is computed along with it. Engines usually round logits to bf16;
then the ratio of an unchanged policy is off by more than GSPO's clip range.

    python examples/same_bits.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from gspo_kernels import linear_gspo_loss, linear_logits, linear_token_logprobs, token_logprobs

SEQUENCES, TOKENS, WIDTH, VOCAB = 16, 32, 256, 2_048


def trainer(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """The whole batch at once, padded by rows that hold no token."""
    shape = (SEQUENCES, TOKENS)
    hidden = torch.cat([hidden.reshape(*shape, WIDTH), hidden.new_zeros(SEQUENCES, 5, WIDTH)], 1)
    token_ids = torch.nn.functional.pad(token_ids.reshape(shape), (0, 5))
    mask = torch.ones(shape, dtype=torch.bool)
    mask = torch.nn.functional.pad(mask, (0, 5))
    return linear_token_logprobs(hidden, weight, token_ids, mask=mask).logprobs[mask]


def engine(hidden: Tensor, weight: Tensor, token_ids: Tensor, batch: int) -> Tensor:
    """A few tokens at a time, in small chunks of logits."""
    parts = zip(hidden.split(batch), token_ids.split(batch), strict=True)
    options = {"chunk_bytes": 100 * VOCAB * 4}
    return torch.cat([linear_token_logprobs(part, weight, ids, **options).logprobs for part, ids in parts])


def ratios_off_one(hidden: Tensor, weight: Tensor, token_ids: Tensor, old_logprobs: Tensor) -> tuple[float, float]:
    """How far ratios are from 1 at most, and the share of sequences that GSPO clips, of a policy that has not moved."""
    advantages = torch.where(torch.arange(SEQUENCES) % 2 == 0, 1.0, -1.0)
    boundaries = torch.arange(SEQUENCES + 1) * TOKENS
    stats = linear_gspo_loss(hidden, weight, token_ids, advantages, old_logprobs, cu_seqlens=boundaries).stats
    return max(float(stats.ratio_max) - 1.0, 1.0 - float(stats.ratio_min)), float(stats.clip_fraction)


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQUENCES * TOKENS, WIDTH, generator=generator).bfloat16()
    weight = (torch.randn(VOCAB, WIDTH, generator=generator) * 2.5 / WIDTH**0.5).bfloat16()
    probabilities = (hidden.float() @ weight.float().T).softmax(-1)
    token_ids = torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    operands = (hidden, weight)
    rows = (
        ("linear_token_logprobs, 3 tokens at a time", engine(*operands, token_ids, 3)),
        ("linear_token_logprobs, 37 at a time", engine(*operands, token_ids, 37)),
        ("token_logprobs of linear_logits", token_logprobs(linear_logits(*operands), token_ids).logprobs),
        ("token_logprobs of bf16 logits", token_logprobs(hidden @ weight.T, token_ids).logprobs),
    )
    print(f"{'old log-probabilities from':42} differ, at most by  ratios off 1 by  clipped")
    for name, old in rows:
        difference = (old - trainer(*operands, token_ids)).abs()
        off, clipped = ratios_off_one(*operands, token_ids, old)
        differ = int((difference != 0).sum())
        print(f"{name:42} {differ:6}, {float(difference.max()):10.1e}  {off:15.1e}  {clipped:7.0%}")


if __name__ == "__main__":
    main()
