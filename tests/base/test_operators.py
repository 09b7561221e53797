"""Operators by name: values are flattened and rebuilt, gradients reach their arguments, floats recompile nothing."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gspo_kernels.base.operators import Operator, save_values, saved_values


class Shard(NamedTuple):
    begin: int
    width: int


class Kind:
    """Travels as its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def packed(self) -> str:
        return self.name

    @staticmethod
    def unpacked(name: str) -> Kind:
        return Kind(name)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    mask: Tensor | None
    shard: Shard | None
    kind: Kind
    shape: torch.Size
    slope: float
    limit: float | None
    count: float | Tensor | None
    parameters: tuple[float, ...]


class Results(NamedTuple):
    scaled: Tensor
    doubled: Tensor


class Nested(NamedTuple):
    inside: Results


SEEN: list[Any] = []


def body(inputs: Inputs, y: Tensor, backend: str | None) -> Results:
    SEEN.append((inputs, backend))
    factor = inputs.slope * (1.0 if inputs.count is None else float(inputs.count)) + sum(inputs.parameters)
    return Results(inputs.x * factor, y * 2.0)


def fake(inputs: Inputs, y: Tensor, backend: str | None) -> Results:
    assert inputs.slope != inputs.slope, "a fake has no run-time values"
    return Results(torch.empty_like(inputs.x), torch.empty_like(y))


def save(ctx: Any, output: Results, inputs: Inputs, y: Tensor, backend: str | None) -> None:
    ctx.save_for_backward(inputs.x, output.scaled)


def backward(ctx: Any, scaled: Tensor | None, doubled: Tensor | None) -> dict[str, Tensor | None]:
    x, result = ctx.saved_tensors
    return {
        "x": None if scaled is None else torch.where(x != 0, scaled * result / x, 0.0),
        "y": None if doubled is None else 2.0 * doubled,
    }


BY_DISPATCHER, DIRECTLY = (
    Operator(
        f"test_operators_{direct}", body, fake=fake, save=save, backward=backward, operands=("x", "y"), direct=direct
    )
    for direct in (False, True)
)
FULL = Inputs(
    torch.tensor([1.0, 2.0]), torch.tensor([True, False]), Shard(3, 4), Kind("k"), torch.Size([1, 2]), 0.5, None,
    torch.tensor(3.0), (0.25, 0.125),
)  # fmt: skip
PLAIN = Inputs(torch.tensor([1.0, 2.0]), None, None, Kind(""), torch.Size([]), 0.5, 2.0, 3.0, ())


@pytest.mark.parametrize("operator", [BY_DISPATCHER, DIRECTLY], ids=["by the dispatcher", "directly"])
@pytest.mark.parametrize("inputs", [FULL, PLAIN], ids=["full", "plain"])
def test_values_arrive_as_they_were(operator: Operator[Results], inputs: Inputs) -> None:
    operator(inputs, torch.ones(1), None)
    seen, backend = SEEN[-1]
    assert backend is None and seen.kind.name == inputs.kind.name
    for name in ("mask", "shard", "shape", "slope", "limit", "count", "parameters"):
        given, found = getattr(inputs, name), getattr(seen, name)
        assert type(given) is type(found) and (
            torch.equal(given, found) if isinstance(given, Tensor) else given == found
        )


@pytest.mark.parametrize("operator", [BY_DISPATCHER, DIRECTLY], ids=["by the dispatcher", "directly"])
def test_gradients_by_name(operator: Operator[Results]) -> None:
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(3, requires_grad=True)
    inputs = Inputs(x, None, Shard(0, 1), Kind("k"), torch.Size([2]), 0.5, None, 3.0, (0.25,))
    found = operator(inputs, y, "b")
    (found.scaled.sum() + found.doubled.sum()).backward()
    assert x.grad is not None and y.grad is not None
    assert x.grad.tolist() == [1.75, 1.75] and y.grad.tolist() == [2.0, 2.0, 2.0]
    (only,) = torch.autograd.grad(operator(inputs, y, "b").doubled.sum(), y)
    assert only.tolist() == [2.0, 2.0, 2.0]


def test_a_float_recompiles_nothing() -> None:
    compiled = 0

    def count(graph: Any, example_inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph

    def loss(x: Tensor, slope: float) -> Tensor:
        inputs = Inputs(x, None, Shard(0, 1), Kind("k"), torch.Size([2]), slope, None, None, (slope, 1.0))
        return BY_DISPATCHER(inputs, x, None).scaled.sum()

    traced = torch.compile(loss, backend=count, fullgraph=True)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for slope in (0.5, 0.25, 0.125, 2.0):
        assert float(traced(x, slope)) == 3.0 * (2 * slope + 1.0)
    assert compiled <= 2, "a float is an input after the first change of it"


def test_two_arguments_of_one_name_are_told_apart() -> None:
    class Two(NamedTuple):
        tp: Shard
        cp: Shard | None
        x: Tensor

    found: list[Two] = []

    def keep(two: Two) -> Tensor:
        found.append(two)
        return two.x.clone()

    keep.__annotations__ = {"two": Two, "return": Tensor}
    Two.__annotations__ = {"tp": Shard, "cp": Shard | None, "x": Tensor}
    operator = Operator("test_operators_two", keep, fake=lambda two: torch.empty_like(two.x))
    given = Two(Shard(1, 2), Shard(3, 4), torch.ones(1))
    operator(given)
    assert found[0][:2] == given[:2]


def test_saved_values_come_back_as_they_were() -> None:
    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            save_values(ctx, inputs=FULL, x=x, name="n", absent=None)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            found = saved_values(ctx)
            inputs = found["inputs"]
            assert type(inputs) is Inputs and inputs.shard == Shard(3, 4) and inputs.kind is FULL.kind
            assert inputs.mask is FULL.mask or torch.equal(inputs.mask, FULL.mask)
            assert (found["name"], found["absent"]) == ("n", None)
            return upstream * found["x"]

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    Saving.apply(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.0]


def test_tensors_of_a_field_of_a_value_are_not_saved_unseen() -> None:
    with pytest.raises(AssertionError, match="Results inside Nested: its tensors are not saved"):
        save_values(SimpleNamespace(), nested=Nested(Results(torch.zeros(1), torch.zeros(1))))


@pytest.mark.parametrize("direct", [False, True], ids=["by the dispatcher", "directly"])
def test_an_operator_without_a_backward_writes_under_no_grad(direct: bool) -> None:
    def add(x: Tensor, into: Tensor) -> None:
        into.add_(x)

    add.__annotations__ = {"x": Tensor, "into": Tensor, "return": None}
    operator = Operator(
        f"test_operators_add_{direct}", add, fake=lambda x, into: None, mutates=("into",), direct=direct
    )
    into, x = torch.zeros(2), torch.ones(2, requires_grad=True)
    version = into._version
    operator(x, into)
    assert into.tolist() == [1.0, 1.0] and not into.requires_grad and into._version > version
