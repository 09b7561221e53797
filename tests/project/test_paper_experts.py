"""examples/paper/routing.py and experts.py: routing replay replays, and changes nothing else."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor

from gspo_kernels import from_vllm

NEEDED = ("transformers", "tokenizers", "matplotlib", "tqdm")
HERE = all(find_spec(name) for name in NEEDED) and int(version("transformers").split(".")[0]) >= 5
pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(not HERE, reason="needs the demo's packages, with transformers 5: make demo"),
]


def experts() -> Any:
    """Imported by the first test that runs, because it takes seconds."""
    folder = str(Path(__file__).parents[2] / "examples" / "paper")
    if folder not in sys.path:
        sys.path.append(folder)
    return import_module("experts")


def routing() -> Any:
    experts()
    return import_module("routing")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Products this small gain nothing from a second thread."""
    torch.set_num_threads(1)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return experts().build_experts(experts().lab.build_tokenizer())


@pytest.fixture
def batch() -> Any:
    """Padded on both sides, as roll-outs are."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 16, (6, 12), generator=generator)
    attention, response = torch.ones_like(tokens), torch.ones_like(tokens)
    attention[1, :2] = attention[2, 9:] = 0
    response[:, :4] = response[2, 9:] = 0
    return routing().Batch(tokens, attention, response)


def moved(model: Any) -> Any:
    """The model after an update that changes many choices."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return other


def routed(model: Any, batch: Any) -> tuple[Tensor, Any]:
    """-> the logits, and the batch with the experts that gave them"""
    with routing().RoutingReplay(model).record() as choices:
        logits = batch.logits(model)
    chosen = torch.stack(choices, dim=1).unflatten(0, batch.input_ids.shape)
    return logits, routing().RoutedBatch(**vars(batch), experts=chosen)


def gradients(model: Any, logits: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    return list(torch.autograd.grad((logits.log_softmax(-1) * weights).sum(), list(model.parameters())))


class Seen:
    """What the routers of a model give to its experts, and what they make it from."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.inputs: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda _, args: self.calls.append(args[1:3]))
            layer.mlp.gate.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))


def test_forced_experts_are_used_and_weighed_by_the_new_router(model: Any, batch: Any) -> None:
    _, old = routed(model, batch)
    new = moved(model)
    own_logits, own = routed(new, batch)
    assert routing().changed(own.experts, old.experts).float().mean() > 0.1, "nothing to replay"

    seen = Seen(new)
    logits = old.logits(new)
    assert not torch.equal(logits, own_logits)
    for layer, ((index, weights), hidden) in enumerate(zip(seen.calls, seen.inputs, strict=True)):
        assert torch.equal(index, old.experts[:, :, layer].flatten(0, 1))
        router = new.model.layers[layer].mlp.gate
        scores = (hidden @ router.weight.T).double().exp().gather(1, index)
        torch.testing.assert_close(weights.double(), scores / scores.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(logits[:, -1].sum(), _routers(new)))


def _routers(model: Any) -> list[Tensor]:
    return [layer.mlp.gate.weight for layer in model.model.layers]


def test_the_gradient_is_that_of_the_forced_network(model: Any, batch: Any) -> None:
    """Along a direction that would change choices, against differences."""
    model = model.double()
    model.set_experts_implementation("eager")  # the default one takes no float64
    _, old = routed(model, batch)
    new = moved(model)
    picked = torch.linspace(-1, 1, old.logits(new).numel()).double()
    found = torch.autograd.grad((old.logits(new).flatten() * picked).sum(), _routers(new))
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for weight in _routers(new)]

    def along(step: float) -> Any:
        other = copy.deepcopy(new)
        with torch.no_grad():
            for weight, change in zip(_routers(other), direction, strict=True):
                weight += step * change
        return other

    slope = sum(float((gradient * change).sum()) for gradient, change in zip(found, direction, strict=True))
    there, back = along(3e-3), along(-3e-3)
    assert routing().changed(routed(there, batch)[1].experts, routed(back, batch)[1].experts).any()
    with torch.no_grad():
        rise = float(((old.logits(there) - old.logits(back)).flatten() * picked).sum())
    assert rise / 6e-3 == pytest.approx(slope, rel=1e-2)


def test_at_unchanged_weights_nothing_changes(model: Any, batch: Any) -> None:
    logits, old = routed(model, batch)
    replayed = old.logits(model)
    assert torch.equal(replayed, logits)
    for found, expected in zip(gradients(model, replayed), gradients(model, batch.logits(model)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_without_normalisation_weights_are_the_softmax(model: Any, batch: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.norm_topk_prob = False
    logits, old = routed(model, batch)
    assert torch.equal(old.logits(model), logits)


def test_an_engines_experts_are_replayed(model: Any, batch: Any) -> None:
    """As vLLM returns them: uint8, in another order, without the last token, of all layers, dense ones too."""
    tokens, ones = batch.input_ids[:3], torch.ones(3, 12, dtype=torch.long)
    _, old = routed(model, routing().Batch(tokens, ones, ones))
    of_layers = [old.experts[:, :, 0], torch.zeros_like(old.experts[:, :, 0]), old.experts[:, :, 1]]
    engines = torch.stack(of_layers, 2).flip(3)[:, :11].to(torch.uint8).numpy()
    outputs = [
        {
            "prompt_token_ids": row[:4],
            "outputs": [
                {
                    "token_ids": row[4:],
                    "logprobs": [{token: {"logprob": -1.0}} for token in row[4:]],
                    "routed_experts": experts,
                    "finish_reason": "length",
                }
            ],
            "finished": True,
        }
        for row, experts in zip(tokens.tolist(), engines, strict=True)
    ]
    packed = from_vllm(outputs).with_prompts()
    new = moved(model)
    replay = routing().RoutingReplay(new)
    replay.layers = [0, 2]  # the second of three layers is dense

    def logits() -> Tensor:
        called = new(input_ids=packed.input_ids[None], position_ids=packed.position_ids[None], use_cache=False)
        return called.logits.view(3, 12, -1)[:, :11]  # type: ignore[no-any-return]

    with torch.no_grad():
        own = logits()
        with replay.replay(packed.routed_experts):
            found = logits()
        torch.testing.assert_close(found, old.logits(new)[:, :11])
    assert (own - found).abs().max() > 1e-3, "nothing was replayed"


def test_hooks_go_even_after_an_error(model: Any, batch: Any) -> None:
    _, old = routed(model, batch)
    replay = routing().RoutingReplay(moved(model))
    with pytest.raises(RuntimeError, match="an error"), replay.replay(old.experts.flatten(0, 1)):
        raise RuntimeError("an error")
    assert not any(router._forward_hooks for router in replay.routers)


def test_mini_batches_keep_their_experts(model: Any, batch: Any) -> None:
    _, old = routed(model, batch)
    new = moved(model)
    parts: Iterator[Tensor] = (part.logits(new) for part in old.chunk(3))
    torch.testing.assert_close(torch.cat(list(parts)), old.logits(new), rtol=1e-5, atol=1e-6)


def test_changed_looks_at_sets_of_experts() -> None:
    old = torch.tensor([[[0, 1], [2, 3], [4, 5]]])
    new = torch.tensor([[[1, 0], [2, 7], [8, 9]]])
    assert routing().changed(new, old).tolist() == [[[False, False], [False, True], [True, True]]]


def test_one_update_is_seen_by_a_look() -> None:
    """Before an update no choice has changed and all ratios are 1; afterwards replay has ratios of its own."""
    settings = replace(experts().QUICK, warmup_steps=1, warmup_batch=4, groups=2, samples=2)
    learner = experts().lab.warmed_up(0, settings, build=experts().build_experts)
    rollout, old = routing().roll_out_routed(learner, settings)
    before = routing().look(learner.model, rollout, old)
    assert before["moved"].sum() == before["squares"].sum() == before["outside"].sum() == 0
    learner.model = moved(learner.model)
    after = dict(zip(routing().GROUPS, routing().look(learner.model, rollout, old)["squares"].tolist(), strict=True))
    assert after["tokens"] == pytest.approx(after["rerouted"] + after["kept"])
    assert after["tokens_replayed"] == pytest.approx(after["rerouted_replayed"] + after["kept_replayed"])
    assert after["tokens"] != after["tokens_replayed"] > 0
