"""ms-swift's own `_compute_loss_and_metrics` and Liger's loss, and ours in their places, in float64.

Some packages that ms-swift imports are empty modules (see docs/scripts/drivers/swift.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import page_lines
import pytest
import torch
from checks import check_number
from drivers import swift as driver  # first: it imports ms-swift without what is not called
from drivers._stubs import stubs
from objective_batch import check as check_result
from torch import Tensor
from trainer_batch import BATCH, PROMPTS, RESPONSES, TOKENS, WIDTH, PaddedBatch

from gspo_kernels.integrations import reductions
from gspo_kernels.integrations.swift import GRPOTrainer, LinearLoss, MegatronLosses, objective_of

with stubs(*driver.NOT_CALLED):
    from swift.megatron.trainers.grpo_trainer import MegatronGRPOTrainer
    from swift.rlhf_trainers import grpo_trainer as theirs

pytestmark = pytest.mark.filterwarnings("ignore")

ENTROPY = (BATCH.rollout_logprobs.abs() * 7).sin().abs()
REFERENCE = (BATCH.logprobs + 0.2 * (BATCH.logprobs * 5).sin() * BATCH.mask).clamp(max=0)
Result = tuple[tuple[Tensor, Tensor], dict[str, Any]]


def run(
    cls: Any, batch: PaddedBatch = BATCH, *, by_token: bool = False, arrays: dict[str, Any] | None = None,
    entropy: Tensor = ENTROPY, **options: Any
) -> Result:  # fmt: skip
    logprobs = batch.logprobs.clone().requires_grad_()
    inputs = driver.make_batch(
        batch.mask, batch.token_advantages if by_token else batch.spread_advantages,
        **({"old_per_token_logps": batch.old_logprobs} | (arrays or {})),
    )  # fmt: skip
    loss, metrics = driver.loss_and_metrics(driver.make_trainer(cls, **options), logprobs, entropy, inputs)
    loss.backward()
    assert logprobs.grad is not None
    return (loss.detach(), logprobs.grad), metrics


def check_same(ours: Result, expected: Result, error: float = 1e-13) -> None:
    check_result(ours[0], expected[0], error)
    assert list(ours[1]) == list(expected[1])
    for name, value in expected[1].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(ours[1][name], value)
        else:
            assert ours[1][name] == value, name


LEVELS = {"token": True, "sequence": False, "sequence_token": True}  # whether advantages may differ in a response
OPTIONS: dict[str, dict[str, Any]] = {
    **{
        f"{loss_type}, {level}": {"loss_type": loss_type, "importance_sampling_level": level, "epsilon_high": 0.28}
        for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo")
        for level in LEVELS
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
    "sapo": {"loss_type": "sapo"},
    "delta": {"delta": 1.4},
    "delta, sequence": {"delta": 1.3, "importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_loss_gradient_and_metrics(case: str) -> None:
    """With a KL term too. Metrics are by ms-swift's own function: the same numbers."""
    options = OPTIONS[case]
    by_token = LEVELS[options.get("importance_sampling_level", "token")]
    check_same(run(GRPOTrainer, by_token=by_token, **options), run(theirs.GRPOTrainer, by_token=by_token, **options))
    with_kl = {"beta": 0.1, "arrays": {"ref_per_token_logps": REFERENCE}, **options}
    found = run(GRPOTrainer, **with_kl)
    check_same(found, run(theirs.GRPOTrainer, **with_kl))
    if case not in ("sapo", "cispo"):
        assert 0.05 < found[1]["clipping"]["region_clip_mean"] < 0.9


def test_every_name_of_a_reduction_was_compared() -> None:
    compared = {options.get("loss_type", "grpo") for options in OPTIONS.values()}
    assert compared == set(reductions.OPTIONS["ms-swift"].values)


ARRAYS = {"rollout_per_token_logps": BATCH.rollout_logprobs}
CORRECTIONS: dict[str, dict[str, Any]] = {
    **{
        mode: {"rollout_importance_sampling_mode": mode, "rollout_importance_sampling_threshold": 1.01}
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
    "off-policy responses": {"off_policy_sequence_mask_delta": 0.02},
    "entropy": {"top_entropy_quantile": 0.4},
    "entropy and engine": {"top_entropy_quantile": 0.4, "rollout_importance_sampling_mode": "token_truncate"},
    "overlong": {"overlong_filter": True},
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("case", CORRECTIONS)
def test_weights_and_masks(case: str, level: str) -> None:
    options = {"importance_sampling_level": level, "loss_type": "bnpo", **CORRECTIONS[case]}
    arrays = ARRAYS | {"truncated_mask": torch.arange(RESPONSES) % 3 == 0}
    found = run(GRPOTrainer, arrays=arrays, **options)
    check_same(found, run(theirs.GRPOTrainer, arrays=arrays, **options), 1e-7)
    plain = run(GRPOTrainer, importance_sampling_level=level, loss_type="bnpo")
    assert float((found[0][1] - plain[0][1]).abs().max()) > 1e-4


def test_off_policy_responses_are_judged_by_the_engine() -> None:
    """By its log-probabilities where there are some, by the old ones otherwise: here the first are far away."""
    options = {"loss_type": "bnpo", "off_policy_sequence_mask_delta": 0.3}
    far = {"rollout_per_token_logps": (BATCH.rollout_logprobs + 0.4).clamp(max=0)}
    found = [run(GRPOTrainer, arrays=arrays, **options) for arrays in (far, {})]
    check_same(found[0], run(theirs.GRPOTrainer, arrays=far, **options))
    check_same(found[1], run(theirs.GRPOTrainer, **options))
    assert float((found[0][0][1] - found[1][0][1]).abs().max()) > 1e-3


def test_kl_in_the_reward() -> None:
    """`kl_in_reward` leaves no KL term in the loss."""
    results = []
    for cls in (GRPOTrainer, theirs.GRPOTrainer):
        trainer = driver.make_trainer(cls, beta=0.1)
        trainer.kl_in_reward = True
        logprobs = BATCH.logprobs.clone().requires_grad_()
        arrays = {"old_per_token_logps": BATCH.old_logprobs, "ref_per_token_logps": REFERENCE}
        inputs = driver.make_batch(BATCH.mask, BATCH.spread_advantages, **arrays)
        loss, metrics = driver.loss_and_metrics(trainer, logprobs, ENTROPY, inputs)
        loss.backward()
        assert logprobs.grad is not None
        results.append(((loss.detach(), logprobs.grad), metrics))
    check_same(*results)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "dr_grpo"])
def test_micro_batches_add_up(loss_type: str) -> None:
    """Shares of the optimizer step, each divided by the number of micro-batches, as Trainer.training_step does."""
    options = {"loss_type": loss_type, "epsilon_high": 1.5, "epsilon": 0.2}
    (whole, gradient), _ = run(GRPOTrainer, **options)
    total, parts, count = 0.0, [], 3
    for start, end in ((0, 4), (4, 8), (8, 12)):
        (loss, part), _ = run(
            GRPOTrainer, BATCH.rows(start, end), arrays={"num_items_in_batch": torch.tensor(TOKENS)},
            gradient_accumulation_steps=count, entropy=ENTROPY[start:end], **options,
        )  # fmt: skip
        total += float(loss) / count
        parts.append(part / count)
    check_result((torch.tensor(total, dtype=torch.float64), torch.cat(parts)), (whole, gradient))


def test_ranks_add_up() -> None:
    """Two processes average their gradients; `num_items_in_batch` is that of both."""
    (whole, gradient), _ = run(GRPOTrainer, loss_type="dapo")
    total, parts = 0.0, []
    for start, end in ((0, 5), (5, 12)):
        logprobs = BATCH.logprobs[start:end].clone().requires_grad_()
        trainer = driver.make_trainer(loss_type="dapo")
        trainer.accelerator.num_processes = 2
        rows = BATCH.rows(start, end)
        inputs = driver.make_batch(
            rows.mask, rows.spread_advantages, old_per_token_logps=rows.old_logprobs,
            num_items_in_batch=torch.tensor(TOKENS),
        )  # fmt: skip
        loss, _ = driver.loss_and_metrics(trainer, logprobs, None, inputs)
        loss.backward()
        assert logprobs.grad is not None
        total += float(loss.detach()) / 2
        parts.append(logprobs.grad / 2)
    check_result((torch.tensor(total, dtype=torch.float64), torch.cat(parts)), (whole, gradient))


# --- Megatron ---------------------------------------------------------------------------------------------------------


class MegatronTrainer(MegatronLosses, MegatronGRPOTrainer):  # type: ignore[misc]
    pass


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def run_megatron(cls: Any, batch: PaddedBatch, by_token: bool, arrays: dict[str, Any], **options: Any) -> Result:
    trainer = driver.make_trainer(cls, **options)
    vars(trainer).update(
        log_entropy=False, micro_batch_size=len(batch.mask), unwrapped_models=[SimpleNamespace(training=True)], _step=2,
        steps_per_generation=4, _all_reduce_metric=lambda metrics: metrics,
    )  # fmt: skip
    trainer.args.num_microbatches = options.get("num_microbatches", 1)
    inputs = driver.make_batch(
        batch.mask, batch.token_advantages if by_token else batch.spread_advantages,
        old_per_token_logps=batch.old_logprobs, **arrays,
    )  # fmt: skip
    logprobs = batch.logprobs.clone().requires_grad_()
    loss, metrics = trainer.loss_func(logprobs, {"grpo_batch": inputs, "per_token_entropy": ENTROPY[: len(logprobs)]})
    loss.backward()
    assert logprobs.grad is not None
    return (loss.detach(), logprobs.grad), metrics


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("case", [*OPTIONS, "top_entropy_quantile", "rollout_importance_sampling_mode"])
def test_megatron(case: str) -> None:
    options = OPTIONS.get(case) or {"epsilon_high": 0.28, case: {"t": 0.4, "r": "token_truncate"}[case[0]]}
    arrays = {"num_items_in_batch": torch.tensor(2 * TOKENS), "rollout_per_token_logps": BATCH.rollout_logprobs}
    by_token = LEVELS[options.get("importance_sampling_level", "token")]
    ours, expected = (
        run_megatron(cls, BATCH, by_token, arrays, num_microbatches=3, **options)
        for cls in (MegatronTrainer, MegatronGRPOTrainer)
    )
    check_same(ours, expected, 1e-7 if len(options) == 2 and case not in OPTIONS else 1e-13)
    check_number("loss", float(ours[0][0]), float(ours[1]["loss"]), 1e-7)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_megatron_averages_over_ranks(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The normalizer is a rank's share of the tokens of the optimizer step."""
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda *_, **__: 2)
    arrays = {"num_items_in_batch": torch.tensor(2 * TOKENS)}
    ours, expected = (
        run_megatron(cls, BATCH, False, arrays, num_microbatches=3, loss_type=loss_type)
        for cls in (MegatronTrainer, MegatronGRPOTrainer)
    )
    check_same(ours, expected)


# --- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_free", [False, True])
def test_logprobs_and_entropies(padding_free: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (1, 24) if padding_free else (3, 8)
    logits = 4 * torch.randn(*shape, 50, generator=generator)
    ids = torch.randint(0, 50, shape, generator=generator)
    weights = torch.randn(2, shape[0], 5, generator=generator)

    def result(cls: Any) -> tuple[Tensor, Tensor, Tensor]:
        trainer = driver.make_trainer(cls)
        leaf = logits.clone().requires_grad_()
        vars(trainer).update(temperature=0.7, model_kwarg_keys=[], template=SimpleNamespace(padding_free=padding_free))
        found, entropy = trainer._get_logps_via_local_forward(
            lambda **_: SimpleNamespace(logits=leaf * 1), {}, 5, ids, compute_entropy=True
        )
        (found * weights[0] + entropy * weights[1]).sum().backward()
        assert leaf.grad is not None
        return found.detach(), entropy.detach(), leaf.grad

    for actual, expected in zip(result(GRPOTrainer), result(theirs.GRPOTrainer), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- from hidden states -----------------------------------------------------------------------------------------------


LINEAR = [
    ("grpo", "token"), ("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", "sequence"), ("dapo", "sequence"),
    ("sapo", "token"), ("cispo", "token"),
]  # fmt: skip


@pytest.mark.parametrize(("loss_type", "level"), LINEAR)
def test_in_the_place_of_ligers_loss(loss_type: str, level: str) -> None:
    """Called by ms-swift's own `compute_liger_loss`, both with a KL term and with weights."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 40, (RESPONSES, WIDTH + 2), generator=generator)
    states = torch.randn(RESPONSES, WIDTH + 2, 16, generator=generator)
    head = torch.nn.Linear(16, 40)
    with torch.no_grad():
        head.weight.copy_(torch.randn(40, 16, generator=generator) / 3)
        logits = head(states[:, 1:-1]) / 0.9
        old = logits.log_softmax(-1).gather(-1, ids[:, 2:, None]).squeeze(-1) - (BATCH.logprobs - BATCH.old_logprobs)
    old = old.float().clamp(max=0)
    high = 1.5 if loss_type == "cispo" else 0.28

    def result(trainer: Any, make: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        trainer.liger_grpo_loss = make
        hidden = states.clone().requires_grad_()
        head.zero_grad()
        model = torch.nn.Module()
        model.model = lambda **_: SimpleNamespace(last_hidden_state=hidden)
        model.lm_head = head
        vars(trainer).update(
            template=SimpleNamespace(padding_free=False), advantage_estimator="grpo", is_multimodal=False,
            control=SimpleNamespace(should_evaluate=False),
        )  # fmt: skip
        inputs = driver.make_batch(
            BATCH.mask, BATCH.spread_advantages.float(), old_per_token_logps=old, ref_per_token_logps=old - 0.1,
            rollout_per_token_logps=old - 0.05 * (BATCH.mask.cumsum(1) % 3), logits_to_keep=WIDTH,
        )  # fmt: skip
        loss = trainer.compute_liger_loss(model, {"input_ids": ids, "attention_mask": None}, inputs)
        loss.backward()
        assert hidden.grad is not None and head.weight.grad is not None
        return loss.detach(), hidden.grad, head.weight.grad.clone(), dict(trainer._metrics["train"])

    options = {
        "loss_type": loss_type, "importance_sampling_level": level, "epsilon_high": high, "beta": 0.05,
        "rollout_importance_sampling_mode": "token_truncate",
    }  # fmt: skip
    trainer = driver.make_trainer(**options)
    linear = LinearLoss(objective_of(trainer), loss_type, 0.9, 0.05, trainer.max_completion_length)
    liger = LigerFusedLinearGRPOLoss(
        beta=0.05, compiled=False, epsilon_low=0.2, epsilon_high=high, temperature=0.9, use_ref_model=True,
        loss_type=loss_type, max_completion_length=trainer.max_completion_length, importance_sampling_level=level,
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
    )  # fmt: skip
    *found, metrics = result(trainer, linear)
    *expected, their_metrics = result(driver.make_trainer(theirs.GRPOTrainer, **options), liger)
    for actual, other in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=2e-5, atol=2e-5 * float(other.abs().max()))
    assert list(metrics) == list(their_metrics) == ["kl", "clip_ratio"]
    check_number("kl", metrics["kl"][0], their_metrics["kl"][0], 1e-5)
    if loss_type != "cispo":  # Liger counts positive advantages alone
        check_number("clip_ratio", metrics["clip_ratio"][0], their_metrics["clip_ratio"][0], 1e-6)


# --- where results differ ---------------------------------------------------------------------------------------------


def test_weights_multiply_the_kl_term_there() -> None:
    """Here, in TRL and in Liger's loss they multiply the policy term alone."""
    options: dict[str, Any] = {"rollout_importance_sampling_mode": "token_truncate", "epsilon": 1e9, "beta": 0.1}
    arrays = ARRAYS | {"ref_per_token_logps": REFERENCE}
    ((found, _), _), ((expected, _), _) = (
        run(cls, arrays=arrays, **options) for cls in (GRPOTrainer, theirs.GRPOTrainer)
    )
    log_ratio = BATCH.old_logprobs - BATCH.rollout_logprobs
    d = REFERENCE - BATCH.logprobs
    term = torch.where(BATCH.mask, 0.1 * (log_ratio.exp().clamp(max=2.0) - 1) * (d.exp() - d - 1), 0.0)
    difference = (term.sum(1) / BATCH.mask.sum(1).clamp(min=1)).sum() / RESPONSES
    assert abs(float(difference)) > 1e-5
    check_number("difference", float(expected - found), float(difference), 1e-8)


def test_a_kl_term_is_at_most_10_there() -> None:
    """Beyond it has no gradient. Here the difference of the log-probabilities is clamped alone, at 20."""
    reference = torch.where(BATCH.mask & (BATCH.logprobs < -3.0), 0.0, BATCH.logprobs)  # e^3 - 4 is 16
    options: dict[str, Any] = {"beta": 0.1, "epsilon": 1e9, "arrays": {"ref_per_token_logps": reference}}
    ((_, found), _), ((_, expected), _) = (run(cls, **options) for cls in (GRPOTrainer, theirs.GRPOTrainer))
    far = BATCH.mask & (BATCH.logprobs < -3.0)
    assert bool(far.any()) and bool((found[far] < expected[far]).all())
    torch.testing.assert_close(found[~far], expected[~far])


def test_garbage_at_masked_positions() -> None:
    """Its losses multiply by the mask: NaN."""
    for level in ("token", "sequence"):
        options = {"importance_sampling_level": level}
        batch = BATCH.with_garbage()
        (loss, _), _ = run(theirs.GRPOTrainer, batch, **options)
        assert math.isnan(float(loss))
        check_result(run(GRPOTrainer, batch, **options)[0], run(theirs.GRPOTrainer, **options)[0])


def test_a_response_without_a_token_counts() -> None:
    """In the loss type "grpo", there and, for it is the trainer's meaning, here."""
    (loss, _), _ = run(GRPOTrainer, importance_sampling_level="sequence")
    nonempty = int(BATCH.mask.any(1).sum())
    rows = BATCH.mask.any(1)
    batch = PaddedBatch(*(x[rows] for x in BATCH))
    (without, _), _ = run(GRPOTrainer, batch, importance_sampling_level="sequence", entropy=ENTROPY[rows])
    check_number("loss", float(loss) * RESPONSES, float(without) * nonempty, 1e-12)
    assert nonempty < RESPONSES and len(PROMPTS) == 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "real": ({"loss_type": "real"}, "loss_type: expected"),
    "fipo": ({"loss_type": "fipo"}, "loss_type: expected"),
    "sapo": ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "importance_sampling_level: expected"),
    "cispo": ({"loss_type": "cispo"}, "epsilon_high: expected the largest ratio"),
    "epsilon": ({"epsilon": -0.1}, "epsilon: expected"),
    "delta": ({"delta": 1.1}, "delta: expected at least"),
    "teacher": ({"has_teacher": True, "importance_sampling_level": "sequence"}, "importance_sampling_level: expected"),
    "sdar": ({"sdar_loss_coef": 0.1}, "sdar_loss_coef: expected 0"),
}


def test_the_pages_lines_are_swifts_options() -> None:
    with stubs(*driver.NOT_CALLED):
        from swift.arguments import RLHFArguments
    options = [word[2:] for word in page_lines.options("swift", 1) if word.startswith("--")]
    assert len(options) == 6 and set(options) <= {field.name for field in fields(RLHFArguments)}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        objective_of(driver.make_trainer(**options))
