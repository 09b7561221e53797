"""The token stage in Triton: one program a sequence, then one for the batch. The objective's term is compiled in.

The same formulas as token_stage.py, reduction.py and stats.py, in float32 with compensated sums in a fixed order; the
tests hold both to the same oracle. Everything is selected, nothing multiplied by a mask: a masked token's numbers and a
clipped ratio's gradient never reach an arithmetic that could make a NaN of them.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ..rows.triton_math import INFINITY, quotient, two_sum
from .stats import PARTIALS as _PARTIALS
from .triton_sums import add, in_two, leading_digits, maxima4, sums4, sums8, sums_and_extremes
from .triton_tokens import (
    between,
    counted,
    exp_excess,
    kl_of,
    load,
    load_pair,
    log_ratio_of,
    ratio_of,
    rollout_of,
)

SHRINK = tl.constexpr(2.0**-24)  # numbers up to e^80 are added up smaller, or 10,000 of them would not fit float32

# What `sequence_kernel` passes to `batch_kernel`, one array [sequences] each.
PARTIALS = tl.constexpr(len(_PARTIALS))
CLIPPED, LOW, HIGH = (tl.constexpr(_PARTIALS.index(f"clip_fraction{side}")) for side in ("", "_low", "_high"))
RATIO_SUM, RATIO_MIN, RATIO_MAX = (tl.constexpr(_PARTIALS.index(f"ratio_{name}")) for name in ("mean", "min", "max"))
SATURATED, APPROX_KL, REF_KL, ENTROPY, NONEMPTY, TOKENS, LOSS, UNITS, COUNT, ZERO = (
    tl.constexpr(_PARTIALS.index(name))
    for name in ("saturated_fraction", "approx_kl", "ref_kl", "entropy", "num_sequences", "num_tokens", "loss", "units",
                 "count", "zero")
)  # fmt: skip

_VARIES = ["tokens", "length", "sequences", "advantage_per_token", "weight_per_token", "p0", "p1", "p2", "p3",
           "max_log_ratio", "beta", "entropy_coef", "normalizer"]  # fmt: skip
_ANY_ADDRESS = ["logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropies", "advantages", "weights",
                "mask", "cu_seqlens", "group_tokens", "global_count", "g_logprobs", "g_entropies", "token_advantages",
                "token_weights", "log_ratios", "clipped", "partials", "loss", "scalars"]  # fmt: skip
_kernel = functools.partial(triton.jit, do_not_specialize=_VARIES, do_not_specialize_on_alignment=_ANY_ADDRESS)


@triton.jit
def both(low, high):
    """Two bools in the two bytes of an integer, the lower bound's first."""
    return low.to(tl.int16) | (high.to(tl.int16) << 8)


@_kernel()
def sequence_kernel(
    logprobs, old_logprobs, ref_logprobs, rollout_logprobs, entropies, advantages, weights, mask, cu_seqlens,
    group_tokens, global_count, tokens, length, sequences, advantage_per_token, weight_per_token,
    p0, p1, p2, p3, max_log_ratio, beta, entropy_coef, normalizer,
    g_logprobs, g_entropies, token_advantages, token_weights, log_ratios, clipped, partials,
    TERM: tl.constexpr, HOLD: tl.constexpr, RATIO: tl.constexpr, AGGREGATION: tl.constexpr, ESTIMATOR: tl.constexpr,
    KL_WEIGHTING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A sequence's share of the loss, its gradient by each log-probability and entropy, and its share of the stats.

    The sequence is a row of `length` tokens or, with `cu_seqlens`, tokens cu_seqlens[i] to cu_seqlens[i + 1]. Gradients
    lack one factor, 1 / (sum of the counts), which the row kernels multiply by. Absent: `old_logprobs` on-policy,
    `logprobs` before they are known (gradients are then those on-policy, without a KL term); `g_entropies` without an
    entropy bonus; `token_advantages` and `token_weights`, each token's advantage and its weight in the loss, unless
    rows or the batch kernel compute terms from them.

    Whether advantages and weights are per token is a run-time argument, so that it triggers no recompilation.

    TERM and HOLD: the objective's `triton_term` and `triton_hold`, with parameters p0 to p3. RATIO: "sequence",
    "token", or "mean_by_token" and "sum_by_token": a ratio per token with the value of the sequence's.
    """
    i = tl.program_id(0)
    if cu_seqlens is None:
        begin = i * length
        end = begin + length
        wrong = i < 0
    else:  # clamped: unchecked boundaries may not lead out of the arrays
        given_begin, given_end = tl.load(cu_seqlens + i), tl.load(cu_seqlens + i + 1)
        wrong = (
            (given_end < given_begin) | ((i == 0) & (given_begin != 0)) | ((i == sequences - 1) & (given_end != tokens))
        )
        begin = tl.minimum(tl.maximum(given_begin, 0), tokens).to(tl.int32)
        end = tl.minimum(tl.maximum(given_end, begin), tokens).to(tl.int32)
    lane = tl.arange(0, BLOCK)

    # First pass: how many tokens count, their log-ratios' mean, the sums of their weights and of the weighted KL.
    n = tl.zeros([BLOCK], tl.float32)
    r, r_rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    w, w_rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    d, d_rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + lane
        counts = counted(mask, at, at < end)
        n += counts.to(tl.float32)
        if RATIO != "token":
            hi, lo, _, _ = log_ratio_of(logprobs, old_logprobs, at, counts)
            if HOLD is not None:
                a = load(advantages, tl.where(advantage_per_token != 0, at, i), counts)
                bound, is_low, is_high = HOLD(hi + lo, a, p0, p1, p2, p3)
                hi, lo = tl.where(is_low | is_high, bound, hi), tl.where(is_low | is_high, 0.0, lo)
            if ref_logprobs is not None and logprobs is not None and beta != 0.0:
                ref, _ = load_pair(ref_logprobs, at, counts)
                lo += ref - ref  # a NaN makes NaN of the whole sequence
            r, r_rest = add(r, r_rest + lo, hi)
        if RATIO == "sequence" and weights is not None:
            w, w_rest = add(w, w_rest, load(weights, tl.where(weight_per_token != 0, at, i), counts))
        if RATIO == "sequence" and KL_WEIGHTING == "ratio" and ref_logprobs is not None and logprobs is not None:
            kl, _ = kl_of(logprobs, ref_logprobs, at, counts, max_log_ratio, ESTIMATOR)
            d, d_rest = add(d, d_rest, tl.where(counts, kl * SHRINK, 0.0))
    zeros = tl.zeros([BLOCK], tl.float32)
    if RATIO == "token" or (logprobs is None and (RATIO != "sequence" or weights is None)):  # n alone
        n = tl.sum(n, 0)
        r, w = 0.0 * n, n
    else:
        largest_r, largest_w, largest_d, _ = maxima4(tl.abs(r), tl.abs(w), tl.abs(d), zeros)
        r, r_rest = in_two(r, r_rest, largest_r)
        w, w_rest = in_two(w, w_rest, largest_w)
        d, d_rest = in_two(d, d_rest, largest_d)
        n, r, r_rest, w, w_rest, d, d_rest, _ = sums8(n, r, r_rest, w, w_rest, d, d_rest, zeros)
        r, w, d = r + r_rest, w + w_rest, (d + d_rest) / SHRINK
    any_token = n > 0.0
    each = tl.where(any_token, quotient(1.0 + 0.0 * n, tl.maximum(n, 1.0)), 0.0)  # 1 / n
    mean = r if RATIO == "sum_by_token" else quotient(r, tl.maximum(n, 1.0))
    share, count = 1.0 + 0.0 * n, any_token.to(tl.float32)
    if AGGREGATION == "sequence_mean":
        share = each
    elif AGGREGATION == "token_mean":
        count = n
    elif AGGREGATION == "group_mean":
        of_group = tl.where(any_token, tl.maximum(tl.load(group_tokens + i), 1.0), 1.0)
        share, count = quotient(1.0 + 0.0 * n, of_group), quotient(n, of_group)

    loss, loss_rest, low, high, saturated = zeros, zeros, zeros, zeros, zeros
    ratios, ratios_rest, ratio_min, ratio_max = zeros, zeros, zeros + INFINITY, zeros - INFINITY
    approx_kl, approx_rest, ref_kl, ref_rest, h, h_rest = zeros, zeros, zeros, zeros, zeros, zeros
    slope_of_sequence = 0.0 * n
    if RATIO == "sequence":
        advantage = load(advantages, i, any_token)
        term, its_slope, is_low, is_high = TERM(mean, advantage, max_log_ratio, 0.0, 0.0, 0.0, p0, p1, p2, p3)
        ratio = ratio_of(mean, max_log_ratio)
        all_weights = n if weights is None else w
        slope_of_sequence = all_weights * share * its_slope * each
        its_loss = tl.where(any_token, all_weights * share * term, 0.0)
        loss = tl.where(lane == 0, its_loss, 0.0)
        tl.store(log_ratios + i, tl.where(any_token, mean, 0.0))
        tl.store(clipped + i, both(any_token & is_low, any_token & is_high))

    # Second pass. Tokens that no sequence claims (boundaries that a GPU does not check) get a NaN, not stale memory.
    first = tl.where(i == 0, 0, begin)
    last = tl.where(i == sequences - 1, tokens, end)
    for start in range(first, last, BLOCK):
        at = start + lane
        inside = (at >= begin) & (at < end)
        counts = counted(mask, at, inside)
        hi, lo, new, old = log_ratio_of(logprobs, old_logprobs, at, counts)
        token_ratio = hi + lo
        if RATIO == "sequence":
            slope = zeros + slope_of_sequence
        else:
            log_ratio = token_ratio if RATIO == "token" else zeros + mean
            rollout = rollout_of(rollout_logprobs, at, counts, old)
            a = load(advantages, tl.where(advantage_per_token != 0, at, i), counts)
            k = zeros + 1.0
            if weights is not None:
                k = load(weights, tl.where(weight_per_token != 0, at, i), counts)
            if token_advantages is not None:
                tl.store(token_advantages + at, a, mask=at < last)
                weight = tl.where(inside, tl.where(counts, k * share, 0.0), float("nan"))
                tl.store(token_weights + at, weight, mask=at < last)
            term, slope, is_low, is_high = TERM(log_ratio, a, max_log_ratio, new, old, rollout, p0, p1, p2, p3)
            ratio = ratio_of(log_ratio, max_log_ratio)
            constant_ratio = log_ratio > max_log_ratio
            if HOLD is not None:
                _bound, is_low, is_high = HOLD(token_ratio, a, p0, p1, p2, p3)
                slope = tl.where(is_low | is_high, 0.0, slope)
                constant_ratio = constant_ratio | is_low | is_high
            slope = slope * k * share
            loss, loss_rest = add(loss, loss_rest, tl.where(counts, term * k * share, 0.0))
            ratios, ratios_rest = add(ratios, ratios_rest, tl.where(counts, ratio * SHRINK, 0.0))
            ratio_min = tl.minimum(ratio_min, tl.where(counts, ratio, INFINITY))
            ratio_max = tl.maximum(ratio_max, tl.where(counts, ratio, -INFINITY))
            low += (counts & is_low).to(tl.float32)
            high += (counts & is_high).to(tl.float32)
            saturated += (counts & (log_ratio > max_log_ratio)).to(tl.float32)
            if token_advantages is None:  # else the batch kernel writes them
                tl.store(log_ratios + at, tl.where(counts, log_ratio, 0.0), mask=at < last)
                tl.store(clipped + at, both(counts & is_low, counts & is_high), mask=at < last)
        excess = exp_excess(between(token_ratio, max_log_ratio))
        approx_kl, approx_rest = add(approx_kl, approx_rest, tl.where(counts, excess * SHRINK, 0.0))
        if ref_logprobs is not None and logprobs is not None:
            kl, kl_slope = kl_of(logprobs, ref_logprobs, at, counts, max_log_ratio, ESTIMATOR)
            if KL_WEIGHTING == "ratio":
                if RATIO == "sequence":
                    of_ratio = tl.where(mean > max_log_ratio, 0.0, d * each)  # the sequence's mean KL
                else:
                    of_ratio = tl.where(constant_ratio, 0.0, kl)
                kl, kl_slope = ratio * kl, ratio * (kl_slope + of_ratio)
            ref_kl, ref_rest = add(ref_kl, ref_rest, tl.where(counts, kl * SHRINK, 0.0))
            if beta != 0.0:
                loss, loss_rest = add(loss, loss_rest, tl.where(counts, beta * share * kl, 0.0))
                slope += beta * share * kl_slope
        if entropies is not None:
            entropy = load(entropies, at, counts)
            h, h_rest = add(h, h_rest, entropy)
        if g_entropies is not None:
            loss, loss_rest = add(loss, loss_rest, -entropy_coef * share * entropy)
            bonus = tl.where(counts, -entropy_coef * share, 0.0)
            tl.store(g_entropies + at, tl.where(inside, bonus, float("nan")), mask=at < last)
        slope = tl.where(inside, tl.where(counts, slope, 0.0), float("nan"))
        tl.store(g_logprobs + at, slope, mask=at < last)

    if global_count is not None:
        count = tl.load(global_count).to(tl.float32)
        count = tl.where(i == 0, tl.where(count < INFINITY, count, float("nan")), 0.0)
    count = tl.where(normalizer > 0.0, tl.where(i == 0, normalizer, 0.0), count)
    count = tl.where(wrong, float("nan"), count)  # of the whole batch then
    out = partials + i
    if RATIO == "sequence":
        if logprobs is None:
            loss, approx_kl, ref_kl, h = its_loss, 0.0, 0.0, 0.0
            loss_rest, approx_rest, ref_rest, h_rest = 0.0, 0.0, 0.0, 0.0
        else:
            top_loss, top_approx, top_ref, top_h = maxima4(tl.abs(loss), tl.abs(approx_kl), tl.abs(ref_kl), tl.abs(h))
            loss, loss_rest = in_two(loss, loss_rest, top_loss)
            approx_kl, approx_rest = in_two(approx_kl, approx_rest, top_approx)
            ref_kl, ref_rest = in_two(ref_kl, ref_rest, top_ref)
            h, h_rest = in_two(h, h_rest, top_h)
            loss, loss_rest, approx_kl, approx_rest, ref_kl, ref_rest, h, h_rest = sums8(
                loss, loss_rest, approx_kl, approx_rest, ref_kl, ref_rest, h, h_rest
            )
        units = any_token.to(tl.float32)
        low, high = tl.where(any_token & is_low, 1.0, 0.0), tl.where(any_token & is_high, 1.0, 0.0)
        saturated = tl.where(any_token & (mean > max_log_ratio), 1.0, 0.0)
        ratios, ratios_rest = tl.where(any_token, ratio * SHRINK, 0.0), 0.0
        ratio_max = tl.where(any_token, ratio, -INFINITY)
        negative_min = tl.where(any_token, -ratio, -INFINITY)
    else:
        (loss, loss_rest, ratios, ratios_rest, approx_kl, approx_rest, ref_kl, ref_rest, h, h_rest, low, high,
         saturated, ratio_max, negative_min) = sums_and_extremes(
            loss, loss_rest, ratios, ratios_rest, approx_kl, approx_rest, ref_kl, ref_rest, h, h_rest, low, high,
            saturated, ratio_max, -ratio_min,
        )  # fmt: skip
        units = n
    tl.store(out + CLIPPED * sequences, low + high)
    tl.store(out + LOW * sequences, low)
    tl.store(out + HIGH * sequences, high)
    tl.store(out + RATIO_SUM * sequences, ratios + ratios_rest)
    tl.store(out + RATIO_MIN * sequences, negative_min)
    tl.store(out + RATIO_MAX * sequences, ratio_max)
    tl.store(out + SATURATED * sequences, saturated)
    tl.store(out + APPROX_KL * sequences, approx_kl + approx_rest)
    tl.store(out + REF_KL * sequences, ref_kl + ref_rest)
    tl.store(out + ENTROPY * sequences, h + h_rest)
    tl.store(out + NONEMPTY * sequences, any_token.to(tl.float32))
    tl.store(out + TOKENS * sequences, n)
    tl.store(out + LOSS * sequences, loss + loss_rest)
    tl.store(out + UNITS * sequences, units)
    tl.store(out + COUNT * sequences, count)
    tl.store(out + ZERO * sequences, 0.0)


@_kernel()
def batch_kernel(
    partials, sequences, logprobs, old_logprobs, ref_logprobs, rollout_logprobs, entropies, mask, token_advantages,
    token_weights, tokens, p0, p1, p2, p3, max_log_ratio, log_ratios, clipped, loss, scalars,
    TERM: tl.constexpr, ESTIMATOR: tl.constexpr, KL_WEIGHTING: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The loss and the stats' scalars, in the order of `Stats`, from the partial sums of the sequences.

    With `entropies` (and `logprobs`, `ref_logprobs`) it also sums what the sequences could not know: where one pass
    makes the gradient, the coefficients are made before the first logit is read. With TERM that is all that depends on
    a token's ratio and log-probability, the loss included: of tokens that depend on nothing else, or on-policy.

    Each warp has one of the 16 partials and exchanges nothing. BLOCK partials at a time, then TOKENS_AT_ONCE tokens.
    """
    LANES: tl.constexpr = min(32, BLOCK // 32)
    COLUMNS: tl.constexpr = BLOCK // PARTIALS
    which = tl.arange(0, PARTIALS)
    row, lane = which[:, None], tl.arange(0, LANES)[None, :]
    is_extreme = (row == RATIO_MIN) | (row == RATIO_MAX)
    rest = tl.zeros([PARTIALS, LANES], tl.float32)
    nothing = tl.where(is_extreme, -INFINITY, rest)
    total = nothing
    for start in range(0, sequences, COLUMNS):
        for step in tl.static_range(COLUMNS // LANES):
            at = start + step * LANES + lane
            x = tl.load(partials + (row * sequences + at), mask=at < sequences, other=nothing)
            added, lost = two_sum(total, x)
            total = tl.where(is_extreme, tl.maximum(total, x), added)
            rest += tl.where(is_extreme, 0.0, lost)
    largest = tl.max(tl.where(is_extreme, total, tl.abs(total)), 1)
    first = leading_digits(total, largest[:, None], LANES)
    sums = tl.sum(first, 1) + tl.sum((total - first) + rest, 1)
    value = tl.where((which == RATIO_MIN) | (which == RATIO_MAX), largest, sums)

    nan_of_rows = 0.0
    if entropies is not None:
        zeros = tl.zeros([TOKENS_AT_ONCE], tl.float32)
        h, h_rest, kl_sum, kl_rest = zeros, zeros, zeros, zeros
        if TERM is not None:
            losses, losses_rest, approx_kl, approx_rest = zeros, zeros, zeros, zeros
            low, high, saturated = zeros, zeros, zeros
            ratios, ratios_rest, negative_min, ratio_max = zeros, zeros, zeros - INFINITY, zeros - INFINITY
        for start in range(0, tokens, TOKENS_AT_ONCE):
            at = start + tl.arange(0, TOKENS_AT_ONCE)
            counts = counted(mask, at, at < tokens)
            h, h_rest = add(h, h_rest, load(entropies, at, counts))
            if TERM is not None:
                hi, lo, new, old = log_ratio_of(logprobs, old_logprobs, at, counts)
                log_ratio = hi + lo
                a = load(token_advantages, at, counts)
                rollout = rollout_of(rollout_logprobs, at, counts, old)
                term, _, is_low, is_high = TERM(log_ratio, a, max_log_ratio, new, old, rollout, p0, p1, p2, p3)
                tl.store(log_ratios + at, log_ratio, mask=at < tokens)
                tl.store(clipped + at, both(counts & is_low, counts & is_high), mask=at < tokens)
                ratio = ratio_of(log_ratio, max_log_ratio)
                its_loss = tl.where(counts, term * load(token_weights, at, counts), 0.0)
                losses, losses_rest = add(losses, losses_rest, its_loss)
                ratios, ratios_rest = add(ratios, ratios_rest, tl.where(counts, ratio * SHRINK, 0.0))
                negative_min = tl.maximum(negative_min, tl.where(counts, -ratio, -INFINITY))
                ratio_max = tl.maximum(ratio_max, tl.where(counts, ratio, -INFINITY))
                low += (counts & is_low).to(tl.float32)
                high += (counts & is_high).to(tl.float32)
                saturated += (counts & (log_ratio > max_log_ratio)).to(tl.float32)
                excess = exp_excess(between(log_ratio, max_log_ratio))
                approx_kl, approx_rest = add(approx_kl, approx_rest, tl.where(counts, excess * SHRINK, 0.0))
            if ref_logprobs is not None:
                kl, _ = kl_of(logprobs, ref_logprobs, at, counts, max_log_ratio, ESTIMATOR)
                if TERM is not None and KL_WEIGHTING == "ratio":
                    kl *= ratio
                kl_sum, kl_rest = add(kl_sum, kl_rest, tl.where(counts, kl * SHRINK, 0.0))
        if TERM is None:
            top_h, top_kl, _, _ = maxima4(tl.abs(h), tl.abs(kl_sum), zeros, zeros)
            h, h_rest = in_two(h, h_rest, top_h)
            kl_sum, kl_rest = in_two(kl_sum, kl_rest, top_kl)
            h, h_rest, kl_sum, kl_rest = sums4(h, h_rest, kl_sum, kl_rest)
        else:
            (losses, losses_rest, ratios, ratios_rest, approx_kl, approx_rest, kl_sum, kl_rest, h, h_rest, low, high,
             saturated, ratio_max, negative_min) = sums_and_extremes(
                losses, losses_rest, ratios, ratios_rest, approx_kl, approx_rest, kl_sum, kl_rest, h, h_rest, low,
                high, saturated, ratio_max, negative_min,
            )  # fmt: skip
            value = tl.where(which == LOSS, losses + losses_rest, value)
            value = tl.where(which == CLIPPED, low + high, value)
            value = tl.where(which == LOW, low, value)
            value = tl.where(which == HIGH, high, value)
            value = tl.where(which == SATURATED, saturated, value)
            value = tl.where(which == RATIO_SUM, ratios + ratios_rest, value)
            value = tl.where(which == RATIO_MIN, negative_min, value)
            value = tl.where(which == RATIO_MAX, ratio_max, value)
            value = tl.where(which == APPROX_KL, approx_kl + approx_rest, value)
        value = tl.where(which == ENTROPY, h + h_rest, tl.where(which == REF_KL, kl_sum + kl_rest, value))
        nan_of_rows = h - h  # a NaN logit must not hide behind coefficients that needed no logit

    units, n, count, _ = sums4(
        tl.where(which == UNITS, value, 0.0), tl.where(which == TOKENS, value, 0.0),
        tl.where(which == COUNT, value, 0.0), tl.zeros([PARTIALS], tl.float32),
    )  # fmt: skip
    per_token = (which == APPROX_KL) | (which == REF_KL) | (which == ENTROPY)
    mean = quotient(value, tl.maximum(tl.where(per_token, n, units), 1.0))
    shrunk = (which == RATIO_SUM) | (which == APPROX_KL) | (which == REF_KL)
    mean = tl.where(shrunk, mean / SHRINK, mean)
    extreme = tl.where(units > 0.0, tl.where(which == RATIO_MIN, -value, value), 0.0)
    mean = tl.where((which == RATIO_MIN) | (which == RATIO_MAX), extreme, mean)
    tl.store(scalars + which, tl.where((which == NONEMPTY) | (which == TOKENS), value, mean), mask=which < LOSS)
    # What is no count makes NaN of the loss, and of gradients in the row kernels; 0 is one where nothing counts.
    divisor = tl.where(count > 0.0, count, tl.where((count == 0.0) & (n == 0.0), 1.0, float("nan")))
    quotients = quotient(value, divisor) + nan_of_rows
    tl.store(loss + tl.zeros_like(which), quotients, mask=which == LOSS)
