"""What is known of a compiled kernel, and what is wrong with a hot loop of whichever compiler."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .sass import ACCESS, Loop

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Hot:
    """A hot loop, for each column: `elements` of them a thread and iteration.

    `covered`: of an iteration's exponentials, those between its last load and the first use of what was loaded. 0 where
    a block is loaded, awaited, computed; all of them where its loads are issued before the block in front is computed.
    """

    instructions: float
    mufu: float
    elements: int
    covered: int = 0


@dataclass(frozen=True)
class Figures:
    """What is known of a compiled kernel; `problems` is for a reader, and not kept."""

    registers: int
    shared: int
    loops: dict[str, Hot] = field(default_factory=dict)
    wide_accesses: int | None = None  # AMD: 16-byte loads and stores in the whole kernel
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        kept = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "problems"}
        return kept if self.loops else {k: v for k, v in kept.items() if k != "loops"}

    @staticmethod
    def from_json(kept: dict[str, Any]) -> Figures:
        loops = {kind: Hot(**hot) for kind, hot in kept.get("loops", {}).items()}
        return Figures(**{**kept, "loops": loops})


def examine(
    loop: Loop, kind: str, columns: int, most: float, accesses: Sequence[str], exchanges: Sequence[str]
) -> tuple[Hot, list[str]]:
    """Figures of a hot loop, and what is wrong with it: more than `most` instructions a column, say."""
    problems = []
    narrow = [str(i) for i in loop.accesses(*accesses) if i.bytes < ACCESS]
    if narrow:
        problems.append(f"{kind} loop: {len(narrow)} accesses of less than 16 bytes, such as {narrow[0]}")
    if exchanged := [i.base for i in loop.body if i.base in exchanges]:
        problems.append(f"{kind} loop: lanes exchange data, {Counter(exchanged).most_common()}")
    if loop.exponentials and not loop.count("FFMA", "FFMA2"):
        problems.append(f"{kind} loop: no fused multiply-add")
    instructions, mufu = round(len(loop.body) / columns, 3), round(loop.count("MUFU") / columns, 4)
    hot = Hot(instructions, mufu, columns, loop.covered)
    if hot.instructions > most:
        over = f"{hot.instructions} instructions a column > {most:g}"
        problems.append(f"{kind} loop: {over} ({loop.histogram})")
    return hot, problems
