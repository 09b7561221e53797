"""What a contestant must return: gradients in float64, each part compared relative to its own size.

At V = 151,936 one tolerance for a whole gradient is blind: one without its softmax term passes. So from logits the
target column (of every row) and the tail (of a sample of rows) are compared apart. From hidden states rows of both
gradients are compared, those of sampled tokens and of others, whose gradient is softmax alone. A row
may be off by rounding, which has no direction; the mean length of all rows has a finer bound, which a wrong count
exceeds. Rows without a coefficient must be exactly zero.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Problem
from .sampled import BLOCK


class WrongAnswer(Exception):
    """A contestant's loss or gradient is not what float64 says."""


# ---- exact gradients


def exact_of_logits(problem: Problem, rows: Tensor) -> Tensor:
    """[rows] -> [rows, vocab]: dL/dl ([y = v] - p_v)"""
    p = (problem.exact_logits(rows) - problem.sampled.lse[rows, None]).exp_()
    if problem.sampled.kept is not None:
        kept = problem.sampled.kept[rows]
        p = torch.zeros_like(p).scatter_(1, kept, p.gather(1, kept))
    target = problem.sampled.token_ids[rows, None]
    of_target = -torch.expm1(problem.sampled.logprobs[rows, None])  # 1 - p without cancellation
    coefficients = problem.coefficients[rows, None]
    found = p.neg_().scatter_(1, target, of_target).mul_(coefficients)
    return found.masked_fill_(coefficients == 0, 0.0)  # whatever a masked row has in it


def exact_of_hidden(problem: Problem, rows: Tensor) -> Tensor:
    """[rows] -> [rows, width]: dL/dl (w_y - sum_v p_v w_v)"""
    (all_hidden, weight), sampled = problem.sampled.pristine, problem.sampled
    hidden, lse = all_hidden[rows].double(), sampled.lse[rows, None]
    found = weight[sampled.token_ids[rows]].double()
    for block in weight.split(BLOCK):
        exact = block.double()
        found -= (hidden @ exact.T - lse).exp_() @ exact
    coefficients = problem.coefficients[rows, None]
    return torch.where(coefficients == 0, 0.0, coefficients * found)


def exact_of_weight(problem: Problem, tokens: Tensor) -> Tensor:
    """[tokens] -> [tokens, width]: sum_t dL/dl_t ([y_t = v] - p_tv) h_t"""
    active = problem.coefficients != 0
    (hidden, weight), sampled = problem.sampled.pristine, problem.sampled
    hidden, lse, ids = hidden[active].double(), sampled.lse[active, None], sampled.token_ids[active, None]
    found = []
    for block in tokens.split(BLOCK):
        p = (hidden @ weight[block].double().T - lse).exp_()
        found.append((problem.coefficients[active, None] * ((ids == block).double() - p)).T @ hidden)
    return torch.cat(found)


@functools.lru_cache(maxsize=1)
def exact_gradients(problem: Problem) -> tuple[Tensor, ...]:
    """Whole ones, [rows, vocab] or [rows, width] and [vocab, width]."""
    rows = torch.arange(problem.rows, device=problem.token_ids.device)
    if problem.case.from_logits:
        return (exact_of_logits(problem, rows),)
    tokens = torch.arange(problem.case.vocab, device=rows.device)
    return exact_of_hidden(problem, rows), exact_of_weight(problem, tokens)


# ---- right or wrong

LOSS_TOLERANCE = 1e-5  # relative to the mean size of an advantage
# Relative, by element; fp32 leaves room for torch's own log_softmax, bf16 is one unit in the last stored digit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-8}
_ROUNDING = 2e-5  # what fp32 may lose of 1 - p at the target: torch's own sum over 32,000 columns was off by 1.1e-5


@dataclass(frozen=True)
class LinearTolerance:
    """Relative, by row. In fp32 it leaves room for torch's own log_softmax, whose sum over 150,000 columns may be off
    by 7e-4: ten times that, where the probability of the token is 0.9 and its gradient is that of the other tenth.

    In bf16 it is what rounded logits cost: up to 1/32 for one between 8 and 16, which is a share of its probability.
    """

    loss: float  # to the mean size of an advantage
    logprobs: float  # to 1 - logprob
    row: float
    length: float


LINEAR_TOLERANCE = {
    torch.float32: LinearTolerance(loss=1e-5, logprobs=2e-4, row=2e-2, length=1e-3),
    torch.bfloat16: LinearTolerance(loss=4e-3, logprobs=2.0**-6, row=2.0**-3, length=2.0**-7),
}
HIDDEN_ROWS, HIDDEN_SEQUENCES, WEIGHT_ROWS = 64, 16, 32  # that are compared


def check(problem: Problem, value: Tensor, gradients: tuple[Tensor, ...] = ()) -> None:
    """Raises WrongAnswer."""
    work, dtype = problem.case.work, problem.leaves[0].dtype
    if not problem.case.from_logits and not work.gradient:
        exact = problem.sampled.logprobs.view(problem.token_ids.shape)
        error = (value.double() - exact).abs() / (1.0 - exact)
        _judge("log-probabilities", error.reshape(-1), LINEAR_TOLERANCE[dtype].logprobs)
        return
    tolerance = LOSS_TOLERANCE if problem.case.from_logits else LINEAR_TOLERANCE[dtype].loss
    if not abs(float(value) - problem.loss) <= tolerance * float(problem.advantages.abs().mean()):
        raise WrongAnswer(f"loss: expected {problem.loss!r}, got {float(value)!r}")
    leaves = [x for x in problem.leaves if x.requires_grad]
    if work.gradient:
        shapes = [(list(x.shape), x.dtype) for x in leaves]
        if [(list(x.shape), x.dtype) for x in gradients] != shapes:
            raise WrongAnswer(f"gradients: expected {shapes}, got {[(list(x.shape), x.dtype) for x in gradients]}")
        (_check_logits if problem.case.from_logits else _check_linear)(problem, *(x.detach() for x in gradients))


def _check_logits(problem: Problem, gradient: Tensor) -> None:
    tolerance, token_ids = TOLERANCE[gradient.dtype], problem.token_ids
    target = gradient.gather(-1, token_ids.unsqueeze(-1)).reshape(-1).double()
    exact = -problem.coefficients * torch.expm1(problem.sampled.logprobs)
    _compare_elements("target column", target, exact, tolerance, _ROUNDING * problem.coefficients.abs())

    lengths = problem.sequence_of.bincount()
    ends = lengths.cumsum(0)
    rows = torch.cat([ends - lengths, ends - (lengths + 1) // 2, ends - 1])  # first, middle and last of every sequence
    if gradient.ndim == 2:
        actual = gradient[rows].double()
    else:  # without a copy of the others, which reshaping a strided view would make
        actual = gradient[rows // gradient.shape[1], rows % gradient.shape[1]].double()
    expected = exact_of_logits(problem, rows)
    for columns in (expected, actual):
        columns.scatter_(1, token_ids.reshape(-1)[rows, None], 0.0)
    _compare_elements("tail", actual, expected, tolerance)


def _check_linear(problem: Problem, of_hidden: Tensor, of_weight: Tensor | None = None) -> None:
    tolerance = LINEAR_TOLERANCE[of_hidden.dtype]
    of_hidden = of_hidden.reshape(-1, problem.case.width)
    if bool(of_hidden[problem.coefficients == 0].count_nonzero()):
        raise WrongAnswer("gradient of hidden: rows without a coefficient are not zero")
    rows, tokens, exact_hidden, exact_weight = _exact_sample(problem)
    _compare_rows("hidden", of_hidden[rows].double(), exact_hidden, tolerance)
    if of_weight is None:
        return
    missing = int((~of_weight.any(1)).sum())  # softmax leaves none without a gradient
    if missing:
        raise WrongAnswer(f"gradient of weight: {missing} rows are zero")
    _compare_rows("weight", of_weight[tokens].double(), exact_weight, tolerance)


@functools.lru_cache(maxsize=1)
def _exact_sample(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and tokens that are compared, and their gradients: the same for all contestants of a case.

    Rows from the first of a sequence to its last; tokens that were sampled, and others, the first and last among them.
    """
    (sequences, length), ids, vocab = problem.token_ids.shape, problem.sampled.token_ids, problem.case.vocab
    begins = torch.arange(0, sequences, max(1, sequences // HIDDEN_SEQUENCES), device=ids.device) * length
    inside = torch.linspace(0, length - 1, min(length, HIDDEN_ROWS // len(begins)), device=ids.device).long()
    rows = (begins[:, None] + inside).flatten()
    others = torch.arange(0, vocab, max(1, vocab // WEIGHT_ROWS), device=ids.device)
    tokens = torch.cat([ids[:: max(1, len(ids) // WEIGHT_ROWS)], others, others.new_tensor([vocab - 1])]).unique()
    return rows, tokens, exact_of_hidden(problem, rows), exact_of_weight(problem, tokens)


def _compare_elements(
    name: str, actual: Tensor, expected: Tensor, tolerance: float, rounding: Tensor | float = 0.0
) -> None:
    error = (actual - expected).abs()
    good = error <= tolerance * expected.abs() + rounding  # False for NaN; where 0 is expected only 0 will do
    if not bool(good.all()):
        worst = (error / expected.abs()).nan_to_num(nan=torch.inf).masked_fill(good, 0.0).max()
        raise WrongAnswer(
            f"gradient, {name}: {int((~good).sum())} of {good.numel()} elements are off, by up to {float(worst):.2g} "
            f"of their size; {tolerance:.2g} is allowed"
        )


def _compare_rows(name: str, actual: Tensor, expected: Tensor, tolerance: LinearTolerance) -> None:
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    error[(expected == 0).all(1) & (actual == 0).all(1)] = 0.0
    _judge(f"gradient of {name}, a row", error, tolerance.row)
    along, squares = (actual * expected).sum(1), expected.square().sum(1)
    length = (along[squares > 0] / squares[squares > 0] - 1.0).mean().abs()
    _judge(f"gradient of {name}, its length", length[None], tolerance.length)


def _judge(name: str, error: Tensor, tolerance: float) -> None:
    wrong = ~(error <= tolerance)  # NaN is wrong
    if bool(wrong.any()):
        worst = float(error.nan_to_num(nan=torch.inf).max())
        count = f"{int(wrong.sum())} of {len(error)}"
        raise WrongAnswer(f"{name}: {count} off by up to {worst:.2g} of its size; {tolerance:.2g} is allowed")


# ---- how far


@dataclass(frozen=True)
class Distance:
    loss: float  # relative to the mean size of an advantage
    gradient: dict[str, float]  # |g - exact| / |exact|, by part


def distance(problem: Problem, value: Tensor, gradients: tuple[Tensor, ...], factor: float = 1.0) -> Distance:
    """From `factor` times the truth, over whole gradients."""
    pairs = [
        (actual.detach().double().reshape(exact.shape) - factor * exact, factor * exact)
        for actual, exact in zip(gradients, exact_gradients(problem), strict=True)
    ]
    if problem.case.from_logits:
        ((error, exact),), ids = pairs, problem.sampled.token_ids[:, None]
        target = error.gather(1, ids), exact.gather(1, ids)
        others = error.scatter_(1, ids, 0.0), exact.scatter(1, ids, 0.0)
        parts = {"sampled tokens": target, "all others": others}
    else:
        parts = dict(zip(("hidden", "weight"), pairs, strict=True))
    off = abs(float(value) - factor * problem.loss) / float(problem.advantages.abs().mean())
    return Distance(off, {name: _relative(float(error.norm()), float(x.norm())) for name, (error, x) in parts.items()})


def _relative(error: float, size: float) -> float:
    return error / size if size else (math.inf if error else 0.0)
