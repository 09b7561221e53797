"""PPO's loss of a value model: squared error to the returns, clipped around the old values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.collectives import gather, ranks_of
from ..base.layout import BatchShape, Layout, batch_shape
from ..base.scalars import run_time
from . import reduction


@dataclass(frozen=True)
class ValueStats:
    """Detached fp32 tensors over unmasked tokens; of no tokens everything is 0."""

    clip_fraction: Tensor  # share of tokens where the clipped error is the larger one (no gradient)
    value_mean: Tensor
    return_mean: Tensor
    squared_error: Tensor  # mean of (value - return)^2, without the clip
    explained_variance: Tensor  # 1 - Var(return - value) / Var(return); 0 where all returns are equal
    num_tokens: Tensor  # unmasked
    values: Tensor  # token layout, 0 where masked
    moments: Tensor  # float64, what `over` puts together

    def as_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The scalars by name, ready for a logger; the arrays are left out."""
        return {prefix + each.name: getattr(self, each.name) for each in fields(self)[:-2]}

    def over(self, group: Any) -> ValueStats:
        """The scalars of the batch that the ranks of `group` share, as one process would have them.

        One collective; every rank of the group has to call it, even with an empty batch. The arrays stay this rank's.

        Args:
            group: a process group of torch.distributed, or a mesh of one dimension.
        """
        ranks = ranks_of("group", group)
        if ranks is None:
            raise TypeError("group: expected a process group, or a mesh of one dimension; got None")
        return _stats(gather(self.moments, ranks), self.values, self.moments)


class ValueLossOutput(NamedTuple):
    """What the value losses return; it unpacks as `loss, stats = ...`."""

    loss: Tensor  # 0-d, differentiable, in the dtype of the values
    stats: ValueStats


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    *,
    clip_range: float | None = 0.2,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token_mean",
    group_tokens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> ValueLossOutput:
    """The clipped value loss of PPO: OpenAI Baselines' `ppo2`, and verl's `compute_value_loss`.

    With V the value, R the return and V_old the old value of an unmasked token:

        x_t = 1/2 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2)

    aggregated as the policy losses aggregate their terms. The PPO paper (arXiv 1707.06347, equation 9) has the error
    without a clip: `clip_range=None`. Where the clipped error is the larger one, the gradient is exactly 0: the value
    has moved far enough towards the return. Computed in float64.

    Args:
        values: [B, T] or packed [N], float32 or float64, differentiable: the value model's outputs, aligned with
            `logprobs`. `linear_value_loss` takes hidden states and a value head instead.
        returns: the same shape: the second result of `gae`. Constants.
        old_values: the same shape: the values from which `gae` computed the returns. Constants. None: the current
            values, so that nothing is clipped, as in the first update of a batch.
        clip_range: how far a value may move from the old one; None: no clip.
        mask: one per token, True (or 1) where a token counts. Numbers at masked positions, NaN included, have no
            effect.
        cu_seqlens: int32 or int64 boundaries of packed sequences: 0, ..., N.
        aggregation, group_tokens, normalizer: as in `policy_loss`; the default is the mean over all unmasked tokens.
            With a global `normalizer` the shares of micro-batches and ranks add up to the whole batch's loss.

    Returns: `ValueLossOutput(loss, stats)`. NaN in a number of an unmasked token makes the loss, and the gradient of
        this token, NaN.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    checks.values_of_tokens("values", values)
    batch = batch_shape(values.shape, mask, cu_seqlens, values.device)
    inputs = value_inputs(batch, returns, old_values, clip_range, aggregation, group_tokens, normalizer)
    return inputs.loss(values)


class ValueInputs(NamedTuple):
    """The caller's arguments beside the values, checked."""

    batch: BatchShape
    returns: Tensor
    old_values: Tensor | None
    clip_range: float | None
    aggregation: str
    group_tokens: Tensor | None  # [sequences], for the aggregation "group_mean"
    normalizer: float | Tensor | None

    def loss(self, values: Tensor) -> ValueLossOutput:
        """values: [B, T] or [N], of any content where masked."""
        layout = self.batch.layout()
        counted = reduction.nan_gradient_if_no_count(values, self.normalizer).reshape(-1)
        current, returns = layout.select(counted.double()), layout.of_tokens(self.returns)
        error, clipped = current - returns, torch.zeros_like(layout.mask)
        of_loss = error
        if self.old_values is not None and self.clip_range is not None:
            old, reach = layout.of_tokens(self.old_values), run_time(self.clip_range, values.device)
            held = torch.where(current > old, old + reach, old - reach) - returns
            clipped = ((current - old).abs() > reach) & (held.abs() > error.abs())
            of_loss = torch.where(clipped, held.detach(), error) + torch.where(old.isnan(), torch.nan, 0.0)
        by_sequence = reduction.token_shares(layout, self.aggregation, self.normalizer, self.group_tokens)
        shares = layout.spread(by_sequence)
        loss = reduction.nan_if_no_count((of_loss.square() * shares).sum() / 2, layout, self.normalizer)
        with torch.no_grad():
            moments = _moments(layout, error.detach(), returns, clipped)
            stats = _stats(moments[None], current.detach().to(values.dtype).reshape(layout.shape), moments)
        return ValueLossOutput(loss.to(values.dtype), stats)


def value_inputs(
    batch: BatchShape,
    returns: Tensor,
    old_values: Tensor | None,
    clip_range: float | None,
    aggregation: str,
    group_tokens: Tensor | None,
    normalizer: float | Tensor | None,
) -> ValueInputs:
    """The arguments as `ValueInputs`, checked."""
    returns = batch.per_token("returns", returns, "returns")
    if old_values is not None:
        checks.floats("old_values", checks.tensor("old_values", old_values, "the value model's outputs before"))
        old_values = batch.per_token("old_values", old_values, "old values")
    if clip_range is not None:
        clip_range = checks.number("clip_range", clip_range, "how far a value may move", at_least=0.0)
    normalizer = reduction.check(aggregation, normalizer, batch.device)
    reduction.check_count(normalizer, batch)
    group_tokens = reduction.check_group_tokens(aggregation, group_tokens, batch)
    return ValueInputs(batch, returns, old_values, clip_range, aggregation, group_tokens, normalizer)


class _Moments(NamedTuple):
    """Of each rank's batch, [ranks]."""

    tokens: Tensor  # how many
    clipped: Tensor  # how many of them
    return_mean: Tensor
    return_squares: Tensor  # sum of squared differences from the mean
    error_mean: Tensor  # of value - return
    error_squares: Tensor


def _moments(layout: Layout, error: Tensor, returns: Tensor, clipped: Tensor) -> Tensor:
    """Of this rank, in the order of `_Moments`."""
    count = layout.num_tokens

    def of(numbers: Tensor) -> tuple[Tensor, Tensor]:
        # Equal numbers differ by exactly 0 from the largest, but not from a rounded mean.
        largest = torch.cat([torch.where(layout.mask, numbers, -torch.inf), numbers.new_full((1,), -torch.inf)]).amax()
        mean = largest + layout.select(numbers - largest).sum() / count
        mean = torch.where(count == 0, 0.0, mean)
        return mean, layout.select((numbers - mean).square()).sum()

    return torch.stack([count, layout.select(clipped.double()).sum(), *of(returns), *of(error)])


def _stats(of_ranks: Tensor, values: Tensor, moments: Tensor) -> ValueStats:
    """From the moments of all ranks, [ranks, 6]."""
    each = _Moments(*of_ranks.unbind(1))
    counted, total = each.tokens > 0, each.tokens.sum()

    def together(means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the variance of all."""
        largest = torch.where(counted, means, -torch.inf).amax()
        mean = largest + torch.where(counted, each.tokens * (means - largest), 0.0).sum() / total
        mean = torch.where(total == 0, 0.0, mean)
        apart = torch.where(counted, each.tokens * (means - mean).square(), 0.0)
        return mean, (squares + apart).sum() / total.clamp(min=1)

    return_mean, variance = together(each.return_mean, each.return_squares)
    error_mean, unexplained = together(each.error_mean, each.error_squares)
    return ValueStats(
        clip_fraction=(each.clipped.sum() / total.clamp(min=1)).float(),
        value_mean=(return_mean + error_mean).float(),
        return_mean=return_mean.float(),
        squared_error=(unexplained + error_mean.square()).float(),
        explained_variance=torch.where(variance == 0, 0.0, 1 - unexplained / variance).float(),
        num_tokens=total.float(),
        values=values,
        moments=moments,
    )
