"""How the package's docstrings are read for the reference.

- A field's comment, as in `loss: Tensor  # 0-d`, is its text unless it has a docstring.
- `Returns: some text` and `Raises: some text` may begin on the same line; Google's style has the text below.
"""

from __future__ import annotations

import functools
import re
import tokenize
from pathlib import Path
from typing import Any

import griffe


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


@functools.cache
def comments_of(path: Path) -> dict[int, str]:
    with path.open("rb") as source:
        tokens = [token for token in tokenize.tokenize(source.readline) if token.type == tokenize.COMMENT]
    return {token.start[0]: token.string.lstrip("# ") for token in tokens}
