"""Losses for torchtitan's RL trainer (torchtitan.experiments.rl), and the batcher that numbers responses for them.

torchtitan packs several samples into a row and tells a loss which tokens count, but not where a sample ends. A ratio
per response has to know: `ResponseBatcher` puts the number of its response in the place of each True of the loss mask.

    async_loop=AsyncLoopConfig(batcher=ResponseBatcher.Config(batch=BatchConfig(...)), ...),
    trainer=PolicyTrainer.Config(loss=PolicyLoss.Config(eps_low=3e-4, eps_high=4e-4), ...),

See docs/torchtitan.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.experiments.rl.components.batcher import Batcher

from ..base import checks
from ..base.packed_rows import bounds_of
from ..linear.from_hidden import linear_policy_loss
from ..linear.model_head import Found, head_tensors, run_at_head
from ..losses.from_logits import policy_loss
from ..losses.objectives import Objective
from ..losses.stats import Stats
from .objectives import objective_of

__all__ = ["LinearPolicyLoss", "PolicyLoss", "ResponseBatcher"]

# --- the batcher ------------------------------------------------------------------------------------------------------


class ResponseBatcher(Batcher):
    """torchtitan's batcher, with response numbers in the loss mask and, if asked, the mean over responses.

    `loss_mask` becomes float32 [B, L]: k where a token of the k-th response of its micro-batch counts, 0 elsewhere.
    torchtitan's own losses refuse it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Batcher.Config):
        aggregation: str = "sequence_mean"
        """"sequence_mean": each response of the step has the same weight, GSPO's mean. "token_mean": each token has,
        torchtitan's."""

    def __init__(self, config: Config, **options: Any) -> None:
        checks.choice("aggregation", config.aggregation, ("sequence_mean", "token_mean"))
        super().__init__(config, **options)
        self.aggregation = config.aggregation

    def add_training_samples(self, *, training_sample_group: Any) -> Any:
        batch = super().add_training_samples(training_sample_group=training_sample_group)
        return None if batch is None else self.numbered(batch)

    def numbered(self, batch: Any) -> Any:
        """A TrainingBatch of torchtitan's, with response numbers in its loss masks and weighted advantages."""
        parts = [[_numbered(part) for part in ranks] for ranks in batch.microbatches]
        if self.aggregation == "sequence_mean":
            counts = [[_lengths(part) for part in ranks] for ranks in parts]
            responses = sum(int((count > 0).sum()) for ranks in counts for count in ranks)
            factor = batch.num_global_valid_tokens / max(responses, 1)
            parts = [
                [_weighted(part, factor / count.clamp(min=1)) for part, count in zip(*pair, strict=True)]
                for pair in zip(parts, counts, strict=True)
            ]
        return replace(batch, microbatches=parts)


def _numbered(part: Any) -> Any:
    """A sample starts where its positions start again at 0; so does the padding of a row."""
    numbers = (part.positions == 0).flatten().cumsum(0).view_as(part.positions)
    return replace(part, loss_mask=torch.where(part.loss_mask, numbers, 0).float())


def _lengths(part: Any) -> Tensor:
    """[numbers] int64: how many tokens of each response the loss counts."""
    numbers = torch.where(torch.isfinite(part.generator_logprobs), part.loss_mask, 0.0).long().flatten()
    return torch.bincount(numbers[numbers > 0], minlength=1 + int(part.loss_mask.max()))


def _weighted(part: Any, factors: Tensor) -> Any:
    """The loss is divided by the tokens of the step: the advantages carry what makes that a mean over responses."""
    return replace(part, advantages=part.advantages * factors[part.loss_mask.long()].float())


# --- from logits ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig(BaseLoss.Config):
    """The objective of both losses below."""

    objective: str = "gspo"
    """A name of `gspo_kernels.integrations.objectives`."""

    eps_low: float | None = None
    """Lower bound of the clip range, as a distance from 1. None: the objective's default, 3e-4 for GSPO."""

    eps_high: float | None = None
    """Upper bound, as a distance from 1. None: the objective's default, 4e-4 for GSPO."""

    dual_clip: float | None = None
    """The largest ratio that counts for a negative advantage. None: no bound."""


class PolicyLoss(BaseLoss):
    """GSPO, or an objective with a ratio per token, from the logits [B, L, V] that the model returns.

    A vocabulary that tensor parallelism shards is not gathered. No host sync.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ObjectiveConfig):
        global_vocab_size: int | None = None
        """Needed where tensor parallelism shards the vocabulary unevenly. None: evenly."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        del compile_config  # the trainer compiles no loss
        self.objective = _objective(config)
        self.global_vocab_size = config.global_vocab_size

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        global_valid_tokens: float | Tensor | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the loss of the step.

        Args:
            logits: [B, L, V], or this rank's columns: a plain shard (torchtitan's "spmd_types") or a DTensor.
            labels: [B, L], the tokens that the rows predict.
            global_valid_tokens: of all ranks and micro-batches, those with finite generator log-probabilities. None: 1.
            generator_logprobs: [B, L] float32, the old log-probabilities. Tokens whose own is not finite do not count.
            advantages: [B, L], of `ResponseBatcher`.
            loss_mask: [B, L], of `ResponseBatcher`: response numbers.

        Returns: the loss, and torchtitan's metrics with its reductions: shares of `global_valid_tokens`, to be summed,
            and one maximum.
        """
        tokens = _Tokens(generator_logprobs, advantages, loss_mask, global_valid_tokens)
        logits, shard = self._local(logits)
        loss, stats = policy_loss(
            logits.flatten(0, 1), labels.flatten(), objective=self.objective, **tokens.arguments(), **shard
        )
        return loss, tokens.metrics(loss, stats)

    def _local(self, logits: Any) -> tuple[Tensor, dict[str, Any]]:
        """(this rank's columns, the arguments that say which)."""
        size = self.global_vocab_size
        if checks.is_dtensor(logits):
            mesh, size = logits.device_mesh, logits.shape[-1]
            sharded = [dim for dim, place in enumerate(logits.placements) if place.is_shard(logits.ndim - 1)]
            logits = logits.to_local()
        else:
            mesh = current_spmd_mesh()
            sharded = [mesh.mesh_dim_names.index("tp")] if spmd_mesh_size("tp") > 1 else []
        if not sharded:
            return logits, {}
        (dim,) = sharded
        group, rank = mesh.get_group(dim), mesh.get_local_rank(dim)
        # As torch and torchtitan shard a dimension: parts of equal width, but for the last.
        start = None if size is None else min(size, -(-size // group.size()) * rank)
        return logits, {"tp_group": group, "vocab_start": start, "vocab_size": size}


class LinearPolicyLoss(ChunkedLossWrapper):
    """The same from the hidden states [B, L, D] that enter the LM head, without the logits.

    The trainer treats it as its ChunkedLossWrapper: the model skips its head, and the loss gets the head's module.
    torchtitan's wrapper calls a loss for one chunk of a row at a time, which a ratio per response cannot be computed
    from. Not with tensor parallelism.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ObjectiveConfig):
        chunk_bytes: int | None = None
        """Memory for a chunk of logits. None: 1.25 GiB on a GPU."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:  # super() wants chunks
        del compile_config
        self.objective = _objective(config)
        self.chunk_bytes = config.chunk_bytes
        self.lm_head = None

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: float | Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `PolicyLoss`, from hidden states [B, L, D]. The gradients of both operands are computed here."""
        if checks.is_dtensor(pred) or spmd_mesh_size("tp") > 1:
            raise NotImplementedError("LinearPolicyLoss: expected no tensor parallelism; use PolicyLoss with it")
        if self.lm_head is None:
            raise RuntimeError("lm_head: expected the trainer to call set_lm_head first")
        tokens = _Tokens(global_valid_tokens=global_valid_tokens, **loss_inputs)
        head = _Head(self.lm_head)

        def job(hidden: Tensor, module: Any) -> Found:
            operands = head_tensors(module, hidden, tokens.mask.view_as(labels))
            dtype = getattr(module, "compute_dtype", operands["weight"].dtype)
            loss, stats = linear_policy_loss(
                hidden.flatten(0, 1).to(dtype), operands["weight"].to(dtype), labels.flatten(),
                objective=self.objective, bias=operands["bias"], chunk_bytes=self.chunk_bytes, **tokens.arguments(),
            )  # fmt: skip
            return Found((loss,), stats)

        found, _ = run_at_head(head, head, job, {"hidden": pred})
        return found.results[0], tokens.metrics(found.results[0], found.constants)


class _Head:
    """The LM head's module, as the model that `run_at_head` expects."""

    def __init__(self, lm_head: Any) -> None:
        self.lm_head = lm_head

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def __call__(self, hidden: Tensor) -> Any:
        return SimpleNamespace(logits=self.lm_head(hidden))


# --- what both have in common -----------------------------------------------------------------------------------------


def _objective(config: ObjectiveConfig) -> Objective:
    given = {name: getattr(config, name) for name in ("eps_low", "eps_high", "dual_clip")}
    return objective_of(config.objective, **{name: x for name, x in given.items() if x is not None})


class _Tokens:
    """The arrays [B, L] of a micro-batch as one packed sequence of responses."""

    def __init__(
        self,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
        global_valid_tokens: float | Tensor | None,
    ) -> None:
        if not loss_mask.is_floating_point():
            raise TypeError(
                f"loss_mask: expected the response numbers of ResponseBatcher, float32; got {loss_mask.dtype}. Set "
                "async_loop.batcher to gspo_kernels.integrations.torchtitan.ResponseBatcher.Config"
            )
        numbers = loss_mask.flatten().long()
        self.mask = (numbers > 0) & torch.isfinite(generator_logprobs.flatten())
        self.old_logprobs = generator_logprobs.flatten()
        self.advantages = advantages.flatten()
        self.cu_seqlens = bounds_of(numbers.cummax(0).values)  # a prompt belongs to the response before it
        count = 1.0 if global_valid_tokens is None else global_valid_tokens
        if not isinstance(count, Tensor):
            count = torch.full((), count, dtype=torch.float64, device=numbers.device)
        self.count = count.double().clamp(min=1.0)

    def arguments(self) -> dict[str, Any]:
        return {
            "advantages": self.advantages[None], "old_logprobs": self.old_logprobs, "mask": self.mask,
            "cu_seqlens": self.cu_seqlens, "aggregation": "token_mean", "normalizer": self.count,
        }  # fmt: skip

    @torch.no_grad()
    def metrics(self, loss: Tensor, stats: Stats) -> dict[str, Tensor]:
        share = stats.num_tokens / self.count
        difference = stats.logprobs.flatten() - torch.where(self.mask, self.old_logprobs, 0.0)
        differs = (difference.abs() > 1e-6).double()
        return {
            "loss/mean": loss.detach(),
            "loss/ratio_mean": stats.ratio_mean * share,
            "loss/ratio_clipped_frac": stats.clip_fraction * share,
            "loss/ratio_clipped_low_frac": stats.clip_fraction_low * share,
            "loss/ratio_clipped_high_frac": stats.clip_fraction_high * share,
            "bit_wise/logprob_diff/mean": difference.sum() / self.count,
            "bit_wise/ratio_tokens_different/mean": differs.sum() / self.count,
            "bit_wise/logprob_diff/max": difference.abs().max(),
            "trainer/entropy/mean": stats.entropy * share,
        }
