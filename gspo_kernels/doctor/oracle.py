"""The doctor's own mathematics, in float64 torch: log_softmax, autograd, and the formulas of two papers.

It shares no line with the package: a mistake there cannot be one here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Loss = Literal["gspo", "grpo"]
CLIP_RANGES: dict[Loss, tuple[float, float]] = {"gspo": (3e-4, 4e-4), "grpo": (0.2, 0.27)}


@dataclass(frozen=True)
class Sizes:
    """Vocabularies are odd: rows begin at any address, and no block of a kernel ends with one."""

    vocab: int
    sequences: int = 3
    tokens: int = 4
    width: int = 64  # of hidden states,
    head_vocab: int = 2_003  # and of their head


class Batch(NamedTuple):
    token_ids: Tensor  # [sequences, tokens]
    mask: Tensor
    advantages: Tensor  # [sequences]
    old_logprobs: Tensor | None  # None: on-policy


class Expected(NamedTuple):
    """Of a batch, float64; masked rows are 0."""

    loss: Tensor
    loss_size: float  # what its rounding errors are relative to: the sum of the absolute values of its terms
    logprobs: Tensor  # [sequences, tokens]
    entropy: Tensor
    gradient: Tensor  # of the logits, [sequences, tokens, vocab]
    gradient_size: Tensor  # what its rounding errors are relative to, column by column


def inputs(sizes: Sizes, vocab: int) -> Batch:
    """Ragged responses, one of which begins with a masked prompt; `old_logprobs` are to be chosen."""
    made = torch.Generator().manual_seed(20_250_725)
    shape = sizes.sequences, sizes.tokens
    mask = torch.ones(shape, dtype=torch.bool)
    mask[1, -1] = False
    mask[2, 0] = False
    advantages = torch.tensor([1.0, 0.5, -1.5])[: sizes.sequences]
    return Batch(torch.randint(vocab, shape, generator=made), mask, advantages, None)


def peaked_logits(sizes: Sizes, batch: Batch) -> Tensor:
    """A few tokens of each row are likely, and one row is sure of its token: 1 - p is about 1e-6.

    Surer, and float64's log_softmax itself would have too few digits of log p.
    """
    made = torch.Generator().manual_seed(7)
    logits = 2.0 * torch.randn(sizes.sequences, sizes.tokens, sizes.vocab, generator=made)
    likely = torch.randint(sizes.vocab, (sizes.sequences, sizes.tokens, 4), generator=made)
    logits.scatter_add_(-1, likely, torch.full(likely.shape, 6.0))
    logits[0, 1, batch.token_ids[0, 1]] = 24.0
    return logits


def hidden_and_head(sizes: Sizes) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(11)
    hidden = torch.randn(sizes.sequences, sizes.tokens, sizes.width, generator=made)
    return hidden, 0.5 * torch.randn(sizes.head_vocab, sizes.width, generator=made)


def off_policy(batch: Batch, logits: Tensor) -> Batch:
    """With log-probabilities of an older policy: GSPO clips the second response, and GRPO some tokens of each."""
    made = torch.Generator().manual_seed(13)
    logprobs = logits.double().log_softmax(-1).gather(-1, batch.token_ids[..., None])[..., 0]
    moved = batch.mask & (logprobs < -2.0)  # an old log-probability must not be above 0
    spread = torch.where(moved, 0.3 * torch.randn(batch.mask.shape, generator=made).double(), 0.0)
    spread -= torch.where(moved, spread.sum(1, keepdim=True) / moved.sum(1, keepdim=True), 0.0)
    log_ratio = torch.tensor([[1e-4], [1e-3], [1e-3]]) + spread
    return batch._replace(old_logprobs=(logprobs - log_ratio).float().masked_fill(~batch.mask, 0.0))


def loss_of(logits: Tensor, batch: Batch, loss: Loss, entropy_coef: float = 0.0) -> Expected:
    """`logits` float64; an autograd graph behind them is left as it is, for gradients of hidden states."""
    leaf = logits.detach().requires_grad_()
    log_softmax = leaf.log_softmax(-1)
    logprobs = log_softmax.gather(-1, batch.token_ids[..., None])[..., 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    value, size = _value(logprobs, entropy, batch, loss, entropy_coef)
    gradient, by_logprob, by_entropy = torch.autograd.grad(value, (leaf, logprobs, entropy), materialize_grads=True)
    with torch.no_grad():
        p = log_softmax.exp()
        through_entropy = by_entropy.abs()[..., None] * (log_softmax.abs() + entropy[..., None])
        sizes = p * (by_logprob.abs()[..., None] + through_entropy)
        own = -torch.expm1(logprobs) * by_logprob.abs()  # of the token's own column: 1 - p
        at = batch.token_ids[..., None]
        sizes.scatter_(-1, at, own[..., None] + (p * through_entropy).gather(-1, at))
        logprobs, entropy = (x.detach().masked_fill(~batch.mask, 0.0) for x in (logprobs, entropy))
    return Expected(value.detach(), size, logprobs, entropy, gradient, sizes)


def _value(logprobs: Tensor, entropy: Tensor, batch: Batch, loss: Loss, entropy_coef: float) -> tuple[Tensor, float]:
    """The mean over a response's tokens, then over responses, less the entropy bonus; and its size."""
    counts = batch.mask.sum(1)
    low, high = CLIP_RANGES[loss]
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs.double()
    log_ratio = torch.where(batch.mask, logprobs - old, 0.0)
    advantages = batch.advantages.double()
    if loss == "gspo":
        ratio = (log_ratio.sum(1) / counts).exp()
    else:
        ratio, advantages = log_ratio.exp(), advantages[:, None]
    terms = -torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)
    by_response = terms if loss == "gspo" else torch.where(batch.mask, terms, 0.0).sum(1) / counts
    bonus = torch.where(batch.mask, entropy, 0.0).sum(1) / counts
    value = (by_response - entropy_coef * bonus).mean()
    size = (batch.advantages.abs().double().mean() + entropy_coef * bonus.detach().abs().mean()).item()
    return value, size
