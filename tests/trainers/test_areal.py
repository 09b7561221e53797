"""AReaL's own `ppo_actor_loss_fn`, `sapo_loss_fn`, `grpo_loss_fn` and FSDP actor, with our losses and with its own.

Packages of its servers and loggers are empty modules (see docs/scripts/drivers/areal.py).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import page_lines
import pytest
import ranks
import torch
from drivers import areal as driver  # first: it imports AReaL without what is not called
from drivers._stubs import stubs
from objective_batch import check as check_result
from omegaconf import OmegaConf
from torch import Tensor
from trainer_batch import BATCH, PROMPTS, RESPONSES, PaddedBatch

from gspo_kernels import GSPO, policy_loss, policy_loss_from_logprobs
from gspo_kernels.integrations import areal as ours

with stubs(*driver.NOT_CALLED):
    from areal.api import FinetuneSpec
    from areal.api.alloc_mode import ParallelStrategy
    from areal.api.cli_args import MicroBatchSpec, OptimizerConfig, PPOActorConfig, RejectionSamplingConfig
    from areal.engine import FSDPPPOActor
    from areal.trainer.ppo import actor as their_actor
    from areal.utils import stats_tracker
    from areal.utils.functional import functional as theirs
    from areal.utils.functional import gather_logprobs_entropy

pytestmark = pytest.mark.filterwarnings("ignore")

torch.compiler.set_stance("force_eager")  # AReaL compiles its log-probabilities: half a minute here
NONEMPTY = int(BATCH.mask.any(1).sum())
Result = tuple[tuple[Tensor, Tensor], dict[str, Any]]


def arrays_of(batch: PaddedBatch, layout: str) -> dict[str, Any]:
    """The arrays that AReaL's losses take, [B, T] or packed."""
    arrays = {
        "logprobs": batch.logprobs, "proximal_logprobs": batch.old_logprobs, "old_logprobs": batch.rollout_logprobs,
        "advantages": batch.token_advantages,
    }  # fmt: skip
    if layout == "padded":
        return arrays | {"loss_mask": batch.mask}
    found = driver.packed(batch.mask, **arrays)
    return found | {"loss_mask": found["loss_mask"].bool()}


def run(loss_fn: Any, arrays: dict[str, Any], **options: Any) -> Result:
    logprobs = arrays["logprobs"].clone().requires_grad_()
    loss, stat = loss_fn(**(arrays | {"logprobs": logprobs}), **options)
    loss.backward()
    assert logprobs.grad is not None
    return (loss.detach(), logprobs.grad), stat


def check_stat(actual: dict[str, Any], expected: dict[str, Any], mask: Tensor) -> None:
    """AReaL logs these where the mask is set."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            where = mask | torch.tensor("mask" in name)  # its masks are denominators
            torch.testing.assert_close(actual[name][where], value[where], rtol=1e-6, atol=1e-6, check_dtype=False)
        else:
            assert actual[name] == value, name


OPTIONS: dict[str, dict[str, Any]] = {
    "token": {"eps_clip": 0.2, "eps_clip_higher": 0.28},
    "token, dual clip": {"eps_clip": 0.2, "c_clip": 1.5},
    "sequence": {"eps_clip": 0.2, "eps_clip_higher": 0.28, "importance_sampling_level": "sequence"},
    "sequence, dual clip": {"eps_clip": 0.2, "c_clip": 1.4, "importance_sampling_level": "sequence"},
    "sequence, the paper's range": {
        "eps_clip": 3e-4, "eps_clip_higher": 4e-4, "importance_sampling_level": "sequence"
    },
}  # fmt: skip
REJECTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "token, mask": {"level": "token", "action": "mask", "metric": "kl_k3", "upper": 0.01},
    "token, clamp": {"level": "token", "action": "clamp", "metric": "ratio", "lower": 0.9, "upper": 1.1},
    "sequence, mask": {"level": "sequence", "action": "mask", "metric": "ratio", "lower": 0.99, "upper": 1.02},
    "sequence, clamp": {"level": "sequence", "action": "clamp", "metric": "ratio", "lower": 0.99, "upper": 1.02},
}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("rejection", REJECTIONS)
@pytest.mark.parametrize("case", OPTIONS)
def test_loss_gradient_and_statistics(case: str, rejection: str, layout: str) -> None:
    """Advantages differ from token to token: with one ratio for a sequence both take their mean."""
    options = dict(OPTIONS[case])
    if rejection:
        options["rejection_sampling"] = RejectionSamplingConfig(**({"agg": "mean"} | REJECTIONS[rejection]))
    arrays = arrays_of(BATCH, layout)
    expected, their_stat = run(theirs.ppo_actor_loss_fn, arrays, **options)
    found, stat = run(ours.ppo_actor_loss_fn, arrays, **options)
    check_result(found, expected, 1e-7 if rejection else 1e-13)  # AReaL's weights are float32
    mask = arrays["loss_mask"]
    check_stat(stat, their_stat, mask if not rejection else mask & (their_stat["behave_imp_weight"] > 0))
    assert 0 < int(stat["clip_mask"].sum()) < int(mask.sum())
    assert bool(stat["dual_clip_mask"].any()) == ("dual" in case) or bool(rejection)
    if rejection:
        assert 0.02 < stat["filtered_fraction"] < 0.98


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sapo(layout: str) -> None:
    arrays = arrays_of(BATCH, layout)
    arrays["old_logprobs"] = arrays.pop("proximal_logprobs")
    expected, their_stat = run(theirs.sapo_loss_fn, arrays, tau_pos=1.0, tau_neg=1.05)
    found, stat = run(ours.sapo_loss_fn, arrays, tau_pos=1.0, tau_neg=1.05)
    check_result(found, expected)
    check_stat(stat, their_stat, arrays["loss_mask"])
    with pytest.raises(ValueError, match="importance_sampling_level: expected"):
        run(ours.sapo_loss_fn, arrays, tau_pos=1.0, tau_neg=1.05, importance_sampling_level="sequence")


# --- through the actor ------------------------------------------------------------------------------------------------

ACTOR: dict[str, dict[str, Any]] = {
    "GSPO": {"importance_sampling_level": "sequence"},
    "GRPO, M2PO": {"m2_threshold": 0.001},
    "GSPO, rejection": {
        "importance_sampling_level": "sequence",
        "rejection_sampling": RejectionSamplingConfig(level="token", action="mask", metric="ratio", upper=1.05),
    },
    "SAPO": {"use_sapo_loss": True},
    "distillation": {"importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize("case", ACTOR)
def test_the_actors_loss_and_log(case: str) -> None:
    """`grpo_loss_fn` with our losses in place of its own logs the same numbers, and stays as it is."""
    arrays = arrays_of(BATCH, "packed")
    arrays = {name: x.float() if x.is_floating_point() else x for name, x in arrays.items()}  # as AReaL's log asks for
    inputs = {
        "logprobs": arrays["old_logprobs"], "prox_logp": arrays["proximal_logprobs"],
        **{name: arrays[name] for name in ("advantages", "loss_mask", "cu_seqlens")},
    }  # fmt: skip
    if case == "distillation":
        inputs["teacher_logp"] = arrays["logprobs"] - 0.1
    loss_fn = functools.partial(
        their_actor.grpo_loss_fn, eps_clip=0.2, eps_clip_higher=None, c_clip=None, **ACTOR[case]
    )

    def result(function: Any) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
        logprobs = arrays["logprobs"].clone().requires_grad_()
        loss = function(logprobs, -logprobs.detach(), inputs)
        loss.backward()
        assert logprobs.grad is not None
        return (loss.detach(), logprobs.grad), stats_tracker.export()

    before = their_actor.ppo_actor_loss_fn
    found, log = result(ours.with_our_losses(loss_fn, "token_mean"))
    expected, their_log = result(loss_fn)
    check_result(found, expected, 1e-6)
    assert list(log) == list(their_log) and their_actor.ppo_actor_loss_fn is before
    for name, value in their_log.items():
        assert log[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_changed_actor_is_refused() -> None:
    with pytest.raises(TypeError, match="loss_fn: expected the partial of grpo_loss_fn"):
        ours.with_our_losses(lambda *_: None, "sequence_mean")
    with pytest.raises(RuntimeError, match="expected it to import"):
        ours.rebound(driver.packed, ppo_actor_loss_fn=None)


# --- the paper's mean -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rejection", ["", "sequence, mask"])
def test_a_mean_over_responses_adds_up(rejection: str) -> None:
    """As the engine scales it: each micro-batch's loss times its weight over that of all micro-batches and ranks."""
    options = dict(OPTIONS["sequence"], aggregation="sequence_mean")
    if rejection:
        options["rejection_sampling"] = RejectionSamplingConfig(**({"agg": "mean"} | REJECTIONS[rejection]))
    batch = BATCH._replace(token_advantages=BATCH.spread_advantages)
    (whole, gradient), _ = run(ours.ppo_actor_loss_fn, arrays_of(batch, "padded"), **options)
    total, parts = 0.0, []
    for start, end in PROMPTS:
        arrays = arrays_of(batch.rows(start, end), "padded")
        (loss, part), _ = run(ours.ppo_actor_loss_fn, arrays, **options)
        packed = arrays_of(batch.rows(start, end), "packed")
        weight = ours.num_responses(packed)
        assert weight == ours.num_responses(arrays) == arrays["loss_mask"].any(1).sum()
        total += float(loss * weight) / NONEMPTY
        parts.append(part * weight / NONEMPTY)
    check_result((torch.tensor(total, dtype=torch.float64), torch.cat(parts)), (whole, gradient))
    if not rejection:
        logprobs = batch.logprobs.clone().requires_grad_()
        loss, _ = policy_loss_from_logprobs(
            logprobs, batch.advantages, batch.old_logprobs, objective=GSPO(0.2, 0.28), mask=batch.mask
        )
        loss.backward()
        assert logprobs.grad is not None
        check_result((whole, gradient), (loss.detach(), logprobs.grad))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of one layer, and a tokenizer, as the engine reads them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    words = models.WordLevel({str(i): i for i in range(64)}, unk_token="2")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="1", pad_token="0").save_pretrained(path)
    return path


class Actor(ours.PolicyLosses, FSDPPPOActor):
    def optimizer_step(self) -> dict[str, float]:
        self.gradients = {name: x.grad.full_tensor().clone() for name, x in self.model.named_parameters()}
        found: dict[str, float] = super().optimizer_step()
        return found


def test_an_update_of_the_fsdp_actor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch for each response, in AReaL's own engine, gives the gradient of the mean over all responses.

    Only so: without flash-attn, on a CPU, responses that are packed together see each other.
    """
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(ranks.free_port()))
    config = PPOActorConfig(
        experiment_name="test", trial_name="test", path=str(folder), backend="fsdp:d1", dtype="float32",
        attn_impl="sdpa", optimizer=OptimizerConfig(lr=1e-3, gradient_clipping=1e9), mb_spec=MicroBatchSpec(n_mbs=6),
        gradient_checkpointing=False, eps_clip=3e-4, eps_clip_higher=4e-4, importance_sampling_level="sequence",
        ppo_n_minibatches=1, use_decoupled_loss=False, recompute_logprob=True, kl_ctl=0.0, temperature=0.8,
    )  # fmt: skip
    actor = Actor(config)
    actor.create_process_group(ParallelStrategy(data_parallel_size=1))
    try:
        actor.initialize(None, FinetuneSpec(total_train_epochs=1, dataset_size=8, train_batch_size=8))
        lengths = torch.tensor([12, 7, 9, 4, 11, 8])  # with prompts of four tokens: one response is empty
        attention = torch.arange(12) < lengths[:, None]
        ids = torch.randint(3, 64, attention.shape, generator=torch.Generator().manual_seed(1)) * attention
        mask = attention & (torch.arange(12) >= 4)
        rewards = torch.tensor([1.0, -0.5, 0.7, 2.0, -1.0, 0.3])
        data = {
            "input_ids": ids, "attention_mask": attention.long(), "loss_mask": mask.float(), "rewards": rewards,
            "logprobs": torch.zeros(ids.shape),
        }  # fmt: skip
        samples = [{name: x[i : i + 1] for name, x in data.items()} for i in range(6)]
        for sample, logprobs in zip(samples, actor.compute_logp(samples), strict=True):
            sample["prox_logp"] = logprobs
        model = {name: x.full_tensor().clone() for name, x in actor.model.state_dict().items()}
        actor.ppo_update(actor.compute_advantages(samples))
        log = stats_tracker.export_all()
    finally:
        actor.destroy()
    assert log["ppo_actor/update/num_micro_batches"] == 6 and log["ppo_actor/update/clip_ratio/avg"] == 0

    from transformers import Qwen3ForCausalLM

    whole = Qwen3ForCausalLM.from_pretrained(folder)
    whole.load_state_dict(model)
    logits = whole(input_ids=ids, attention_mask=attention.long(), use_cache=False).logits
    loss, _ = policy_loss(logits[:, :-1], ids[:, 1:], rewards, mask=mask[:, 1:], temperature=0.8)
    loss.backward()
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        error = (actor.gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


def test_the_pages_lines_are_areals_options() -> None:
    page = OmegaConf.create(page_lines.blocks("areal", "yaml")[0])
    page.gconfig = {"n_samples": 8}
    found = OmegaConf.merge({"actor": OmegaConf.structured(PPOActorConfig), "gconfig": {}}, page).actor
    assert (found.importance_sampling_level, found.eps_clip, found.eps_clip_higher) == ("sequence", 3e-4, 4e-4)
    assert found.kl_ctl == 0 and OmegaConf.to_object(found.reward_norm).group_size == 8


def test_logprobs_and_entropies() -> None:
    """Of bf16 logits too, against AReaL's own in float64; its are float32."""
    generator = torch.Generator().manual_seed(2)
    logits = (4 * torch.randn(9, 50, generator=generator)).bfloat16()
    labels = torch.randint(0, 50, (9,), generator=generator)
    weights = torch.randn(2, 9, generator=generator)

    def result(function: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.to(dtype, copy=True).requires_grad_()
        found = function(leaf * 1, labels, temperature=0.7)
        (found[0] * weights[0] + found[1] * weights[1]).sum().backward()
        assert leaf.grad is not None
        return found[0].detach(), found[1].detach(), leaf.grad

    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for actual, expected in zip(
            result(ours.gather_logprobs_entropy, dtype), result(gather_logprobs_entropy, torch.float32), strict=True
        ):
            tolerance = error if actual.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


# --- where results differ ---------------------------------------------------------------------------------------------


def test_token_mean_is_not_the_papers_mean() -> None:
    """AReaL's only mean gives a response weight by its length."""
    arrays = arrays_of(BATCH._replace(token_advantages=BATCH.spread_advantages), "packed")
    (_, by_token), _ = run(theirs.ppo_actor_loss_fn, arrays, **OPTIONS["sequence"])
    (_, by_response), _ = run(ours.ppo_actor_loss_fn, arrays, **OPTIONS["sequence"], aggregation="sequence_mean")
    cosine = torch.nn.functional.cosine_similarity(by_token, by_response, dim=0)
    assert 0.3 < float(cosine) < 0.95


def test_garbage_at_masked_positions() -> None:
    """AReaL's level "sequence" does not read it; its level "token" has a NaN gradient there, its SAPO too."""
    clean, garbage = arrays_of(BATCH, "padded"), arrays_of(BATCH.with_garbage(), "padded")
    for case in ("token", "sequence"):
        expected, _ = run(theirs.ppo_actor_loss_fn, clean, **OPTIONS[case])
        found, stat = run(ours.ppo_actor_loss_fn, garbage, **OPTIONS[case])
        check_result(found, expected)
        assert all(bool((x[~BATCH.mask] == 0).all()) for x in stat.values())
        (_, gradient), _ = run(theirs.ppo_actor_loss_fn, garbage, **OPTIONS[case])
        assert bool(gradient.isnan().any()) == (case == "token")


@pytest.mark.parametrize("level", ["token", "sequence", "sapo"])
def test_statistics_are_constants(level: str) -> None:
    """Also where the arrays that are constants of the loss require a gradient, as AReaL's are."""
    arrays = {name: x.clone().requires_grad_(name != "loss_mask") for name, x in arrays_of(BATCH, "padded").items()}
    if level == "sapo":
        arrays["old_logprobs"] = arrays.pop("proximal_logprobs")
        loss, stat = ours.sapo_loss_fn(**arrays, tau_pos=1.0, tau_neg=1.05)
    else:
        loss, stat = ours.ppo_actor_loss_fn(**arrays, eps_clip=0.2, c_clip=1.5, importance_sampling_level=level)
    assert not any(x.requires_grad for x in stat.values())
    loss.backward()
    assert all(arrays[name].grad is None for name in arrays if name != "logprobs")


def test_a_ratio_that_overflows() -> None:
    """AReaL's gradient is NaN, though the loss, which is clipped, is finite."""
    row = {"logprobs": torch.tensor(-0.5), "old_logprobs": torch.tensor(-900.0), "token_advantages": torch.tensor(1.0)}
    arrays = arrays_of(BATCH.with_row(0, **row), "padded")
    (loss, gradient), _ = run(theirs.ppo_actor_loss_fn, arrays, **OPTIONS["sequence"])
    assert math.isfinite(float(loss)) and bool(gradient[0].isnan().any())
    (loss, gradient), _ = run(ours.ppo_actor_loss_fn, arrays, **OPTIONS["sequence"])
    assert math.isfinite(float(loss)) and bool((gradient[0] == 0).all())


def test_nothing_to_learn_from() -> None:
    """A micro-batch whose mask is empty has a loss of 0 in both."""
    arrays = arrays_of(BATCH, "padded") | {"loss_mask": torch.zeros_like(BATCH.mask)}
    for function in (theirs.ppo_actor_loss_fn, ours.ppo_actor_loss_fn):
        (loss, gradient), _ = run(function, arrays, **OPTIONS["sequence"])
        assert float(loss) == 0 and bool((gradient == 0).all())
    assert ours.num_responses(arrays) == 0 and RESPONSES > NONEMPTY


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("proximal_logprobs", BATCH.old_logprobs.bfloat16()),
        ("proximal_logprobs", BATCH.old_logprobs[:, 1:]),
        ("proximal_logprobs", None),
        ("advantages", BATCH.advantages),
        ("advantages", BATCH.token_advantages.bfloat16()),
        ("loss_mask", 2 * BATCH.mask.long()),
        ("eps_clip", -0.1),
        ("eps_clip_higher", -0.1),
        ("c_clip", 0.5),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_errors_name_areals_arguments(name: str, value: Any, level: str) -> None:
    """AReaL has an `old_logprobs` of its own: what is wrong with the proximal ones must not be said of those."""
    given = arrays_of(BATCH, "padded") | {"eps_clip": 0.2, "importance_sampling_level": level, name: value}
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        ours.ppo_actor_loss_fn(**given)
