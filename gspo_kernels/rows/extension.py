"""The C++ extension, `gspo_kernels._native`: how it takes rows, and why it could not be imported."""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .types import Rows, RowStats

_PACKAGE = Path(__file__).resolve().parent.parent

# ---- arguments of its kernels

KERNEL_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def address(array: Tensor | None) -> int:
    return 0 if array is None else array.data_ptr()


def view(numbers: Tensor) -> tuple[int, int, int]:
    """Address and strides of [outer, inner, vocab] numbers."""
    outer, inner, _ = numbers.stride()
    return numbers.data_ptr(), outer, inner


def row_arguments(rows: Rows) -> dict[str, Any]:
    """In the order in which the kernels read them (csrc/row_arguments.h): any order works, and this one is fastest."""
    outer, inner = rows.token_ids.shape
    per_row = rows.temperature.ndim > 0
    return {
        "dtype": KERNEL_DTYPES[rows.logits.dtype],
        "outer": outer,
        "inner": inner,
        "vocab": rows.vocab_size,
        "logits": view(rows.logits),
        "token_ids": rows.token_ids.data_ptr(),
        "mask": address(rows.mask),
        "temperature": 1.0 if per_row else float(rows.temperature),  # a CPU tensor: reading it waits for nothing
        "row_temperature": address(rows.temperature if per_row else None),
        "tanh_scale": 0.0 if rows.tanh_scale is None else float(rows.tanh_scale),
    }


def stats_addresses(stats: RowStats) -> dict[str, int]:
    return {name: array.data_ptr() for name, array in stats._asdict().items()}


# ---- why it is missing


def why_missing(error: ImportError, package: Path = _PACKAGE) -> str:
    """One sentence, for `explain`, warnings and errors. `error` is what importing the extension raised."""
    usable = _extension_of(package)
    if usable is not None:
        return (
            f"the C++ extension {usable} does not load ({error}); reinstall gspo_kernels to compile it for this machine"
        )
    if (package / "metadata.json").exists():  # written by hub/write.py
        return "kernels of the Hugging Face hub have no C++ extension; pip install gspo-kernels has it"
    found = f"the C++ extension is not in {package}"
    others = sorted(path.name for path in package.glob("_native*") if path.suffix in (".so", ".pyd"))
    if others:
        found += f", which has {', '.join(others)} but no {' or '.join(_names())} for this Python"
    else:
        found += f" (no {' or '.join(_names())})"
    installed = _installed_elsewhere(package)
    if installed is not None:
        return (
            f"{found}; the copy installed in {installed} has it, but this one comes first in sys.path: run Python from "
            f"another directory, or compile it here (pip install --editable {package.parent})"
        )
    if (package.parent / "setup.py").exists():
        return f"{found}, a source tree; compile it there: pip install --editable {package.parent}"
    return f"{found}; this installation was made without it: reinstall with a C++17 compiler (GCC or Clang) present"


def _names() -> list[str]:
    """The files that Python looks for, the most specific first."""
    return [f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]


def _extension_of(package: Path) -> Path | None:
    return next((package / name for name in _names() if (package / name).exists()), None)


def _installed_elsewhere(package: Path) -> Path | None:
    """Another copy of this package in `sys.path` that has the extension."""
    copies = (Path(entry or ".").resolve() / package.name for entry in sys.path)
    return next((copy for copy in copies if copy != package and _extension_of(copy) is not None), None)
