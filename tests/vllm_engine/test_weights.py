"""Weights pushed into a running engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_outputs import NOISE
from tiny import Tiny, check, facts, generate, start_engine, steps

from gspo_kernels import rollout_mismatch
from gspo_kernels.integrations.vllm import push_weights

pytestmark = pytest.mark.plain_memory


def train(own: Tiny) -> None:
    """Stands for an optimizer's step, a large one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in own.model.parameters():
            weights += 0.2 * weights.std().nan_to_num() * torch.randn(weights.shape, generator=generator)


def mismatch(own: Tiny, engine: Any) -> Any:
    rollouts = check(generate(engine, own.prompts, n=8, max_tokens=24))
    advantages = torch.tensor([1.0, -1.0]).repeat(len(rollouts.finish_reasons) // 2)
    return rollout_mismatch(own.logprobs(rollouts), rollouts.old_logprobs, advantages, cu_seqlens=rollouts.cu_seqlens)


@pytest.mark.parametrize("tied", [True, False])
def test_a_stale_head(tied: bool) -> None:
    """`named_parameters()` has no head where it is tied to the embedding, and leaves the engine's as it was."""
    own = Tiny(tie_word_embeddings=tied)
    engine = start_engine(own)
    assert float(mismatch(own, engine).noise) < NOISE
    train(own)
    assert float(mismatch(own, engine).noise) > 0.1  # nothing was pushed yet
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": own.model.named_parameters()})
    engine.llm.reset_prefix_cache()
    stale = mismatch(own, engine)
    if tied:
        assert float(stale.noise) > 0.2 and float(stale.clip_fraction) > 0.4
        with pytest.raises(ValueError, match=r"weights: expected lm_head\.weight"):
            push_weights(engine.llm, own.model.named_parameters())
    else:
        assert float(stale.noise) < NOISE
    engine.push(own.model)
    right = mismatch(own, engine)
    assert float(right.noise) < NOISE and float(right.clip_fraction) == float(right.flip_fraction) == 0


def test_versions(record: Any) -> None:
    """Weights are pushed while responses are under way: each token has the version that sampled it.

    The cache is of the old weights. Resetting it with `reset_running_requests` makes the engine compute it again, and
    then each token's log-probability is its version's own.
    """
    own, older = Tiny(), Tiny()
    engine = start_engine(own)
    engine.push(own.model, "1")

    def push(step: int) -> None:
        if step == 4:
            train(own)
            engine.push(own.model, "2")
            assert engine.llm.reset_prefix_cache(reset_running_requests=True)

    request = {"n": 2, "max_tokens": 12, "ignore_eos": True}
    outputs = steps(engine, own.prompts[:2], push, **request)
    rollouts = check(outputs)
    assert rollouts.weight_versions is not None
    masks = rollouts.weight_versions.masks(rollouts.mask)
    assert list(masks) == ["1", "2"] and all(mask.sum() > 8 for mask in masks.values())
    for of, version in ((older, "1"), (own, "2")):
        off = (of.logprobs(rollouts) - rollouts.old_logprobs).abs()
        assert off[masks[version]].mean() < NOISE < 0.01 < off[~masks[version]].mean()
    trainer = torch.where(masks["1"], older.logprobs(rollouts), own.logprobs(rollouts))
    spans = [[[x.version, x.start, x.end] for x in each.weight_versions] for out in outputs for each in out.outputs]
    record(
        "offline_weight_versions", outputs, request=request,
        **(facts(own, rollouts) | {"trainer_logprobs": trainer.tolist(), "weight_versions": spans}),
    )  # fmt: skip
