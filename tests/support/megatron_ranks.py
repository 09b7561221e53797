"""Megatron-Core on a CPU, in a rank: its process groups, and losses over them.

Megatron is imported inside the functions, which ranks call: the tests' own process has no need of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from batches import LINEAR, PUBLIC, Batch, arguments
from linear import Problem
from sharding import Case, shard_of
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gspo_kernels import global_count, gspo_loss, token_logprobs

WORLD = 4
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]  # tp x cp; the rest of the world is data parallel
Found = dict[str, Any]

PRELOADED = [  # for the fork server: the import takes ten seconds
    "megatron.core.models.gpt.gpt_layer_specs", "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed", "megatron_training",
]  # fmt: skip


# --- Megatron on a CPU ------------------------------------------------------------------------------------------------


class WithoutCuda(TorchFunctionMode):
    """`device="cuda"` of a new tensor is the CPU: forward_backward_no_pipelining counts tokens there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """The replacements that Megatron-Core 0.16.1 needs on a CPU; none of them computes anything."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    before = torch.cuda.current_device, CudaRNGStatesTracker.fork
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    try:
        with WithoutCuda():
            yield
    finally:
        torch.cuda.current_device, CudaRNGStatesTracker.fork = before


@contextlib.contextmanager
def model_parallel(tp: int, cp: int) -> Iterator[Any]:
    """Megatron's `parallel_state` with these groups over the whole world."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    try:
        yield parallel_state
    finally:
        parallel_state.destroy_model_parallel()


# --- losses -----------------------------------------------------------------------------------------------------------


def losses(rank: int, of_logits: list[Case], of_hidden: list[Case]) -> dict[tuple[int, int], list[list[Found]]]:
    """Of each grid, what this rank finds: [of logits, of hidden states], a case each."""
    found = {}
    for tp, cp in GRIDS:
        with model_parallel(tp, cp) as state:
            found[tp, cp] = [
                [loss_of(case, case.batch(), None, state) for case in of_logits],
                [loss_of(case, p.batch, p, state) for case in of_hidden for p in [case.problem()]],
            ]
    return found


def loss_of(case: Case, whole: Batch, problem: Problem | None, state: Any) -> Found:
    """The loss of this rank's tokens, from logits or, of a `problem`, from hidden states, and its backward."""
    dp_rank, dp = state.get_data_parallel_rank(), state.get_data_parallel_world_size()
    tp_rank, tp = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()
    sequences = list(range(len(whole.lengths)))[dp_rank::dp]
    rows = [t for i in sequences for t in whole.sequences[i]]
    local = whole.of(sequences, [whole.sequences[i] for i in sequences])
    local.padding = -max(local.lengths) % 4 + 4  # Megatron cuts a row into 2 cp equal parts

    args = arguments(local, "padded")
    by_token = {name: x for name, x in args.keywords.items() if isinstance(x, Tensor)}
    by_token |= {"logits": args.logits.detach(), "token_ids": args.rest[0], "old_logprobs": args.rest[2]}
    by_token["rows"] = padded(torch.tensor(rows), local, -1)
    if problem is not None:
        by_token["logits"] = padded(problem.hidden[rows], local, math.nan)
    arrays, cu_seqlens = part_of_cp_rank(
        by_token, local.lengths, case.layout == "packed", state.get_context_parallel_group()
    )

    groups = {"tp_group": state.get_tensor_model_parallel_group(), "cp_group": state.get_context_parallel_group()}
    vocab = whole.logits.shape[-1]
    columns = padded_vocabulary(vocab, tp) // tp
    operands, options = [arrays.pop("logits")], {"cu_seqlens": cu_seqlens, "vocab_size": vocab, **groups}
    if problem is not None:
        operands.append(shard_of(problem.weight, tp_rank * columns, columns, 0))
        options["chunk_bytes"] = None if case.rows is None else case.rows * columns * 4
    else:
        operands = [shard_of(operands[0], tp_rank * columns, columns, -1)]
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    here, ids, old = arrays.pop("rows"), arrays.pop("token_ids"), arrays.pop("old_logprobs")
    options["normalizer"] = global_count(
        arrays["mask"], cu_seqlens, aggregation=case.options.get("aggregation", "sequence_mean"),
        group=state.get_data_parallel_group(with_context_parallel=True), cp_group=groups["cp_group"],
    )  # fmt: skip
    loss, stats = (LINEAR if problem else PUBLIC)[case.objective](
        *leaves, ids, args.rest[1], old, **arrays, **options, **case.options
    )
    loss.backward()
    gradient, inside = leaves[0].grad, here >= 0
    clipped = torch.stack([stats.clipped_low, stats.clipped_high], -1)
    units = {"log_ratio": stats.log_ratio, "clipped": clipped}
    assert gradient is not None
    return {
        "loss": loss, "stats": stats.over(state.get_data_parallel_group()).as_dict(), "sequences": sequences,
        "rows": here[inside], "gradient": gradient[inside], "padding": gradient[~inside],
        "weight": leaves[-1].grad, "columns": tp_rank * columns, "logprobs": stats.logprobs[inside],
        **{name: x if stats.ratio_of == "sequence" else x[inside] for name, x in units.items()},
        "place": (dp_rank, state.get_context_parallel_rank(), tp_rank),
    }  # fmt: skip


def padded(values: Tensor, batch: Batch, fill: float) -> Tensor:
    from batches import to_padded

    return to_padded(values, batch.lengths, fill, batch.padding)


def padded_vocabulary(vocab: int, tp: int, divisible_by: int = 8) -> int:
    """As `--make-vocab-size-divisible-by` has it."""
    return -(-vocab // (divisible_by * tp)) * divisible_by * tp


def part_of_cp_rank(
    arrays: dict[str, Tensor], lengths: list[int], packed: bool, group: Any
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Padded arrays [B, T, ..] as Megatron's own function cuts them; packed, each sequence padded and cut by itself."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    if not packed:
        return get_batch_on_this_cp_rank(dict(arrays), cp_group=group), None
    parts = [
        get_batch_on_this_cp_rank(
            {name: x[i : i + 1, : -(-length // 4) * 4] for name, x in arrays.items()}, cp_group=group
        )
        for i, length in enumerate(lengths)
    ]
    ends = torch.tensor([0, *(x["rows"].shape[1] for x in parts)]).cumsum(0)
    return {name: torch.cat([x[name] for x in parts], 1)[0] for name in arrays}, ends


def cross_entropies(state: Any) -> list[tuple[Tensor, Tensor]]:
    """Minus the log-probabilities of a vocabulary of 64 and their gradient, ours and Megatron's."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    g = torch.Generator().manual_seed(5)
    logits, ids = torch.randn(3, 7, 64, generator=g) * 4, torch.randint(64, (3, 7), generator=g)
    weights, shard, group = torch.randn(3, 7, generator=g), logits.chunk(2, -1), state.get_tensor_model_parallel_group()
    found = []
    for theirs in (False, True):
        leaf = shard[state.get_tensor_model_parallel_rank()].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(leaf * 1, ids) if theirs else -token_logprobs(
            leaf, ids, tp_group=group).logprobs  # fmt: skip
        (loss * weights).sum().backward()
        assert leaf.grad is not None
        found.append((loss, leaf.grad))
    return found


# --- what the documentation's pages show ------------------------------------------------------------------------------


def with_driver(step: Callable[[Any], tuple[Tensor, dict[str, float]]]) -> Found:
    """A driver of docs/scripts/drivers and `gspo_loss` on one mini-batch, and both gradients."""
    g = torch.Generator().manual_seed(4)
    lengths, found = torch.tensor([5, 2, 7, 1]), dict[str, Any]()
    leaf, ids = torch.randn(4, 7, 61, generator=g), torch.randint(61, (4, 7), generator=g)
    mask, advantages = torch.arange(7) < lengths[:, None], torch.tensor([1.0, -1.0, 0.5, -0.3])
    old = token_logprobs(leaf, ids, mask=mask).logprobs - torch.tensor([[2e-4], [-6e-4], [6e-4], [-1e-4]]) * mask
    for name in ("ours", "driver"):
        logits = leaf.clone().requires_grad_()
        if name == "ours":
            loss, stats = gspo_loss(logits, ids, advantages, old, mask=mask)
            log = {key: x.item() for key, x in stats.as_dict().items()}
        else:
            batch = SimpleNamespace(
                logits=logits * 1, token_ids=ids, advantages=advantages, old_logprobs=old, mask=mask
            )
            loss, log = step(batch)
        loss.backward()
        found[name] = loss, log, logits.grad
    return found
