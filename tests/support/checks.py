"""The comparisons that every test uses, and that every mutant of `test_mutants.py` must fail.

A gradient row is compared in two places, each relative to its own size: the target column, and every other column by
itself. At V = 150k anything else is blind: the softmax term of a row is a few 1e-6 and hides below any absolute bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import oracle
import torch
from batches import Batch, Outcome, run
from modes import DEVICE, KERNELS, ON_GPU
from tolerances import LSE_DIGITS, TOLERANCES, Tolerance
from torch import Tensor


def check_close(name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|actual - expected| <= bound, element by element, on any device; NaN equals only NaN, an infinity only itself."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected, bound = (x.detach().cpu().double() for x in (actual, expected, bound))
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    good = same | (expected.isfinite() & ((actual - expected).abs() <= bound))
    if not bool(good.all()):
        worst = ((actual - expected).abs() / bound).nan_to_num(nan=math.inf).masked_fill(good, 0).flatten()
        k = int(worst.argmax())
        raise AssertionError(
            f"{name}: {int((~good).sum())} of {good.numel()} differ; worst at {k}: got {float(actual.flatten()[k])!r}, "
            f"expected {float(expected.flatten()[k])!r}, {float(worst[k]):.3g} times the bound"
        )


def check_number(name: str, actual: float, expected: float, bound: float) -> None:
    check_close(name, *(torch.tensor(x, dtype=torch.float64) for x in (actual, expected, bound)))


# --- rows ---------------------------------------------------------------------------------------------------------


def check_rows(
    logprobs: Tensor, entropy: Tensor | None, lse: Tensor | None, rows: Sequence[oracle.Row], tol: Tolerance
) -> None:
    """[N] each. l relative to itself (of a probability 1 - 1e-9 the 1e-9 counts); H and lse with one nat of slack."""
    expected = torch.tensor([row.logprob for row in rows], dtype=torch.float64)
    check_close("logprobs", logprobs, expected, tol.number * expected.abs() + 2.0**-126)  # fp32 has no digits there
    assert bool((logprobs <= 0).logical_or(logprobs.isnan()).all()), f"a log-probability above 0: {logprobs.max()}"
    if entropy is not None:
        expected = torch.tensor([row.entropy for row in rows], dtype=torch.float64)
        check_close("entropy", entropy, expected, tol.number * (1 + expected.abs()))
    if lse is not None:
        expected = torch.tensor([row.lse for row in rows], dtype=torch.float64)
        check_close("lse", lse, expected, tol.number * (1 + expected.abs()))


def check_gradient(
    gradient: Tensor,
    batch: Batch,
    g_logprob: Sequence[float],
    g_entropy: Sequence[float] | None = None,
    g_lse: Sequence[float] | None = None,
    *,
    g_error: Sequence[float] | None = None,
    tol: Tolerance | None = None,
    roundings: int = 1,
) -> None:
    """gradient [N, V] of a loss with these derivatives by (l, H, lse); `g_error` [N] is what g_logprob may err by."""
    tol = tol or TOLERANCES[batch.logits.dtype]
    gradient = gradient.cpu()
    n, vocab = batch.logits.shape
    assert gradient.shape == (n, vocab) and gradient.dtype == batch.logits.dtype, (gradient.shape, gradient.dtype)
    everywhere = torch.arange(vocab)
    zeros = [0.0] * n
    g_entropy, g_lse = g_entropy or zeros, g_lse or zeros
    for t in range(n):
        temperature, target = batch.temperature_of(t), int(batch.token_ids[t])
        logits = batch.logits_of(t)
        slopes = oracle.of_model_slope(batch.logits[t].tolist(), batch.logit_scale, batch.softcap)
        by_output = torch.tensor(slopes, dtype=torch.float64)
        coefficients = g_logprob[t], g_entropy[t], g_lse[t]
        if not batch.mask[t] or (coefficients == (0, 0, 0) and not (g_error and g_error[t])):
            assert bool((gradient[t] == 0).all()), f"row {t} must be exactly zero, got {gradient[t]}"
            continue
        expected = torch.tensor(oracle.row_gradient(logits, target, temperature, *coefficients), dtype=torch.float64)
        row = batch.rows[t]
        expected *= by_output
        logp = torch.tensor(logits, dtype=torch.float64) / temperature - row.lse
        logp[target] = row.logprob
        p = logp.exp()
        size = abs(g_logprob[t]) + abs(g_lse[t])
        error = tol.number * abs(g_logprob[t]) if g_error is None else g_error[t]
        digits = LSE_DIGITS[KERNELS] * (1 + abs(row.lse))  # log p and H are differences of numbers as large as lse
        entropy_part = torch.where(p > 0, logp.abs() + row.entropy, 0.0) * abs(g_entropy[t])
        exponent = logp.abs().nan_to_num(posinf=0)
        if batch.softcap is not None:  # a tanh is good to a quarter of a unit in the last place of 1
            exponent = exponent + batch.softcap / temperature / 4
        bound = p * (error + (tol.number + tol.argument * exponent) * (size + entropy_part))
        own = -math.expm1(row.logprob)  # the target column's own size is 1 - p
        bound[target] = own * (error + tol.number * abs(g_logprob[t]))
        bound[target] += tol.number * float(p[target]) * (abs(g_lse[t]) + float(entropy_part[target]))
        bound = (bound + digits * (size + abs(g_entropy[t])) * torch.where(everywhere == target, 1.0, p)) / temperature
        bound *= by_output
        flushed = tol.tiny * max(1.0, (size + 100 * abs(g_entropy[t])) / temperature)  # p itself may have been
        bound += roundings * tol.store * expected.abs() + flushed
        actual, tail = gradient[t].double(), everywhere != target
        check_close(f"row {t}, target column", actual[target], expected[target], bound[target])
        check_close(f"row {t}, tail", actual[tail], expected[tail], bound[tail])
        if (
            g_lse[t] == 0 and batch.softcap is None
        ):  # a constant added to the logits changes neither l nor H, so the row sums to zero
            slack = (2 * tol.number + roundings * tol.store) * float(actual.abs().sum()) + vocab * tol.tiny
            slack += tol.number * float((p * entropy_part).sum()) / temperature + float(bound[target])
            check_number(f"row {t}, its sum", float(actual.sum()), 0.0, slack)


def check_no_subnormals(gradient: Tensor) -> None:
    """A subnormal slows the next matrix product elevenfold. (fp16 needs its own.)"""
    if gradient.dtype in (torch.float32, torch.bfloat16):
        size = gradient.double().abs()
        count = int(((size > 0) & (size < 2.0**-126)).sum())
        assert count == 0, f"{count} subnormal gradients"


# --- losses -------------------------------------------------------------------------------------------------------


def slack_by_row(batch: Batch, tol: Tolerance) -> list[float]:
    """The relative error a ratio or a KL term may have: its own, plus what the rounding of fp32 log-probs puts in.

    The largest of the sequence, for one ratio is shared by all its tokens.
    """
    slack = [0.0] * len(batch.mask)
    for rows in batch.sequences:
        sizes = [0.0]
        for t in rows:
            if batch.mask[t]:
                parts = [batch.rows[t].logprob]
                parts += [float(x[t]) for x in (batch.old_logprobs, batch.ref_logprobs) if x is not None]
                sizes.append(sum(abs(x) for x in parts if math.isfinite(x) and abs(x) < 1e4))
        for t in rows:
            slack[t] = tol.number + tol.argument * max(sizes)
    return slack


def check_stats(
    stats: Mapping[str, float], batch: Batch, expected: oracle.Result, opt: oracle.Options, tol: Tolerance
) -> None:
    """Every scalar: counts and fractions exactly (to fp32), the others relative to what fp32 log-probs allow."""
    assert set(stats) == set(expected.stats), set(stats) ^ set(expected.stats)
    kept = [t for t in range(len(batch.mask)) if batch.mask[t]]
    slack = slack_by_row(batch, tol)
    largest = max((slack[t] for t in kept), default=0.0)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    def gap(other: Tensor | None, t: int) -> float:
        x = 0.0 if other is None else float(other[t]) - batch.rows[t].logprob
        return max(-opt.max_log_ratio, min(opt.max_log_ratio, x))

    old_slope = mean([abs(math.expm1(-gap(batch.old_logprobs, t))) * slack[t] for t in kept])
    ref_slope = mean([_kl_size(gap(batch.ref_logprobs, t), opt.kl_estimator) * slack[t] for t in kept])
    bounds = {
        "ratio_mean": largest * expected.stats["ratio_mean"],
        "ratio_min": largest * expected.stats["ratio_min"],
        "ratio_max": largest * expected.stats["ratio_max"],
        "approx_kl": tol.number * expected.stats["approx_kl"] + old_slope,
        "ref_kl": tol.number * abs(expected.stats["ref_kl"]) + ref_slope,
        "entropy": tol.number * (1 + expected.stats["entropy"]) if kept else 0.0,
    }
    for name, value in expected.stats.items():
        check_number(name, stats[name], value, bounds.get(name, 1e-6 * value))


def _kl_size(d: float, estimator: str) -> float:
    return {"k1": 1.0, "k2": abs(d), "k3": abs(math.expm1(d))}[estimator]


def check_loss(loss: float, batch: Batch, expected: oracle.Result, opt: oracle.Options, tol: Tolerance) -> None:
    slack = slack_by_row(batch, tol)
    bound = tol.number * expected.loss_size + 2.0**-126  # fp32 has no digits there
    for t, k in enumerate(slack):
        bound += k * expected.loss_slope[t] + tol.number * abs(expected.d_entropy[t]) * (1 + batch.rows[t].entropy)
    check_number("loss", loss, expected.loss, bound)


def check_outcome(
    outcome: Outcome, batch: Batch, objective: str, *, upstream: float = 1.0, roundings: int = 1, **options: Any
) -> None:
    """Everything a loss returns, against the oracle: value, stats, arrays, gradient, and the invariants.

    `roundings`: how often the gradient may be rounded to the logits' dtype on its way.
    """
    tol = TOLERANCES[batch.logits.dtype]
    opt = oracle.OBJECTIVES[objective].options(**options)
    expected = batch.expected(objective, **options)
    slack = slack_by_row(batch, tol)
    precise = torch.float64 if batch.logits.dtype is torch.float64 else torch.float32
    assert outcome.loss.shape == () and outcome.loss.dtype == precise, (outcome.loss.shape, outcome.loss.dtype)
    check_loss(float(outcome.loss), batch, expected, opt, tol)
    scalars = {name: float(getattr(outcome.stats, name).detach()) for name in expected.stats}
    # the arrays and scalars of the stats are fp32 whatever the logits are
    stats_tol = TOLERANCES[torch.float32]
    check_stats(scalars, batch, expected, opt, stats_tol)
    check_rows(outcome.logprobs, None, None, batch.rows, stats_tol)
    check_log_ratio(outcome.log_ratio, batch, expected, stats_tol)
    check_clipped(outcome.clipped, expected)

    g_error = [abs(upstream) * k * size for k, size in zip(slack, expected.d_logprobs_size, strict=True)]
    check_gradient(
        outcome.gradient,
        batch,
        [upstream * g for g in expected.d_logprobs],
        [upstream * g for g in expected.d_entropy],
        g_error=g_error,
        roundings=roundings,
    )
    check_no_subnormals(outcome.gradient)
    assert bool((outcome.padding_gradient == 0).all()), "the padding has a gradient"


def check_log_ratio(log_ratio: Tensor, batch: Batch, expected: oracle.Result, tol: Tolerance) -> None:
    """By sequence or by token; exactly 0 where masked or empty."""
    slack = [k if m else 0.0 for k, m in zip(slack_by_row(batch, tol), batch.mask.tolist(), strict=True)]
    if expected.log_ratio_by_sequence:
        slack = [max((slack[t] for t in rows), default=0.0) for rows in batch.sequences]
    value = torch.tensor(expected.log_ratio, dtype=torch.float64)
    check_close("log_ratio", log_ratio, value, torch.tensor(slack, dtype=torch.float64) * (1 + value.abs()))


def check_clipped(clipped: Tensor, expected: oracle.Result) -> None:
    """Which units are held at which bound, exactly; none where masked or empty."""
    for k, (name, wanted) in enumerate({"low": expected.clipped_low, "high": expected.clipped_high}.items()):
        assert clipped.dtype == torch.bool and clipped[:, k].tolist() == wanted, f"clipped_{name}: {clipped[:, k]}"


def run_and_check(batch: Batch, layout: str, objective: str, *, upstream: float = 1.0, **options: Any) -> Outcome:
    backend = options.pop("backend", None)
    outcome = run(batch, layout, objective, upstream=upstream, backend=backend, **options)
    check_outcome(outcome, batch, objective, upstream=upstream, **options)
    return outcome


# --- memory -------------------------------------------------------------------------------------------------------


def allocated(work: Callable[[], object]) -> int:
    """Bytes that torch hands out during `work`, freed or not."""
    if ON_GPU:
        before = torch.cuda.memory_stats(DEVICE)["allocated_bytes.all.allocated"]
        work()
        after: int = torch.cuda.memory_stats(DEVICE)["allocated_bytes.all.allocated"]
        return after - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
