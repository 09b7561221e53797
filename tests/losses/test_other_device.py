"""Devices that no kernel was written for run plain torch: Intel's, Huawei's, Habana's and whatever torch learns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modes import DEFAULT_MODE
from torch.utils import backend_registration

import gspo_kernels
from gspo_kernels import linear_gspo_loss

pytestmark = DEFAULT_MODE
TESTS = Path(__file__).resolve().parents[1]


def test_every_operator_runs_on_any_device() -> None:
    """A kernel for no device in particular: the dispatcher takes it wherever there is none for the device."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gspo_kernels::")]
    assert len(names) >= 13
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd"), name
        for key in ("MPS", "XPU", "HPU", "PrivateUse1"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), (name, key)


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot be given a device in Python",
)
def test_a_device_of_another_kind() -> None:
    """The numbers of the CPU, by plain torch, which `explain` and a warning say; without float64 a refusal."""
    done = subprocess.run(
        [sys.executable, TESTS / "support" / "other_device.py"],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_meta_tensors_give_shapes() -> None:
    logits = torch.empty(2, 3, 11, device="meta", requires_grad=True)
    hidden = torch.empty(2, 3, 5, device="meta", requires_grad=True)
    weight = torch.empty(11, 5, device="meta", requires_grad=True)
    ids, advantages = torch.empty(2, 3, dtype=torch.int64, device="meta"), torch.empty(2, device="meta")
    old = torch.empty(2, 3, device="meta")
    for out in (
        gspo_kernels.gspo_loss(logits, ids, advantages, old),
        linear_gspo_loss(hidden, weight, ids, advantages, old),
    ):
        assert out.loss.device.type == "meta" and out.loss.shape == ()
        out.loss.backward()
    for operand in (logits, hidden, weight):
        assert operand.grad is not None and operand.grad.shape == operand.shape
