"""`PolicyLoss` against OpenRLHF's own, in float64, and in its trainer.

Beside OpenRLHF, flash-attn and vLLM are empty modules (see docs/scripts/drivers/openrlhf.py).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import page_lines
import pytest
import torch
from checks import check_close, check_number
from drivers import openrlhf as driver  # first: it imports OpenRLHF without flash-attn and vLLM
from drivers._stubs import stubs
from objective_batch import check as check_result
from openrlhf.models import PolicyLoss as TheirPolicyLoss
from openrlhf.models import aggregate_loss
from openrlhf.utils.loss_utils import iter_grad_accum_global_norm
from torch import Tensor
from trainer_batch import BATCH, TOKENS, PaddedBatch

from gspo_kernels import CISPO, DPPO, GSPO, GSPOToken, policy_loss_from_logprobs
from gspo_kernels.integrations.openrlhf import PolicyLoss, policy_model_actor
from gspo_kernels.integrations.reductions import OPTIONS, reduction_of

NONEMPTY = int(BATCH.mask.any(1).sum())
GLOBAL = {"dp_size": 4, "batch_num_tokens": torch.tensor(777.0), "global_batch_size": torch.tensor(64.0)}
Result = tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]


def run(loss_fn: Any, batch: PaddedBatch = BATCH, *, by_token: bool = False, **options: Any) -> Result:
    """((loss, gradient), the four metrics)."""
    logprobs = batch.logprobs.clone().requires_grad_()
    loss, *metrics = loss_fn(
        logprobs, batch.old_logprobs, batch.token_advantages if by_token else batch.spread_advantages,
        action_mask=batch.mask, rollout_log_probs=batch.rollout_logprobs, **options,
    )  # fmt: skip
    loss.backward()
    assert logprobs.grad is not None
    return (loss.detach(), logprobs.grad), tuple(metrics)


def check_same(ours: Result, theirs: Result, error: float = 1e-7) -> None:
    """OpenRLHF's mean over a response's tokens divides by their number plus 1e-8: hence the tolerance."""
    check_result(ours[0], theirs[0], error)
    for name, mine, other in zip(
        ("clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio"), ours[1], theirs[1], strict=True
    ):
        assert (mine is None) == (other is None), name
        if mine is not None and other is not None:
            check_number(name, float(mine), float(other), 1e-6 * (1 + abs(float(other))))


OPTIONS_OF_LOSS: dict[str, dict[str, Any]] = {
    "ppo": {"clip_eps_low": 0.2, "clip_eps_high": 0.28},
    "ppo, by response": {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "token_level_loss": False},
    "ppo, dual clip": {"dual_clip": 1.5},
    "gspo": {"policy_loss_type": "gspo"},
    "gspo, the paper's range": {"policy_loss_type": "gspo", "clip_eps_low": 3e-4, "clip_eps_high": 4e-4},
    "gspo, dual clip": {"policy_loss_type": "gspo", "dual_clip": 1.3},
}


@pytest.mark.parametrize("counts", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("case", OPTIONS_OF_LOSS)
def test_loss_gradient_and_metrics(case: str, counts: dict[str, Any]) -> None:
    """With NaN and infinities at masked positions here, and zeros there."""
    options = OPTIONS_OF_LOSS[case]
    theirs = run(TheirPolicyLoss(**options), **counts)
    ours = run(PolicyLoss(**options), BATCH.with_garbage(), **counts)
    check_same(ours, theirs)
    clip_ratio = ours[1][0]
    assert clip_ratio is not None and 0.02 < float(clip_ratio) < 0.8
    if "gspo" not in case:
        check_same(run(PolicyLoss(**options), by_token=True), run(TheirPolicyLoss(**options), by_token=True))


@pytest.mark.parametrize("mode", OPTIONS["OpenRLHF"].values)
def test_names_of_reductions(mode: str) -> None:
    """`aggregate_loss` of numbers that are no loss of a policy, against the mean that the table says."""
    values = BATCH.token_advantages
    reduction = reduction_of("OpenRLHF", mode)
    theirs = aggregate_loss(values, BATCH.mask, token_level_loss=mode == "token-mean")
    by_row = values.sum(1) / BATCH.mask.sum(1).clamp(min=1)
    total, count = {"tokens": (values.sum(), TOKENS), "responses": (by_row.sum(), NONEMPTY)}[reduction.normalizer]
    check_number("mean", float(total / count), float(theirs), 1e-8)
    assert PolicyLoss(token_level_loss=mode == "token-mean").token_level_loss == (reduction.aggregation == "token_mean")


GATES: dict[str, dict[str, Any]] = {
    "token, clip": {
        "is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": [0.9, 1.1]
    },
    "token, mask": {"is_correction_level": "token", "is_correction_threshold": [0.9, 1.1]},
    "seq, mask": {"is_correction_level": "seq", "is_correction_threshold": [0.98, 1.02]},
    "token, binary_kl": {
        "is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": [0.0, 0.002]
    },
    "seq, binary_kl": {
        "is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": [0.0, 0.002]
    },
    "token, tv": {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.03]},
    "seq, tv": {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.02]},
}  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
def test_correction_for_the_engine(gate: str) -> None:
    """A response without a token counts as filtered in OpenRLHF; here it is no response."""
    options = {"clip_eps_low": 0.2, "clip_eps_high": 0.28, **GATES[gate]}
    (theirs, metrics), ours = (
        run(TheirPolicyLoss(**options), **GLOBAL),
        run(PolicyLoss(**options), BATCH.with_garbage(), **GLOBAL),
    )
    *others, filtered = metrics
    assert filtered is not None
    if options["is_correction_level"] == "seq":
        filtered = (filtered * len(BATCH.mask) - (len(BATCH.mask) - NONEMPTY)) / NONEMPTY
    assert 0.05 < float(filtered) < 0.95
    check_same(ours, (theirs, (*others, filtered)))


def test_gspo_with_a_correction_takes_the_engines_log_probabilities_as_old() -> None:
    options = {"policy_loss_type": "gspo", "is_correction_level": "token"}
    theirs, ours = run(TheirPolicyLoss(**options)), run(PolicyLoss(**options), BATCH.with_garbage())
    check_same(ours, theirs)
    assert ours[1][2] is None and ours[1][3] is None
    without = run(PolicyLoss(policy_loss_type="gspo"))
    assert float((ours[0][1] - without[0][1]).abs().max()) > 1e-4


@pytest.mark.parametrize("policy_loss_type", ["ppo", "gspo"])
def test_micro_batches_and_ranks_add_up(policy_loss_type: str) -> None:
    """Two ranks with three micro-batches each, scaled by OpenRLHF's own window, DeepSpeed's 1 / gas and a mean."""
    loss_fn = PolicyLoss(policy_loss_type=policy_loss_type)
    (whole, gradient), _ = run(loss_fn)
    shares, gradients, gas = [], [], 3
    for rank in (0, 1):
        micro = [BATCH.rows(start, start + 2) for start in range(6 * rank, 6 * rank + 6, 2)]
        other = [BATCH.rows(start, start + 2) for start in range(6 - 6 * rank, 12 - 6 * rank, 2)]
        of_others = next(iter(iter_grad_accum_global_norm(other, None, gas, lambda x: x.mask)))[1]
        for part, info in iter_grad_accum_global_norm(micro, None, gas, lambda x: x.mask):
            counts = {name: info[name] + of_others[name] for name in ("batch_num_tokens", "global_batch_size")}
            (loss, of_part), _ = run(loss_fn, part, dp_size=2, **counts)
            shares.append(loss / gas / 2)
            gradients.append(of_part / gas / 2)
    assert len(shares) == 6
    check_result((torch.stack(shares).sum(), torch.cat(gradients)), (whole, gradient), 1e-6)  # its counts are float32


def test_an_objective_of_ones_own() -> None:
    """The reduction, the correction and the results stay OpenRLHF's."""
    found, (clip_ratio, *_) = run(PolicyLoss(objective=CISPO(0.2, 0.2)), by_token=True)
    logprobs = BATCH.logprobs.clone().requires_grad_()
    loss, stats = policy_loss_from_logprobs(
        logprobs, BATCH.token_advantages, BATCH.old_logprobs, objective=CISPO(0.2, 0.2), mask=BATCH.mask
    )
    loss.backward()
    assert logprobs.grad is not None and clip_ratio is not None
    check_result(found, (loss.detach(), logprobs.grad))
    check_number("clip_ratio", float(clip_ratio), float(stats.clip_fraction), 1e-6)
    by_engine = run(PolicyLoss(objective=DPPO(0.05, 0.05)))[0][1]
    by_old = run(PolicyLoss(objective=DPPO(0.05, 0.05)), BATCH._replace(rollout_logprobs=BATCH.old_logprobs))[0][1]
    assert bool(((by_engine == 0) != (by_old == 0)).any())  # the divergence is that from the engine


# --- in OpenRLHF's trainer --------------------------------------------------------------------------------------------


class OneRank:
    """What `ActorPPOTrainer` calls of a DeepspeedStrategy, with two micro-batches to an optimizer step."""

    ring_attn_group, accumulated_gradient = None, 2

    def __init__(self, args: Any) -> None:
        self.args, self.calls = args, 0

    def is_rank_0(self) -> bool:
        return False

    def backward(self, loss: Tensor, model: Any, optimizer: Any) -> None:
        (loss / self.accumulated_gradient).backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any, name: str) -> None:
        self.calls += 1
        if self.calls % self.accumulated_gradient == 0:
            optimizer.step()
            optimizer.zero_grad()

    def get_grad_norm(self, model: Any) -> float:
        return 0.0

    def all_reduce(self, values: dict[str, float]) -> dict[str, float]:
        return values


def actor_of(actor_class: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """OpenRLHF's actor, with a tiny model in place of what it loads onto a GPU, and a real `ActorPPOTrainer`."""
    from openrlhf.models import Actor
    from openrlhf.trainer.ray import ppo_actor
    from transformers import AutoModelForCausalLM, Qwen3Config

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ppo_actor, "torch_dist_barrier_and_cuda_sync", lambda: None)
    args = SimpleNamespace(
        train=SimpleNamespace(max_epochs=1, dynamic_batch_enable=False, colocate_all=False, async_enable=False),
        actor=SimpleNamespace(
            eps_clip_low_high=(3e-4, 4e-4), dual_clip=None, loss_agg_mode="token-mean", policy_loss_type="gspo",
            aux_loss_coef=0, entropy_coef=None,
        ),
        algo=SimpleNamespace(
            advantage=SimpleNamespace(
                is_correction_level="off", is_correction_mode="mask", is_correction_gating="ratio",
                is_correction_threshold=[0.5, 5.0],
            ),
            kl=SimpleNamespace(use_loss=True, init_coef=0.01, estimator="k3", unbiased_gradient=False),
        ),
        ds=SimpleNamespace(packing_samples=False, tensor_parallel_size=1),
        vllm=SimpleNamespace(sync_backend="nccl"),
    )  # fmt: skip
    vars(args.actor).update(options)

    def load(self: Any, strategy: Any) -> None:
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
        self.actor = Actor(AutoModelForCausalLM.from_config(Qwen3Config(
            **sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        )))  # fmt: skip
        self.actor.packing_samples = False
        optimizer = torch.optim.SGD(self.actor.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        self.trainer = ppo_actor.ActorPPOTrainer(
            strategy, self.actor, None, optimizer, schedule, micro_train_batch_size=2, dataloader_pin_memory=False
        )

    plain = actor_class.__ray_metadata__.modified_class
    theirs = ppo_actor.PolicyModelActor.__ray_metadata__.modified_class
    monkeypatch.setattr(theirs, "init_model_from_pretrained", load)
    actor = object.__new__(plain)
    actor.init_model_from_pretrained(OneRank(args))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    return actor


def trained(actor: Any) -> tuple[Tensor, dict[str, float]]:
    """The weights after four micro-batches of OpenRLHF's own loop, and its metrics."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    torch.manual_seed(1)
    ids, action_mask = torch.randint(0, 50, (8, 12)), torch.ones(8, 8, dtype=torch.bool)
    action_mask[1, 5:] = action_mask[3, 2:] = False
    attention = torch.cat([torch.ones(8, 4, dtype=torch.bool), action_mask], 1).long()
    with torch.no_grad():
        reference = actor.actor(ids, action_mask, attention_mask=attention)
    old = reference + 1e-3 * torch.randn(8, 8) * action_mask
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0])[:, None] * action_mask
    outcomes = torch.zeros(8)
    actor.trainer.replay_buffer.append(Experience(
        sequences=ids, attention_mask=attention, action_mask=action_mask, action_log_probs=old,
        base_action_log_probs=reference, advantages=advantages, returns=advantages, rewards=outcomes, scores=outcomes,
        response_length=action_mask.sum(1).float(), total_length=attention.sum(1).float(), truncated=outcomes,
        index=list(range(8)), prompts=[""] * 8, labels=[""] * 8,
    ))  # fmt: skip
    metrics = actor.trainer.ppo_train(kl_ctl=0.01)
    return torch.cat([x.detach().flatten() for x in actor.actor.parameters()]), metrics


def test_ppo_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenRLHF's own loop with its loss and with ours: the same weights, the same metrics under the same names."""
    with stubs(*driver.GPU_MODULES):
        from openrlhf.trainer.ray.ppo_actor import PolicyModelActor

    theirs, their_metrics = trained(actor_of(PolicyModelActor, monkeypatch))
    actor = actor_of(policy_model_actor(), monkeypatch)
    loss_fn = actor.trainer.actor_loss_fn
    assert isinstance(loss_fn, PolicyLoss) and loss_fn.objective == GSPOToken(3e-4, 4e-4)
    ours, metrics = trained(actor)
    check_close("weights", ours, theirs, 1e-6 * (theirs.abs() + 1e-2))
    assert set(metrics) == set(their_metrics) and 0 < metrics["ppo_clip_ratio"] < 1
    for name, value in their_metrics.items():
        check_number(name, metrics[name], value, 1e-6)
    other = actor_of(policy_model_actor(CISPO()), monkeypatch, policy_loss_type="ppo")
    assert other.trainer.actor_loss_fn.objective == CISPO()
    assert float((trained(other)[0] - theirs).abs().max()) > 1e-4


def test_the_pages_lines_are_those_of_openrlhfs_script() -> None:
    found = find_spec("openrlhf.cli.train_ppo_ray")
    assert found is not None and found.origin is not None
    script = Path(found.origin).read_text()
    (line,) = page_lines.before(page_lines.blocks("openrlhf", "diff")[0])
    assert script.splitlines().count(line) == 1
    options = [word for word in page_lines.options("openrlhf", 2) if word.startswith("--")]
    assert len(options) == 4 and all(f'"{option}"' in script for option in options)


# --- where results differ, on purpose ---------------------------------------------------------------------------------


def test_openrlhf_spreads_the_gradient_of_differing_advantages() -> None:
    """GSPO with a KL penalty in the reward: here each token has its own advantage (equation 13 of the paper)."""
    options = {"policy_loss_type": "gspo", "clip_eps_low": 9.0, "clip_eps_high": 9.0}
    (their_loss, theirs), _ = run(TheirPolicyLoss(**options), by_token=True)
    (loss, gradient), _ = run(PolicyLoss(**options), by_token=True)
    check_number("loss", float(loss), float(their_loss), 1e-8)
    mean = gradient.sum(1, keepdim=True) / BATCH.mask.sum(1, keepdim=True).clamp(min=1)
    check_result((loss, mean * BATCH.mask), (their_loss, theirs), 1e-7)
    assert float((gradient - theirs).abs().max()) > 1e-2


def test_openrlhf_gspo_overflows() -> None:
    """Its ratio of a response has no bound. Here the ratio saturates at a log-ratio of 20."""
    batch = BATCH.with_row(3, logprobs=torch.tensor(-0.5), old_logprobs=torch.tensor(-800.0), advantages=-1.0)
    (loss, gradient), _ = run(TheirPolicyLoss(policy_loss_type="gspo"), batch)
    assert not bool(loss.isfinite()) and not bool(gradient[3].isfinite().any())
    (loss, gradient), _ = run(PolicyLoss(policy_loss_type="gspo"), batch)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all()) and bool((gradient[3] == 0).all())


def test_openrlhf_holds_log_ratios_at_minus_20_too() -> None:
    """For "ppo". Here ratios saturate above alone, and below they are exact."""
    batch = BATCH.with_row(1, logprobs=torch.tensor(-25.0), old_logprobs=torch.tensor(-0.5), advantages=1.0)
    assert float(run(TheirPolicyLoss(), batch)[0][1][1, 0]) == 0
    assert float(run(PolicyLoss(), batch)[0][1][1, 0]) < 0


def test_openrlhf_reads_masked_positions_and_divides_by_no_tokens() -> None:
    garbage = BATCH.with_garbage()
    assert bool(run(TheirPolicyLoss(), garbage)[0][0].isnan())
    nothing = BATCH.rows(8, 9)
    assert bool(run(TheirPolicyLoss(), nothing)[0][0].isnan())
    (loss, gradient), metrics = run(PolicyLoss(), nothing)
    assert float(loss) == 0 and bool((gradient == 0).all()) and all(float(x) == 0 for x in metrics[:2] if x is not None)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"objective: expected one with a ratio and an advantage per token.*GSPO\("):
        PolicyLoss(objective=GSPO())
    with pytest.raises(ValueError, match="policy_loss_type: expected 'ppo' or 'gspo'; got 'grpo'"):
        PolicyLoss(policy_loss_type="grpo")
    with pytest.raises(ValueError, match=r"rollout_log_probs: expected the engine's, because is_correction_level is"):
        run(PolicyLoss(is_correction_level="seq"), BATCH._replace(rollout_logprobs=None))
    with pytest.raises(TypeError, match=r"old_log_probs: expected float32 or float64.*got torch.bfloat16"):
        run(PolicyLoss(), BATCH._replace(old_logprobs=BATCH.old_logprobs.bfloat16()))
    with pytest.raises(ValueError, match=r"advantages: expected shape \[12, 16\]"):
        PolicyLoss()(BATCH.logprobs, BATCH.old_logprobs, BATCH.advantages, BATCH.mask)


def test_the_driver_of_the_first_steps() -> None:
    """The paper's clip range, and metrics under OpenRLHF's names."""

    class Rollout(PaddedBatch):
        entropy = torch.ones_like(BATCH.logprobs)

    _, metrics = driver.step(Rollout(*BATCH))
    assert set(metrics) == {"policy_loss", "ppo_clip_ratio", "ppo_kl", "entropy_loss"}
    check_number("entropy", metrics["entropy_loss"], 1.0, 1e-6)
    assert driver.LOSS.clip_eps_low == 3e-4 and metrics["ppo_clip_ratio"] > 0.3


@pytest.mark.parametrize("count", [0, 0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_a_step_without_a_token(kind: str, count: Any) -> None:
    """Its counts are 0: so are loss and gradient. Where tokens count, a count of 0 is refused by OpenRLHF's name."""
    name = "batch_num_tokens" if kind == "ppo" else "global_batch_size"
    nothing = BATCH._replace(mask=torch.zeros_like(BATCH.mask))
    (loss, gradient), _ = run(PolicyLoss(policy_loss_type=kind), nothing, dp_size=2, **{name: count})
    assert float(loss) == 0 and not bool(gradient.any())
    with pytest.raises(ValueError, match=f"{name}: expected"):
        run(PolicyLoss(policy_loss_type=kind), dp_size=2, **{name: count})


def test_errors_name_openrlhfs_options() -> None:
    with pytest.raises(ValueError, match="clip_eps_low: expected"):
        PolicyLoss(clip_eps_low=-0.1)
    with pytest.raises(ValueError, match="dp_size: expected"):
        run(PolicyLoss(), dp_size=0, batch_num_tokens=5)
