"""Our losses for torchtitan's RL trainer, called as `PolicyTrainer.forward_backward` calls them, on batches that
torchtitan's batcher packs: against its own DAPOLoss and GRPOLoss, and GSPO against plain float64.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import page_lines
import pytest
import ranks
import stand_ins
import torch
from checks import check_close, check_number
from torch import Tensor

with stand_ins.with_torchtitan():
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.experiments.rl.actors.trainer import PolicyTrainer
    from torchtitan.experiments.rl.components.batcher import BatchConfig, Batcher
    from torchtitan.experiments.rl.controller_metrics import combine_microbatch_metrics
    from torchtitan.experiments.rl.losses import DAPOLoss, GRPOLoss
    from torchtitan.experiments.rl.models.cast_linear import CastLinear
    from torchtitan.experiments.rl.types import RolloutTurnID, TrainingSample, TrainingSampleGroup
    from torchtitan.models.common.linear import Linear

    from gspo_kernels.integrations.torchtitan import LinearPolicyLoss, PolicyLoss, ResponseBatcher

pytestmark = pytest.mark.filterwarnings("ignore")

VOCAB, LENGTH, HIDDEN = 17, 16, 8
ADVANTAGES = (1.3, -0.7, 0.0, 1.1, -1.6, 0.4, -0.9)
DRIFTS = (0.2, -0.2, 0.0, 0.01, 0.02, 0.0, 0.1)  # of the samples' log-ratios: clipped, clipped, within ...
TABLE = 3 * torch.randn(VOCAB, LENGTH, VOCAB, generator=torch.Generator().manual_seed(5))  # logits by (token, position)


def samples() -> list[Any]:
    """Of one turn, of several, of a prompt of one token, of no response; a generator's log-probability may be NaN."""
    draw = random.Random(3)
    turns = [[(3, 4)], [(1, 5)], [(2, 2), (2, 3)], [(4, 1)], [(1, 6), (1, 4)], [(5, 0)], [(2, 6)]]
    found = []
    for i, (parts, advantage, drift) in enumerate(zip(turns, ADVANTAGES, DRIFTS, strict=True)):
        mask = [x for prompt, response in parts for x in [False] * prompt + [True] * response]
        ids = [draw.randrange(VOCAB) for _ in mask]
        now = [0.0, *(float(TABLE[ids[t], t].log_softmax(-1)[ids[t + 1]]) for t in range(len(ids) - 1))]
        old = [x - drift - 0.8 * (draw.random() - 0.5) for x in now]
        found.append(
            TrainingSample(
                min_policy_version=0, max_policy_version=0,
                rollout_id=RolloutTurnID(group_id=0, rollout_id=i, turn_id=0),
                token_ids=ids, loss_mask=mask, logprobs=[min(x, 0.0) * m for x, m in zip(old, mask, strict=True)],
                advantage=[advantage * m for m in mask],
            )
        )  # fmt: skip
    found[6].logprobs[4] = math.nan
    found[1].logprobs[3] = -math.inf
    return found


def packed(kind: Any, *, dp: int = 1, rows: int = 4, **options: Any) -> Any:
    config = kind.Config(batch=BatchConfig(local_batch_size=rows, seq_len=LENGTH), **options)
    batcher = config.build(num_prompts_per_train_step=1, dp_degree=dp, pad_id=0)
    return batcher.add_training_samples(
        training_sample_group=TrainingSampleGroup(group_id=0, training_samples=samples(), metrics=[])
    )


def logits_of(part: Any) -> Tensor:
    """Peaked float32 logits [B, L, V], the same for a token wherever it is packed."""
    return TABLE[part.token_ids, part.positions]


def called(loss_fn: Any, part: Any, tokens: int, values: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    logits = (logits_of(part) if values is None else values).requires_grad_()
    loss, metrics = loss_fn(
        logits, part.labels, tokens, generator_logprobs=part.generator_logprobs, advantages=part.advantages,
        loss_mask=part.loss_mask,
    )  # fmt: skip
    loss.backward()
    assert logits.grad is not None
    assert all(x.shape == () and not x.requires_grad for x in metrics.values())
    return loss.detach(), logits.grad, metrics


def check_gradient(actual: Tensor, expected: Tensor, labels: Tensor, error: float) -> None:
    """The target's column and all others, each relative to its own size in the row."""
    target = torch.nn.functional.one_hot(labels, VOCAB).bool()
    for name, columns in (("target", target), ("tail", ~target)):
        size = torch.where(columns, expected, 0.0).abs().amax(-1, keepdim=True)
        found, wanted = (torch.where(columns, x, 0.0) for x in (actual, expected))
        check_close(name, found, wanted, (error * size).expand_as(found))


@pytest.mark.parametrize(
    ("theirs", "eps"),
    [(GRPOLoss.Config(), (0.2, 0.2)), (DAPOLoss.Config(ratio_clip_low=0.1, ratio_clip_high=0.28), (0.1, 0.28))],
    ids=["GRPO", "DAPO"],
)
def test_torchtitans_own_losses(theirs: Any, eps: tuple[float, float]) -> None:
    """Loss, gradient by the logits, and metrics. theirs counts what is outside of the clip range, whatever the sign of
    the advantage; here what is clipped."""
    batch, ours = packed(Batcher), packed(ResponseBatcher, aggregation="token_mean")
    tokens = batch.num_global_valid_tokens
    assert ours.num_global_valid_tokens == tokens == 31 - 2
    loss_fn = PolicyLoss.Config(objective="ppo", eps_low=eps[0], eps_high=eps[1]).build()
    ((part,),), ((numbered,),) = batch.microbatches, ours.microbatches
    loss, gradient, metrics = called(loss_fn, numbered, tokens)
    expected, expected_gradient, expected_metrics = called(theirs.build(), part, tokens)
    check_gradient(gradient, expected_gradient, part.labels, 2e-6)
    check_number("loss", float(loss), float(expected), 1e-6)
    assert bool((gradient[~part.loss_mask] == 0).all())
    for name, value in expected_metrics.items():
        if name != "loss/ratio_clipped_frac":
            check_number(name, float(metrics[name]), float(value), 3e-6 * (1 + abs(float(value))))
    clipped, outside = float(metrics["loss/ratio_clipped_frac"]), float(expected_metrics["loss/ratio_clipped_frac"])
    assert 0 < clipped < outside
    assert clipped == pytest.approx(sum(float(metrics[f"loss/ratio_clipped_{x}_frac"]) for x in ("low", "high")))


def gspo_of(logits: list[Tensor], low: float, high: float, mean_of: str) -> Tensor:
    """The paper's loss of the samples, in float64; a token without a finite generator log-probability is left out."""
    terms, counts = [], []
    for sample, rows in zip(samples(), logits, strict=True):
        keep = [t for t in range(1, len(sample.token_ids)) if sample.loss_mask[t] and math.isfinite(sample.logprobs[t])]
        if not keep:
            continue
        logprobs = rows.log_softmax(-1)
        ratio = sum(logprobs[t - 1, sample.token_ids[t]] - sample.logprobs[t] for t in keep)
        ratio, advantage = (ratio / len(keep)).exp(), sample.advantage[keep[0]]  # type: ignore[union-attr]
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
        counts.append(len(keep))
    weights = [1 / len(terms)] * len(terms) if mean_of == "sequence_mean" else [x / sum(counts) for x in counts]
    return sum((w * x for w, x in zip(weights, terms, strict=True)), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize(("dp", "rows"), [(1, 4), (2, 1)])
def test_gspo_over_micro_batches_and_ranks(aggregation: str, dp: int, rows: int) -> None:
    """The sum of all shares is the loss of the step, however it is packed; so are the gradients of each sample."""
    batch = packed(ResponseBatcher, dp=dp, rows=rows, aggregation=aggregation)
    if dp > 1:
        assert len(batch.microbatches) > 1
    loss_fn = PolicyLoss.Config(eps_low=0.05, eps_high=0.05).build()
    total, found, logged = 0.0, {}, []
    for parts in batch.microbatches:
        for part in parts:
            loss, gradient, metrics = called(loss_fn, part, batch.num_global_valid_tokens)
            total += float(loss)
            logged.append({name: float(x) for name, x in metrics.items()})
            for row in range(rows):
                for start in (part.positions[row] == 0).nonzero()[:, 0].tolist():
                    ids = part.token_ids[row, start:].tolist()
                    found.update({tuple(s.token_ids): (gradient[row, start:], part) for s in samples()
                                  if s.token_ids[:-1] == ids[: len(s.token_ids) - 1]})  # fmt: skip
    logits = [TABLE[s.token_ids[:-1], range(len(s.token_ids) - 1)].double().requires_grad_() for s in samples()]
    expected = gspo_of(logits, 0.05, 0.05, aggregation)
    expected.backward()
    check_number("loss", total, float(expected.detach()), 1e-6)
    assert len(found) == len(ADVANTAGES)
    some = 0
    for sample, rows_of_sample in zip(samples(), logits, strict=True):
        gradient = found[tuple(sample.token_ids)][0][: len(rows_of_sample)].double()
        wanted = torch.zeros_like(gradient) if rows_of_sample.grad is None else rows_of_sample.grad
        check_gradient(gradient, wanted, torch.tensor(sample.token_ids[1:]), 1e-5)
        some += bool((wanted != 0).any())
    assert 2 <= some < len(ADVANTAGES) - 1  # of advantage 0, without a response, or clipped
    combined = combine_microbatch_metrics(logged)
    check_number("loss/mean", combined["loss/mean"], total, 1e-6)
    assert 0 < combined["loss/ratio_clipped_frac"] < 1


def test_a_far_log_ratio() -> None:
    """torchtitan clamps each log-ratio to +-10, without a gradient beyond; ours saturates above 20 alone."""
    ((part,),) = packed(ResponseBatcher, aggregation="token_mean").microbatches
    ((same,),) = packed(Batcher).microbatches
    values = logits_of(part)
    row = int((part.loss_mask[0] > 0).nonzero()[0])
    logprob = values[0, row].log_softmax(-1)[part.labels[0, row]]
    for x in (part, same):
        x.generator_logprobs[0, row], x.advantages[0, row] = logprob - 15, -1.0
    _, gradient, _ = called(PolicyLoss.Config(objective="ppo").build(), part, 1, values.clone())
    _, expected, _ = called(GRPOLoss.Config().build(), same, 1, values.clone())
    assert float(expected[0, row].abs().max()) == 0.0 < float(gradient[0, row].abs().max())


def test_the_batcher_and_the_losses_belong_together() -> None:
    ((ours,),), ((theirs,),) = packed(ResponseBatcher).microbatches, packed(Batcher).microbatches
    with pytest.raises(TypeError, match="loss_mask: expected the response numbers of ResponseBatcher"):
        called(PolicyLoss.Config().build(), theirs, 1)
    with pytest.raises(RuntimeError, match="bitwise_and"):
        called(DAPOLoss.Config().build(), ours, 1)
    with pytest.raises(ValueError, match="aggregation: expected one of 'sequence_mean', 'token_mean'"):
        packed(ResponseBatcher, aggregation="seq-mean")
    with pytest.raises(ValueError, match="objective: expected one of 'gspo'"):
        PolicyLoss.Config(objective="dapo").build()


# --- from hidden states -----------------------------------------------------------------------------------------------


def head(seed: int = 7, *, bias: bool = False) -> Any:
    module = Linear.Config(in_features=HIDDEN, out_features=VOCAB, bias=bias).build()
    with torch.no_grad():
        module.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(seed)))
        if bias:
            module.bias.copy_(torch.linspace(-1.0, 1.0, VOCAB))
    return module


def hidden_of(part: Any) -> Tensor:
    return torch.randn(*part.labels.shape, HIDDEN, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(("chunk_bytes", "bias"), [(None, False), (4 * VOCAB * 8, True)])
def test_from_hidden_states(chunk_bytes: int | None, bias: bool) -> None:
    """The trainer gives it the head as it does to its own wrapper. Loss, metrics and gradients are those of logits."""
    batch = packed(ResponseBatcher)
    ((part,),), tokens = batch.microbatches, batch.num_global_valid_tokens
    loss_fn = LinearPolicyLoss.Config(eps_low=0.99, eps_high=50.0, chunk_bytes=chunk_bytes).build()
    assert isinstance(loss_fn, ChunkedLossWrapper)
    with pytest.raises(RuntimeError, match="lm_head: expected the trainer to call set_lm_head first"):
        called(loss_fn, part, tokens, hidden_of(part))
    lm_head, same = head(bias=bias), head(bias=bias)
    loss_fn.set_lm_head(lm_head)
    loss, gradient, metrics = called(loss_fn, part, tokens, hidden_of(part))

    hidden = hidden_of(part).requires_grad_()
    expected, expected_metrics = PolicyLoss.Config(eps_low=0.99, eps_high=50.0).build()(
        same(hidden), part.labels, tokens, generator_logprobs=part.generator_logprobs, advantages=part.advantages,
        loss_mask=part.loss_mask,
    )  # fmt: skip
    expected.backward()
    check_number("loss", float(loss), float(expected.detach()), 1e-6)
    of_heads = [(x.grad, y.grad) for x, y in zip(lm_head.parameters(), same.parameters(), strict=True)]
    for actual, wanted in ((gradient, hidden.grad), *of_heads):
        assert actual is not None and wanted is not None and float(wanted.abs().max()) > 1e-3
        check_close("gradient", actual, wanted, 1e-5 * (wanted.abs() + 0.1 * wanted.abs().max()))
    for name, value in expected_metrics.items():
        check_number(name, float(metrics[name]), float(value), 1e-5 * (1 + abs(float(value))))


def test_a_head_that_casts() -> None:
    """LMHeadCastConverter's head multiplies in float32 what is bf16; the loss does so, too."""
    batch = packed(ResponseBatcher)
    ((part,),), tokens = batch.microbatches, batch.num_global_valid_tokens
    lm_head = CastLinear.Config(in_features=HIDDEN, out_features=VOCAB, bias=False).build().to(torch.bfloat16)
    with torch.no_grad():
        lm_head.weight.copy_(head().weight)
    options = {"eps_low": 0.99, "eps_high": 50.0}
    hidden = hidden_of(part).to(torch.bfloat16)
    with torch.no_grad():
        logits = lm_head(hidden)
    assert logits.dtype == torch.float32
    expected, _, metrics = called(PolicyLoss.Config(**options).build(), part, tokens, logits)
    linear = LinearPolicyLoss.Config(**options).build()
    linear.set_lm_head(lm_head)
    loss, gradient, found = called(linear, part, tokens, hidden)
    assert gradient.dtype == torch.bfloat16 == lm_head.weight.grad.dtype
    check_number("loss", float(loss), float(expected), 1e-6)
    check_number("entropy", float(found["trainer/entropy/mean"]), float(metrics["trainer/entropy/mean"]), 1e-5)


class Model(torch.nn.Module):
    """What the trainer calls of a model: it takes its head off for a loss that has the head."""

    def __init__(self, skip_lm_head: bool) -> None:
        super().__init__()
        values = torch.randn(VOCAB, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(9))
        self.table, self.lm_head, self._skip_lm_head = torch.nn.Parameter(values), head(), skip_lm_head

    def get_attention_masks(self, positions: Tensor) -> None:
        pass

    def forward(self, token_ids: Tensor, *, attention_masks: None, positions: Tensor) -> Tensor:
        hidden = self.table[token_ids, positions]
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def trained(kind: Any, rows: int) -> tuple[Model, dict[str, float]]:
    """A model after all calls of the trainer's own `forward_backward` of one step, and the step's metrics."""
    loss_fn = kind.Config(eps_low=0.99, eps_high=50.0).build()
    model = Model(skip_lm_head=isinstance(loss_fn, ChunkedLossWrapper))
    if model._skip_lm_head:
        loss_fn.set_lm_head(model.lm_head)
    trainer = object.__new__(PolicyTrainer)
    vars(trainer).update(
        model_parts=[model], device=torch.device("cpu"), dp_rank=0, loss_fn=loss_fn, policy_version=0,
        train_context=contextlib.nullcontext, parallel_dims=SimpleNamespace(get_optional_mesh=lambda name: None),
    )  # fmt: skip
    batch = packed(ResponseBatcher, rows=rows)
    found = [asyncio.run(trainer.forward_backward(x, batch.num_global_valid_tokens)) for x in batch.microbatches]
    assert len(found) == (1 if rows == 4 else 4)
    return model, combine_microbatch_metrics(found)


def test_the_pages_lines_are_in_torchtitans_recipe() -> None:
    recipe = Path(inspect.getfile(Batcher)).parents[1] / "examples" / "dapo_math" / "config_registry.py"
    pieces, text = page_lines.before(page_lines.blocks("torchtitan", "diff")[0]), recipe.read_text()
    assert len(pieces) == 2 and [text.count(piece) for piece in pieces] == [1, 1]
    assert "tensor_parallel_degree=2" in text.partition(pieces[1])[0], "what the page says of it"


def test_the_trainers_own_forward_backward() -> None:
    """From logits and from hidden states, in one micro-batch and in four: the same step."""
    model, metrics = trained(PolicyLoss, 4)
    for kind, rows in ((PolicyLoss, 1), (LinearPolicyLoss, 4), (LinearPolicyLoss, 1)):
        other, found = trained(kind, rows)
        for name, value in metrics.items():
            check_number(name, found[name], value, 1e-5 * (1 + abs(value)))
        for actual, wanted in zip(other.parameters(), model.parameters(), strict=True):
            assert actual.grad is not None and wanted.grad is not None
            check_close(
                "gradient", actual.grad, wanted.grad, 1e-5 * (wanted.grad.abs() + 0.1 * wanted.grad.abs().max())
            )


# --- tensor parallelism and FSDP2 -------------------------------------------------------------------------------------


def sharded(rank: int) -> dict[str, Tensor]:
    """This rank's columns (9 and 8 of 17) in both forms that torchtitan's models return; and a head under FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard
    from torchtitan.distributed.spmd_types import set_current_spmd_mesh

    batch = packed(ResponseBatcher)
    ((part,),), tokens, found = batch.microbatches, batch.num_global_valid_tokens, {}
    options = {"eps_low": 0.05, "eps_high": 0.05}
    mine = logits_of(part).split(9, -1)[rank].contiguous()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    loss_fn = PolicyLoss.Config(global_vocab_size=VOCAB, **options).build()
    with set_current_spmd_mesh(mesh):
        found["loss"], found["gradient"], metrics = called(loss_fn, part, tokens, mine.clone())
    found["entropy"] = metrics["trainer/entropy/mean"]
    global_logits = DTensor.from_local(
        mine.clone(), mesh, [Shard(2)], run_check=False, shape=(*mine.shape[:2], VOCAB), stride=logits_of(part).stride()
    )
    found["loss, DTensor"], gradient, _ = called(PolicyLoss.Config(**options).build(), part, tokens, global_logits)
    found["gradient, DTensor"] = gradient.to_local()  # type: ignore[attr-defined]

    lm_head = head()
    fully_shard(lm_head, mesh=init_device_mesh("cpu", (2,)))
    linear = LinearPolicyLoss.Config(eps_low=0.99, eps_high=50.0).build()
    linear.set_lm_head(lm_head)
    found["loss, FSDP2"], found["hidden, FSDP2"], _ = called(linear, part, tokens, hidden_of(part))
    found["weight, FSDP2"] = lm_head.weight.grad.full_tensor()
    with set_current_spmd_mesh(mesh), pytest.raises(NotImplementedError, match="expected no tensor parallelism"):
        called(linear, part, tokens, hidden_of(part))
    return found


def test_over_two_ranks() -> None:
    batch = packed(ResponseBatcher)
    ((part,),), tokens = batch.microbatches, batch.num_global_valid_tokens
    loss, gradient, metrics = called(PolicyLoss.Config(eps_low=0.05, eps_high=0.05).build(), part, tokens)
    linear, lm_head = LinearPolicyLoss.Config(eps_low=0.99, eps_high=50.0).build(), head()
    linear.set_lm_head(lm_head)
    linear_loss, of_hidden, _ = called(linear, part, tokens, hidden_of(part))
    results = ranks.run(2, sharded)
    for form in ("", ", DTensor"):
        whole = torch.cat([found[f"gradient{form}"] for found in results], -1)
        check_gradient(whole, gradient, part.labels, 1e-6)
        for found in results:
            check_number("loss", float(found[f"loss{form}"]), float(loss), 1e-6)
    for found in results:
        check_number("entropy", float(found["entropy"]), float(metrics["trainer/entropy/mean"]), 1e-6)
        check_number("loss, FSDP2", float(found["loss, FSDP2"]), float(linear_loss), 1e-6)
        for name, wanted in (("hidden", of_hidden), ("weight", lm_head.weight.grad)):  # both ranks have the same batch
            check_close(name, found[f"{name}, FSDP2"], wanted, 1e-5 * (wanted.abs() + 0.1 * wanted.abs().max()))
