"""What a training loop logs, as tensors on the device: reading one is the caller's choice, and the only host sync."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Layout
from .objectives import Terms


class HeadWork(NamedTuple):
    """How many rows a loss from hidden states multiplied by the head, which tells the plan that it followed.

    One row costs 2DV operations each time: once in `forward_rows` and `recomputed_rows`, and in `backward_rows` for the
    hidden states and for the head if those want a gradient. `explain` says why.
    """

    forward_rows: Tensor  # masked rows, prompt and padding, are never among them
    recomputed_rows: Tensor  # in a second phase: of sequences longer than a chunk
    backward_rows: Tensor  # with a coefficient: not clipped, not of advantage 0
    chunks: Tensor  # of logits that were held, one after the other


@dataclass(frozen=True)
class Stats:
    """Detached fp32 tensors. A unit is what has a ratio: a sequence for GSPO, a token for GSPO-token, GRPO and PPO.

    Units, tokens and sequences that are masked or empty are not counted; the mean of nothing is 0.
    """

    clip_fraction: Tensor  # share of units held at a bound (no gradient)
    clip_fraction_low: Tensor  # ... at 1 - eps_low, where the advantage is negative
    clip_fraction_high: Tensor  # ... at 1 + eps_high where it is positive, or at dual_clip where it is negative
    ratio_mean: Tensor  # of the units' ratios, saturated ones at exp(max_log_ratio)
    ratio_min: Tensor
    ratio_max: Tensor
    saturated_fraction: Tensor  # share of units whose log-ratio exceeds max_log_ratio
    approx_kl: (
        Tensor  # mean over tokens of exp(r) - 1 - r, r = logprob - old_logprob: KL(old || new), from old's samples
    )
    ref_kl: Tensor  # mean over tokens of the chosen estimator of KL(new || reference); 0 without ref_logprobs
    entropy: Tensor  # mean over tokens
    num_sequences: Tensor  # with at least one unmasked token
    num_tokens: Tensor  # unmasked
    logprobs: Tensor  # token layout, 0 where masked
    log_ratio: Tensor  # [sequences] or token layout, 0 where masked
    head: HeadWork | None = None  # of a loss from hidden states

    def as_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The scalars by name, ready for a logger; the two arrays are left out."""
        scalars = {name: getattr(self, name) for name in SCALARS}
        if self.head is not None:
            scalars |= {f"head_{name}": value for name, value in self.head._asdict().items()}
        return {prefix + name: value for name, value in scalars.items()}


SCALARS = tuple(field.name for field in fields(Stats))[:12]


@torch.no_grad()
def collect(
    layout: Layout,
    terms: Terms,
    per_sequence: bool,
    token_log_ratio: Tensor,
    ref_kl: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor | None,
    max_log_ratio: Tensor,
) -> Stats:
    """`terms.log_ratio` is [sequences] if `per_sequence`; all other arrays are [tokens]."""
    log_ratio = terms.log_ratio.detach()
    counted = layout.lengths > 0 if per_sequence else layout.mask
    units = counted.sum(dtype=torch.float64)
    ratio = torch.exp(log_ratio.clamp(max=max_log_ratio))

    def share(flags: Tensor | None) -> Tensor:
        return torch.zeros_like(units) if flags is None else (flags & counted).sum() / units.clamp(min=1)

    def over_tokens(values: Tensor | None) -> Tensor:
        if values is None:
            return torch.zeros_like(units)
        return layout.select(values.detach().double()).sum() / layout.num_tokens.clamp(min=1)

    def extreme(fill: float) -> Tensor:
        if ratio.numel() == 0:
            return torch.zeros_like(units)
        found = torch.where(counted, ratio, fill)
        return torch.where(units > 0, found.amin() if fill > 0 else found.amax(), 0.0)

    low, high = share(terms.clipped_low), share(terms.clipped_high)
    r = token_log_ratio.detach().clamp(-max_log_ratio, max_log_ratio)
    scalars = {
        "clip_fraction": low + high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "ratio_mean": torch.where(counted, ratio, 0.0).sum() / units.clamp(min=1),
        "ratio_min": extreme(torch.inf),
        "ratio_max": extreme(-torch.inf),
        "saturated_fraction": share(log_ratio > max_log_ratio),
        "approx_kl": over_tokens(torch.expm1(r) - r),
        "ref_kl": over_tokens(ref_kl),
        "entropy": over_tokens(entropy),
        "num_sequences": layout.num_sequences,
        "num_tokens": layout.num_tokens,
    }
    of_batch: dict[str, Any] = dict(zip(scalars, torch.stack(list(scalars.values())).float().unbind(), strict=True))
    return Stats(
        **of_batch,
        logprobs=layout.select(logprobs.detach()).float().reshape(layout.shape),
        log_ratio=log_ratio.float() if per_sequence else log_ratio.float().reshape(layout.shape),
    )
