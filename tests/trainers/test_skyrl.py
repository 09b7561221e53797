"""The losses that are registered with SkyRL against SkyRL's own, in float64, and in its worker.

SkyRL's ratios are float32 for every loss but `gspo` and `sapo`: hence two tolerances.
"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import page_lines
import pytest
import torch
from checks import check_close, check_number
from drivers import skyrl as driver
from drivers._stubs import stubs
from objective_batch import check as check_result
from skyrl.backends.skyrl_train.utils.ppo_utils import (
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
)
from skyrl.train.config import (
    AlgorithmConfig,
    CISPOConfig,
    DPPOConfig,
    OffPolicyCorrectionConfig,
    SAPOConfig,
    SkyRLTrainConfig,
)
from torch import Tensor
from trainer_batch import BATCH, PROMPTS, RESPONSES, TOKENS, WIDTH, PaddedBatch

from gspo_kernels import GMPO, GSPOToken, Objective, TOPRToken, group_token_counts
from gspo_kernels import policy_loss_from_logprobs as our_loss
from gspo_kernels.integrations.reductions import OPTIONS, reduction_of
from gspo_kernels.integrations.skyrl import OBJECTIVES, main

FLOAT32, FLOAT64 = 3e-7, 1e-13
Result = tuple[tuple[Tensor, Tensor], dict[str, float]]


def scaled(batch: PaddedBatch, reduction: str, *, by_token: bool = False) -> Tensor:
    """[B, T]: the advantages as SkyRL's trainer passes them to its workers."""
    advantages = batch.token_advantages if by_token else batch.spread_advantages
    return apply_loss_reduction_to_advantages_minibatch(
        advantages, batch.mask.long(), reduction, micro_batch_size=4, max_seq_len=20, prompt_boundaries=list(PROMPTS)
    )


def run(name: str, batch: PaddedBatch = BATCH, advantages: Tensor | None = None, **config: Any) -> Result:
    """((loss, gradient), metrics) of a registered loss."""
    logprobs = batch.logprobs.clone().requires_grad_()
    loss, metrics = PolicyLossRegistry.get(name)(
        logprobs, batch.old_logprobs, scaled(batch, "sequence_mean") if advantages is None else advantages,
        config=AlgorithmConfig(policy_loss_type=name.removesuffix("_kernels"), **config),
        loss_mask=batch.mask.long(), rollout_logprobs=batch.rollout_logprobs,
    )  # fmt: skip
    loss.backward()
    assert logprobs.grad is not None
    return (loss.detach(), logprobs.grad), metrics


# By case: the loss's name in SkyRL, and its config. Values of `dppo` differ: see below.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "gspo": ("gspo", {"eps_clip_low": 0.2, "eps_clip_high": 0.28}),
    "gspo, the paper's range": ("gspo", {"eps_clip_low": 3e-4, "eps_clip_high": 4e-4}),
    "regular": ("regular", {"eps_clip_low": 0.2, "eps_clip_high": 0.28}),
    "dual_clip": ("dual_clip", {"eps_clip_low": 0.2, "eps_clip_high": 0.28, "clip_ratio_c": 1.5}),
    "cispo": ("cispo", {"cispo": CISPOConfig(0.2, 0.28)}),
    "sapo": ("sapo", {"sapo": SAPOConfig(1.5, 2.5)}),
    "dppo, tv": ("dppo", {"dppo": DPPOConfig("binary_tv", 0.05, 0.04)}),
    "dppo, kl": ("dppo", {"dppo": DPPOConfig("binary_kl", 0.01, 0.02)}),
}


def tolerance(name: str) -> float:
    return FLOAT64 if name in ("gspo", "sapo") else FLOAT32


def check_same(name: str, ours: Result, theirs: Result, error: float) -> None:
    (their_loss, gradient), metrics = theirs
    if name == "dppo":  # SkyRL has the value of `-ratio A`, here it is that of `-sg[ratio] A log p`
        their_loss = ours[0][0]
    check_result(ours[0], (their_loss, gradient), error)
    clip_ratio = metrics["clip_ratio"]
    if name == "cispo":
        clip_ratio = clip_ratio - held_without_advantage()
    check_number("clip_ratio", ours[1]["clip_ratio"], clip_ratio, 1e-6)


def held_without_advantage() -> float:
    """The share of tokens that SkyRL's `cispo` counts as clipped and that have no advantage: here they do not count."""
    ratio = (BATCH.logprobs - BATCH.old_logprobs).exp()
    held = BATCH.mask & (BATCH.token_advantages == 0) & ((ratio < 0.8) | (ratio > 1.28))
    assert bool(held.any())
    return float(held.sum()) / TOKENS


@pytest.mark.parametrize("reduction", OPTIONS["SkyRL"].values)
@pytest.mark.parametrize("case", LOSSES)
def test_loss_gradient_and_metrics(case: str, reduction: str) -> None:
    """With NaN and infinities at masked positions here, and zeros there."""
    name, config = LOSSES[case]
    advantages = scaled(BATCH, reduction, by_token=True)
    theirs = run(name, BATCH, advantages, **config)
    ours = run(f"{name}_kernels", BATCH.with_garbage(), advantages, **config)
    check_same(name, ours, theirs, tolerance(name))
    assert name == "sapo" or 0.02 < ours[1]["clip_ratio"] < 0.6


@pytest.mark.parametrize("reduction", OPTIONS["SkyRL"].values)
def test_names_of_reductions(reduction: str) -> None:
    """Scaled advantages and a sum are the same as the aggregation and the normalizer that the table says."""
    aggregation, normalizer = reduction_of("SkyRL", reduction)
    count = {
        "tokens": TOKENS, "responses": RESPONSES, "responses x length": RESPONSES * 20, "prompts": len(PROMPTS),
    }.get(normalizer)  # fmt: skip
    group_ids = torch.cat([torch.full((end - start,), i) for i, (start, end) in enumerate(PROMPTS)])
    group_tokens = group_token_counts(BATCH.mask, group_ids=group_ids) if aggregation == "group_mean" else None
    micro = [BATCH.rows(i, i + 4) for i in range(0, RESPONSES, 4)] if normalizer == "local tokens" else [BATCH]
    losses, gradients = [], []
    for part in micro:
        logprobs = part.logprobs.clone().requires_grad_()
        loss, _ = our_loss(
            logprobs, part.token_advantages, part.old_logprobs, objective=GSPOToken(0.2, 0.2), mask=part.mask,
            aggregation=aggregation, normalizer=count, group_tokens=group_tokens,
        )  # fmt: skip
        loss.backward()
        assert logprobs.grad is not None
        losses.append(loss.detach() / len(micro))
        gradients.append(logprobs.grad / len(micro))
    registered, _ = run("gspo_kernels", BATCH, scaled(BATCH, reduction, by_token=True))
    check_result(registered, (torch.stack(losses).sum(), torch.cat(gradients)))


CORRECTIONS = {
    "token": {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.05},
    "sequence": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.05},
    "geometric": {"sequence_mask_metric": "geometric"},
    "product": {"sequence_mask_metric": "product", "product_mask_low": 0.7, "product_mask_high": 1.3},
    "outliers": {"outlier_token_is_threshold_low": 0.83, "outlier_token_is_threshold_high": 1.2},
    "tokens, weighted": {
        "token_mask_is_threshold_low": 0.9, "token_mask_is_threshold_high": 1.1, "tis_ratio_type": "token"
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["gspo", "regular"])
@pytest.mark.parametrize("case", CORRECTIONS)
def test_off_policy_correction(case: str, name: str) -> None:
    """A token that SkyRL rejects keeps its part in the ratio of its response."""
    config = {"eps_clip_low": 0.2, "eps_clip_high": 0.28}
    changes = config | {"off_policy_correction": OffPolicyCorrectionConfig(**CORRECTIONS[case])}
    theirs, ours = run(name, **changes), run(f"{name}_kernels", BATCH.with_garbage(), **changes)
    check_same(name, ours, theirs, FLOAT32)  # the weights are float32
    for key in set(theirs[1]) - {"clip_ratio"}:
        check_number(key, ours[1][key], theirs[1][key], 1e-6)
    assert len(theirs[1]) > 5 and float((theirs[0][1] - run(name, **config)[0][1]).abs().max()) > 1e-4


def test_objectives_that_skyrl_does_not_have() -> None:
    """From the same config: GSPO with a dual clip, GMPO, whose clip range is one of the log-ratio, and TOPR."""
    assert set(OBJECTIVES) - {f"{name}_kernels" for name, _ in LOSSES.values()} == {
        "gspo_dual_clip_kernels", "gmpo_kernels", "topr_kernels", "topr_token_kernels",
    }  # fmt: skip
    expected: dict[str, Objective] = {
        "gspo_dual_clip_kernels": GSPOToken(0.2, 0.28, 3.0), "gmpo_kernels": GMPO(0.2, 0.28),
        "topr_token_kernels": TOPRToken(),
    }  # fmt: skip
    advantages = scaled(BATCH, "sequence_mean")
    for name, objective in expected.items():
        logprobs = BATCH.logprobs.clone().requires_grad_()
        loss, _ = our_loss(
            logprobs, advantages, BATCH.old_logprobs, objective=objective, mask=BATCH.mask, aggregation="sequence_sum",
            normalizer=1.0,
        )  # fmt: skip
        loss.backward()
        assert logprobs.grad is not None
        check_result(run(name, eps_clip_low=0.2, eps_clip_high=0.28)[0], (loss.detach(), logprobs.grad))


def test_importance_sampling_is_ppo_without_a_clip_range() -> None:
    advantages = scaled(BATCH, "token_mean", by_token=True)
    ours = run("regular_kernels", BATCH, advantages, eps_clip_low=math.inf, eps_clip_high=math.inf)
    check_result(ours[0], run("importance_sampling", BATCH, advantages)[0])


def test_a_micro_batch_of_padding_has_no_gradient() -> None:
    """Token-based batching adds them, so that all ranks have as many micro-batches."""
    batch = BATCH._replace(mask=torch.zeros_like(BATCH.mask)).with_garbage()
    for name in OBJECTIVES:
        (loss, gradient), metrics = run(name, batch, torch.full_like(BATCH.logprobs, 0.6))
        assert float(loss) == 0 and bool((gradient == 0).all()) and metrics["clip_ratio"] == 0


# --- in SkyRL's worker ------------------------------------------------------------------------------------------------


def worker_gradients(name: str, dp_size: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, float]]:
    """The mean over the ranks of what `forward_backward` leaves in a tiny model, and the last rank's metrics."""
    with stubs("flash_attn.bert_padding"):
        from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
        from skyrl.backends.skyrl_train.workers.model_wrapper import HFModelWrapper
        from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
    from transformers import AutoModelForCausalLM, Qwen3Config

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    torch.manual_seed(0)
    model = HFModelWrapper(AutoModelForCausalLM.from_config(Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, head_dim=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )).float())  # fmt: skip
    mask = BATCH.mask
    sequences = torch.randint(0, 50, (RESPONSES, 3 + WIDTH))
    attention = torch.cat([torch.ones(RESPONSES, 3, dtype=torch.bool), mask], 1).long()
    with torch.no_grad():
        reference = model(sequences, WIDTH, attention_mask=attention)
    data = TrainingInputBatch({
        "sequences": sequences, "attention_mask": attention, "loss_mask": mask.long(), "response_mask": mask.long(),
        "action_log_probs": reference + 1e-3 * torch.randn(reference.shape), "base_action_log_probs": reference,
        "advantages": scaled(BATCH, "sequence_mean").float(), "rollout_logprobs": reference,
    })  # fmt: skip
    data.metadata = {"response_length": WIDTH}
    algorithm = AlgorithmConfig(policy_loss_type=name, eps_clip_low=3e-4, eps_clip_high=4e-4, temperature=1.0)
    worker = object.__new__(PolicyWorkerBase)
    vars(worker).update(
        model=model, optimizer=None, mesh_rank=SimpleNamespace(dp_size=dp_size),
        policy_loss_fn=PolicyLossRegistry.get(name),
        cfg=SimpleNamespace(algorithm=algorithm, micro_train_batch_size_per_gpu=2, max_tokens_per_microbatch=0),
        scheduler=SimpleNamespace(get_last_lr=lambda: [0.0]),
        device_mesh=SimpleNamespace(get_group=lambda name: None),
        strategy=SimpleNamespace(
            backward=lambda loss, model, optimizer: loss.backward(), all_reduce=lambda values, op, group: dict(values)
        ),
    )  # fmt: skip
    for rank in data.chunk(RESPONSES // dp_size):
        metrics = worker.forward_backward(rank).metrics
    gradients = [x.grad.flatten() for x in model.parameters() if x.grad is not None]
    return torch.cat(gradients) / dp_size, metrics


def test_forward_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyRL's own function, with its loss and with ours, on one rank and on two: the same gradients and metrics."""
    theirs, their_metrics = worker_gradients("gspo", 1, monkeypatch)
    for dp_size in (1, 2):
        ours, metrics = worker_gradients("gspo_kernels", dp_size, monkeypatch)
        check_close("gradients", ours, theirs, 1e-5 * (theirs.abs() + theirs.abs().max()))
        if dp_size == 1:
            for name, value in their_metrics.items():
                check_number(name, metrics[name], value, 1e-5 * (1 + abs(value)))
    assert 0 < their_metrics["loss_metrics/clip_ratio"] < 1 and metrics["loss_metrics/gspo_kernels/ratio_max"] > 1
    assert float((theirs - worker_gradients("regular_kernels", 1, monkeypatch)[0]).abs().max()) > 1e-4


def test_the_pages_lines_are_skyrls_options() -> None:
    override, *lines = page_lines.options("skyrl", 1)
    assert override == "trainer.override_entrypoint=gspo_kernels.integrations.skyrl"
    found = SkyRLTrainConfig.from_cli_overrides(lines).trainer.algorithm
    named = ("policy_loss_type", "loss_reduction", "eps_clip_low", "eps_clip_high", "use_kl_loss")
    assert [getattr(found, name) for name in named] == [getattr(driver.CONFIG, name) for name in named]


def test_a_worker_unpickles_what_the_driver_registered() -> None:
    import cloudpickle

    for name in OBJECTIVES:
        function = cloudpickle.loads(cloudpickle.dumps(PolicyLossRegistry.get(name)))
        assert function.args == (name,) and function.func.__module__ == "gspo_kernels.integrations.skyrl"


def test_main_is_skyrls_with_the_override_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stub = SimpleNamespace(main=lambda: seen.append(sys.argv[1:]))
    monkeypatch.setitem(sys.modules, "skyrl.train.entrypoints", SimpleNamespace(main_base=stub))
    override = "trainer.override_entrypoint=gspo_kernels.integrations.skyrl"
    monkeypatch.setattr(sys, "argv", ["main_base", override, "trainer.algorithm.policy_loss_type=gspo_kernels"])
    main()
    assert seen == [["trainer.algorithm.policy_loss_type=gspo_kernels"]]


# --- where results differ, on purpose ---------------------------------------------------------------------------------


def test_skyrl_ignores_a_response_far_off_policy() -> None:
    """Its `gspo` holds a ratio at exp(10) without a gradient. Here there is one up to a log-ratio of 20."""
    batch = BATCH.with_row(3, logprobs=torch.tensor(-0.5), old_logprobs=torch.tensor(-11.5), advantages=-1.0)
    (_, gradient), _ = run("gspo", batch)
    assert bool((gradient[3] == 0).all())
    (_, gradient), _ = run("gspo_kernels", batch)
    check_number("gradient", float(gradient[3, 0]), math.exp(11) / RESPONSES / WIDTH, 1e-9 * math.exp(11))
    (_, gradient), _ = run("gspo_dual_clip_kernels", batch, clip_ratio_c=3.0)
    assert bool((gradient[3] == 0).all())


def test_skyrl_holds_log_ratios_at_minus_20_too() -> None:
    batch = BATCH.with_row(1, logprobs=torch.tensor(-25.0), old_logprobs=torch.tensor(-0.5), advantages=1.0)
    for name in ("regular", "sapo"):
        assert float(run(name, batch)[0][1][1, 0]) == 0
        assert float(run(f"{name}_kernels", batch)[0][1][1, 0]) < 0


def test_skyrl_reads_masked_positions() -> None:
    assert bool(run("gspo", BATCH.with_garbage())[0][0].isnan())


def test_skyrl_dppo_has_another_value() -> None:
    """The gradient is the same: see `check_same`."""
    config = {"dppo": DPPOConfig("binary_tv", 0.05, 0.04)}
    (theirs, _), (ours, _) = run("dppo", **config)[0], run("dppo_kernels", **config)[0]
    assert abs(float(ours - theirs)) > 0.05


# --- refused ----------------------------------------------------------------------------------------------------------


def test_refused() -> None:
    with pytest.raises(TypeError, match=r"rollout_logprobs: expected float32 or float64.*got torch.bfloat16"):
        run("gspo_kernels", BATCH._replace(rollout_logprobs=BATCH.rollout_logprobs.bfloat16()))
    with pytest.raises(ValueError, match=r"advantages: expected shape \[12, 16\]"):
        run("gspo_kernels", BATCH, BATCH.advantages)
    with pytest.raises(ValueError, match=r"old_log_probs: expected log-probabilities, at most 0"):
        run("gspo_kernels", BATCH._replace(old_logprobs=BATCH.old_logprobs.exp()))
    config = AlgorithmConfig(policy_loss_type="gspo")
    with pytest.raises(ValueError, match=r"loss_mask: expected True or 1"):
        PolicyLossRegistry.get("gspo_kernels")(
            BATCH.logprobs, BATCH.old_logprobs, BATCH.spread_advantages, config, BATCH.mask * 0.25
        )


def test_the_driver_of_the_first_steps() -> None:
    """The paper's clip range, and metrics under SkyRL's names."""

    class Rollout(PaddedBatch):
        entropy = torch.ones_like(BATCH.logprobs)

    loss, metrics = driver.step(Rollout(*BATCH))
    check_number("loss", float(loss), metrics["policy_loss"], 1e-9)
    assert metrics["policy_entropy"] == pytest.approx(1.0) and metrics["loss_metrics/clip_ratio"] > 0.3
    assert (driver.CONFIG.eps_clip_low, driver.CONFIG.eps_clip_high) == (3e-4, 4e-4)


@pytest.mark.parametrize(
    ("name", "option", "config"),
    [
        ("gspo_kernels", "eps_clip_low", {"eps_clip_low": -1.0}),
        ("dual_clip_kernels", "clip_ratio_c", {"clip_ratio_c": 0.5}),
        ("cispo_kernels", "cispo.cispo_eps_clip_high", {"cispo": CISPOConfig(0.2, -1.0)}),
        ("sapo_kernels", "sapo.tau_neg", {"sapo": SAPOConfig(1.0, 0.0)}),
    ],
)
def test_errors_name_skyrls_options(name: str, option: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{option}: expected"):
        run(name, **config)
