"""Fills pages of docs/ from the records in docs/paper: figures, tables, and where the experiments ran.

A block from `<!-- kind: experiment -->` to `<!-- end -->` is filled by the script of that name. The kinds are

    figure    docs/paper/<experiment>.png, described by the first line of the script's docstring
    table     the script's `section(record)`
    source    seeds, time, machine and versions, from the record

Where `section(record)` is a dictionary of tables, `<!-- table: experiment-part -->` is one of them. A script may show
another one's record, which it names as `RECORD`. The rest of a page, with the conclusions, is written by hand. A block
whose experiment has no record stays unchanged.

    cp runs/paper/*.json runs/paper/*.png docs/paper    # after new runs
    python examples/paper/page.py
"""

from __future__ import annotations

import importlib
import json
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = DOCS / "paper"
BLOCK = re.compile(
    r"<!-- (?P<kind>figure|table|source): (?P<name>\w+)(?:-(?P<part>\w+))? -->\n.*?<!-- end -->", re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """What a comment of a page asks for."""

    kind: str
    name: str  # of the script
    part: str | None = None  # of its tables

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.name}" + (f"-{self.part}" if self.part else "")


def block_of(found: re.Match[str]) -> Block:
    return Block(found["kind"], found["name"], found["part"])


def pages() -> list[Path]:
    """All pages with blocks."""
    return [page for page in sorted(DOCS.rglob("*.md")) if BLOCK.search(page.read_text())]


def fill(page: Path, records: Path = RECORDS) -> str:
    """The page's text with its blocks filled."""

    def filled(found: re.Match[str]) -> str:
        block = block_of(found)
        if find_spec(block.name) is None:
            return found[0]
        script = importlib.import_module(block.name)
        path = records / f"{record_of(script)}.json"
        if not path.exists():
            return found[0]
        record = json.loads(path.read_text())
        if block.kind == "figure":
            file = os.path.relpath(records / f"{block.name}.png", page.parent)
            text = f"![{first_line(script.__doc__)}]({file})"
        else:
            text = source(record) if block.kind == "source" else table(block, script.section(record))
        return f"<!-- {block.title} -->\n{text}\n<!-- end -->"

    return BLOCK.sub(filled, page.read_text())


def record_of(script: ModuleType) -> str:
    """The experiment whose record the script shows: another one's if it says so."""
    found: str = getattr(script, "RECORD", script.__name__)
    return found


def table(block: Block, tables: str | dict[str, str]) -> str:
    found: dict[str | None, str] = {None: tables} if isinstance(tables, str) else {**tables}
    if block.part not in found:
        expected = ", ".join(f"`{Block('table', block.name, part).title}`" for part in found)
        raise ValueError(f"expected one of {expected}, got `{block.title}`: change the page's comment")
    return found[block.part].strip()


def first_line(docstring: str | None) -> str:
    return (docstring or "").split("\n")[0].rstrip(".")


def source(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    time = f"{record['seconds']} s in {counted(machine['workers'], 'process', 'es')}"
    if "cpu_seconds" in record:  # of an experiment that may have been stopped and continued
        time = f"{record['cpu_seconds'] / 60:.0f} CPU minutes"
    where = machine["processor"] if record["device"] == "cpu" else record["device"]
    return (
        f"(`examples/paper/{record['experiment']}.py`: {counted(record['seeds'], 'seed')}, {time} on {where}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}.)"
    )


def counted(count: int, name: str, plural: str = "s") -> str:
    return f"{count} {name}{plural * (count > 1)}"


def main() -> None:
    for page in pages():
        page.write_text(fill(page))
        print(f"filled: {page}")


if __name__ == "__main__":
    main()
