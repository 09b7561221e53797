"""What a loss is: an objective turns log-ratios and advantages into one number per token or sequence.

Write your own by subclassing `Objective`: one method, `terms`. Gradients come from autograd, so keep values that should
not be differentiated detached, and guard before an unsafe operation (`at_most` before exp): then so is the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import typing
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import Layout
from .reduction import AGGREGATIONS
from .triton_term import TritonTerm


class TokenValues(NamedTuple):
    """What is known of each token once its logits have been read; [tokens] float64, 0 where masked."""

    logprobs: Tensor  # differentiable
    old_logprobs: Tensor  # constant; on-policy `logprobs.detach()`
    entropy: Tensor | None  # constant; None where the caller has none


@dataclass(frozen=True)
class TokenBatch:
    """What `Objective.terms` is computed from. Token arrays are [tokens] in float64, 0 where masked.

    `logprobs`, `old_logprobs` and `entropy` are there for objectives that declare `uses_logprobs`.
    """

    log_ratio: Tensor  # [tokens], `log pi(y_t) - log pi_old(y_t)`, finite; differentiable
    advantages: Tensor  # [tokens] if the objective's `advantages_per_token`, else [sequences]
    layout: Layout  # sums, means and spreads over sequences; `layout.mask` is [tokens]
    max_log_ratio: Tensor  # 0-d: above it a ratio saturates, which is constant and has no gradient
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

    def _declared(self, name: str) -> TokenValues:
        if self.values is None:
            raise RuntimeError(
                f"tokens.{name}: expected an objective that declares it; got one whose uses_logprobs is False. Add "
                "`uses_logprobs: ClassVar[bool] = True` to its class: on-policy the loss then takes two passes"
            )
        return self.values


@dataclass(frozen=True)
class Terms:
    """An objective's result. A unit is what has a ratio: a sequence or a token."""

    loss: Tensor  # per unit, to be minimised; before weights, KL, entropy and aggregation. A sequence's: for each token
    log_ratio: Tensor  # per unit: log of its importance ratio
    clipped_low: Tensor | None = None  # bool per unit: held at the lower bound, no gradient
    clipped_high: Tensor | None = None  # bool per unit: held at an upper bound, no gradient


class RowClip(NamedTuple):
    """The range of the ratio in which a token has a gradient."""

    eps_low: float  # down to 1 - eps_low for a negative advantage
    eps_high: float  # up to 1 + eps_high for a positive one
    dual_clip: float  # up to this for a negative one; infinity for none


class ObjectiveKey(NamedTuple):
    """How an objective travels through an operator, which takes strings and floats but no objects."""

    name: str  # "module:qualname" of a class that is rebuilt from its parameters, or "own"
    parameters: tuple[float, ...]  # the fields in order, None as NaN; () where they cannot be read (fakes)

    @property
    def is_own(self) -> bool:
        """Whether the object itself has to be carried beside the operator: see `carried`."""
        return self.name == _OWN_NAME


class Objective:
    """Base of all objectives.

    NaN in a log-probability (old, current, or reference with `beta`) makes its log-ratio NaN. Which gradients become
    NaN is what `terms` makes of that; torch.clamp would hide it from them.

    A frozen dataclass at the top of a module, whose fields are all `float` or `float | None`, works under
    torch.compile(fullgraph=True) from hidden states as well; changing a field's value recompiles nothing.

    Attributes:
        ratio_of: what has a ratio, "sequence" or "token": the unit that `stats` counts.
        advantages_per_token: whether an advantage per token makes sense; `terms` then always gets [tokens].
        aggregation: the default of `aggregation=`.
        depends_on: what `terms` of a token depends on: that "token" alone, its "sequence", or the whole "batch", which
            is always right. From hidden states a loss is computed in parts, and the less its terms depend on, the less
            is recomputed. If `terms` depends on more than is declared, gradients are wrong.
        uses_logprobs: whether `terms` reads `tokens.logprobs`, `tokens.old_logprobs` or `tokens.entropy`. A loss that
            reads the log-ratio alone has a gradient that is known on-policy before any logit is read.
        by_sequence_alone: whether `terms` come from sums over each sequence and nothing else, and `ratio_of` is
            "sequence". Under context parallelism the gradient through a sum then crosses no ranks.
        triton_term: `terms` in Triton's language (see `TritonTerm`), which a GPU runs in one kernel with everything
            else that has one number per token. None: `terms` runs there, in torch. A class that overrides `terms` or
            says otherwise what a ratio is inherits no term; it states its own.
        sequence_value: for `triton_term` with a ratio per token: whether its value is the sequence's mean log-ratio,
            and only its gradient the token's (GSPO-token).
    """

    ratio_of: ClassVar[str] = "token"
    advantages_per_token: ClassVar[bool] = True
    aggregation: ClassVar[str] = "sequence_mean"
    depends_on: ClassVar[str] = "batch"
    uses_logprobs: ClassVar[bool] = False
    by_sequence_alone: ClassVar[bool] = False
    triton_term: ClassVar[TritonTerm | None] = None
    sequence_value: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        stated = vars(cls)
        if not stated.keys().isdisjoint(("terms", "ratio_of", "sequence_value", "uses_logprobs")):
            if "triton_term" not in stated:
                cls.triton_term = None
            if "row_clip" not in stated:
                cls.row_clip = Objective.row_clip  # type: ignore[method-assign]

    def terms(self, tokens: TokenBatch) -> Terms:
        """The loss of each unit, in torch operators that are differentiable by `tokens.log_ratio`."""
        raise NotImplementedError

    def row_clip(self) -> RowClip | None:
        """For a loss that is proportional to the token's advantage and clips the token's ratio: its bounds.

        A kernel then computes its gradient from that at ratio 1 while it reads the row: no gradient where clipped,
        else multiplied by the ratio. `triton_term` computes the loss for advantages of 1 and -1.
        """
        return None

    def packed_parameters(self) -> tuple[float, ...] | None:
        """The fields in order, None as NaN; None if floats alone do not rebuild the objective."""
        fields, parameters = _float_fields(type(self)), []
        if fields is None:
            return None
        for name, _ in fields:
            value = getattr(self, name)
            if not (value is None or isinstance(value, (float, int))):
                return None
            parameters.append(math.nan if value is None else value)
        return tuple(parameters)

    def packed(self) -> ObjectiveKey:
        parameters = self.packed_parameters()
        return ObjectiveKey(_OWN_NAME, ()) if parameters is None else ObjectiveKey(_name_of(type(self)), parameters)

    @staticmethod
    def unpacked(key: ObjectiveKey) -> Objective:
        """The objective; where no parameter can be read, an instance of which only the class's attributes are set."""
        if key.is_own:
            return _OWN.get()
        kind = _class_of(key.name)
        fields = _float_fields(kind)
        if len(key.parameters) != len(fields):
            unread: Objective = object.__new__(kind)
            return unread
        of_fields = zip(fields, key.parameters, strict=True)
        rebuilt: Objective = kind(*(None if optional and math.isnan(x) else x for (_, optional), x in of_fields))
        return rebuilt


# ---- how objectives travel

_OWN_NAME = "own"
_OWN: ContextVar[Objective] = ContextVar("own objective")


class _Carried:
    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._before: Token[Objective] | None = None

    def __enter__(self) -> None:
        self._before = _OWN.set(self._objective)

    def __exit__(self, *_: object) -> None:
        assert self._before is not None
        _OWN.reset(self._before)


def carried(objective: Objective) -> AbstractContextManager[Any]:
    """Within it operators get this very object, if it has no name and parameters to be rebuilt from."""
    return _Carried(objective) if objective.packed().is_own else nullcontext()


@torch.compiler.assume_constant_result
def _float_fields(kind: type[Objective]) -> tuple[tuple[str, bool], ...] | None:
    """(name, whether it may be None) of the fields that rebuild an instance; None if floats alone do not."""
    return _found_fields(kind)  # type: ignore[arg-type]


@functools.cache
def _found_fields(kind: type[Objective]) -> tuple[tuple[str, bool], ...] | None:
    parameters: Any = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return None
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    hints = typing.get_type_hints(kind) if found is kind else {}
    optional = {float: False, float | None: True}
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if found is not kind or not all(each.init and hints[each.name] in optional for each in fields):
        return None
    return tuple((each.name, optional[hints[each.name]]) for each in fields)


@torch.compiler.assume_constant_result
def _name_of(kind: type[Objective]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


@functools.cache
def _class_of(name: str) -> Any:
    module, qualname = name.split(":")
    return functools.reduce(getattr, qualname.split("."), sys.modules[module])


# ---- checks

_CHOICES = {
    "ratio_of": ("sequence", "token"),
    "depends_on": ("token", "sequence", "batch"),
    "aggregation": AGGREGATIONS,
}  # fmt: skip
_FLAGS = ("advantages_per_token", "uses_logprobs", "by_sequence_alone", "sequence_value")
_FIELDS = (
    ("loss", torch.float64), ("log_ratio", torch.float64), ("clipped_low", torch.bool), ("clipped_high", torch.bool)
)  # fmt: skip


def check_objective(objective: Any) -> None:
    """Refuses what is no objective, and misspelt attributes: the loss would be computed as something else."""
    if not isinstance(objective, Objective):
        got = f"the class {objective.__name__}" if isinstance(objective, type) else checks.describe(objective)
        raise TypeError(f"objective: expected an Objective such as GSPO(); got {got}")
    name = type(objective).__name__
    for attribute, allowed in _CHOICES.items():
        checks.choice(f"{name}.{attribute}", getattr(objective, attribute), allowed)
    for attribute in _FLAGS:
        value = getattr(objective, attribute)
        if not isinstance(value, bool):
            raise TypeError(f"{name}.{attribute}: expected True or False; got {checks.describe(value)}")
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
