"""Our objectives against the losses of TRL, verl and prime-rl: value and gradient of one batch, in float64.

TRL's and verl's own functions are called where they are installed. prime-rl's formula is written here again, in plain
torch, from its source

    PrimeIntellect-ai/prime-rl 559b4477, src/prime_rl/trainer/rl/loss.py

The batch has ratios on both sides of every bound, advantages of both signs and of 0, ragged responses, and tokens in
the middle of a response that do not count. Where a result differs on purpose, a test shows by how much.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from checks import check_close, check_number
from modes import DEFAULT_MODE
from torch import Tensor

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
    policy_loss_from_logprobs,
)

pytestmark = [DEFAULT_MODE, pytest.mark.filterwarnings("ignore")]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
needs_verl = pytest.mark.skipif(find_spec("verl") is None, reason="needs verl: pip install gspo-kernels[verl]")
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]")

ROUNDING = 1e-13  # of float64, relative to the largest gradient of a token

Result = tuple[Tensor, Tensor]  # the loss, and its gradient by the log-probabilities


# --- the batch --------------------------------------------------------------------------------------------------------

# Beside the clip ranges 0.2, 0.28 and 4 of ratios, 0.4 of log-ratios, and the bounds 2.5, 3 and 5 of ratios.
LOG_RATIOS = (
    -3.0, -1.7, -0.9, -0.5, -0.41, -0.39, -0.23, -0.22, -0.1, -0.01, 0.0, 0.01, 0.1, 0.18, 0.19, 0.24, 0.25, 0.39, 0.41,
    0.9, 0.92, 1.09, 1.11, 1.6, 1.62, 3.0,
)  # fmt: skip
LENGTHS = (16, 1, 9, 16, 13, 3, 15, 7, 16, 12, 8, 16)
ADVANTAGES = (1.3, -0.7, 0.0, 2.1, -1.6, 0.4, -0.2, 0.9, -1.1, 0.6, -0.5, -2.3)
DRIFTS = (-0.2, 0.3, 0.0, 0.2, 0.1, 0.5, -0.8, 0.2, 0.4, 0.1, -0.3, -0.4)  # of a response's log-ratios


class Batch(NamedTuple):
    """[responses, width] but for `advantages`; finite garbage where the mask is False."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    mask: Tensor
    advantages: Tensor  # [responses]
    token_advantages: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return self.logprobs - self.old_logprobs

    def spread_advantages(self) -> Tensor:
        return self.advantages[:, None].expand(self.mask.shape)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(21)
    rows, width = len(LENGTHS), max(LENGTHS)

    def random() -> Tensor:
        return torch.rand(rows, width, generator=generator, dtype=torch.float64)

    each = torch.tensor(LOG_RATIOS, dtype=torch.float64)
    order = torch.randperm(rows * width, generator=generator)
    log_ratio = each[order % len(each)].view(rows, width) + torch.tensor(DRIFTS, dtype=torch.float64)[:, None]
    higher = (0.02 + 0.97 * random()).log()  # the larger of the two probabilities of a token
    logprobs = higher + log_ratio.clamp(max=0)
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = mask[4, 1] = mask[9, 0] = False  # what a tool returned
    signs = torch.randint(-1, 2, (rows, width), generator=generator)
    return Batch(
        logprobs=logprobs,
        old_logprobs=logprobs - log_ratio,
        ref_logprobs=(logprobs + 0.3 * (random() - 0.5)).clamp(max=0),
        entropy=(random() * 200).round() / 64,  # exact in float32
        mask=mask,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64),
        token_advantages=signs * (0.1 + random()),
    )


BATCH = make_batch()
TOKENS, RESPONSES, WIDTH = int(BATCH.mask.sum()), len(LENGTHS), max(LENGTHS)


def ours(objective: Objective, batch: Batch = BATCH, *, by_token: bool = False, **options: Any) -> Result:
    logprobs = batch.logprobs.clone().requires_grad_()
    advantages = batch.token_advantages if by_token else batch.advantages
    loss, _ = policy_loss_from_logprobs(
        logprobs, advantages, batch.old_logprobs, objective=objective, mask=batch.mask, **options
    )
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad


def check(actual: Result, expected: Result, error: float = ROUNDING) -> None:
    """Each token's gradient relative to its own size, but for what cancels; the loss relative to the gradients."""
    (loss, gradient), (expected_loss, expected_gradient) = actual, expected
    largest = float(expected_gradient.abs().max())
    assert largest > 1e-4
    check_close("gradient", gradient, expected_gradient, error * (expected_gradient.abs() + largest))
    check_number("loss", float(loss), float(expected_loss), error * TOKENS * largest)


def test_the_batch_has_ratios_on_both_sides_of_every_bound() -> None:
    def on_both_sides(values: Tensor, bound: float, advantages: Tensor) -> None:
        for sign in (-1, 1):
            chosen = values[advantages.sign() == sign]
            assert bool((chosen < bound).any()) and bool((chosen > bound).any()), (bound, sign)

    mask, ratio, p, q = BATCH.mask, BATCH.log_ratio.exp(), BATCH.logprobs.exp(), BATCH.old_logprobs.exp()
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    for advantages in (BATCH.spread_advantages(), BATCH.token_advantages):
        assert bool((mask & (advantages == 0) & (ratio != 1)).any())
        for bound in (0.8, 1.2, 1.28, math.exp(-0.4), math.exp(0.4), 2.5, 3, 5):
            on_both_sides(ratio[mask], bound, advantages[mask])
        for bound in (-0.2, -0.15, 0.15, 0.2):
            on_both_sides((p - q)[mask], bound, advantages[mask])
        for moved in (p > q, p < q):
            on_both_sides(kl[mask & moved], 0.05, advantages[mask & moved])
    means = (BATCH.log_ratio * mask).sum(1) / mask.sum(1)
    for sign in (-1, 1):
        chosen = means[BATCH.advantages.sign() == sign].exp()
        assert bool((chosen < 0.8).any() | (sign > 0)) and bool((chosen > 1.28).any())
        assert bool(((chosen > 0.8) & (chosen < 1.2)).any())


# --- verl's functions -------------------------------------------------------------------------------------------------

VERL_MODES: dict[str, dict[str, Any]] = {
    "token-mean": {"aggregation": "token_mean"},
    "token-sum": {"aggregation": "token_mean", "normalizer": 1.0},
    "seq-mean-token-mean": {"aggregation": "sequence_mean"},
    "seq-mean-token-sum": {"aggregation": "sequence_sum"},
    "seq-mean-token-sum-norm": {"aggregation": "sequence_sum", "normalizer": float(RESPONSES * WIDTH)},
}


def verl(
    name: str, mode: str = "token-mean", batch: Batch = BATCH, *, by_token: bool = True, **changes: Any
) -> tuple[Result, dict[str, float]]:
    """A loss of verl's registry, and its metrics; `changes`: fields of the actor's config, or of the loss's in it."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig, PolicyLossConfig

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


@needs_verl
@pytest.mark.parametrize("mode", VERL_MODES)
@pytest.mark.parametrize("name", VERL)
def test_verl(name: str, mode: str) -> None:
    objective, options = VERL[name]
    theirs, _ = verl(name, mode, **options)
    check(ours(objective, by_token=True, **VERL_MODES[mode]), theirs)


@needs_verl
def test_verl_sapo_has_one_aggregation() -> None:
    """verl's `sapo` ignores `loss_agg_mode`."""
    for mode in ("token-mean", "seq-mean-token-mean"):
        theirs, _ = verl("sapo", mode, tau_pos=1.5, tau_neg=2.5)
        check(ours(SAPO(1.5, 2.5), by_token=True), theirs)
    check(ours(SAPO(), by_token=True), verl("sapo")[0])  # the defaults are the same


@needs_verl
def test_verl_geo_mean() -> None:
    """verl has one advantage per response there: the mean of those of its tokens."""
    for name in ("token-mean", "seq-mean-token-sum"):  # ignored
        theirs, _ = verl("geo_mean", name, by_token=False, clip_ratio_low=0.4, clip_ratio_high=0.4)
        check(ours(GMPO()), theirs)
    theirs, _ = verl("geo_mean", by_token=False, clip_ratio_low=0.2, clip_ratio_high=0.9)
    check(ours(GMPO(0.2, 0.9)), theirs)


@needs_verl
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


# --- TRL's trainers ---------------------------------------------------------------------------------------------------


class OneProcess:
    """What TRL's losses call of an accelerator."""

    num_processes = 1

    def gather(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values

    def pad_across_processes(self, values: Tensor, dim: int, pad_index: float) -> Tensor:
        return values


def trl(loss_type: str, batch: Batch = BATCH, **changes: Any) -> tuple[Result, dict[str, float]]:
    """TRL's own `_compute_loss`, on a trainer that has log-probabilities in place of a model; and its metrics.

    `changes`: names of GRPOConfig.
    """
    from trl import GRPOTrainer
    from trl.experimental.gmpo import GMPOTrainer

    options: dict[str, Any] = {
        "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28, "delta": None, "importance_sampling_level": "token",
        "use_bias_correction_kl": True, "top_entropy_quantile": 1.0, "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05, "steps_per_generation": 1, "max_completion_length": WIDTH + 3,
    } | changes  # fmt: skip
    logprobs = batch.logprobs.clone().requires_grad_()
    trainer: Any = object.__new__(GMPOTrainer if loss_type == "gmpo" else GRPOTrainer)
    vars(trainer).update(
        {name: options[name] for name in ("beta", "top_entropy_quantile", "importance_sampling_level")},
        args=SimpleNamespace(**options),
        loss_type=loss_type,
        epsilon_low=options["epsilon"],
        epsilon_high=options["epsilon_high"],
        max_completion_length=options["max_completion_length"],
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=OneProcess(),
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, batch.entropy, None),
    )
    nothing = torch.zeros(len(batch.mask), 0, dtype=torch.int64)
    ids = torch.zeros(batch.mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": ids, "completion_mask": batch.mask.long(),
        "advantages": batch.advantages, "old_per_token_logps": batch.old_logprobs,
        "ref_per_token_logps": batch.ref_logprobs, "num_items_in_batch": batch.mask.sum(),
    }  # fmt: skip
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert logprobs.grad is not None
    return (loss.detach(), logprobs.grad), {name: x[-1] for name, x in trainer._metrics["train"].items()}


AS_FLOAT32 = float(torch.tensor(1.05))  # torch.where of two numbers is float32: so is TRL's temperature

# By loss type and level: our objective and options, and TRL's options for the same.
TRL: dict[str, tuple[str, Objective, dict[str, Any], dict[str, Any]]] = {
    "grpo": ("grpo", GRPO(0.2, 0.28), {"aggregation": "sequence_mean"}, {}),
    "grpo, delta": ("grpo", GRPO(0.2, 0.28, 2.5), {}, {"delta": 2.5}),
    "gspo": ("grpo", GSPO(0.2, 0.28), {"aggregation": "sequence_mean"}, {"importance_sampling_level": "sequence"}),
    "gspo, delta": ("grpo", GSPO(0.2, 0.28, 1.3), {}, {"importance_sampling_level": "sequence", "delta": 1.3}),
    "bnpo": ("bnpo", GRPO(0.2, 0.28), {"aggregation": "token_mean"}, {}),
    "dapo": ("dapo", GRPO(0.2, 0.28), {"aggregation": "token_mean", "normalizer": float(TOKENS)}, {}),
    "dr_grpo": (
        "dr_grpo", GRPO(0.2, 0.28),
        {"aggregation": "token_mean", "normalizer": float(RESPONSES * (WIDTH + 3))}, {},
    ),
    "luspo": ("luspo", GSPO(0.2, 0.28), {"aggregation": "sequence_sum"}, {"importance_sampling_level": "sequence"}),
    "cispo": ("cispo", CISPO(1.0, 4.0), {}, {"epsilon_high": 5.0}),  # the bound itself, and none below
    "sapo": ("sapo", SAPO(1.0, AS_FLOAT32), {}, {"sapo_temperature_neg": 1.05}),
    "gmpo": ("gmpo", GMPO(), {}, {"epsilon": 0.4, "epsilon_high": 0.4}),
}  # fmt: skip


@needs_trl
@pytest.mark.parametrize("kl_weighting", [None, "none", "ratio"])
@pytest.mark.parametrize("case", TRL)
def test_trl(case: str, kl_weighting: str | None) -> None:
    """Without KL, with it, and with TRL's default: the KL term times the ratio."""
    loss_type, objective, options, changes = TRL[case]
    if kl_weighting is not None:
        if loss_type == "gmpo" and kl_weighting == "ratio":
            pytest.skip("GMPOTrainer ignores use_bias_correction_kl")
        changes = changes | {"beta": 0.3, "use_bias_correction_kl": kl_weighting == "ratio"}
        options = options | {"beta": 0.3, "ref_logprobs": BATCH.ref_logprobs, "kl_weighting": kl_weighting}
    check(ours(objective, **options), trl(loss_type, **changes)[0])


def top_entropy(share: float) -> Tensor:
    """Bool [responses, width]: the tokens whose entropy is at least the quantile of all tokens that count."""
    ordered = sorted(BATCH.entropy[BATCH.mask].tolist())
    position = (1 - share) * (len(ordered) - 1)
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    return BATCH.mask & (BATCH.entropy >= below + (position % 1) * (above - below))


@needs_trl
@pytest.mark.parametrize("share", [0.2, 0.65])
@pytest.mark.parametrize("case", [case for case in TRL if case != "gmpo"])
def test_trl_top_entropy_quantile(case: str, share: float) -> None:
    """TRL leaves the other tokens out of the policy term. They keep their KL term, and count in every mean.

    With a ratio per token that is `TopEntropy`. With one per response, the share of chosen tokens weighs the loss of
    the response, and its gradient goes to all of its tokens: `TopEntropy(GSPOToken())` gives it to the chosen ones.
    """
    loss_type, objective, options, changes = TRL[case]
    chosen = top_entropy(share)
    assert abs(float(chosen.sum()) / TOKENS - share) < 0.02
    kl = {"beta": 0.3, "ref_logprobs": BATCH.ref_logprobs, "kl_weighting": "ratio"}
    theirs, _ = trl(loss_type, **changes, top_entropy_quantile=share, beta=0.3)
    check(ours(objective, **options, **kl, importance_weights=chosen.double()), theirs)
    if objective.ratio_of == "token":
        check(ours(TopEntropy(objective, share), **options, **kl, entropy=BATCH.entropy), theirs)
    else:
        by_token = TopEntropy(GSPOToken(0.2, 0.28), share)
        _, gradient = ours(by_token, entropy=BATCH.entropy, aggregation=options.get("aggregation"))
        assert bool((gradient[~chosen] == 0).all()) and bool((theirs[1][~chosen & BATCH.mask] != 0).any())


@needs_trl
def test_trl_top_entropy_quantile_of_0_keeps_the_highest() -> None:
    """`TopEntropy` refuses a share of 0; a small one keeps the token of the highest entropy."""
    theirs, _ = trl("dapo", top_entropy_quantile=0.0)
    assert int((theirs[1] != 0).sum()) <= int(top_entropy(0.0).sum()) == 1
    check(ours(GRPO(0.2, 0.28), aggregation="token_mean", importance_weights=top_entropy(0.0).double()), theirs)
    with pytest.raises(ValueError, match="share: expected"):
        TopEntropy(GRPO(), 0.0)


@needs_trl
def test_trl_top_entropy_quantile_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is that of the rank. A rank of low entropies has no policy term in TRL."""
    high = torch.full((9 * TOKENS,), 100.0)
    monkeypatch.setattr(OneProcess, "gather", lambda self, values: torch.cat([values, high]))
    (_, gradient), _ = trl("dapo", top_entropy_quantile=0.2)
    assert bool((gradient == 0).all())
    assert bool((ours(TopEntropy(GRPO(), 0.2), entropy=BATCH.entropy)[1] != 0).any())


@needs_trl
def test_trl_top_entropy_quantile_of_gmpo() -> None:
    """There the other tokens are not part of the geometric mean either, as if they were masked."""
    chosen = top_entropy(0.65)
    theirs, _ = trl("gmpo", epsilon=0.4, epsilon_high=0.4, top_entropy_quantile=0.65)
    found = ours(GMPO(), BATCH._replace(mask=chosen), normalizer=float(RESPONSES))
    of_empty = BATCH.advantages[~chosen.any(1)].sum() / RESPONSES  # see test_trl_counts_responses_without_a_token
    check(found, (theirs[0] + of_empty, theirs[1]))


# --- formulas of others, written again --------------------------------------------------------------------------------


def of_formula(formula: Callable[[Tensor], Tensor], batch: Batch = BATCH) -> Result:
    """Value and gradient of a formula of the log-probabilities."""
    logprobs = batch.logprobs.clone().requires_grad_()
    loss = formula(logprobs)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad


def test_prime_rl_default_loss() -> None:
    """prime-rl's default: DPPO by probability, and a penalty of kl_tau times the squared log-ratio on every token.

    Ours is DPPO with the k2 estimator, half the squared log-ratio, of the policy that sampled. The value of the policy
    term differs: it is that of `-ratio A` there, and of `-sg[ratio] A logprob` here.
    """
    advantages, kl_tau = BATCH.token_advantages, 1e-3
    moved = BATCH.logprobs.exp() - BATCH.old_logprobs.exp()
    dropped = torch.where(advantages > 0, moved > 0.2, moved < -0.2)

    def formula(logprobs: Tensor) -> Tensor:
        log_ratio = logprobs - BATCH.old_logprobs
        policy = torch.where(dropped, 0.0, log_ratio.exp() * advantages)
        return (kl_tau * log_ratio**2 - policy)[BATCH.mask].sum() / TOKENS

    options: dict[str, Any] = {"beta": 2 * kl_tau, "kl_estimator": "k2", "ref_logprobs": BATCH.old_logprobs}
    loss, gradient = of_formula(formula)
    our_loss, our_gradient = ours(DPPO(0.2, 0.2, None), by_token=True, **options)
    check((loss, our_gradient), (loss, gradient))
    without, _ = ours(DPPO(0.2, 0.2, None), by_token=True)
    penalty = kl_tau * float(BATCH.log_ratio[BATCH.mask].square().mean())
    check_number("penalty", float(our_loss - without), penalty, 1e-14)


@pytest.mark.parametrize("objective", [TOPRToken(), TOPR()], ids=["token", "response"])
def test_roll_and_trinity_taper_tokens_and_the_paper_responses(objective: Objective) -> None:
    """Trinity's `topr` and ROLL's have a ratio per token.

    ROLL goes by the sign of the reward: it does not taper a good response that is worse than the mean of its group.
    """
    by_response = type(objective) is TOPR
    advantages = BATCH.spread_advantages()

    def formula(logprobs: Tensor, good: Tensor = advantages > 0) -> Tensor:
        log_ratio = logprobs.detach() - BATCH.old_logprobs
        if by_response:
            log_ratio = torch.where(BATCH.mask, log_ratio, 0.0).sum(1, keepdim=True)
        weight = torch.where(good, 1.0, log_ratio.exp().clamp(max=1.0))
        loss = (-weight * advantages * logprobs)[BATCH.mask].sum()
        return loss / (RESPONSES if by_response else TOKENS)

    found = ours(objective)
    check(found, of_formula(formula))
    if not by_response:  # as ROLL counts
        held_at_1 = BATCH.mask & (advantages < 0) & (BATCH.log_ratio > 0)
        check_number("clipped", clipped_share(objective, by_token=False), float(held_at_1.sum()) / TOKENS, 1e-6)
    _, of_rewards = of_formula(lambda logprobs: formula(logprobs, advantages > -1.0))
    assert float((of_rewards - found[1]).abs().max()) > 1e-3


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


@needs_verl
def test_verl_clip_cov() -> None:
    """verl, and SkyRL with the same code, draw the tokens at random: here so many that all of the range are drawn."""
    options = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_cov_lb": 0.2, "clip_cov_ub": 1.0}
    theirs, metrics = verl("clip_cov", clip_cov_ratio=1.0, **options)
    check(ours(ClipCov(0.2, 1.0), by_token=True), theirs)
    assert 0.05 < metrics["actor/pg_clipfrac"] < 0.5


@needs_verl
@pytest.mark.parametrize(("share", "penalty"), [(0.2, 1.0), (0.0002, 0.1)], ids=["SkyRL", "verl"])
def test_verl_kl_cov(share: float, penalty: float) -> None:
    """With the defaults of both: SkyRL penalizes a fifth of the tokens, verl one in 5000."""
    theirs, _ = verl("kl_cov", kl_cov_ratio=share, ppo_kl_coef=penalty)
    check(ours(KLCov(share, penalty), by_token=True), theirs)


# --- on a bound -------------------------------------------------------------------------------------------------------


def changed_token(**values: float) -> Batch:
    """The batch, but for one token in the middle of a response of advantage 2.1."""
    fields = {name: getattr(BATCH, name).clone() for name in values}
    for name, value in values.items():
        fields[name][3, 5] = value
    return BATCH._replace(**fields)


@needs_verl
@needs_trl
@pytest.mark.parametrize("side", [-1, 1])
def test_a_log_ratio_on_a_bound_of_gmpo_is_not_clipped(side: int) -> None:
    batch = changed_token(logprobs=-1.0 + 0.25 * side, old_logprobs=-1.0)
    batch = batch._replace(advantages=batch.advantages.abs() * side)
    for objective, held in ((GMPO(0.25, 0.25), False), (GMPO(0.249, 0.249), True)):
        bounds = {"epsilon": objective.eps_low, "epsilon_high": objective.eps_high}
        of_verl = {"clip_ratio_low": objective.eps_low, "clip_ratio_high": objective.eps_high}
        found = ours(objective, batch)
        assert (float(found[1][3, 5]) == 0) is held
        check(found, trl("gmpo", batch, **bounds)[0])
        check(found, verl("geo_mean", batch=batch, by_token=False, **of_verl)[0])


@needs_verl
@pytest.mark.parametrize("side", [-1, 1])
def test_a_probability_on_a_bound_of_dppo_is_kept(side: int) -> None:
    batch = changed_token(logprobs=-1.0 + 0.25 * side, old_logprobs=-1.0, token_advantages=1.0 * side)
    delta = float((batch.logprobs[3, 5].exp() - batch.old_logprobs[3, 5].exp()).abs())
    for bound, dropped in ((delta, False), (math.nextafter(delta, 0.0), True)):
        found = ours(DPPO(bound, bound, 3.0), batch, by_token=True)
        assert (float(found[1][3, 5]) == 0) is dropped
        check(found, verl("dppo_tv", batch=batch, clip_ratio_low=bound, clip_ratio_high=bound)[0])


# --- where results differ, on purpose ---------------------------------------------------------------------------------


def with_row(batch: Batch, row: int, **values: Any) -> Batch:
    """The batch with other numbers in one response."""
    changed = {}
    for name, value in values.items():
        changed[name] = getattr(batch, name).clone()
        changed[name][row] = value
    return batch._replace(**changed)


@needs_verl
def test_verl_holds_log_ratios_at_minus_20_too() -> None:
    """verl has no gradient beyond 20 on either side; here ratios saturate above alone, and below they are exact."""
    batch = changed_token(logprobs=-25.5, old_logprobs=-0.5, token_advantages=1.0)
    (_, theirs), _ = verl("vanilla", batch=batch)
    _, gradient = ours(PPO(0.2, 0.2, 3.0), batch, by_token=True)
    assert float(theirs[3, 5]) == 0
    check_number("gradient", float(gradient[3, 5]), -math.exp(-25) / TOKENS, 1e-25)


@needs_verl
def test_verl_dro_has_no_bound_on_the_log_ratio() -> None:
    """Here the squared log-ratio is constant beyond `max_log_ratio`, which is 20 unless told otherwise."""
    batch = changed_token(logprobs=-5.0, old_logprobs=-30.0, token_advantages=0.5)
    (_, theirs), _ = verl("dro", batch=batch, dro_beta=0.3)
    check_number("verl", float(theirs[3, 5]), (0.3 * 25 - 0.5) / TOKENS, 1e-12)
    check_number("here", float(ours(DRO(0.3), batch, by_token=True)[1][3, 5]), -0.5 / TOKENS, 1e-12)
    same = ours(DRO(0.3), batch, by_token=True, max_log_ratio=30.0)[1]
    check_number("with a larger bound", float(same[3, 5]), float(theirs[3, 5]), 1e-12)


@needs_verl
def test_verl_truncates_dppo_at_3_unless_told_otherwise() -> None:
    """Its `clip_ratio_c` is shared with the dual clip, whose default is 3. Here `max_ratio` is 10, as the authors'."""
    theirs, _ = verl("dppo_tv", clip_ratio_low=0.15, clip_ratio_high=0.15)
    check(ours(DPPO(max_ratio=3.0), by_token=True), theirs)
    assert float((ours(DPPO(), by_token=True)[1] - theirs[1]).abs().max()) > 1e-3
    large, _ = verl("dppo_tv", clip_ratio_low=0.15, clip_ratio_high=0.15, clip_ratio_c=1e4)
    check(ours(DPPO(max_ratio=None), by_token=True), large)


@needs_verl
def test_verl_adds_1e_8_in_the_binary_kl() -> None:
    """Of a token with probability 1 - 1e-12 the divergence is 1.2; verl (and SkyRL) find 0.72."""
    batch = changed_token(logprobs=math.log1p(-1e-12), old_logprobs=math.log(0.95), token_advantages=1.0)
    (_, theirs), _ = verl("dppo_kl", batch=batch, clip_ratio_low=1.0, clip_ratio_high=1.0)
    _, gradient = ours(DPPO(1.0, 1.0, 3.0, "kl"), batch, by_token=True)
    assert float(theirs[3, 5]) < 0 and float(gradient[3, 5]) == 0


@needs_verl
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


@needs_verl
def test_verl_counts_geo_mean_tokens_that_the_minimum_leaves_alone() -> None:
    """Whatever side of the clip range a log-ratio is on; here only the side that the advantage penalizes."""
    _, metrics = verl("geo_mean", by_token=False, clip_ratio_low=0.4, clip_ratio_high=0.4)
    both = metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"]
    outside = (BATCH.log_ratio.abs() > 0.4) & BATCH.mask & (BATCH.spread_advantages() != 0)
    check_number("verl", both, float(outside.sum()) / TOKENS, 1e-6)
    penalized = outside & (BATCH.log_ratio.sign() == BATCH.spread_advantages().sign())
    check_number("here", clipped_share(GMPO(), by_token=False), float(penalized.sum()) / TOKENS, 1e-6)


def clipped_share(objective: Objective, *, by_token: bool = True) -> float:
    advantages = BATCH.token_advantages if by_token else BATCH.advantages
    _, stats = policy_loss_from_logprobs(
        BATCH.logprobs, advantages, BATCH.old_logprobs, objective=objective, mask=BATCH.mask
    )
    return float(stats.clip_fraction)


NO_TOKENS = with_row(BATCH, 6, mask=False)


@needs_verl
def test_verl_geo_mean_counts_responses_without_a_token() -> None:
    theirs, _ = verl("geo_mean", batch=NO_TOKENS, by_token=False, clip_ratio_low=0.4, clip_ratio_high=0.4)
    check(ours(GMPO(), NO_TOKENS, normalizer=float(RESPONSES)), theirs)
    assert abs(float(ours(GMPO(), NO_TOKENS)[0] / theirs[0]) - RESPONSES / (RESPONSES - 1)) < 1e-12


@needs_trl
@pytest.mark.parametrize("case", ["grpo", "gspo", "luspo", "sapo", "gmpo"])
def test_trl_counts_responses_without_a_token(case: str) -> None:
    loss_type, objective, options, changes = TRL[case]
    (loss, gradient), _ = trl(loss_type, NO_TOKENS, **changes)
    if loss_type == "gmpo":  # the mean of no log-ratios is 0: the value, without a gradient, of a ratio of 1
        loss = loss + NO_TOKENS.advantages[6] / RESPONSES
    check(ours(objective, NO_TOKENS, **options, normalizer=float(RESPONSES)), (loss, gradient))
    assert abs(float(ours(objective, NO_TOKENS, **options)[0] / loss) - RESPONSES / (RESPONSES - 1)) < 1e-12


@needs_trl
def test_trl_cispo_counts_positive_advantages_alone() -> None:
    """Its weight is held for every sign. Here each held weight counts whose advantage is not 0."""
    _, metrics = trl("cispo", epsilon_high=5.0)
    held = BATCH.mask & (BATCH.log_ratio.exp() > 5)
    positive, any_sign = (float((held & x).sum()) / TOKENS for x in (
        BATCH.spread_advantages() > 0, BATCH.spread_advantages() != 0
    ))  # fmt: skip
    check_number("TRL", metrics["cispo_clip_ratio"], positive, 1e-6)
    check_number("here", clipped_share(CISPO(), by_token=False), any_sign, 1e-6)
    assert positive < any_sign


@needs_trl
def test_trl_cispo_means_the_bound_by_epsilon_high() -> None:
    """And takes GRPO's 0.28 for it, if it is not told otherwise: every weight is then at most 0.28."""
    check(ours(CISPO(1.0, math.inf), importance_weights=(0.28 / BATCH.log_ratio.exp()).clamp(max=1.0)), trl("cispo")[0])


@needs_trl
def test_trl_overflows_where_ratios_saturate_here() -> None:
    """A response is pushed back from a log-ratio of 800 by a finite gradient, or by none."""
    logprobs = torch.full_like(BATCH.old_logprobs[7], -0.5)
    batch = with_row(BATCH, 7, logprobs=logprobs, old_logprobs=logprobs - 800, advantages=-1.0)
    (loss, gradient), _ = trl("grpo", batch)
    assert not bool(loss.isfinite()) and bool(gradient[7].isinf().any() | gradient[7].isnan().any())
    for objective in (GRPO(0.2, 0.28), GSPO(0.2, 0.28), SAPO(), GMPO(), CISPO(), TOPRToken()):
        assert all(bool(x.isfinite().all()) for x in ours(objective, batch))


@needs_trl
def test_gmpo_of_trl_leaves_the_kl_term_unweighted() -> None:
    """`use_bias_correction_kl` is True by default; GMPOTrainer does not read it."""
    theirs, _ = trl("gmpo", epsilon=0.4, epsilon_high=0.4, beta=0.3, use_bias_correction_kl=True)
    kl = {"beta": 0.3, "ref_logprobs": BATCH.ref_logprobs}
    check(ours(GMPO(), **kl, kl_weighting="none"), theirs)
    assert float((ours(GMPO(), **kl, kl_weighting="ratio")[1] - theirs[1]).abs().max()) > 1e-4
