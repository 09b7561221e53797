"""The public losses from hidden states and a head: no more than a chunk of logits is ever there.

Arguments, stats and numbers are those of `losses/from_logits.py`; `chunked_loss.py` does the work.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import checks
from ..agreement import Together, check_rows_together, check_sequences_together
from ..autograd import refuse_forward_mode, refuse_vmap
from ..collectives import Ranks, ranks_of
from ..devices import autocasts
from ..layout import batch_shape
from ..losses.clipped import GRPO, GSPO, PPO, GSPOToken
from ..losses.from_logits import CommonOptions, TokenLogprobs, check_mask, check_token_ids, check_vocab_size, row_arrays
from ..losses.objectives import Objective
from ..losses.token_stage import LossOutput, TokenInputs, token_inputs
from ..rows.dispatch import check_name, choose
from ..rows.vocab_shard import VocabShard, shard_of, tp_ranks
from .chunked_loss import plan_for
from .operators import linear_loss, linear_row_stats
from .products import sum_dtype
from .schedule import chunk_size
from .types import HeadArguments, needs_grad


class LinearLossOptions(CommonOptions, total=False):
    """Keyword arguments of every loss from hidden states; `linear_policy_loss` explains them."""

    bias: Tensor | None
    chunk_bytes: int | None
    skip_zero_advantage: bool


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    objective: Objective = GSPO(),
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    aggregation: str | None = None,
    normalizer: float | Tensor | None = None,
    max_log_ratio: float = 20.0,
    tp_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    cp_group: Any = None,
    chunk_bytes: int | None = None,
    skip_zero_advantage: bool = False,
    backend: str | None = None,
) -> LossOutput:
    """Policy loss of any objective from hidden states and the LM head, without the logits `hidden @ weight.T + bias`.

    The same loss, stats and gradients as `policy_loss` of those logits, to the rounding of the products. Logits exist a
    chunk at a time, in float32 from the product's accumulator on; where a sequence fits into a chunk, nothing is
    computed twice. Rows that are masked never meet the head; rows that turn out to be clipped or of advantage 0 are no
    part of the backward products. `stats.head` counts rows and `explain(hidden, weight, ...)` tells the plan.

    Gradients of hidden, weight and bias are complete when this returns, held in float32, and handed over by the
    backward, which can run once. On a GPU the host waits for the mask or `cu_seqlens` at the start and for a count in
    each chunk, while the next one is being computed; not in a CUDA graph, which takes all rows.

    Args:
        hidden: [B, T, D] or, packed, [N, D]: the model's last hidden states, after the final norm. bf16, fp16, fp32
            (fp64 on the reference backend). Row t predicts `token_ids[t]`: nothing is shifted inside.
        weight: [V, D], the LM head, tied or not. A sharded one (FSDP2) has to be gathered by the caller.
        bias: [V] or None.
        chunk_bytes: memory for logits; at least one row of V numbers in fp32. None: 1.25 GiB on a GPU; on a CPU 300
            MiB, 448 MiB if operands of 16 bits want gradients. A sequence that is longer takes a second product for
            its active rows, if the head wants a gradient. A CPU multiplies rows in blocks of
            16, and at least 4 a thread: the last block may need memory for that many rows more.
        skip_zero_advantage: leaves sequences whose advantages are all 0 out of everything: the loss and gradients are
            the same, but their tokens are in none of the stats. Not with a KL term or an entropy bonus, which such
            sequences have a part in.
        tp_group: the ranks over which the head is sharded: `weight` and `bias` are this rank's [V / ranks, D] and
            [V / ranks] of it, and `hidden` and everything else are the same on every rank of the group. The gradient of
            `hidden` is summed over the group here, once, in float32: pass it as it comes out of the model, and not
            through what sums it again (Megatron's copy to the tensor-parallel region). A DTensor weight with Shard(0)
            is taken as it is if `hidden` is a replicated DTensor on its mesh, or `tp_group` is its group.
        vocab_size: rows of the weight from there on are padding: not multiplied, gradient 0.
        cp_group: as in `policy_loss`. Where a coefficient depends on a whole sequence, ranks take the same sequences
            into a chunk, and there is a collective for each chunk and two before the first.

    Under autocast hidden and weight are multiplied in autocast's dtype, else in the wider of their own. NaN spoils the
    gradients of the same rows of hidden as `policy_loss` says of logits; those of weight and bias are sums over rows,
    and NaN throughout. All other arguments, the result and the errors are those of `policy_loss`; torch.func.vmap
    raises too.
    """
    refuse_forward_mode("linear_policy_loss", hidden=hidden, weight=weight, bias=bias)
    refuse_forward_mode(
        "linear_policy_loss", False, advantages=advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        importance_weights=importance_weights, temperature=temperature, normalizer=normalizer,
    )  # fmt: skip
    refuse_vmap("linear_policy_loss", hidden=hidden, weight=weight, bias=bias)
    tp, cp = _head_ranks(hidden, weight, tp_group), ranks_of("cp_group", cp_group)
    with Together(hidden, tp, cp, name="hidden") as together:
        hidden, weight, bias, shard = _of_this_rank(hidden, weight, bias, tp_group, vocab_start, vocab_size)
        columns, chunk_bytes = _check_head(hidden, weight, bias, token_ids, vocab_size, chunk_bytes, backend, shard)
        batch = batch_shape(token_ids.shape, mask, cu_seqlens, hidden.device, cp)
        inputs = token_inputs(
            batch, objective, advantages, old_logprobs, ref_logprobs=ref_logprobs, beta=beta,
            kl_estimator=kl_estimator, entropy_coef=entropy_coef, importance_weights=importance_weights,
            aggregation=aggregation, normalizer=normalizer, max_log_ratio=max_log_ratio,
        )  # fmt: skip
        checks.flag("skip_zero_advantage", skip_zero_advantage, "whether sequences of advantage 0 are left out")
        if skip_zero_advantage and (inputs.beta != 0.0 or inputs.entropy_coef != 0.0):
            raise ValueError(
                "skip_zero_advantage: expected a loss that such sequences have no part in; got "
                f"beta {beta} and entropy_coef {entropy_coef}, whose terms have nothing to do with advantages"
            )
        arrays = row_arrays(token_ids, batch.mask, temperature)
        check_rows_together(together, *arrays, columns, shard)
        check_sequences_together(together, inputs)
        _check_work_together(together, hidden, weight, bias, columns, chunk_bytes, backend, skip_zero_advantage)
    if skip_zero_advantage:
        inputs = _without_zero_advantage(inputs)
        arrays = row_arrays(token_ids, inputs.batch.mask, temperature)
    arguments = HeadArguments(
        hidden, weight, bias, *arrays, columns, _dtype(hidden, weight), chunk_bytes, backend, shard
    )
    if torch.compiler.is_compiling() and objective.packed().is_own:  # an operator takes no objects
        found = linear_row_stats(arguments)
        return inputs.stage().loss(found.logprobs.reshape(-1), found.entropy.reshape(-1))
    return linear_loss(arguments, inputs)


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


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    tp_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probability of each token, entropy and logsumexp of its row, from hidden states and the LM head.

    Under `torch.no_grad()` the way to old and reference log-probabilities: one product, nothing kept. They carry the
    same rounding as the losses' own: none but that of float32. Differentiable in all three; the gradient computes the
    logits of the rows that have one again.

    Args:
        hidden, weight, bias, vocab_size, chunk_bytes: as in `linear_policy_loss`.
        token_ids: integers [B, T] or [N].
        mask: rows that are False never meet the head, and give 0.

    The other arguments and the errors are those of `policy_loss`.
    """
    refuse_forward_mode("linear_token_logprobs", hidden=hidden, weight=weight, bias=bias)
    refuse_forward_mode("linear_token_logprobs", False, temperature=temperature)
    refuse_vmap("linear_token_logprobs", hidden=hidden, weight=weight, bias=bias)
    with Together(hidden, _head_ranks(hidden, weight, tp_group), name="hidden") as together:
        hidden, weight, bias, shard = _of_this_rank(hidden, weight, bias, tp_group, vocab_start, vocab_size)
        columns, chunk_bytes = _check_head(hidden, weight, bias, token_ids, vocab_size, chunk_bytes, backend, shard)
        arrays = row_arrays(token_ids, check_mask(mask, token_ids), temperature)
        check_rows_together(together, *arrays, columns, shard)
        _check_work_together(together, hidden, weight, bias, columns, chunk_bytes, backend)
    arguments = HeadArguments(
        hidden, weight, bias, *arrays, columns, _dtype(hidden, weight), chunk_bytes, backend, shard
    )
    return TokenLogprobs(*(x.reshape(token_ids.shape) for x in linear_row_stats(arguments)))


def explain_plan(hidden: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> str:
    """How `linear_policy_loss` would go about these arguments, in a few lines. Reads mask and boundaries."""
    names = ("token_ids", "advantages", "old_logprobs")
    given: dict[str, Any] = {"objective": GSPO(), **dict(zip(names, arguments, strict=False)), **options}
    dtype = _dtype(hidden, weight)
    _, _, _, shard = _of_this_rank(
        hidden, weight, None, *(given.get(name) for name in ("tp_group", "vocab_start", "vocab_size"))
    )
    columns = shard.usual_columns if shard else check_vocab_size(given.get("vocab_size"), weight.shape[0])
    needed = needs_grad(hidden, weight, given.get("bias"))
    chunk = chunk_size(given.get("chunk_bytes"), columns, dtype, hidden.device.type, needed.any())
    rows = hidden.numel() // hidden.shape[-1]
    of_logits = str(sum_dtype(dtype)).removeprefix("torch.")
    lines = [f"chunks of up to {chunk.max_rows} rows of {columns} logits in {of_logits}"]
    if "token_ids" not in given or "advantages" not in given:
        return lines[0]
    batch = batch_shape(given["token_ids"].shape, given.get("mask"), given.get("cu_seqlens"), hidden.device)
    inputs = token_inputs(
        batch, given["objective"], given["advantages"], given.get("old_logprobs"),
        **{name: given.get(name, usual) for name, usual in _OF_TOKENS.items()},
    )  # fmt: skip
    if given.get("skip_zero_advantage"):
        inputs = _without_zero_advantage(inputs)
    lengths = inputs.batch.layout().lengths_on_host()
    lines.append(f"{rows - sum(lengths)} of {rows} rows are left out: masked, or of a sequence that is skipped")
    steps = plan_for(inputs, lengths, chunk, needed)
    for mode, meaning in _MODES.items():
        found = [step for step in steps if step.mode == mode]
        if found:
            taken = sum(step.stop - step.start for step in found)
            lines.append(f"{mode}: {taken} rows in {len(found)} step{'s' * (len(found) > 1)}: {meaning}")
    if given.get("cp_group") is not None:
        lines.append("of this rank's rows; over cp_group a sequence is as long as the longest part of it")
    return "\n".join(lines)


_OF_TOKENS: dict[str, Any] = {
    "ref_logprobs": None, "beta": 0.0, "kl_estimator": "k3", "entropy_coef": 0.0, "importance_weights": None,
    "aggregation": None, "normalizer": None, "max_log_ratio": 20.0,
}  # fmt: skip
_MODES = {
    "statistics": "no operand needs a gradient; one product",
    "single_pass": "coefficients are known while the logits exist; gradient products of the active rows",
    "deferred_scale": "the head needs no gradient; hidden-state gradients are multiplied by coefficients afterwards",
    "recompute": "longer than a chunk; logits of the active rows are computed again for the gradient",
}


def _without_zero_advantage(inputs: TokenInputs) -> TokenInputs:
    """Masks sequences whose advantages are all zero, and keeps the count they are part of."""
    batch = inputs.batch
    layout = batch.layout()
    if inputs.advantages_per_token:
        some = layout.sum((layout.of_tokens(inputs.advantages) != 0.0).double()) != 0.0
    else:
        some = layout.of_sequences(inputs.advantages) != 0.0
    kept = layout.spread(some.double()) != 0.0
    count = layout.num_tokens if inputs.aggregation == "token_mean" else layout.num_sequences
    return replace(
        inputs,
        batch=replace(batch, mask=kept.reshape(batch.tokens)),
        normalizer=count.clamp(min=1.0) if inputs.normalizer is None else inputs.normalizer,
    )


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What is multiplied: autocast's dtype, else the wider one."""
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    if wide != torch.float64 and autocasts(hidden.device):
        return torch.get_autocast_dtype(hidden.device.type)
    return wide


def _head_ranks(hidden: Any, weight: Any, tp_group: Any) -> Ranks | None:
    """Over which ranks the head is sharded; None where nothing says that it is, as `_of_this_rank` explains."""
    if checks.is_dtensor(weight) and tp_group is None and not _is_replicated(hidden, weight):
        return None
    return tp_ranks(weight, 0, tp_group)


def _is_replicated(hidden: Any, weight: Any) -> bool:
    """On the mesh of a weight that is a DTensor."""
    replicated = checks.is_dtensor(hidden) and all(p.is_replicate() for p in hidden.placements)
    return replicated and bool(hidden.device_mesh == weight.device_mesh)


def _of_this_rank(
    hidden: Any, weight: Any, bias: Any, tp_group: Any, vocab_start: Any, vocab_size: Any
) -> tuple[Any, Any, Any, VocabShard | None]:
    """Plain tensors, and which rows of the head this rank has.

    A DTensor weight is the head's own sharding only where something says so: FSDP's, seen from outside of its module's
    forward, looks the same, but then every rank has other hidden states.
    """
    if not checks.is_dtensor(weight):
        weight, shard = shard_of("weight", weight, 0, tp_group, vocab_start, vocab_size)
        return hidden, weight, bias, shard
    if tp_group is None and not _is_replicated(hidden, weight):
        return hidden, weight, bias, None  # refused below
    if bias is not None and not (checks.is_dtensor(bias) and bias.device_mesh == weight.device_mesh):
        raise TypeError(f"bias: expected a DTensor sharded like weight; got {checks.describe(bias)}")
    local, shard = shard_of("weight", weight, 0, tp_group, vocab_start, vocab_size)
    if bias is not None:
        bias, _ = shard_of("bias", bias, 0, tp_group, vocab_start, vocab_size)
    if checks.is_dtensor(hidden) and all(p.is_replicate() for p in hidden.placements):
        hidden = hidden.to_local(grad_placements=hidden.placements)
    return hidden, local, bias, shard


def _check_work_together(
    together: Together,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: int,
    chunk_bytes: int | None,
    backend: str | None,
    skip_zero_advantage: bool = False,
) -> None:
    """Ranks go through chunks in step: what decides how many there are, and of which rows, is the same on all."""
    if not together.asks:
        return
    dtype = _dtype(hidden, weight)
    choose(hidden.new_empty((1, 1, 1), dtype=sum_dtype(dtype)), backend)  # the operators do, too late for other ranks
    wants = sum(
        2**i
        for i, x in enumerate((hidden, weight, bias))
        if x is not None and x.requires_grad and torch.is_grad_enabled()
    )
    work: dict[str, Any] = {
        "hidden (how wide)": hidden.shape[-1],
        "dtype that hidden and weight are multiplied in": str(dtype),
        "chunk_bytes": str(chunk_bytes),
        "skip_zero_advantage (1: yes)": int(skip_zero_advantage),
        "requires_grad of hidden (1), weight (2) and bias (4), added up": wants,
    }
    together.same_everywhere(**work)
    for ranks in together.ranks_of("cp_group"):  # of a tensor-parallel group it is known to be
        together.same(ranks, vocab_size=columns)


def _check_head(
    hidden: Any,
    weight: Any,
    bias: Any,
    token_ids: Any,
    vocab_size: Any,
    chunk_bytes: Any,
    backend: Any,
    shard: VocabShard | None,
) -> tuple[int, int | None]:
    """The vocabulary's size, and `chunk_bytes` as Python's own number."""
    for name, value, meaning in (
        ("hidden", hidden, "the model's last hidden states [.., D]"),
        ("weight", weight, "the LM head [V, D]"),
        ("bias", bias, "the LM head's bias [V]"),
    ):
        if name == "bias" and value is None:
            continue
        if checks.is_dtensor(value):
            raise TypeError(
                f"{name}: expected a plain tensor; got a DTensor, of which this rank holds a part. If it is FSDP's, "
                "call the loss where FSDP has gathered it (in the forward of the sharded module), or pass its "
                "full_tensor(). If the head is sharded over the vocabulary, pass hidden as a replicated DTensor on its "
                "mesh, or tp_group"
            )
        checks.operand(name, checks.tensor(name, value, meaning), meaning)
    if hidden.ndim not in (2, 3):
        raise ValueError(
            f"hidden: expected [sequences, tokens, D] (padded) or [tokens, D] (packed); got {list(hidden.shape)}"
        )
    if (
        weight.ndim != 2
        or (weight.shape[0] == 0 and shard is None)
        or weight.shape[1] == 0
        or weight.shape[1] != hidden.shape[-1]
    ):
        raise ValueError(
            f"weight: expected [V, {hidden.shape[-1]}], a row for each token of the vocabulary, as wide as hidden "
            f"states; got {list(weight.shape)}"
        )
    checks.same_device("weight", weight, hidden.device)
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],), "one per row of weight")
        checks.same_device("bias", bias, hidden.device)
    check_token_ids(token_ids, hidden.shape[:-1], hidden.device, "row of hidden")
    columns = check_vocab_size(vocab_size, weight.shape[0]) if shard is None else shard.vocab_size
    check_name(backend)
    dtype = _dtype(hidden, weight)
    chunk_size(chunk_bytes, shard.usual_columns if shard else columns, dtype, hidden.device.type, gradient=False)
    return columns, None if chunk_bytes is None else int(chunk_bytes)
