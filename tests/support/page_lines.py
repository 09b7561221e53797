"""What the trainers' pages tell a user to write, for tests that give it to the trainers' own parsers."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def blocks(trainer: str, language: str) -> list[str]:
    """The code blocks of docs/<trainer>.md in this language."""
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / f"{trainer}.md").read_text(), re.M | re.S)
    return found


def options(trainer: str, block: int) -> list[str]:
    """The words of a bash block, without comments."""
    lines = blocks(trainer, "bash")[block].splitlines()
    return [word for line in lines for word in line.partition("#")[0].split()]


def before(diff: str) -> list[str]:
    """What a diff says that the file has: its lines without those that it adds, in pieces between `...`."""
    kept = [line[1:] for line in diff.splitlines() if line[:1] in ("-", " ")]
    return [piece.strip("\n") for piece in re.split(r"^\.\.\.$", "\n".join(kept), flags=re.MULTILINE) if piece.strip()]
