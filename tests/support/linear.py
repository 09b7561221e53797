"""Losses from hidden states, made comparable.

Two ways. `Identity`: with D = V and the identity for a head, hidden states are logits, and whatever the oracle says of
a batch of logits holds for the loss from hidden states, to the same bounds. `Problem`: hidden states, head and bias of
any width, whose logits are multiplied in float64 and go through the reference path in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from batches import LENGTHS, LINEAR, PUBLIC, Batch, Outcome, arguments, flat, ragged_batch, to_padded
from checks import check_close
from modes import DEVICE, on_device
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels.base.torch_internals import mkl_gemm
from gspo_kernels.linear import chunked_loss, types
from gspo_kernels.linear.cpu_products import VARIABLE
from gspo_kernels.linear.head import Head
from gspo_kernels.linear.schedule import row_stride
from gspo_kernels.rows import cpu_rows


def chunk_of(rows: int | None, vocab: int, dtype: torch.dtype = torch.float32) -> int | None:
    """`chunk_bytes` for this many rows of logits."""
    return None if rows is None else rows * row_stride(vocab, DEVICE.type) * (8 if dtype == torch.float64 else 4)


def force_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These products, also on a processor without units for them: slow there, but right."""
    if DEVICE.type != "cpu":
        pytest.skip("a path of the CPU")
    if name == "mkl" and mkl_gemm() is None:
        pytest.skip("this torch has no MKL in it, or MKL has no bf16 product for this processor")
    if name == "native" and cpu_rows.unavailable_reason():
        pytest.skip(cpu_rows.unavailable_reason())
    monkeypatch.setenv(VARIABLE, name)


# --- an identity for a head -------------------------------------------------------------------------------------------


class Identity:
    """A loss from hidden states as a function of logits; `rows` a chunk. Keeps the head, for its gradients."""

    def __init__(self, objective: str, rows: int | None = None, frozen: bool = False) -> None:
        self.objective, self.rows, self.frozen = objective, rows, frozen

    def __call__(self, hidden: Tensor, *rest: Any, **keywords: Any) -> Any:
        vocab, dtype = hidden.shape[-1], hidden.dtype
        self.weight = torch.eye(vocab, dtype=dtype, device=hidden.device).requires_grad_(not self.frozen)
        self.bias = torch.zeros(vocab, dtype=dtype, device=hidden.device).requires_grad_(not self.frozen)
        chunk_bytes = chunk_of(self.rows, vocab, dtype)
        given = {**keywords, "bias": self.bias, "chunk_bytes": chunk_bytes}
        return LINEAR[self.objective](hidden, self.weight, *rest, **given)

    def check_gradients(self, outcome: Outcome, batch: Batch) -> None:
        """Those of the head, from those of the hidden states (which are the logits', and have been checked)."""
        if self.frozen:
            assert self.weight.grad is None and self.bias.grad is None
            return
        tol = TOLERANCES[batch.logits.dtype]
        hidden = torch.where(batch.mask[:, None], batch.logits.double(), 0.0)
        of_logits = outcome.gradient.double()
        relative, lost = tol.number + 2 * tol.store, 2 * tol.tiny
        for name, operand, other in (
            ("weight", self.weight, hidden),
            ("bias", self.bias, batch.mask.double()[:, None]),
        ):
            assert operand.grad is not None and operand.grad.dtype == operand.dtype
            gradient = operand.grad if name == "weight" else operand.grad[:, None]
            expected = of_logits.t() @ other
            bound = relative * (of_logits.abs().t() @ other.abs()) + tol.store * expected.abs()
            bound += lost * (1 + other.abs().sum(0))
            bound[expected.abs() + bound > torch.finfo(operand.dtype).max] = math.inf  # may overflow, in fp16
            check_close(f"gradient of {name}", gradient, expected, bound)


# --- any head ---------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    hidden: Tensor  # [N, D]; garbage where masked
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    batch: Batch  # of their logits in float64
    objective: str = "gspo"

    def logits(self) -> Tensor:
        return logits_of(self.hidden, self.weight, self.bias)


def unmasked(p: Problem) -> Problem:
    """The same sequences with nothing masked: new hidden states and tokens, slightly off-policy, advantage 1.5."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(p.hidden.shape, generator=generator).to(p.hidden.dtype)
    logits = logits_of(hidden, p.weight, p.bias)
    ids = torch.arange(len(hidden)) % len(p.weight)
    old = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0] + 1e-4
    lengths = p.batch.lengths
    batch = Batch(logits, ids, torch.ones(len(ids), dtype=torch.bool), lengths, torch.full((len(lengths),), 1.5))
    batch.old_logprobs = old.float()
    return Problem(hidden, p.weight, p.bias, batch)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = hidden.double() @ weight.double().t()
    return out if bias is None else out + bias.double()


def problem(
    objective: str = "gspo",
    *,
    seed: int = 0,
    width: int = 24,
    vocab: int = 61,
    bias: bool = False,
    lengths: Sequence[int] = LENGTHS,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.5,
    **build: Any,
) -> Problem:
    """Random, logits of standard deviation `spread`; operands have `dtype`, and what they multiply to counts."""
    generator = torch.Generator().manual_seed(1000 + seed)
    hidden = torch.randn(sum(lengths), width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * spread / math.sqrt(width)).to(dtype)
    of_vocab = torch.randn(vocab, generator=generator).to(dtype) if bias else None
    batch = ragged_batch(
        objective,
        seed=seed,
        lengths=lengths,
        dtype=torch.float64,
        logits=logits_of(hidden, weight, of_vocab),
        **build,
    )
    out = ~batch.mask
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -300.0]).to(dtype)
    hidden[out] = junk.repeat(width // 5 + 1)[:width]
    return Problem(hidden, weight, of_vocab, batch, objective)


@dataclass
class Gradients:
    """What came of a problem, on the CPU and flat."""

    loss: Tensor
    stats: Any
    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None
    logits: Tensor | None = None  # [N, V], where there were any


def from_hidden(
    p: Problem,
    layout: str,
    objective: str,
    *,
    rows: int | None = None,
    function: Callable[..., Any] | None = None,
    needs_grad: Sequence[str] = ("hidden", "weight", "bias"),
    upstream: float = 1.0,
    change: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Gradients:
    """The loss from hidden states and its backward. `change`: what is done to the laid-out hidden states first."""
    args = arguments(p.batch, layout)
    hidden = to_padded(p.hidden, p.batch.lengths, math.nan, p.batch.padding) if layout == "padded" else p.hidden
    leaf = on_device(hidden.clone())
    leaf = (leaf if change is None else change(leaf)).detach()
    weight, bias = on_device(p.weight).detach(), None if p.bias is None else on_device(p.bias).detach()
    for name, x in (("hidden", leaf), ("weight", weight), ("bias", bias)):
        if x is not None:
            x.requires_grad_(name in needs_grad)
    dtype = torch.promote_types(leaf.dtype, weight.dtype)
    if rows is not None:
        options["chunk_bytes"] = chunk_of(rows, options.get("vocab_size", weight.shape[0]), dtype)
    loss, stats = (function or LINEAR[objective])(leaf, weight, *args.rest, **args.keywords, bias=bias, **options)
    if loss.requires_grad:
        (loss * upstream).backward()
    found = (None if x is None or x.grad is None else x.grad.cpu() for x in (leaf, weight, bias))
    of_hidden, of_weight, of_bias = found
    if of_hidden is not None:
        of_hidden = flat(of_hidden, p.batch, layout)
    return Gradients(loss.detach().cpu(), stats, of_hidden, of_weight, of_bias)


def with_low_rank(function: Callable[..., Any], rank: int, frozen: Sequence[str] = ()) -> Callable[..., Any]:
    """A loss whose last `rank` columns of hidden states and of the head are passed as `low_rank`.

    The logits stay those of the whole problem, and so do the gradients, which autograd puts together again. `frozen`
    names parts that need no gradient: "hidden", "weight", "u", "B".
    """

    def parts(whole: Tensor, names: Sequence[str]) -> list[Tensor]:
        found = whole.split([whole.shape[-1] - rank, rank], -1)
        return [x.detach() if name in frozen else x for name, x in zip(names, found, strict=True)]

    def call(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
        (hidden, u), (weight, b) = parts(hidden, ("hidden", "u")), parts(weight, ("weight", "B"))
        return function(hidden, weight, *rest, low_rank=(u, b), **options)

    return call


def from_logits(
    p: Problem,
    layout: str,
    objective: str,
    *,
    function: Callable[..., Any] | None = None,
    upstream: float = 1.0,
    **options: Any,
) -> Gradients:
    """The same in float64, by way of the logits."""
    args = arguments(p.batch, layout)
    loss, stats = (function or PUBLIC[objective])(
        args.logits, *args.rest, **args.keywords, backend="reference", **options
    )
    (loss * upstream).backward()
    assert args.logits.grad is not None
    g = flat(args.logits.grad.cpu(), p.batch, layout)
    hidden = torch.where(p.batch.mask[:, None], p.hidden.double(), 0.0)
    return Gradients(loss.detach().cpu(), stats, g @ p.weight.double(), g.t() @ hidden, g.sum(0), g)


def magnified(p: Problem) -> Tensor:
    """[N], how many times the relative error of a ratio the gradient of its row may have: SAPO's gate closes fast."""
    factors = torch.ones(len(p.batch.mask), dtype=torch.float64)
    if not oracle.OBJECTIVES[p.objective].is_surrogate:
        expected = p.batch.expected(p.objective)
        for t, (size, slope) in enumerate(zip(expected.d_logprobs_size, expected.d_logprobs, strict=True)):
            factors[t] = max(1.0, size / abs(slope)) if slope else 1.0
    return factors


def check_same(
    found: Gradients, truth: Gradients, p: Problem, *, number: float = 3e-6, stats: bool = True, upstream: float = 1.0
) -> None:
    """`number`: of fp32 products and statistics, relative to the absolute parts of each sum."""
    loss = float(truth.loss)
    assert float(found.loss) == approximately(loss, number), f"loss {float(found.loss)!r}, expected {loss!r}"
    assert truth.logits is not None
    g, hidden = truth.logits.abs() * magnified(p)[:, None], torch.where(p.batch.mask[:, None], p.hidden.double(), 0.0)
    sizes = {"hidden": g @ p.weight.double().abs(), "weight": g.t() @ hidden.abs(), "bias": g.sum(0)}
    for name, size in sizes.items():
        gradient, expected = getattr(found, name), getattr(truth, name)
        if gradient is not None:
            tol = TOLERANCES[gradient.dtype]
            check_close(
                f"gradient of {name}", gradient, expected, number * size + tol.store * expected.abs() + tol.tiny
            )
    if found.hidden is not None:
        nothing = (truth.logits == 0).all(-1)
        assert bool((found.hidden[nothing] == 0).all()), "a row without a coefficient has a gradient"
    if stats:
        check_same_stats(found.stats, truth.stats, number)


def check_same_stats(found: Any, truth: Any, number: float = 3e-6) -> None:
    """Fractions and counts exactly; the rest as fp32 log-probabilities allow."""
    exact = ("clip_fraction", "saturated_fraction", "num_")
    for name, value in truth.as_dict().items():
        if name.startswith("head_"):
            continue
        actual, expected = float(found.as_dict()[name]), float(value)
        good = actual == expected if name.startswith(exact) else actual == approximately(expected, number)
        assert good, f"{name}: {actual!r}, expected {expected!r}"
    for name in ("logprobs", "log_ratio"):
        actual, expected = (getattr(x, name).detach().cpu() for x in (found, truth))
        check_close(name, actual, expected, number * (1 + expected.abs()))
    for name in ("clipped_low", "clipped_high"):
        assert torch.equal(getattr(found, name).cpu(), getattr(truth, name).cpu()), name


def approximately(value: float, number: float) -> Any:
    return pytest.approx(value, rel=number, abs=number)


def rows_of_work(stats: Any) -> tuple[int, int, int, int]:
    """forward, recomputed and backward rows, and chunks."""
    forward, again, backward, chunks = (int(x) for x in stats.head)
    return forward, again, backward, chunks


def without_synchronization(patch: pytest.MonkeyPatch) -> None:
    """As while a CUDA graph is captured: the host waits for nothing."""
    for module in (types, chunked_loss):
        patch.setattr(module, "can_synchronize", lambda device: False)


class Separate(Head):
    """A head that writes gradients beside the logits, as on a GPU, where many threads compute one row."""

    @property
    def _in_place(self) -> bool:
        return False

    @_in_place.setter
    def _in_place(self, value: bool) -> None:
        pass


# --- larger than the oracle's loops can be ----------------------------------------------------------------------------


@dataclass
class Random:
    """Packed sequences of one length, nothing masked, whose logits are truth in float64."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    token_ids: Tensor  # [N]
    advantages: Tensor  # [S]
    cu_seqlens: Tensor  # [S + 1]
    logprobs: Tensor  # [N] float64

    def old(self, log_ratio: Tensor | float) -> Tensor:
        return (self.logprobs - log_ratio).float()


def random_problem(
    sequences: int, length: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, targets: int | None = None
) -> Random:
    """Tokens are of the first `targets` of the vocabulary. On the device."""
    generator = torch.Generator().manual_seed(7)
    n = sequences * length
    hidden = torch.randn(n, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 2.5 / math.sqrt(width)).to(dtype)
    ids = torch.randint(targets or vocab, (n,), generator=generator)
    advantages = torch.randn(sequences, generator=generator)
    logprobs = logits_of(hidden, weight, None).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    ends = torch.arange(sequences + 1) * length
    return Random(*(on_device(x) for x in (hidden, weight, ids, advantages, ends, logprobs)))
