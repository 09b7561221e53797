"""Every backend that runs here against float64: log-probabilities, losses and gradients of logits and hidden states.

An error is relative to the number's own size. A gradient's row is compared in two parts: in its token's column, and in
every other column by itself. With 150,000 columns a mistake in the second part is invisible beside the first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear.from_hidden import linear_gspo_loss
from ..losses.from_logits import grpo_loss, gspo_loss, token_logprobs
from ..rows import cuda_rows, triton_rows
from . import oracle
from .findings import Check, Measure
from .oracle import Batch, Expected, Sizes
from .services import DTYPES, able

ISSUES = "https://github.com/gspo-kernels/gspo-kernels/issues/new?template=bug_report.yml"
SIZES = {"cpu": Sizes(vocab=4_099), "cuda": Sizes(vocab=40_009)}  # several blocks of every kernel
INTERPRETED_SIZES = Sizes(vocab=523, tokens=3, width=16, head_vocab=131)

# What float32 arithmetic may do: to a statistic; to a loss, whose ratio is the exponential of a difference of
# log-probabilities; to a gradient, each of whose columns is an exponential. And to sums over products of hidden states.
STATISTIC, LOSS, GRADIENT, FROM_HIDDEN = 1e-6, 5e-6, 1e-5, 2e-5
# Half a unit in the last place of a stored gradient, and what is flushed to zero.
STORED = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
FLUSHED = {"fp32": 2.0**-126, "bf16": 2.0**-126, "fp16": 2.0**-24}
NORMAL = {"fp32": 2.0**-126, "bf16": 2.0**-126, "fp16": 2.0**-14}
# Losses are multiplied by it before the backward, as a loss scaler does: gradients of fp16 would be too small to see.
LOSS_SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 4096.0}
ENTROPY_COEF = 0.01
GARBAGE_ID = -100  # of masked rows; their logits, hidden states and old log-probabilities are NaN


# The names of measures, and the shorter ones of a table's columns.
SHOWN = {
    "log-probability": "log p",
    "entropy": "entropy",
    "loss": "loss",
    "gradient of token": "token",
    "gradient of others": "others",
    "gradient of hidden": "hidden",
    "gradient of head": "head",
}


def checks_on(device: torch.device) -> Iterator[tuple[str, str]]:
    """(backend, dtype) of what can be checked there. Raises what torch raises where the device does not work."""
    for dtype in DTYPES:
        yield from ((backend.name, dtype) for backend in able(device, dtype))


def check(device: torch.device, backend: str, dtype: str) -> Check:
    """Never raises: an exception is a failed check."""
    interpreted = device.type == "cpu" and backend in (triton_rows.name, cuda_rows.name)
    sizes = INTERPRETED_SIZES if interpreted else SIZES.get(device.type, SIZES["cpu"])
    measures: list[Measure] = []
    raised = ""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work would wait for threads
    try:
        for group in (_from_logits, _from_hidden):
            measures += group(device, backend, dtype, sizes)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
    worst = tuple(_worst(measures))
    return Check(str(device), backend, dtype, not raised and all(m.passed for m in worst), worst, raised, "")


def unusable(device: torch.device, error: Exception) -> Check:
    """Of a device on which torch itself fails."""
    return Check(str(device), "torch", "fp32", False, (), f"{type(error).__name__}: {error}", "")


def with_advice(checks: Sequence[Check]) -> tuple[Check, ...]:
    """What to do about each failure: the name of a backend that is right, and where to report it."""
    right = {(each.device, each.dtype): each.backend for each in checks if each.passed}
    return tuple(each if each.passed else dataclasses.replace(each, advice=_advice(each, right)) for each in checks)


def _advice(failed: Check, right: dict[tuple[str, str], str]) -> str:
    if "GSPO_KERNELS_" in failed.raised:
        return "correct or unset the variable that the error names"
    if failed.backend == "torch":
        return f"torch cannot use {failed.device}: repair its driver or its torch first"
    other = right.get((failed.device, failed.dtype))
    instead = f"pass backend={other!r}, which is right here, and " if other else ""
    return f"{instead}report this with the output of python -m gspo_kernels --json: {ISSUES}"


# ---- from logits


def _from_logits(device: torch.device, backend: str, dtype: str, sizes: Sizes) -> Iterator[Measure]:
    logits, cases = _cases(dtype, sizes)
    yield from _statistics(device, backend, logits, cases[0])
    for case in cases:
        given = _garbled(logits, case.batch.mask).to(device).requires_grad_()
        loss, _ = (grpo_loss if case.loss == "grpo" else gspo_loss)(
            given, *_arguments(case.batch, device), **_options(case, device, backend)
        )
        (gradient,) = torch.autograd.grad(loss * LOSS_SCALE[dtype], given)
        size = torch.tensor(case.expected.loss_size)
        yield _measure(case.name, "loss", loss, case.expected.loss, size, LOSS)
        yield from _gradient(case, gradient, dtype)


class _Case(NamedTuple):
    name: str
    loss: oracle.Loss
    batch: Batch
    entropy_coef: float
    expected: Expected


@functools.cache
def _cases(dtype: str, sizes: Sizes) -> tuple[Tensor, list[_Case]]:
    """Logits on the CPU, and losses of them: with two reads of the logits, in one, and with a ratio per token."""
    on_policy = oracle.inputs(sizes, sizes.vocab)
    logits = oracle.peaked_logits(sizes, on_policy).to(DTYPES[dtype])
    off_policy = oracle.off_policy(on_policy, logits)
    given: list[tuple[str, oracle.Loss, Batch, float]] = [
        ("GSPO", "gspo", off_policy, ENTROPY_COEF),
        ("GSPO on-policy", "gspo", on_policy, 0.0),
        ("GRPO", "grpo", off_policy, 0.0),
    ]
    return logits, [_Case(*each, oracle.loss_of(logits.double(), each[2], each[1], each[3])) for each in given]


@functools.cache
def _hidden_case(dtype: str, sizes: Sizes) -> tuple[Tensor, Tensor, _Case]:
    """Hidden states, a head, and a loss of them."""
    hidden, head = (x.to(DTYPES[dtype]) for x in oracle.hidden_and_head(sizes))
    exact = hidden.double() @ head.double().t()
    batch = oracle.off_policy(oracle.inputs(sizes, sizes.head_vocab), exact)
    return hidden, head, _Case("GSPO from hidden states", "gspo", batch, 0.0, oracle.loss_of(exact, batch, "gspo"))


def _statistics(device: torch.device, backend: str, logits: Tensor, case: _Case) -> Iterator[Measure]:
    batch, expected = case.batch, case.expected
    token_ids = batch.token_ids.masked_fill(~batch.mask, GARBAGE_ID).to(device)
    with torch.no_grad():
        given = _garbled(logits, batch.mask).to(device)
        found = token_logprobs(given, token_ids, mask=batch.mask.to(device), backend=backend)
    size = expected.logprobs.abs() + FLUSHED["fp32"]
    yield _measure("", "log-probability", found.logprobs, expected.logprobs, size, STATISTIC, select=batch.mask)
    size = 1.0 + expected.entropy
    yield _measure("", "entropy", found.entropy, expected.entropy, size, STATISTIC, select=batch.mask)
    yield _zeros("log-probability", found.logprobs, ~batch.mask)


def _gradient(case: _Case, gradient: Tensor, dtype: str) -> Iterator[Measure]:
    name, scale = case.name, LOSS_SCALE[dtype]
    wanted, size = case.expected.gradient * scale, case.expected.gradient_size * scale
    active = (size > 0).any(-1, keepdim=True)
    own = torch.zeros_like(wanted, dtype=torch.bool).scatter_(-1, case.batch.token_ids[..., None], True)
    allowed, flushed = GRADIENT + STORED[dtype], FLUSHED[dtype]
    yield _measure(name, "gradient of token", gradient, wanted, size, allowed, select=own & active, tiny=flushed)
    yield _measure(name, "gradient of others", gradient, wanted, size, allowed, select=~own & active, tiny=flushed)
    # Rounding has no preference: the mean error of thousands of columns is far below the largest.
    large = (~own & active & (wanted.abs() > NORMAL[dtype])).nonzero(as_tuple=True)
    signed = ((gradient.detach().cpu().double() - wanted) * wanted.sign() / size)[large].mean()
    zero = torch.zeros_like(signed)
    yield _measure(name, "mean error of others", signed, zero, zero + 1.0, GRADIENT + STORED[dtype] / 20)
    yield _zeros(f"{name} gradient", gradient, (~active).expand_as(gradient))


# ---- from hidden states


def _from_hidden(device: torch.device, backend: str, dtype: str, sizes: Sizes) -> Iterator[Measure]:
    hidden, head, case = _hidden_case(dtype, sizes)
    what, batch, expected = case.name, case.batch, case.expected
    given = [x.to(device).requires_grad_() for x in (_garbled(hidden, batch.mask), head.clone())]
    arguments, options = _arguments(batch, device), _options(case, device, backend)
    loss, _ = linear_gspo_loss(given[0], given[1], *arguments, **options)
    found = torch.autograd.grad(loss, given)
    by_logits = expected.gradient.flatten(0, 1)
    rows, weight = hidden.double().flatten(0, 1), head.double()
    wanted = (by_logits @ weight).view_as(hidden), by_logits.t() @ rows
    size = (by_logits.abs() @ weight.abs()).view_as(hidden), by_logits.abs().t() @ rows.abs()
    allowed = FROM_HIDDEN + 2 * STORED[dtype]  # the gradient of the logits may be rounded, too
    yield _measure(what, "loss from hidden", loss, expected.loss, torch.tensor(expected.loss_size), FROM_HIDDEN)
    for k, name in enumerate(("gradient of hidden", "gradient of head")):
        active, tiny = size[k] > 0, FLUSHED[dtype] * len(rows)
        yield _measure(what, name, found[k], wanted[k], size[k], allowed, select=active, tiny=tiny)
        yield _zeros(f"{what} {name}", found[k], ~active)


# ---- inputs and comparisons


def _garbled(values: Tensor, mask: Tensor) -> Tensor:
    """With garbage in masked rows, which nothing may read."""
    return values.masked_fill(~mask[..., None], torch.nan)


def _arguments(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    old = batch.old_logprobs
    old = None if old is None else old.masked_fill(~batch.mask, torch.nan).to(device)
    return batch.token_ids.masked_fill(~batch.mask, GARBAGE_ID).to(device), batch.advantages.to(device), old


def _options(case: _Case, device: torch.device, backend: str) -> dict[str, Any]:
    low, high = oracle.CLIP_RANGES[case.loss]
    mask = case.batch.mask.to(device)
    return {"mask": mask, "eps_low": low, "eps_high": high, "entropy_coef": case.entropy_coef, "backend": backend}


def _measure(
    what: str,
    name: str,
    actual: Tensor,
    expected: Tensor,
    size: Tensor,
    allowed: float,
    *,
    select: Tensor | None = None,
    tiny: float = 0.0,
) -> Measure:
    """The largest error of the selected numbers, relative to their sizes, beyond `tiny`."""
    actual = actual.detach().cpu().double()
    expected = expected.expand_as(actual)
    select = torch.ones_like(actual, dtype=torch.bool) if select is None else select.expand_as(actual)
    error = ((actual - expected).abs() - tiny).clamp(min=0.0) / size
    error = torch.where(select, error.nan_to_num(nan=torch.inf), 0.0)
    worst = tuple(int(k) for k in torch.unravel_index(error.argmax(), error.shape))
    largest = float(error[worst])
    finite = largest if largest < torch.inf else None
    found = Measure(name, finite, allowed, "")
    if found.passed:
        return found
    place = f" at {list(worst)}" if worst else ""
    detail = f"got {float(actual[worst]):.9g}, expected {float(expected[worst]):.9g}"
    return dataclasses.replace(found, detail=f"{what} {name}{place}: {detail}".strip())


def _zeros(what: str, values: Tensor, select: Tensor) -> Measure:
    """Rows that are masked, clipped or of no advantage are exactly zero."""
    values = torch.where(select.to(values.device), values.detach(), 0.0)
    return _measure(what, "zero rows", values, torch.zeros(()).double(), torch.ones(()).double(), 0.0)


def _worst(measures: Sequence[Measure]) -> Iterator[Measure]:
    """Of each name the measure that is closest to what is allowed, or furthest beyond it."""
    for name in dict.fromkeys(each.name for each in measures):
        yield max((each for each in measures if each.name == name), key=_excess)


def _excess(measure: Measure) -> float:
    if measure.error is None:
        return torch.inf
    return measure.error / measure.allowed if measure.allowed else torch.inf * measure.error if measure.error else 0.0
