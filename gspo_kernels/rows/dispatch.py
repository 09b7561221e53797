"""Which implementation runs: the one the caller names, or the first of the list that takes the logits.

The CUDA kernels are asked only on GPUs where they were measured to be faster.
"""

from __future__ import annotations

import functools
import warnings
from typing import Protocol

from torch import Tensor

from .. import checks
from ..devices import check_float64
from . import cpu_rows, cuda_rows, torch_rows, triton_rows
from .types import Rows, RowStats, TokenClip, Upstream


class Backend(Protocol):
    """One implementation of the row work; a module with these names."""

    name: str
    runs_stage_in_triton: bool  # whether Triton runs beside it, and with it the token stage
    clips_rows: bool  # whether `forward_backward` supports `clip`

    def about(self) -> str: ...
    def unsupported_reasons(self, logits: Tensor) -> list[str]: ...
    def forward(self, rows: Rows) -> RowStats: ...
    def backward(self, rows: Rows, stats: RowStats, upstream: Upstream, gradient: Tensor) -> None: ...
    def forward_backward(
        self, rows: Rows, upstream: Upstream, gradient: Tensor, clip: TokenClip | None = None
    ) -> RowStats: ...
    def scale(self, values: Tensor, factor: Tensor) -> None: ...


BACKENDS: tuple[Backend, ...] = (cuda_rows, triton_rows, cpu_rows, torch_rows)  # the last takes everything
NAMES = tuple(backend.name for backend in BACKENDS)


def check_name(backend: str | None) -> None:
    if backend is not None:
        checks.choice("backend", backend, NAMES)


def choose(logits: Tensor, backend: str | None) -> Backend:
    """The backend to run. Raises ValueError with every reason if the one named cannot take these logits."""
    check_float64(logits.device)
    chosen = _pick(logits, backend)
    if backend is None and chosen is torch_rows:
        missing = _missing(logits.device.type)
        if missing:
            _warn(f"gspo_kernels runs on plain torch, many times slower: {missing}")
    if backend is None and (missing := cuda_rows.missing(logits.device)):
        _warn(f"gspo_kernels does without its CUDA kernels: {missing}")
    return chosen


def by_triton(backend: Backend) -> bool:
    """Whether what is not its own it leaves to Triton."""
    return backend in (triton_rows, cuda_rows)


def _pick(logits: Tensor, backend: str | None) -> Backend:
    if backend is None:
        able = (candidate for candidate in BACKENDS if not candidate.unsupported_reasons(logits))
        return next(each for each in able if each is not cuda_rows or not cuda_rows.not_preferred(logits))
    chosen = BACKENDS[NAMES.index(backend)]
    reasons = chosen.unsupported_reasons(logits)
    if reasons:
        raise ValueError(f"backend: expected one that takes these logits; got {backend!r}, but {'; '.join(reasons)}")
    return chosen


def _missing(device: str) -> str:
    """Why no kernel runs on a type of device; empty if one does. On meta tensors nothing runs."""
    if device == "meta":
        return ""
    if device == "cpu":
        return cpu_rows.missing()
    if device == "cuda":
        return triton_rows.missing()
    return f"logits are on {device}; there are kernels for CPUs, NVIDIA GPUs and AMD GPUs (which torch calls cuda)"


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def compare(logits: Tensor, backend: str | None) -> str:
    """Which backend runs for these logits, and why not the others."""
    chosen = _pick(logits, backend)
    why = "as asked" if backend is not None else "the first that takes these logits"
    lines = [f"{chosen.name} ({chosen.about()}): runs, {why}"]
    for other in BACKENDS:
        if other is chosen:
            continue
        reasons = other.unsupported_reasons(logits)
        if not reasons:
            unmeasured = cuda_rows.not_preferred(logits) if other is cuda_rows else ""
            reasons = [unmeasured or "could run, not chosen"]
        lines.append(f"{other.name} ({other.about()}): {'; '.join(reasons)}")
    return "\n".join(lines)
