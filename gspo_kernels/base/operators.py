"""Operators of `torch.library` whose arguments are values: dataclasses and named tuples, flattened and rebuilt here.

An operator of torch takes tensors, numbers and strings one by one. An `Operator` takes values: a dataclass or a named
tuple is flattened into one argument per field, named like the field, and rebuilt before the body, the fake and the
backward see it. A new field is one line where it is declared.

    Operator("row_stats", row_stats, fake=..., save=..., backward=..., operands=("logits",))

Floats are run-time values: all floats of an operator travel as one float64 tensor on the CPU, so that annealing one
recompiles nothing. Fakes and `save` may see NaN in place of a float: what they need to know has to be a
field of another type, such as a bool.

Any other class defines how it is passed: `packed()` returns a string, a number or a value, and the static method
`unpacked` rebuilds the object from that.

`save_values` keeps values for a backward, and `saved_values` returns them there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .checks import watched
from .scalars import run_time_list

Output = TypeVar("Output")
_SCHEMA = {
    Tensor: "Tensor", int: "SymInt", bool: "bool", str: "str", torch.dtype: "ScalarType", torch.device: "Device",
    torch.Size: "SymInt[]", list[int]: "SymInt[]",
}  # fmt: skip
_PACKED = "packed()"
_PARAMETERS = tuple[float, ...]  # any number of floats, passed as one tensor


class _Leaf(NamedTuple):
    name: str
    type: Any  # a key of `_SCHEMA`, or `_PARAMETERS`
    optional: bool


class _Float(NamedTuple):
    """One of the operator's floats; None is NaN."""

    or_tensor: _Leaf | None  # the argument for a tensor, where the field may be a float or a tensor


class _Value(NamedTuple):
    """A dataclass or a named tuple."""

    type: Any
    fields: tuple[tuple[str, Any], ...]
    present: _Leaf | None  # the argument that says whether a value that may be None is present


class _Packed(NamedTuple):
    """A class with `packed` and `unpacked`."""

    type: Any
    inside: Any
    present: _Leaf | None


class Operator(Generic[Output]):
    """`gspo_kernels::name`, called with the values that `body` takes.

    Args:
        body: takes values; returns a tensor, a named tuple of tensors, or None. Its annotations declare the arguments.
        fake: takes the same values; returns empty outputs of the right shapes and dtypes.
        save: `save(ctx, output, *values)` keeps what `backward` needs.
        backward: `backward(ctx, *upstream)` returns gradients by the names of `operands`; a missing one is None. An
            operator without one is called under `no_grad`.
        operands: names of the arguments that have a gradient.
        outputs: how many outputs, from the first, are differentiable; None: all.
        mutates: names of the arguments that are written to.
        direct: calls `body` as a plain function where no compiler, transform or fake tensor traces the first of
            `operands` (or of `mutates`): the dispatcher and its wrappers in Python take 0.1 ms of the host's time.
    """

    def __init__(
        self,
        name: str,
        body: Callable[..., Output],
        *,
        fake: Callable[..., Output],
        save: Callable[..., None] | None = None,
        backward: Callable[..., dict[str, Tensor | None]] | None = None,
        operands: Sequence[str] = (),
        outputs: int | None = None,
        mutates: Sequence[str] = (),
        direct: bool = False,
    ) -> None:
        self.body, self.save, self._backward, self._direct = body, save, backward, direct
        self._operands = tuple(operands)
        hints = typing.get_type_hints(body)
        result = hints.pop("return")
        self._tuple = result if _is_named_tuple(result) else None
        fields = [(each, hints[each]) for each in body.__code__.co_varnames[: body.__code__.co_argcount]]
        taken: set[str] = set()
        self._specs = tuple(_spec(each, kind, taken, False) for each, kind in fields)
        self._steps = tuple((i, *step) for i, spec in enumerate(self._specs) for step in _steps(spec, ()))
        leaves = [leaf for spec in self._specs for leaf in _leaves(spec)]
        self._names = tuple(leaf.name for leaf in leaves)
        self._has_numbers = any(_has_float(spec) for spec in self._specs)
        names = iter(self._names)
        path_of = {next(names): (position, path) for position, path, how in self._steps if how != "float"}
        self._direct_paths = [path_of[name] for name in operands or mutates] if direct else []
        arguments = [_declared(leaf, leaf.name in mutates) for leaf in leaves]
        arguments += ["Tensor numbers"] if self._has_numbers else []
        count = 0 if result in (None, type(None)) else len(self._tuple._fields) if self._tuple is not None else 1
        self.outputs = count if outputs is None else outputs  # how many are differentiable
        self._all_outputs = count
        schema = f"({', '.join(arguments)}) -> {'Tensor' if count == 1 and self._tuple is None else _tensors(count)}"
        self.operator = torch.library.custom_op(
            f"gspo_kernels::{name}", self._run, mutates_args=tuple(mutates), schema=schema
        )
        self.operator.register_fake(lambda *given: self._plain(fake(*self._rebuilt(given, False))))
        if backward is not None:
            self.operator.register_autograd(self._derivative, setup_context=self._remember)

    def __call__(self, *values: Any) -> Output:
        if self._direct:
            # The operands or, of an operator without a backward, what it writes to.
            tensors = [functools.reduce(getattr, fields, values[position]) for position, fields in self._direct_paths]
            if not watched(tensors[0]):
                if self._backward is not None and torch.is_grad_enabled():
                    rest: list[Tensor] = []
                    results: Any = _Direct.apply(self, values, rest, *tensors)
                    return results if self._tuple is None else self._tuple(*results, *rest)  # type: ignore[no-any-return]
                with torch.no_grad():
                    output = self.body(*values)
                if self._backward is None:
                    torch.autograd.graph.increment_version(tensors)
                return output
        given, numbers = _flatten(self._steps, values)
        if self._has_numbers:
            given.append(run_time_list(numbers))
        if self._backward is None:
            with torch.no_grad():
                found = self.operator(*given)
        else:
            found = self.operator(*given)
        return found if self._tuple is None else self._tuple(*found)  # type: ignore[no-any-return]

    # ---- what torch calls, with flat arguments

    def _run(self, *given: Any) -> Any:
        return self._plain(self.body(*self._rebuilt(given, True)))

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self.outputs < self._all_outputs:
            ctx.mark_non_differentiable(*output[self.outputs :])
        ctx.set_materialize_grads(False)  # else autograd fills zeros for every output that nothing depends on
        assert self.save is not None
        self.save(ctx, output if self._tuple is None else self._tuple(*output), *self._rebuilt(inputs, False))

    def gradients(self, ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of the operands, in their order."""
        assert self._backward is not None
        upstream = upstream[: self.outputs]
        if all(each is None for each in upstream):
            return tuple(None for _ in self._operands)
        found = self._backward(ctx, *upstream)
        assert found.keys() <= set(self._operands), (set(found), self._operands)
        return tuple([found.get(name) for name in self._operands])

    def _derivative(self, ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        by_name = dict(zip(self._operands, self.gradients(ctx, upstream), strict=True))
        names = (*self._names, "numbers") if self._has_numbers else self._names
        return tuple(by_name.get(name) for name in names)

    def _rebuilt(self, given: Sequence[Any], read: bool) -> list[Any]:
        """The values; floats are NaN unless `read`."""
        numbers: Iterator[float] = iter(given[-1].tolist()) if self._has_numbers and read else _nans()
        rest = iter(given)
        return [_rebuild(spec, rest, numbers, read) for spec in self._specs]

    def _plain(self, output: Any) -> Any:
        return output if self._tuple is None else tuple(output)


class _Direct(torch.autograd.Function):
    """Calls the body. Outputs that are not differentiable go to `rest`: autograd takes time for each of its outputs."""

    @staticmethod
    def forward(ctx: Any, operator: Operator[Any], values: Sequence[Any], rest: list[Tensor], *operands: Tensor) -> Any:
        ctx.operator = operator
        ctx.set_materialize_grads(False)
        output = operator.body(*values)
        assert operator.save is not None
        operator.save(ctx, output, *values)
        if isinstance(output, Tensor):
            return output
        rest += output[operator.outputs :]
        return output[: operator.outputs]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        return None, None, None, *ctx.operator.gradients(ctx, upstream)


# ---- values between a forward and its backward


def save_values(ctx: Any, **values: Any) -> None:
    """Keeps values for the backward: their tensors as autograd saves them, everything else on `ctx`.

    A value is a tensor, a dataclass or a named tuple with tensors among its fields, or something without tensors.
    """
    tensors: list[Tensor] = []
    ctx.values = {}
    for name, value in values.items():
        positions = _tensor_positions(type(value))  # type: ignore[arg-type]
        fields = [value] if positions is None else list(value if isinstance(value, tuple) else vars(value).values())
        for i in (0,) if positions is None else positions:
            if isinstance(fields[i], Tensor):
                tensors.append(fields[i])
                fields[i] = _SAVED
        ctx.values[name] = None if positions is None else type(value), fields
    ctx.save_for_backward(*tensors)


def saved_values(ctx: Any) -> dict[str, Any]:
    """What `save_values` kept, by name."""
    tensors, found = iter(ctx.saved_tensors), {}
    for name, (kind, kept) in ctx.values.items():
        fields = [next(tensors) if field is _SAVED else field for field in kept]
        found[name] = fields[0] if kind is None else kind(*fields)
    return found


_SAVED = object()  # stands for a saved tensor


@functools.cache
def _tensor_positions(kind: Any) -> tuple[int, ...] | None:
    """Which fields of a dataclass or a named tuple may be tensors; None for any other class."""
    if not _has_fields(kind):
        return None
    hints = list(_fields(kind).values())
    for hint in hints:
        for inner in filter(_has_fields, (hint, *typing.get_args(hint))):
            assert not _tensor_positions(inner), f"{inner.__name__} inside {kind.__name__}: its tensors are not saved"
    return tuple(i for i, hint in enumerate(hints) if hint is Tensor or Tensor in typing.get_args(hint))


# ---- types as a schema


def _spec(name: str, kind: Any, taken: set[str], optional: bool, prefix: str = "") -> Any:
    inside = tuple(each for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        optional = optional or len(inside) < len(typing.get_args(kind))
        if set(inside) == {float, Tensor}:
            return _Float(_Leaf(_unused(name, prefix, taken), Tensor, True))
        assert len(inside) == 1, f"{name}: no operator can take {kind}"
        kind = inside[0]
    if kind is float:
        return _Float(None)
    if kind in _SCHEMA or kind == _PARAMETERS:
        return _Leaf(_unused(name, prefix, taken), kind, optional)
    present = _Leaf(_unused(f"has_{name}", prefix, taken), bool, False) if optional else None
    if _has_fields(kind):
        fields = _fields(kind).items()
        return _Value(kind, tuple((each, _spec(each, hint, taken, optional, name)) for each, hint in fields), present)
    travels_as = typing.get_type_hints(kind.packed)["return"]
    return _Packed(kind, _spec(name, travels_as, taken, optional, prefix), present)


def _unused(name: str, prefix: str, taken: set[str]) -> str:
    name = name if name not in taken else f"{prefix}_{name}"
    assert name not in taken, f"two arguments are called {name}"
    taken.add(name)
    return name


def _leaves(spec: Any) -> Iterator[_Leaf]:
    if isinstance(spec, _Leaf):
        yield spec
    elif isinstance(spec, _Float):
        if spec.or_tensor is not None:
            yield spec.or_tensor
    else:
        if spec.present is not None:
            yield spec.present
        for each in [spec.inside] if isinstance(spec, _Packed) else [field for _, field in spec.fields]:
            yield from _leaves(each)


def _has_float(spec: Any) -> bool:
    if isinstance(spec, _Packed):
        return _has_float(spec.inside)
    return isinstance(spec, _Float) or (isinstance(spec, _Value) and any(_has_float(each) for _, each in spec.fields))


def _declared(leaf: _Leaf, written: bool) -> str:
    kind = "Tensor" if leaf.type == _PARAMETERS else _SCHEMA[leaf.type]
    return f"{kind}{'(a!)' if written else ''}{'?' if leaf.optional else ''} {leaf.name}"


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


def _has_fields(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or _is_named_tuple(kind)


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    """The type of each field, by name."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind._fields
    return {name: hints[name] for name in names}


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


# ---- values as arguments


def _steps(spec: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path of attributes to a field, how the field is passed), as strings, which torch.compile can trace."""
    if isinstance(spec, _Leaf):
        yield path, "floats" if spec.type == _PARAMETERS else "size" if spec.type is torch.Size else "as it is"
    elif isinstance(spec, _Float):
        yield path, "float" if spec.or_tensor is None else "float or tensor"
    else:
        if spec.present is not None:
            yield path, "present"
        if isinstance(spec, _Packed):
            yield from _steps(spec.inside, (*path, _PACKED))
        else:
            for name, field in spec.fields:
                yield from _steps(field, (*path, name))


def _at(values: Sequence[Any], path: tuple[Any, ...]) -> Any:
    """The field at a path: the value's position, then attributes."""
    position, *names = path
    value = values[position]
    for name in names:
        if value is not None:
            value = value.packed() if name == _PACKED else getattr(value, name)
    return value


def _flatten(steps: Sequence[tuple[int, tuple[str, ...], str]], values: Sequence[Any]) -> tuple[list[Any], list[float]]:
    """(arguments, floats)"""
    given: list[Any] = []
    numbers: list[float] = []
    for position, path, how in steps:
        value = _at(values, (position, *path))
        if how == "as it is":
            given.append(value)
        elif how == "present":
            given.append(value is not None)
        elif how == "size":
            given.append(None if value is None else list(value))
        elif how == "floats":
            given.append(None if value is None else run_time_list(value))
        else:
            tensor = isinstance(value, Tensor)
            if how == "float or tensor":
                given.append(value if tensor else None)
            numbers.append(math.nan if tensor or value is None else value)
    return given, numbers


def _rebuild(spec: Any, given: Iterator[Any], numbers: Iterator[float], read: bool) -> Any:
    if isinstance(spec, _Leaf):
        value = next(given)
        if spec.type == _PARAMETERS and value is not None:
            return tuple(value.tolist()) if read else ()
        return torch.Size(value) if spec.type is torch.Size and value is not None else value
    if isinstance(spec, _Float):
        number = next(numbers)
        tensor = None if spec.or_tensor is None else next(given)
        return tensor if tensor is not None else None if read and math.isnan(number) else number
    present = spec.present is None or next(given)
    if isinstance(spec, _Packed):
        inside = _rebuild(spec.inside, given, numbers, read)
        return spec.type.unpacked(inside) if present else None
    fields = {name: _rebuild(field, given, numbers, read) for name, field in spec.fields}
    return spec.type(**fields) if present else None


def _nans() -> Iterator[float]:
    while True:
        yield math.nan
