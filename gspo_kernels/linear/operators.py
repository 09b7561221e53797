"""A loss from hidden states as one torch operator, and the statistics of rows as another.

Gradients of hidden states, weight and bias are complete when the loss's operator returns, in float32; its backward
multiplies them by the incoming factor, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..autograd import edge_of, first_derivative, refuse_second_backward
from ..checks import watched
from ..collectives import Ranks
from ..devices import autocasts
from ..layout import BatchShape
from ..losses import triton_stage
from ..losses.objectives import GRPO, GSPO, PPO, GSPOToken, Objective
from ..losses.stats import SCALARS, HeadWork, Stats
from ..losses.token_stage import LossOutput, TokenInputs
from ..rows.operators import scale
from ..rows.types import RowStats, Upstream
from ..scalars import run_time_list
from ..torch_internals import autograd_inside_an_operator
from . import walk
from .head import Wanted
from .schedule import Step, pieces
from .walk import HeadArguments

_LOSS, _LOGPROBS = "linear_policy_loss", "linear_token_logprobs"  # for error messages
_HEAD = len(HeadArguments._fields)  # the operators' first arguments; then three flags, which operands want a gradient
_NAMED: dict[str, type[Any]] = {"GSPO": GSPO, "GSPOToken": GSPOToken, "GRPO": GRPO, "PPO": PPO}
_OWN: ContextVar[Objective] = ContextVar("own objective")  # an operator takes no objects: set during its call


def is_named(objective: Objective) -> bool:
    return _NAMED.get(type(objective).__name__) is type(objective)


def linear_loss(arguments: HeadArguments, inputs: TokenInputs) -> LossOutput:
    objective: Any = inputs.objective
    own = not is_named(objective)
    name = "own" if own else type(objective).__name__
    normalizer = inputs.normalizer
    given = isinstance(normalizer, Tensor)
    dual_clip = None if own else objective.dual_clip
    numbers = run_time_list(
        (
            0.0 if own else objective.eps_low,
            0.0 if own else objective.eps_high,
            0.0 if dual_clip is None else dual_clip,
            inputs.max_log_ratio,
            inputs.beta,
            inputs.entropy_coef,
            0.0 if given or normalizer is None else normalizer,
        )  # type: ignore[arg-type]
    )
    before = _OWN.set(objective) if own else None
    try:
        loss, scalars, logprobs, log_ratio, work, *_ = _linear_loss(
            *arguments, *arguments.wanted(), inputs.advantages, inputs.old_logprobs, inputs.ref_logprobs,
            inputs.importance_weights, inputs.batch.cu_seqlens,
            normalizer.detach() if isinstance(normalizer, Tensor) else None,
            numbers, name, inputs.aggregation, inputs.kl_estimator, list(inputs.batch.tokens),
            inputs.batch.ranks.text() if inputs.batch.ranks else None, inputs.advantages_per_token,
            inputs.importance_weights_per_token,
        )  # fmt: skip
    finally:
        if before is not None:
            _OWN.reset(before)
    with torch.no_grad():
        stats = Stats(
            **dict(zip(SCALARS, scalars.detach().unbind(), strict=True)),
            logprobs=logprobs.detach(),
            log_ratio=log_ratio.detach(),
            ratio_of=objective.ratio_of,
            head=HeadWork(*work.detach().unbind()),
        )
    return LossOutput(loss, stats)


def linear_row_stats(arguments: HeadArguments) -> RowStats:
    """Statistics of each row [outer, inner], differentiable in all three; logits are made again for the gradient."""
    return RowStats(*_linear_row_stats(*arguments, *arguments.wanted()))


@contextmanager
def _inside_an_operator(device: torch.device) -> Iterator[None]:
    """Switches autograd on, which the token stage needs, and autocast off, which would round products."""
    exact = torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
    with autograd_inside_an_operator(), torch.no_grad(), exact:
        yield


# ---- operators


@torch.library.custom_op("gspo_kernels::linear_loss", mutates_args=())
def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    chunk_bytes: int | None,
    backend: str | None,
    vocab_start: int,
    tp: str | None,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    global_count: Tensor | None,
    numbers: Tensor,
    objective: str,
    aggregation: str,
    kl_estimator: str,
    tokens: list[int],
    cp: str | None,
    advantages_per_token: bool,
    importance_weights_per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, scalars, logprobs, log_ratio of the stats, head work; gradients of hidden, weight, bias (or empty)"""
    arguments = HeadArguments(
        hidden, weight, bias, token_ids, mask, temperature, vocab_size, dtype, chunk_bytes, backend, vocab_start, tp
    )
    eps_low, eps_high, dual_clip, max_log_ratio, beta, entropy_coef, count = numbers.tolist()  # a CPU tensor
    of_objective = _OWN.get() if objective == "own" else _NAMED[objective](eps_low, eps_high, dual_clip or None)
    sequences = tokens[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    of_tokens = None if mask is None else mask.reshape(tokens)
    inputs = TokenInputs(
        batch=BatchShape(
            torch.Size(tokens), sequences, hidden.device, of_tokens, cu_seqlens, Ranks.read(cp) if cp else None
        ),
        objective=of_objective,
        advantages=advantages,
        advantages_per_token=advantages_per_token,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        importance_weights_per_token=importance_weights_per_token,
        aggregation=aggregation,
        normalizer=global_count if global_count is not None else count or None,
        beta=beta,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        max_log_ratio=max_log_ratio,
    )
    with _inside_an_operator(hidden.device):
        stage, asked = inputs.stage(), walk.rows_asked(arguments, of_tokens)
        head = arguments.head(asked, Wanted(wants_hidden, wants_weight, wants_bias))
        fused = cp is None and head.backend.runs_stage_in_triton and triton_stage.takes(inputs)
        found = walk.walk(head, asked, stage, inputs, fused)
        gradients, work = head.gradients(), head.work
        stats = RowStats(*(walk.to_all_rows(x, asked, tokens) for x in found))
        if fused:
            loss, scalars, log_ratio = triton_stage.loss(inputs, stats)
            if of_objective.ratio_of == "token":
                log_ratio = log_ratio.reshape(tokens)
            logprobs = stats.logprobs
        else:
            loss, of_stage = stage.loss(stats.logprobs.reshape(-1), stats.entropy.reshape(-1))
            scalars = torch.stack([getattr(of_stage, name) for name in SCALARS])
            logprobs, log_ratio = of_stage.logprobs, of_stage.log_ratio
        if wants_hidden:
            walk.spread_nan(gradients.hidden, inputs, stage, stats, scalars)
        sizes = (work.forward_rows, work.recomputed_rows, work.backward_rows, work.chunks)
        of_head = torch.stack([torch.full((), float(n), dtype=torch.float32, device=hidden.device) for n in sizes])
    return loss, scalars, logprobs, log_ratio, of_head, *gradients


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_gradients(hidden: Tensor, weight: Tensor, dtype: torch.dtype, wants: tuple[bool, ...]) -> list[Tensor]:
    width = hidden.shape[-1]
    shapes = ([hidden.numel() // width, width], list(weight.shape), [weight.shape[0]])
    return [
        torch.empty(shape if wanted else [0], dtype=_sums(dtype), device=hidden.device)
        for shape, wanted in zip(shapes, wants, strict=True)
    ]


@_linear_loss.register_fake
def _(*arguments: Any) -> Any:
    hidden, weight, dtype, wants = arguments[0], arguments[1], arguments[7], arguments[_HEAD : _HEAD + 3]
    cu_seqlens, objective, tokens = arguments[_HEAD + 7], arguments[_HEAD + 10], arguments[_HEAD + 13]
    sequences = tokens[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    by_sequence = (_OWN.get() if objective == "own" else _NAMED[objective]).ratio_of == "sequence"

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    log_ratio = room(sequences) if by_sequence else room(*tokens)
    loss = torch.empty((), dtype=_sums(dtype), device=hidden.device)
    return loss, room(12), room(*tokens), log_ratio, room(4), *_fake_gradients(hidden, weight, dtype, wants)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands = inputs[:3]
    ctx.likeness = [None if x is None else (x.shape, x.dtype) for x in operands]
    ctx.wanted = inputs[_HEAD : _HEAD + 3]
    ctx.edges = () if watched(inputs[0]) else [edge_of(x) for x in operands if x is not None and x.requires_grad]
    ctx.save_for_backward(*output[5:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scaled(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * (_HEAD + 17)
    refuse_second_backward(ctx, _LOSS)
    with torch.no_grad():
        found = [
            _given(gradient, upstream, *likeness) if wanted else None
            for gradient, wanted, likeness in zip(ctx.saved_tensors, ctx.wanted, ctx.likeness, strict=True)
        ]
    found = [None if x is None else first_derivative(x, _LOSS, *ctx.edges, upstream) for x in found]
    return (*found, *(None,) * (_HEAD + 14))


def _given(gradient: Tensor, upstream: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """gradient * upstream, multiplied in place and then rounded to the operand's dtype."""
    if type(gradient) is not Tensor:  # being traced by a compiler, which decides itself what to do in place
        return (gradient * upstream).to(dtype).reshape(shape)
    rows = gradient[None] if gradient.ndim == 2 else gradient[None, None]
    scale(rows, upstream, None)  # by 1 there is nothing to do
    if gradient.dtype == dtype:
        return gradient.detach().reshape(shape)
    return gradient.to(dtype).reshape(shape)


_linear_loss.register_autograd(_scaled, setup_context=_remember)


# ---- statistics of rows alone


@torch.library.custom_op("gspo_kernels::linear_row_stats", mutates_args=())
def _linear_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    chunk_bytes: int | None,
    backend: str | None,
    vocab_start: int,
    tp: str | None,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = HeadArguments(
        hidden, weight, bias, token_ids, mask, temperature, vocab_size, dtype, chunk_bytes, backend, vocab_start, tp
    )
    with _inside_an_operator(hidden.device):
        asked = walk.rows_asked(arguments, mask)
        head = arguments.head(asked, Wanted(False, False, False))
        found = []
        for start, stop in pieces(0, asked.count, head.at_a_time.usual):
            head.load(slice(start, stop))
            found.append(head.statistics())
        empty = [torch.empty(0, dtype=d, device=hidden.device) for d in (head.sums, head.sums, torch.float64)]
        arrays = [torch.cat(parts) for parts in zip(*found, strict=True)] if found else empty
        logprobs, entropy, lse = (walk.to_all_rows(x, asked, list(token_ids.shape)) for x in arrays)
    return logprobs, entropy, lse


@_linear_row_stats.register_fake
def _(*arguments: Any) -> Any:
    token_ids, dtype = arguments[3], arguments[7]
    dtypes = (_sums(dtype), _sums(dtype), torch.float64)
    return tuple(torch.empty(token_ids.shape, dtype=d, device=token_ids.device) for d in dtypes)


@torch.library.custom_op("gspo_kernels::linear_row_gradient", mutates_args=())
def _linear_row_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    chunk_bytes: int | None,
    backend: str | None,
    vocab_start: int,
    tp: str | None,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = HeadArguments(
        hidden, weight, bias, token_ids, mask, temperature, vocab_size, dtype, chunk_bytes, backend, vocab_start, tp
    )
    with _inside_an_operator(hidden.device):
        asked = walk.rows_asked(arguments, mask)
        head = arguments.head(asked, Wanted(wants_hidden, wants_weight, wants_bias))

        def live(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.reshape(-1)[slice(None) if asked.live is None else asked.live]

        upstream = Upstream(live(grad_logprobs), live(grad_entropy), live(grad_lse))
        stats = RowStats(*(x for x in map(live, (logprobs, entropy, lse)) if x is not None))
        walk.second_phase(head, Step("two_phases", 0, asked.count, 0, 0), stats, upstream)
        gradients = head.gradients()
    return gradients.hidden, gradients.weight, gradients.bias


@_linear_row_gradient.register_fake
def _(*arguments: Any) -> Any:
    return tuple(_fake_gradients(arguments[0], arguments[1], arguments[7], arguments[_HEAD : _HEAD + 3]))


def _remember_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(False)


def _gradient_of_rows(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(g is None for g in upstream):
        return (None,) * (_HEAD + 3)
    saved, wants = ctx.saved_tensors, ctx.rest[_HEAD - 6 :]
    with torch.no_grad():
        gradients = _linear_row_gradient(*saved[:6], *ctx.rest, *saved[6:], *upstream)
        found = [
            gradient.to(operand.dtype).reshape(operand.shape) if wanted else None
            for gradient, operand, wanted in zip(gradients, saved[:3], wants, strict=True)
        ]
    found = [None if x is None else first_derivative(x, _LOGPROBS, *saved[:3], *upstream) for x in found]
    return (*found, *(None,) * _HEAD)


_linear_row_stats.register_autograd(_gradient_of_rows, setup_context=_remember_rows)
