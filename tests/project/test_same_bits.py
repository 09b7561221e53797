"""examples/same_bits.py: what it prints is what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from modes import DEFAULT_MODE

pytestmark = [DEFAULT_MODE, pytest.mark.plain_memory]


def test_trainer_and_engine_agree(
    capsys: pytest.CaptureFixture[str], threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GSPO_KERNELS_CPU_PRODUCTS", raising=False)
    torch.set_num_threads(1)  # many small products: threads would wait for each other
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "same_bits.py"), run_name="__main__")
    *same, rounded = capsys.readouterr().out.splitlines()[1:]
    assert len(same) == 3
    assert all(line.split()[-4:] == ["0,", "0.0e+00", "0.0e+00", "0%"] for line in same), same
    assert float(rounded.split()[-2]) > 1e-3 and int(rounded.split()[-1].rstrip("%")) > 20, rounded
