"""Which implementation runs: the first of the list that takes the logits, or the one the caller names."""

from __future__ import annotations

import functools
import warnings
from typing import Protocol

from torch import Tensor

from .. import checks
from . import native, reference, triton_rows
from .rows import Rows, RowStats, Upstream


class Backend(Protocol):
    """One implementation of the row work; a module with these names."""

    name: str

    def about(self) -> str: ...
    def unsupported_reasons(self, logits: Tensor) -> list[str]: ...
    def forward(self, rows: Rows) -> RowStats: ...
    def backward(self, rows: Rows, stats: RowStats, upstream: Upstream, gradient: Tensor) -> None: ...
    def forward_backward(self, rows: Rows, upstream: Upstream, gradient: Tensor) -> RowStats: ...
    def scale(self, values: Tensor, factor: Tensor) -> None: ...


BACKENDS: tuple[Backend, ...] = (triton_rows, native, reference)  # the first that can; the last takes everything
NAMES = tuple(backend.name for backend in BACKENDS)


def check_name(backend: str | None) -> None:
    if backend is not None:
        checks.choice("backend", backend, NAMES)


def choose(logits: Tensor, backend: str | None) -> Backend:
    """The backend to run. Raises ValueError with every reason if the one named cannot take these logits."""
    chosen = _pick(logits, backend)
    if backend is None and chosen is reference:
        missing = native.missing() if logits.device.type == "cpu" else triton_rows.missing()
        if missing:
            _warn_of_missing_kernels(missing)
    return chosen


def _pick(logits: Tensor, backend: str | None) -> Backend:
    if backend is None:
        return next(candidate for candidate in BACKENDS if not candidate.unsupported_reasons(logits))
    chosen = BACKENDS[NAMES.index(backend)]
    reasons = chosen.unsupported_reasons(logits)
    if reasons:
        raise ValueError(f"backend: expected one that takes these logits; got {backend!r}, but {'; '.join(reasons)}")
    return chosen


@functools.cache
def _warn_of_missing_kernels(missing: str) -> None:
    warnings.warn(f"gspo_kernels runs on plain torch, many times slower: {missing}", stacklevel=2)


def compare(logits: Tensor, backend: str | None) -> str:
    """Which backend runs for these logits, and why not the others."""
    chosen = _pick(logits, backend)
    why = "as asked" if backend is not None else "the first that takes these logits"
    lines = [f"{chosen.name} ({chosen.about()}): runs, {why}"]
    for other in BACKENDS:
        if other is chosen:
            continue
        reasons = other.unsupported_reasons(logits)
        lines.append(f"{other.name} ({other.about()}): {'; '.join(reasons) if reasons else 'could run, not chosen'}")
    return "\n".join(lines)
