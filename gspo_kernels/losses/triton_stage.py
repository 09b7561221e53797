"""The token stage in Triton: two launches from the statistics of rows to the loss, its gradient and the stats.

One for the sequences, one for the batch: triton_stage_kernels.py. They run any objective that has a `triton_term`.
Other losses take the stage in torch; the tests compare both with the same oracle.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.checks import may_read
from ..base.layout import check_boundaries
from ..rows import triton_rows
from ..rows.dispatch import Backend
from ..rows.triton_rows import Launch, NanSource
from ..rows.types import RowStats, TokenSlope, Upstream
from .objectives import Objective
from .stats import PARTIALS, SCALARS
from .token_stage import TokenInputs
from .triton_term import MOST_PARAMETERS

_PARAMETERS = tuple(f"p{i}" for i in range(MOST_PARAMETERS))
_COUNT, _ZERO = PARTIALS.index("count"), PARTIALS.index("zero")
# `elements` tokens, or sequences, at a time. With more of either some variants of the sequence kernel spill registers.
# The batch is one program of sixteen warps, each with one of the sixteen partials.
LAUNCH = {"sequence": Launch(num_warps=4, elements=512), "batch": Launch(num_warps=16, elements=4096)}
_INTERPRETED_LAUNCH = {"sequence": Launch(num_warps=1, elements=4), "batch": Launch(num_warps=1, elements=32)}


def unsupported_reason(objective: Objective, context_parallel: bool) -> str:
    """Why the stage in Triton does not support this loss; empty if it does."""
    name = type(objective).__name__
    if objective.triton_term is None:
        return f"{name} has no triton_term"
    parameters = objective.packed_parameters()
    if parameters is None:
        return f"{name} is not a frozen dataclass at the top of a module, with fields that are floats, None or choices"
    if len(parameters) > MOST_PARAMETERS:
        return f"{name} has {len(parameters)} fields, a triton_term takes up to {MOST_PARAMETERS}"
    if objective.uses_logprobs and objective.ratio_of == "sequence":
        return f"{name} reads log-probabilities, of which a sequence's ratio has none"
    return "sequences are shared out over cp_group" if context_parallel else ""


def stage_reason(objective: Objective, backend: Backend, *, context_parallel: bool = False) -> str:
    """Which token stage runs beside this backend, and why, for `explain`."""
    if not backend.runs_stage_in_triton:
        return f"token stage: torch, because the rows are computed by {backend.name}"
    reason = unsupported_reason(objective, context_parallel)
    return f"token stage: torch, because {reason}" if reason else "token stage: Triton, in two launches"


def tokens_at_once(objective: Objective | None, block: int) -> int:
    """Of the batch kernel, which adds up the terms of an objective, or none: so many that nothing spills."""
    return block if objective is None else block // 4 if objective.uses_logprobs else block // 2


def functions_of(objective: Objective) -> dict[str, Any]:
    """What the sequence kernel has compiled in."""
    assert objective.triton_term is not None
    return {
        "TERM": objective.triton_term.compiled,
        "HOLD": None if objective.triton_hold is None else objective.triton_hold.compiled,
        "RATIO": f"{objective.sequence_value}_by_token" if objective.sequence_value else objective.ratio_of,
    }


def takes(inputs: TokenInputs) -> bool:
    """Whether it supports this loss."""
    return not unsupported_reason(inputs.objective, inputs.batch.ranks is not None)


def gradient(inputs: TokenInputs, stats: RowStats) -> Upstream:
    """dL/d of the statistics [tokens] of a packed batch without a mask, which is part of another."""
    stage = TritonStage((1, inputs.batch.tokens[0]), inputs)
    stage.sequences(stats.logprobs, stats.entropy)
    bonus = None if stage.grad_entropy is None else stage.grad_entropy.view(-1)
    return Upstream(stage.grad_logprobs.view(-1), bonus, counts=stage.counts)


def loss(inputs: TokenInputs, stats: RowStats) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, scalars of the stats, log-ratios, which are clipped) from the statistics of all rows; no gradient."""
    tokens = inputs.batch.tokens
    stage = TritonStage((tokens[0], tokens[1]) if len(tokens) == 2 else (1, tokens[0]), inputs)
    stage.sequences(stats.logprobs, stats.entropy)
    return *stage.batch(None), stage.log_ratios, stage.clipped


def compiled_variants() -> int:
    """How many Triton kernels, of rows and of tokens, this process has compiled so far."""
    kernels = (_kernels().sequence_kernel, _kernels().batch_kernel)
    return triton_rows.compiled_variants() + triton_rows.count_variants(kernels)


class TritonStage:
    """The two launches and the arrays between them; row arrays are [outer, inner]."""

    def __init__(self, shape: Sequence[int], inputs: TokenInputs) -> None:
        outer, inner = shape
        batch, objective = inputs.batch, inputs.objective
        self.inputs, self.tokens, self.length, self.sequence_count = inputs, outer * inner, inner, batch.sequences
        self.cu_seqlens = _contiguous(batch.cu_seqlens)
        if self.cu_seqlens is not None and may_read(self.cu_seqlens):
            check_boundaries(self.cu_seqlens, self.tokens)
        self.mask = None if batch.mask is None else batch.mask.contiguous().view(torch.uint8)
        self.advantages, self.importance_weights = _float32(inputs.advantages), _float32(inputs.importance_weights)
        self.old_logprobs, self.ref_logprobs = _contiguous(inputs.old_logprobs), _contiguous(inputs.ref_logprobs)
        self.rollout_logprobs, self.group_tokens = _contiguous(inputs.rollout_logprobs), _float32(inputs.group_tokens)
        normalizer = inputs.normalizer
        self.global_count = normalizer.detach() if isinstance(normalizer, Tensor) else None  # any dtype of numbers
        self.normalizer = 0.0 if normalizer is None or isinstance(normalizer, Tensor) else float(normalizer)
        self.functions = functions_of(objective)
        parameters = objective.packed_parameters() or ()
        parameters = (*parameters, *(0.0,) * (MOST_PARAMETERS - len(parameters)))
        self.numbers = {"max_log_ratio": inputs.max_log_ratio, **dict(zip(_PARAMETERS, parameters, strict=True))}

        self.grad_logprobs = torch.empty((outer, inner), dtype=torch.float32, device=batch.device)
        self.grad_entropy = torch.empty_like(self.grad_logprobs) if inputs.entropy_bonus else None
        self.log_ratios = self.grad_logprobs.new_empty(
            self.sequence_count if objective.ratio_of == "sequence" else self.tokens
        )
        self.clipped = self.log_ratios.new_empty((*self.log_ratios.shape, 2), dtype=torch.bool)
        self.token_advantages: Tensor | None = None
        self.token_weights: Tensor | None = None
        self.partials = self.grad_logprobs.new_empty((len(PARTIALS), self.sequence_count))

    @property
    def counts(self) -> Tensor:
        """[sequences]; gradients have to be divided by their sum."""
        return self.partials[_COUNT]

    @property
    def zero(self) -> Tensor:
        """[sequences] zeros, once `sequences` has run."""
        return self.partials[_ZERO]

    def keep_terms_for_batch(self) -> None:
        """Call it before `sequences` where one pass makes the gradient, and terms depend on log-probabilities.

        `sequences` then stores what `batch` computes them from: each token's advantage and its weight in the loss.
        """
        self.token_advantages = torch.empty_like(self.grad_logprobs)
        self.token_weights = torch.empty_like(self.grad_logprobs)

    def slope(self) -> TokenSlope:
        """What a row needs to compute its own slope; complete when `sequences` has run."""
        of_token = self.inputs.objective.row_slope()
        assert of_token is not None and self.old_logprobs is not None and self.token_advantages is not None
        return TokenSlope(
            self.old_logprobs, self.token_advantages, self.rollout_logprobs, self.inputs.max_log_ratio, *of_token
        )

    def sequences(self, logprobs: Tensor | None, entropy: Tensor | None) -> None:
        """Fills gradients, log-ratios, clip decisions and partial sums. None before the rows are read."""
        if self.sequence_count == 0:
            return
        inputs = self.inputs
        self._launch(
            "sequence",
            self.sequence_count,
            logprobs=logprobs,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            rollout_logprobs=self.rollout_logprobs,
            entropies=entropy,
            advantages=self.advantages,
            weights=self.importance_weights,
            mask=self.mask,
            cu_seqlens=self.cu_seqlens,
            group_tokens=self.group_tokens,
            global_count=self.global_count,
            tokens=self.tokens,
            length=self.length,
            sequences=self.sequence_count,
            advantage_per_token=int(inputs.advantages_per_token),
            weight_per_token=int(inputs.importance_weights_per_token),
            beta=inputs.beta,
            entropy_coef=inputs.entropy_coef,
            normalizer=self.normalizer,
            g_logprobs=self.grad_logprobs,
            g_entropies=self.grad_entropy,
            token_advantages=self.token_advantages,
            token_weights=self.token_weights,
            log_ratios=self.log_ratios,
            clipped=self.clipped.view(torch.int16),
            partials=self.partials,
            **self.functions,
            AGGREGATION=inputs.aggregation,
            ESTIMATOR=inputs.kl_estimator,
            KL_WEIGHTING=inputs.kl_weighting,
        )

    def batch(self, stats: RowStats | None) -> tuple[Tensor, Tensor]:
        """(loss, scalars); with `stats` if `sequences` was without."""
        loss, scalars = self.partials.new_empty(()), self.partials.new_empty(len(SCALARS))
        terms = self.token_advantages is not None
        reads_logprobs = stats is not None and (terms or self.ref_logprobs is not None)
        self._launch(
            "batch",
            1,
            partials=self.partials,
            sequences=self.sequence_count,
            logprobs=stats.logprobs if stats is not None and reads_logprobs else None,
            old_logprobs=self.old_logprobs if terms else None,
            ref_logprobs=None if stats is None else self.ref_logprobs,
            rollout_logprobs=self.rollout_logprobs if terms else None,
            entropies=None if stats is None else stats.entropy,
            mask=None if stats is None else self.mask,
            token_advantages=self.token_advantages,
            token_weights=self.token_weights,
            tokens=self.tokens,
            log_ratios=self.log_ratios if terms else None,
            clipped=self.clipped.view(torch.int16) if terms else None,
            loss=loss,
            scalars=scalars,
            TERM=self.functions["TERM"] if terms else None,
            ESTIMATOR=self.inputs.kl_estimator,
            KL_WEIGHTING=self.inputs.kl_weighting,
        )
        return loss, scalars

    def nan_source(self, loss: Tensor, stats: RowStats) -> NanSource:
        """For a gradient that was written before all rows were known. Not saved: a user may change the loss."""
        numbers = stats.entropy if self.old_logprobs is None else self.log_ratios.detach()
        return NanSource(loss.detach(), numbers, self.mask, self.cu_seqlens, self.functions["RATIO"] != "token")

    def _launch(self, kernel: str, programs: int, **arguments: Any) -> None:
        layout = (_INTERPRETED_LAUNCH if triton_rows.INTERPRETED else LAUNCH)[kernel]
        if kernel == "batch":
            objective = None if arguments["TERM"] is None else self.inputs.objective
            arguments["TOKENS_AT_ONCE"] = tokens_at_once(objective, layout.elements)
        run = getattr(_kernels(), f"{kernel}_kernel")
        with triton_rows.on_device(self.partials):
            run[(programs,)](
                **arguments,
                **self.numbers,
                BLOCK=layout.elements,
                num_warps=layout.num_warps,
                enable_fp_fusion=True,
            )


def _contiguous(array: Tensor | None) -> Tensor | None:
    return None if array is None else array.contiguous()


def _float32(array: Tensor | None) -> Tensor | None:
    """A factor of the loss, which is computed in float32, from any dtype."""
    if array is None or array.dtype == torch.float32:
        return _contiguous(array)
    return array.to(torch.float32).contiguous()


@functools.cache
def _kernels() -> Any:
    from . import triton_stage_kernels

    return triton_stage_kernels
