"""Modules that can be imported for a while: of packages that a trainer imports and does not call here, and of trainers
that are not on PyPI.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Empty(ModuleType):
    """Every name in it is a class without members, but for those that it is given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def modules(contents: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """What each module contains, by its name, in place of an installed one. Packages above it are added if missing."""
    names = set(contents)
    for name in contents:
        if find_spec(name.partition(".")[0]) is None:
            names |= {name[:i] for i, letter in enumerate(name) if letter == "."}
    added = {name: _Empty(name) for name in sorted(names)}
    for name, content in contents.items():
        vars(added[name]).update(content)
    before = {name: sys.modules[name] for name in added if name in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
        sys.modules.update(before)


def stubs(*names: str) -> AbstractContextManager[None]:
    """Empty modules of these names, unless their package is installed."""
    return modules({name: {} for name in names if find_spec(name.partition(".")[0]) is None})
