"""Memory and products of a loss from logits: a model's head writes all of them, and the loss has their gradient.

The way begins with hidden states too, so that its numbers stand beside the others: logits in the dtype of the head, the
loss, and the gradients of hidden states and head. The caller keeps no logits once the loss is computed.
"""

from __future__ import annotations

from .estimate import BYTES_A_ROW, Estimate, HeadRows, Held, largest
from .shape import Shape

_FLOAT32 = 4


def from_logits(shape: Shape, overwrite: bool) -> Estimate:
    """`policy_loss`, with `overwrite_logits` or without."""
    logits = logits_bytes(shape)
    rows = {"rows": BYTES_A_ROW * shape.batch.tokens}
    moments: list[Held] = [{"logits": logits, **rows}]
    if shape.gradient:
        moments.append({"logits": logits, "gradients of logits": 0 if overwrite else logits, **rows})
    title = "from logits, overwrite_logits=True" if overwrite else "from logits"
    return _of(title, shape, moments)


def plain_torch(shape: Shape) -> Estimate:
    """`log_softmax` of a float32 copy of the logits, the token's column gathered. Autograd holds the result of the
    softmax, the zeros that `gather` has for a gradient, and the gradient of the softmax."""
    logits = logits_bytes(shape)
    wide = logits * _FLOAT32 // shape.dtype.itemsize
    moments: list[Held] = [{"logits": logits, "float32 copies": wide * (1 if wide == logits else 2)}]
    if shape.gradient:
        moments.append({"float32 copies": wide, "gradients of logits": 2 * wide})
    return _of("plain torch", shape, moments)


def compiled_torch(shape: Shape) -> Estimate:
    """The same under torch.compile, head included: logits and one float32 array, as measured on two CPUs."""
    logits = logits_bytes(shape)
    wide = logits * _FLOAT32 // shape.dtype.itemsize
    return _of("torch.compile", shape, [{"logits": logits, "float32 copies": wide * shape.gradient}])


def logits_bytes(shape: Shape) -> int:
    return shape.batch.tokens * shape.vocab * shape.dtype.itemsize


def _of(title: str, shape: Shape, moments: list[Held]) -> Estimate:
    """With the moment at which the head's backward multiplies the gradient of the logits."""
    batch, needs_grad = shape.batch, shape.needs_grad
    if shape.gradient:
        returned = batch.tokens * needs_grad.hidden + shape.vocab * needs_grad.weight
        moments.append(
            {"gradients of logits": logits_bytes(shape), "gradients": returned * shape.width * shape.dtype.itemsize}
        )
    backward = batch.tokens * shape.gradient
    multiplied = batch.tokens + backward * (needs_grad.hidden + needs_grad.weight)
    return Estimate(title, largest(moments), HeadRows(batch.tokens, 0, backward), multiplied, shape)
