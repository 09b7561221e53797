"""What a loss is: an objective turns log-ratios and advantages into one number per token or sequence.

Write your own by subclassing `Objective`: one method, `terms`. Gradients come from autograd, so keep values that should
not be differentiated detached, and guard before an unsafe operation (`at_most` before exp): then so is the gradient.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import sys
import typing
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import Layout
from ..base.torch_internals import constant_while_compiling
from .reduction import AGGREGATIONS
from .triton_term import TritonHold, TritonTerm


class TokenValues(NamedTuple):
    """What is known of each token once its logits have been read; [tokens] float64, 0 where masked."""

    logprobs: Tensor  # differentiable
    old_logprobs: Tensor  # constant; on-policy `logprobs.detach()`
    entropy: Tensor | None  # constant; None where the caller has none
    rollout_logprobs: Tensor | None  # constant; None where the caller has none


@dataclass(frozen=True)
class TokenBatch:
    """What `Objective.terms` is computed from. Token arrays are [tokens] in float64, 0 where masked.

    `logprobs`, `old_logprobs`, `entropy` and `rollout_logprobs` are there for objectives that declare `uses_logprobs`.

    Attributes:
        log_ratio: [tokens], `log pi(y_t) - log pi_old(y_t)`, differentiable; NaN where a log-probability is NaN, else
            finite.
        advantages: [tokens] if the objective's `advantages_per_token`, else [sequences].
        layout: sums, means and spreads over sequences; `layout.mask` is [tokens].
        max_log_ratio: 0-d. Above it a ratio saturates: it is constant and has no gradient.
    """

    log_ratio: Tensor
    advantages: Tensor
    layout: Layout
    max_log_ratio: Tensor
    values: TokenValues | None = None  # None unless declared

    @property
    def logprobs(self) -> Tensor:
        """Current log-probabilities, differentiable."""
        return self._declared("logprobs").logprobs

    @property
    def old_logprobs(self) -> Tensor:
        """Those of the policy that sampled; on-policy `logprobs.detach()`."""
        return self._declared("old_logprobs").old_logprobs

    @property
    def entropy(self) -> Tensor | None:
        """Of each token's distribution, a constant (`entropy_coef=` adds a bonus that is differentiated).

        None in `policy_loss_from_logprobs` without `entropy=`.
        """
        return self._declared("entropy").entropy

    @property
    def rollout_logprobs(self) -> Tensor | None:
        """Those of the engine that sampled, a constant; None without `rollout_logprobs=`."""
        return self._declared("rollout_logprobs").rollout_logprobs

    def _declared(self, name: str) -> TokenValues:
        if self.values is None:
            raise RuntimeError(
                f"tokens.{name}: expected an objective that declares it; got one whose uses_logprobs is False. Add "
                "`uses_logprobs: ClassVar[bool] = True` to its class"
            )
        return self.values


@dataclass(frozen=True)
class Terms:
    """An objective's result. A unit is what has a ratio: a sequence or a token.

    Attributes:
        loss: float64 per unit, to be minimized, before weights, KL, entropy and aggregation. All tokens of a sequence
            have the loss of the sequence.
        log_ratio: float64 per unit, the logarithm of its importance ratio. `kl_weighting="ratio"` differentiates it.
        clipped_low: bool per unit, whether it is clipped at the lower bound; None: never. For `stats` alone.
        clipped_high: the same at an upper bound.
    """

    loss: Tensor
    log_ratio: Tensor
    clipped_low: Tensor | None = None
    clipped_high: Tensor | None = None


class RowSlope(NamedTuple):
    """dL/dlogprob of a token from its own numbers alone, as CUDA kernels compute it.

        -weight * advantage + penalty * log_ratio,    weight = min(ratio, max_weight) within a range

    The range is one of the token's position. `measure` says what the position is: "ratio": `ratio - 1`; "tv":
    `exp(logprob) - exp(rollout_logprob)`; "kl": the KL divergence of the two distributions "this token or another",
    with the sign of `logprob - rollout_logprob`. The bounds belong to the range. Beyond max_log_ratio the ratio is
    constant: outside of a range that drops, unless `max_weight` is finite; and so is the penalty.
    """

    positive: tuple[float, float]  # the range for an advantage above 0
    negative: tuple[float, float]  # for all others
    outside: Literal["drop", "hold"]  # weight outside of the range: 0, or that on the nearer bound ("ratio" alone)
    measure: Literal["ratio", "tv", "kl"] = "ratio"
    max_weight: float = math.inf
    penalty: float = 0.0


class ObjectiveKey(NamedTuple):
    """How an operator takes an objective: as a string and floats, because it takes no objects."""

    name: str  # "module:qualname" of a class that is rebuilt from its parameters, or "own"
    parameters: tuple[float, ...]  # `packed_parameters`; () where they cannot be read (fakes)


class Objective:
    """Base of all objectives.

    NaN in a log-probability (old, current, or reference with `beta`) makes its log-ratio NaN. `terms` decides which
    gradients become NaN: `at_most` and `within` let NaN reach them, torch.clamp does not.

    A frozen dataclass at the top of a module, whose fields are all `float`, `float | None` or a `Literal` of strings,
    works under torch.compile(fullgraph=True) from hidden states as well; another value of a float recompiles nothing.
    From hidden states it is rebuilt from its fields, so `__post_init__` runs a second time, on the values that it left.

    Attributes:
        ratio_of: what has a ratio, "sequence" or "token": the unit that `stats` counts.
        advantages_per_token: whether an advantage per token makes sense; `terms` then always gets [tokens].
        aggregation: the default of `aggregation=`.
        depends_on: what the term of a token depends on: that "token" alone, its "sequence", or the whole "batch", which
            is always right. From hidden states a loss is computed in chunks, and a narrower value avoids computing
            logits twice. If `terms` depends on more than is declared, gradients are wrong. A class that defines `terms`
            does not inherit this, `known_on_policy` or `by_sequence_alone`: declare them again.
        uses_logprobs: whether `terms` reads `tokens.logprobs`, `tokens.old_logprobs`, `tokens.entropy` or
            `tokens.rollout_logprobs`.
        known_on_policy: whether the gradient where every ratio is 1 is the same whatever the log-probabilities are, as
            is always true without `uses_logprobs`. An on-policy loss then takes one pass over the logits. (Not with
            `rollout_logprobs=`.) If it is declared and not true, gradients are wrong.
        uses_rollout_logprobs: whether `terms` reads `tokens.rollout_logprobs`. `rollout_logprobs=` is refused if not.
        needs_advantage: whether a token of advantage 0 has neither a loss nor a gradient, as where both are multiplied
            by it, and changes those of no other token. `skip_zero_advantage=` is refused if not.
        by_sequence_alone: whether `terms` is computed from sums over each sequence alone, and `ratio_of` is "sequence".
            Context parallelism then needs no collective in the backward.
        triton_term: `terms` in Triton's language (see `TritonTerm`): a GPU then runs the loss in four launches. None:
            `terms` runs there, in torch. A class that defines `terms`, `ratio_of`, `sequence_value` or `uses_logprobs`
            does not inherit it.
        sequence_value: for a `triton_term` with a ratio per token: what the value of a token's log-ratio is, where the
            gradient is the token's own: the "mean" (GSPO-token) or the "sum" (TOPR) over its sequence. None: its own.
        triton_hold: with `sequence_value`: what is averaged, if it is not the log-ratio (GMPO; see `TritonHold`).
    """

    ratio_of: ClassVar[str] = "token"
    advantages_per_token: ClassVar[bool] = True
    aggregation: ClassVar[str] = "sequence_mean"
    depends_on: ClassVar[str] = "batch"
    uses_logprobs: ClassVar[bool] = False
    known_on_policy: ClassVar[bool] = False
    uses_rollout_logprobs: ClassVar[bool] = False
    needs_advantage: ClassVar[bool] = True
    by_sequence_alone: ClassVar[bool] = False
    triton_term: ClassVar[TritonTerm | None] = None
    sequence_value: ClassVar[str | None] = None
    triton_hold: ClassVar[TritonHold | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_class(cls)
        overridden = min(_depth(cls, name) for name in ("terms", "ratio_of", "sequence_value", "uses_logprobs"))
        if overridden < _depth(cls, "triton_term"):
            cls.triton_term = None
        if overridden < _depth(cls, "row_slope"):
            cls.row_slope = Objective.row_slope  # type: ignore[method-assign]
        for name in ("depends_on", "known_on_policy", "by_sequence_alone"):  # what other terms need not keep
            if _depth(cls, "terms") < _depth(cls, name):
                setattr(cls, name, getattr(Objective, name))

    def terms(self, tokens: TokenBatch) -> Terms:
        """The loss of each unit, in torch operators that are differentiable by `tokens.log_ratio`."""
        raise NotImplementedError(f"{type(self).__name__}.terms: expected a method terms(self, tokens); got none")

    def row_slope(self) -> RowSlope | None:
        """The gradient of a token's loss, if it depends on that token alone and has this form; else None.

        The CUDA kernels then write a row's gradient while they read the row.
        """
        return None

    def packed_parameters(self) -> tuple[float, ...] | None:
        """The fields in order as floats: None as NaN, a choice as its position; None if they do not rebuild it."""
        fields, parameters = _packed_fields(type(self)), []
        if fields is None:
            return None
        for name, choices in fields:
            value = getattr(self, name)
            if choices and isinstance(value, str) and value in choices:
                parameters.append(float(choices.index(value)))
            elif not choices and (value is None or isinstance(value, (float, int))):
                parameters.append(math.nan if value is None else value)
            else:
                return None
        return tuple(parameters)

    def packed(self) -> ObjectiveKey:
        """How operators take this objective."""
        parameters = self.packed_parameters()
        return ObjectiveKey(_OWN_NAME, ()) if parameters is None else ObjectiveKey(_name_of(type(self)), parameters)

    @staticmethod
    def unpacked(key: ObjectiveKey) -> Objective:
        """The objective; without parameters (in fakes), an instance that has the class's attributes alone."""
        if key.name == _OWN_NAME:
            return _OWN.get()
        kind = _class_of(key.name)
        fields = _packed_fields(kind)
        assert fields is not None
        if len(key.parameters) != len(fields):
            unread: Objective = object.__new__(kind)
            return unread
        values = {}
        for (name, choices), x in zip(fields, key.parameters, strict=True):
            values[name] = choices[int(x)] if choices else None if math.isnan(x) else x
        rebuilt: Objective = kind(**values)
        return rebuilt


def _depth(kind: type[Objective], attribute: str) -> int:
    """How far up a class inherits an attribute from: 0 where it states the attribute itself."""
    return next(i for i, each in enumerate(kind.__mro__) if attribute in vars(each))


# ---- objectives as arguments of operators

_OWN_NAME = "own"
_OWN: ContextVar[Objective] = ContextVar("own objective")


class _Carried:
    """A context manager that torch.compile can trace."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._before: Token[Objective] | None = None

    def __enter__(self) -> None:
        self._before = _OWN.set(self._objective)

    def __exit__(self, *_: object) -> None:
        assert self._before is not None
        _OWN.reset(self._before)


def carried(objective: Objective) -> AbstractContextManager[Any]:
    """A context in which operators use this object itself, if a name and parameters cannot rebuild it."""
    return _Carried(objective) if objective.packed_parameters() is None else nullcontext()


@constant_while_compiling
def _packed_fields(kind: type[Objective]) -> tuple[tuple[str, tuple[str, ...]], ...] | None:
    """(name, choices of a string) of the fields that rebuild an instance; None if floats and choices alone do not."""
    if _class_of(_name_of(kind)) is not kind:  # defined in a function, or since defined again (in a notebook)
        return None
    return _declared_fields(kind)


@functools.cache
def _declared_fields(kind: type[Objective]) -> tuple[tuple[str, tuple[str, ...]], ...] | None:
    parameters: Any = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return None
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):  # an annotation imported for type checkers alone; an InitVar in Python 3.10
        return None
    found = []
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint = hints[each.name]
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        if not each.init or not (hint in (float, float | None) or (choices and all(type(x) is str for x in choices))):
            return None
        found.append((each.name, choices))
    if inspect.signature(kind).parameters.keys() != {name for name, _ in found}:  # an InitVar, or an own __init__
        return None
    return tuple(found)


@constant_while_compiling
def _name_of(kind: type[Objective]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class_of(name: str) -> Any:
    """The class that now has this name; None if there is none."""
    module, qualname = name.split(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


# ---- checks

_CHOICES = {
    "ratio_of": ("sequence", "token"),
    "depends_on": ("token", "sequence", "batch"),
    "aggregation": AGGREGATIONS,
    "sequence_value": ("mean", "sum"),
}  # fmt: skip
_FLAGS = (
    "advantages_per_token", "uses_logprobs", "known_on_policy", "uses_rollout_logprobs", "needs_advantage",
    "by_sequence_alone",
)  # fmt: skip
_FIELDS = (
    ("loss", torch.float64), ("log_ratio", torch.float64), ("clipped_low", torch.bool), ("clipped_high", torch.bool)
)  # fmt: skip


_KNOWN = (*_CHOICES, *_FLAGS, "triton_term", "triton_hold")


def check_class(kind: type[Objective]) -> None:
    """Refuses, where a class is defined, attributes whose names are misspelt and `terms` with other arguments."""
    stated = vars(kind)
    for name, value in stated.items():
        if name.startswith("_") or name in _KNOWN or inspect.isroutine(value):
            continue
        meant = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.85)
        if not meant and "ClassVar" in str(stated.get("__annotations__", {}).get(name, "ClassVar")):  # not a field
            meant = [known for known, allowed in _CHOICES.items() if isinstance(value, str) and value in allowed]
        if meant:
            raise TypeError(
                f"{kind.__name__}: expected {' or '.join(meant)}; got {name} = {value!r}, which no Objective has and "
                "which would be ignored. An attribute of your own is a field of a dataclass, or begins with _"
            )
    term, terms = stated.get("triton_term"), stated.get("terms")
    for name, kind_of_function in (("triton_term", TritonTerm), ("triton_hold", TritonHold)):
        function = stated.get(name)
        if function is not None and not isinstance(function, kind_of_function):
            raise TypeError(
                f"{kind.__name__}.{name}: expected a function under @{kind_of_function.__name__}; got "
                f"{checks.describe(function)}"
            )
    if term is not None and not kind.uses_logprobs and term.reads_logprobs():
        raise TypeError(f"{kind.__name__}.uses_logprobs: expected True, because triton_term reads them; got False")
    if inspect.isfunction(terms):
        signature = inspect.signature(terms)
        try:
            signature.bind("self", "tokens")
        except TypeError:
            raise TypeError(
                f"{kind.__name__}.terms: expected terms(self, tokens), where tokens is a TokenBatch with log_ratio, "
                f"advantages, layout and max_log_ratio; got terms{signature}"
            ) from None


def check_objective(objective: Any) -> None:
    """Refuses what is no objective, and misspelt attributes: the loss would be computed as something else."""
    if not isinstance(objective, Objective):
        got = f"the class {objective.__name__}" if isinstance(objective, type) else checks.describe(objective)
        raise TypeError(f"objective: expected an Objective such as GSPO(); got {got}")
    name = type(objective).__name__
    for attribute, allowed in _CHOICES.items():
        value = getattr(objective, attribute)
        if attribute != "sequence_value" or value is not None:
            checks.choice(f"{name}.{attribute}", value, allowed)
    for attribute in _FLAGS:
        value = getattr(objective, attribute)
        if not isinstance(value, bool):
            raise TypeError(f"{name}.{attribute}: expected True or False; got {checks.describe(value)}")
    if objective.uses_rollout_logprobs and not objective.uses_logprobs:
        raise ValueError(f"{name}.uses_logprobs: expected True, because uses_rollout_logprobs is True; got False")
    if objective.by_sequence_alone and objective.ratio_of != "sequence":
        raise ValueError(f"{name}.by_sequence_alone: expected False, because ratio_of is 'token'; got True")


def check_terms(objective: Objective, terms: Any, *, tokens: int, sequences: int) -> None:
    """Refuses a result of `terms` that is not as `Terms` says: shapes that broadcast would give another loss."""
    name = f"{type(objective).__name__}.terms"
    if not isinstance(terms, Terms):
        raise TypeError(f"{name}: expected it to return Terms; got {checks.describe(terms)}")
    shape = (sequences if objective.ratio_of == "sequence" else tokens,)
    meaning = f"one per {objective.ratio_of}, because ratio_of is {objective.ratio_of!r}"
    for field, dtype in _FIELDS:
        value = getattr(terms, field)
        if value is None and dtype == torch.bool:
            continue
        checks.tensor(f"{name}: {field}", value, meaning)
        checks.shape(f"{name}: {field}", value, shape, meaning)
        if value.dtype != dtype:
            raise TypeError(f"{name}: {field}: expected {dtype}, {meaning}; got {value.dtype}")


# ---- what `terms` may use


def at_most(values: Tensor, bound: Tensor | float) -> Tensor:
    """`values`, held at `bound` above it: no gradient there. On the bound the gradient flows, and NaN stays NaN.

    torch.clamp hides NaN from the gradient, and halves it on the bound since torch 2.14.
    """
    return torch.where(values > bound, bound, values)


def within(values: Tensor, bound: Tensor | float) -> Tensor:
    """`at_most` on both sides: from `-bound` to `bound`."""
    return torch.where(values < -bound, -bound, at_most(values, bound))
