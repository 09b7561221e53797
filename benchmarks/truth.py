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
    by_row = gradient.detach().reshape(problem.rows, -1)
    token_ids, tolerance = problem.token_ids.reshape(-1, 1), TOLERANCE[gradient.dtype]

    target = by_row.gather(1, token_ids)[:, 0].double()
    _compare("target column", target, -problem.coefficients * torch.expm1(problem.sampled.logprobs), tolerance)

    rows = sampled_rows(problem)
    expected = (problem.sampled.pristine[rows].double() - problem.sampled.lse[rows, None]).exp_()
    expected *= -problem.coefficients[rows, None]
    actual = by_row[rows].double()
    for columns in (expected, actual):
        columns.scatter_(1, token_ids[rows], 0.0)
    _compare("tail", actual, expected, tolerance)


def sampled_rows(problem: Problem) -> Tensor:
    """The first, middle and last row of every sequence: with and without a coefficient, masked ones included."""
    lengths = problem.sequence_of.bincount()
    ends = lengths.cumsum(0)
    return torch.cat([ends - lengths, ends - (lengths + 1) // 2, ends - 1])


def _compare(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual - expected).abs()
    good = error <= tolerance * expected.abs()  # False for NaN; where 0 is expected only 0 will do
    if not bool(good.all()):
        worst = (error / expected.abs()).nan_to_num(nan=torch.inf).masked_fill(good, 0.0).max()
        raise WrongAnswer(
            f"gradient, {name}: {int((~good).sum())} of {good.numel()} elements are off, by up to {float(worst):.2g} "
            f"of their size; {tolerance:.2g} is allowed"
        )
