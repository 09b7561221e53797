"""How a loss from hidden states would compute its arguments, for `explain`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ..base.layout import batch_shape
from ..losses.clipped import GSPO
from ..losses.from_logits import policy_loss
from ..losses.token_stage import token_inputs
from ..rows.arguments import check_token_ids, check_vocab_size
from ..rows.vocab_shard import vocabulary_of
from .arguments import check_operands, operands_of, product_dtype, shard_of_head
from .chunked_loss import plan_for
from .from_hidden import without_zero_advantage
from .products import explain_products, sum_dtype
from .schedule import chunk_size


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
    if "token_ids" not in given or "advantages" not in given:
        return "\n".join(lines)
    check_token_ids(given["token_ids"], hidden.shape[:-1], hidden.device, "row of hidden")
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
    steps = plan_for(inputs, lengths, chunk, needed)
    for mode, meaning in _MODES.items():
        found = [step for step in steps if step.mode == mode]
        if found:
            taken = sum(step.stop - step.start for step in found)
            lines.append(f"{mode}: {taken} rows in {len(found)} step{'s' * (len(found) > 1)}: {meaning}")
    if given.get("cp_group") is not None:
        lines.append("of this rank's rows; over cp_group a sequence is as long as the longest part of it")
    return "\n".join(lines)


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
