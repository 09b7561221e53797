"""The token stage of the four named losses in Triton: one program a sequence, then one for the batch.

The same formulas as objectives.py, aggregation.py and stats.py, in float32 with compensated sums in a fixed order; the
oracle of the tests holds both to account. Everything is selected, nothing multiplied away: a masked token's numbers and
a clipped ratio's gradient never reach an arithmetic that could make a NaN of them.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .logprobs.triton_math import INFINITY, exp, expm1, quotient, two_sum

SHRINK = tl.constexpr(2.0**-24)  # numbers up to e^80 are added up smaller, or 10,000 of them would not fit float32
FINITE = tl.constexpr(1e30)  # stands for an infinite log-probability, so that no inf - inf can arise

# What `sequence_kernel` leaves for `batch_kernel`, one array [sequences] each.
LOSS, UNITS, LOW, HIGH, RATIO_SUM, RATIO_MIN, RATIO_MAX, SATURATED, APPROX_KL, REF_KL, ENTROPY, TOKENS, COUNT, ZERO = (
    tl.constexpr(i) for i in range(14)
)
PARTIALS = 14  # the last is a zero, from which a row kernel may count

_VARIES = ["tokens", "length", "sequences", "advantage_per_token", "weight_per_token", "eps_low", "eps_high",
           "dual_clip", "max_log_ratio", "beta", "entropy_coef", "normalizer"]  # fmt: skip
_ANY_ADDRESS = ["logprobs", "old_logprobs", "ref_logprobs", "entropies", "advantages", "weights", "mask", "cu_seqlens",
                "global_count", "g_logprobs", "g_entropies", "token_advantages", "log_ratios", "partials", "loss",
                "scalars"]  # fmt: skip
_kernel = functools.partial(triton.jit, do_not_specialize=_VARIES, do_not_specialize_on_alignment=_ANY_ADDRESS)


@triton.jit
def _finite(x):
    """Infinities as +-1e30; NaN stays."""
    return tl.where(x > FINITE, FINITE, tl.where(x < -FINITE, -FINITE, x))


@triton.jit
def _load(array, at, there):
    return tl.load(array + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _counted(mask, at, there):
    """Which of these tokens count."""
    if mask is None:
        return there
    else:
        return there & (tl.load(mask + at, mask=there, other=0) != 0)


@triton.jit
def _log_ratio(logprobs, old_logprobs, at, counts):
    """logprob - old as a pair; 0 where nothing counts, and on-policy wherever the log-probability is a number."""
    zero = tl.zeros_like(at).to(tl.float32)
    if logprobs is None:
        return zero, zero
    else:
        new = _finite(_load(logprobs, at, counts))
        if old_logprobs is None:
            return new - new, zero
        else:
            return two_sum(new, -_finite(_load(old_logprobs, at, counts)))


@triton.jit
def _add(total, rest, x):
    """total + rest + x, with what the addition lost kept in rest."""
    total, lost = two_sum(total, x)
    return total, rest + lost


@triton.jit
def _sum(total, rest):
    """Of all lanes. The lanes' leading digits add up without any rounding, whatever cancels among them."""
    bits = (tl.max(tl.abs(total), 0) * total.shape[0]).to(tl.int32, bitcast=True)
    anchor = ((((bits >> 23) + 1) << 23) | 0x400000).to(tl.float32, bitcast=True)  # 1.5 times a power of two above all
    leading = (total + anchor) - anchor
    return tl.sum(leading, 0) + (tl.sum(total - leading, 0) + tl.sum(rest, 0))


@triton.jit
def _surrogate(log_ratio, advantage, eps_low, eps_high, dual_clip, max_log_ratio):
    """`clipped_surrogate` of objectives.py: (loss, its slope by the log-ratio, clipped low, clipped high, ratio)."""
    saturated = log_ratio > max_log_ratio
    bounded = tl.where(saturated, max_log_ratio, log_ratio)
    deviation, ratio = expm1(bounded), exp(bounded)
    low = (advantage < 0.0) & (deviation < -eps_low)
    high = (advantage > 0.0) & (deviation > eps_high)
    dual = (advantage < 0.0) & (deviation > dual_clip - 1.0)
    held = tl.where(high, 1.0 + eps_high, tl.where(low, 1.0 - eps_low, tl.where(dual, dual_clip, ratio)))
    stopped = low | high | dual | saturated
    return -held * advantage, tl.where(stopped, 0.0, -ratio * advantage), low, high | dual, ratio


@triton.jit
def _exp_excess(x):
    """e^x - 1 - x."""
    p = x * 2.7557319e-6 + 2.4801588e-5
    p = p * x + 0.00019841270
    p = p * x + 0.0013888889
    p = p * x + 0.0083333338
    p = p * x + 0.041666668
    p = p * x + 0.16666667
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.5, p * x * x, expm1(x) - x)


@triton.jit
def _between(x, bound):
    """x within +-bound; NaN stays."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _kl(logprob, ref_logprob, max_log_ratio, ESTIMATOR: tl.constexpr):
    """(KL(pi || ref) at each token, its derivative by the log-probability)."""
    gap = _finite(ref_logprob) - _finite(logprob)
    d = _between(gap, max_log_ratio)
    if ESTIMATOR == "k1":
        value, slope = -d, tl.zeros_like(d) + 1.0
    elif ESTIMATOR == "k2":
        value, slope = d * d * 0.5, -d
    else:
        value, slope = _exp_excess(d), -expm1(d)
    return value, tl.where(tl.abs(gap) > max_log_ratio, 0.0, slope)


@_kernel()
def sequence_kernel(
    logprobs, old_logprobs, ref_logprobs, entropies, advantages, weights, mask, cu_seqlens, global_count,
    tokens, length, sequences, advantage_per_token, weight_per_token,
    eps_low, eps_high, dual_clip, max_log_ratio, beta, entropy_coef, normalizer,
    g_logprobs, g_entropies, token_advantages, log_ratios, partials,
    RATIO: tl.constexpr, AGGREGATION: tl.constexpr, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A sequence's share of the loss, its gradient by each log-probability and entropy, and its share of the stats.

    The sequence is a row of `length` tokens or, with `cu_seqlens`, tokens cu_seqlens[i] to cu_seqlens[i + 1]. Gradients
    lack one factor, 1 / (sum of the counts): the row kernels bring it in. Absent: `old_logprobs` on-policy, `logprobs`
    before they are known (gradients are then those on-policy, without a KL term); `g_entropies` without an entropy
    bonus; `token_advantages`, each token's advantage, unless a row kernel asks for it (of a ratio per token).

    Advantages (GSPO's never) and weights may be per token. That is no compile-time choice: with as many sequences as
    tokens, numbers per token are taken for numbers per sequence, and lengths shall not compile a kernel.

    RATIO: "sequence" for GSPO, "sequence_by_token" for GSPO-token, "token" for GRPO and PPO.
    """
    i = tl.program_id(0)
    if cu_seqlens is None:
        begin = i * length
        end = begin + length
    else:  # clamped: unchecked boundaries may not lead out of the arrays
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + i), 0), tokens).to(tl.int32)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + i + 1), begin), tokens).to(tl.int32)
    lane = tl.arange(0, BLOCK)

    # First pass: how many tokens count, their log-ratios' mean, the sum of their weights.
    n = tl.zeros([BLOCK], tl.float32)
    r, r_rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    w, w_rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + lane
        counts = _counted(mask, at, at < end)
        n += counts.to(tl.float32)
        if RATIO != "token":
            hi, lo = _log_ratio(logprobs, old_logprobs, at, counts)
            r, r_rest = _add(r, r_rest + lo, hi)
        if RATIO == "sequence" and weights is not None:
            w, w_rest = _add(w, w_rest, _load(weights, tl.where(weight_per_token != 0, at, i), counts))
    n = tl.sum(n, 0)
    any_token = n > 0.0
    each = tl.where(any_token, quotient(1.0 + 0.0 * n, tl.maximum(n, 1.0)), 0.0)  # 1 / n
    mean = quotient(_sum(r, r_rest), tl.maximum(n, 1.0))
    share = each if AGGREGATION == "sequence_mean" else 1.0 + 0.0 * n

    zeros = tl.zeros([BLOCK], tl.float32)
    loss, loss_rest, units, low, high, saturated = zeros, zeros, zeros, zeros, zeros, zeros
    ratios, ratios_rest, ratio_min, ratio_max = zeros, zeros, zeros + INFINITY, zeros - INFINITY
    approx_kl, approx_rest, ref_kl, ref_rest, h, h_rest = zeros, zeros, zeros, zeros, zeros, zeros
    slope_of_sequence = 0.0 * n
    if RATIO == "sequence":
        advantage = _load(advantages, i, any_token)
        its_term, its_slope, is_low, is_high, its_ratio = _surrogate(
            mean, advantage, eps_low, eps_high, dual_clip, max_log_ratio
        )
        all_weights = n if weights is None else _sum(w, w_rest)
        slope_of_sequence = all_weights * share * its_slope * each
        unit = tl.where(any_token, lane, 1) == 0  # one lane speaks for the sequence
        loss = tl.where(unit, all_weights * share * its_term, 0.0)
        units, ratios = tl.where(unit, 1.0, 0.0), tl.where(unit, its_ratio * SHRINK, 0.0)
        ratio_min, ratio_max = tl.where(unit, its_ratio, INFINITY), tl.where(unit, its_ratio, -INFINITY)
        low = tl.where(unit, is_low.to(tl.float32), 0.0)
        high = tl.where(unit, is_high.to(tl.float32), 0.0)
        saturated = tl.where(unit, (mean > max_log_ratio).to(tl.float32), 0.0)
        tl.store(log_ratios + i, tl.where(any_token, mean, 0.0))

    # Second pass. Tokens that no sequence claims (boundaries that a GPU does not check) get a NaN, not stale memory.
    first = tl.where(i == 0, 0, begin)
    last = tl.where(i == sequences - 1, tokens, end)
    for start in range(first, last, BLOCK):
        at = start + lane
        inside = (at >= begin) & (at < end)
        counts = _counted(mask, at, inside)
        hi, lo = _log_ratio(logprobs, old_logprobs, at, counts)
        token_ratio = hi + lo
        if RATIO == "sequence":
            slope = zeros + slope_of_sequence
        else:
            log_ratio = token_ratio if RATIO == "token" else zeros + mean
            a = _load(advantages, tl.where(advantage_per_token != 0, at, i), counts)
            k = zeros + 1.0
            if weights is not None:
                k = _load(weights, tl.where(weight_per_token != 0, at, i), counts)
            if token_advantages is not None:
                tl.store(token_advantages + at, a, mask=at < last)
            term, slope, is_low, is_high, ratio = _surrogate(log_ratio, a, eps_low, eps_high, dual_clip, max_log_ratio)
            slope = slope * k * share
            loss, loss_rest = _add(loss, loss_rest, tl.where(counts, term * k * share, 0.0))
            ratios, ratios_rest = _add(ratios, ratios_rest, tl.where(counts, ratio * SHRINK, 0.0))
            ratio_min = tl.minimum(ratio_min, tl.where(counts, ratio, INFINITY))
            ratio_max = tl.maximum(ratio_max, tl.where(counts, ratio, -INFINITY))
            units += counts.to(tl.float32)
            low += (counts & is_low).to(tl.float32)
            high += (counts & is_high).to(tl.float32)
            saturated += (counts & (log_ratio > max_log_ratio)).to(tl.float32)
            tl.store(log_ratios + at, tl.where(counts, log_ratio, 0.0), mask=at < last)
        excess = _exp_excess(_between(token_ratio, max_log_ratio))
        approx_kl, approx_rest = _add(approx_kl, approx_rest, tl.where(counts, excess * SHRINK, 0.0))
        if ref_logprobs is not None and logprobs is not None:
            kl, kl_slope = _kl(_load(logprobs, at, counts), _load(ref_logprobs, at, counts), max_log_ratio, ESTIMATOR)
            ref_kl, ref_rest = _add(ref_kl, ref_rest, tl.where(counts, kl * SHRINK, 0.0))
            if beta != 0.0:
                loss, loss_rest = _add(loss, loss_rest, tl.where(counts, beta * share * kl, 0.0))
                slope += beta * share * kl_slope
        if entropies is not None:
            entropy = _load(entropies, at, counts)
            h, h_rest = _add(h, h_rest, entropy)
        if g_entropies is not None:
            loss, loss_rest = _add(loss, loss_rest, -entropy_coef * share * entropy)
            bonus = tl.where(counts, -entropy_coef * share, 0.0)
            tl.store(g_entropies + at, tl.where(inside, bonus, float("nan")), mask=at < last)
        slope = tl.where(inside, tl.where(counts, slope, 0.0), float("nan"))
        tl.store(g_logprobs + at, slope, mask=at < last)

    count = n if AGGREGATION == "token_mean" else any_token.to(tl.float32)
    if global_count is not None:
        count = tl.where(i == 0, tl.load(global_count).to(tl.float32), 0.0)
    count = tl.where(normalizer > 0.0, tl.where(i == 0, normalizer, 0.0), count)
    out = partials + i
    tl.store(out + LOSS * sequences, _sum(loss, loss_rest))
    tl.store(out + UNITS * sequences, tl.sum(units, 0))
    tl.store(out + LOW * sequences, tl.sum(low, 0))
    tl.store(out + HIGH * sequences, tl.sum(high, 0))
    tl.store(out + RATIO_SUM * sequences, _sum(ratios, ratios_rest))
    tl.store(out + RATIO_MIN * sequences, tl.min(ratio_min, 0))
    tl.store(out + RATIO_MAX * sequences, tl.max(ratio_max, 0))
    tl.store(out + SATURATED * sequences, tl.sum(saturated, 0))
    tl.store(out + APPROX_KL * sequences, _sum(approx_kl, approx_rest))
    tl.store(out + REF_KL * sequences, _sum(ref_kl, ref_rest))
    tl.store(out + ENTROPY * sequences, _sum(h, h_rest))
    tl.store(out + TOKENS * sequences, n)
    tl.store(out + COUNT * sequences, count)
    tl.store(out + ZERO * sequences, 0.0)


@triton.jit
def _total(partials, WHICH: tl.constexpr, sequences, BLOCK: tl.constexpr):
    total, rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total, rest = _add(total, rest, _load(partials + WHICH * sequences, at, at < sequences))
    return _sum(total, rest)


@_kernel()
def batch_kernel(
    partials, sequences, logprobs, ref_logprobs, entropies, mask, tokens, max_log_ratio, loss, scalars,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss and the stats' scalars, in the order of `Stats`, from what the sequences left.

    With `entropies` (and `logprobs`, `ref_logprobs`) it also sums what the sequences could not know: on-policy, the
    coefficients are made before the first logit is read.
    """
    spoiled = 0.0
    entropy = _total(partials, ENTROPY, sequences, BLOCK)
    ref_kl = _total(partials, REF_KL, sequences, BLOCK)
    if entropies is not None:
        zeros = tl.zeros([BLOCK], tl.float32)
        h, h_rest, kl_sum, kl_rest = zeros, zeros, zeros, zeros
        for start in range(0, tokens, BLOCK):
            at = start + tl.arange(0, BLOCK)
            counts = _counted(mask, at, at < tokens)
            h, h_rest = _add(h, h_rest, _load(entropies, at, counts))
            if ref_logprobs is not None:
                kl, _ = _kl(_load(logprobs, at, counts), _load(ref_logprobs, at, counts), max_log_ratio, ESTIMATOR)
                kl_sum, kl_rest = _add(kl_sum, kl_rest, tl.where(counts, kl * SHRINK, 0.0))
        entropy, ref_kl = _sum(h, h_rest), _sum(kl_sum, kl_rest)
        spoiled = entropy - entropy  # a NaN logit must not hide behind coefficients that needed no logit

    lowest, highest = tl.full([BLOCK], INFINITY, tl.float32), tl.full([BLOCK], -INFINITY, tl.float32)
    nonempty = tl.zeros([BLOCK], tl.float32)
    for start in range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < sequences
        nonempty += (_load(partials + TOKENS * sequences, at, there) > 0.0).to(tl.float32)
        lowest = tl.minimum(lowest, tl.load(partials + RATIO_MIN * sequences + at, mask=there, other=INFINITY))
        highest = tl.maximum(highest, tl.load(partials + RATIO_MAX * sequences + at, mask=there, other=-INFINITY))

    units = _total(partials, UNITS, sequences, BLOCK)
    n = _total(partials, TOKENS, sequences, BLOCK)
    count = _total(partials, COUNT, sequences, BLOCK)
    some, each = units > 0.0, quotient(1.0 + 0.0 * units, tl.maximum(units, 1.0))
    each_token = quotient(1.0 + 0.0 * n, tl.maximum(n, 1.0))
    low = _total(partials, LOW, sequences, BLOCK) * each
    high = _total(partials, HIGH, sequences, BLOCK) * each
    tl.store(loss, quotient(_total(partials, LOSS, sequences, BLOCK), tl.where(count > 0.0, count, 1.0)) + spoiled)
    tl.store(scalars + 0, low + high)
    tl.store(scalars + 1, low)
    tl.store(scalars + 2, high)
    tl.store(scalars + 3, _total(partials, RATIO_SUM, sequences, BLOCK) * each / SHRINK)
    tl.store(scalars + 4, tl.where(some, tl.min(lowest, 0), 0.0))
    tl.store(scalars + 5, tl.where(some, tl.max(highest, 0), 0.0))
    tl.store(scalars + 6, _total(partials, SATURATED, sequences, BLOCK) * each)
    tl.store(scalars + 7, _total(partials, APPROX_KL, sequences, BLOCK) * each_token / SHRINK)
    tl.store(scalars + 8, ref_kl * each_token / SHRINK)
    tl.store(scalars + 9, entropy * each_token)
    tl.store(scalars + 10, tl.sum(nonempty, 0))
    tl.store(scalars + 11, n)
