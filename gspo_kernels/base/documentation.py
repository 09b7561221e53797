"""One documented list of arguments for every function that takes them: `help` shows all arguments of a named loss.

`policy_loss` documents its arguments in groups, each under a line such as `Args: parallel`. A named loss passes
`**options` on and documents none of them; the decorator here gives it the whole signature and the missing paragraphs.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
_GROUP = re.compile(r"Args: (.+)")
_ARGUMENTS = re.compile(r"    (\w+(?:, \w+)*): ")


def with_arguments_of(source: Callable[..., Any], extra: str = "") -> Callable[[Function], Function]:
    """A decorator that adds what a function's `**options` stand for to its signature and its docstring.

    Args:
        source: takes these options by keyword and documents them. Its `objective` is left out.
        extra: more documented arguments, in the same form.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        if len(parameters) < len(signature.parameters):
            taken = {"objective", *signature.parameters}
            passed_on = [p for p in inspect.signature(source).parameters.values() if p.kind == p.KEYWORD_ONLY]
            parameters += [p for p in passed_on if p.name not in taken]
            function.__dict__["__signature__"] = signature.replace(parameters=parameters)
        if function.__doc__ and source.__doc__:  # not under python -OO
            function.__doc__ = _merged(function.__doc__, [extra, source.__doc__], {p.name for p in parameters})
        return function

    return decorate


def documented_arguments(docstring: str) -> dict[str, str]:
    """The group of each argument, by name."""
    _, groups, _ = _parsed(docstring)
    return {name: title for title, entries in groups.items() for names in entries for name in names.split(", ")}


def _merged(docstring: str, sources: list[str], names: set[str]) -> str:
    """The docstring with the paragraphs on `names` that it does not have itself, in the groups of the sources."""
    before, found, after = _parsed(docstring)
    own = dict(found)
    missing = names - documented_arguments(docstring).keys()
    groups: dict[str, list[str]] = {}
    for title, entries in [item for source in sources for item in _parsed(source)[1].items()]:
        groups.setdefault(title, [*own.pop(title, {}).values()])
        groups[title] += [text for listed, text in entries.items() if missing & set(listed.split(", "))]
    paragraphs = [f"Args: {title}\n" + "\n".join(texts) for title, texts in groups.items() if texts]
    kept = [f"Args: {title}\n" + "\n".join(entries.values()) for title, entries in own.items()]
    return "\n\n".join(part for part in (before, *kept, *paragraphs, after) if part) + "\n"


@functools.cache
def _parsed(docstring: str) -> tuple[str, dict[str, dict[str, str]], str]:
    """The text before the groups, each group's paragraphs by the names they explain, and the text after."""
    groups: dict[str, dict[str, str]] = {}
    around: tuple[list[str], list[str]] = ([], [])
    title = names = None
    for line in inspect.cleandoc(docstring).splitlines():
        if group := _GROUP.fullmatch(line):
            title, names = group[1], None
            groups[title] = {}
        elif title is not None and line.startswith("    "):
            if entry := _ARGUMENTS.match(line):
                names = entry[1]
                groups[title][names] = line
            elif names is not None:
                groups[title][names] += f"\n{line}"
        elif title is None or line:
            title = None
            around[1 if groups else 0].append(line)
    return "\n".join(around[0]).strip(), groups, "\n".join(around[1]).strip()
