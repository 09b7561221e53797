"""Which backend runs: the one that the caller names, or the first of the list that supports the rows.

A public function chooses it once. From there on its name travels, in `RowOptions`, and `by_name` finds it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection
from typing import NamedTuple, Protocol

from torch import Tensor

from ..base import checks
from ..base.devices import check_float64
from ..base.torch_internals import constant_while_compiling
from . import cpu_rows, cuda_rows, torch_rows, triton_rows
from .types import Rows, RowStats, TokenSlope, Upstream


class Backend(Protocol):
    """One implementation of the row work; a module with these names."""

    name: str
    honours: frozenset[str]  # the optional fields of `Rows` that it computes with
    has_kernels: bool  # False: plain torch, many times slower
    runs_stage_in_triton: bool  # whether Triton runs beside it, and with it the token stage of the named losses
    computes_slopes: bool  # whether `forward_backward` supports `slope`

    def describe(self) -> str:
        """What it is made of, and its version."""

    def unsupported_reasons(self, logits: Tensor) -> list[str]:
        """Why it cannot take these logits; empty if it can."""

    def reason_not_default(self, logits: Tensor) -> str:
        """Why it runs only if the caller names it, although it could take these logits; empty if it is a default."""

    def forward(self, rows: Rows) -> RowStats:
        """Statistics of each row."""

    def backward(self, rows: Rows, stats: RowStats, upstream: Upstream, gradient: Tensor) -> None:
        """Writes the gradient of the logits, columns of the padding left out. `stats`: what `forward` returned."""

    def forward_backward(
        self, rows: Rows, upstream: Upstream, gradient: Tensor, slope: TokenSlope | None = None
    ) -> RowStats:
        """Both at once, for an upstream gradient that is known in advance: that of the log-probabilities alone."""

    def scale(self, values: Tensor, factor: Tensor) -> None:
        """Multiplies [outer, inner, columns] values in place by a 0-d tensor."""

    def scaled_logits(self, rows: Rows, logits: Tensor) -> Tensor:
        """One logit of each row, divided by the temperature as in this backend's lse; float64."""


BACKENDS: tuple[Backend, ...] = (cuda_rows, triton_rows, cpu_rows, torch_rows)  # the last supports everything
NAMES = tuple(backend.name for backend in BACKENDS)
_BY_NAME = dict(zip(NAMES, BACKENDS, strict=True))


def check_name(backend: str | None) -> None:
    if backend is not None:
        checks.choice("backend", backend, NAMES)


def by_name(name: str) -> Backend:
    """The backend that `choose` returned; checks nothing."""
    return _BY_NAME[name]


def choose(logits: Tensor, backend: str | None, fields: Collection[str] = (), warn: bool = True) -> Backend:
    """The backend to run. Raises ValueError with every reason if the named one does not support these rows.

    Args:
        fields: optional fields of `Rows` that the backend must honour.
        warn: whether to warn, once, where the default is slower than it could be.
    """
    check_float64(logits.device)
    if backend is not None:
        check_name(backend)
        chosen = by_name(backend)
        if reasons := [*chosen.unsupported_reasons(logits), *_not_honoured(chosen, fields)]:
            listed = "; ".join(reasons)
            raise ValueError(f"backend: expected one that takes these logits; got {backend!r}, but {listed}")
        return chosen
    able = (each for each in BACKENDS if not (_not_honoured(each, fields) or each.unsupported_reasons(logits)))
    chosen = next(each for each in able if not each.reason_not_default(logits))
    if warn and not chosen.has_kernels and (reason := _no_kernels_reason(logits, fields)):
        _warn(f"gspo_kernels runs on plain torch, many times slower: {reason}")
    if warn and (reason := cuda_rows.unavailable_reason(logits.device)):
        _warn(f"gspo_kernels does without its CUDA kernels: {reason}")
    return chosen


def _not_honoured(backend: Backend, fields: Collection[str]) -> list[str]:
    """Why a backend cannot take rows with these fields; empty if it can."""
    reasons = []
    for field in fields:
        if field not in backend.honours:
            able = [repr(other.name) for other in BACKENDS if field in other.honours]
            others = f"{', '.join(able)} do" if len(able) > 1 else f"{(able or ['no backend'])[0]} does"
            reasons.append(f"it does not support {field}; {others}")
    return reasons


def _no_kernels_reason(logits: Tensor, fields: Collection[str]) -> str:
    """Why no kernel runs on a type of device, or with these fields; empty if one does. On meta tensors nothing runs."""
    device = logits.device.type
    for backend in BACKENDS:
        missing = [field for field in fields if field not in backend.honours]
        if missing and backend.has_kernels and not backend.unsupported_reasons(logits):
            return f"{backend.name!r} does not support {', '.join(missing)}"
    if device == "meta":
        return ""
    if device == "cpu":
        return cpu_rows.unavailable_reason()
    if device == "cuda":
        return triton_rows.unavailable_reason()
    return f"logits are on {device}; there are kernels for CPUs, NVIDIA GPUs and AMD GPUs (which torch calls cuda)"


@constant_while_compiling  # a warning is a graph break, which fullgraph=True refuses
def _warn(message: str) -> None:
    _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


class Candidate(NamedTuple):
    backend: Backend
    runs: bool  # whether it is the one that runs
    reason: str  # why, or why not


def candidates(logits: Tensor, backend: str | None, fields: Collection[str] = ()) -> list[Candidate]:
    """The backend that runs for these logits, then the others."""
    chosen = choose(logits, backend, fields, warn=False)
    found = [Candidate(chosen, True, "as requested" if backend is not None else "the first that takes these logits")]
    for other in BACKENDS:
        if other is not chosen:
            reasons = [*other.unsupported_reasons(logits), *_not_honoured(other, fields)]
            reasons = reasons or [other.reason_not_default(logits) or "could run, not chosen"]
            found.append(Candidate(other, False, "; ".join(reasons)))
    return found


def compare(logits: Tensor, backend: str | None, fields: Collection[str] = ()) -> str:
    """Which backend runs for these logits, and why the others do not."""
    return "\n".join(
        f"{each.name} ({each.describe()}): {'runs, ' * runs}{reason}"
        for each, runs, reason in candidates(logits, backend, fields)
    )
