"""How many kernels a loss and its backward launch: at most four, with every fill, copy and reduction of torch counted.

The kernels of Triton and CUDA do nothing here, so the tensors may be anywhere. What torch does around them is seen by a
dispatch mode: every operator that reads or writes memory on the device is a launch; views and allocations are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batches import LAYOUTS, OBJECTIVES, PUBLIC, arguments, ragged_batch
from modes import DEVICE, on_device
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gspo_kernels.base.scalars import run_time
from gspo_kernels.rows import cuda_rows, triton_rows
from gspo_kernels.rows.types import Rows, RowStats, Upstream, empty_stats

triton = pytest.importorskip("triton", reason="needs Triton")

pytestmark = pytest.mark.plain_memory

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def is_number_of_the_host(tensor: Tensor) -> bool:
    """Hyper-parameters are float64 tensors on the CPU, in every mode; no array that the kernels take is like them."""
    return tensor.dtype == torch.float64 and tensor.ndim < 2 and tensor.device.type == "cpu"


class Launches(TorchDispatchMode):
    """The names of all operators that would launch a kernel, those inside the package's own operators included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "gspo_kernels":
            with self:  # again, which the call of an operator has switched off
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
        results = function(*args, **kwargs)
        returned = [result.alias_info for result in function._schema.returns]
        is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
        tensors = [x for x in tree_leaves((args, kwargs, results)) if isinstance(x, Tensor)]
        on_host = all(map(is_number_of_the_host, tensors))
        name = function._schema.name.removeprefix("aten::")
        if not is_view and not on_host and name not in ALLOCATIONS:
            self.names.append(name)
        return results


def test_a_hyper_parameter_on_the_device_is_filled_in_not_copied() -> None:
    """`torch.tensor(number, device="cuda")` copies from the host and waits for the copy."""
    with Launches() as seen:
        value = run_time(0.25, torch.device("meta"))
    assert seen.names == ["full"] and value.dtype == torch.float64
    assert run_time(0.25, torch.device(DEVICE)).item() == 0.25


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every launch, in order, while the test calls a loss and its backward."""
    from gspo_kernels.losses import triton_stage_kernels

    seen = Launches()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.names.append(kernel.fn.__name__)

    def one_read(rows: Rows, upstream: Upstream, gradient: Tensor, clip: Any = None) -> RowStats:
        seen.names.append("one_read")
        return empty_stats(rows)

    monkeypatch.setattr(type(triton_stage_kernels.batch_kernel), "run", launch)
    monkeypatch.setattr(cuda_rows, "forward_backward", one_read)
    monkeypatch.setattr(cuda_rows, "unsupported_reasons", lambda logits: [])
    monkeypatch.setattr(triton_rows, "unsupported_reasons", lambda logits: [])
    for module in ("base.checks", "base.layout", "losses.triton_stage", "rows.operators"):
        monkeypatch.setattr(f"gspo_kernels.{module}.may_read", lambda tensor: False)
    with seen:
        yield seen.names


ROWS_TWICE = ["forward_kernel", "sequence_kernel", "batch_kernel", "backward_kernel"]
ROWS_ONCE = ["sequence_kernel", "forward_backward_kernel", "batch_kernel", "scale_kernel"]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "off-policy": ({}, {}, ROWS_TWICE),
    "on-policy": ({"on_policy": True}, {}, ROWS_ONCE),
    "over the logits": ({}, {"overwrite_logits": True}, ROWS_TWICE),
    "over the logits, on-policy": ({"on_policy": True}, {"overwrite_logits": True}, ROWS_ONCE),
    "all": (
        {"ref": True, "weights": "token", "temperature": "token"},
        {"beta": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0, "normalizer": 4.0},
        ROWS_TWICE,
    ),
    "a global count": ({}, {"normalizer": torch.tensor(4)}, ROWS_TWICE),  # in the dtype that it was summed in
    "a global count, on-policy": ({"on_policy": True}, {"normalizer": torch.tensor(4.0)}, ROWS_ONCE),
}


def step(
    objective: str,
    layout: str,
    build: dict[str, Any],
    options: dict[str, Any],
    launched: list[str],
    every_row: bool | None = None,
) -> list[str]:
    """What a loss and its backward launch."""
    args = arguments(ragged_batch(objective, seed=60, **build), layout)
    if "kept" in args.keywords:
        args.keywords["kept"] = dataclasses.replace(args.keywords["kept"], every_row=every_row)
    options = {name: on_device(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    logits = args.logits.detach().clone().requires_grad_()
    root = torch.ones((), device=DEVICE)
    launched.clear()
    loss, _ = PUBLIC[objective](logits, *args.rest, **args.keywords, **options)
    (gradient,) = torch.autograd.grad(loss, logits, root)
    assert gradient.shape == logits.shape
    return launched


@pytest.mark.each_objective
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_four_launches(objective: str, layout: str, case: str, launched: list[str]) -> None:
    build, options, expected = CASES[case]
    assert step(objective, layout, build, {**options, "backend": "triton"}, launched) == expected


KEPT_TWICE = ["kept_forward_kernel", "sequence_kernel", "batch_kernel", "kept_backward_kernel"]
KEPT_ONCE = ["sequence_kernel", "kept_forward_backward_kernel", "batch_kernel", "scale_kernel"]
KEPT_CASES: dict[str, tuple[bool, bool | None, list[str]]] = {  # on-policy, `KeptTokens.every_row`
    "off-policy": (False, True, KEPT_TWICE),
    "on-policy": (True, True, KEPT_ONCE),
    "rows without entries": (False, None, ["forward_kernel", *KEPT_TWICE[:3], "backward_kernel", KEPT_TWICE[3]]),
    "rows without entries, on-policy": (True, None, [KEPT_ONCE[0], "forward_backward_kernel", *KEPT_ONCE[1:]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", KEPT_CASES)
def test_kept_sets_take_four_launches_and_rows_without_two_more(layout: str, case: str, launched: list[str]) -> None:
    on_policy, every_row, expected = KEPT_CASES[case]
    build = {"on_policy": on_policy, "kept": True}
    assert step("gspo", layout, build, {"backend": "triton"}, launched, every_row) == expected


CUDA_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "off-policy": ({}, {}),
    "on-policy": ({"on_policy": True}, {}),
    "over the logits": ({}, {"overwrite_logits": True}),
    "all": ({"ref": True, "weights": "token", "temperature": "token"}, {"dual_clip": 3.0, "normalizer": 4.0}),
}


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CUDA_CASES)
def test_four_launches_with_the_cuda_kernel(objective: str, layout: str, case: str, launched: list[str]) -> None:
    """A ratio per token: clipped by the kernel, in the one pass that the Triton kernels make on-policy alone."""
    build, options = CUDA_CASES[case]
    names = step(objective, layout, build, {**options, "backend": "cuda"}, launched)
    assert names == ["sequence_kernel", "one_read", "batch_kernel", "scale_kernel"]
