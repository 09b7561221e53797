"""Every objective, layout, backend and option against the oracle: the loss, each stat, and the gradient row by row."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import oracle
import pytest
import torch
from batches import (
    CLASSES,
    FIELDS,
    LAYOUTS,
    OBJECTIVES,
    PACKAGE,
    PUBLIC,
    SHORT,
    Batch,
    arguments,
    edge_batch,
    flat,
    ragged_batch,
    run,
)
from checks import check_close, check_gradient, check_outcome, run_and_check
from modes import KERNELS, ON_GPU, by_backend, by_combination, on_device, sized
from tolerances import TOLERANCES

import gspo_kernels

by_objective = pytest.mark.parametrize("objective", OBJECTIVES)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)

# (how the batch is built, what is asked of the loss): one option at a time, then together
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "token mean": ({}, {"aggregation": "token_mean"}),
    "sequence mean": ({}, {"aggregation": "sequence_mean"}),
    "sequence sum": ({}, {"aggregation": "sequence_sum"}),
    "normalizer": ({}, {"normalizer": 23.0}),
    "normalizer, token mean": ({}, {"aggregation": "token_mean", "normalizer": 101}),
    "wide clip": ({"eps_low": 0.1, "eps_high": 0.5}, {"eps_low": 0.1, "eps_high": 0.5}),
    "dual clip": ({}, {"dual_clip": 3.0}),
    "saturation": ({}, {"max_log_ratio": 1.5}),
    "saturation within the window": ({}, {"max_log_ratio": 1e-4}),
    "k1": ({"ref": True}, {"beta": 0.1, "kl_estimator": "k1"}),
    "k2": ({"ref": True}, {"beta": 0.1, "kl_estimator": "k2"}),
    "k3": ({"ref": True}, {"beta": 0.1, "kl_estimator": "k3"}),
    "ref without beta": ({"ref": True}, {}),
    "ref without beta, on-policy": ({"ref": True, "on_policy": True}, {}),
    "clamped KL": ({"ref": True}, {"beta": 0.1, "max_log_ratio": 0.4}),
    "weighted k1": ({"ref": True}, {"beta": 0.1, "kl_estimator": "k1", "kl_weighting": "ratio"}),
    "weighted k2": ({"ref": True, "weights": "token"}, {"beta": 2, "kl_estimator": "k2", "kl_weighting": "ratio"}),
    "weighted k3": ({"ref": True}, {"beta": 0.1, "kl_weighting": "ratio", "aggregation": "token_mean"}),
    "weighted KL, on-policy": ({"ref": True, "on_policy": True}, {"beta": 0.1, "kl_weighting": "ratio"}),
    "weighted KL, saturated": ({"ref": True}, {"beta": 0.1, "kl_weighting": "ratio", "max_log_ratio": 0.3}),
    "weighted KL without beta": ({"ref": True}, {"kl_weighting": "ratio"}),
    "group mean": ({"groups": True, "weights": "token"}, {"aggregation": "group_mean"}),
    "group mean, on-policy": ({"groups": True, "on_policy": True}, {"aggregation": "group_mean"}),
    "group mean, normalizer": (
        {"groups": True, "ref": True},
        {"aggregation": "group_mean", "beta": 0.1, "normalizer": 5.5},
    ),
    "no upper bound": ({}, {"eps_high": math.inf, "dual_clip": 3.0}),
    "no lower bound": ({}, {"eps_low": math.inf}),
    "engine": ({"rollout": True}, {}),
    "engine, on-policy": ({"rollout": True, "on_policy": True}, {}),
    "KL divergence": ({}, {"divergence": "kl"}),
    "KL divergence, engine": ({"rollout": True, "ref": True}, {"divergence": "kl", "delta_low": 0.2, "beta": 0.1}),
    "no largest ratio": ({"rollout": True}, {"max_ratio": None, "delta_high": math.inf}),
    "a gate that closes fast": ({}, {"tau_pos": 7.0, "tau_neg": 0.5}),
    "a strong penalty": ({}, {"penalty": 3.0, "max_log_ratio": 1.5}),
    "entropy": ({}, {"entropy_coef": 0.01}),
    "sequence weights": ({"weights": "sequence"}, {}),
    "token weights": ({"weights": "token"}, {}),
    "temperature": ({"temperature": 0.7}, {}),
    "temperature by token": ({"temperature": "token"}, {}),
    "logit scale": ({"logit_scale": 0.4}, {}),
    "softcap": ({"softcap": 4.0}, {}),
    "softcap, on-policy": ({"softcap": 3.0, "logit_scale": 0.5, "on_policy": True}, {}),
    "kept": ({"kept": True}, {}),
    "kept, on-policy": ({"kept": True, "on_policy": True}, {}),
    "kept, all": (
        {"kept": True, "ref": True, "weights": "token", "temperature": "token", "softcap": 5.0, "logit_scale": 0.8},
        {"beta": 0.05, "entropy_coef": 0.01, "dual_clip": 3.0, "aggregation": "token_mean"},
    ),
    "on-policy": ({"on_policy": True}, {}),
    "all": (
        {"ref": True, "weights": "token", "temperature": "token", "softcap": 5.0, "logit_scale": 0.8},
        {"beta": 0.05, "entropy_coef": 0.01, "dual_clip": 3.0, "aggregation": "sequence_sum", "normalizer": 7},
    ),
    "all, on-policy": (
        {"ref": True, "weights": "sequence", "temperature": "token", "on_policy": True},
        {"beta": 0.05, "kl_estimator": "k2", "entropy_coef": 0.01},
    ),
}


def speaks_of(objective: str, option: str) -> bool:
    """Whether the option says anything to this objective; otherwise it has the same under another name."""
    build, options = OPTIONS[option]
    of_class = {each.name for each in fields(CLASSES[objective])}
    if "rollout" in build and not CLASSES[objective].uses_rollout_logprobs:
        return False
    return option.startswith("all") or not options.keys() & FIELDS or bool(options.keys() & of_class)


@pytest.mark.every_objective
@pytest.mark.parametrize(
    ("objective", "option"), [(each, option) for each in OBJECTIVES for option in OPTIONS if speaks_of(each, option)]
)
@by_layout
@by_backend
def test_against_the_oracle(objective: str, layout: str, backend: str, option: str) -> None:
    build, options = OPTIONS[option]
    run_and_check(ragged_batch(objective, seed=1, **build), layout, objective, backend=backend, **options)


@pytest.mark.each_objective
@by_objective
@by_layout
@by_combination
@pytest.mark.parametrize("option", ["defaults", "all", "kept, all"])
def test_dtypes(objective: str, layout: str, backend: str, dtype: torch.dtype, option: str) -> None:
    build, options = OPTIONS[option]
    batch = ragged_batch(objective, seed=2, lengths=SHORT, dtype=dtype, **build)
    run_and_check(batch, layout, objective, backend=backend, upstream=-2.5, **options)


@by_objective
@by_combination
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("scale", [2.0**14, 1 / 3, 1e-33])
def test_a_scaled_loss(objective: str, backend: str, dtype: torch.dtype, on_policy: bool, scale: float) -> None:
    """Loss scaling is what makes fp16 training work: a gradient rounded to fp16 before it is scaled has underflowed.

    On-policy, in one pass, bf16 may be rounded twice, for the gradient is written before the scale is known.
    """
    batch = ragged_batch(objective, seed=16, lengths=SHORT, vocab=300, dtype=dtype, on_policy=on_policy)
    outcome = run(batch, "packed", objective, upstream=scale, backend=backend)
    check_outcome(outcome, batch, objective, upstream=scale, roundings=2 if on_policy else 1)


@pytest.mark.each_objective
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if CLASSES[name].advantages_per_token])
@by_layout
@by_backend
@pytest.mark.parametrize("option", ["defaults", "token mean", "dual clip", "on-policy", "all"])
def test_advantages_by_token(objective: str, layout: str, backend: str, option: str) -> None:
    build, options = OPTIONS[option]
    batch = ragged_batch(objective, seed=3, by_token=True, **build)
    run_and_check(batch, layout, objective, backend=backend, **options)


@by_objective
@by_layout
@by_backend
def test_a_large_odd_vocabulary(objective: str, layout: str, backend: str) -> None:
    batch = ragged_batch(objective, seed=4, vocab=sized(4099, 773), lengths=(3, 0, 2, 1, 2))
    run_and_check(batch, layout, objective, backend=backend)


def test_every_exported_objective_has_an_oracle() -> None:
    exported = {
        name.removesuffix("_loss")
        for name in gspo_kernels.__all__
        if name.endswith("_loss") and not name.startswith(("linear_", "policy", "value"))
    }
    assert exported <= set(PACKAGE) <= set(oracle.OBJECTIVES) == set(PUBLIC)  # a named loss is optional
    assert set(CLASSES) == set(oracle.OBJECTIVES), "one class an objective"


@pytest.mark.each_objective
@by_objective
def test_the_papers_defaults(objective: str) -> None:
    """What the function does when told nothing is what the paper says: said again, nothing changes."""
    truth = oracle.OBJECTIVES[objective]
    batch = ragged_batch(objective, seed=5, lengths=SHORT)
    said: dict[str, Any] = {**truth.fields, "aggregation": truth.aggregation}
    unsaid, aloud = run(batch, "packed", objective), run(batch, "packed", objective, **said)
    assert torch.equal(unsaid.loss, aloud.loss) and torch.equal(unsaid.gradient, aloud.gradient)


# --- the clip window -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["gspo", "gspo_token"])
@by_backend
@pytest.mark.parametrize("side", ["low", "high"])
def test_the_coefficient_at_a_ten_thousandth_of_the_window(objective: str, backend: str, side: str) -> None:
    batch = edge_batch(objective, side)
    outcome = run_and_check(batch, "packed", objective, backend=backend)
    assert float(outcome.stats.clip_fraction) == 0.5


@by_objective
@by_layout
def test_on_the_bound_is_not_clipped(objective: str, layout: str) -> None:
    """With an empty window and a ratio of exactly 1, everything is on the bound: all gradients flow."""
    batch = ragged_batch(objective, seed=6, on_policy=True)
    outcome = run_and_check(batch, layout, objective, eps_low=0.0, eps_high=0.0)
    assert float(outcome.stats.clip_fraction) == 0


def test_a_long_sequence_keeps_six_digits() -> None:
    """32k tokens: a naive fp32 sum of log-ratios loses the clip window."""
    n = sized(32_768, 150)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 5, generator=generator) * 3
    ids = torch.randint(5, (n,), generator=generator)
    logprobs = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    noise = (torch.rand(n, generator=generator) * 2 - 1) * logprobs.clamp(min=-1.0)
    old = (logprobs - 2e-4 + noise).float()
    given = (on_device(x) for x in (logits, ids, torch.ones(1), old))
    _, stats = gspo_kernels.gspo_loss(*given, cu_seqlens=on_device(torch.tensor([0, n])))
    truth = float((logprobs - old.double()).mean())
    assert abs(math.expm1(float(stats.log_ratio[0]) - truth)) < 1e-6
    assert abs(float(stats.ratio_mean) - math.exp(truth)) < 1e-6


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_more_than_a_kernel_takes_at_a_time(on_policy: bool) -> None:
    """On a GPU: 512 tokens of a sequence; 256 sequences and 4096 tokens of the batch. Interpreted: a hundredth."""
    lengths = [1100 if ON_GPU else 40, 0, *(k % (16 if ON_GPU else 3) for k in range(600 if ON_GPU else 20))]
    batch = ragged_batch("gspo_token", seed=8, vocab=5, lengths=lengths, on_policy=on_policy, ref=True)
    run_and_check(batch, "packed", "gspo_token", **({} if on_policy else {"beta": 0.1, "entropy_coef": 0.01}))


# --- what must agree with what ---------------------------------------------------------------------------------------


@by_layout
@by_backend
@pytest.mark.parametrize("option", ["defaults", "token mean", "dual clip", "saturation", "k3", "entropy", "on-policy"])
def test_gspo_is_gspo_token_with_a_constant_advantage(layout: str, backend: str, option: str) -> None:
    build, options = OPTIONS[option]
    batch = ragged_batch("gspo", seed=7, lengths=SHORT, **build)
    sequence = run(batch, layout, "gspo", backend=backend, **options)
    token = run(batch, layout, "gspo_token", backend=backend, **options)
    check_outcome(token, batch, "gspo_token", **options)
    size = float(sequence.gradient.double().abs().max())
    assert float(sequence.loss) == pytest.approx(float(token.loss), rel=1e-6, abs=1e-7)
    check_close("gradient", token.gradient, sequence.gradient, torch.full_like(sequence.gradient, 1e-6 * size))
    assert torch.equal((sequence.gradient == 0).all(-1), (token.gradient == 0).all(-1)), "the same sequences clip"


@by_objective
@by_backend
@pytest.mark.parametrize("option", ["defaults", "all"])
def test_padded_is_packed(objective: str, backend: str, option: str) -> None:
    """The rows' own numbers to the bit; sums over rows to rounding."""
    build, options = OPTIONS[option]
    batch = ragged_batch(objective, seed=8, lengths=SHORT, **build)
    padded, packed = (run(batch, layout, objective, backend=backend, **options) for layout in LAYOUTS)
    assert torch.equal(padded.logprobs, packed.logprobs)
    assert float(padded.loss) == pytest.approx(float(packed.loss), rel=1e-6, abs=1e-6)
    bound = 2e-6 * packed.gradient.abs()
    check_close("gradient", padded.gradient, packed.gradient, bound)
    check_close("log_ratio", padded.log_ratio, packed.log_ratio, torch.full_like(packed.log_ratio, 1e-6))


@by_objective
@by_layout
@by_backend
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "sequence_sum", "group_mean"])
def test_micro_batches_with_a_normalizer_add_up(objective: str, layout: str, backend: str, aggregation: str) -> None:
    at, groups = sized(5, 2), aggregation == "group_mean"  # of which one is split
    batch = ragged_batch(objective, seed=9, lengths=SHORT, ref=True, weights="token", groups=groups)
    options: dict[str, Any] = {"aggregation": aggregation, "beta": 0.1, "entropy_coef": 0.01}
    whole = run_and_check(batch, layout, objective, backend=backend, **options)
    counts = [
        gspo_kernels.global_count(
            keywords["mask"], keywords.get("cu_seqlens"), aggregation=aggregation,
            group_tokens=keywords.get("group_tokens"),
        )
        for keywords in (arguments(part, layout).keywords for part in batch.split(at))
    ]  # fmt: skip
    count = torch.stack(counts).sum()  # a 0-d tensor, as it would come from an all-reduce
    parts = [run(part, layout, objective, backend=backend, normalizer=count, **options) for part in batch.split(at)]
    assert sum(float(part.loss) for part in parts) == pytest.approx(float(whole.loss), rel=1e-6, abs=1e-6)
    gradient = torch.cat([part.gradient for part in parts])
    check_close("gradient", gradient, whole.gradient, 2e-6 * whole.gradient.abs())


@pytest.mark.each_objective
@by_objective
@by_layout
@by_backend
def test_on_policy_is_old_equal_to_current(objective: str, layout: str, backend: str) -> None:
    batch = ragged_batch(objective, seed=10, lengths=SHORT, on_policy=True)
    without = run_and_check(batch, layout, objective, backend=backend)
    assert {float(getattr(without.stats, name)) for name in ("ratio_mean", "ratio_min", "ratio_max")} == {1.0}
    assert float(without.stats.approx_kl) == 0 and bool((without.log_ratio == 0).all())
    batch.old_logprobs = without.logprobs.clone()
    same = run(batch, layout, objective, backend=backend)
    assert float(same.loss) == pytest.approx(float(without.loss), rel=1e-6, abs=1e-7)
    check_close("gradient", same.gradient, without.gradient, 2e-6 * without.gradient.abs())
    for name, value in without.stats.as_dict().items():
        assert float(same.stats.as_dict()[name]) == pytest.approx(float(value), rel=1e-6, abs=1e-7), name


@by_objective
def test_mask_none_is_all_true(objective: str) -> None:
    batch = ragged_batch(objective, seed=11, lengths=(4, 4, 4))
    batch.mask[:] = True
    logits = torch.randn(12, 30, generator=torch.Generator().manual_seed(11))
    batch = Batch(logits, torch.arange(12), batch.mask, [4, 4, 4], torch.tensor([1.0, -1.0, 0.5]))
    batch.old_logprobs = torch.tensor([row.logprob for row in batch.rows]) + 0.01
    for layout in LAYOUTS:
        args = arguments(batch, layout)
        if layout == "padded":  # no padding column, for all is unmasked
            args.logits = args.logits.detach()[:, :4].clone().requires_grad_()
            args.rest = (args.rest[0][:, :4], args.rest[1], args.rest[2][:, :4])
        args.keywords.pop("mask")
        loss, _ = PUBLIC[objective](args.logits, *args.rest, **args.keywords)
        loss.backward()
        assert args.logits.grad is not None
        expected = batch.expected(objective)
        assert float(loss.detach()) == pytest.approx(expected.loss, rel=1e-6)
        check_gradient(args.logits.grad.view(12, 30), batch, expected.d_logprobs, g_error=[3e-6 / 3] * 12)


@by_objective
@by_layout
def test_strided_logits(objective: str, layout: str) -> None:
    """logits[:, :-1] and a slice of the vocabulary: the same bits as their contiguous copies."""
    batch = ragged_batch(objective, seed=12, lengths=SHORT)
    whole = run(batch, layout, objective, backend=KERNELS)
    args = arguments(batch, layout)
    logits = args.logits.detach()
    roomy = logits.new_full((*logits.shape[:-2], logits.shape[-2] + 1, logits.shape[-1] + 3), math.nan)
    view = roomy[..., :-1, 2:-1]
    view.copy_(logits)
    view.requires_grad_()
    loss, _ = PUBLIC[objective](view, *args.rest, **args.keywords, backend=KERNELS)
    (gradient,) = torch.autograd.grad(loss, view)
    assert torch.equal(loss.detach().cpu(), whole.loss)
    assert torch.equal(flat(gradient.cpu(), batch, layout), whole.gradient)


@by_objective
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_strided_small_arrays(objective: str, on_policy: bool) -> None:
    """Boundaries, mask and numbers that are every other entry of a longer array: the same bits."""
    batch = ragged_batch(objective, seed=13, lengths=SHORT, on_policy=on_policy, weights="sequence")

    def apart(values: Any) -> Any:
        return values.repeat_interleave(2)[::2] if isinstance(values, torch.Tensor) else values

    outcomes = []
    for change in (lambda values: values, apart):
        args = arguments(batch, "packed")
        rest = [change(x) for x in args.rest]
        loss, _ = PUBLIC[objective](args.logits, *rest, **{name: change(x) for name, x in args.keywords.items()})
        outcomes.append((loss.detach(), torch.autograd.grad(loss, args.logits)[0]))
    assert torch.equal(outcomes[0][0], outcomes[1][0]) and torch.equal(outcomes[0][1], outcomes[1][1])


@by_objective
@pytest.mark.plain_memory
def test_two_runs_have_the_same_bits(objective: str) -> None:
    build, options = OPTIONS["all"]
    batch = ragged_batch(objective, seed=13, lengths=SHORT, vocab=300, **build)
    first, *others = [run(batch, "packed", objective, **options) for _ in range(sized(4, 2))]
    for other in others:
        assert torch.equal(first.loss, other.loss) and torch.equal(first.gradient, other.gradient)
        assert torch.equal(first.log_ratio, other.log_ratio)


def test_the_constants_are_never_differentiated() -> None:
    batch = ragged_batch("grpo", seed=14, ref=True, weights="token")
    args = arguments(batch, "packed")
    for x in (*args.rest[1:], args.keywords["ref_logprobs"], args.keywords["importance_weights"]):
        x.requires_grad_()
    loss, stats = gspo_kernels.grpo_loss(args.logits, *args.rest, **args.keywords, beta=0.1)
    loss.backward()
    for x in (*args.rest[1:], args.keywords["ref_logprobs"], args.keywords["importance_weights"]):
        assert x is not None and x.grad is None
    assert not any(x.requires_grad for x in stats.as_dict("").values())


def test_stats_as_dict() -> None:
    outcome = run(ragged_batch("gspo", seed=15), "padded", "gspo")
    named = outcome.stats.as_dict("train/")
    expected = ragged_batch("gspo", seed=15).expected("gspo").stats
    assert {f"train/{name}" for name in expected} <= set(named)
    for name in expected:
        value = named[f"train/{name}"]
        assert value.dtype == torch.float32 and value.shape == () and torch.equal(value, getattr(outcome.stats, name))


def test_the_tolerance_table_knows_every_dtype() -> None:
    assert set(TOLERANCES) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.each_objective
@by_backend
@by_objective
@pytest.mark.parametrize("entropy_coef", [0.0, 1e-12], ids=["one pass", "two passes"])
def test_a_log_probability_beyond_what_a_ratio_takes(backend: str, objective: str, entropy_coef: float) -> None:
    """On-policy its ratio is 1 however small it is, and its gradient that of any other."""
    opt = oracle.OBJECTIVES[objective].options(aggregation="sequence_mean")
    slope = oracle.evaluate(objective, [[0, 1]], [True, True], [-1.0, -1.0], [[1.0, 1.0]], opt).d_logprobs[0]
    for far in (1e29, 1e31, 3e38):
        logits = on_device(torch.tensor([[[0.0, far], [0.0, 0.0]]])).requires_grad_()
        loss, _ = PUBLIC[objective](
            logits, on_device(torch.zeros(1, 2, dtype=torch.long)), on_device(torch.ones(1)),
            entropy_coef=entropy_coef, backend=backend, aggregation="sequence_mean",
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient[0, 0].cpu(), torch.tensor([slope, -slope]), rtol=1e-6, atol=0.0)
