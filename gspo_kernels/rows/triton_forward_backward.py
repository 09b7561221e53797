"""Statistics and gradient of a row of logits in one launch, in Triton, for an upstream gradient known in advance."""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_backward import (
    cap_coefficients,
    coefficients,
    common_factor,
    gradient_of,
    logit_of,
    upstream_of,
    write_gradient,
    write_zeros,
)
from .triton_columns import (
    block_start,
    first_block,
    has_entries,
    is_active,
    phase_of,
    row_kernel,
    row_pointer,
    scale_of,
)
from .triton_far import is_far, largest_logit_of, write_far
from .triton_forward import statistics, store_statistics
from .triton_math import bounded_columns, halves, narrow, prefetch


@triton.jit
def _prefetch_row(row, vocab, BLOCKS: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Brings the first BLOCKS blocks of a row to the L2 cache of an NVIDIA GPU; nothing past the row's end."""
    for i in tl.static_range(BLOCKS):
        prefetch(row + tl.minimum((i * LANES + tl.arange(0, LANES)) * (REPEAT * WIDTH), vocab - 1))


@triton.jit
def _kept_columns(pointer, hole, KEPT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of the first KEPT whole blocks of a row on a 16-byte boundary, not counting block `hole`.

    No other access has the shape [KEPT, BLOCK]: Triton gives all accesses of one shape the widest layout among them.
    """
    start = block_start(tl.arange(0, KEPT), hole, BLOCK)
    here = pointer + start[:, None] + tl.arange(0, BLOCK)[None, :]
    return tl.max_contiguous(tl.multiple_of(here, [1, 16]), [1, WIDTH])


@triton.jit
def _load_kept(row, hole, there, KEPT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """These blocks of 16-bit logits, if `there`; on NVIDIA two logits an int32."""
    if PTX:
        here = _kept_columns(row.to(tl.pointer_type(tl.int32)), hole, KEPT, BLOCK // 2, WIDTH // 2)
    else:
        here = _kept_columns(row, hole, KEPT, BLOCK, WIDTH)
    return tl.load(here, mask=tl.zeros(here.shape, tl.int1) | there, other=0)


@triton.jit
def _write_kept(kept, there, destination, hole, base, constant, scale, KEPT: tl.constexpr, BLOCK: tl.constexpr,
                WIDTH: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Writes the gradient of the kept blocks, if `there`. Not for rows with a cap."""
    DTYPE: tl.constexpr = destination.dtype.element_ty
    if there:
        if PTX:
            low, high = halves(bounded_columns(kept, None, PTX, DTYPE), DTYPE)
            x = tl.reshape(tl.join(low, high), [KEPT, BLOCK])
        else:
            x = kept.to(tl.float32)
        g = narrow(gradient_of(x, base, constant, 0.0, scale, 0.0, None, None, False, PTX, DTYPE), DTYPE)
        tl.store(_kept_columns(destination, hole, KEPT, BLOCK, WIDTH), g)


@row_kernel()
def forward_backward_kernel(
    logits, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32,
    token_ids, mask, temperature, scale, scale_error, tanh_hi, tanh_lo,
    logprobs, entropies, lses, g_logprobs, counts, counts_size: tl.int32,
    gradient, gradient_outer_stride: tl.int64, gradient_inner_stride: tl.int64, kept_offsets, entries: tl.int64,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
    PREFETCH: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Both at once, for a gradient by the log-probability that is known in advance: the second read hits the cache.

    Of 16-bit logits, PREFETCH more blocks are prefetched to the L2 cache while a row is summed; the first KEPT blocks
    stay in registers and are not read a second time; with a cap, none do. Rows with entries are left to
    `kept_forward_backward_kernel`.
    """
    row = tl.program_id(0)
    if has_entries(kept_offsets, row, entries):
        return
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    NARROW: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    destination = row_pointer(gradient, row, inner, gradient_outer_stride, gradient_inner_stride)
    if is_active(mask, row):
        source = row_pointer(logits, row, inner, outer_stride, inner_stride)
        first = None
        if NARROW:
            first = first_block(source, vocab, BLOCK, WIDTH, PTX)
        if PREFETCH > 0 and PTX:
            _prefetch_row(source, vocab, PREFETCH + 1, REPEAT, LANES, WIDTH)
        target = tl.load(token_ids + row).to(tl.int32)
        skip = 0
        if KEPT > 0 and NARROW:
            full = vocab // BLOCK
            hole = tl.where((target >= 0) & (target < full * BLOCK), target // BLOCK, full)
            there = full - (hole < full).to(tl.int32) >= KEPT
            there &= (phase_of(source, WIDTH) == 0) & (phase_of(destination, WIDTH) == 0)
            kept = _load_kept(source, hole, there, KEPT, BLOCK, WIDTH, PTX)
            skip = there.to(tl.int32) * KEPT
        g_logprob = upstream_of(g_logprobs, row, common_factor(None, counts, counts_size))
        s, error = scale_of(row, temperature, scale, scale_error)
        logprob, h, hi, lo, power = statistics(
            source, token_ids, row, vocab, first, s, error, tanh_hi, tanh_lo, REPEAT, LANES, WIDTH, PTX, PREFETCH
        )
        store_statistics(row, logprob, h, hi, lo, power, logprobs, entropies, lses)
        if g_logprob != 0.0:
            base, constant, slope, at_target = coefficients(g_logprob, 0.0, 0.0, logprob, h, hi, lo, s)
            pivot = 0.0
            if tanh_hi is not None:
                logit = logit_of(source, vocab, target)
                base, constant, slope, at_target, s, pivot = cap_coefficients(
                    base, constant, slope, at_target, h, hi, lo, s, logit, tanh_hi, tanh_lo, PTX
                )
            if is_far(hi, power, tanh_hi):
                largest_logit = largest_logit_of(hi, lo, power, h, s, error)
                write_far(source, destination, vocab, target, largest_logit, g_logprob, 0.0, 0.0, h, s, LANES)
            else:
                write_gradient(
                    source, destination, vocab, target, base, constant, slope, at_target, s, pivot, tanh_hi,
                    tanh_lo, skip, False, REPEAT, LANES, WIDTH, PTX,
                )  # fmt: skip
                if KEPT > 0 and NARROW:
                    _write_kept(kept, there, destination, hole, base, constant, s, KEPT, BLOCK, WIDTH, PTX)
        else:
            write_zeros(destination, vocab, BLOCK, WIDTH)
    else:
        zero = tl.zeros((), tl.float32)
        store_statistics(row, zero, zero, zero, zero, zero, logprobs, entropies, lses)
        write_zeros(destination, vocab, BLOCK, WIDTH)
