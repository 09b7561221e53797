"""How the package's docstrings are read for the reference.

- A field's comment, as in `loss: Tensor  # 0-d`, is its text unless it has a docstring.
- `Returns: some text` and `Raises: some text` may begin on the same line; Google's style has the text below.
- A function under `@with_arguments_of(source)` shows the keyword arguments of the source in place of its `**options`.
"""

from __future__ import annotations

import functools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

KEYWORD_ONLY, VAR_KEYWORD = griffe.ParameterKind.keyword_only, griffe.ParameterKind.var_keyword


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Raises: (?=\S)", "**Raises:** ", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^Returns: (?=\S)", "Returns:\n    ", text, flags=re.MULTILINE)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lineno is not None and isinstance(attr.filepath, Path):
            lines = range(attr.lineno, (attr.endlineno or attr.lineno) + 1)
            found = " ".join(filter(None, map(comments_of(attr.filepath).get, lines)))
            if found:
                attr.docstring = griffe.Docstring(found, lineno=attr.lineno, parent=attr)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for function in functions_of(pkg):
            options = [parameter for parameter in function.parameters if parameter.kind is VAR_KEYWORD]
            calls = [re.match(r"with_arguments_of\((\w+)", str(each.value)) for each in function.decorators]
            for source in [function.parent[call[1]] for call in calls if call and options]:
                del function.parameters["options"]
                for parameter in source.parameters:
                    if parameter.kind is KEYWORD_ONLY and parameter.name not in (*names(function), "objective"):
                        function.parameters.add(parameter)


def functions_of(module: griffe.Module) -> Iterator[griffe.Function]:
    own = [member for member in module.members.values() if not member.is_alias]
    yield from (member for member in own if isinstance(member, griffe.Function))
    for member in own:
        if isinstance(member, griffe.Module):
            yield from functions_of(member)


def names(function: griffe.Function) -> list[str]:
    return [parameter.name for parameter in function.parameters]


@functools.cache
def comments_of(path: Path) -> dict[int, str]:
    with path.open("rb") as source:
        tokens = [token for token in tokenize.tokenize(source.readline) if token.type == tokenize.COMMENT]
    return {token.start[0]: token.string.lstrip("# ") for token in tokens}
