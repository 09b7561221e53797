"""The table of objectives in README.md and docs/objectives.md, made from the classes. This command rewrites it:

    python docs/scripts/objective_table.py

A class begins its docstring with one sentence, `Name: what it does (arXiv 1234.56789).`; all else is in its attributes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import gspo_kernels
from gspo_kernels import Objective

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "objectives.md")
BEGIN, END = "<!-- objectives: begin, by python docs/scripts/objective_table.py -->", "<!-- objectives: end -->"


def objectives() -> list[type[Objective]]:
    """Those of the package that need no argument, in the order of the source."""
    public = [getattr(gspo_kernels, name) for name in gspo_kernels.__all__]
    found = [kind for kind in public if inspect.isclass(kind) and issubclass(kind, Objective) and kind is not Objective]
    losses = [kind for kind in found if all(has_default(field) for field in dataclasses.fields(kind))]
    return sorted(losses, key=lambda kind: (kind.__module__, inspect.getsourcelines(kind)[1]))


def has_default(field: dataclasses.Field[object]) -> bool:
    return field.default is not dataclasses.MISSING


def table(kinds: list[type[Objective]]) -> str:
    head = "| objective | | ratio | defaults | `aggregation` | paper |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(f"| {' | '.join(cells(kind))} |" for kind in kinds)


def cells(kind: type[Objective]) -> tuple[str, ...]:
    what, paper = summary(kind)
    return (
        ", ".join(f"`{name}`" for name in (kind.__name__, *named_losses(kind))),
        what,
        "the response's value, the token's gradient" if kind.sequence_value else f"per {unit(kind)}",
        ", ".join(f"`{name}={shown(value)}`" for name, value in defaults(kind)),
        f"`{kind.aggregation}`",
        f"[{paper}](https://arxiv.org/abs/{paper})",
    )


def summary(kind: type[Objective]) -> tuple[str, str]:
    """(what it does, number of the paper), from the first sentence of the docstring."""
    first = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    found = re.fullmatch(r".+?: (.+) \(arXiv (\d{4}\.\d{5})[^()]*\)\.", first)
    if found is None:
        expected = "expected a docstring whose first sentence is `Name: what it does (arXiv 1234.56789).`"
        raise ValueError(f"{kind.__name__}: {expected}; got {first!r}")
    return found[1], found[2]


def named_losses(kind: type[Objective]) -> list[str]:
    name = re.sub("(?<!^)(?=[A-Z][a-z])", "_", kind.__name__).lower() + "_loss"  # GSPOToken: gspo_token_loss
    return [name] if name in gspo_kernels.__all__ else []


def unit(kind: type[Objective]) -> str:
    return "response" if kind.ratio_of == "sequence" else "token"


def defaults(kind: type[Objective]) -> list[tuple[str, object]]:
    """As an instance has them; those that are None are options."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    found = [(name, getattr(kind(), name)) for name in names]
    return [(name, value) for name, value in found if value is not None]


def shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f'"{value}"'


def with_table(page: str) -> str:
    """The page with the table that the classes make."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected a page with {BEGIN} and {END}; got one without")
    return f"{before}{BEGIN}\n{table(objectives())}\n{END}{after}"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_table(path.read_text()))
