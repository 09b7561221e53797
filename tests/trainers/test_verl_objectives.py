"""Our objectives against verl's own functions: value and gradient of one batch, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from checks import check_number
from drivers import verl as verl_driver
from modes import DEFAULT_MODE
from objective_batch import (
    BATCH,
    NO_TOKENS,
    RESPONSES,
    ROUNDING,
    TOKENS,
    WIDTH,
    Batch,
    Result,
    changed_token,
    check,
    clipped_share,
    ours,
)
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

import gspo_kernels
from gspo_kernels import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    GRPO,
    GSPO,
    PPO,
    SAPO,
    TOPR,
    GSPOToken,
    Objective,
    Terms,
    TokenBatch,
    TopEntropy,
    TOPRToken,
)
from gspo_kernels.integrations import verl as integration

pytestmark = DEFAULT_MODE

# --- verl's functions -------------------------------------------------------------------------------------------------

VERL_MODES: dict[str, dict[str, Any]] = {
    "token-mean": {"aggregation": "token_mean"},
    "token-sum": {"aggregation": "token_mean", "normalizer": 1.0},
    "seq-mean-token-mean": {"aggregation": "sequence_mean"},
    "seq-mean-token-sum": {"aggregation": "sequence_sum"},
    "seq-mean-token-sum-norm": {"aggregation": "sequence_sum", "normalizer": float(RESPONSES * WIDTH)},
}


def verl(
    name: str,
    mode: str = "token-mean",
    batch: Batch = BATCH,
    *,
    by_token: bool = True,
    weights: Tensor | None = None,
    **changes: Any,
) -> tuple[Result, dict[str, float]]:
    """A loss of verl's registry, and its metrics; `changes`: fields of the actor's config, or of the loss's in it."""
    inner = {field: changes.pop(field) for field in list(changes) if field in PolicyLossConfig.__dataclass_fields__}
    config = ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4, policy_loss=PolicyLossConfig(**inner), **changes
    )
    logprobs = batch.logprobs.clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=batch.old_logprobs,
        log_prob=logprobs,
        advantages=batch.token_advantages if by_token else batch.spread_advantages(),
        response_mask=batch.mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    assert logprobs.grad is not None
    return (loss.detach(), logprobs.grad), metrics


# By name: our objective, and verl's options for the same.
VERL: dict[str, tuple[Objective, dict[str, Any]]] = {
    "vanilla": (GRPO(0.2, 0.28, 3.0), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),  # c = 3 unless told otherwise
    "gspo": (GSPOToken(0.2, 0.28), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
    "cispo": (CISPO(0.2, 0.28), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
    "dppo_tv": (DPPO(0.15, 0.2, 3.0), {"clip_ratio_low": 0.15, "clip_ratio_high": 0.2}),
    "dppo_kl": (DPPO(0.03, 0.05, 2.0, "kl"), {"clip_ratio_low": 0.03, "clip_ratio_high": 0.05, "clip_ratio_c": 2.0}),
    "dro": (DRO(0.3), {"dro_beta": 0.3}),
    "gpg": (DRO(0.0), {}),
}

# By verl's name: ours in its registry, and settings that both read.
REGISTERED: dict[str, tuple[str, dict[str, Any]]] = {
    "vanilla": ("grpo_kernels", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
    "gspo": ("gspo_token_kernels", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": None}),
    "cispo": ("cispo_kernels", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
    "dppo_tv": ("dppo_tv_kernels", {"clip_ratio": 0.15, "clip_ratio_low": None, "clip_ratio_high": None}),
    "dppo_kl": ("dppo_kl_kernels", {"clip_ratio_low": 0.03, "clip_ratio_high": 0.05, "clip_ratio_c": 2.0}),
    "sapo": ("sapo_kernels", {"tau_pos": 1.5, "tau_neg": 2.5}),
    "geo_mean": ("gmpo_kernels", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
    "dro": ("dro_kernels", {"dro_beta": 0.3}),
    "gpg": ("dro_kernels", {"dro_beta": 0.0}),
}
GLOBAL = {"dp_size": 4, "batch_num_tokens": 960, "global_batch_size": 40, "loss_scale_factor": 20}
ONE_MODE = ("sapo", "geo_mean")  # verl's ignore loss_agg_mode
REGISTERED_IN_MODES = [
    (name, mode) for name in REGISTERED for mode in VERL_MODES if name not in ONE_MODE or mode == "seq-mean-token-mean"
]


def test_every_objective_is_registered() -> None:
    """Under one name, or one for each of its choices. TopEntropy needs entropies, which verl passes to no loss."""
    of_package = {x for x in vars(gspo_kernels).values() if isinstance(x, type) and issubclass(x, Objective)}
    config = ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4, policy_loss=PolicyLossConfig(dro_beta=0.1)
    )
    made = {name: make(config) for name, make in integration.LOSSES.items()}
    assert {type(x) for x in made.values()} == of_package - {Objective, TopEntropy}
    assert {"gspo_kernels", "gspo_token_kernels", "topr_token_kernels", "ppo_kernels"} < set(made)
    assert {ours for ours, _ in REGISTERED.values()} < set(made) <= set(POLICY_LOSS_REGISTRY)
    assert (made["dppo_tv_kernels"], made["dppo_kl_kernels"]) == (
        DPPO(0.2, 0.2, 3.0, "tv"), DPPO(0.2, 0.2, 3.0, "kl")
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize(("name", "mode"), REGISTERED_IN_MODES)
def test_registered(name: str, mode: str, info: dict[str, Any], weighted: bool) -> None:
    """Ours and verl's by their names in verl's registry, with one config, global counts and rollout weights."""
    own_mode, settings = REGISTERED[name]
    by_response = name == "geo_mean"  # verl has there one advantage and one weight per response, and no global count
    weights = 0.5 + BATCH.entropy / BATCH.entropy.max() if weighted else None
    if by_response:
        info, weights = {}, weights if weights is None else weights[:, :1].expand(weights.shape)
    given: dict[str, Any] = {"by_token": not by_response, "weights": weights, **settings}
    theirs, their_metrics = verl(name, mode, global_batch_info=dict(info), **given)
    mine, metrics = verl(own_mode, mode, global_batch_info=dict(info), **given)
    check(mine, theirs, 1e-7 if by_response else ROUNDING)  # verl adds 1e-10 to each weight
    if "actor/ppo_kl" in their_metrics:
        check_number("ppo_kl", metrics["actor/ppo_kl"], their_metrics["actor/ppo_kl"], 1e-7)
    if name in ("vanilla", "gspo"):  # others count other tokens: see below
        assert metrics["actor/pg_clipfrac"] > 0
        for key in ("actor/pg_clipfrac", "actor/pg_clipfrac_lower"):
            check_number(key, metrics[key], their_metrics[key], 1e-6)


@pytest.mark.parametrize(("name", "objective"), [("topr_kernels", TOPR()), ("topr_token_kernels", TOPRToken())])
@pytest.mark.parametrize("mode", VERL_MODES)
def test_registered_without_a_counterpart(name: str, objective: Objective, mode: str) -> None:
    found, metrics = verl(name, mode)
    check(found, ours(objective, by_token=True, **VERL_MODES[mode]))
    assert 0 < metrics["actor/gspo_kernels/clip_fraction"] == pytest.approx(metrics["actor/pg_clipfrac"])


def test_settings_are_refused_by_verls_names() -> None:
    for name, field, value in (
        ("dro_kernels", "dro_beta", None), ("dro_kernels", "dro_beta", -1.0), ("cispo_kernels", "clip_ratio_low", -0.1),
        ("gmpo_kernels", "clip_ratio_high", math.nan), ("dppo_tv_kernels", "clip_ratio_c", 0.5),
        ("ppo_kernels", "clip_ratio_c", 1.0), ("sapo_kernels", "tau_neg", 0.0),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=rf"^(policy_loss\.)?{field}: expected "):
            verl(name, **{field: value})


@pytest.mark.parametrize("mode", VERL_MODES)
@pytest.mark.parametrize("name", VERL)
def test_verl(name: str, mode: str) -> None:
    objective, options = VERL[name]
    theirs, _ = verl(name, mode, **options)
    check(ours(objective, by_token=True, **VERL_MODES[mode]), theirs)


def test_verl_sapo_has_one_aggregation() -> None:
    """verl's `sapo` ignores `loss_agg_mode`."""
    for mode in ("token-mean", "seq-mean-token-mean"):
        theirs, _ = verl("sapo", mode, tau_pos=1.5, tau_neg=2.5)
        check(ours(SAPO(1.5, 2.5), by_token=True), theirs)
    check(ours(SAPO(), by_token=True), verl("sapo")[0])  # the defaults are the same


def test_verl_geo_mean() -> None:
    """verl has one advantage per response there: the mean of those of its tokens."""
    for name in ("token-mean", "seq-mean-token-sum"):  # ignored
        theirs, _ = verl("geo_mean", name, by_token=False, clip_ratio_low=0.4, clip_ratio_high=0.4)
        check(ours(GMPO()), theirs)
    theirs, _ = verl("geo_mean", by_token=False, clip_ratio_low=0.2, clip_ratio_high=0.9)
    check(ours(GMPO(0.2, 0.9)), theirs)


@pytest.mark.parametrize(
    ("combination", "name", "mode", "objective", "options"),
    [
        ("DAPO", "vanilla", "token-mean", PPO(0.2, 0.28, 10.0), {}),
        ("Dr. GRPO", "vanilla", "seq-mean-token-sum-norm", GRPO(0.2, 0.28, 10.0),
         {"aggregation": "token_mean", "normalizer": float(RESPONSES * WIDTH)}),
        ("BNPO", "vanilla", "token-mean", GRPO(0.2, 0.28, 10.0), {"aggregation": "token_mean"}),
        ("LUSPO", "gspo", "seq-mean-token-sum", GSPO(0.2, 0.28), {"aggregation": "sequence_sum"}),
    ],
)  # fmt: skip
def test_verl_combinations(combination: str, name: str, mode: str, objective: Objective, options: Any) -> None:
    theirs, _ = verl(name, mode, by_token=False, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=10.0)
    check(ours(objective, **options), theirs)


# --- masks over the batch: a user's objectives ------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipCov(Objective):
    """Clip-Cov (arXiv 2505.22617): PPO, without the tokens that have a large covariance of advantage and logprob."""

    lowest: float = 1.0
    highest: float = 5.0

    aggregation: ClassVar[str] = "token_mean"
    uses_logprobs: ClassVar[bool] = True

    def terms(self, tokens: TokenBatch) -> Terms:
        clipped = PPO(0.2, 0.28).terms(tokens)
        covariance = covariances(tokens)
        within = (covariance > self.lowest) & (covariance < self.highest)
        within &= ~(clipped.clipped_low | clipped.clipped_high)  # type: ignore[operator]
        return Terms(torch.where(within, 0.0, clipped.loss), clipped.log_ratio, None, within)


@dataclass(frozen=True)
class KLCov(Objective):
    """KL-Cov (arXiv 2505.22617): a penalty on the log-ratio of the tokens with the largest covariances."""

    share: float = 0.2
    penalty: float = 1.0

    aggregation: ClassVar[str] = "token_mean"
    uses_logprobs: ClassVar[bool] = True

    def terms(self, tokens: TokenBatch) -> Terms:
        covariance = covariances(tokens).masked_fill(~tokens.layout.mask, -torch.inf)
        count = (self.share * tokens.layout.num_tokens).floor().clamp(min=1)
        chosen = covariance.argsort(descending=True).argsort() < count
        penalty = torch.where(chosen, self.penalty * tokens.log_ratio.abs(), 0.0)
        return Terms(penalty - tokens.log_ratio.exp() * tokens.advantages, tokens.log_ratio)


def covariances(tokens: TokenBatch) -> Tensor:
    """(A - mean A) (l - mean l) per token, over the tokens that count; masked tokens have zeros."""
    advantages, logprobs, count = tokens.advantages, tokens.logprobs.detach(), tokens.layout.num_tokens
    return (advantages - advantages.sum() / count) * (logprobs - logprobs.sum() / count)


def test_verl_clip_cov() -> None:
    """verl, and SkyRL with the same code, draw the tokens at random: here so many that all of the range are drawn."""
    options = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_cov_lb": 0.2, "clip_cov_ub": 1.0}
    theirs, metrics = verl("clip_cov", clip_cov_ratio=1.0, **options)
    check(ours(ClipCov(0.2, 1.0), by_token=True), theirs)
    assert 0.05 < metrics["actor/pg_clipfrac"] < 0.5


@pytest.mark.parametrize(("share", "penalty"), [(0.2, 1.0), (0.0002, 0.1)], ids=["SkyRL", "verl"])
def test_verl_kl_cov(share: float, penalty: float) -> None:
    """With the defaults of both: SkyRL penalizes a fifth of the tokens, verl one in 5000."""
    theirs, _ = verl("kl_cov", kl_cov_ratio=share, ppo_kl_coef=penalty)
    check(ours(KLCov(share, penalty), by_token=True), theirs)


# --- on a bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [-1, 1])
def test_a_log_ratio_on_a_bound_of_geo_mean_is_not_clipped(side: int) -> None:
    batch = changed_token(logprobs=-1.0 + 0.25 * side, old_logprobs=-1.0)
    batch = batch._replace(advantages=batch.advantages.abs() * side)
    for objective, held in ((GMPO(0.25, 0.25), False), (GMPO(0.249, 0.249), True)):
        of_verl = {"clip_ratio_low": objective.eps_low, "clip_ratio_high": objective.eps_high}
        found = ours(objective, batch)
        assert (float(found[1][3, 5]) == 0) is held
        check(found, verl("geo_mean", batch=batch, by_token=False, **of_verl)[0])


@pytest.mark.parametrize("side", [-1, 1])
def test_a_probability_on_a_bound_of_dppo_is_kept(side: int) -> None:
    batch = changed_token(logprobs=-1.0 + 0.25 * side, old_logprobs=-1.0, token_advantages=1.0 * side)
    delta = float((batch.logprobs[3, 5].exp() - batch.old_logprobs[3, 5].exp()).abs())
    for bound, dropped in ((delta, False), (math.nextafter(delta, 0.0), True)):
        found = ours(DPPO(bound, bound, 3.0), batch, by_token=True)
        assert (float(found[1][3, 5]) == 0) is dropped
        check(found, verl("dppo_tv", batch=batch, clip_ratio_low=bound, clip_ratio_high=bound)[0])


# --- where results differ, on purpose ---------------------------------------------------------------------------------


def test_verl_holds_log_ratios_at_minus_20_too() -> None:
    """verl has no gradient beyond 20 on either side; here ratios saturate above alone, and below they are exact."""
    batch = changed_token(logprobs=-25.5, old_logprobs=-0.5, token_advantages=1.0)
    (_, theirs), _ = verl("vanilla", batch=batch)
    _, gradient = ours(PPO(0.2, 0.2, 3.0), batch, by_token=True)
    assert float(theirs[3, 5]) == 0
    check_number("gradient", float(gradient[3, 5]), -math.exp(-25) / TOKENS, 1e-25)


def test_verl_dro_has_no_bound_on_the_log_ratio() -> None:
    """Here the squared log-ratio is constant beyond `max_log_ratio`, which is 20 unless told otherwise."""
    batch = changed_token(logprobs=-5.0, old_logprobs=-30.0, token_advantages=0.5)
    (_, theirs), _ = verl("dro", batch=batch, dro_beta=0.3)
    check_number("verl", float(theirs[3, 5]), (0.3 * 25 - 0.5) / TOKENS, 1e-12)
    check_number("here", float(ours(DRO(0.3), batch, by_token=True)[1][3, 5]), -0.5 / TOKENS, 1e-12)
    same = ours(DRO(0.3), batch, by_token=True, max_log_ratio=30.0)[1]
    check_number("with a larger bound", float(same[3, 5]), float(theirs[3, 5]), 1e-12)


def test_verl_truncates_dppo_at_3_unless_told_otherwise() -> None:
    """Its `clip_ratio_c` is shared with the dual clip, whose default is 3. Here `max_ratio` is 10, as the authors'."""
    theirs, _ = verl("dppo_tv", clip_ratio_low=0.15, clip_ratio_high=0.15)
    check(ours(DPPO(max_ratio=3.0), by_token=True), theirs)
    assert float((ours(DPPO(), by_token=True)[1] - theirs[1]).abs().max()) > 1e-3
    large, _ = verl("dppo_tv", clip_ratio_low=0.15, clip_ratio_high=0.15, clip_ratio_c=1e4)
    check(ours(DPPO(max_ratio=None), by_token=True), large)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_tokens_that_dppo_truncates_are_counted(name: str) -> None:
    """verl's `pg_clipfrac_lower` for DPPO: the ratio is above `clip_ratio_c`, and the token is not dropped."""
    settings = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 1.2}
    _, theirs = verl(name, **settings)
    _, metrics = verl(f"{name}_kernels", **settings)
    assert theirs["actor/pg_clipfrac_lower"] > 0.05
    check_number(name, metrics["actor/pg_clipfrac_lower"], theirs["actor/pg_clipfrac_lower"], 1e-6)
    assert verl(f"{name}_kernels", **settings | {"clip_ratio_c": None})[1]["actor/pg_clipfrac_lower"] == 0


def test_verl_adds_1e_8_in_the_binary_kl() -> None:
    """Of a token with probability 1 - 1e-12 the divergence is 1.2; verl (and SkyRL) find 0.72."""
    batch = changed_token(logprobs=math.log1p(-1e-12), old_logprobs=math.log(0.95), token_advantages=1.0)
    (_, theirs), _ = verl("dppo_kl", batch=batch, clip_ratio_low=1.0, clip_ratio_high=1.0)
    _, gradient = ours(DPPO(1.0, 1.0, 3.0, "kl"), batch, by_token=True)
    assert float(theirs[3, 5]) < 0 and float(gradient[3, 5]) == 0


def test_verl_counts_clipped_tokens_whose_advantage_is_0() -> None:
    """Here a token is clipped only if the bound changes its loss."""
    for name, objective, options in (
        ("cispo", CISPO(0.2, 0.2), {}),
        ("dppo_tv", DPPO(0.15, 0.15, 3.0), {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15}),
    ):
        _, metrics = verl(name, **options)
        clip_fraction, of_zero = clipped_share(objective), 0
        nothing = BATCH.mask & (BATCH.token_advantages == 0)
        if name == "cispo":
            of_zero = int((nothing & ((BATCH.log_ratio.exp() - 1).abs() > 0.2)).sum())
        else:  # judged as a negative advantage
            of_zero = int((nothing & (BATCH.logprobs.exp() - BATCH.old_logprobs.exp() < -0.15)).sum())
        assert of_zero > 0
        check_number(name, metrics["actor/pg_clipfrac"], clip_fraction + of_zero / TOKENS, 1e-6)


def test_verl_counts_geo_mean_tokens_that_the_minimum_leaves_alone() -> None:
    """Whatever side of the clip range a log-ratio is on; here only the side that the advantage penalizes."""
    _, metrics = verl("geo_mean", by_token=False, clip_ratio_low=0.4, clip_ratio_high=0.4)
    both = metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"]
    outside = (BATCH.log_ratio.abs() > 0.4) & BATCH.mask & (BATCH.spread_advantages() != 0)
    check_number("verl", both, float(outside.sum()) / TOKENS, 1e-6)
    penalized = outside & (BATCH.log_ratio.sign() == BATCH.spread_advantages().sign())
    check_number("here", clipped_share(GMPO(), by_token=False), float(penalized.sum()) / TOKENS, 1e-6)


def test_verl_geo_mean_counts_responses_without_a_token() -> None:
    theirs, _ = verl("geo_mean", batch=NO_TOKENS, by_token=False, clip_ratio_low=0.4, clip_ratio_high=0.4)
    check(ours(GMPO(), NO_TOKENS, normalizer=float(RESPONSES)), theirs)
    assert abs(float(ours(GMPO(), NO_TOKENS)[0] / theirs[0]) - RESPONSES / (RESPONSES - 1)) < 1e-12


# --- the driver of the first ten steps --------------------------------------------------------------------------------


def test_the_driver_calls_verls_loss() -> None:
    """Of a `Batch` of docs/scripts/first_steps.py: GSPO by its formula, and the names that verl logs."""
    mask = torch.arange(WIDTH) < BATCH.mask.sum(1, keepdim=True)
    leaf = BATCH.logprobs.clone().requires_grad_()
    batch = SimpleNamespace(
        logprobs=leaf, old_logprobs=BATCH.old_logprobs, advantages=BATCH.advantages, mask=mask, group_size=4,
        token_ids=torch.zeros(mask.shape, dtype=torch.int64), global_tokens=int(mask.sum()), global_responses=RESPONSES,
    )  # fmt: skip
    loss, metrics = verl_driver.step(batch)
    loss.backward()
    assert leaf.grad is not None
    check((loss.detach(), leaf.grad), ours(GSPO(dual_clip=10.0), BATCH._replace(mask=mask)))
    assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/gspo_kernels/clip_fraction"} <= set(metrics)
    assert metrics["actor/pg_loss"] == pytest.approx(float(loss))
