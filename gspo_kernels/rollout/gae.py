"""Advantages and returns per token from rewards and a value model: generalized advantage estimation.

The recursion runs on returns, `G_t = r_t + gamma ((1 - lam) V_next + lam G_next)`, in float64. This is the usual sum of
temporal differences, rearranged: with lam = 1 the values cancel before anything is rounded. A token's return is an
affine function of the return at the next token, and at a masked token it is that return. The composition of affine
functions is associative, so a scan of log2(length) steps replaces the loop over tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import Segments, batch_shape, find_segments
from ..base.operators import Operator
from ..base.scalars import run_time
from ..rows import triton_rows


class GaeOutput(NamedTuple):
    """What `gae` returns; it unpacks as `advantages, returns = ...`. Both are 0 where masked, and constants."""

    advantages: Tensor  # [B, T] or packed [N]
    returns: Tensor  # the same shape: what `value_loss` fits values to


class _Inputs(NamedTuple):
    """The caller's arguments, checked."""

    rewards: Tensor  # per token where `rewards_per_token`, else [sequences]
    rewards_per_token: bool
    values: Tensor  # [B, T] or packed [N]
    mask: Tensor | None  # bool, the shape of `values`
    cu_seqlens: Tensor | None  # None: padded
    last_values: Tensor | None  # [sequences]; None: 0
    gamma: float
    lam: float


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    last_values: Tensor | None = None,
) -> GaeOutput:
    """Generalized advantage estimation (arXiv 1506.02438, equations 11 and 16), for PPO with a value model.

    With t' the next unmasked token of the same sequence after t, over unmasked tokens:

        delta_t = r_t + gamma V_t' - V_t
        A_t     = delta_t + gamma lam A_t'
        G_t     = A_t + V_t                     the lambda-return

    After the last unmasked token, `V_t'` is `last_values` and `A_t'` is 0. Masked tokens (prompt, tool output, padding)
    are skipped: neither gamma nor lam is applied for them, and they get 0. Computed in float64, deterministic, without
    a host sync; on a GPU one Triton program a sequence.

    verl's `compute_gae_advantage_return` computes the same and then whitens the advantages: see `whiten_advantages`.

    Args:
        rewards: [B, T] or packed [N], or one per sequence, which is given at its last unmasked token (an outcome
            reward); float32, float64 or integers. Rewards at masked tokens are ignored, as in verl: a reward for a
            tool's answer belongs at the last unmasked token before it. A penalty such as -beta KL is part of them.
        values: [B, T] or packed [N], float32 or float64: `values[t]` is that of the state in which token t was chosen.
            They are aligned with `logprobs`: row t of the model's output, which predicts `token_ids[t]`.
        gamma: the discount for each unmasked token.
        lam: 1: advantages are returns minus values (no bias, most variance). 0: they are temporal differences.
        mask: one per token, True (or 1) where a token counts. Numbers at masked positions, NaN included, have no
            effect.
        cu_seqlens: int32 or int64 boundaries of packed sequences: 0, ..., N. Wrong ones are refused, or give NaN, as in
            `policy_loss`.
        last_values: one per sequence: the value of the state after the last unmasked token. 0 for a response that
            ended by itself (terminal); the value model's output there for one that was cut off (truncated: the length
            limit, a time limit). None: all are terminal.

    Returns: `GaeOutput(advantages, returns)` in the dtype of `values`. NaN in a number of an unmasked token affects the
        tokens of its sequence up to this token, and no other sequence.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    checks.values_of_tokens("values", values)
    batch = batch_shape(values.shape, mask, cu_seqlens, values.device)
    rewards, rewards_per_token = batch.per_either("rewards", rewards, "rewards")
    if last_values is not None:
        last_values = batch.per_sequence("last_values", last_values, "values after truncated responses")
    discount = functools.partial(checks.number, at_least=0.0, at_most=1.0)
    gamma, lam = discount("gamma", gamma, "a discount per token"), discount("lam", lam, "the decay of GAE's average")
    return _gae_operator(
        _Inputs(rewards, rewards_per_token, values.detach(), batch.mask, batch.cu_seqlens, last_values, gamma, lam)
    )


def _gae(inputs: _Inputs) -> GaeOutput:
    values = inputs.values
    if not values.numel():
        return GaeOutput(torch.zeros_like(values), torch.zeros_like(values))
    segments = _segments(inputs)
    found = (_scan_in_triton if _runs_triton(values.device) else _scan_in_torch)(inputs, segments)
    if inputs.cu_seqlens is not None:
        found = GaeOutput(*(x + segments.fault for x in found))
    return GaeOutput(*[x.to(values.dtype).reshape(values.shape) for x in found])


_gae_operator: Operator[GaeOutput] = Operator(
    "gae",
    _gae,
    fake=lambda inputs: GaeOutput(*(inputs.values.new_empty(inputs.values.shape) for _ in GaeOutput._fields)),
)


def _runs_triton(device: torch.device) -> bool:
    """Whether the scan runs in Triton: on GPUs and, in its interpreter, on CPU tensors."""
    return not triton_rows.unavailable_reason() and (device.type == "cuda" or triton_rows.INTERPRETED)


def _segments(inputs: _Inputs) -> Segments:
    """The boundaries of the sequences, also of a padded batch, whose rows they are."""
    if inputs.cu_seqlens is not None:
        return find_segments(inputs.cu_seqlens, inputs.values.numel())
    count, length = inputs.values.shape
    sequences = torch.arange(count + 1, device=inputs.values.device)
    of_token = sequences[:-1].repeat_interleave(length)
    return Segments(sequences * length, of_token, inputs.values.new_zeros((), dtype=torch.float64))


def _scan_in_torch(inputs: _Inputs, segments: Segments) -> GaeOutput:
    """[tokens] float64, by doubling: after a step each map spans twice as many tokens."""
    values, sequence_of = inputs.values.reshape(-1).double(), segments.sequence_of
    tokens, device = values.numel(), values.device
    counted = torch.ones_like(values, dtype=torch.bool) if inputs.mask is None else inputs.mask.reshape(-1)
    after = segments.boundaries[1:].index_select(0, sequence_of)  # [tokens], where its sequence ends
    index = torch.arange(tokens, device=device)
    at_or_after = torch.where(counted, index, tokens).flip(0).cummin(0).values.flip(0)
    following = torch.cat([at_or_after[1:], at_or_after.new_full((1,), tokens)])  # t', the next unmasked token
    is_last = following >= after

    last = values.new_zeros(tokens)
    if inputs.last_values is not None:
        last = inputs.last_values.double().index_select(0, sequence_of)
    next_value = torch.where(is_last, last, values.index_select(0, following.clamp(max=tokens - 1)))
    rewards = inputs.rewards.reshape(-1).double()
    if not inputs.rewards_per_token:
        rewards = torch.where(is_last, rewards.index_select(0, sequence_of), 0.0)

    # G_t = slope G_(t+1) + constant, where G is `last` after the end of a sequence.
    slope = torch.where(counted, run_time(inputs.gamma * inputs.lam, device), 1.0)
    constant = torch.where(counted, rewards + inputs.gamma * (1 - inputs.lam) * next_value, 0.0)
    ends = index == after - 1
    constant = torch.where(ends, _after(slope, constant, last), constant)
    slope = torch.where(ends, 0.0, slope)
    step = 1
    while step < _longest(inputs, segments):
        left, right = slice(0, tokens - step), slice(step, tokens)
        constant[left] = _after(slope[left], constant[left], constant[right])
        slope[left] = slope[left] * slope[right]
        step *= 2
    return GaeOutput(torch.where(counted, constant - values, 0.0), torch.where(counted, constant, 0.0))


def _after(slope: Tensor, constant: Tensor, following: Tensor) -> Tensor:
    """slope * following + constant; what follows has no effect, NaN included, where the slope is 0."""
    return torch.where(slope == 0, constant, constant + slope * following)


def _longest(inputs: _Inputs, segments: Segments) -> int:
    """The length of the longest sequence, or more where reading it is not free."""
    if inputs.cu_seqlens is None:
        return inputs.values.shape[1]
    if checks.may_read(segments.boundaries):
        return int(segments.boundaries.diff().max())
    return inputs.values.numel()


def _scan_in_triton(inputs: _Inputs, segments: Segments) -> GaeOutput:
    """[tokens] in the dtype of `values`."""
    from .triton_gae import gae_kernel

    values, boundaries = inputs.values.contiguous(), segments.boundaries.contiguous()
    found = GaeOutput(*(torch.empty_like(values).view(-1) for _ in GaeOutput._fields))
    launch = _INTERPRETED_LAUNCH if triton_rows.INTERPRETED else LAUNCH
    with triton_rows.on_device(values):
        gae_kernel[(boundaries.numel() - 1,)](
            rewards=inputs.rewards.contiguous(),
            values=values,
            mask=None if inputs.mask is None else inputs.mask.contiguous().view(torch.uint8),
            last_values=None if inputs.last_values is None else inputs.last_values.contiguous(),
            boundaries=boundaries,
            gamma=run_time(inputs.gamma, values.device),
            lam=run_time(inputs.lam, values.device),
            advantages=found.advantages,
            returns=found.returns,
            REWARDS_PER_TOKEN=inputs.rewards_per_token,
            BLOCK=launch.elements,
            num_warps=launch.num_warps,
            enable_fp_fusion=True,
        )
    return found


LAUNCH = triton_rows.Launch(num_warps=4, elements=1024)
_INTERPRETED_LAUNCH = triton_rows.Launch(num_warps=1, elements=8)  # small, so that short sequences have several blocks
