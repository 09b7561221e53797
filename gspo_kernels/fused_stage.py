"""The named losses on a GPU in four launches: rows, two of token_kernels.py in the place of token_stage.py, gradient.

Off-policy: rows -> sequences -> batch, and the gradient in the backward. On-policy, where the gradient by each
log-probability is known beforehand: sequences -> rows and gradient -> batch, and a factor in the backward. With a ratio
per token the CUDA kernel, which clips by itself, does the same off-policy; the sequences are then asked a second time,
for the loss. What the kernels do not cover takes the stage in torch; the same oracle guards both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import may_read
from .layout import check_boundaries
from .logprobs import cuda_rows, triton_rows
from .logprobs.backends import Backend, by_triton, choose
from .logprobs.ops import check_values, room_for_gradient, row_gradient, unpadded
from .logprobs.rows import Rows, RowStats, TokenClip, Upstream, empty_stats
from .objectives import GRPO, GSPO, PPO, GSPOToken, Objective
from .scalars import run_time_list
from .stats import SCALARS, Stats
from .token_stage import LossOutput, TokenInputs

_RATIOS: dict[type[Objective], str] = {GSPO: "sequence", GSPOToken: "sequence_by_token", GRPO: "token", PPO: "token"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NUM_WARPS, _BLOCK = 4, 512  # more tokens at a time, or more warps, and registers spill
_INTERPRETED_BLOCK = 4
_PARTIALS, _COUNT, _ZERO = 14, 12, 13  # of token_kernels.py


def serves(inputs: TokenInputs, logits: Tensor, backend: str | None) -> bool:
    """Whether it takes this loss on these logits: for that, Triton has to run."""
    return takes(inputs) and by_triton(choose(logits, backend))


def takes(inputs: TokenInputs) -> bool:
    """Whether it takes this loss: a named objective, numbers in float32 or narrower."""
    arrays = (inputs.advantages, inputs.old_logprobs, inputs.ref_logprobs, inputs.weights)
    return type(inputs.objective) in _RATIOS and all(x is None or x.dtype in _DTYPES for x in arrays)


def clips_row_by_row(inputs: TokenInputs, logits: Tensor, backend: str | None) -> bool:
    """Whether the gradient of a loss that it takes can be had in one pass although the ratios are not 1."""
    per_token = _RATIOS.get(type(inputs.objective)) == "token" and inputs.beta == 0.0 and inputs.entropy_coef == 0.0
    return per_token and takes(inputs) and choose(logits, backend) is cuda_rows


def policy_loss(
    rows: Rows, inputs: TokenInputs, vocab_size: int, overwrite_logits: bool, one_pass: bool, backend: str | None
) -> LossOutput:
    arguments = (
        rows.logits, rows.token_ids, rows.mask, rows.temperature, vocab_size, overwrite_logits, *_of_tokens(inputs),
    )  # fmt: skip
    if one_pass:
        loss, scalars, logprobs, log_ratios = _OnePass.apply(choose(rows.logits, backend), *arguments)
    else:
        loss, scalars, log_ratios, logprobs, *_ = _fused_loss(*arguments)
    return _output(inputs, loss, scalars, logprobs, log_ratios)


def gradient(inputs: TokenInputs, stats: RowStats, advantages_per_token: bool, weights_per_token: bool) -> Upstream:
    """dL/d of the statistics [tokens] of a packed batch without a mask, which is part of another."""
    arguments = *_of_tokens(inputs)[:10], advantages_per_token, weights_per_token, inputs.entropy_coef != 0.0
    stage = _Stage((1, inputs.batch.tokens[0]), inputs.batch.device, None, *arguments)
    stage.sequences(stats)
    bonus = stage.grad_entropy.view(-1) if inputs.entropy_coef != 0.0 else None
    return Upstream(stage.grad_logprobs.view(-1), bonus, counts=stage.partials[_COUNT])


def loss(inputs: TokenInputs, stats: RowStats) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, scalars of the stats, log-ratios) from the statistics of all rows, without a gradient."""
    tokens = inputs.batch.tokens
    shape = (tokens[0], tokens[1]) if len(tokens) == 2 else (1, tokens[0])
    mask = None if inputs.batch.mask is None else inputs.batch.mask.contiguous()
    stage = _Stage(shape, inputs.batch.device, mask, *_of_tokens(inputs))
    stage.sequences(stats)
    return *stage.batch(None), stage.log_ratios


def _output(inputs: TokenInputs, loss: Tensor, scalars: Tensor, logprobs: Tensor, log_ratios: Tensor) -> LossOutput:
    shape, ratio_of = inputs.batch.tokens, inputs.objective.ratio_of
    with torch.no_grad():
        of_batch: dict[str, Any] = dict(zip(SCALARS, scalars.detach().unbind(), strict=True))
        stats = Stats(
            **of_batch,
            logprobs=logprobs.detach().reshape(shape),
            log_ratio=log_ratios.detach() if ratio_of == "sequence" else log_ratios.detach().reshape(shape),
            ratio_of=ratio_of,
        )
    return LossOutput(loss, stats)


def loss_of_rows(inputs: TokenInputs, stats: RowStats) -> LossOutput:
    """The loss from the statistics of all rows, [outer, inner] and differentiable: where they came from elsewhere."""
    mask = None if inputs.batch.mask is None else inputs.batch.mask.contiguous()
    loss, scalars, log_ratios, *_ = _fused_stage(stats.logprobs, stats.entropy, mask, *_of_tokens(inputs))
    return _output(inputs, loss, scalars, stats.logprobs, log_ratios)


def compiled_variants() -> int:
    """How many Triton kernels, of rows and of tokens, this process has compiled so far."""
    from . import token_kernels

    kernels = (token_kernels.sequence_kernel, token_kernels.batch_kernel)
    return triton_rows.compiled_variants() + triton_rows.count_variants(kernels)


def _of_tokens(inputs: TokenInputs) -> tuple[Any, ...]:
    """The arguments of `_Stage`, but for its first three."""
    objective: Any = inputs.objective
    numbers = (
        objective.eps_low,
        objective.eps_high,
        math.inf if objective.dual_clip is None else objective.dual_clip,
        inputs.max_log_ratio,
        inputs.beta,
        inputs.entropy_coef,
        0.0 if inputs.normalizer is None or isinstance(inputs.normalizer, Tensor) else float(inputs.normalizer),
    )
    return (
        _contiguous(inputs.advantages), _contiguous(inputs.old_logprobs), _contiguous(inputs.ref_logprobs),
        _contiguous(inputs.weights), inputs.batch.cu_seqlens, _on(inputs.normalizer, inputs.batch.device),
        run_time_list(numbers), _RATIOS[type(objective)], inputs.aggregation, inputs.kl_estimator,
        inputs.advantages_per_token, inputs.weights_per_token, inputs.entropy_coef != 0.0,
    )  # fmt: skip


def _contiguous(array: Tensor | None) -> Tensor | None:
    return None if array is None else array.contiguous()


def _on(normalizer: float | Tensor | None, device: torch.device) -> Tensor | None:
    return normalizer.detach().to(device, torch.float32) if isinstance(normalizer, Tensor) else None


@torch.library.custom_op("gspo_kernels::fused_loss", mutates_args=(), device_types=("cpu", "cuda"))
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
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    global_count: Tensor | None,
    numbers: Tensor,
    ratio: str,
    aggregation: str,
    kl_estimator: str,
    advantages_per_token: bool,
    weights_per_token: bool,
    entropy_bonus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, scalars, log_ratios; logprobs, entropy, lse; grad_logprobs, grad_entropy (or empty), partials"""
    rows = Rows(logits[..., :vocab_size], token_ids, mask, temperature)
    stage = _Stage(
        logits.shape[:2], logits.device, mask, advantages, old_logprobs, ref_logprobs, weights, cu_seqlens,
        global_count, numbers, ratio, aggregation, kl_estimator, advantages_per_token, weights_per_token, entropy_bonus,
    )  # fmt: skip
    check_values(rows)
    stats = triton_rows.forward(rows)
    stage.sequences(stats)
    loss, scalars = stage.batch(None)
    return loss, scalars, stage.log_ratios, *stats, stage.grad_logprobs, stage.grad_entropy, stage.partials


@_fused_loss.register_fake
def _(*arguments: Any) -> Any:
    logits, cu_seqlens, ratio, entropy_bonus = arguments[0], arguments[10], arguments[13], arguments[18]
    room = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    outer, inner = logits.shape[:2]
    sequences = outer if cu_seqlens is None else cu_seqlens.shape[0] - 1
    log_ratios = room(sequences) if ratio == "sequence" else room(outer * inner)
    bonus = room(outer, inner) if entropy_bonus else room(0)
    stats = empty_stats(logits)
    return room(()), room(12), log_ratios, *stats, room(outer, inner), bonus, room(_PARTIALS, sequences)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.vocab_size, ctx.overwrite_logits, ctx.entropy_bonus = inputs[4], inputs[5], inputs[18]
    ctx.save_for_backward(*inputs[:4], *output[3:])
    ctx.set_materialize_grads(False)  # else autograd fills zeros for every output that nothing depends on


def _gradient(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 19
    logits, token_ids, mask, temperature, logprobs, entropy, lse, g_logprobs, g_entropy, partials = ctx.saved_tensors
    gradient = room_for_gradient(logits, ctx.overwrite_logits)
    row_gradient(
        logits, token_ids, mask, temperature, ctx.vocab_size, logprobs, entropy, lse, g_logprobs,
        g_entropy if ctx.entropy_bonus else None, None, upstream, partials[_COUNT], gradient, triton_rows.name,
    )  # fmt: skip
    return gradient, *(None,) * 18


_fused_loss.register_autograd(_gradient, setup_context=_remember)


@torch.library.custom_op("gspo_kernels::fused_stage", mutates_args=(), device_types=("cpu", "cuda"))
def _fused_stage(
    logprobs: Tensor,
    entropy: Tensor,
    mask: Tensor | None,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    global_count: Tensor | None,
    numbers: Tensor,
    ratio: str,
    aggregation: str,
    kl_estimator: str,
    advantages_per_token: bool,
    weights_per_token: bool,
    entropy_bonus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, scalars, log_ratios; grad_logprobs, grad_entropy (or empty), partials"""
    stage = _Stage(
        logprobs.shape, logprobs.device, mask, advantages, old_logprobs, ref_logprobs, weights, cu_seqlens,
        global_count, numbers, ratio, aggregation, kl_estimator, advantages_per_token, weights_per_token, entropy_bonus,
    )  # fmt: skip
    stage.sequences(RowStats(logprobs.contiguous(), entropy.contiguous(), entropy.new_empty(0)))
    loss, scalars = stage.batch(None)
    return loss, scalars, stage.log_ratios, stage.grad_logprobs, stage.grad_entropy, stage.partials


@_fused_stage.register_fake
def _(*arguments: Any) -> Any:
    logprobs, cu_seqlens, ratio, entropy_bonus = arguments[0], arguments[7], arguments[10], arguments[15]
    room = functools.partial(torch.empty, dtype=torch.float32, device=logprobs.device)
    outer, inner = logprobs.shape
    sequences = outer if cu_seqlens is None else cu_seqlens.shape[0] - 1
    log_ratios = room(sequences) if ratio == "sequence" else room(outer * inner)
    bonus = room(outer, inner) if entropy_bonus else room(0)
    return room(()), room(12), log_ratios, room(outer, inner), bonus, room(_PARTIALS, sequences)


def _remember_stage(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.entropy_bonus = inputs[15]
    ctx.save_for_backward(*output[3:])
    ctx.set_materialize_grads(False)


def _gradient_of_stage(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 16
    g_logprobs, g_entropy, partials = ctx.saved_tensors
    bonus = g_entropy if ctx.entropy_bonus else None
    of_logprobs, of_entropy, _lse = Upstream(g_logprobs, bonus, factor=upstream, counts=partials[_COUNT]).by_statistic()
    return of_logprobs, of_entropy, *(None,) * 14


_fused_stage.register_autograd(_gradient_of_stage, setup_context=_remember_stage)


class _OnePass(torch.autograd.Function):
    """The same where no gradient needs the batch: it is written by the forward, while each row was in the cache."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, logits: Tensor, *arguments: Any) -> Any:
        token_ids, mask, temperature, vocab_size, overwrite_logits, *of_tokens = arguments
        rows = Rows(logits[..., :vocab_size], token_ids, mask, temperature)
        stage = _Stage(logits.shape[:2], logits.device, mask, *of_tokens)
        check_values(rows)
        clip = None if stage.old_logprobs is None else stage.clip()
        stage.sequences(None)
        gradient = room_for_gradient(logits, overwrite_logits)
        upstream = Upstream(stage.grad_logprobs, counts=stage.partials[_COUNT], tickets=stage.partials[_ZERO])
        room = unpadded(gradient, vocab_size)
        if clip is None:
            stats = backend.forward_backward(rows, upstream, room)
            loss, scalars = stage.batch(stats)
        else:
            stats = cuda_rows.forward_backward(rows, upstream, room, clip)
            stage.sequences(stats)
            loss, scalars = stage.batch(None)
        if overwrite_logits:
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(scalars, stats.logprobs, stage.log_ratios)
        ctx.set_materialize_grads(False)
        return loss, scalars, stats.logprobs, stage.log_ratios

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> Any:
        if upstream is None:
            return (None,) * 20
        (gradient,) = ctx.saved_tensors
        triton_rows.scale(gradient, upstream)  # returns at once where upstream is 1
        torch.autograd.graph.increment_version(gradient)  # a second backward is refused
        return None, gradient, *(None,) * 18


class _Stage:
    """The two launches and the arrays between them."""

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device,
        mask: Tensor | None,
        advantages: Tensor,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        weights: Tensor | None,
        cu_seqlens: Tensor | None,
        global_count: Tensor | None,
        numbers: Tensor,
        ratio: str,
        aggregation: str,
        kl_estimator: str,
        advantages_per_token: bool,
        weights_per_token: bool,
        entropy_bonus: bool,
    ) -> None:
        outer, inner = shape
        self.tokens, self.length = outer * inner, inner
        self.sequence_count = outer if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if cu_seqlens is not None and may_read(cu_seqlens):
            check_boundaries(cu_seqlens, self.tokens)
        self.cu_seqlens, self.global_count = cu_seqlens, global_count
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.old_logprobs, self.ref_logprobs = old_logprobs, ref_logprobs
        self.advantages, self.weights = advantages, weights
        self.numbers: list[float] = numbers.tolist()  # a CPU tensor: reading it waits for nothing
        self.choices: dict[str, Any] = {"AGGREGATION": aggregation, "ESTIMATOR": kl_estimator, "RATIO": ratio}
        self.choices |= {"ADVANTAGE_PER_TOKEN": advantages_per_token, "WEIGHT_PER_TOKEN": weights_per_token}
        room = functools.partial(torch.empty, dtype=torch.float32, device=device)
        self.grad_logprobs = room(outer, inner)
        self.grad_entropy = room(outer, inner) if entropy_bonus else room(0)
        self.log_ratios = room(self.sequence_count) if ratio == "sequence" else room(self.tokens)
        self.token_advantages: Tensor | None = None
        self.partials = room(_PARTIALS, self.sequence_count)

    def clip(self) -> TokenClip:
        """What a row needs to clip its own ratio; complete when `sequences` has run."""
        assert self.old_logprobs is not None
        self.token_advantages = torch.empty_like(self.grad_logprobs)
        eps_low, eps_high, dual_clip, max_log_ratio = self.numbers[:4]
        return TokenClip(self.old_logprobs.float(), self.token_advantages, eps_low, eps_high, dual_clip, max_log_ratio)

    def sequences(self, stats: RowStats | None) -> None:
        """Fills the gradients, log-ratios and partial sums; `stats` is None before the rows have been read."""
        if self.sequence_count:
            self._launch(
                "sequence_kernel", self.sequence_count,
                None if stats is None else stats.logprobs, self.old_logprobs, self.ref_logprobs,
                None if stats is None else stats.entropy, self.advantages, self.weights, self.mask, self.cu_seqlens,
                self.global_count, self.tokens, self.length, self.sequence_count, *self.numbers,
                self.grad_logprobs, self.grad_entropy if self.grad_entropy.numel() else None,
                self.token_advantages if stats is None else None, self.log_ratios, self.partials, **self.choices,
            )  # fmt: skip

    def batch(self, stats: RowStats | None) -> tuple[Tensor, Tensor]:
        """(loss, scalars); with `stats` if `sequences` was without."""
        loss, scalars = self.partials.new_empty(()), self.partials.new_empty(12)
        with_tokens = stats is not None
        self._launch(
            "batch_kernel", 1, self.partials, self.sequence_count,
            stats.logprobs if stats is not None and self.ref_logprobs is not None else None,
            self.ref_logprobs if with_tokens else None, None if stats is None else stats.entropy,
            self.mask if with_tokens else None, self.tokens, self.numbers[3], loss, scalars,
            ESTIMATOR=self.choices["ESTIMATOR"],
        )  # fmt: skip
        return loss, scalars

    def _launch(self, kernel: str, programs: int, *arguments: Any, **choices: Any) -> None:
        from . import token_kernels

        block = _INTERPRETED_BLOCK if triton_rows.INTERPRETED else _BLOCK
        run = getattr(token_kernels, kernel)
        with triton_rows.on_device(self.partials):
            run[(programs,)](*arguments, **choices, BLOCK=block, num_warps=_NUM_WARPS, enable_fp_fusion=True)
