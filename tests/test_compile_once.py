"""What varies from call to call is no part of what Triton compiles: asked of Triton itself, without a GPU.

Every launch is taken to the point where Triton looks up whether it has compiled this before, for an imagined GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import LAYOUTS, OBJECTIVES, PUBLIC, arguments, ragged_batch
from modes import DEFAULT_MODE

from gspo_kernels.logprobs import triton_rows

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = DEFAULT_MODE


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """(kernel, what it is compiled for) of every launch; nothing runs."""
    from triton.backends.compiler import GPUTarget

    found: set[tuple[str, str]] = set()

    def look_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        *_, binder = self.create_binder()
        _, specialization, others = binder(*args, **options)
        found.add((self.fn.__name__, f"{specialization} {others}"))

    device = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", device, raising=False)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", look_up)
    monkeypatch.setattr(triton_rows, "unsupported_reasons", lambda logits: [])
    yield found


def step(objective: str, layout: str, on_policy: bool, lengths: list[int], **options: Any) -> None:
    args = arguments(ragged_batch(objective, lengths=lengths, on_policy=on_policy, vocab=17 + sum(lengths)), layout)
    temperature = options.pop("temperature", 1.0)
    loss, _ = PUBLIC[objective](args.logits, *args.rest, **{**args.keywords, "temperature": temperature}, **options)
    loss.backward()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_one_compilation_serves_every_batch(
    objective: str, layout: str, on_policy: bool, lookups: set[tuple[str, str]]
) -> None:
    """Sizes of 1 and multiples of 16, which Triton likes to compile for, are among them; so are odd vocabularies."""
    step(objective, layout, on_policy, [3, 2])
    first = set(lookups)
    assert len(first) == 4, "four launches, four kernels"
    for k in range(20):
        step(objective, layout, on_policy, [k + 1, 2 * k % 17] if k % 2 else [k + 1], temperature=0.3 + 0.1 * k)
        options = {"eps_low": 1e-4 * (k + 1), "eps_high": 0.01 * k, "max_log_ratio": 1.0 + k, "normalizer": 1.0 + k}
        step(objective, layout, on_policy, [3, 2], **options)
    assert lookups == first


def test_rows_beyond_four_gigabytes_are_another_kernel_and_no_more(lookups: set[tuple[str, str]]) -> None:
    """A stride of more than 2^31 elements needs 64 bits."""
    from gspo_kernels.logprobs.rows import Rows

    def forward(rows: int, stride: int) -> None:
        logits = SimpleNamespace(  # strides that no memory of this machine has
            shape=torch.Size((rows, 3, 1000)), stride=lambda: (stride, 1000, 1), element_size=lambda: 2,
            dtype=torch.bfloat16, device=torch.device("cpu"), data_ptr=lambda: 0,
        )  # fmt: skip
        ids = torch.zeros(rows, 3, dtype=torch.int64)
        one = torch.ones((), dtype=torch.float64)
        triton_rows.forward(Rows(logits, ids, None, one))  # type: ignore[arg-type]

    for rows, stride in ((2, 3000), (1, 3000), (1, 2**31 + 16)):
        forward(rows, stride)
    assert len(lookups) == 1, "the stride of a packed batch's one outer row is its size, and leads nowhere"
    for rows, stride in ((2, 2**31 + 16), (3, 2**33 + 1)):
        forward(rows, stride)
    assert len(lookups) == 2
