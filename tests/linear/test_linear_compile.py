"""torch.compile of a loss from hidden states: one graph, the same numbers, no recompilation for new lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from batches import LAYOUTS, LINEAR, OBJECTIVES, SHORT, arguments, to_padded
from checks import check_close
from linear import chunk_of, problem
from modes import NOT_INTERPRETED, on_device, sized
from test_autograd import Reinforce
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gspo_kernels import Objective, Terms, TokenBatch, linear_logits, linear_policy_loss, linear_token_logprobs

pytestmark = pytest.mark.plain_memory  # deterministic fills slow compilers down


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(function: Callable[..., Any], layout: str, seed: int, objective: str, **options: Any) -> tuple[Any, ...]:
    """loss, stats, gradients of hidden states and head."""
    build = options.pop("build", {})
    lengths = options.pop("lengths", SHORT)
    p = problem(objective, seed=seed, lengths=lengths, **build)
    args = arguments(p.batch, layout)
    laid_out = to_padded(p.hidden, p.batch.lengths, float("nan"), p.batch.padding) if layout == "padded" else p.hidden
    hidden, weight = on_device(laid_out).requires_grad_(), on_device(p.weight).requires_grad_()
    loss, stats = function(hidden, weight, *args.rest, **args.keywords, chunk_bytes=chunk_of(3, 61), **options)
    return loss.detach(), stats, *torch.autograd.grad(loss * 1.5, [hidden, weight])


def check_both(compiled: Callable[..., Any], eager: Callable[..., Any], *given: Any, **options: Any) -> None:
    """Rows to the bit, where chunks are the same; sums may be taken in another order."""
    own = isinstance(eager, partial)
    found, expected = run(compiled, *given, **dict(options)), run(eager, *given, **dict(options))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6, abs=1e-7)
    logprobs = expected[1].logprobs
    check_close("logprobs", found[1].logprobs, logprobs, (1e-6 if own else 0.0) * logprobs.abs())
    for x, y in zip(found[2:], expected[2:], strict=True):
        check_close("gradient", x, y, torch.full_like(y, 2e-6 * float(y.abs().max())))
    names = [name for name in expected[1].as_dict() if not name.startswith("head_") or found[1].head is not None]
    for name in names:
        value = float(expected[1].as_dict()[name])
        assert float(found[1].as_dict()[name]) == pytest.approx(value, rel=1e-5, abs=1e-7), name


CASES: dict[str, dict[str, Any]] = {
    "off-policy": {},
    "on-policy": {"build": {"on_policy": True}},
    "all": {
        "build": {"ref": True, "temperature": "token", "softcap": 6.0},
        "beta": 0.1,
        "entropy_coef": 0.01,
        "dual_clip": 3.0,
    },
}


@pytest.mark.parametrize(
    ("objective", "layout", "case"),
    [
        ("gspo", "padded", "off-policy"),
        ("gspo", "packed", "on-policy"),
        *[(objective, "packed", "all") for objective in sized(OBJECTIVES, ["gspo"])],
    ],
)
def test_one_graph_with_the_same_numbers(objective: str, layout: str, case: str) -> None:
    compiled = torch.compile(LINEAR[objective], fullgraph=True, backend="aot_eager")
    check_both(compiled, LINEAR[objective], layout, 30, objective, **CASES[case])


@NOT_INTERPRETED
def test_inductor() -> None:
    compiled = torch.compile(LINEAR["gspo"], fullgraph=True)
    check_both(compiled, LINEAR["gspo"], "packed", 31, "gspo", **CASES["all"])


@dataclass(frozen=True)
class Scaled(Objective):
    """A frozen dataclass of floats at the top of a module: the operator rebuilds it from its name and parameters."""

    scale: float

    depends_on: ClassVar[str] = "token"

    def terms(self, tokens: TokenBatch) -> Terms:
        ratio = tokens.log_ratio.clamp(max=tokens.max_log_ratio).exp()
        return Terms(loss=-ratio * tokens.advantages * self.scale, log_ratio=tokens.log_ratio)


@NOT_INTERPRETED
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", [Scaled(0.5), Reinforce()], ids=["rebuilt", "carried"])
def test_an_objective_of_ones_own(objective: Objective, layout: str) -> None:
    """Rebuilt from floats it goes through the loss's operator. Otherwise an operator cannot take it: log-probabilities
    are the operator's, and the loss is torch's."""
    function = partial(linear_policy_loss, objective=objective)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    check_both(compiled, function, layout, 32, "grpo")
    _, stats, *_ = run(compiled, layout, 32, "grpo")
    assert (stats.head is None) == (objective.packed_parameters() is None)


@NOT_INTERPRETED
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compilations_do_not_grow_with_lengths(layout: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LINEAR["gspo"], fullgraph=True, backend=counter)
    for k in range(5):
        lengths = [3 + k, 2, 5, 4 + k % 3]
        check_both(compiled, LINEAR["gspo"], layout, k, "gspo", lengths=lengths)
    assert counter.frame_count <= 2, "once as it came, once with a symbolic length"


@NOT_INTERPRETED
def test_compilations_do_not_grow_with_annealed_numbers() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LINEAR["gspo"], fullgraph=True, backend=counter)
    for k in range(5):
        numbers = {"eps_high": 1e-4 * (k + 1), "normalizer": 0.5 + k / 2}
        check_both(compiled, LINEAR["gspo"], "packed", 33, "gspo", build={"ref": True}, **numbers)
    assert counter.frame_count <= 3


@NOT_INTERPRETED
def test_log_probabilities() -> None:
    p = problem("gspo", seed=34)
    ids, mask = on_device(p.batch.token_ids), on_device(p.batch.mask)

    def work(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_token_logprobs(hidden, weight, ids, mask=mask, chunk_bytes=chunk_of(3, 61))
        return (out.logprobs * 2 - out.entropy).sum()

    gradients = []
    for function in (work, torch.compile(work, fullgraph=True, backend="aot_eager")):
        leaves = [on_device(x.clone()).requires_grad_() for x in (p.hidden, p.weight)]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    for x, y in zip(*gradients, strict=True):
        assert torch.equal(x, y)


@NOT_INTERPRETED
def test_all_logits() -> None:
    """In one graph, also for another number of rows, and under autocast."""
    hidden, weight = on_device(torch.randn(2, 9, 16)), on_device(torch.randn(70, 16))
    compiled = torch.compile(partial(linear_logits, vocab_size=67), fullgraph=True)
    for rows in (hidden, hidden[:, :5], hidden.flatten(0, 1)):
        assert torch.equal(compiled(rows, weight), linear_logits(rows, weight, vocab_size=67))
    with torch.autocast(hidden.device.type, torch.bfloat16):
        assert torch.equal(compiled(hidden, weight), linear_logits(hidden, weight, vocab_size=67))


@NOT_INTERPRETED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_default_chunks_of_16_bit_operands(dtype: torch.dtype) -> None:
    """How large they are depends on the processor's products, which a compiler could not ask about."""
    p = problem("gspo", seed=9, lengths=SHORT, dtype=dtype)
    args = arguments(p.batch, "packed")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return LINEAR["gspo"](hidden, weight, *args.rest, **args.keywords).loss

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden, weight = on_device(p.hidden).requires_grad_(), on_device(p.weight).requires_grad_()
        found.append(torch.autograd.grad(function(hidden, weight), [hidden, weight]))
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)
