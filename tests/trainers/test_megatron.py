"""Losses over Megatron-Core's own process groups, and a GPTModel of it in training, against float64 on one process.

Four ranks over gloo, of which those that are left over by tp x cp are data parallel. Megatron's function cuts the batch
for context-parallel ranks: two of 2 cp parts of each sequence. The vocabulary is padded as Megatron pads it. Gradients
of the model are scaled and summed by Megatron's schedule and its DistributedDataParallel.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from batches import Outcome
from checks import check_close, check_number, check_outcome
from linear import Gradients, check_same, from_logits
from megatron_ranks import GRIDS, PRELOADED, WORLD, Found, losses
from megatron_training import (
    CLIP,
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    STEPS,
    VOCAB,
    Responses,
    Way,
    all_responses,
    trained,
)  # fmt: skip
from sharding import Case
from torch import Tensor

ranks.PRELOADED += PRELOADED
pytestmark = ranks.mark

OF_LOGITS = [
    Case("gspo", "padded", {"seed": 1}),
    Case("gspo", "packed", {"seed": 2}, {"dual_clip": 3.0}),
    Case("gspo", "padded", {"seed": 3, "on_policy": True}),
    Case(
        "grpo", "padded", {"seed": 4, "ref": True, "temperature": "token"},
        {"beta": 0.1, "entropy_coef": 0.02, "aggregation": "token_mean"},
    ),
]  # fmt: skip
OF_HIDDEN = [
    Case("gspo", "padded", {"seed": 5}),
    Case("gspo", "packed", {"seed": 6}, rows=4),
    Case("gspo", "padded", {"seed": 7, "weights": "token"}, {"aggregation": "token_mean", "dual_clip": 3.0}),
]
WAYS = [
    Way(page=True),
    Way(dtype=torch.float64),
    Way(scaled="responses", sequence_parallel=True),
    Way(path="flag", scaled="tokens"),
    Way(path="flag", dtype=torch.float64, sequence_parallel=True),
    Way(path="flag", tied=True, page=True),
    Way(path="hook", sequence_parallel=True),
    Way(path="hook", tied=True, scaled="responses"),
    Way(page=True, cp=2),  # the last: they are trained after the others
    Way(path="flag", page=True, cp=2),
    Way(path="flag", scaled="responses", cp=2),
    Way(scaled="tokens", cp=2),
]


@pytest.fixture(scope="module")
def of_losses() -> list[Any]:
    return ranks.run(WORLD, losses, OF_LOGITS, OF_HIDDEN)


@pytest.fixture(scope="module")
def of_training() -> list[Any]:
    return ranks.run(WORLD, trained, WAYS)


def trained_ways(found: list[Any], k: int) -> list[Found]:
    return [one["trained"][k] for one in found]


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", GRIDS, ids=lambda at: f"tp{at[0]}-cp{at[1]}")
@pytest.mark.parametrize("case", range(len(OF_LOGITS)))
def test_losses_from_logits_over_megatrons_groups(of_losses: list[Any], case: int, at: tuple[int, int]) -> None:
    batch, found = OF_LOGITS[case].batch(), [one[at][0][case] for one in of_losses]
    n, vocab = batch.logits.shape
    gradient, padding = torch.full((n, vocab), math.nan), []
    for one in found:
        inside = min(vocab - one["columns"], one["gradient"].shape[1])
        columns = torch.arange(one["columns"], one["columns"] + inside)
        gradient[one["rows"][:, None], columns] = one["gradient"][:, :inside]
        padding += [one["gradient"][:, inside:].flatten(), one["padding"].flatten()]
    stats = SimpleNamespace(**agreed_stats(found))
    outcome = Outcome(loss_of(found), stats, gradient, torch.cat(padding), *arrays_of(found, len(batch.lengths), n))
    check_outcome(outcome, batch, OF_LOGITS[case].objective, **OF_LOGITS[case].options)


@pytest.mark.parametrize("at", GRIDS, ids=lambda at: f"tp{at[0]}-cp{at[1]}")
@pytest.mark.parametrize("case", range(len(OF_HIDDEN)))
def test_losses_from_hidden_states_over_megatrons_groups(of_losses: list[Any], case: int, at: tuple[int, int]) -> None:
    p, found = OF_HIDDEN[case].problem(), [one[at][1][case] for one in of_losses]
    n, width = p.hidden.shape
    weight = torch.zeros(64, width)  # 61 tokens, and padding
    logprobs, log_ratio, clipped = arrays_of(found, len(p.batch.lengths), n)
    truth = from_logits(p, "packed", OF_HIDDEN[case].objective, **OF_HIDDEN[case].options)
    for one in found:
        weight[one["columns"] : one["columns"] + len(one["weight"])] += one["weight"]
        assert bool((one["padding"] == 0).all()), "the padding has a gradient"
    assert bool((weight[len(p.weight) :] == 0).all()), "columns that pad the vocabulary have a gradient"
    agreed = agreed_stats(found)
    stats = SimpleNamespace(
        as_dict=lambda: agreed, logprobs=logprobs, log_ratio=log_ratio, clipped_low=clipped[:, 0],
        clipped_high=clipped[:, 1],
    )  # fmt: skip
    for tp_rank in range(at[0]):  # each has the whole gradient of the hidden states
        hidden = torch.full((n, width), math.nan)
        for one in found:
            if one["place"][2] == tp_rank:
                hidden[one["rows"]] = one["gradient"]
        check_same(Gradients(loss_of(found), stats, hidden, weight[: len(p.weight)], None), truth, p)


def test_log_probabilities_are_those_of_megatrons_cross_entropy(of_training: list[Any]) -> None:
    for one in of_training:
        (ours, gradient), (theirs, of_theirs) = one["cross entropy"]
        check_close("cross entropy", ours, theirs, 2e-6 * (1 + theirs.abs()))
        check_close("gradient", gradient, of_theirs, 2e-6 * of_theirs.abs().amax(-1, True).expand_as(gradient))


def loss_of(found: list[Found]) -> Tensor:
    """The shares of all ranks but those of a tp group, which have one loss."""
    for one in found:
        first = next(x for x in found if x["place"][:2] == one["place"][:2])
        assert torch.equal(one["loss"], first["loss"]), "the ranks of a tp group agree"
    return torch.stack([one["loss"] for one in found if one["place"][2] == 0]).sum()


def agreed_stats(found: list[Found]) -> dict[str, Tensor]:
    """Of all ranks, `stats.over` those of data parallelism."""
    first = {name: x for name, x in found[0]["stats"].items() if not name.startswith("head_")}
    for one in found:
        for name, x in first.items():
            assert torch.equal(one["stats"][name], x), f"{name} differs among ranks"
    return first


def arrays_of(found: list[Found], sequences: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [N], log_ratio [S] or [N], clipped [S, 2] or [N, 2])"""
    by_sequence = len(found[0]["log_ratio"]) == len(found[0]["sequences"])
    units = sequences if by_sequence else n
    logprobs, log_ratio = torch.full((n,), math.nan), torch.full((units,), math.nan)
    clipped = torch.zeros(units, 2, dtype=torch.bool)
    for one in found:
        logprobs[one["rows"]] = one["logprobs"]
        here = one["sequences"] if by_sequence else one["rows"]
        log_ratio[here] = one["log_ratio"]
        clipped[here] |= one["clipped"]  # a rank without a token of a response says False
    return logprobs, log_ratio, clipped


# --- training ---------------------------------------------------------------------------------------------------------

BY_ROW = ("linear_proj.weight", "linear_fc2.weight")  # RowParallelLinear: parts of the columns
BY_COLUMN = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "word_embeddings.weight",
             "output_layer.weight")  # fmt: skip


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole parameters, in float64, from those of the tp ranks."""

    def whole(name: str) -> Tensor:
        found = [part[name] for part in parts]
        if name.endswith(BY_ROW):
            return torch.cat(found, 1)
        if name.endswith(BY_COLUMN):
            return torch.cat(found, 0)
        for x in found[1:]:
            check_close(name, x, found[0], 1e-6 * found[0].abs().max().expand_as(x))
        return found[0]

    return {name: whole(name).double() for name in parts[0]}


def plain_model(w: dict[str, Tensor], tokens: Tensor, layers: int) -> Tensor:
    """The logits [B, T, V] of Megatron's GPTModel with local layers, written in torch; without layers, of no norm."""
    h = w["embedding.word_embeddings.weight"][tokens] + w["embedding.position_embeddings.weight"][:LENGTH]

    def normed(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(layers):
        at = f"decoder.layers.{i}"
        mixed = linear(f"{at}.self_attention.linear_qkv", normed(f"{at}.input_layernorm", h))
        q, k, v = mixed.unflatten(-1, (HEADS, 3, -1)).transpose(1, 2).unbind(-2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + linear(f"{at}.self_attention.linear_proj", mixed)
        inner = F.gelu(linear(f"{at}.mlp.linear_fc1", normed(f"{at}.pre_mlp_layernorm", h)))
        h = h + linear(f"{at}.mlp.linear_fc2", inner)
    head = w.get("output_layer.weight", w["embedding.word_embeddings.weight"])
    return (normed("decoder.final_layernorm", h) if layers else h) @ head[:VOCAB].T


def plain_loss(logits: Tensor, x: Responses, old: Tensor | None, aggregation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(GSPO's loss of a whole step, the log-probabilities, the fraction of responses that are clipped)."""
    logprobs = logits.log_softmax(-1).gather(-1, x.labels[..., None])[..., 0]
    old = logprobs.detach() if old is None else old
    counts = x.mask.sum(-1)
    ratio = (((logprobs - old) * x.mask).sum(-1) / counts.clamp(min=1)).exp()
    low, high = 1 - CLIP["eps_low"], 1 + CLIP["eps_high"]
    clipped = ratio.clamp(low, high)
    distance = torch.minimum((ratio - low).abs(), (ratio - high).abs()).detach()
    assert float(distance.min()) > 1e-4, "float32 makes the same decisions"
    losses = -torch.minimum(ratio * x.advantages, clipped * x.advantages)
    of_clip = (clipped * x.advantages < ratio * x.advantages)[counts > 0].double().mean()
    if aggregation == "token_mean":
        return (losses * counts).sum() / counts.sum(), logprobs.detach(), of_clip
    return losses[counts > 0].mean(), logprobs.detach(), of_clip


@pytest.mark.parametrize("k", range(len(WAYS)), ids=lambda k: "-".join(str(x) for x in vars(WAYS[k]).values()))
def test_three_steps_of_a_gpt_model_are_those_of_plain_torch(of_training: list[Any], k: int, threads: None) -> None:
    """Ranks 0 and 1 are a tp group, and so are 2 and 3: losses, all gradients, their norm, and the parameters."""
    torch.set_num_threads(1)
    way, found = WAYS[k], trained_ways(of_training, k)
    number = 1e-12 if way.dtype is torch.float64 else 2e-6
    w = {name: x.requires_grad_() for name, x in merged([found[0]["initial"], found[1]["initial"]]).items()}
    responses, old, clip_fractions = all_responses(), None, []
    for step in range(STEPS):
        logits = plain_model(w, responses.tokens, LAYERS if way.cp == 1 else 0)
        loss, logprobs, clip_fraction = plain_loss(logits, responses, old, way.aggregation)
        old = logprobs if old is None else old
        gradients = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        clip_fractions.append(float(clip_fraction))
        for replica in (found[:2], found[2:]):
            check_gradients(step, merged([one["steps"][step][2] for one in replica]), gradients, number)
        logged = [float(sum(one["steps"][step][k] for one in (found[0], found[2]))) for k in range(2)]
        check_number("loss", logged[0] / multiplied(way), float(loss.detach()), number * 10)
        assert logged[1] / int(responses.mask.any(-1).sum()) == pytest.approx(clip_fractions[-1], rel=1e-6)
        with torch.no_grad():
            for name, x in w.items():
                x -= way.rate * gradients[name]
    assert clip_fractions[0] == 0 and 0 < clip_fractions[-1] < 1, f"steps of every kind: {clip_fractions}"
    for replica in (found[:2], found[2:]):
        for name, x in merged([one["parameters"] for one in replica]).items():
            check_close(name, x, w[name], number * w[name].abs().max().expand_as(x))


def check_gradients(step: int, found: dict[str, Tensor], expected: dict[str, Tensor], number: float) -> None:
    norms = [float(torch.stack([x.norm() for x in each.values()]).norm()) for each in (found, expected)]
    check_number(f"step {step}, gradient norm", norms[0], norms[1], number * norms[1])
    for name, x in expected.items():
        size = max(float(x.abs().max()), 1e-3 * norms[1])  # of a key's bias, whose gradient is 0, there is only noise
        check_close(f"step {step}, gradient of {name}", found[name], x, 10 * number * torch.full_like(x, size))


def multiplied(way: Way) -> int:
    """By what Megatron divides the sum of all shares: micro-batches and ranks, or tokens."""
    return 2 * 2 if way.scaled == "by us" else int(all_responses().mask.sum())


# --- modules around the model, and what is refused --------------------------------------------------------------------


def test_the_head_is_handed_over_as_it_is(of_training: list[Any]) -> None:
    """Inside Float16Module and DistributedDataParallel, which would make a float32 copy of what the model returns."""
    for path in ("flag", "hook"):
        for found in (one["wrapped"][path] for one in of_training):
            assert found["same weight"] and found["dtype"] is torch.bfloat16 and found["shape"] == (2, LENGTH, HIDDEN)
            assert found["added in float32"] and found["rounded to bfloat16 before"] and found["no grad left"]
            assert found["packed"] == (2 * LENGTH, HIDDEN) and found["logit_scale"] == 0.25


def test_what_the_head_is_needed_for_is_refused(of_training: list[Any]) -> None:
    for found in (one["wrapped"]["flag"] for one in of_training):
        for name in ("mtp_num_layers", "defer_embedding_wgrad_compute"):
            assert found[name].type == "NotImplementedError" and found[name].message.startswith(f"{name}: expected")
        assert found["no model"].type == "TypeError" and found["no model"].message.startswith("model: expected")
        assert found["after an error"], "the model has its output layer again"
        assert found["another stage"] == (LENGTH, 2, HIDDEN), "a stage without a head returns hidden states to the next"


def test_the_pages_first_steps_have_the_papers_loss(of_training: list[Any]) -> None:
    found = of_training[0]["driver"]
    (loss, stats, gradient), (theirs, log, of_driver) = found["ours"], found["driver"]
    assert float(theirs) == pytest.approx(float(loss), rel=1e-6) and torch.allclose(of_driver, gradient, atol=1e-7)
    assert log.pop("loss") == pytest.approx(float(loss), rel=1e-6) and log["clip_fraction"] == 0.5
    assert log == pytest.approx({name: stats[name] for name in log}, rel=1e-6)
