"""Writes the report in docs/diagnose.md: python docs/scripts/diagnosis_page.py

The rollouts are recorded ones of vLLM (tests/rollout/recorded/record_diagnosis.py), sampled with top_p=0.8.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from gspo_kernels import diagnose_mismatch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "diagnose.md"
BEGIN, END = "<!-- report: begin, by python docs/scripts/diagnosis_page.py -->", "<!-- report: end -->"


def report() -> str:
    with np.load(ROOT / "tests" / "rollout" / "recorded" / "diagnosis.npz") as file:
        top_p = {key.split(".")[1]: torch.from_numpy(file[key]) for key in file.files if key.startswith("top_p.")}
    return str(diagnose_mismatch(**top_p))


def with_report(page: str) -> str:
    block = f"{BEGIN}\n```\n{report()}\n```\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_report(PAGE.read_text()))
