"""The table of trainers' reductions in docs/migrate.md, from gspo_kernels.integrations.reductions. To rewrite it:

python docs/scripts/reduction_table.py
"""

from __future__ import annotations

from pathlib import Path

from gspo_kernels.integrations.reductions import NORMALIZERS, OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "migrate.md"
BEGIN, END = "<!-- reductions: begin, by python docs/scripts/reduction_table.py -->", "<!-- reductions: end -->"


def table() -> str:
    rows = ["| trainer, option | value | `aggregation` | `normalizer`: count of |", "|---|---|---|---|"]
    for trainer, option in sorted(OPTIONS.items(), key=lambda item: item[0].lower()):
        for i, (value, found) in enumerate(option.values.items()):
            name = f"{trainer} `{option.name}`" if i == 0 else ""
            rows.append(f"| {name} | `{value}` | `{found.aggregation}` | {NORMALIZERS[found.normalizer]} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
