"""The named losses on a GPU in four launches: rows, two of triton_stage_kernels.py, gradient.

Off-policy: rows -> sequences -> batch, and the gradient in the backward. On-policy, where the gradient by each
log-probability is known beforehand: sequences -> rows and gradient -> batch, and a factor in the backward. With a ratio
per token the CUDA kernel, which clips by itself, does the same off-policy; the batch kernel then sums up the loss. What
the kernels do not cover takes the stage in torch; the same oracle guards both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import edge_of, first_derivative, refuse_second_backward
from ..checks import may_read, watched
from ..layout import check_boundaries
from ..rows import triton_rows
from ..rows.dispatch import Backend, backend_for
from ..rows.operators import (
    FROM_LOGITS,
    check_values,
    gradient_buffer,
    row_gradient,
    zero_padding,
)
from ..rows.triton_rows import Launch, NanSource
from ..rows.types import Rows, RowStats, TokenClip, Upstream, empty_stats
from ..scalars import run_time_list
from .objectives import GRPO, GSPO, PPO, GSPOToken, Objective
from .stats import SCALARS, Stats
from .token_stage import LossOutput, TokenInputs

_RATIOS: dict[type[Objective], str] = {GSPO: "sequence", GSPOToken: "sequence_by_token", GRPO: "token", PPO: "token"}
# `elements` tokens, or sequences, at a time. With more of either some variants of the sequence kernel spill registers.
# The batch is one program of sixteen warps, each with one of the sixteen partials.
LAUNCH = {"sequence": Launch(num_warps=4, elements=512), "batch": Launch(num_warps=16, elements=4096)}
_INTERPRETED_LAUNCH = {"sequence": Launch(num_warps=1, elements=4), "batch": Launch(num_warps=1, elements=32)}
_PARTIALS, _COUNT, _ZERO = 16, 14, 15  # of triton_stage_kernels.py


class TokenArguments(NamedTuple):
    """What the stage needs of the batch and the objective, as plain values, in the order that operators take them."""

    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    cu_seqlens: Tensor | None
    global_count: Tensor | None
    numbers: Sequence[float]  # of `_of_tokens`; operators take them as a tensor
    ratio: str
    aggregation: str
    kl_estimator: str
    advantages_per_token: bool
    importance_weights_per_token: bool
    entropy_bonus: bool

    def sequence_count(self, outer: int) -> int:
        return outer if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def backend_of(inputs: TokenInputs, rows: Rows, backend: str | None) -> Backend | None:
    """The backend of the rows if this module takes the loss on it: for that, Triton has to run."""
    chosen = backend_for(rows, backend) if takes(inputs) else None
    return chosen if chosen is not None and chosen.runs_stage_in_triton else None


def takes(inputs: TokenInputs) -> bool:
    """Whether it takes this loss: a named objective, numbers in float32."""
    arrays = (inputs.advantages, inputs.old_logprobs, inputs.ref_logprobs, inputs.importance_weights)
    return type(inputs.objective) in _RATIOS and all(x is None or x.dtype == torch.float32 for x in arrays)


def clips_row_by_row(inputs: TokenInputs, backend: Backend) -> bool:
    """Whether the gradient of a loss that it takes can be had in one pass although the ratios are not 1."""
    per_token = _RATIOS[type(inputs.objective)] == "token" and inputs.beta == 0.0 and inputs.entropy_coef == 0.0
    return per_token and backend.clips_rows


def policy_loss(
    rows: Rows, inputs: TokenInputs, overwrite_logits: bool, one_pass: bool, backend: Backend
) -> LossOutput:
    """By `backend`, which is Triton's or leaves to it what is not its own."""
    row_arguments = rows.logits, rows.token_ids, rows.mask, rows.temperature, rows.vocab_size, overwrite_logits
    arguments = _of_tokens(inputs)
    if one_pass:
        loss, scalars, log_ratios, logprobs = _OnePass.apply(*row_arguments, arguments, backend)
    elif watched(rows.logits):
        loss, scalars, log_ratios, logprobs, *_ = _fused_loss(*row_arguments, *_for_an_operator(arguments))
    else:
        loss, scalars, log_ratios, logprobs = _TwoPasses.apply(*row_arguments, arguments)
    return _output(inputs, loss, scalars, logprobs, log_ratios)


def gradient(inputs: TokenInputs, stats: RowStats) -> Upstream:
    """dL/d of the statistics [tokens] of a packed batch without a mask, which is part of another."""
    stage = _Stage((1, inputs.batch.tokens[0]), inputs.batch.device, None, _of_tokens(inputs))
    stage.sequences(stats)
    bonus = None if stage.grad_entropy is None else stage.grad_entropy.view(-1)
    return Upstream(stage.grad_logprobs.view(-1), bonus, counts=stage.partials[_COUNT])


def loss(inputs: TokenInputs, stats: RowStats) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, scalars of the stats, log-ratios) from the statistics of all rows, without a gradient."""
    tokens = inputs.batch.tokens
    shape = (tokens[0], tokens[1]) if len(tokens) == 2 else (1, tokens[0])
    mask = None if inputs.batch.mask is None else inputs.batch.mask.contiguous()
    stage = _Stage(shape, inputs.batch.device, mask, _of_tokens(inputs))
    stage.sequences(stats)
    return *stage.batch(None), stage.log_ratios


def loss_of_rows(inputs: TokenInputs, stats: RowStats) -> LossOutput:
    """The loss from the statistics of all rows, [outer, inner] and differentiable: where they came from elsewhere."""
    mask = None if inputs.batch.mask is None else inputs.batch.mask.contiguous()
    arguments = _for_an_operator(_of_tokens(inputs))
    loss, scalars, log_ratios, *_ = _fused_stage(stats.logprobs, stats.entropy, mask, *arguments)
    return _output(inputs, loss, scalars, stats.logprobs, log_ratios)


def compiled_variants() -> int:
    """How many Triton kernels, of rows and of tokens, this process has compiled so far."""
    kernels = (_kernels().sequence_kernel, _kernels().batch_kernel)
    return triton_rows.compiled_variants() + triton_rows.count_variants(kernels)


def _output(inputs: TokenInputs, loss: Tensor, scalars: Tensor, logprobs: Tensor, log_ratios: Tensor) -> LossOutput:
    shape, ratio_of = inputs.batch.tokens, inputs.objective.ratio_of
    logprobs, log_ratios = logprobs.detach(), log_ratios.detach()
    of_batch: dict[str, Any] = dict(zip(SCALARS, scalars.detach().unbind(), strict=True))
    stats = Stats(
        **of_batch,
        logprobs=logprobs if logprobs.shape == shape else logprobs.reshape(shape),
        log_ratio=log_ratios if ratio_of == "sequence" else log_ratios.reshape(shape),
        ratio_of=ratio_of,
    )
    return LossOutput(loss, stats)


def _of_tokens(inputs: TokenInputs) -> TokenArguments:
    objective: Any = inputs.objective
    normalizer = inputs.normalizer
    given = isinstance(normalizer, Tensor)
    return TokenArguments(
        advantages=inputs.advantages.contiguous(),
        old_logprobs=_contiguous(inputs.old_logprobs),
        ref_logprobs=_contiguous(inputs.ref_logprobs),
        importance_weights=_contiguous(inputs.importance_weights),
        cu_seqlens=_contiguous(inputs.batch.cu_seqlens),
        global_count=normalizer.detach() if isinstance(normalizer, Tensor) else None,  # any dtype of numbers
        numbers=(
            objective.eps_low,
            objective.eps_high,
            math.inf if objective.dual_clip is None else objective.dual_clip,
            inputs.max_log_ratio,
            inputs.beta,
            inputs.entropy_coef,
            0.0 if normalizer is None or given else float(normalizer),
        ),
        ratio=_RATIOS[type(objective)],
        aggregation=inputs.aggregation,
        kl_estimator=inputs.kl_estimator,
        advantages_per_token=inputs.advantages_per_token,
        importance_weights_per_token=inputs.importance_weights_per_token,
        entropy_bonus=inputs.entropy_coef != 0.0,
    )


def _for_an_operator(arguments: TokenArguments) -> tuple[Any, ...]:
    return arguments._replace(numbers=run_time_list(arguments.numbers))  # type: ignore[arg-type]


def _contiguous(array: Tensor | None) -> Tensor | None:
    return None if array is None else array.contiguous()


# ---- two passes over the logits


def _two_passes(
    rows: Rows, arguments: TokenArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, scalars, log_ratios; logprobs, entropy, lse; grad_logprobs, grad_entropy (or empty), partials"""
    stage = _Stage(rows.token_ids.shape, rows.logits.device, rows.mask, arguments)
    check_values(rows)
    stats = triton_rows.forward(rows)
    stage.sequences(stats)
    loss, scalars = stage.batch(None)
    bonus = stage.partials.new_empty(0) if stage.grad_entropy is None else stage.grad_entropy
    return loss, scalars, stage.log_ratios, *stats, stage.grad_logprobs, bonus, stage.partials


def _remember(ctx: Any, row_arguments: tuple[Any, ...], entropy_bonus: bool, output: tuple[Tensor, ...]) -> None:
    *arrays, ctx.vocab_size, ctx.overwrite_logits = row_arguments
    ctx.entropy_bonus = entropy_bonus
    ctx.save_for_backward(*arrays, *output[3:])
    ctx.set_materialize_grads(False)  # else autograd fills zeros for every output that nothing depends on


def _gradient(ctx: Any, upstream: Tensor | None) -> Tensor | None:
    if upstream is None:
        return None
    logits, token_ids, mask, temperature, logprobs, entropy, lse, g_logprobs, g_entropy, partials = ctx.saved_tensors
    if ctx.overwrite_logits:
        refuse_second_backward(ctx, FROM_LOGITS)
    gradient = gradient_buffer(logits, ctx.overwrite_logits)
    row_gradient(
        Rows(logits, token_ids, mask, temperature, ctx.vocab_size),
        RowStats(logprobs, entropy, lse),
        Upstream(g_logprobs, g_entropy if ctx.entropy_bonus else None, factor=upstream, counts=partials[_COUNT]),
        gradient,
        triton_rows.name,
    )
    return first_derivative(gradient, FROM_LOGITS, logits, upstream)


class _TwoPasses(torch.autograd.Function):
    """`fused_loss` where nothing traces it: an operator takes more of the host's time than all that is in it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *row_arguments, of_tokens = arguments
        output = _two_passes(Rows(*row_arguments[:5]), of_tokens)
        _remember(ctx, tuple(row_arguments), of_tokens.entropy_bonus, output)
        ctx.mark_non_differentiable(*output[1:4])
        return output[:4]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> Any:
        return _gradient(ctx, upstream), *(None,) * 6


@torch.library.custom_op("gspo_kernels::fused_loss", mutates_args=())
def _fused_loss(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int,
    overwrite_logits: bool,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    global_count: Tensor | None,
    numbers: Tensor,
    ratio: str,
    aggregation: str,
    kl_estimator: str,
    advantages_per_token: bool,
    importance_weights_per_token: bool,
    entropy_bonus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = TokenArguments(
        advantages, old_logprobs, ref_logprobs, importance_weights, cu_seqlens, global_count, numbers.tolist(), ratio,
        aggregation, kl_estimator, advantages_per_token, importance_weights_per_token, entropy_bonus,
    )  # fmt: skip
    return _two_passes(Rows(logits, token_ids, mask, temperature, vocab_size), arguments)


@_fused_loss.register_fake
def _(logits: Tensor, *others: Any) -> Any:
    loss, scalars, log_ratios, *gradients = _fakes(logits, TokenArguments(*others[5:]))
    return loss, scalars, log_ratios, *empty_stats(logits), *gradients


def _fakes(rows: Tensor, arguments: TokenArguments) -> tuple[Tensor, ...]:
    """loss, scalars, log_ratios; grad_logprobs, grad_entropy (or empty), partials, for rows [outer, inner, ..]"""
    room = functools.partial(torch.empty, dtype=torch.float32, device=rows.device)
    outer, inner = rows.shape[:2]
    sequences = arguments.sequence_count(outer)
    log_ratios = room(sequences) if arguments.ratio == "sequence" else room(outer * inner)
    bonus = room(outer, inner) if arguments.entropy_bonus else room(0)
    return room(()), room(12), log_ratios, room(outer, inner), bonus, room(_PARTIALS, sequences)


_fused_loss.register_autograd(
    lambda ctx, upstream, *_: (_gradient(ctx, upstream), *(None,) * 18),
    setup_context=lambda ctx, inputs, output: _remember(
        ctx, inputs[:6], TokenArguments(*inputs[6:]).entropy_bonus, output
    ),
)


# ---- the stage alone


@torch.library.custom_op("gspo_kernels::fused_stage", mutates_args=())
def _fused_stage(
    logprobs: Tensor,
    entropy: Tensor,
    mask: Tensor | None,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    global_count: Tensor | None,
    numbers: Tensor,
    ratio: str,
    aggregation: str,
    kl_estimator: str,
    advantages_per_token: bool,
    importance_weights_per_token: bool,
    entropy_bonus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, scalars, log_ratios; grad_logprobs, grad_entropy (or empty), partials"""
    arguments = TokenArguments(
        advantages, old_logprobs, ref_logprobs, importance_weights, cu_seqlens, global_count, numbers.tolist(), ratio,
        aggregation, kl_estimator, advantages_per_token, importance_weights_per_token, entropy_bonus,
    )  # fmt: skip
    stage = _Stage(logprobs.shape, logprobs.device, mask, arguments)
    stage.sequences(RowStats(logprobs.contiguous(), entropy.contiguous(), entropy.new_empty(0)))
    loss, scalars = stage.batch(None)
    bonus = stage.partials.new_empty(0) if stage.grad_entropy is None else stage.grad_entropy
    return loss, scalars, stage.log_ratios, stage.grad_logprobs, bonus, stage.partials


@_fused_stage.register_fake
def _(logprobs: Tensor, entropy: Tensor, mask: Tensor | None, *others: Any) -> Any:
    return _fakes(logprobs, TokenArguments(*others))


def _remember_stage(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.entropy_bonus = TokenArguments(*inputs[3:]).entropy_bonus
    ctx.save_for_backward(*inputs[:2], *output[3:])
    ctx.set_materialize_grads(False)


def _gradient_of_stage(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 16
    logprobs, entropy, g_logprobs, g_entropy, partials = ctx.saved_tensors
    bonus = g_entropy if ctx.entropy_bonus else None
    with torch.no_grad():
        found = Upstream(g_logprobs, bonus, factor=upstream, counts=partials[_COUNT]).by_statistic()
    of_logprobs, of_entropy = (
        None if g is None else first_derivative(g, FROM_LOGITS, logprobs, entropy, upstream) for g in found[:2]
    )
    return of_logprobs, of_entropy, *(None,) * 14


_fused_stage.register_autograd(_gradient_of_stage, setup_context=_remember_stage)


# ---- one pass


class _OnePass(torch.autograd.Function):
    """Where no gradient needs the batch: it is written by the forward, while each row was in the cache."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        logits, token_ids, mask, temperature, vocab_size, overwrite_logits, of_tokens, backend = arguments
        rows = Rows(logits, token_ids, mask, temperature, vocab_size)
        stage = _Stage(token_ids.shape, logits.device, mask, of_tokens)
        check_values(rows)
        clip = None if of_tokens.old_logprobs is None else stage.clip()
        stage.sequences(None)
        gradient = gradient_buffer(logits, overwrite_logits)
        zero_padding(gradient, vocab_size)
        upstream = Upstream(stage.grad_logprobs, counts=stage.partials[_COUNT], tickets=stage.partials[_ZERO])
        stats = backend.forward_backward(rows, upstream, gradient, clip)
        loss, scalars = stage.batch(stats)
        if overwrite_logits:
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(gradient)
        ctx.edge = edge_of(logits)
        ctx.vocab_size = vocab_size
        ctx.spoiled = stage.spoiled(loss, stats)
        ctx.mark_non_differentiable(scalars, stage.log_ratios, stats.logprobs)
        ctx.set_materialize_grads(False)
        return loss, scalars, stage.log_ratios, stats.logprobs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> Any:
        if upstream is None:
            return (None,) * 8
        refuse_second_backward(ctx, FROM_LOGITS)
        (gradient,) = ctx.saved_tensors
        with torch.no_grad():
            # Returns at once where upstream is 1 and the loss no NaN.
            triton_rows.scale(gradient[..., : ctx.vocab_size], upstream, ctx.spoiled)
            torch.autograd.graph.increment_version(gradient)
        return first_derivative(gradient, FROM_LOGITS, ctx.edge, upstream), *(None,) * 7


class _Stage:
    """The two launches and the arrays between them."""

    def __init__(
        self, shape: Sequence[int], device: torch.device, mask: Tensor | None, arguments: TokenArguments
    ) -> None:
        outer, inner = shape
        self.tokens, self.length = outer * inner, inner
        self.arguments, self.sequence_count = arguments, arguments.sequence_count(outer)
        if arguments.cu_seqlens is not None and may_read(arguments.cu_seqlens):
            check_boundaries(arguments.cu_seqlens, self.tokens)
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.grad_logprobs = torch.empty((outer, inner), dtype=torch.float32, device=device)
        self.grad_entropy = torch.empty_like(self.grad_logprobs) if arguments.entropy_bonus else None
        self.log_ratios = self.grad_logprobs.new_empty(
            self.sequence_count if arguments.ratio == "sequence" else self.tokens
        )
        self.token_advantages: Tensor | None = None
        self.partials = self.grad_logprobs.new_empty((_PARTIALS, self.sequence_count))

    def clip(self) -> TokenClip:
        """What a row needs to clip its own ratio; complete when `sequences` has run."""
        old_logprobs = self.arguments.old_logprobs
        assert old_logprobs is not None
        self.token_advantages = torch.empty_like(self.grad_logprobs)
        eps_low, eps_high, dual_clip, max_log_ratio = self.arguments.numbers[:4]
        return TokenClip(old_logprobs, self.token_advantages, eps_low, eps_high, dual_clip, max_log_ratio)

    def sequences(self, stats: RowStats | None) -> None:
        """Fills the gradients, log-ratios and partial sums; `stats` is None before the rows have been read."""
        if self.sequence_count:
            of = self.arguments
            self._launch(
                "sequence", self.sequence_count,
                None if stats is None else stats.logprobs, of.old_logprobs, of.ref_logprobs,
                None if stats is None else stats.entropy, of.advantages, of.importance_weights, self.mask,
                of.cu_seqlens, of.global_count, self.tokens, self.length, self.sequence_count,
                int(of.advantages_per_token), int(of.importance_weights_per_token), *of.numbers,
                self.grad_logprobs, self.grad_entropy, self.token_advantages, self.log_ratios, self.partials,
                AGGREGATION=of.aggregation, ESTIMATOR=of.kl_estimator, RATIO=of.ratio,
            )  # fmt: skip

    def batch(self, stats: RowStats | None) -> tuple[Tensor, Tensor]:
        """(loss, scalars); with `stats` if `sequences` was without."""
        loss, scalars = self.partials.new_empty(()), self.partials.new_empty(12)
        old_logprobs = ref_logprobs = logprobs = entropy = mask = g_logprobs = log_ratios = None
        if stats is not None:
            old_logprobs, ref_logprobs = self.arguments.old_logprobs, self.arguments.ref_logprobs
            entropy, mask = stats.entropy, self.mask
            logprobs = None if old_logprobs is None and ref_logprobs is None else stats.logprobs
            if old_logprobs is not None:
                g_logprobs, log_ratios = self.grad_logprobs, self.log_ratios
        self._launch(
            "batch", 1, self.partials, self.sequence_count, logprobs, old_logprobs, ref_logprobs, entropy, mask,
            self.token_advantages, g_logprobs, self.tokens, *self.arguments.numbers[:4], log_ratios, loss, scalars,
            ESTIMATOR=self.arguments.kl_estimator,
        )  # fmt: skip
        return loss, scalars

    def spoiled(self, loss: Tensor, stats: RowStats) -> NanSource:
        """What a gradient needs that was written before all rows were known. Not saved: a user may change the loss."""
        of = self.arguments
        numbers = stats.entropy if of.old_logprobs is None else self.log_ratios.detach()
        return NanSource(loss.detach(), numbers, self.mask, of.cu_seqlens, of.ratio != "token")

    def _launch(self, kernel: str, programs: int, *arguments: Any, **choices: Any) -> None:
        layout = (_INTERPRETED_LAUNCH if triton_rows.INTERPRETED else LAUNCH)[kernel]
        run = getattr(_kernels(), f"{kernel}_kernel")
        with triton_rows.on_device(self.partials):
            run[(programs,)](
                *arguments, **choices, BLOCK=layout.elements, num_warps=layout.num_warps, enable_fp_fusion=True
            )


@functools.cache
def _kernels() -> Any:

    from . import triton_stage_kernels

    return triton_stage_kernels
