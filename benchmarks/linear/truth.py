"""What a contestant must return before it is timed: a float64 answer, each part of it relative to its own size.

Gradients are compared a row at a time: rows of the hidden states' (some with a coefficient, some without) and of the
weight's, sampled tokens and others, whose gradient is softmax alone. A row may be off by rounding, and rounding has no
direction: by how much all rows together are too long or short is held to a finer measure, which a wrong count misses.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..truth import WrongAnswer
from .cases import Problem
from .contestants import Answer

ROWS, SEQUENCES = 64, 16  # rows of hidden states that are compared, and from how many sequences
TOKENS, OTHERS = 32, 32  # rows of the weight
_BLOCK = 8_192


@dataclass(frozen=True)
class Tolerance:
    """Relative. In fp32 it leaves room for torch's own log_softmax, whose sum over 150,000 columns may be off by 7e-4:
    ten times that, where the probability of the token is 0.9 and its gradient is that of the other tenth.

    In bf16 it is what rounded logits cost: up to 1/32 for one between 8 and 16, which is a share of its probability.
    """

    loss: float  # to the mean size of an advantage
    logprobs: float  # to 1 - logprob
    row: float
    length: float


TOLERANCES = {
    torch.float32: Tolerance(loss=1e-5, logprobs=2e-4, row=2e-2, length=1e-3),
    torch.bfloat16: Tolerance(loss=4e-3, logprobs=2.0**-6, row=2.0**-3, length=2.0**-7),
}


def check(problem: Problem, answer: Answer) -> None:
    """Raises WrongAnswer."""
    work, tolerance = problem.case.work, TOLERANCES[problem.hidden.dtype]
    if not work.gradient:
        exact = problem.inputs.logprobs.view(problem.token_ids.shape)
        error = (answer.value.double() - exact).abs() / (1.0 - exact)
        _judge("log-probabilities", error.reshape(-1), tolerance.logprobs)
        return
    scale = float(problem.advantages.abs().mean())
    if not abs(float(answer.value) - problem.loss) <= tolerance.loss * scale:
        raise WrongAnswer(f"loss: expected {problem.loss!r}, got {float(answer.value)!r}")

    of_hidden = _complete("hidden", answer.hidden, problem.hidden).reshape(-1, problem.case.width)
    if bool(of_hidden[problem.coefficients == 0].count_nonzero()):
        raise WrongAnswer("gradient of hidden: rows without a coefficient are not zero")
    rows, tokens, exact_hidden, exact_weight = _exact(problem)
    _compare("hidden", of_hidden[rows].double(), exact_hidden, tolerance)
    if work.frozen_head:
        if answer.weight is not None:
            raise WrongAnswer("gradient of weight: expected none, the head is frozen")
        return
    of_weight = _complete("weight", answer.weight, problem.weight)
    missing = int((~of_weight.any(1)).sum())  # softmax leaves none without a gradient
    if missing:
        raise WrongAnswer(f"gradient of weight: {missing} rows are zero")
    _compare("weight", of_weight[tokens].double(), exact_weight, tolerance)


@functools.lru_cache(maxsize=1)
def _exact(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and tokens that are compared, and their gradients: the same for all contestants of a case."""
    rows, tokens = sampled_rows(problem), sampled_tokens(problem)
    return rows, tokens, exact_of_hidden(problem, rows), exact_of_weight(problem, tokens)


def sampled_rows(problem: Problem) -> Tensor:
    """Of some sequences, from the first of each to its last."""
    sequences, length = problem.token_ids.shape
    begins = torch.arange(0, sequences, max(1, sequences // SEQUENCES)) * length
    places = torch.linspace(0, length - 1, min(length, ROWS // len(begins))).long()
    return (begins[:, None] + places).flatten().to(problem.hidden.device)


def sampled_tokens(problem: Problem) -> Tensor:
    """Tokens that were sampled, some without a coefficient among them, and others; the first and the last."""
    ids, vocab = problem.inputs.token_ids, problem.case.vocab
    some = ids[:: max(1, len(ids) // TOKENS)]
    others = torch.arange(0, vocab, max(1, vocab // OTHERS), device=ids.device)
    return torch.cat([some, others, others.new_tensor([vocab - 1])]).unique()


def exact_of_hidden(problem: Problem, rows: Tensor) -> Tensor:
    """[rows] -> [rows, width]: dL/dl (w_y - sum_v p_v w_v)"""
    inputs = problem.inputs
    hidden, lse = inputs.hidden[rows].double(), inputs.lse[rows, None]
    found = inputs.weight[inputs.token_ids[rows]].double()
    for block in inputs.weight.split(_BLOCK):
        exact = block.double()
        found -= (hidden @ exact.T - lse).exp_() @ exact
    return problem.coefficients[rows, None] * found


def exact_of_weight(problem: Problem, tokens: Tensor) -> Tensor:
    """[tokens] -> [tokens, width]: sum_t dL/dl_t ([y_t = v] - p_tv) h_t"""
    inputs = problem.inputs
    hidden = inputs.hidden.double()
    p = (hidden @ inputs.weight[tokens].double().T - inputs.lse[:, None]).exp_()
    is_token = inputs.token_ids[:, None] == tokens
    return (problem.coefficients[:, None] * (is_token.double() - p)).T @ hidden


def _complete(name: str, gradient: Tensor | None, operand: Tensor) -> Tensor:
    if gradient is None or gradient.shape != operand.shape or gradient.dtype != operand.dtype:
        raise WrongAnswer(f"gradient of {name}: expected {list(operand.shape)} in {operand.dtype}")
    return gradient


def _compare(name: str, actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    error[(expected == 0).all(1) & (actual == 0).all(1)] = 0.0
    _judge(f"gradient of {name}, a row", error, tolerance.row)
    _judge(f"gradient of {name}, its length", length_error(actual, expected)[None], tolerance.length)


def length_error(actual: Tensor, expected: Tensor) -> Tensor:
    """By what share the rows, each as weighty as another, are too long along the right ones."""
    along, squares = (actual * expected).sum(1), expected.square().sum(1)
    weighty = squares > 0
    return (along[weighty] / squares[weighty] - 1.0).mean().abs()


def _judge(name: str, error: Tensor, tolerance: float) -> None:
    wrong = ~(error <= tolerance)  # NaN is wrong
    if bool(wrong.any()):
        worst = float(error.nan_to_num(nan=torch.inf).max())
        count = f"{int(wrong.sum())} of {len(error)}"
        raise WrongAnswer(f"{name}: {count} off by up to {worst:.2g} of its size; {tolerance:.2g} is allowed")
