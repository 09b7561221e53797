"""The benchmark of the host's time runs, and leaves no stub behind."""

from __future__ import annotations

import sys

import pytest

from gspo_kernels.losses import triton_stage_kernels

from . import host


def test_every_loss_is_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = triton_stage_kernels.batch_kernel
    monkeypatch.setattr(sys, "argv", ["host", "--calls", "2", "--profile"])
    host.main()
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{name:<12}") == 2 for name in host.LOSSES)
    assert "function calls" in printed
    assert triton_stage_kernels.batch_kernel is kernel
