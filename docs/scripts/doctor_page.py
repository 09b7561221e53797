"""Writes what `python -m gspo_kernels` prints on this machine into docs/doctor.md.

    python docs/scripts/doctor_page.py

Run it on a machine that does nothing else, with an installed package: the page shows where it was imported from.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "doctor.md"
BEGIN, END = "<!-- output: begin, by python docs/scripts/doctor_page.py -->", "<!-- output: end -->"


def with_output(page: str, output: str) -> str:
    block = f"{BEGIN}\n```text\n{output.rstrip()}\n```\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, page, flags=re.DOTALL)


def main() -> None:
    command = [sys.executable, "-m", "gspo_kernels"]
    # From elsewhere: a source tree in the working directory would be imported in place of the installed package.
    done = subprocess.run(
        command, cwd=Path.home(), env={**os.environ, "COLUMNS": "80"}, stdout=subprocess.PIPE, text=True, check=True
    )
    PAGE.write_text(with_output(PAGE.read_text(), done.stdout))


if __name__ == "__main__":
    main()
