"""The scan of `gae` in Triton: one program a sequence, block after block from its end, in float64.

The tokens of a block lie in reverse, so that the scan runs forward. There is one scan for the value of the next
unmasked token and one for the returns.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from ..losses.triton_tokens import counted as _counted

_ANY_ADDRESS = ["rewards", "values", "mask", "last_values", "boundaries", "gamma", "lam", "advantages", "returns"]


@triton.jit
def _newest(keeps, value, then_keeps, then_value):
    """Of two neighbors the value of the later one, unless that one `keeps` what came before it."""
    return tl.where(then_keeps != 0, keeps, 0), tl.where(then_keeps != 0, value, then_value)


@triton.jit
def _compose(slope, constant, then_slope, then_constant):
    """x -> slope x + constant, and then the other map; a slope of 0 lets nothing through, NaN included."""
    return then_slope * slope, tl.where(then_slope == 0, then_constant, then_slope * constant + then_constant)


@triton.jit
def _load(array, at, there):
    return tl.load(array + at, mask=there, other=0).to(tl.float64)


@triton.jit
def _from_last_lane(values, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, values, 0.0), 0)


@triton.jit(do_not_specialize_on_alignment=_ANY_ADDRESS)
def gae_kernel(
    rewards, values, mask, last_values, boundaries, gamma, lam, advantages, returns,
    REWARDS_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advantages and returns of one sequence. `gamma` and `lam` point to float64: a number would arrive in float32."""
    sequence = tl.program_id(0)
    start, end = tl.load(boundaries + sequence), tl.load(boundaries + sequence + 1)
    discount, decay = tl.load(gamma), tl.load(lam)
    next_value = tl.zeros([], tl.float64)
    if last_values is not None:
        next_value = tl.load(last_values + sequence).to(tl.float64)
    next_return = next_value
    counted_so_far = tl.zeros([], tl.int32)
    lane = tl.arange(0, BLOCK)
    for done in range(0, end - start, BLOCK):
        at = end - 1 - done - lane
        there = at >= start
        counted, counted_after = _counted(mask, at, there), _counted(mask, at + 1, (at + 1 < end) & (at + 1 >= start))
        value, value_after = _load(values, at, counted), _load(values, at + 1, counted_after)
        keeps, newest = tl.associative_scan((tl.where(counted_after, 0, 1), value_after), 0, _newest)
        value_next = tl.where(keeps != 0, next_value, newest)

        if REWARDS_PER_TOKEN:
            reward = _load(rewards, at, counted)
        else:
            count = counted_so_far + tl.cumsum(counted.to(tl.int32), 0)
            reward = tl.where(counted & (count == 1), tl.load(rewards + sequence).to(tl.float64), 0.0)
            counted_so_far += tl.sum(counted.to(tl.int32), 0)
        slope = tl.where(counted, discount * decay, 1.0)
        constant = tl.where(counted, reward + discount * (1.0 - decay) * value_next, 0.0)
        slope, constant = tl.associative_scan((slope, constant), 0, _compose)
        found = tl.where(slope == 0, constant, slope * next_return + constant)

        tl.store(advantages + at, tl.where(counted, found - value, 0.0), mask=there)
        tl.store(returns + at, tl.where(counted, found, 0.0), mask=there)
        next_value = _from_last_lane(tl.where(counted, value, value_next), BLOCK)
        next_return = _from_last_lane(found, BLOCK)
