"""The public losses from hidden states and a head: no more than one chunk of logits exists at a time.

Arguments, stats and numbers are those of the losses from logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..base import checks
from ..base.agreement import Agreement
from ..base.autograd import refuse_forward_mode
from ..base.collectives import ranks_of
from ..base.documentation import with_arguments_of
from ..base.layout import batch_shape
from ..losses.arguments import agree_on_sequences
from ..losses.clipped import GRPO, GSPO, PPO, GSPOToken
from ..losses.from_logits import CLIP_RANGE, CommonOptions, policy_loss
from ..losses.from_rows import KeptLogprobs, TokenLogprobs
from ..losses.objectives import Objective
from ..losses.token_stage import LossOutput, TokenInputs, token_inputs
from ..rows.arguments import (
    agree_on_rows,
    check_full_distribution,
    check_kept_tokens,
    check_mask,
    check_vocab_size,
    row_arrays,
)
from ..rows.kept import KeptTokens
from ..rows.vocab_shard import vocabulary_of
from .arguments import (
    agree_on_chunks,
    check_head,
    check_operands,
    check_sparse_weight_grad,
    head_ranks,
    operands_of,
    product_dtype,
    refuse_transforms,
    shard_of_head,
)
from .kept_rows import kept_rows, logprobs_of_kept_rows, loss_of_kept_rows
from .operators import linear_logits_operator, linear_loss, linear_row_stats
from .types import HeadArguments


class LinearLossOptions(CommonOptions, total=False):
    """Keyword arguments of every loss from hidden states; `linear_policy_loss` explains them."""

    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None
    chunk_bytes: int | None
    skip_zero_advantage: bool
    sparse_weight_grad: bool


class LinearLogprobOptions(TypedDict, total=False):
    """Keyword arguments of `linear_token_logprobs` that do not change what it returns."""

    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    tp_group: Any
    vocab_start: int | None
    vocab_size: int | None
    chunk_bytes: int | None
    sparse_weight_grad: bool
    backend: str | None


@with_arguments_of(policy_loss)
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    objective: Objective = GSPO(),
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
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
    chunk_bytes: int | None = None,
    skip_zero_advantage: bool = False,
    sparse_weight_grad: bool = False,
    backend: str | None = None,
) -> LossOutput:
    """Policy loss of any objective from hidden states and the LM head, without the logits `hidden @ weight.T + bias`.

    The same loss, stats and gradients as `policy_loss` of those logits, to the rounding of the products. Logits exist
    one chunk at a time, in float32 as the product returns them. If a sequence fits into a chunk, nothing is computed
    twice. Masked rows are not multiplied. Rows that are clipped or have advantage 0 are left out of the backward
    products, unless weight, bias and B of `low_rank` are frozen and their sequence is longer than a chunk. `stats.head`
    counts rows and `explain(hidden, weight, ...)` shows the plan.

    Gradients of all operands are complete when this returns. They are held in float32 and returned by the backward; the
    loss supports one backward pass. On a GPU the host waits for the mask or `cu_seqlens` at the start and for a count
    in each chunk, while the next chunk is being computed; in a CUDA graph it does not wait, and all rows are computed.

    Args: the batch
        hidden: [B, T, D] or, packed, [N, D]: the model's last hidden states, after the final norm. bf16, fp16, fp32
            (fp64 on the reference backend). Row t predicts `token_ids[t]`: nothing is shifted inside.
        weight: [V, D], the LM head, tied or not. The caller gathers a head that is sharded by FSDP2.
        bias: [V] or None.
        low_rank: (u, B), for LoRA on the head: `u @ B.T` is added to the logits, and no copy of the head is made. u is
            [.., r], a row for each row of `hidden`: `scaling * lora_A(dropout(hidden))`. B is [V, r], the weight of
            lora_B. Logits take both as float32 (float64 if hidden or weight is), also under autocast. Both are
            differentiable. They take r / D of the operations of the head, and memory for gradients of their sizes in
            float32; each chunk of logits is read and written once more. None: there is no such term.
        kept: as in `policy_loss`. Kept columns alone are multiplied, of the unmasked rows: N K D operations for N rows
            that keep K columns each, in place of N V D. Their logits exist all at once, and take K numbers a row. Rows
            that keep the whole vocabulary take chunks as they do without `kept`, and their logits are computed again by
            the backward; `stats.head` counts these rows, before the backward. More than one backward pass is supported.

    Args: parallel
        tp_group: the ranks over which the head is sharded, or a `VocabularyShard` of them: `weight`, `bias` and B of
            `low_rank` are this rank's [V / ranks, D], [V / ranks] and [V / ranks, r]; `hidden`, u and all other
            arguments are the same on every rank of the group. The gradients of `hidden` and u are summed over the group
            here, once, in float32: pass `hidden` as it comes out of the model, and not through a layer that sums it
            again (Megatron's copy to the tensor-parallel region). A DTensor weight with Shard(0) is taken as it is if
            `hidden` is a replicated DTensor on its mesh, or `tp_group` is its group.
        vocab_size: how many rows of the weight are tokens. The rows after them are padding: they are not multiplied,
            and their gradient is 0. None: all are tokens.
        cp_group: as in `policy_loss`. Where a coefficient depends on a whole sequence, ranks take the same sequences
            into a chunk, and there is a collective for each chunk and one before the first.

    Args: memory and backend
        chunk_bytes: memory for logits; at least one row of V numbers in fp32. None: 1.25 GiB on a GPU; on a CPU 300
            MiB, or 264 MiB where 16-bit operands that need gradients are multiplied as float32. If a sequence is longer
            than a chunk and the head needs a gradient, the logits of its active rows are computed twice. A CPU
            multiplies blocks of 16 rows, and at least 4 rows per thread: the last block may exceed `chunk_bytes` by
            that many rows. A GPU multiplies 512 rows at a time, and its buffer for logits never has fewer; bf16
            gradients of logits take as much memory again at most.
        skip_zero_advantage: leaves out sequences whose advantages are all 0: the loss and gradients are the same, but
            their tokens are in none of the stats. Not with a KL term, an entropy bonus or `DRO`, to which such
            sequences contribute.
        sparse_weight_grad: with `kept`, whether the gradient of the weight is a sparse tensor of the columns that a row
            keeps, as that of `torch.nn.Embedding(sparse=True)`. Then no zeros [V, D] are written, which take most of
            the time otherwise. For `torch.optim.SGD` and `SparseAdam`; not for FSDP2, torch.compile or torch's
            `clip_grad_norm_`; `weight` is the parameter itself, no view or cast. Every unmasked row has to keep some
            columns. On a GPU the host waits for the rows at the start, unless `kept.every_row` is True, and in the
            backward for the number of columns.

    Under autocast, hidden and weight are multiplied in autocast's dtype, else in the wider of their own. NaN
    propagates to the gradients of hidden and u in the rows that `policy_loss` names for logits; the gradients of
    weight, bias and B are sums over rows, and become NaN everywhere. The result and the errors are those of
    `policy_loss`; torch.func.vmap raises too.
    """
    refuse_forward_mode(
        "linear_policy_loss", reverse=False, advantages=advantages, old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs, importance_weights=importance_weights, temperature=temperature,
        normalizer=normalizer,
    )  # fmt: skip
    vocabulary = vocabulary_of(tp_group, vocab_start, vocab_size)
    tp, cp = head_ranks(hidden, weight, vocabulary), ranks_of("cp_group", cp_group)
    with Agreement("hidden", hidden, tp, cp) as agreement:
        operands = operands_of(hidden, weight, bias, low_rank)
        refuse_transforms("linear_policy_loss", operands)
        operands, shard = shard_of_head(operands, vocabulary)
        columns, chunk_bytes = check_head(operands, token_ids, vocabulary.size, chunk_bytes, backend, shard)
        hidden = operands.hidden
        batch = batch_shape(token_ids.shape, mask, cu_seqlens, hidden.device, cp)
        inputs = token_inputs(
            batch, objective, advantages, old_logprobs, ref_logprobs=ref_logprobs, beta=beta,
            kl_estimator=kl_estimator, kl_weighting=kl_weighting, entropy_coef=entropy_coef,
            importance_weights=importance_weights, rollout_logprobs=rollout_logprobs, aggregation=aggregation,
            group_tokens=group_tokens, normalizer=normalizer, max_log_ratio=max_log_ratio,
        )  # fmt: skip
        checks.flag("skip_zero_advantage", skip_zero_advantage, "whether sequences of advantage 0 are left out")
        if skip_zero_advantage and (inputs.beta != 0.0 or inputs.entropy_coef != 0.0):
            raise ValueError(
                "skip_zero_advantage: expected a loss to which such sequences contribute nothing; got "
                f"beta {beta} and entropy_coef {entropy_coef}, whose terms do not depend on advantages"
            )
        if skip_zero_advantage and not objective.needs_advantage:
            raise ValueError(
                f"skip_zero_advantage: expected an objective in which such sequences have no part; got "
                f"{type(objective).__name__}, whose needs_advantage is False"
            )
        check_kept_tokens(kept, token_ids)
        dtype = product_dtype(hidden, operands.weight)
        arrays = row_arrays(dtype, token_ids, batch.mask, temperature, logit_scale, softcap)
        check_sparse_weight_grad(sparse_weight_grad, kept, arrays.mask, weight)
        agree_on_rows(agreement, arrays, columns, shard, kept)
        agree_on_sequences(agreement, inputs)
        agree_on_chunks(agreement, operands, columns, chunk_bytes, backend, skip_zero_advantage)
    if skip_zero_advantage:
        inputs = without_zero_advantage(inputs)
        arrays = row_arrays(dtype, token_ids, inputs.batch.mask, temperature, logit_scale, softcap)
    arguments = HeadArguments(*operands, *arrays, columns, dtype, chunk_bytes, backend, shard)
    if kept is not None:
        return loss_of_kept_rows(kept_rows(arguments, arrays, kept, sparse_weight_grad), inputs)
    if torch.compiler.is_compiling() and objective.packed_parameters() is None:  # an operator takes no objects
        found = linear_row_stats(arguments)
        return inputs.stage().loss(found.logprobs.reshape(-1), found.entropy.reshape(-1))
    return linear_loss(arguments, inputs)


@with_arguments_of(linear_policy_loss, CLIP_RANGE)
def linear_gspo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    eps_low: float = GSPO.eps_low,
    eps_high: float = GSPO.eps_high,
    dual_clip: float | None = None,
    **options: Unpack[LinearLossOptions],
) -> LossOutput:
    """GSPO (arXiv 2507.18071) from hidden states. See `GSPO` and `linear_policy_loss`."""
    objective = GSPO(eps_low, eps_high, dual_clip)
    return linear_policy_loss(hidden, weight, token_ids, advantages, old_logprobs, objective=objective, **options)


@with_arguments_of(linear_policy_loss, CLIP_RANGE)
def linear_gspo_token_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    eps_low: float = GSPOToken.eps_low,
    eps_high: float = GSPOToken.eps_high,
    dual_clip: float | None = None,
    **options: Unpack[LinearLossOptions],
) -> LossOutput:
    """GSPO-token (arXiv 2507.18071) from hidden states. See `GSPOToken` and `linear_policy_loss`."""
    objective = GSPOToken(eps_low, eps_high, dual_clip)
    return linear_policy_loss(hidden, weight, token_ids, advantages, old_logprobs, objective=objective, **options)


@with_arguments_of(linear_policy_loss, CLIP_RANGE)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    eps_low: float = GRPO.eps_low,
    eps_high: float = GRPO.eps_high,
    dual_clip: float | None = None,
    **options: Unpack[LinearLossOptions],
) -> LossOutput:
    """GRPO (arXiv 2402.03300) from hidden states. See `GRPO` and `linear_policy_loss`."""
    objective = GRPO(eps_low, eps_high, dual_clip)
    return linear_policy_loss(hidden, weight, token_ids, advantages, old_logprobs, objective=objective, **options)


@with_arguments_of(linear_policy_loss, CLIP_RANGE)
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    eps_low: float = PPO.eps_low,
    eps_high: float = PPO.eps_high,
    dual_clip: float | None = None,
    **options: Unpack[LinearLossOptions],
) -> LossOutput:
    """PPO, clipped (arXiv 1707.06347), from hidden states. See `PPO` and `linear_policy_loss`."""
    objective = PPO(eps_low, eps_high, dual_clip)
    return linear_policy_loss(hidden, weight, token_ids, advantages, old_logprobs, objective=objective, **options)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    kept: KeptTokens,
    full_distribution: bool = ...,
    **options: Unpack[LinearLogprobOptions],
) -> KeptLogprobs: ...


@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, kept: None = None, **options: Unpack[LinearLogprobOptions]
) -> TokenLogprobs: ...


@with_arguments_of(linear_policy_loss)
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kept: KeptTokens | None = None,
    full_distribution: bool = True,
    tp_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    sparse_weight_grad: bool = False,
    backend: str | None = None,
) -> TokenLogprobs | KeptLogprobs:
    """Log-probability of each token, entropy and logsumexp of its row, from hidden states and the LM head.

    Use it under `torch.no_grad()` for old and reference log-probabilities: one product, nothing kept. They carry the
    same rounding as those in the losses: that of float32 alone. Differentiable in all three; the backward computes
    the logits of rows with a gradient again.

    Args: the batch
        token_ids: integers [B, T] or [N].
        mask: masked rows are not multiplied, and give 0.
        kept: the columns from which each token was sampled. The result is then `KeptLogprobs(kept, full)`, of the
            distribution over them and of that over all columns; differentiable in both.
        full_distribution: with `kept`, whether to compute `full`. If not, it is None, and rows that keep some columns
            are multiplied by these alone.

    Args: memory and backend
        sparse_weight_grad: as in `linear_policy_loss`, with `full_distribution=False` alone.

    The errors are those of `policy_loss`.
    """
    refuse_forward_mode("linear_token_logprobs", reverse=False, temperature=temperature)
    vocabulary = vocabulary_of(tp_group, vocab_start, vocab_size)
    with Agreement("hidden", hidden, head_ranks(hidden, weight, vocabulary)) as agreement:
        operands = operands_of(hidden, weight, bias, low_rank)
        refuse_transforms("linear_token_logprobs", operands)
        operands, shard = shard_of_head(operands, vocabulary)
        columns, chunk_bytes = check_head(operands, token_ids, vocabulary.size, chunk_bytes, backend, shard)
        dtype = product_dtype(operands.hidden, operands.weight)
        check_kept_tokens(kept, token_ids)
        check_full_distribution(full_distribution, kept)
        arrays = row_arrays(dtype, token_ids, check_mask(mask, token_ids), temperature, logit_scale, softcap)
        check_sparse_weight_grad(sparse_weight_grad, kept, arrays.mask, weight, full_distribution)
        agree_on_rows(agreement, arrays, columns, shard, kept, full_distribution)
        agree_on_chunks(agreement, operands, columns, chunk_bytes, backend)
    arguments = HeadArguments(*operands, *arrays, columns, dtype, chunk_bytes, backend, shard)
    if kept is not None:
        of_rows = kept_rows(arguments, arrays, kept, sparse_weight_grad)
        return logprobs_of_kept_rows(of_rows, token_ids.shape, full_distribution)
    return TokenLogprobs(*(x.reshape(token_ids.shape) for x in linear_row_stats(arguments)))


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """All logits `hidden @ weight.T + bias`, by the products of the losses from hidden states: [.., V], no gradient.

    They are float32, or float64 if an operand is. `token_logprobs` of them equals `linear_token_logprobs` to the bit.
    So an engine that samples from these logits has the log-probabilities of a trainer that uses `linear_policy_loss`.
    Use it for the few rows of a decoding step: N rows take N V numbers of memory.

    Args: the batch
        hidden: [B, T, D] or [N, D]: the model's last hidden states, after the final norm.
        weight: [V, D], the whole LM head; no DTensor.
        bias: [V] or None.
        low_rank: as in `linear_policy_loss`.
        vocab_size: how many rows of the weight are tokens; there are as many logits. None: all are tokens.

    Under autocast, hidden and weight are multiplied in autocast's dtype, else in the wider of their own. The errors
    are those of `linear_token_logprobs`.
    """
    operands = operands_of(hidden, weight, bias, low_rank)
    refuse_transforms("linear_logits", operands)
    check_operands(operands)
    vocab = check_vocab_size(vocab_size, weight.shape[0])
    return linear_logits_operator(operands, vocab, product_dtype(hidden, weight))


def without_zero_advantage(inputs: TokenInputs) -> TokenInputs:
    """Masks sequences whose advantages are all 0; the count of the batch keeps them."""
    batch = inputs.batch
    layout = batch.layout()
    if inputs.advantages_per_token:
        some = layout.sum((layout.of_tokens(inputs.advantages) != 0.0).double()) != 0.0
    else:
        some = layout.of_sequences(inputs.advantages) != 0.0
    kept = layout.spread(some.double()) != 0.0
    count = inputs.counted(layout)
    return inputs._replace(
        batch=replace(batch, mask=kept.reshape(batch.tokens)),
        normalizer=torch.where(count == 0, 1.0, count) if inputs.normalizer is None else inputs.normalizer,
    )
