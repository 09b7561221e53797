"""No function of PPO waits for a device: where checks may not read values, no operator hands a value to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import gspo_kernels
from gspo_kernels.base import checks, layout
from gspo_kernels.rollout.advantages import BASELINES, NORMALIZATIONS

pytestmark = DEFAULT_MODE

# Operators whose result or its shape depends on values. `repeat_interleave` does without an output size.
WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "equal", "is_nonzero", "masked_select"}


class OnDevice(TorchDispatchMode):
    """Refuses what waits; looks into the package's operators."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "gspo_kernels":
            with self:
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        numbers = isinstance(args[0], Tensor) and args[0].dtype == torch.float64 and args[0].ndim < 2 if args else False
        hyper_parameter = name == "_local_scalar_dense" and numbers  # a float of an operator, on the CPU everywhere
        if name == "repeat_interleave" and "output_size" not in kwargs and isinstance(args[-1], Tensor):
            name = "nonzero"
        if name in WAITING and not hyper_parameter:
            raise AssertionError(f"{function} waits for the device")
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError(f"{function} by a mask waits for the device")
        return function(*args, **kwargs)


R, V, MASK = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 4) < 0.7
CU, GROUPS = torch.tensor([0, 5, 5, 12], dtype=torch.int32), torch.tensor([4, 4, 7])
HIDDEN, HEAD = torch.randn(3, 4, 8), torch.randn(8)
PACKED = {"mask": MASK.view(-1), "cu_seqlens": CU}


def trained(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()


CALLS: dict[str, Callable[[], Any]] = {
    "gae, padded": lambda: gspo_kernels.gae(R, V, mask=MASK, last_values=V[:, 0]),
    "gae, packed": lambda: gspo_kernels.gae(R.view(-1), V.view(-1), **PACKED),
    "gae, one reward each": lambda: gspo_kernels.gae(R[:, 0], V, mask=MASK),
    "whiten_advantages": lambda: gspo_kernels.whiten_advantages(R, mask=MASK),
    "value_loss": lambda: trained(gspo_kernels.value_loss(V.clone().requires_grad_(), R, V, mask=MASK).loss),
    "linear_value_loss": lambda: trained(
        gspo_kernels.linear_value_loss(
            HIDDEN.view(12, 8).clone().requires_grad_(), HEAD.clone().requires_grad_(), R.view(-1), V.view(-1), **PACKED
        ).loss
    ),
}
for of in BASELINES:
    for by in NORMALIZATIONS if of != "batch_mean" else ("batch_std", "none"):  # others are refused
        CALLS[f"group_advantages, {of}, {by}"] = lambda of=of, by=by: gspo_kernels.group_advantages(  # type: ignore[misc]
            R[:, 0], group_ids=GROUPS, baseline=of, normalize=by
        )


@pytest.mark.parametrize("call", CALLS)
def test_waits_for_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checks, layout):
        monkeypatch.setattr(module, "may_read", lambda tensor: False)
    with OnDevice():
        CALLS[call]()


def test_the_diagnosis_waits_as_it_says() -> None:
    assert "waits for the device" in (gspo_kernels.diagnose_mismatch.__doc__ or "")
    with OnDevice(), pytest.raises(AssertionError, match="waits"):
        gspo_kernels.diagnose_mismatch(None, GROUPS[None], R[:1, :3], logprobs=-V[:1, :3].abs())


def test_a_call_that_waits_is_found() -> None:
    with OnDevice(), pytest.raises(AssertionError, match="waits"):
        V.max().item()
    with OnDevice(), pytest.raises(AssertionError, match="waits"):
        V[MASK]
