"""A field's comment, as in `loss: Tensor  # 0-d`, is its text in the reference unless it has a docstring."""

from __future__ import annotations

import functools
import tokenize
from pathlib import Path
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lineno is not None and isinstance(attr.filepath, Path):
            lines = range(attr.lineno, (attr.endlineno or attr.lineno) + 1)
            found = " ".join(filter(None, map(comments_of(attr.filepath).get, lines)))
            if found:
                attr.docstring = griffe.Docstring(found, lineno=attr.lineno, parent=attr)


@functools.cache
def comments_of(path: Path) -> dict[int, str]:
    with path.open("rb") as source:
        tokens = [token for token in tokenize.tokenize(source.readline) if token.type == tokenize.COMMENT]
    return {token.start[0]: token.string.lstrip("# ") for token in tokens}
