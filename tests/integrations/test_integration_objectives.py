"""Our objectives against the losses of TRL: value and gradient of one batch, in float64.

TRL's own functions are called where it is installed. Where a result differs on purpose, a test shows by how much. The
functions of verl and SkyRL are in tests/trainers.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import check_number
from modes import DEFAULT_MODE
from objective_batch import (
    BATCH,
    NO_TOKENS,
    RESPONSES,
    TOKENS,
    WIDTH,
    Batch,
    Result,
    changed_token,
    check,
    clipped_share,
    ours,
    with_row,
)
from torch import Tensor

from gspo_kernels import (
    CISPO,
    GMPO,
    GRPO,
    GSPO,
    SAPO,
    TOPR,
    GSPOToken,
    Objective,
    TopEntropy,
    TOPRToken,
)

pytestmark = [DEFAULT_MODE, pytest.mark.filterwarnings("ignore")]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]")


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


# --- on a bound -------------------------------------------------------------------------------------------------------


@needs_trl
@pytest.mark.parametrize("side", [-1, 1])
def test_a_log_ratio_on_a_bound_of_gmpo_is_not_clipped(side: int) -> None:
    batch = changed_token(logprobs=-1.0 + 0.25 * side, old_logprobs=-1.0)
    batch = batch._replace(advantages=batch.advantages.abs() * side)
    for objective, held in ((GMPO(0.25, 0.25), False), (GMPO(0.249, 0.249), True)):
        found = ours(objective, batch)
        assert (float(found[1][3, 5]) == 0) is held
        check(found, trl("gmpo", batch, epsilon=objective.eps_low, epsilon_high=objective.eps_high)[0])


# --- where results differ, on purpose ---------------------------------------------------------------------------------


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
