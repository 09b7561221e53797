"""Fills docs/paper.md from the records in docs/paper: each experiment's figure, its tables and where it ran.

A block from `<!-- name -->` to `<!-- end -->` gets the experiment's `section(record)`. The rest of the page, with the
conclusions, is written by hand. A block whose experiment has no record stays unchanged.

    python examples/paper/page.py
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)


def fill(page: str, folder: Path) -> str:
    def block(found: re.Match[str]) -> str:
        name = found["name"]
        module_file = Path(__file__).with_name(f"{name}.py")
        if not module_file.exists():
            return found[0]
        module = importlib.import_module(name)
        path = folder / f"{getattr(module, 'RECORD', name)}.json"  # RECORD: the experiment whose record it draws
        if not path.exists():
            return found[0]
        record = json.loads(path.read_text())
        figure = f"![{title(module.__doc__)}]({folder.name}/{name}.png)"
        parts = [figure, module.section(record).strip(), source(record)]
        return f"<!-- {name} -->\n" + "\n\n".join(parts) + "\n<!-- end -->"

    return BLOCK.sub(block, page)


def title(docstring: str | None) -> str:
    return (docstring or "").split("\n")[0].rstrip(".")


def source(record: dict[str, Any]) -> str:
    seeds, machine, versions = record["seeds"], record["machine"], record["versions"]
    where = machine["processor"] if record["device"] == "cpu" else record["device"]
    return (
        f"(`examples/paper/{record['experiment']}.py`: {seeds} seed{'s' * (seeds > 1)}, {record['seconds']} s in "
        f"{machine['workers']} process{'es' * (machine['workers'] > 1)} on {where}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}.)"
    )


def main() -> None:
    page = DOCS / "paper.md"
    page.write_text(fill(page.read_text(), DOCS / "paper"))
    print(f"filled: {page}")


if __name__ == "__main__":
    main()
