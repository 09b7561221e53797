"""NeMo-RL's loss of ours, called as its workers call it, against a restatement of ClippedPGLossFn in float64."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import stand_ins
import torch
import torch.nn.functional as F
import trainer_oracle
from checks import check_close, check_number
from modes import DEFAULT_MODE
from ragged_responses import Responses, make_responses
from torch import Tensor

from gspo_kernels import token_logprobs

pytestmark = DEFAULT_MODE

nemo_rl = stand_ins.nemo_rl_losses()
BATCH = make_responses()
SAMPLES = torch.ones(len(BATCH.mask))
SAMPLES[6] = 0.0  # a sample that NeMo-RL has masked
# With the empty response, which NeMo-RL counts: `sample_mask` says what is a response.
RESPONSES, TOKENS = float(SAMPLES.sum()), float((BATCH.mask & SAMPLES.bool()[:, None]).sum())
COUNTS = torch.tensor(RESPONSES), torch.tensor(TOKENS)
GSPO = {
    "sequence_level_importance_ratios": True, "token_level_loss": False, "ratio_clip_min": 3e-4, "ratio_clip_max": 4e-4,
}  # fmt: skip


def data_of(batch: Responses, samples: Tensor = SAMPLES, rows: slice = slice(None)) -> dict[str, Any]:
    """NeMo-RL's arrays [B, S]: a prompt of one token, whose column is not read."""
    arrays = {
        "advantages": batch.token_advantages, "prev_logprobs": batch.old_logprobs, "token_mask": batch.mask.double(),
        "generation_logprobs": batch.rollout_logprobs, "reference_policy_logprobs": batch.ref_logprobs,
        "input_ids": torch.zeros(batch.mask.shape, dtype=torch.int64),
    }  # fmt: skip
    return {name: F.pad(x, (1, 0))[rows] for name, x in arrays.items()} | {"sample_mask": samples[rows]}


def ours(batch: Responses = BATCH, rows: slice = slice(None), **cfg: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    logprobs = batch.logprobs.clone().requires_grad_()
    loss_fn = nemo_rl.PolicyLossFn(stand_ins.clipped_pg_loss_config(**cfg))
    loss, metrics = loss_fn(
        data=data_of(batch, rows=rows), global_valid_seqs=torch.tensor(RESPONSES),
        global_valid_toks=torch.tensor(TOKENS), next_token_logprobs=logprobs[rows],
    )  # fmt: skip
    loss.backward()
    assert logprobs.grad is not None and metrics["loss"] == float(loss.detach())
    return loss.detach(), logprobs.grad, metrics


def theirs(batch: Responses = BATCH, **cfg: Any) -> tuple[Tensor, Tensor]:
    clean = batch.without_garbage()
    logprobs = clean.logprobs.requires_grad_()
    loss = trainer_oracle.nemo_rl_loss(
        logprobs, clean.old_logprobs, clean.rollout_logprobs, clean.ref_logprobs, clean.token_advantages,
        clean.mask.double(), SAMPLES.double(), RESPONSES, TOKENS, cfg,
    )  # fmt: skip
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad


CISPO = {"use_cispo": True, "ratio_clip_min": 0.2, "ratio_clip_max": 0.28}
CORRECTED = {"use_importance_sampling_correction": True}


def truncated(kind: str, low: float | None, high: float) -> dict[str, Any]:
    return CORRECTED | {
        "truncated_importance_sampling_type": kind, "truncated_importance_sampling_ratio": high,
        "truncated_importance_sampling_ratio_min": low,
    }  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "GRPO": {},
    "GRPO, mean over responses, no KL": {"token_level_loss": False, "reference_policy_kl_penalty": 0.0},
    "DAPO with a dual clip": {"ratio_clip_max": 0.28, "ratio_clip_c": 1.25, "reference_policy_kl_type": "k2"},
    "GSPO": GSPO,
    "GSPO with a dual clip": GSPO | {"ratio_clip_c": 1.0002},
    "GSPO with its correction": GSPO | CORRECTED,
    "GSPO with tis": GSPO | truncated("tis", None, 1.0),
    "CISPO": CISPO | {"reference_policy_kl_type": "k1"},
    "REINFORCE": {"disable_ppo_ratio": True},
    "on policy": {"force_on_policy_ratio": True} | CORRECTED,
    "tis": truncated("tis", 0.9, 1.1),
    "icepop": truncated("icepop", 0.9, 1.1),
    "seq-mask-tis": truncated("seq-mask-tis", 0.97, 1.02),
    "on policy without a ratio": {"force_on_policy_ratio": True, "disable_ppo_ratio": True},
    "KL within a small clamp": {"kl_input_clamp_value": 0.05, "use_on_policy_kl_approximation": True},
    "KL to the engine's samples": {"use_on_policy_kl_approximation": True},
    "KL in the reward": {"use_kl_in_reward": True},
}


@pytest.mark.parametrize("case", CASES)
def test_clipped_pg_loss(case: str) -> None:
    """NeMo-RL adds 1e-8 to every count, which is all that differs."""
    loss, gradient, _ = ours(**CASES[case])
    expected, expected_gradient = theirs(**CASES[case])
    largest = float(expected_gradient.abs().max())
    assert largest > 1e-5
    check_close("gradient", gradient, expected_gradient, 3e-8 * (expected_gradient.abs() + 1e-3 * largest))
    check_number("loss", float(loss), float(expected), 1e-7 * (abs(float(expected)) + TOKENS * largest))
    assert bool((gradient[~BATCH.mask] == 0).all()) and bool((gradient[6] == 0).all())


@pytest.mark.parametrize("cfg", [GSPO, {}], ids=["GSPO", "GRPO"])
def test_micro_batches_and_ranks_add_up(cfg: dict[str, Any]) -> None:
    """Workers undo the averaging over ranks: the shares of the step are summed. So are NeMo-RL's metrics."""
    loss, gradient, metrics = ours(**cfg)
    parts = [ours(rows=rows, **cfg) for rows in (slice(0, 3), slice(3, 4), slice(4, 8))]
    check_number("loss", sum(float(part[0]) for part in parts), float(loss), 1e-14)
    check_close("gradient", sum(part[1] for part in parts), gradient, 1e-13 * gradient.abs())
    for name in ("loss", "clip_fraction", "clip_fraction_low", "clip_fraction_high", "num_valid_samples"):
        check_number(name, sum(part[2][name] for part in parts), metrics[name], 1e-6)


def test_clip_fractions_are_shares_of_the_tokens_of_the_step() -> None:
    *_, metrics = ours(**GSPO)
    counted = BATCH.mask & SAMPLES.bool()[:, None]
    count = counted.sum(1).clamp(min=1)
    ratio = (torch.where(counted, BATCH.logprobs - BATCH.old_logprobs, 0.0).sum(1) / count).exp()
    high = counted & ((ratio > 1 + 4e-4) & (BATCH.advantages > 0))[:, None]
    low = counted & ((ratio < 1 - 3e-4) & (BATCH.advantages < 0))[:, None]
    for name, clipped in (("_high", high), ("_low", low), ("", high | low)):
        assert bool(clipped.any())
        check_number(f"clip_fraction{name}", metrics[f"clip_fraction{name}"], float(clipped.sum()) / TOKENS, 1e-6)


def test_advantages_that_differ_within_a_response() -> None:
    """NeMo-RL gives each token the gradient of their mean, here each has its own: GSPO-token."""
    advantages = BATCH.token_advantages.clone()
    advantages[0, 4:] *= -1.0
    data = data_of(BATCH)
    data["advantages"] = F.pad(advantages, (1, 0))
    logprobs = BATCH.logprobs.clone().requires_grad_()
    wide = GSPO | {"ratio_clip_min": 0.5, "ratio_clip_max": 0.5, "reference_policy_kl_penalty": 0.0}
    loss_fn = nemo_rl.PolicyLossFn(stand_ins.clipped_pg_loss_config(**wide))
    loss_fn(logprobs, data, torch.tensor(RESPONSES), torch.tensor(TOKENS))[0].backward()
    assert logprobs.grad is not None
    signs = logprobs.grad[0][BATCH.mask[0]].sign()
    assert signs.tolist() == (-advantages[0][BATCH.mask[0]].sign()).tolist()


def test_the_kl_term_is_that_of_unfiltered_logprobs() -> None:
    """NeMo-RL hands them over where sampling filters the vocabulary: the policy term keeps the filtered ones."""
    unfiltered = (BATCH.logprobs - 0.3).requires_grad_()
    cfg = {"reference_policy_kl_penalty": 0.3}
    data = data_of(BATCH) | {"curr_logprobs_unfiltered": unfiltered}
    loss_fn = nemo_rl.PolicyLossFn(stand_ins.clipped_pg_loss_config(**cfg))
    logprobs = BATCH.logprobs.clone().requires_grad_()
    loss_fn(logprobs, data, *COUNTS)[0].backward()
    assert logprobs.grad is not None and unfiltered.grad is not None
    policy = ours(reference_policy_kl_penalty=0.0)[1]
    check_close("policy", logprobs.grad, policy, 1e-13 * policy.abs())
    same = BATCH._replace(logprobs=unfiltered.detach())
    wanted = ours(same, **cfg)[1] - ours(same, reference_policy_kl_penalty=0.0)[1]
    assert float(wanted.abs().max()) > 1e-4
    check_close("KL", unfiltered.grad, wanted, 1e-12 * (wanted.abs() + 1 / TOKENS))


def test_the_kl_estimate_is_not_clamped() -> None:
    """At a log-ratio of 5, k3 is 142: NeMo-RL holds it at 10, without a gradient."""
    ref = BATCH.ref_logprobs.clone()
    ref[0, 5], logprobs = -0.1, BATCH.logprobs.clone()
    logprobs[0, 5] = -5.1
    far = BATCH._replace(ref_logprobs=ref, logprobs=logprobs, old_logprobs=logprobs.clone())
    (_, gradient, _), (_, expected) = ours(far), theirs(far)
    policy = -float(BATCH.advantages[0]) / TOKENS
    check_number("NeMo-RL", float(expected[0, 5]), policy, 1e-9)
    # k3 and its slope: e^5 - 6 through the sampling probability, 1 - e^5 through the estimate.
    check_number("here", float(gradient[0, 5]), policy - 0.01 * 5 / TOKENS, 1e-9)


def data_and_logits() -> tuple[dict[str, Any], Tensor]:
    generator = torch.Generator().manual_seed(3)
    data = data_of(BATCH)
    data["input_ids"] = torch.randint(11, data["input_ids"].shape, generator=generator)
    return data, 3 * torch.randn(*data["input_ids"].shape, 11, generator=generator)


def test_from_logits() -> None:
    """[B, S, V]: the loss and its gradient are those of the log-probabilities; masked rows have none."""
    (data, logits), counts = data_and_logits(), COUNTS
    logits.requires_grad_()
    found = nemo_rl.LogitPolicyLossFn(stand_ins.clipped_pg_loss_config(**GSPO))
    assert found.input_type is stand_ins.LossInputType.LOGIT
    loss, metrics = found(logits=logits, data=data, global_valid_seqs=counts[0], global_valid_toks=counts[1])
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = token_logprobs(logits[:, :-1], data["input_ids"][:, 1:]).logprobs
    same, _ = nemo_rl.PolicyLossFn(stand_ins.clipped_pg_loss_config(**GSPO))(expected, data, *counts)
    (expected_gradient,) = torch.autograd.grad(same, logits)
    assert float(loss.detach()) == float(same.detach()) and metrics["num_valid_samples"] == RESPONSES
    assert bool((gradient[:, :-1][~BATCH.mask] == 0).all()) and bool((gradient[:, -1] == 0).all())
    check_close("gradient", gradient, expected_gradient, 1e-6 * expected_gradient.abs())
    with pytest.raises(ValueError, match=r"logits: expected shape \[8, 13, 'V'\], .* got \[8, 6, 11\]"):
        found(logits[:, :6], data, *counts)


def of_sharded_logits(rank: int) -> tuple[Tensor, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    data, logits = data_and_logits()
    mine = logits.split(6, -1)[rank].contiguous()
    mesh = init_device_mesh("cpu", (2,))
    shard = DTensor.from_local(mine, mesh, [Shard(2)], shape=logits.shape, stride=logits.stride()).requires_grad_()
    loss, _ = nemo_rl.LogitPolicyLossFn(stand_ins.clipped_pg_loss_config(**GSPO))(shard, data, *COUNTS)
    loss.backward()
    return loss.detach(), shard.grad.to_local()  # type: ignore[union-attr]


@pytest.mark.parametrize("world", [pytest.param(2, marks=ranks.mark)])
def test_from_logits_that_are_sharded_over_the_vocabulary(world: int) -> None:
    data, logits = data_and_logits()
    logits.requires_grad_()
    loss, _ = nemo_rl.LogitPolicyLossFn(stand_ins.clipped_pg_loss_config(**GSPO))(logits, data, *COUNTS)
    (gradient,) = torch.autograd.grad(loss, logits)
    found = ranks.run(world, of_sharded_logits)
    for value, _ in found:
        check_number("loss", float(value), float(loss.detach()), 1e-6 * abs(float(loss.detach())))
    whole = torch.cat([part for _, part in found], -1)
    check_close("gradient", whole, gradient, 1e-5 * (gradient.abs() + 1e-3 * gradient.abs().amax(-1, keepdim=True)))


@pytest.mark.parametrize(
    ("error", "cfg", "message"),
    [
        (NotImplementedError, {"positive_example_nll_weight": 0.1}, "positive_example_nll_weight: expected 0"),
        (ValueError, {"disable_ppo_ratio": True, "ratio_clip_c": 3.0}, "ratio_clip_c: expected null"),
        (
            ValueError, CORRECTED | {"truncated_importance_sampling_ratio": 2.0},
            "truncated_importance_sampling_type: expected 'tis', 'icepop' or 'seq-mask-tis'",
        ),
    ],
)  # fmt: skip
def test_options_that_are_refused(error: type[Exception], cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        nemo_rl.PolicyLossFn(stand_ins.clipped_pg_loss_config(**cfg))


def test_a_wrong_clip_range_has_its_option_name() -> None:
    loss = nemo_rl.PolicyLossFn(stand_ins.clipped_pg_loss_config(ratio_clip_max=-0.1))
    with pytest.raises(ValueError, match=r"^ratio_clip_max: expected"):
        _ = loss.objective
