"""A device without kernels of ours, made in Python: `npu`, whose tensors keep their numbers in CPU tensors.

A script for a process of its own, because torch keeps a backend that it has been given.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("npu")
NPU = torch.device("npu:0")
KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
ran: set[str] = set()  # of our operators, by the kernel that the dispatcher has for this device


class OnNpu(Tensor):
    has_float64 = True

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnNpu:
        if not cls.has_float64 and numbers.dtype == torch.float64:
            raise TypeError("this device has no float64")
        options = {"dtype": numbers.dtype, "strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, device=NPU, **options)  # type: ignore[attr-defined]
        made.numbers = numbers
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "gspo_kernels":
            ran.add(function._schema.name)
            return function.redispatch(KEY, *args, **(kwargs or {}))
        return run(function, *args, **(kwargs or {}))


def run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator of torch, on the numbers. Its result is on the device, unless all of it is on the CPU."""
    assert function.namespace != "gspo_kernels", f"{function} has no kernel for this device"
    found = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, (OnNpu, torch.device))]
    stays = kwargs.get("device") or next(x for x in found if isinstance(x, OnNpu)).device
    args, kwargs = tree_map_only(OnNpu, lambda x: x.numbers, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    result = function(*args, **kwargs)
    return result if torch.device(stays).type == "cpu" else tree_map_only(Tensor, OnNpu, result)


LIBRARY = torch.library.Library("_", "IMPL")
LIBRARY.fallback(run, "PrivateUse1")  # what makes a tensor there, from none or from one of the CPU


def on_npu(values: Tensor | None) -> Tensor | None:
    if values is None:
        return None
    return OnNpu(values.detach().clone()).requires_grad_(values.requires_grad)


def check_same(name: str, found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.device == NPU, (name, found.device)
    size = expected.detach().double().abs().max()
    assert float((found.numbers.detach().double() - expected.detach().double()).abs().max()) <= tolerance * size, name


def problem(packed: bool) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """(arguments of every loss, operands that want gradients) on the CPU."""
    made = torch.Generator().manual_seed(0)
    shape, sequences = ((7,), 3) if packed else ((3, 4), 3)
    given = {
        "token_ids": torch.randint(0, 11, shape, generator=made),
        "advantages": torch.randn(sequences, generator=made),
        "old_logprobs": -3.0 + 0.01 * torch.randn(shape, generator=made),
        "mask": torch.rand(shape, generator=made) < 0.8,
        "cu_seqlens": torch.tensor([0, 2, 3, 7]) if packed else None,
    }
    operands = {
        "logits": torch.randn(*shape, 11, generator=made).requires_grad_(),
        "hidden": torch.randn(*shape, 5, generator=made).requires_grad_(),
        "weight": torch.randn(11, 5, generator=made).requires_grad_(),
    }
    return given, operands


def main() -> None:
    import gspo_kernels
    from gspo_kernels import gspo_loss, linear_gspo_loss, linear_token_logprobs, token_logprobs

    said = gspo_kernels.explain(on_npu(torch.zeros(2, 3)))
    assert said.startswith("reference (plain torch): runs, the first that takes these logits"), said
    for name in ("cuda", "triton", "native"):
        (line,) = (line for line in said.splitlines() if line.startswith(name))
        assert "npu:0" in line or "not built" in line or "not installed" in line, line
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for packed in (False, True):
            given, operands = problem(packed)
            there, operands_there = ({n: on_npu(x) for n, x in d.items()} for d in (given, operands))
            for loss, names, options in (
                (gspo_loss, ["logits"], {}),
                (gspo_loss, ["logits"], {"old_logprobs": None}),
                (linear_gspo_loss, ["hidden", "weight"], {}),
            ):
                here, found = (
                    loss(*(o[n] for n in names), **{**g, **options})
                    for o, g in ((operands, given), (operands_there, there))
                )
                check_same("loss", found.loss, here.loss)
                check_same("ratio_mean", found.stats.ratio_mean, here.stats.ratio_mean)
                gradients = torch.autograd.grad(here.loss, [operands[n] for n in names])
                of_npu = torch.autograd.grad(found.loss, [operands_there[n] for n in names])
                for name, x, y in zip(names, of_npu, gradients, strict=True):
                    check_same(f"gradient of {name}", x, y)
            ids, ids_there = given["token_ids"], there["token_ids"]
            for function, names in ((token_logprobs, ["logits"]), (linear_token_logprobs, ["hidden", "weight"])):
                here = function(*(operands[n] for n in names), ids)
                found = function(*(operands_there[n] for n in names), ids_there)
                for name in ("logprobs", "entropy", "lse"):
                    check_same(name, getattr(found, name), getattr(here, name))
                gradients = torch.autograd.grad(here.logprobs.sum(), [operands[n] for n in names])
                of_npu = torch.autograd.grad(found.logprobs.sum(), [operands_there[n] for n in names])
                for name, x, y in zip(names, of_npu, gradients, strict=True):
                    check_same(f"gradient of {name}", x, y)
        one_pass()
    ours = [str(w.message) for w in caught if "plain torch" in str(w.message)]
    assert len(ours) == 1 and "logits are on npu" in ours[0], ours
    rows = {"row_stats", "row_gradient_", "row_stats_and_gradient_", "scale_"}
    linear = {"linear_loss", "linear_row_stats", "linear_row_gradient"}
    segments = {"segments", "segment_sum", "segment_spread"}
    expected = {f"gspo_kernels::{name}" for name in rows | linear | segments}
    assert ran >= expected, expected - ran
    refused()


def one_pass() -> None:
    """The two operators that a loss of a tensor's subclass does not take."""
    from gspo_kernels.rows import operators
    from gspo_kernels.rows.types import Rows, Upstream

    made = torch.Generator().manual_seed(1)
    logits, upstream = torch.randn(1, 4, 11, generator=made), torch.randn(1, 4, generator=made)
    ids, temperature, factor = torch.tensor([[0, 3, 10, 5]]), torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.5)
    gradients = []
    for move, backend in ((lambda x: x, "native"), (on_npu, "reference")):
        gradient = move(torch.zeros(1, 4, 11))
        rows = Rows(move(logits), move(ids), None, temperature, 11)
        operators._row_stats_and_gradient_(rows, Upstream(move(upstream)), gradient, backend)
        operators.scale(gradient, move(factor), backend)
        gradients.append(gradient)
    check_same("gradient in one pass", gradients[1], gradients[0])


def refused() -> None:
    """A device that has no float64, as Apple's MPS, is refused in words before anything runs."""
    import gspo_kernels
    from gspo_kernels.base import devices

    given, operands = problem(packed=False)
    there, operands_there = ({n: on_npu(x) for n, x in d.items()} for d in (given, operands))
    hidden, weight, logits = (operands_there[n] for n in ("hidden", "weight", "logits"))
    ids = there["token_ids"]
    OnNpu.has_float64 = False
    devices._has_float64.cache_clear()
    calls = {
        "gspo_loss": lambda: gspo_kernels.gspo_loss(logits, **there),
        "linear_gspo_loss": lambda: gspo_kernels.linear_gspo_loss(hidden, weight, **there),
        "token_logprobs": lambda: gspo_kernels.token_logprobs(logits, ids),
        "linear_token_logprobs": lambda: gspo_kernels.linear_token_logprobs(hidden, weight, ids),
    }
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            assert "expected tensors on a device with float64" in str(error) and "npu:0" in str(error), (name, error)
        else:
            raise AssertionError(f"{name} was not refused")


if __name__ == "__main__":
    main()
