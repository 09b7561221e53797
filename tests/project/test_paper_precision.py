"""examples/paper/noise.py and precision.py: estimators on known data, copies of a policy, clip decisions."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE

from gspo_kernels import grpo_loss, gspo_loss

DEMO = ("transformers", "tokenizers", "matplotlib", "tqdm")
HERE = all(find_spec(name) for name in DEMO)
pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(not HERE, reason="needs the demo's packages: make demo"),
]


def imported(name: str) -> Any:
    """By the first test that runs, because it takes seconds."""
    folder = str(Path(__file__).parents[2] / "examples" / "paper")
    if folder not in sys.path:
        sys.path.append(folder)
    return import_module(name)


@pytest.fixture
def noise() -> Any:
    return imported("noise")


@pytest.fixture
def precision() -> Any:
    return imported("precision")


@pytest.fixture(autouse=True)
def seeded(threads: None) -> None:
    """And on one thread: products this small gain nothing from a second one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def learner(precision: Any) -> Any:
    """Not trained, but with large logits: with equal ones a shifted row would pass for the right one."""
    lab = precision.lab
    tokenizer = lab.build_tokenizer()
    model = lab.build_model(tokenizer, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return lab.Learner(model, tokenizer, lab.Problems(lab.random.Random(0), digits=2, held_out=0))


# --- copies of the policy ---------------------------------------------------------------------------------------------


def test_8_bit_weights_are_within_half_a_step_of_their_channel() -> None:
    weight = torch.randn(5, 64) * torch.tensor([[1e-4], [1.0], [1e4], [0.0], [1.0]])  # sizes far apart, and a zero
    weight[4] = torch.linspace(-1, 1, 64)  # its ends are codes
    found = imported("engines").Int8Weight.of(weight)
    assert found.codes.dtype == torch.int8 and found.codes.abs().max() == 127
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found.weight() - weight).abs() <= step * 0.5001).all()
    assert (found.weight() != weight)[:3].any(1).all(), "rounded at all"
    torch.testing.assert_close(found.weight()[4, [0, -1]], torch.tensor([-1.0, 1.0]))


def test_an_engine_is_a_copy_and_only_what_should_be_is_rounded(precision: Any, learner: Any) -> None:
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for kind in precision.PRECISIONS:
        engine = precision.copy_of(learner.model, kind)
        for name, value in engine.state_dict().items():
            layer = ".layers." in name and value.ndim == 2
            rounded = kind == "bf16" or (kind == "int8" and layer)
            norm = value.ndim == 1  # all ones at the start: nothing to round
            assert torch.equal(value.float(), before[name]) == (not rounded or norm), (kind, name)
        assert all(buffer.dtype != torch.bfloat16 for buffer in engine.buffers()), "rotary frequencies"
        with torch.no_grad():
            for parameter in engine.parameters():
                parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


def test_the_engines_log_probabilities_are_of_the_tokens_that_the_trainer_recomputes(
    precision: Any, learner: Any
) -> None:
    settings = precision.replace(precision.SHORT, groups=3, samples=4, max_response=9)
    engine = precision.copy_of(learner.model, "fp32")
    rollout, recomputed = precision.roll_out(engine, learner.model, learner, settings)
    _, mask = rollout.batch.targets()
    mask = mask.bool()
    assert mask.sum() > 20 and recomputed[mask].std() > 0.5, "rows differ, so that a shift would be seen"
    torch.testing.assert_close(rollout.old_logprobs[mask], recomputed[mask], atol=1e-4, rtol=0)


def test_decisions_are_those_of_the_losses(precision: Any) -> None:
    """On ratios within and beyond both clip ranges."""
    logits, token_ids = torch.randn(64, 7, 5), torch.randint(5, (64, 7))
    new = logits.log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)
    old = (new - torch.randn(64, 7) * torch.tensor([1e-4, 0.4]).repeat(32)[:, None]).clamp(max=0.0)
    advantages = torch.randn(64).sign()
    mask = torch.arange(7) < torch.arange(64)[:, None] % 7 + 1
    for name, loss in (("gspo", gspo_loss), ("grpo", grpo_loss)):
        expected = loss(logits, token_ids, advantages, old, mask=mask).stats.clip_fraction.item()
        assert 0.05 < expected < 0.95
        found = precision.decisions(new - old, mask, advantages)[name]
        assert found.float().mean().item() == pytest.approx(expected, abs=1e-6)
    advantages[::2] = 0
    assert len(precision.decisions(new - old, mask, advantages)["gspo"]) == 32, "no advantage, no decision"


def test_distance_of_log_ratios_of_both_signs(precision: Any) -> None:
    log_ratio = 0.1 * torch.randn(50, 8)
    mask = torch.ones(50, 8)
    found = precision.apart(log_ratio, mask)
    assert found["drift"] == pytest.approx(log_ratio.mean().item(), rel=1e-5)
    assert found["token"] == pytest.approx(log_ratio.double().var().item(), rel=1e-5)
    assert found["kl_k3"] == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-4)


# --- estimators -------------------------------------------------------------------------------------------------------


def test_log_weights_of_independent_tokens(noise: Any) -> None:
    """0.1 per token: sums grow with length, means fall; padding has no effect."""
    lengths = torch.tensor([4, 32]).repeat_interleave(20_000)
    mask = torch.arange(32) < lengths[:, None]
    log_ratio = torch.where(mask, 0.1 * torch.randn(mask.shape) + 0.01, torch.nan)
    bins = noise.by_length(mask, edges=(2, 5, 20, 33), fewest=30)
    assert [held.sum() for held in bins] == [20_000, 20_000], "empty bins are left out"
    for length, held in zip((4, 32), bins, strict=True):
        found = noise.LogWeights.of(log_ratio[held], mask[held])
        assert (found.length, found.responses) == (length, 20_000)
        assert found.token == pytest.approx(1e-2, rel=0.05)
        assert found.mean == pytest.approx(1e-2 / length, rel=0.05)
        assert found.sum == pytest.approx(1e-2 * length, rel=0.05)
        assert found.drift == pytest.approx(1e-2, rel=0.1)
    assert noise.slope([4, 8, 32], [3 / 4, 3 / 8, 3 / 32]) == pytest.approx(-1)


def test_scatter_is_the_covariance_and_the_unbiased_signal(noise: Any) -> None:
    vectors = torch.randn(50, 8, dtype=torch.float64) + torch.arange(8)
    scatter = noise.Scatter()
    for vector in vectors:
        scatter.add(vector)
    assert scatter.trace == pytest.approx(vectors.T.cov().trace().item())
    pairs = vectors @ vectors.T  # the mean product of two different vectors is the unbiased one
    assert scatter.signal == pytest.approx(((pairs.sum() - pairs.diagonal().sum()) / (50 * 49)).item())


def test_variants_without_clipping_are_the_losses_without_clipping(noise: Any, learner: Any) -> None:
    group = noise.answer(learner.model, learner.tokenizer, ["4+7="], noise.replace(noise.SMOKE, samples=6))
    token_ids, mask = group.batch.targets()
    group.advantages = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, 1.0])
    group.old_logprobs = (group.old_logprobs + 0.3 * torch.randn(mask.shape)).clamp(max=0.0)
    logits = group.batch.logits(learner.model).detach().requires_grad_()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    found, _ = noise.losses(logits, group)
    found = {name: gradient(loss) for name, loss in found.items()}
    wide = {"eps_low": 0.999, "eps_high": 1e3}
    for name, policy_loss in (("gspo", gspo_loss), ("grpo", grpo_loss)):
        loss = policy_loss(logits, token_ids, group.advantages, group.old_logprobs, mask=mask, **wide).loss
        torch.testing.assert_close(found[name], gradient(loss), atol=1e-7, rtol=1e-4)
        assert not torch.allclose(found[name], found[f"{name} clipped"], rtol=1e-2), "something is clipped"
    loss = grpo_loss(logits, token_ids, group.advantages, mask=mask).loss
    torch.testing.assert_close(found["none"], gradient(loss))
    differ = [(found[name] - found["none"]).norm() for name in ("gspo", "grpo", "product")]
    assert differ == sorted(differ) and differ[0] > 0
