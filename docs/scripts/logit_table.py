"""The table in docs/hidden-states.md of what models do to their logits, made from the package's own. This command
rewrites it:

    python docs/scripts/logit_table.py
"""

from __future__ import annotations

from pathlib import Path

from gspo_kernels.integrations.transformers import IGNORED, LOGIT_OPTIONS, LogitOptions

PAGE = Path(__file__).parents[1] / "hidden-states.md"
BEGIN, END = "<!-- models: begin, by python docs/scripts/logit_table.py -->", "<!-- models: end -->"


def table() -> str:
    rows = dict.fromkeys(options for options in LOGIT_OPTIONS.values() if options is not IGNORED)
    head = "| `logit_scale` | `softcap` | `vocab_size` | model types |\n|---|---|---|---|\n"
    return head + "\n".join(f"| {' | '.join(cells(options))} |" for options in sorted(rows, key=number_of_types)[::-1])


def number_of_types(options: LogitOptions) -> int:
    return list(LOGIT_OPTIONS.values()).count(options)


def cells(options: LogitOptions) -> tuple[str, ...]:
    types = ", ".join(f"`{name}`" for name, found in LOGIT_OPTIONS.items() if found == options)
    return (scale_of(options), *(f"`{name}`" if name else "" for name in (options.softcap, options.tokens)), types)


def scale_of(options: LogitOptions) -> str:
    if not options.multiplied_by and not options.divided_by:
        return ""
    scale = f"`{options.multiplied_by or 1}"
    scale += f" / {options.divided_by}`" if options.divided_by else "`"
    return scale + (", of the hidden states" if options.on_hidden else "")


def with_table(page: str) -> str:
    """The page with the table."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected a page with {BEGIN} and {END}; got one without")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
