"""Modules that trainers import on their way to a function that does not need them, such as engines for GPUs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock


class _Empty(ModuleType):
    """Has every name, as a class of its own."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def stubs(*names: str) -> Iterator[None]:
    """Empty modules of these names, while a trainer is imported."""
    modules = {name: _Empty(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    with mock.patch.dict(sys.modules):
        sys.modules.update(modules)
        before = set(sys.modules)
        yield
        kept = {name: module for name, module in sys.modules.items() if name not in before}
    sys.modules.update(kept)  # of the trainer, and what it imports
