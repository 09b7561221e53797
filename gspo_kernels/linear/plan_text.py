"""How a loss from hidden states would compute its arguments, for `explain`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..base.layout import batch_shape
from ..losses.clipped import GSPO
from ..losses.from_logits import policy_loss
from ..losses.token_stage import token_inputs
from ..rows.arguments import check_kept_tokens, check_token_ids, check_vocab_size
from ..rows.dispatch import choose
from ..rows.kept import KeptTokens
from ..rows.vocab_shard import vocabulary_of
from .arguments import check_operands, operands_of, product_dtype, shard_of_head
from .chunked_loss import plan_for
from .from_hidden import without_zero_advantage
from .products import explain_products, sum_dtype
from .schedule import chunk_size
from .sparse_head import sparse_products
from .types import Operands


def explain_plan(hidden: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> str:
    """How `linear_policy_loss` would compute these arguments, in a few lines. Reads mask and boundaries."""
    names = ("token_ids", "advantages", "old_logprobs")
    positional = dict(zip(names, arguments, strict=False))
    if len(arguments) > len(names) or positional.keys() & options.keys():
        twice = ", ".join(sorted(positional.keys() & options.keys())) or f"{len(arguments) - len(names)} more"
        raise TypeError(
            f"explain: expected hidden, weight, {', '.join(names)}, as of a loss, and every other argument by its "
            f"name, each once; got {twice}"
        )
    given: dict[str, Any] = {"objective": GSPO(), **positional, **options}
    dtype = product_dtype(hidden, weight)
    vocabulary = vocabulary_of(*(given.get(name) for name in ("tp_group", "vocab_start", "vocab_size")))
    operands = operands_of(hidden, weight, given.get("bias"), given.get("low_rank"))
    operands, shard = shard_of_head(operands, vocabulary)
    check_operands(operands, shard)
    hidden, weight, low_rank = operands.hidden, operands.weight, operands.low_rank_hidden
    columns = shard.usual_columns if shard else check_vocab_size(vocabulary.size, weight.shape[0])
    needed = operands.needs_grad()
    chunk = chunk_size(given.get("chunk_bytes"), columns, dtype, hidden.device.type, needed.any())
    rows = hidden.numel() // hidden.shape[-1]
    of_logits = str(sum_dtype(dtype)).removeprefix("torch.")
    lines = [
        f"chunks of up to {chunk.max_rows} rows of {columns} logits in {of_logits}",
        explain_products(hidden.device, dtype),
    ]
    if low_rank is not None:
        lines.append(f"a low-rank term of {low_rank.shape[-1]} columns is added to the logits of each chunk")
    kept = given.get("kept")
    if "token_ids" not in given or "advantages" not in given:
        return "\n".join([*lines, *_kept(kept, None, operands, dtype, given)])
    check_token_ids(given["token_ids"], hidden.shape[:-1], hidden.device, "row of hidden")
    check_kept_tokens(kept, given["token_ids"])
    parameters = inspect.signature(policy_loss).parameters
    batch = batch_shape(given["token_ids"].shape, given.get("mask"), given.get("cu_seqlens"), hidden.device)
    inputs = token_inputs(
        batch, given["objective"], given["advantages"], given.get("old_logprobs"),
        **{name: given.get(name, parameters[name].default) for name in _TOKEN_OPTIONS},
    )  # fmt: skip
    if given.get("skip_zero_advantage"):
        inputs = without_zero_advantage(inputs)
    lengths = inputs.batch.layout().lengths_on_host()
    or_zero = ", or of advantage 0 (skip_zero_advantage)" if given.get("skip_zero_advantage") else ""
    lines.append(f"{rows - sum(lengths)} of {rows} rows are left out: masked{or_zero}")
    if kept is not None:
        return "\n".join([*lines, *_kept(kept, inputs.batch.mask, operands, dtype, given)])
    steps = plan_for(inputs, lengths, chunk, needed)
    for mode, meaning in _MODES.items():
        found = [step for step in steps if step.mode == mode]
        if found:
            taken = sum(step.stop - step.start for step in found)
            lines.append(f"{mode}: {taken} rows in {len(found)} step{'s' * (len(found) > 1)}: {meaning}")
    if given.get("cp_group") is not None:
        lines.append("of this rank's rows; over cp_group a sequence is as long as the longest part of it")
    return "\n".join(lines)


def _kept(
    kept: KeptTokens | None, mask: Tensor | None, operands: Operands, dtype: torch.dtype, given: dict[str, Any]
) -> Iterator[str]:
    """Which rows take the sparse head, and which the full one."""
    if kept is None:
        return
    counts = kept.counts if mask is None else kept.counts[mask.reshape(-1)]
    some = int((counts > 0).sum())
    entries = operands.hidden.new_empty((1, 1, 1), dtype=sum_dtype(dtype))
    backend = choose(entries, given.get("backend"), ["kept"], warn=False).name
    name = sparse_products(backend, operands.hidden, operands.weight).__name__.rpartition(".")[2]
    yield (f"sparse head ({_PRODUCTS[name]}): {int(counts.sum())} kept columns of {some} rows, in place of all of them")
    if len(counts) > some:
        yield f"{len(counts) - some} rows keep the whole vocabulary: their logits are computed in chunks, twice"
    if operands.needs_grad().weight:
        yield (
            "the gradient of the weight is sparse: the columns that rows keep"
            if given.get("sparse_weight_grad")
            else "the gradient of the weight is dense, zeros but for kept columns; see sparse_weight_grad"
        )


_PRODUCTS = {"cpu_sparse": "C++", "triton_sparse": "Triton", "torch_sparse": "plain torch"}
_TOKEN_OPTIONS = (
    "ref_logprobs", "beta", "kl_estimator", "kl_weighting", "entropy_coef", "importance_weights", "rollout_logprobs",
    "aggregation", "group_tokens", "normalizer", "max_log_ratio",
)  # fmt: skip
_MODES = {
    "statistics": "nothing needs a gradient",
    "single_pass": "gradients are computed while the logits of the chunk are in memory",
    "deferred_scale": "the head needs no gradient; the gradient of hidden is scaled once the loss is known",
    "recompute": "sequences longer than a chunk; the logits of their active rows are computed twice",
}
