"""What a training loop logs, as tensors on the device: reading one is the caller's choice, and the only host sync."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.collectives import gather, ranks_of
from ..base.layout import Layout
from .objectives import Terms


class HeadWork(NamedTuple):
    """How many rows a loss from hidden states multiplied by the head.

    A product of one row with the head costs 2DV operations. A row of `forward_rows` or `recomputed_rows` takes one such
    product; a row of `backward_rows` one for hidden states and one for the head, where these need a gradient. `explain`
    shows the plan that leads to these counts. With `kept`, rows that keep the whole vocabulary are counted, before the
    backward alone.
    """

    forward_rows: Tensor  # unmasked rows; prompt and padding are never among them
    recomputed_rows: Tensor  # rows whose logits were computed again, because their sequence is longer than a chunk
    backward_rows: Tensor  # rows with a gradient: neither clipped nor of advantage 0
    chunks: Tensor  # how many chunks of logits were computed


@dataclass(frozen=True)
class Stats:
    """Detached tensors, fp32 but for two of bool. A unit is what has a ratio: a sequence for GSPO, a token for others.

    Units, tokens and sequences that are masked or empty are not counted; the mean of nothing is 0.
    """

    clip_fraction: Tensor  # share of units held at a bound: without a gradient, but for CISPO and TOPR
    clip_fraction_low: Tensor  # ... at a lower bound, such as 1 - eps_low where the advantage is negative
    clip_fraction_high: Tensor  # ... at an upper one: 1 + eps_high, or dual_clip where the advantage is negative
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
    clipped_low: Tensor  # bool, of the shape of log_ratio: the units of clip_fraction_low; False where masked or empty,
    clipped_high: Tensor  # and for a sequence of which this rank has no token; ... and those of clip_fraction_high
    ratio_of: str = "token"  # what a unit is: "sequence" or "token"
    head: HeadWork | None = None  # of a loss from hidden states

    def as_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The scalars by name, ready for a logger; the arrays are left out."""
        scalars = {name: getattr(self, name) for name in SCALARS}
        if self.head is not None:
            scalars |= {f"head_{name}": value for name, value in self.head._asdict().items()}
        return {prefix + name: value for name, value in scalars.items()}

    def over(self, group: Any) -> Stats:
        """The scalars of the batch that the ranks of `group` share, as one process would have them.

        One collective; every rank of the group has to call it, even with an empty batch. For data-parallel ranks: the
        ranks of a context-parallel group have the same scalars already. The arrays and `head` stay this rank's.

        Args:
            group: a process group of torch.distributed, or a mesh of one dimension.
        """
        ranks = ranks_of("group", group)
        if ranks is None:
            raise TypeError("group: expected a process group, or a mesh of one dimension; got None")
        mine = torch.stack([getattr(self, name) for name in SCALARS])
        found = dict(zip(SCALARS, gather(mine, ranks).double().unbind(1), strict=True))  # [ranks] each
        units = found["num_sequences" if self.ratio_of == "sequence" else "num_tokens"]
        by_token = ("approx_kl", "ref_kl", "entropy")

        def mean(values: Tensor, count: Tensor) -> Tensor:
            return torch.where(count > 0, values * count, 0.0).sum() / count.sum().clamp(min=1)

        of_all = {name: mean(x, found["num_tokens"] if name in by_token else units) for name, x in found.items()}
        some = units.sum() > 0
        of_all["ratio_min"] = torch.where(some, torch.where(units > 0, found["ratio_min"], torch.inf).amin(), 0.0)
        of_all["ratio_max"] = torch.where(some, torch.where(units > 0, found["ratio_max"], -torch.inf).amax(), 0.0)
        of_all |= {name: found[name].sum() for name in ("num_sequences", "num_tokens")}
        scalars: dict[str, Any] = {name: x.float() for name, x in of_all.items()}
        return replace(self, **scalars)


ARRAYS = ("logprobs", "log_ratio", "clipped_low", "clipped_high")
SCALARS = tuple(field.name for field in fields(Stats) if field.name not in (*ARRAYS, "ratio_of", "head"))
_RATIO_MIN, _RATIO_MAX = SCALARS.index("ratio_min"), SCALARS.index("ratio_max")
# The arrays [sequences] of the Triton stage: the sums (or extremes) behind each scalar, then those behind the loss.
# "zero" is an array of zeros, which a row kernel may use as its counter.
PARTIALS = (*SCALARS, "loss", "units", "count", "zero")


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
    """The stats of a batch. `terms.log_ratio` is [sequences] if `per_sequence`; all other arrays are [tokens].

    Under context parallelism a rank counts its own tokens, and its share of each sequence; one collective adds these.
    """
    log_ratio = terms.log_ratio.detach()
    counted = layout.held if per_sequence else layout.mask
    count = layout.share() if per_sequence else counted.double()
    ratio = torch.exp(log_ratio.clamp(max=max_log_ratio))
    nothing = count.new_zeros(())

    def units(values: Tensor | None) -> Tensor:
        return nothing if values is None else torch.where(counted, values * count, 0.0).sum()

    def tokens(values: Tensor | None) -> Tensor:
        return nothing if values is None else layout.select(values.detach().double()).sum()

    def extreme(fill: float) -> Tensor:
        if ratio.numel() == 0:
            return nothing + fill
        found = torch.where(counted, ratio, fill)
        return found.amin() if fill > 0 else found.amax()

    clipped_low, clipped_high = (
        torch.zeros_like(counted) if x is None else counted & x for x in (terms.clipped_low, terms.clipped_high)
    )
    low, high = units(clipped_low), units(clipped_high)
    r = token_log_ratio.detach().clamp(-max_log_ratio, max_log_ratio)
    groups = (  # in the order of SCALARS
        (low + high, low, high, units(ratio)),
        (extreme(torch.inf), extreme(-torch.inf)),
        (units(log_ratio > max_log_ratio),),
        (tokens(torch.expm1(r) - r), tokens(ref_kl), tokens(entropy)),
        (layout.share().sum(), layout.local_lengths.sum()),
    )
    sums = torch.stack([value for group in groups for value in group])
    if layout.ranks is not None:
        of_ranks = gather(sums, layout.ranks)
        sums = of_ranks.sum(0)
        sums[_RATIO_MIN], sums[_RATIO_MAX] = of_ranks[:, _RATIO_MIN].amin(), of_ranks[:, _RATIO_MAX].amax()
    of_units, extremes, saturated, of_tokens, counts = sums.split([len(group) for group in groups])
    num_sequences, num_tokens = counts.unbind()
    num_units = num_sequences if per_sequence else num_tokens
    per_unit, per_token = num_units.clamp(min=1), num_tokens.clamp(min=1)
    extremes = torch.where(num_units > 0, extremes, 0.0)
    scalars = torch.cat([of_units / per_unit, extremes, saturated / per_unit, of_tokens / per_token, counts])
    of_batch: dict[str, Any] = dict(zip(SCALARS, scalars.float().unbind(), strict=True))
    shape = log_ratio.shape if per_sequence else layout.shape
    return Stats(
        **of_batch,
        logprobs=layout.select(logprobs.detach()).float().reshape(layout.shape),
        log_ratio=log_ratio.float().reshape(shape),
        clipped_low=clipped_low.reshape(shape),
        clipped_high=clipped_high.reshape(shape),
        ratio_of="sequence" if per_sequence else "token",
    )
