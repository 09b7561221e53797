"""A row is independent of neighbours, position, strides, address, threads, the run, and of who needs gradients."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import LAYOUTS
from checks import allocated, check_close, check_gradient, check_rows
from modes import (
    DEFAULT_MODE,
    DEVICE,
    KERNELS,
    by_backend,
    by_combination,
    needs,
    on_device,
    sized,
)
from row_batches import everything, peaked, rows
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels import gspo_loss, token_logprobs


def test_uninitialised_memory_is_nan_here() -> None:
    """The fixture of `conftest.py` does what every other test relies on."""
    like = torch.zeros(3, dtype=torch.bfloat16, device=DEVICE)
    made = [torch.empty(3, dtype=dtype, device=DEVICE) for dtype in (torch.float32, torch.float64)]
    for x in (*made, torch.empty_like(like), like.new_empty(3)):
        assert bool(x.isnan().all())


def same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for name, x, y in zip(("logprobs", "entropy", "lse", "gradient"), a, b, strict=True):
        assert torch.equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} differ in bits"


@by_combination
@pytest.mark.parametrize("vocab", sized([61, 513, 4099], [61, 513]))
def test_a_row_has_the_same_bits_wherever_it_stands(backend: str, dtype: torch.dtype, vocab: int) -> None:
    logits = on_device(peaked(12, vocab).to(dtype))
    ids = on_device(torch.arange(12) * 31 % vocab)
    whole = everything(logits, ids, backend)
    order = on_device(torch.randperm(12, generator=torch.Generator().manual_seed(1)))
    same_bits(everything(logits[order], ids[order], backend), [x[order] for x in whole])
    for t in (0, 5, 11):
        same_bits(everything(logits[t : t + 1].clone(), ids[t : t + 1], backend), [x[t : t + 1] for x in whole])
    padded = [x.flatten(0, 1) for x in everything(logits.view(3, 4, vocab), ids.view(3, 4), backend)]
    same_bits(padded, whole)


@DEFAULT_MODE
@by_combination
@pytest.mark.parametrize("vocab", [61, 4099])
def test_a_row_has_the_same_bits_with_any_number_of_threads(
    backend: str, dtype: torch.dtype, vocab: int, threads: None
) -> None:
    logits, ids = peaked(37, vocab).to(dtype), torch.arange(37) * 31 % vocab
    torch.set_num_threads(1)
    alone = everything(logits, ids, backend)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        same_bits(everything(logits, ids, backend), alone)


@by_combination
@pytest.mark.plain_memory
def test_two_runs_have_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    n, vocab, times = sized((64, 3001, 3), (8, 601, 1))
    logits, ids = on_device(peaked(n, vocab).to(dtype)), on_device(torch.arange(n))
    first = everything(logits, ids, backend)
    for _ in range(times):
        same_bits(everything(logits, ids, backend), first)


@by_combination
@pytest.mark.parametrize("view", ["[:, :-1]", "columns", "transposed rows", "every second row", "expanded"])
def test_views(backend: str, dtype: torch.dtype, view: str) -> None:
    base = on_device(peaked(24, 130).to(dtype)).view(4, 6, 130)
    logits = {
        "[:, :-1]": lambda: base[:, :-1],
        "columns": lambda: base[..., 3:128],  # rows neither aligned nor next to one another
        "transposed rows": lambda: base.transpose(0, 1),
        "every second row": lambda: base[:, ::2],
        "expanded": lambda: base[:1].expand(4, 6, 130),
    }[view]()
    ids = on_device(torch.arange(logits[..., 0].numel())).view(logits.shape[:-1]) % logits.shape[-1]
    same_bits(everything(logits, ids, backend), everything(logits.contiguous(), ids, backend))


@needs("reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_vocabulary_that_is_not_the_last_stride(dtype: torch.dtype) -> None:
    """[9, 70] with columns 9 apart: the kernels decline and say why, the automatic choice gives right numbers."""
    logits, ids = on_device(peaked(70, 9).to(dtype)).t(), on_device(torch.arange(9) * 7)
    same_bits(everything(logits, ids, "reference"), everything(logits.contiguous(), ids, "reference"))
    with pytest.raises(ValueError, match=r"backend.*stride"):
        token_logprobs(logits, ids, backend=KERNELS)
    out = token_logprobs(logits, ids)
    check_rows(out.logprobs, out.entropy, out.lse, rows(logits.cpu(), ids.cpu()).rows, TOLERANCES[dtype])


@by_combination
@pytest.mark.parametrize("offset", range(8))
def test_any_address(backend: str, dtype: torch.dtype, offset: int) -> None:
    logits, ids = on_device(peaked(3, 333).to(dtype)), on_device(torch.tensor([0, 332, 100]))
    memory = torch.full((3 * 333 + 16,), math.nan, dtype=dtype, device=DEVICE)
    moved = memory[offset : offset + 999].view(3, 333).copy_(logits)
    same_bits(everything(moved, ids, backend), everything(logits, ids, backend))


@by_combination
def test_views_pass_their_gradient_to_the_base(backend: str, dtype: torch.dtype) -> None:
    values, ids = peaked(12, 50).to(dtype).view(3, 4, 50), torch.arange(9).view(3, 3)
    base = on_device(values.clone()).requires_grad_()
    token_logprobs(base[:, :-1], on_device(ids), backend=backend).logprobs.sum().backward()
    assert base.grad is not None and bool((base.grad[:, -1] == 0).all())
    check_gradient(base.grad[:, :-1].flatten(0, 1), rows(values[:, :-1].flatten(0, 1), ids.flatten()), [1.0] * 9)


@by_backend
@pytest.mark.plain_memory
def test_rows_more_than_two_to_the_31_elements_apart(backend: str) -> None:
    vocab, distance = 1000, 2**31 + 1000
    memory = torch.empty(distance + 2 * vocab, dtype=torch.bfloat16, device=DEVICE)  # never touched but for two rows
    values, ids = peaked(2, vocab).bfloat16(), torch.tensor([0, vocab - 1])
    logits = memory.as_strided((2, vocab), (distance, 1), 5).copy_(values).requires_grad_()
    out = token_logprobs(logits, on_device(ids), backend=backend)
    check_rows(out.logprobs, out.entropy, out.lse, rows(values, ids).rows, TOLERANCES[torch.bfloat16])
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), logits)
    check_gradient(gradient, rows(values, ids), [1.0, 1.0])


@by_backend
def test_seventy_thousand_rows(backend: str) -> None:
    """More than a grid's second dimension holds."""
    n = sized(70_000, 150)
    logits, ids = peaked(n, 3, peaks=1), torch.arange(n) % 3
    leaf = on_device(logits.clone()).requires_grad_()
    out = token_logprobs(leaf, on_device(ids), backend=backend)
    logp = logits.double().log_softmax(-1)
    truth = logp.gather(-1, ids[:, None])[:, 0]
    check_close("logprobs", out.logprobs, truth, 1e-6 * truth.abs())
    out.logprobs.sum().backward()
    assert leaf.grad is not None
    expected = torch.nn.functional.one_hot(ids, 3) - logp.exp()
    check_close("gradient", leaf.grad, expected, 1e-6 * (logp.exp() + expected.abs()))


@by_backend
@pytest.mark.parametrize("shape", [(0, 10), (0, 3, 10), (3, 0, 10)])
def test_no_rows(backend: str, shape: tuple[int, ...]) -> None:
    leaf = torch.zeros(shape, requires_grad=True, device=DEVICE)
    out = token_logprobs(leaf, torch.zeros(shape[:-1], dtype=torch.int64, device=DEVICE), backend=backend)
    assert [x.shape for x in out] == [shape[:-1]] * 3
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert leaf.grad is not None and leaf.grad.shape == shape


# --- autograd and memory --------------------------------------------------------------------------------------------


@by_combination
def test_no_grad_gives_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    logits, ids = on_device(peaked(5, 300).to(dtype)), on_device(torch.arange(5))
    with_grad = everything(logits.clone(), ids, backend)
    with torch.no_grad():
        out = token_logprobs(logits, ids, backend=backend)
    assert not out.logprobs.requires_grad
    for x, y in zip(out, with_grad, strict=False):
        assert torch.equal(x, y)


@by_combination
def test_upstream_gradients_of_any_stride(backend: str, dtype: torch.dtype) -> None:
    """sum() sends an expanded scalar, a slice sends a strided view."""
    batch = rows(peaked(6, 90).to(dtype))
    leaf = on_device(batch.logits.clone()).requires_grad_()
    out = token_logprobs(leaf, on_device(batch.token_ids), backend=backend)
    strided = torch.arange(12.0, device=DEVICE).to(out.logprobs.dtype)[::2] - 3
    (gradient,) = torch.autograd.grad(out.logprobs, leaf, strided, retain_graph=True)
    check_gradient(gradient, batch, strided.tolist())
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), leaf, retain_graph=True)
    check_gradient(gradient, batch, [1.0] * 6)
    (gradient,) = torch.autograd.grad(out.logprobs, leaf, strided)
    check_gradient(gradient, batch, strided.tolist())  # a third backward still finds what the forward saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["rows", "off-policy", "on-policy", "overwritten", "overwritten on-policy"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.plain_memory
def test_memory(dtype: torch.dtype, what: str, layout: str) -> None:
    """Beside one gradient O(N): no fp32 copy of the logits, no copy of a strided view, and nothing if overwritten."""
    n, vocab = sized((64, 8000), (8, 8000))
    base = on_device(peaked(n + 1, vocab).to(dtype)).view(1, n + 1, vocab)
    view, tokens = (base[:, :-1], (1, n)) if layout == "padded" else (base[0, :-1], (n,))
    view.requires_grad_()
    ids, old = on_device(torch.zeros(tokens, dtype=torch.int64)), on_device(torch.full(tokens, -5.0))
    advantages = on_device(torch.ones(1))
    ends = None if layout == "padded" else on_device(torch.tensor([0, n], dtype=torch.int32))
    size = view.numel() * view.element_size()
    overwrite, on_policy = "overwritten" in what, "on-policy" in what
    logits = view * 1 if overwrite else view
    losses: list[Tensor] = []

    def forward() -> None:
        if what == "rows":
            losses.append(token_logprobs(logits, ids, backend=KERNELS).logprobs.sum())
        else:
            given = None if on_policy else old
            options: dict[str, Any] = {"cu_seqlens": ends, "overwrite_logits": overwrite, "backend": KERNELS}
            losses.append(gspo_loss(logits, ids, advantages, given, **options).loss)

    first = allocated(forward)
    second = allocated(lambda: torch.autograd.grad(losses[0], logits))
    if overwrite:
        assert first + second < size / 4
    elif on_policy:  # one pass: the gradient is written by the forward
        assert first + second < 1.25 * size
    else:
        assert first < size / 8 and second < 1.2 * size


EVERY_SORT_OF_ROW = """
import sys, torch
import gspo_kernels._native as native
try:
    native.instruction_set()
except ValueError as error:
    sys.exit(f"refused: {{error}}")
sys.path[:0] = {tests!r}
from row_batches import check_batch, check_far_rows, peaked, rows
from gspo_kernels import explain
assert {name!r} in explain(torch.zeros(1, 1)).splitlines()[0]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocab in (1, 7, 130, 513):
        for temperature in (1.0, torch.tensor([0.3, 1.0, 1.7, 2.0])):
            batch = rows(peaked(4, vocab).to(dtype), temperature=temperature)
            batch.mask[1] = vocab < 500
            check_batch(batch, "native", ["logprobs", "all"])
            batch = rows((4 * peaked(4, vocab)).to(dtype), temperature=temperature)
            batch.logits[2, : vocab // 2], batch.softcap = -torch.inf, 20.0
            check_batch(batch, "native")
    logits = torch.linspace(-120, 60, 1001).repeat(4, 1)
    logits[1, :700] = -torch.inf
    check_batch(rows(logits.to(dtype), torch.tensor([1000, 1000, 0, 700])), "native", ["all"])
    check_far_rows(dtype, 1e-6, "native", 1500)
    check_far_rows(dtype, 1e6, "native", 1500)
"""


@needs("native")
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name: str) -> None:
    """The kernels are compiled once for each; the one for this machine is picked when the module loads."""
    environment = {**os.environ, "GSPO_KERNELS_ISA": name}
    tests = Path(__file__).parents[1]
    script = EVERY_SORT_OF_ROW.format(tests=[str(tests), str(tests / "support")], name=name)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "refused: " in done.stderr:
        pytest.skip(f"this machine does not run {name}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
