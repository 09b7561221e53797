"""A term of the logits, `hidden @ weight.T`: its products for a chunk of rows, and the gradients of its two operands.

The head is one term. A low-rank term (LoRA's, with r columns instead of D) is added to the same chunk of logits, so no
copy of the head is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.collectives import Ranks, all_reduce_
from .products import Products, products
from .weight_sums import Sums, WeightSums


class TermProducts(NamedTuple):
    of_logits: Products  # of hidden states and the weight
    of_gradients: Products  # of the gradients of logits with the weight and with hidden states


def low_rank_products(weight: Tensor, of_head: Products) -> TermProducts:
    """Beside a head's products. `weight` [V, r] has the dtype of the sums.

    Logits are multiplied in float32 (float64) from operands of any dtype, which takes little time for r columns. The
    gradients of logits have the head's dtype, so their products are in it too.
    """
    of_logits = products(weight, of_head.sum_dtype)
    if of_head.gradient_dtype == of_head.sum_dtype:
        return TermProducts(of_logits, of_logits)
    return TermProducts(of_logits, products(weight, of_head.dtype))


def padded_rows(terms: Sequence[Products], rows: int) -> int:
    """How many rows `write_logits` needs for `rows` of them."""
    return max(of.padded_rows(rows) for of in terms)


def write_logits(terms: Sequence[Products], operands: Sequence[Tensor], bias: Tensor | None, out: Tensor) -> None:
    """The sum of all terms and the bias -> the first rows of `out` [padded_rows, V]; `operands` are hidden states."""
    for i, (of, hidden) in enumerate(zip(terms, operands, strict=True)):
        if i == 0:
            of.logits(hidden, bias, out)
        else:
            of.logits(hidden, None, out, add=True)


class HeadTerm:
    """Hidden states [N, D], and a weight [V, D] whose rows from `vocab` on are padding."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, vocab: int, of: TermProducts, needs_hidden: bool, needs_weight: bool
    ) -> None:
        self.hidden, self.of_logits, self._of_gradients = hidden, of.of_logits, of.of_gradients
        self._needs_hidden, self._needs_weight = needs_hidden, needs_weight
        dtype = of.of_logits.sum_dtype
        self.hidden_gradient = torch.zeros(hidden.shape if needs_hidden else 0, dtype=dtype, device=hidden.device)
        self._weight_sums = WeightSums(weight if needs_weight else weight[:0], vocab, dtype)

    def add_gradients(self, gradient: Tensor, row_indices: Tensor, active: Tensor | None, factor: float) -> None:
        """Multiplies gradients of logits [n, V], times a factor. `active` as in `PendingProducts`."""
        if self._needs_hidden:
            # Not kept in a variable: the product of the weight below takes as much memory again.
            self.hidden_gradient.index_copy_(0, row_indices, self._of_gradients.hidden_gradient(gradient, factor))
        if self._needs_weight:
            hidden = self.hidden.index_select(0, row_indices)
            if active is not None:  # hidden states of an inactive row may be NaN, and zero times NaN is NaN
                hidden = torch.where(active[:, None], hidden, 0.0)
            self._of_gradients.weight_gradient(gradient, hidden, self._weight_sums, factor)

    def scale_hidden_gradient(self, row_indices: Tensor, coefficients: Tensor) -> None:
        """Multiplies the gradient of each of these hidden states by its coefficient; a coefficient of 0 gives 0."""
        if not self._needs_hidden:
            return
        gradient = self.hidden_gradient.index_select(0, row_indices)
        factor = coefficients[:, None]
        scaled = torch.where(factor != 0.0, gradient * factor.to(gradient.dtype), 0.0)
        self.hidden_gradient.index_copy_(0, row_indices, scaled)

    def sum_hidden_gradient(self, row_indices: Tensor | None, ranks: Ranks) -> None:
        """Over the ranks. Only selected rows are sent: the others are 0 on every rank."""
        if not self._needs_hidden:
            return
        if row_indices is None:
            all_reduce_(self.hidden_gradient, ranks)
            return
        gradient = self.hidden_gradient.index_select(0, row_indices)
        all_reduce_(gradient, ranks)
        self.hidden_gradient.index_copy_(0, row_indices, gradient)

    def weight_gradient(self) -> Sums:
        return self._weight_sums.finished()
