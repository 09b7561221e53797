"""Memory and products of a loss from hidden states: all columns in chunks, or the kept columns alone."""

from __future__ import annotations

from collections.abc import Iterator

from ..linear.cpu_products import workspace_bytes
from ..linear.products import NativeProducts, sum_dtype
from ..linear.weight_sums import block_rows, in_24_bits
from .estimate import BYTES_A_ROW, Estimate, HeadRows, Held, largest
from .head_walk import Pass
from .shape import Shape

# Of a sparse head, by torch's profiler on a CPU: bytes of each kept column in the forward, and in the backward, where
# the gradient of the head takes their order by id as well; and bytes of each row in the backward.
_ENTRY_FORWARD, _ENTRY_BACKWARD, _ENTRY_IN_ORDER, _ROW_BACKWARD = 25, 20, 32, 4


def from_hidden(shape: Shape) -> Estimate:
    """`linear_policy_loss` and its backward; without a gradient `linear_token_logprobs`."""
    found, needs_grad = Pass(shape), shape.needs_grad
    rows = found.rows
    multiplied = rows.forward + rows.recomputed + rows.backward * (needs_grad.hidden + needs_grad.weight)
    return Estimate("from hidden states", largest(_moments(shape, found)), rows, multiplied, shape, found.chunk)


def _moments(shape: Shape, found: Pass) -> Iterator[Held]:
    """What is held while chunks are computed, while their gradients are multiplied, and when gradients are rounded."""
    batch, buffers, of, needs_grad, width = shape.batch, found.buffers, found.of, shape.needs_grad, shape.width
    operand, sums, vocab = shape.dtype.itemsize, of.sum_dtype.itemsize, shape.vocab
    in_24 = in_24_bits(shape.device, shape.dtype, of.sum_dtype)
    of_hidden = batch.tokens * width * sums * needs_grad.hidden
    of_weight = (3 if in_24 else sums) * vocab * width * needs_grad.weight
    throughout = {
        "logits": buffers.logits * found.stride * buffers.logit_bytes,
        "gradients of logits": buffers.gradients * found.stride * buffers.gradient_bytes,
        "gradients": of_hidden + of_weight,
        "rows": BYTES_A_ROW * batch.tokens,
    }

    def moment(operands: int, rows: int, columns: int, depth: int) -> Held:
        """Operands and results beside the buffers; the product is [rows, depth] x [depth, columns]."""
        native = isinstance(of, NativeProducts)
        packed = workspace_bytes(rows, columns, depth, of.gradient_dtype) if native else 0
        return {**throughout, "operands": operands + of.converted_bytes, "workspace": packed}

    for rows, copied in found.loads:
        widened = of.gradient_dtype.itemsize if of.gradient_dtype.itemsize > operand else 0
        yield moment(rows * width * (operand * copied + widened), rows, vocab, width)
    for rows, loaded in found.gradient_products:
        of_load = loaded * width * operand
        if needs_grad.hidden:
            yield moment(of_load + rows * width * sums, rows, width, vocab)
        if needs_grad.weight:
            # A second copy: with rows of 0 where a GPU has inactive ones, or converted to the dtype of sums.
            second = max(0 if buffers.in_place else operand, sums if of.converted_bytes else 0)
            block = block_rows(vocab, width) * width * sums if in_24 else 0
            yield moment(of_load + rows * width * (operand + second) + block, vocab, width, rows)
    if found.scaled:
        yield moment(3 * found.scaled * width * sums, 0, 0, 0)
    yield {"gradients": rounded(of_hidden, operand, sums) + rounded(of_weight, operand, 0 if in_24 else sums)}


def rounded(sums: int, operand: int, itemsize: int) -> int:
    """Bytes of sums and of the gradient that they are rounded to; where that is in place, of the sums alone."""
    return sums + (sums * operand // itemsize if itemsize > operand else 0)


def from_kept(shape: Shape) -> Estimate:
    """`linear_policy_loss` with `kept`: every row keeps so many columns, and has entries."""
    batch, needs_grad, operand, sums = shape.batch, shape.needs_grad, shape.dtype.itemsize, sum_dtype(shape.dtype)
    entries = batch.tokens * shape.kept
    of_hidden = batch.tokens * shape.width * needs_grad.hidden
    of_weight = shape.vocab * shape.width * needs_grad.weight
    moments = (
        {"kept columns": _ENTRY_FORWARD * entries, "rows": BYTES_A_ROW * batch.tokens},
        {
            "gradients": operand * (of_hidden + of_weight) + (sums.itemsize * of_hidden if shape.sharded else 0),
            "kept columns": (_ENTRY_IN_ORDER if of_weight else _ENTRY_BACKWARD) * entries,
            "rows": _ROW_BACKWARD * batch.tokens,
        },
    )
    multiplied = batch.tokens * shape.kept / shape.vocab * (1 + needs_grad.hidden + needs_grad.weight)
    return Estimate("kept sets, from hidden states", largest(moments), HeadRows(0, 0, 0), multiplied, shape)
