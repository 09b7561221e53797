"""A tolerance that lets a broken kernel live is a bug: every mutant below must fail the checks that the suite uses.

`Model` is a plain, slow implementation of the whole contract. Unbroken it passes; with any one `bug` it must not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import checks
import oracle
import pytest
import torch
from batches import Batch, edge_batch, ragged_batch, run
from modes import DEFAULT_MODE
from tolerances import TOLERANCES
from torch import Tensor

pytestmark = DEFAULT_MODE


class Cap(torch.autograd.Function):
    """The logits of a model from its head's outputs, c tanh(s x / c); some of it broken."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, logit_scale: float, softcap: float, bug: str) -> Tensor:
        ctx.save_for_backward(outputs)
        ctx.options = logit_scale, softcap, bug
        if bug == "scaled after the cap":
            return logit_scale * softcap * torch.tanh(outputs.double() / softcap)
        tanh = torch.tanh(outputs.double() * (logit_scale / softcap))
        if bug == "an approximate tanh":  # as good as a GPU's instruction
            tanh = tanh * (1 + 2.0**-11)
        return softcap * tanh

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (outputs,), (logit_scale, softcap, bug) = ctx.saved_tensors, ctx.options
        u = outputs.double() * (logit_scale / softcap)
        slope = 1 / torch.cosh(u).square()
        if bug == "slope of the cap left out":
            slope = torch.ones_like(slope)
        if bug == "slope from a rounded tanh":
            slope = (1 - torch.tanh(u).float().square()).double()
        if bug == "scale left out of the slope":
            slope = slope / logit_scale
        return (gradient * slope * logit_scale).to(outputs.dtype), None, None, None


class Keep(torch.autograd.Function):
    """The logits of the columns that rows keep, all others -inf; some of it broken."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, kept: list[list[int]], bug: str) -> Tensor:
        inside = torch.zeros(logits.shape, dtype=torch.bool)
        for t, columns in enumerate(kept):
            if bug == "an offset one too far":
                columns = [*columns[1:], *kept[(t + 1) % len(kept)][:1]]
            if bug == "last kept column unread":
                columns = columns[:-1] or columns
            inside[t, columns] = True
        if bug == "sampled token forgotten":
            inside.scatter_(1, ids[:, None], False)
        if bug == "a set of one is the whole row":
            inside |= inside.sum(-1, keepdim=True) == 1
        ctx.save_for_backward(logits, inside)
        ctx.bug = bug
        return torch.where(inside, logits, -math.inf)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, inside = ctx.saved_tensors
        outside = torch.zeros_like(gradient)
        if ctx.bug == "a gradient outside of the set":
            outside = torch.softmax(logits, -1) * gradient.abs().sum(-1, keepdim=True)
        if ctx.bug == "gradient of the next column":
            gradient = gradient.roll(1, -1)
        return torch.where(inside, gradient, outside), None, None, None


class Rows(torch.autograd.Function):
    """logits [N, V] -> (l, H, lse), each [N] float64, and the vector-Jacobian product; some of them broken."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, mask: Tensor, temperature: Tensor, bug: str) -> Any:
        n, vocab = logits.shape
        z = torch.where(mask[:, None], logits.double(), 0.0) / temperature[:, None]
        ids = torch.where(mask, ids, 0)
        if bug == "target off by one":
            ids = (ids + 1) % vocab
        seen = z[:, :-1] if bug == "last column unread" else z
        if bug == "maximum starts at zero":
            seen = torch.cat([seen, torch.zeros(n, 1).double()], -1).float()
            top = seen.amax(-1, keepdim=True)
            lse = (top[:, 0] + (seen - top)[:, :-1].exp().sum(-1).log()).double()
        else:
            lse = seen.logsumexp(-1)
        if bug == "lse in fp32":
            lse = lse.float().double()
        target = z.gather(-1, ids[:, None])[:, 0]
        others = z.scatter(-1, ids[:, None], -math.inf).logsumexp(-1)
        logprobs = -torch.nn.functional.softplus(others - target)
        if bug in ("lse in fp32", "maximum starts at zero", "last column unread"):
            logprobs = target - lse
        if bug == "collapse near probability one":
            logprobs = (target.float() - lse.float()).double()
        if bug == "log-probs in bf16":
            logprobs = logprobs.bfloat16().double()
        logp = z - lse[:, None]
        entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0)).sum(-1)
        if bug == "entropy sign":
            entropy = -entropy
        if bug == "probability zero times log zero":
            entropy = -(logp.exp() * logp).sum(-1)
        if bug == "first block all -inf":
            dead = (z[:, :8] == -math.inf).all(-1)
            logprobs = logprobs.masked_fill(dead, math.nan)
        out = [torch.where(mask, x, 0.0) for x in (logprobs, entropy, lse)]
        if bug == "last row unwritten":
            out[0][-1] = math.nan
        ctx.save_for_backward(logits, ids, mask, temperature, *out)
        ctx.bug = bug
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, ids, mask, temperature, logprobs, entropy, lse = ctx.saved_tensors
        bug, (g_l, g_h, g_lse) = ctx.bug, grads
        if bug == "entropy gradient sign":
            g_h = -g_h
        if bug == "entropy gradient dropped":
            g_h = 0 * g_h
        active = mask & ((g_l != 0) | (g_h != 0) | (g_lse != 0))
        if bug == "coefficient of the next row":
            g_l = g_l.roll(1)
        z = logits.double() / temperature[:, None]
        if bug != "masked by multiplication":
            z = torch.where(active[:, None], z, 0.0)
        logp = z - lse[:, None]
        logp.scatter_(-1, ids[:, None], logprobs[:, None])
        p = logp.exp()
        bracket = (g_lse - g_l)[:, None] - torch.where(p > 0, g_h[:, None] * (logp + entropy[:, None]), 0.0)
        if bug == "softmax term deleted":
            bracket = torch.zeros_like(bracket)
        gradient = p * bracket
        one_minus_p = -torch.expm1(logprobs)
        own = g_l * one_minus_p + p.gather(-1, ids[:, None])[:, 0] * (bracket.gather(-1, ids[:, None])[:, 0] + g_l)
        if bug == "softmax term deleted":
            own = g_l
        if bug == "target rounded before subtracting one":
            own = (g_l + gradient.gather(-1, ids[:, None])[:, 0].to(logits.dtype)).double()
        if bug == "no one-hot at the target":
            own = gradient.gather(-1, ids[:, None])[:, 0]
        if bug == "p from the fp32 log-prob":
            own = g_l * (1 - p.gather(-1, ids[:, None])[:, 0].float()).double()
        gradient.scatter_(-1, ids[:, None], own[:, None])
        if bug != "temperature not divided":
            gradient /= temperature[:, None]
        if bug == "temperature divided twice":
            gradient /= temperature[:, None]
        if bug == "one percent in the tail":
            gradient[:, 0] *= 1.01
        if bug == "sign flipped":
            gradient = -gradient
        if bug == "masked by multiplication":
            gradient *= active[:, None]
        else:
            gradient = torch.where(active[:, None], gradient, 0.0)
        if bug == "a row skipped":
            gradient[int(active.nonzero()[-1])] = 0.0
        if bug == "last column unwritten":
            gradient[:, -1] = 0.0
        gradient = gradient.to(logits.dtype)
        if bug != "subnormals not flushed" and logits.dtype is not torch.float16:
            gradient = torch.where(gradient.abs() < 2.0**-126, 0.0, gradient)
        return gradient, None, None, None, None


def model_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    *,
    objective: str,
    bug: str = "",
    mask: Tensor,
    cu_seqlens: Tensor,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
    temperature: float | Tensor = 1.0,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    aggregation: str = "sequence_mean",
    normalizer: float | None = None,
    max_log_ratio: float = 20.0,
    backend: None = None,
) -> tuple[Tensor, SimpleNamespace]:
    n, s = len(mask), len(cu_seqlens) - 1
    lengths = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(torch.arange(s), lengths)  # [N]

    def total(values: Tensor) -> Tensor:  # [N] -> [S]
        return torch.zeros(s).double().index_add(0, sequence, torch.where(mask, values, 0.0))

    def each(values: Tensor) -> Tensor:  # [S] or [N] -> [N]
        return values.double() if len(values) == n else values.double()[sequence]

    t = torch.as_tensor(temperature).double().expand(n)
    logprobs, entropy, _ = Rows.apply(logits, token_ids, mask, t, bug)
    o = logprobs.detach() if old_logprobs is None else old_logprobs.double()
    m = mask.double()
    counts = total(m)
    per = lengths.double() if bug == "mean over the padded length" else counts
    mean_of = (per.clamp(min=1) if bug != "ratio by sum" else torch.ones(s).double())[sequence]
    r = torch.where(mask, (logprobs - o).clamp(-1e30, 1e30), 0.0)
    a = torch.where(mask, each(advantages), 0.0)
    if bug == "advantage of another sequence":
        a = each(advantages.roll(1)) if len(advantages) == s else a.roll(1)
    mean_r = total(r / mean_of)[sequence]
    if objective == "gspo" or (objective == "gspo_token" and bug == "gradient of the sequence form"):
        x = mean_r
    elif objective == "gspo_token":
        x = mean_r.detach() + logprobs - logprobs.detach()
    else:
        x = r
    saturated = x > max_log_ratio
    ratio = torch.where(saturated, max_log_ratio, x).exp()
    if bug == "gradient through saturation":
        ratio = ratio + torch.where(saturated, x - x.detach(), 0.0)
    low, high = 1 - eps_low, 1 + eps_high
    if bug == "clip sides swapped":
        low, high = 1 - eps_high, 1 + eps_low
    if bug == "clip in bf16":
        low, high = (float(torch.tensor(v).bfloat16()) for v in (low, high))
    if bug == "clip bounds in fp32":
        low, high = (float(torch.tensor(v).float()) for v in (low, high))
    if bug == "clip by log-ratio":
        low, high = math.exp(-eps_low), math.exp(eps_high)
    below, above = (ratio < low) & (a < 0), (ratio > high) & (a > 0)
    if bug == "clip whatever the sign":
        below, above = (ratio < low) & (a != 0), (ratio > high) & (a != 0)
    beyond = torch.zeros_like(below)
    if dual_clip is not None and bug != "dual clip ignored":
        beyond = (ratio > dual_clip) & (a < 0)
    bounded = torch.where(below, low, torch.where(above, high, torch.where(beyond, dual_clip or 0.0, ratio)))
    if bug == "clipped not zeroed":
        bounded = bounded.detach() + ratio - ratio.detach()
    term = -bounded * a
    w = torch.ones(n).double() if importance_weights is None else torch.where(mask, each(importance_weights), 0.0)
    if bug != "weights ignored":
        term = term * w
    kl = torch.zeros(n).double()
    if ref_logprobs is not None:
        gap = ref_logprobs.double() - logprobs
        d = gap.clamp(-max_log_ratio, max_log_ratio)
        d = -d if bug == "KL the other way round" else d
        kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[kl_estimator]
    extra = beta * kl * (-1 if bug == "KL sign" else 1)
    if bug == "weights on the KL term":
        extra = extra * w
    term = term + extra - entropy_coef * entropy * (-1 if bug == "entropy bonus sign" else 1)
    n_sequences = (counts > 0).sum().double() if bug != "empty sequences counted" else torch.tensor(float(s))
    n_tokens = m.sum()
    by = {"sequence_mean": total(term) / counts.clamp(min=1), "sequence_sum": total(term), "token_mean": total(term)}
    count = n_tokens if aggregation == "token_mean" else n_sequences
    if bug == "tokens instead of sequences":
        count = n_tokens
    if normalizer is not None and bug != "normalizer ignored":
        count = torch.tensor(normalizer).double()
    loss = by[aggregation].sum() / count.clamp(min=1e-9)

    one_each = objective == "gspo" and bug != "clip fraction by tokens"
    first = torch.zeros(n, dtype=torch.bool)
    for i in range(s):
        rows = [k for k in range(int(cu_seqlens[i]), int(cu_seqlens[i + 1])) if mask[k]]
        first[rows[:1] if one_each else rows] = True
    unit = first

    def share(flag: Tensor) -> Tensor:
        return flag[unit].double().mean() if bool(unit.any()) else torch.tensor(0.0)

    def of_units(flag: Tensor) -> Tensor:  # [N] -> [S] or [N]
        flag = flag | ~mask if bug == "a masked token is clipped" else flag & mask
        return total(flag.double()) > 0 if objective == "gspo" else flag

    kept = torch.where(mask, r, 0.0).clamp(-max_log_ratio, max_log_ratio)
    kept = -kept if bug == "approximate KL of the other direction" else kept
    units = ratio[unit] if bool(unit.any()) else torch.zeros(1)
    if bug == "empty sequences in the ratio's mean":
        units = torch.cat([units, torch.ones(int((counts == 0).sum()))])
    stats = SimpleNamespace(
        clip_fraction=share(below | above | beyond),
        clip_fraction_low=share(below),
        clip_fraction_high=share(above | beyond),
        ratio_mean=units.mean(),
        ratio_min=units.min(),
        ratio_max=units.max(),
        approx_kl=(kept.expm1() - kept).sum() / n_tokens.clamp(min=1),
        ref_kl=torch.where(mask, kl, 0.0).sum() / n_tokens.clamp(min=1),
        entropy=entropy.sum() / n_tokens.clamp(min=1),
        saturated_fraction=share(saturated),
        num_sequences=n_sequences,
        num_tokens=n_tokens,
        logprobs=logprobs.detach().float(),
        log_ratio=(total(r / mean_of) if objective == "gspo" else torch.where(mask, x, 0.0)).detach(),
        clipped_low=of_units(above | beyond if bug == "clip decisions swapped" else below),
        clipped_high=of_units(below if bug == "clip decisions swapped" else above | beyond),
    )
    return loss if logits.dtype is torch.float64 else loss.float(), stats


# --- the checks -----------------------------------------------------------------------------------------------------


def check_losses(bug: str, objective: str = "gspo", **wanted: Any) -> None:
    """As `test_losses.py` does: one ragged batch against the oracle."""
    build = {k: wanted.pop(k) for k in ("ref", "weights", "temperature", "by_token", "dtype", "seed") if k in wanted}
    batch = ragged_batch(objective, **build)
    opt = oracle.OBJECTIVES[objective].options(**wanted)

    def model(*args: Any, **keywords: Any) -> Any:
        edges = {"eps_low": opt.eps_low, "eps_high": opt.eps_high, "aggregation": opt.aggregation}
        return model_loss(*args, objective=objective, bug=bug, **{**edges, **keywords})

    outcome = run(batch, "packed", objective, function=model, **wanted)
    checks.check_outcome(outcome, batch, objective, **wanted)


def check_row_kernel(bug: str, dtype: torch.dtype = torch.float32, shift: float = 0.0, kind: str = "plain") -> None:
    """As `test_rows.py` does: statistics, then each gradient, and the invariants."""
    logits, ids = torch.randn(5, 67, generator=torch.Generator().manual_seed(1)) * 3, torch.tensor([0, 9, 66, 30, 2])
    if kind == "confident":
        logits[torch.arange(5), ids] = torch.tensor([12.0, 15.0, 18.0, 22.0, 27.0])
    if kind == "first block dead":
        logits[:, :8] = -math.inf
        ids = ids.clamp(min=8)
    if kind == "wide":
        logits[:, 1:60] -= 88.0
    kept = [[5, 0, 61], [3, 9, 20, 12], [66, 1], [30], [2, 7, 66, 0, 41]] if kind == "kept" else None
    batch = Batch((logits + shift).to(dtype), ids, torch.ones(5, dtype=torch.bool), [5], torch.zeros(1))
    batch.temperature, batch.kept = 0.7 if kind == "temperature" else 1.0, kept
    leaf = batch.logits.clone().requires_grad_()
    temperature = torch.full((5,), batch.temperature).double()
    logits = leaf
    if kind == "capped":
        batch.softcap, batch.logit_scale = 30.0, 12.0
        logits = Cap.apply(leaf, batch.logit_scale, batch.softcap, bug)
    if kept is not None:
        logits = Keep.apply(leaf, ids, kept, bug)
    out = Rows.apply(logits, ids, batch.mask, temperature, bug)
    tol = TOLERANCES[dtype]
    checks.check_rows(out[0].float(), out[1].float(), out[2], batch.rows, tol)
    for g in ([0.3, -1.0, 2.0, 1e-3, 0.5], [0.0] * 5, [0.0] * 5), ([0.0] * 5, [0.7] * 5, [0.0] * 5):
        (gradient,) = torch.autograd.grad(out, leaf, [torch.tensor(x).double() for x in g], retain_graph=True)
        checks.check_gradient(gradient, batch, *(torch.tensor(x).tolist() for x in g))
        checks.check_no_subnormals(gradient)


Check = Callable[[str], None]


def losses(objective: str = "gspo", **wanted: Any) -> Check:
    return lambda bug: check_losses(bug, objective, **wanted)


def edges(bug: str) -> None:
    """Ratios at the very edge of the window, on both sides of it."""
    for side in ("low", "high"):
        batch = edge_batch("gspo", side)
        model = partial(model_loss, objective="gspo", bug=bug, eps_low=3e-4, eps_high=4e-4)
        checks.check_outcome(run(batch, "packed", "gspo", function=model), batch, "gspo")


def kernel(**wanted: Any) -> Check:
    return lambda bug: check_row_kernel(bug, **wanted)


MUTANTS: dict[str, Check] = {
    # kernels, forward
    "target off by one": kernel(),
    "last column unread": kernel(),
    "maximum starts at zero": kernel(shift=-200.0),
    "lse in fp32": kernel(shift=1e4),
    "collapse near probability one": kernel(kind="confident"),
    "log-probs in bf16": kernel(dtype=torch.bfloat16),
    "entropy sign": kernel(),
    "probability zero times log zero": kernel(kind="first block dead"),
    "first block all -inf": kernel(kind="first block dead"),
    "last row unwritten": kernel(),
    # kernels, backward
    "softmax term deleted": kernel(),
    "sign flipped": kernel(),
    "no one-hot at the target": kernel(),
    "target rounded before subtracting one": kernel(dtype=torch.bfloat16, kind="confident"),
    "p from the fp32 log-prob": kernel(kind="confident"),
    "temperature not divided": kernel(kind="temperature"),
    "temperature divided twice": kernel(kind="temperature"),
    "entropy gradient sign": kernel(),
    "entropy gradient dropped": kernel(),
    "scaled after the cap": kernel(kind="capped"),
    "an approximate tanh": kernel(kind="capped"),
    "slope of the cap left out": kernel(kind="capped"),
    "slope from a rounded tanh": kernel(kind="capped"),
    "scale left out of the slope": kernel(kind="capped"),
    "sampled token forgotten": kernel(kind="kept"),
    "an offset one too far": kernel(kind="kept"),
    "last kept column unread": kernel(kind="kept"),
    "a set of one is the whole row": kernel(kind="kept"),
    "a gradient outside of the set": kernel(kind="kept"),
    "gradient of the next column": kernel(kind="kept"),
    "one percent in the tail": kernel(dtype=torch.bfloat16),
    "last column unwritten": kernel(),
    "subnormals not flushed": kernel(kind="wide"),
    "a row skipped": losses(),
    "coefficient of the next row": losses(),
    "masked by multiplication": losses(),
    # losses
    "ratio by sum": losses(),
    "mean over the padded length": losses(),
    "clip sides swapped": losses(),
    "clip in bf16": losses(),
    "clip by log-ratio": edges,
    "clip bounds in fp32": edges,
    "clip whatever the sign": losses(),
    "clipped not zeroed": losses(),
    "dual clip ignored": losses(dual_clip=3.0),
    "gradient through saturation": losses(max_log_ratio=1.5),
    "advantage of another sequence": losses(),
    "empty sequences counted": losses(),
    "tokens instead of sequences": losses(),
    "normalizer ignored": losses(normalizer=17.0),
    "gradient of the sequence form": losses("gspo_token", by_token=True),
    "clip fraction by tokens": losses(),
    "empty sequences in the ratio's mean": losses(),
    "clip decisions swapped": losses(),
    "a masked token is clipped": losses("grpo"),
    "approximate KL of the other direction": losses("grpo"),
    "weights ignored": losses(weights="sequence"),
    "weights on the KL term": losses(weights="token", ref=True, beta=0.1),
    "KL sign": losses(ref=True, beta=0.1),
    "KL the other way round": losses("grpo", ref=True, beta=0.1),
    "entropy bonus sign": losses("ppo", entropy_coef=0.01),
}


@pytest.mark.parametrize("bug", MUTANTS)
def test_a_mutant_is_rejected_and_the_sound_model_is_not(bug: str) -> None:
    MUTANTS[bug]("")
    with pytest.raises(AssertionError):
        MUTANTS[bug](bug)


@pytest.mark.parametrize("objective", [name for name, each in oracle.OBJECTIVES.items() if each.is_surrogate])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "sequence_sum"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_the_oracle_agrees_with_autograd_of_the_formulas(objective: str, aggregation: str, kl_estimator: str) -> None:
    """The model is differentiated by autograd, the oracle by hand: neither can be wrong alone. In float64, to 1e-12."""
    check_losses(
        "",
        objective,
        dtype=torch.float64,
        aggregation=aggregation,
        kl_estimator=kl_estimator,
        ref=True,
        beta=0.1,
        entropy_coef=0.01,
        weights="token",
        temperature="token",
        by_token=objective != "gspo",
        dual_clip=3.0,
    )
