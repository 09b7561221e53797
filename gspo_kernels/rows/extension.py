"""Why the C++ extension, `gspo_kernels._native`, could not be imported, and what to do about it."""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def why_missing(error: ImportError, package: Path = _PACKAGE) -> str:
    """One sentence, for `explain`, warnings and errors. `error` is what importing the extension raised."""
    usable = _extension_of(package)
    if usable is not None:
        return (
            f"the C++ extension {usable} does not load ({error}); reinstall gspo_kernels to compile it for this machine"
        )
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
