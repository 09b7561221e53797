"""A run's findings in markdown: for the terminal, and for the marked places of docs/peers.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..results import REPOSITORY
from .contestants import CONTESTANTS, starting_from
from .inputs import HARD

PAGE = REPOSITORY / "docs" / "peers.md"
LABELS = {contestant.name: contestant.label for contestant in CONTESTANTS}
_BLOCK = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def terminal(found: dict[str, Any]) -> str:
    return "\n\n".join(blocks(found).values())


def blocks(found: dict[str, Any]) -> dict[str, str]:
    return {
        "machine": _machine(found["machine"]),
        **{f"from_{start}": "\n\n".join(_cases(found["cases"], start)) for start in ("logits", "hidden")},
        **{f"hard_{start}": _hard(cases, start) for start, cases in found["hard"].items()},
    }


def fill(page: str, found: dict[str, Any]) -> str:
    """The page with every `<!-- name --> ... <!-- end -->` as `blocks` has it."""
    known = blocks(found)
    return _BLOCK.sub(lambda match: f"<!-- {match[1]} -->\n{known[match[1]]}\n<!-- end -->", page)


def _machine(machine: dict[str, Any]) -> str:
    peers = ", ".join(f"{name} {version or 'absent'}" for name, version in machine["packages"].items())
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{where}, {machine['backend']} backend, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date']}; {peers}."
    )


def _cases(cases: dict[str, Any], start: str) -> Iterator[str]:
    for case in cases.values():
        if case["start"] == start:
            yield "\n".join([_title(case), "", *_rows(case)])


def _title(case: dict[str, Any]) -> str:
    width = f", D = {case['width']}" if case["width"] else ""
    what = "logits" if case["start"] == "logits" else "hidden states and weight"
    return (
        f"{case['objective'].upper()}, {what} in {case['dtype']}, V = {case['vocab']:,}{width}, {case['rows']} tokens, "
        f"{case['unmasked']} of them unmasked:"
    )


def _rows(case: dict[str, Any]) -> Iterator[str]:
    parts = list(next(iter(case["contestants"].values()))["gradient_error"])
    yield f"| | loss off by | {' | '.join(f'gradient, {part}' for part in parts)} | time | memory |"
    yield "|---|" + "--:|" * (len(parts) + 3)
    for contestant in starting_from(case["start"]):
        numbers = case["contestants"].get(contestant.name)
        if numbers is None:
            yield f"| {contestant.label} | {case['absent'].get(contestant.name, 'failed')} |" + " |" * (len(parts) + 2)
            continue
        errors = " | ".join(f"{numbers['gradient_error'][part]:.1e}" for part in parts)
        memory = "" if numbers["extra_bytes"] is None else f"{numbers['extra_bytes'] / 1e9:.2f} GB"
        time = f"{numbers['seconds'] * 1e3:,.0f} ms" if "seconds" in numbers else ""
        yield f"| {contestant.label} | {numbers['loss_error']:.1e} | {errors} | {time} | {memory} |"


def _hard(cases: dict[str, Any], start: str) -> str:
    names = [c.name for c in starting_from(start) if any(case.get(c.name) for case in cases.values())]
    lines = [f"| | {' | '.join(LABELS[name] for name in names)} |", "|---|" + "---|" * len(names)]
    for key, case in cases.items():
        lines.append(f"| {HARD[key].title} | {' | '.join(case.get(name) or '-' for name in names)} |")
    return "\n".join(lines)
