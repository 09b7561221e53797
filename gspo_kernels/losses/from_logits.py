"""The public losses from logits and from log-probabilities: rows, then the objective, then a scalar and stats."""

from __future__ import annotations

from typing import Any, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from ..base import checks
from ..base.agreement import Agreement
from ..base.autograd import refuse_forward_mode
from ..base.collectives import ranks_of
from ..base.documentation import with_arguments_of
from ..base.layout import batch_shape
from ..rows.arguments import (
    agree_on_rows,
    check_full_distribution,
    check_kept_tokens,
    check_logits,
    check_mask,
    row_arrays,
)
from ..rows.dispatch import choose
from ..rows.kept import KeptTokens
from ..rows.types import RowOptions
from ..rows.vocab_shard import shard_of, tp_ranks, vocabulary_of
from . import fused_loss
from .arguments import agree_on_sequences
from .clipped import GRPO, GSPO, PPO, GSPOToken
from .from_rows import KeptLogprobs, TokenLogprobs, logprobs_of_rows, loss_of_rows
from .objectives import Objective
from .token_stage import LossOutput, token_inputs


class CommonOptions(TypedDict, total=False):
    """Keyword arguments of every loss; `policy_loss` explains them."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    kept: KeptTokens | None
    ref_logprobs: Tensor | None
    beta: float
    kl_estimator: str
    kl_weighting: str
    entropy_coef: float
    importance_weights: Tensor | None
    rollout_logprobs: Tensor | None
    aggregation: str | None
    group_tokens: Tensor | None
    normalizer: float | Tensor | None
    max_log_ratio: float
    tp_group: Any
    vocab_start: int | None
    vocab_size: int | None
    cp_group: Any
    backend: str | None


class LossOptions(CommonOptions, total=False):
    """Keyword arguments of every loss from logits."""

    overwrite_logits: bool


class LogprobOptions(TypedDict, total=False):
    """Keyword arguments of `token_logprobs` that do not change what it returns."""

    mask: Tensor | None
    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    tp_group: Any
    vocab_start: int | None
    vocab_size: int | None
    overwrite_logits: bool
    backend: str | None


CLIP_RANGE = """
Args: clip range
    eps_low, eps_high: a ratio is clipped to the range from 1 - eps_low to 1 + eps_high, on the side that the sign of
        the advantage penalises.
    dual_clip: the largest ratio that counts for a negative advantage, above 1 (arXiv 1912.09729); None: no bound.
"""


def policy_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    objective: Objective = GSPO(),
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kept: KeptTokens | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_weighting: str = "none",
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    aggregation: str | None = None,
    group_tokens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    max_log_ratio: float = 20.0,
    tp_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    cp_group: Any = None,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> LossOutput:
    """Policy loss of any objective, from vocabulary-sized logits.

    A padded batch has logits [B, T, V] and token arrays [B, T]; a packed one has logits [N, V], token arrays [N] and
    `cu_seqlens` [S + 1]. Both give the same numbers. Row t of the logits predicts `token_ids[t]`: nothing is shifted
    inside (see `next_token_targets`). Logits may be strided views (`logits[:, :-1]`); they are never copied.

    Tensors are plain, dense and on the logits' device. Logits may be bf16; advantages, importance weights and the
    normalizer may be integers; all other numbers are float32 or float64. Other dtypes are refused by name, never cast:
    numbers that were rounded to bf16, as FSDP2 does by default to what passes through a module, have lost the digits
    that a clip range of 3e-4 needs (docs/inputs.md).

    Args: the batch
        logits: bf16, fp16, fp32 (fp64 on the reference backend). All arithmetic on them is fp32 or better. The gradient
            has their dtype; where fp16 overflows it is inf, for a loss scaler to see.
        token_ids: integers, one per row.
        advantages: one per sequence, [B] or packed [S]; objectives with a ratio per token, and GSPO-token, also take
            one per token, [B, T] or packed [N]. A second dimension says which: [S, 1] is one per sequence, [1, N] one
            per token (`advantages[:, None]`, `advantages[None]`). A packed batch with as many tokens as sequences needs
            it: the plain form is refused there if the objective takes both, unless every sequence has one token. Where
            that cannot be read for free (on a GPU, under torch.compile), the plain form is one per sequence.
        old_logprobs: log-probabilities under the policy that sampled, one per token. Positive ones where the mask is
            set are refused on the CPU; NaN makes the loss NaN. None means on-policy: every ratio is 1, and without KL
            and entropy terms the loss and its gradient take one pass over the logits (not in fp16, not under
            torch.compile; on a GPU, not with your own objective). Such a loss supports one backward pass. The CUDA
            kernels take one pass off-policy as well, for losses with a `row_slope` (GRPO, PPO, CISPO, DPPO, TOPRToken,
            DRO).
        mask: one per token, True (or 1) where it counts, False (or 0) elsewhere. Values at masked positions, NaN
            included, have no effect. Other numbers, such as those of an additive mask, are refused on the CPU or under
            GSPO_KERNELS_DEBUG=1; on a GPU, and under torch.compile, everything but 0 counts.
        cu_seqlens: int32 or int64 boundaries of packed sequences: 0, ..., N, never decreasing. Others are refused on
            the CPU or under GSPO_KERNELS_DEBUG=1; on a GPU they give a NaN loss.
        temperature: what logits are divided by: a number, one per token or, padded, one per sequence [B, 1].
        logit_scale: what the model multiplies its head's output by (Cohere, Granite); a number above 0.
        softcap: the bound c of a model that caps its logits (Gemma-2): c tanh(logit_scale * logits / c) is what the
            temperature divides. A logit of -inf becomes -c, and no longer forbids its token. None: not capped. Pass
            the head's output with the model's own two numbers (`logit_transform_of`), or a model's finished logits
            without them.
        kept: the columns from which each token was sampled (top-p, top-k, min-p). All of the loss, KL and entropy
            included, is then of the distribution over them, and the gradient of all other columns is 0: pass old,
            reference and rollout log-probabilities of it, too. Kept columns alone are read. None: the whole vocabulary.

    Args: KL and entropy
        ref_logprobs: of the reference policy, one per token; needed if `beta` is not 0.
        beta: weight of KL(policy || reference), added per token and aggregated like the policy term.
        kl_estimator: with d = ref - logprob, clamped to +-max_log_ratio: "k1": -d, "k2": d^2 / 2, "k3": exp(d) - d - 1.
        kl_weighting: "none", or "ratio": the estimator times the importance ratio of its token or sequence, gradient
            included, which makes the estimate of the KL's gradient unbiased off-policy (DeepSeek-V3.2, arXiv
            2512.02556, section 3.1; TRL's `use_bias_correction_kl`).
        entropy_coef: weight of the entropy bonus, whose gradient is exact.

    Args: objective and reduction
        objective: `GSPO()`, `GRPO()`, `CISPO()` or another of the package, or your own.
        importance_weights: constant factors of the policy term (rollout correction), one per sequence or per token, in
            the shapes of `advantages`, whatever the objective.
        rollout_logprobs: of the engine that sampled, one per token, for an objective that reads them (`DPPO`); others
            refuse them.
        aggregation: "sequence_mean": mean over a sequence's tokens, then over sequences; "token_mean": over all tokens;
            "sequence_sum": sum over a sequence's tokens, mean over sequences; "group_mean": mean over the tokens of all
            sequences of a group (a prompt), then over groups. None takes the objective's.
        group_tokens: for "group_mean", one per sequence: how many unmasked tokens its group has (`group_token_counts`).
            With `cp_group`, how many all ranks have, for all sequences.
        normalizer: a global count in place of the local one (of sequences; of tokens for "token_mean"; of groups for
            "group_mean"; see `global_count`): the shares of any split over micro-batches or ranks then add up to the
            whole batch's loss and gradient. A number above 0, or a 0-d tensor. 0 is right where no token counts, and
            gives 0. A tensor of anything else (0, negative, NaN, infinite) is refused on the CPU or under
            GSPO_KERNELS_DEBUG=1; elsewhere it gives a loss of NaN, and NaN for every gradient that is not 0.
        max_log_ratio: above it a ratio saturates: constant, no gradient, counted in `stats.saturated_fraction`.

    Args: parallel
        tp_group: the ranks over which the vocabulary is sharded (a process group, or a mesh of one dimension), or a
            `VocabularyShard` of them. `logits` are this rank's columns, [.., V / ranks] as in Megatron; all other
            arguments are the same on every rank of the group, and so is the result. One collective of 16 bytes a row,
            none in the backward. A DTensor with Shard(-1) is taken as it is and needs no group.
        vocab_start: the first column of this rank, for shards of unequal width. None: of equal width.
        vocab_size: how many columns are tokens, where the logits have more columns than the vocabulary has tokens
            (padded to a round number, as in Megatron): the others are not read and have a gradient of 0. None: all.
        cp_group: the ranks that share the tokens of each sequence (context parallelism). Every rank passes its own
            tokens, padded or packed, in any order, and the same sequences; a sequence of which it has no token is
            empty there. Sequence arrays, and the scalars of the stats, are those of all ranks. A rank's loss is its
            share, and shares add up to the loss; its gradient is that of the whole loss. One collective of two numbers
            a sequence (three with importance weights per token) and one for the stats; none in the backward. The token
            that a row predicts is often on another rank: shift first, then distribute.

    Args: memory and backend
        overwrite_logits: donates the logits buffer: the gradient is written over it, by the backward or, in one pass,
            by this call. Do not read the logits afterwards, and let no other argument share their memory. Their version
            counter is bumped, so autograd refuses any other use of them in a backward. Supports one backward pass. A
            view whose elements share memory (expanded, windows that overlap) is refused.
        backend: "cuda", "triton", "native", "reference" or None for the best that runs (see `explain`).

    Returns:
        `LossOutput(loss, stats)`. No host sync takes place.

    NaN in a logit, an old log-probability, one of the engine or, with `beta`, a reference one, where the mask is set,
    makes the loss NaN, and the gradient of that token's row; with GSPO, GSPO-token, GMPO and TOPR, of all rows of its
    sequence. All other rows keep the gradient that they have without it.

    Second derivatives, forward-mode AD and torch.func.grad raise RuntimeError.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; nothing has been written then. On
            the CPU, or under GSPO_KERNELS_DEBUG=1, what one rank refuses is refused by all ranks of its groups.
    """
    refuse_forward_mode("policy_loss", logits=logits)
    refuse_forward_mode(
        "policy_loss", reverse=False, advantages=advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs, importance_weights=importance_weights, temperature=temperature,
        normalizer=normalizer,
    )  # fmt: skip
    vocabulary = vocabulary_of(tp_group, vocab_start, vocab_size)
    tp, cp = tp_ranks(logits, -1, vocabulary), ranks_of("cp_group", cp_group)
    with Agreement("logits", logits, tp, cp) as agreement:
        logits, shard = shard_of("logits", logits, -1, vocabulary)
        columns = check_logits(logits, token_ids, overwrite_logits, vocabulary.size, shard)
        batch = batch_shape(token_ids.shape, mask, cu_seqlens, logits.device, cp)
        inputs = token_inputs(
            batch, objective, advantages, old_logprobs, ref_logprobs=ref_logprobs, beta=beta,
            kl_estimator=kl_estimator, kl_weighting=kl_weighting, entropy_coef=entropy_coef,
            importance_weights=importance_weights, rollout_logprobs=rollout_logprobs, aggregation=aggregation,
            group_tokens=group_tokens, normalizer=normalizer, max_log_ratio=max_log_ratio,
        )  # fmt: skip
        check_kept_tokens(kept, token_ids)
        arrays = row_arrays(logits.dtype, token_ids, batch.mask, temperature, logit_scale, softcap)
        rows = arrays.rows(logits, columns, kept)
        chosen = choose(rows.logits, backend, rows.fields_set())
        agree_on_rows(agreement, arrays, columns, shard, kept)
        agree_on_sequences(agreement, inputs)
    return loss_of_rows(logits, rows, inputs, chosen, overwrite_logits, shard)


@with_arguments_of(policy_loss, CLIP_RANGE)
def gspo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    eps_low: float = GSPO.eps_low,
    eps_high: float = GSPO.eps_high,
    dual_clip: float | None = None,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """GSPO (arXiv 2507.18071): one ratio, one clip and one advantage per response. See `GSPO` and `policy_loss`."""
    objective = GSPO(eps_low, eps_high, dual_clip)
    return policy_loss(logits, token_ids, advantages, old_logprobs, objective=objective, **options)


@with_arguments_of(policy_loss, CLIP_RANGE)
def gspo_token_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    eps_low: float = GSPOToken.eps_low,
    eps_high: float = GSPOToken.eps_high,
    dual_clip: float | None = None,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """GSPO-token (arXiv 2507.18071): GSPO with advantages per token. See `GSPOToken` and `policy_loss`."""
    objective = GSPOToken(eps_low, eps_high, dual_clip)
    return policy_loss(logits, token_ids, advantages, old_logprobs, objective=objective, **options)


@with_arguments_of(policy_loss, CLIP_RANGE)
def grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    eps_low: float = GRPO.eps_low,
    eps_high: float = GRPO.eps_high,
    dual_clip: float | None = None,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """GRPO (arXiv 2402.03300): one ratio and one clip per token. See `GRPO` and `policy_loss`."""
    objective = GRPO(eps_low, eps_high, dual_clip)
    return policy_loss(logits, token_ids, advantages, old_logprobs, objective=objective, **options)


@with_arguments_of(policy_loss, CLIP_RANGE)
def ppo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    eps_low: float = PPO.eps_low,
    eps_high: float = PPO.eps_high,
    dual_clip: float | None = None,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """PPO, clipped (arXiv 1707.06347): token ratios, mean over all tokens. See `PPO` and `policy_loss`."""
    objective = PPO(eps_low, eps_high, dual_clip)
    return policy_loss(logits, token_ids, advantages, old_logprobs, objective=objective, **options)


@with_arguments_of(policy_loss)
def policy_loss_from_logprobs(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    objective: Objective = GSPO(),
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_weighting: str = "none",
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    aggregation: str | None = None,
    group_tokens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    max_log_ratio: float = 20.0,
    cp_group: Any = None,
) -> LossOutput:
    """`policy_loss` from log-probabilities, [B, T] or packed [N]; differentiable in them.

    Args: the batch
        logprobs: current log-probabilities, float32 or float64: bf16 has no digits left at GSPO's clip range.

    Args: KL and entropy
        entropy: per token, float32 or float64, differentiable; needed if `entropy_coef` is not 0.

    Second derivatives and torch.func.vmap are supported without `cp_group`. Forward-mode AD and torch.func.grad are
    supported in padded layout, else they raise. The result and the errors are those of `policy_loss`.
    """
    refuse_forward_mode(
        "policy_loss_from_logprobs", reverse=False, advantages=advantages, old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs, importance_weights=importance_weights,
        normalizer=normalizer,
    )  # fmt: skip
    if cu_seqlens is not None or cp_group is not None:  # sums over segments and over ranks are operators
        refuse_forward_mode("policy_loss_from_logprobs", logprobs=logprobs, entropy=entropy)
    cp = ranks_of("cp_group", cp_group)
    with Agreement("logprobs", logprobs, cp=cp) as agreement:
        checks.digits("logprobs", checks.tensor("logprobs", logprobs, "log-probabilities per token"))
        if logprobs.ndim not in (1, 2):
            raise ValueError(f"logprobs: expected [sequences, tokens] or, packed, [tokens]; got {list(logprobs.shape)}")
        batch = batch_shape(logprobs.shape, mask, cu_seqlens, logprobs.device, cp)
        checks.log_probabilities("logprobs", logprobs, batch.mask)
        if entropy is not None:
            checks.floats("entropy", checks.tensor("entropy", entropy, "entropy per token"))
            checks.shape("entropy", entropy, logprobs.shape, "one per token")
            checks.same_device("entropy", entropy, logprobs.device)
        elif checks.number("entropy_coef", entropy_coef, "the weight of the entropy bonus") != 0.0:
            raise ValueError(f"entropy: expected one per token, because entropy_coef is {entropy_coef}; got None")
        inputs = token_inputs(
            batch, objective, advantages, old_logprobs, ref_logprobs=ref_logprobs, beta=beta,
            kl_estimator=kl_estimator, kl_weighting=kl_weighting, entropy_coef=entropy_coef,
            importance_weights=importance_weights, rollout_logprobs=rollout_logprobs, aggregation=aggregation,
            group_tokens=group_tokens, normalizer=normalizer, max_log_ratio=max_log_ratio,
        )  # fmt: skip
        agree_on_sequences(agreement, inputs)
    if fused_loss.takes_logprobs(inputs, logprobs):
        return fused_loss.loss_of_rows(inputs, logprobs, None if entropy is None else entropy.float())
    stage = inputs.stage()
    return stage.loss(logprobs.reshape(-1), None if entropy is None else stage.layout.select(entropy.reshape(-1)))


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    kept: KeptTokens,
    full_distribution: bool = ...,
    **options: Unpack[LogprobOptions],
) -> KeptLogprobs: ...


@overload
def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, kept: None = None, **options: Unpack[LogprobOptions]
) -> TokenLogprobs: ...


@with_arguments_of(policy_loss)
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kept: KeptTokens | None = None,
    full_distribution: bool = True,
    tp_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> TokenLogprobs | KeptLogprobs:
    """Log-probability of each token, entropy and logsumexp of its row, in one read of the logits; differentiable.

    The losses use the same kernel: compute old and reference log-probabilities with this function (under
    `torch.no_grad()`), so that no difference between implementations enters a clip range of 3e-4.

    Args: the batch
        logits: [B, T, V] or packed [N, V], as in `policy_loss`.
        token_ids: integers [B, T] or [N].
        mask: masked rows are not read and give 0.
        kept: the columns from which each token was sampled. The result is then `KeptLogprobs(kept, full)`, of the
            distribution over them and of that over all columns, from one read of the logits and with one gradient: a
            ratio over the kept columns and a KL over all come from one call.
        full_distribution: with `kept`, whether to compute `full`. If not, it is None, and kept columns alone are read.

    The errors are those of `policy_loss`.
    """
    refuse_forward_mode("token_logprobs", logits=logits)
    refuse_forward_mode("token_logprobs", reverse=False, temperature=temperature)
    vocabulary = vocabulary_of(tp_group, vocab_start, vocab_size)
    with Agreement("logits", logits, tp_ranks(logits, -1, vocabulary)) as agreement:
        logits, shard = shard_of("logits", logits, -1, vocabulary)
        columns = check_logits(logits, token_ids, overwrite_logits, vocabulary.size, shard)
        check_kept_tokens(kept, token_ids)
        check_full_distribution(full_distribution, kept, overwrite_logits and shard is not None)
        arrays = row_arrays(logits.dtype, token_ids, check_mask(mask, token_ids), temperature, logit_scale, softcap)
        rows = arrays.rows(logits, columns, kept)
        chosen = choose(rows.logits, backend, rows.fields_set())
        agree_on_rows(agreement, arrays, columns, shard, kept, full_distribution)
    options = RowOptions(overwrite_logits, chosen.name)
    return logprobs_of_rows(rows, options, shard, token_ids.shape, full_distribution)
