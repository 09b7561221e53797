"""What a contestant must return before it is timed: a float64 answer, checked where a wrong kernel shows.

At V = 151,936 an absolute tolerance is blind: a gradient without its whole softmax term passes. So the target column
(of every row) and the tail (of a sample of rows) are compared apart, each relative to its own size, and rows without a
coefficient must be exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Problem

# Relative; fp32 leaves room for torch's own log_softmax, bf16 is one unit in the last place of the stored gradient.
_ROUNDING = 2e-6  # what fp32 may lose of 1 - p at the target: two units in the last place of a logsumexp of 10
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-8}
LOSS_TOLERANCE = 1e-5  # relative to the mean size of an advantage


class WrongAnswer(Exception):
    """A contestant's loss or gradient is not what float64 says; it must not be timed."""


def check(problem: Problem, loss: Tensor, gradient: Tensor | None) -> None:
    scale = float(problem.advantages.abs().mean())
    if not abs(float(loss) - problem.loss) <= LOSS_TOLERANCE * scale:
        raise WrongAnswer(f"loss: expected {problem.loss!r}, got {float(loss)!r}")
    if not problem.case.work.gradient:
        return
    if gradient is None or gradient.shape != problem.logits.shape or gradient.dtype != problem.logits.dtype:
        raise WrongAnswer(f"gradient: expected {problem.logits.shape} in {problem.logits.dtype}")
    gradient, tolerance = gradient.detach(), TOLERANCE[gradient.dtype]
    token_ids = problem.token_ids

    target = gradient.gather(-1, token_ids.unsqueeze(-1)).reshape(-1).double()
    exact = -problem.coefficients * torch.expm1(problem.sampled.logprobs)
    _compare("target column", target, exact, tolerance, _ROUNDING * problem.coefficients.abs())

    rows = sampled_rows(problem)
    expected = (problem.exact_logits(rows) - problem.sampled.lse[rows, None]).exp_()
    expected *= -problem.coefficients[rows, None]
    actual = _rows_of(gradient, rows).double()
    for columns in (expected, actual):
        columns.scatter_(1, token_ids.reshape(-1)[rows, None], 0.0)
    _compare("tail", actual, expected, tolerance)


def _rows_of(gradient: Tensor, rows: Tensor) -> Tensor:
    """Without a copy of the others, which reshaping a strided view would make."""
    if gradient.ndim == 2:
        return gradient[rows]
    return gradient[rows // gradient.shape[1], rows % gradient.shape[1]]


def sampled_rows(problem: Problem) -> Tensor:
    """The first, middle and last row of every sequence: with and without a coefficient, masked ones included."""
    lengths = problem.sequence_of.bincount()
    ends = lengths.cumsum(0)
    return torch.cat([ends - lengths, ends - (lengths + 1) // 2, ends - 1])


def _compare(name: str, actual: Tensor, expected: Tensor, tolerance: float, rounding: Tensor | float = 0.0) -> None:
    error = (actual - expected).abs()
    good = error <= tolerance * expected.abs() + rounding  # False for NaN; where 0 is expected only 0 will do
    if not bool(good.all()):
        worst = (error / expected.abs()).nan_to_num(nan=torch.inf).masked_fill(good, 0.0).max()
        raise WrongAnswer(
            f"gradient, {name}: {int((~good).sum())} of {good.numel()} elements are off, by up to {float(worst):.2g} "
            f"of their size; {tolerance:.2g} is allowed"
        )
