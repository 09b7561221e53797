"""Empty modules in place of packages that a trainer imports, that need a GPU, and that are not called here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Empty(ModuleType):
    """Every name in it is a class without members."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def stubs(*names: str) -> Iterator[None]:
    """These modules, and the packages above them, are empty meanwhile, unless the package is installed."""
    missing = [name for name in names if find_spec(name.partition(".")[0]) is None]
    parents = {name.rpartition(".")[0] for name in missing if "." in name}
    added = {name: _Empty(name) for name in sorted(parents | {name.partition(".")[0] for name in missing} | {*missing})}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
