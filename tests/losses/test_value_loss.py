"""The value loss against the oracle: from values, and from hidden states and a value head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from batches import from_padded, to_padded
from checks import check_close, check_number
from modes import NOT_INTERPRETED, on_device
from test_errors import check_message
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import gspo_kernels
from gspo_kernels import ValueLossOutput
from gspo_kernels.base.operators import _flatten
from gspo_kernels.linear import value_head
from gspo_kernels.losses import value_loss as module

pytestmark = NOT_INTERPRETED  # plain torch

LENGTHS = (5, 1, 0, 7, 3, 4)  # the fifth is all masked
WIDTH = 6
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum"]
by_layout = pytest.mark.parametrize("layout", ["padded", "packed"])
by_source = pytest.mark.parametrize("source", ["values", "hidden"])


@dataclass
class Case:
    """Values are hidden @ weight + bias; old values lie on both sides of the clip range around them."""

    hidden: Tensor  # [N, WIDTH]
    weight: Tensor  # [WIDTH]
    bias: Tensor  # [1]
    returns: Tensor  # [N], this and the next two
    old_values: Tensor
    mask: Tensor
    lengths: Sequence[int] = LENGTHS

    @property
    def values(self) -> Tensor:
        """Rounded once to float32."""
        return (self.hidden.double() @ self.weight.double() + self.bias.double()).to(self.returns.dtype)

    @property
    def sequences(self) -> list[range]:
        return [range(a, b) for a, b in itertools.pairwise([0, *itertools.accumulate(self.lengths)])]

    def expected(self, **options: Any) -> oracle.ValueResult:
        old = None if options.pop("without_old", False) else self.old_values.tolist()
        return oracle.value_loss(
            self.values.tolist(), self.returns.tolist(), old, self.sequences, self.mask.tolist(), **options
        )


def case_of(seed: int = 0, dtype: torch.dtype = torch.float32, hidden: torch.dtype | None = None) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = sum(LENGTHS)
    states = normal(count, WIDTH).to(hidden or dtype)
    weight, bias = normal(WIDTH).to(dtype), normal(1).to(dtype)
    values = states.double() @ weight.double() + bias.double()
    mask = torch.rand(count, generator=generator) < 0.8
    mask[13:16] = False
    steps = torch.tensor([0.05, -0.05, 0.19, -0.19, 0.21, -0.21, 0.9, -0.9], dtype=torch.float64).repeat(3)[:count]
    return Case(states, weight, bias, (values + normal(count)).to(dtype), (values + steps).to(dtype), mask)


@dataclass
class Outcome:
    loss: Tensor
    stats: module.ValueStats
    values: Tensor  # [N] on the CPU, from the stats
    gradients: dict[str, Tensor]  # of "values" [N], or of "hidden", "weight" and "bias"


def run(case: Case, layout: str, source: str = "values", factor: float = 1.0, **options: Any) -> Outcome:
    """With garbage wherever the mask is False."""
    padded = layout == "padded"

    def given(values: Tensor, fill: float = math.nan) -> Tensor:
        garbage = torch.tensor([math.nan, math.inf, -math.inf, 1e30], dtype=values.dtype).repeat(len(values) // 4 + 1)
        shape = (-1, *[1] * (values.ndim - 1))
        if values.dtype != torch.bool:
            values = torch.where(case.mask.view(shape), values, garbage[: len(values)].view(shape))
        return on_device(to_padded(values, case.lengths, fill) if padded else values)

    keywords: dict[str, Any] = {"mask": given(case.mask, False)}
    if not padded:
        keywords["cu_seqlens"] = on_device(torch.tensor([0, *itertools.accumulate(case.lengths)]))
    old = None if options.pop("without_old", False) else given(case.old_values)
    if source == "values":
        operands = {"values": given(case.values).requires_grad_()}
        found: ValueLossOutput = gspo_kernels.value_loss(
            operands["values"], given(case.returns), old, **keywords, **options
        )
    else:
        operands = {
            "hidden": given(case.hidden).requires_grad_(),
            "weight": on_device(case.weight)[None].requires_grad_(),
            "bias": on_device(case.bias).clone().requires_grad_(),
        }
        hidden, weight, bias = operands.values()
        found = gspo_kernels.linear_value_loss(
            hidden, weight, given(case.returns), old, bias=bias, **keywords, **options
        )
    (found.loss * factor).backward()

    def inside(array: Tensor) -> Tensor:
        if not padded:
            return array.cpu()
        kept, padding = from_padded(array.cpu(), case.lengths)
        assert bool((padding == 0).all())
        return kept

    gradients = {}
    for name, x in operands.items():
        assert x.grad is not None and x.grad.dtype == x.dtype
        gradients[name] = inside(x.grad) if name in ("values", "hidden") else x.grad.cpu()
    assert not any(x.requires_grad for x in (*found.stats.as_dict().values(), found.stats.values))
    return Outcome(found.loss.detach().cpu(), found.stats, inside(found.stats.values), gradients)


def check(case: Case, outcome: Outcome, expected: oracle.ValueResult, factor: float = 1.0) -> None:
    digits = 1e-6 if case.returns.dtype == torch.float32 else 1e-12
    assert outcome.loss.dtype == case.returns.dtype
    check_number("loss", float(outcome.loss), expected.loss, digits * expected.loss)
    slope = factor * torch.tensor(expected.gradient, dtype=torch.float64)
    of_hidden = slope[:, None] * case.weight.double()
    states = torch.where(case.mask[:, None], case.hidden.double(), 0.0)
    truth = {
        "values": (slope, slope.abs()),
        "hidden": (of_hidden, of_hidden.abs()),
        "weight": ((slope @ states)[None], (slope.abs() @ states.abs())[None]),
        "bias": (slope.sum()[None], slope.abs().sum()[None]),
    }
    for name, gradient in outcome.gradients.items():
        exact, size = truth[name]
        stored = torch.finfo(gradient.dtype).eps
        check_close(f"gradient of {name}", gradient, exact, (digits + stored) * size)
        assert bool((gradient[exact == 0] == 0).all()), "masked and clipped: exactly 0"
    for name, number in expected.stats.items():
        check_number(name, float(getattr(outcome.stats, name)), number, 1e-6 * (1 + abs(number)))
    shown = torch.where(case.mask, case.values, 0.0)
    check_close("values", outcome.values, shown, torch.finfo(shown.dtype).eps * shown.abs())


@by_layout
@by_source
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"clip_range": 0.5}, {"clip_range": None}, {"without_old": True}, {"normalizer": 31.0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_the_oracle(
    layout: str, source: str, aggregation: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    case = case_of(dtype=dtype)
    outcome = run(case, layout, source, aggregation=aggregation, factor=1.5, **options)
    check(case, outcome, case.expected(aggregation=aggregation, **options), 1.5)


def test_the_case_has_every_kind_of_token() -> None:
    """Clipped, outside of the range and not clipped (the clip would help), inside, masked."""
    case = case_of()
    gradient = torch.tensor(case.expected().gradient)
    outside = (case.values - case.old_values).abs() > 0.2
    counted = case.mask
    kinds = [counted & (gradient == 0), counted & outside & (gradient != 0), counted & ~outside, ~counted]
    assert all(int(kind.sum()) >= 2 for kind in kinds)


def test_on_the_bound_is_not_clipped() -> None:
    values = on_device(torch.tensor([[1.25, 1.2500001, 0.75]])).requires_grad_()
    returns, old = on_device(torch.full((1, 3), 1.5)), on_device(torch.ones(1, 3))
    loss, stats = gspo_kernels.value_loss(values, returns, old, clip_range=0.25)
    loss.backward()
    assert values.grad is not None
    assert [x != 0 for x in values.grad[0].tolist()] == [True, False, True], "0.75 lies beyond, away from the return"
    assert float(stats.clip_fraction) == float(torch.tensor(1 / 3))


@by_source
def test_padded_and_packed_have_the_same_numbers(source: str) -> None:
    case = case_of(seed=1)
    padded, packed = run(case, "padded", source), run(case, "packed", source)
    torch.testing.assert_close(padded.loss, packed.loss, rtol=1e-7, atol=0)
    for name, gradient in padded.gradients.items():
        torch.testing.assert_close(gradient, packed.gradients[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_shares_of_a_split_add_up(aggregation: str) -> None:
    case = case_of(seed=2)
    count = gspo_kernels.global_count(on_device(to_padded(case.mask, case.lengths, False)), aggregation=aggregation)
    whole = run(case, "padded", aggregation=aggregation)
    loss, gradient = 0.0, []
    for rows, lengths in ((slice(0, 13), LENGTHS[:4]), (slice(13, 20), LENGTHS[4:])):
        part = Case(case.hidden[rows], case.weight, case.bias, case.returns[rows], case.old_values[rows],
                    case.mask[rows], lengths)  # fmt: skip
        outcome = run(part, "packed", aggregation=aggregation, normalizer=count)
        loss += float(outcome.loss)
        gradient.append(outcome.gradients["values"])
    assert loss == pytest.approx(float(whole.loss), rel=1e-6)
    torch.testing.assert_close(torch.cat(gradient), whole.gradients["values"], rtol=1e-6, atol=0)


@by_layout
@by_source
def test_a_mean_over_groups(layout: str, source: str) -> None:
    """One group of all sequences is the mean over tokens; a group each is the mean over sequences."""
    case = case_of(seed=2)
    counts = [float(sum(bool(case.mask[t]) for t in rows)) for rows in case.sequences]
    for group_tokens, same in (([sum(counts)] * len(counts), "token_mean"), (counts, "sequence_mean")):
        given = on_device(torch.tensor(group_tokens))
        outcome = run(case, layout, source, aggregation="group_mean", group_tokens=given)
        check(case, outcome, case.expected(aggregation=same))


@by_source
@pytest.mark.parametrize("where", ["values", "returns", "old_values"])
def test_nan_is_not_hidden_and_stays_at_its_token(source: str, where: str) -> None:
    case, at = case_of(), 0
    assert bool(case.mask[at])
    if where == "values":
        case.hidden[at, 0] = math.nan
    else:
        getattr(case, where)[at] = math.nan
    outcome = run(case, "packed", source)
    assert bool(outcome.loss.isnan())
    rows = outcome.gradients["values" if source == "values" else "hidden"].reshape(len(case.mask), -1)
    assert rows.isnan().any(1).nonzero().flatten().tolist() == [at]


@by_source
@by_layout
def test_of_nothing_everything_is_zero(layout: str, source: str) -> None:
    case = case_of()
    case.mask[:] = False
    outcome = run(case, layout, source, normalizer=on_device(torch.zeros(())))
    assert float(outcome.loss) == 0 and all(bool((x == 0).all()) for x in outcome.gradients.values())
    assert {float(x) for x in outcome.stats.as_dict("value/").values()} == {0.0}
    empty = gspo_kernels.value_loss(*on_device(torch.zeros(2, 0, 3)))
    assert float(empty.loss) == 0


def test_a_normalizer_that_is_no_count() -> None:
    case = case_of()
    with pytest.raises(ValueError, match="normalizer"):
        run(case, "packed", normalizer=on_device(torch.tensor(-1.0)))


def test_stats_over_ranks(group_of_one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one process has them; the last of three ranks has no token."""
    if group_of_one is None:
        pytest.skip("no process group here")
    case = case_of(seed=6)
    parts = []
    for rows, lengths in ((slice(0, 13), LENGTHS[:4]), (slice(13, 20), LENGTHS[4:]), (slice(0, 0), ())):
        part = Case(case.hidden[rows], case.weight, case.bias, case.returns[rows], case.old_values[rows],
                    case.mask[rows], lengths)  # fmt: skip
        parts.append(run(part, "packed").stats)
    assert parts[0].over(group_of_one).as_dict() == parts[0].as_dict()
    monkeypatch.setattr(module, "gather", lambda mine, ranks: torch.stack([part.moments for part in parts]))
    for part in parts:
        found = part.over(group_of_one)
        assert found.values is part.values
        for name, number in case.expected().stats.items():
            check_number(name, float(getattr(found, name)), number, 1e-6 * (1 + abs(number)))
    with pytest.raises(TypeError, match="group: expected a process group"):
        parts[0].over(None)


def test_equal_returns_explain_nothing() -> None:
    values = on_device(torch.randn(1, 7))
    stats = gspo_kernels.value_loss(values, torch.full_like(values, 0.1)).stats
    assert float(stats.explained_variance) == 0
    perfect = gspo_kernels.value_loss(values, values.clone()).stats
    assert float(perfect.explained_variance) == 1


def test_second_derivatives() -> None:
    """From values by torch; from hidden states they are refused."""
    values, returns = (on_device(torch.randn(2, 3, dtype=torch.float64)) for _ in range(2))
    assert torch.autograd.gradgradcheck(
        lambda v: gspo_kernels.value_loss(v, returns, clip_range=None).loss, values.requires_grad_()
    )
    hidden, weight = on_device(torch.randn(2, 3, 4)).requires_grad_(), on_device(torch.randn(4)).requires_grad_()
    loss = gspo_kernels.linear_value_loss(hidden, weight, returns.float()).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_value_loss: a second derivative is not supported.*value_loss, of"):
        gradient.sum().backward()


# --- the value head ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@by_layout
def test_a_head_in_float32_over_hidden_states_of_another_dtype(layout: str, hidden: torch.dtype) -> None:
    case = case_of(seed=3, hidden=hidden)
    check(case, run(case, layout, "hidden"), case.expected())


def test_values_are_rounded_once_and_those_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 bf16 columns, which a product in bf16 would round to three digits; in chunks of 3 rows."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(11, 4096, generator=generator).bfloat16()
    weight = torch.randn(4096, generator=generator).bfloat16()
    exact = hidden.double() @ weight.double()
    size = 3 * 8 * 4096
    monkeypatch.setattr(value_head, "_CHUNK_BYTES", size)
    monkeypatch.setattr(value_head, "_CHUNK_BYTES_ELSEWHERE", size)
    found = gspo_kernels.linear_values(on_device(hidden), on_device(weight))
    assert found.dtype == torch.float32
    check_close("values", found, exact, 2.0**-24 * exact.abs() * (1 + 1e-6))
    stats = gspo_kernels.linear_value_loss(
        on_device(hidden), on_device(weight), found, cu_seqlens=on_device(torch.tensor([0, 5, 11]))
    ).stats
    assert torch.equal(stats.values, found)


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_a_gradient_for_those_that_need_one(trained: tuple[str, ...]) -> None:
    case = case_of(seed=5)
    expected = run(case, "packed", "hidden").gradients
    operands = {"hidden": case.hidden, "weight": case.weight[None], "bias": case.bias}
    operands = {name: on_device(x).clone().requires_grad_(name in trained) for name, x in operands.items()}
    boundaries = on_device(torch.tensor([0, *itertools.accumulate(LENGTHS)]))
    loss = gspo_kernels.linear_value_loss(
        operands["hidden"], operands["weight"], on_device(case.returns), on_device(case.old_values),
        bias=operands["bias"], mask=on_device(case.mask), cu_seqlens=boundaries,
    ).loss  # fmt: skip
    loss.backward()
    for name, x in operands.items():
        if name in trained:
            assert x.grad is not None
            torch.testing.assert_close(x.grad.cpu(), expected[name], rtol=1e-6, atol=1e-7)
        else:
            assert x.grad is None


def test_views_are_taken_as_they_are() -> None:
    """`hidden[:, :-1]` of a model's output, in float64 too: the input is not written to."""
    for dtype in (torch.float32, torch.float64):
        whole = on_device(torch.randn(3, 5, 4, dtype=dtype)).requires_grad_()
        before, weight = whole.detach().clone(), on_device(torch.randn(4, dtype=dtype))
        mask = on_device(torch.rand(3, 4) < 0.5)
        found = gspo_kernels.linear_values(whole[:, :-1], weight, mask=mask)
        torch.testing.assert_close(found, torch.where(mask, before[:, :-1] @ weight, 0.0))
        found.sum().backward()
        assert whole.grad is not None and torch.equal(whole, before)
        torch.testing.assert_close(whole.grad[:, :-1], mask[..., None] * weight)
        assert bool((whole.grad[:, -1] == 0).all())


@pytest.mark.plain_memory
def test_under_torch_compile() -> None:
    def train(hidden: Tensor, weight: Tensor, returns: Tensor, clip_range: float) -> Tensor:
        return gspo_kernels.linear_value_loss(hidden, weight, returns, returns + 0.3, clip_range=clip_range).loss

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(train, fullgraph=True, backend=counter)
    for length, clip_range in ((5, 0.2), (9, 0.1), (6, 0.4)):
        gradients = []
        for function in (train, compiled):
            torch.manual_seed(length)
            hidden = on_device(torch.randn(2, length, 4)).requires_grad_()
            weight, returns = on_device(torch.randn(4)).requires_grad_(), on_device(torch.randn(2, length))
            gradients.append(torch.autograd.grad(function(hidden, weight, returns, clip_range), [hidden, weight]))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2, "lengths and clip ranges are inputs after the first change of them"


@pytest.mark.parametrize("everything", [True, False])
def test_operators_keep_their_contract(everything: bool) -> None:
    """Nothing is aliased or mutated without a declaration; fake tensors, autograd, and dynamic shapes under AOT."""
    case = case_of(seed=7)
    hidden, weight = (on_device(x).requires_grad_() for x in (case.hidden, case.weight))
    bias, mask = (on_device(case.bias[0].clone()), on_device(case.mask)) if everything else (None, None)
    needs = value_head._NeedsGrad(True, everything, False)
    head = value_head._ValueHead(hidden, weight, bias, mask)
    frozen = value_head._ValueHead(hidden.detach(), weight.detach(), bias, mask)
    gradient = on_device(torch.randn(len(case.mask)))
    for operator, values in (
        (value_head._values_operator, (head, needs)),
        (value_head._gradient_operator, (frozen, needs, gradient)),
    ):
        given, _ = _flatten(operator._steps, values)
        tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(operator.operator._opoverload, tuple(given), test_utils=tests)


# --- refusals and mutants ---------------------------------------------------------------------------------------------

V, H = torch.zeros(2, 3), torch.zeros(2, 3, 4)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "values in bf16": ({"values": V.bfloat16()}, TypeError, "values", "bfloat16"),
    "a last dimension of 1": ({"values": V[..., None]}, ValueError, "values", "[2, 3, 1]. Pass values[..., 0]"),
    "returns per sequence": ({"returns": V[:, 0]}, ValueError, "returns", "[2]"),
    "old values in half precision": ({"old_values": V.half()}, TypeError, "old_values", "float16"),
    "a negative clip range": ({"clip_range": -0.1}, ValueError, "clip_range", "-0.1"),
    "an aggregation of another name": ({"aggregation": "mean"}, ValueError, "aggregation", "'mean'"),
    "a head of another width": ({"hidden": H, "weight": torch.zeros(3)}, ValueError, "weight", "[3]"),
    "a head with two rows": ({"hidden": H, "weight": torch.zeros(2, 4)}, ValueError, "weight", "[2, 4]"),
    "two biases": ({"hidden": H, "weight": H[0, 0], "bias": torch.zeros(2)}, ValueError, "bias", "[2]"),
    "a head module": ({"hidden": H, "weight": torch.nn.Linear(4, 1)}, TypeError, "weight", "pass its weight"),
    "hidden states in integers": ({"hidden": H.long(), "weight": H[0, 0]}, TypeError, "hidden", "int64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, kind, argument, came = REFUSED[case]
    arguments = {"returns": V, **({} if "hidden" in change else {"values": V}), **change}
    function = gspo_kernels.linear_value_loss if "hidden" in change else gspo_kernels.value_loss
    with pytest.raises(kind) as caught:
        function(**arguments)
    check_message(caught.value, argument, came)


def broken(change: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """`ValueInputs.loss` with another choice of (error, clipped) from values, old values, returns and mask."""

    def loss(self: module.ValueInputs, values: Tensor) -> ValueLossOutput:
        layout = self.batch.layout()
        current, returns = layout.select(values.reshape(-1).double()), layout.of_tokens(self.returns)
        assert self.old_values is not None
        error, clipped = change(current, layout.of_tokens(self.old_values), returns, layout.mask)
        with torch.no_grad():
            moments = module._moments(layout, (current - returns).detach(), returns, clipped)
            stats = module._stats(moments[None], current.detach().to(values.dtype).reshape(layout.shape), moments)
        return ValueLossOutput((error.square().sum() / layout.num_tokens / 2).to(values.dtype), stats)

    return loss


def right(v: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    held = torch.minimum(torch.maximum(v, old - 0.2), old + 0.2) - returns
    clipped = mask & (held.abs() > (v - returns).abs())
    return torch.where(mask, torch.where(clipped, held.detach(), v - returns), 0.0), clipped


def smaller_error(v: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    held = torch.minimum(torch.maximum(v, old - 0.2), old + 0.2) - returns
    clipped = mask & (held.abs() < (v - returns).abs())
    return torch.where(mask, torch.where(clipped, held.detach(), v - returns), 0.0), clipped


def always_clipped(v: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    held = torch.minimum(torch.maximum(v, old - 0.2), old + 0.2)
    return torch.where(mask, held - returns, 0.0), mask & (held != v)


def not_clipped(v: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(mask, v - returns, 0.0), torch.zeros_like(mask)


def gradient_where_clipped(v: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    error, clipped = right(v, old, returns, mask)
    return error + torch.where(clipped, v - v.detach(), 0.0), clipped


@pytest.mark.parametrize("mutant", [smaller_error, always_clipped, not_clipped, gradient_where_clipped])
def test_mutants_are_rejected(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of()
    monkeypatch.setattr(module.ValueInputs, "loss", broken(right))
    check(case, run(case, "packed"), case.expected())
    monkeypatch.setattr(module.ValueInputs, "loss", broken(mutant))
    with pytest.raises(AssertionError):
        check(case, run(case, "packed"), case.expected())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_value_on_the_edge_of_the_clip_range(sign: float) -> None:
    """`V - V_old` may be rounded to more than the range and `V_old + range` to V: V is still held on its own side."""
    old = on_device(torch.randn(1, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    values = old + sign * 0.2
    assert ((values - old).abs() > 0.2).any() and ((values - old).abs() < 0.2).any()
    loss, _ = gspo_kernels.value_loss(values, old + sign * 5.0, old)
    torch.testing.assert_close(loss.item(), 4.8**2 / 2, rtol=1e-12, atol=0.0)
