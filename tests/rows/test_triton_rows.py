"""What the Triton kernels alone can get wrong: where a row starts, where blocks meet, rounding; and a GPU's promises.

Runs in the interpreter and on a GPU. No sync, launches, graphs, recompilation, more than 2^31 elements: on a GPU alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from batches import CLASSES, LAYOUTS, OBJECTIVES, PUBLIC, Arguments, Batch, arguments, ragged_batch
from checks import check_close, check_gradient, check_rows
from modes import DEVICE, DTYPES, GPU, INTERPRETED, TRITON_MODES, on_device, sized
from row_batches import check_batch, everything, peaked, rows
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels import gspo_loss, token_logprobs
from gspo_kernels.losses import triton_stage
from gspo_kernels.losses.stats import SCALARS
from gspo_kernels.rows import triton_rows
from gspo_kernels.rows.operators import row_gradient, row_stats
from gspo_kernels.rows.types import RowOptions, Rows, RowStats, Upstream

pytestmark = TRITON_MODES


def _float64_bits_kernel() -> Any:
    from float64_bits_kernel import store_float64_bits

    return store_float64_bits


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
by_objective = pytest.mark.parametrize("objective", OBJECTIVES)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
on_and_off = pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])

# Columns a kernel takes at a time.
BLOCKS = (
    [triton_rows.INTERPRETED_LAUNCH.elements]
    if INTERPRETED
    else sorted({launch.elements for launch in triton_rows.LAUNCH.values()})
)


def same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, x, y in zip(("logprobs", "entropy", "lse", "gradient"), actual, expected, strict=True):
        assert torch.equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} differ in bits"


# --- where a row lies -------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("offset", range(16))
def test_a_row_may_start_anywhere_and_nothing_beside_it_is_touched(dtype: torch.dtype, offset: int) -> None:
    """The first row starts at every element of four 16-byte chunks; with an odd vocabulary each next one elsewhere.

    The gradient is written over the logits, between guards.
    """
    vocab = 333
    values, ids = on_device(peaked(2, vocab).to(dtype)), on_device(torch.tensor([332, 100]))
    expected = everything(values.clone(), ids, "triton")
    guarded = torch.full((offset + 2 * vocab + 16,), math.nan, dtype=dtype, device=DEVICE)
    inside = slice(offset, offset + 2 * vocab)
    guarded[inside] = values.flatten()
    memory = guarded.clone().requires_grad_() * 1
    logits = memory[inside].view(2, vocab)
    out = token_logprobs(logits, ids, backend="triton", overwrite_logits=True)
    (0.7 * out.logprobs.sum() - 0.3 * out.entropy.sum() + 0.2 * out.lse.sum()).backward()
    same([*(x.detach() for x in out), logits.detach()], expected)
    outside = torch.ones_like(guarded, dtype=torch.bool)
    outside[inside] = False
    assert bool(memory[outside].isnan().all()), "something beside the rows was written"


@by_dtype
def test_a_gradient_of_another_phase(dtype: torch.dtype) -> None:
    """logits[:, :-1] of an odd vocabulary, and a fresh contiguous gradient: a row of each, at two addresses mod 16."""
    vocab = 333
    values, ids = peaked(12, vocab).to(dtype).view(3, 4, vocab), torch.arange(9).view(3, 3) * 41
    view = on_device(values)[:, :-1]
    got = everything(view, on_device(ids), "triton")
    assert got[3].is_contiguous() and not view.is_contiguous()
    same(got, everything(view.contiguous(), on_device(ids), "triton"))
    batch = rows(values[:, :-1].flatten(0, 1), ids.flatten())
    check_gradient(got[3].flatten(0, 1), batch, [0.7] * 9, [-0.3] * 9, [0.2] * 9)


@by_dtype
@pytest.mark.parametrize("vocab", [1, 3, 7, 8, 9, 16, 17])
def test_rows_shorter_than_two_chunks_at_every_phase(dtype: torch.dtype, vocab: int) -> None:
    """All head, or head and tail with nothing between; rows 17 or 19 apart, so that each starts elsewhere."""
    n, apart = 8, 19 if vocab == 17 else 17
    values, ids = peaked(n, vocab, peaks=1).to(dtype), torch.arange(n) % vocab
    memory = torch.full((n * apart,), math.nan, dtype=dtype, device=DEVICE)
    logits = memory.as_strided((n, vocab), (apart, 1)).copy_(on_device(values))
    out = everything(logits, on_device(ids), "triton")
    batch = rows(values, ids)
    check_rows(*out[:3], batch.rows, TOLERANCES[dtype])
    check_gradient(out[3], batch, [0.7] * n, [-0.3] * n, [0.2] * n)


@by_dtype
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("block", BLOCKS)
def test_targets_about_every_seam(dtype: torch.dtype, offset: int, block: int) -> None:
    """The target's block is walked apart from the others: head, first, middle, last block, either side of each, tail.

    A row that does not start at a 16-byte boundary has its blocks later by its head.
    """
    vocab = 3 * block + 21
    head = -offset % (16 // dtype.itemsize)
    seams = [head + k * block for k in range(4)]
    ids = sorted({0, vocab - 1, vocab - 2, head + block // 2, *(x + d for x in seams for d in (-1, 0)), vocab - 17})
    ids = [x for x in ids if 0 <= x < vocab]
    values = peaked(1, vocab).to(dtype)
    batch = rows(values.expand(len(ids), vocab), torch.tensor(ids))
    memory = torch.full((offset + vocab,), math.nan, dtype=dtype, device=DEVICE)
    row = memory[offset:].copy_(on_device(values[0]))
    for t, target in enumerate(ids):
        out = everything(row[None], on_device(torch.tensor([target])), "triton")
        one = Batch(values, batch.token_ids[t : t + 1], batch.mask[:1], [1], batch.advantages)
        check_rows(*out[:3], one.rows, TOLERANCES[dtype])
        check_gradient(out[3], one, [0.7], [-0.3], [0.2])


def forward_backward(logits: Tensor, ids: Tensor, gradient: Tensor, launch: Any, patch: Any) -> list[Tensor]:
    """Statistics and gradient by the kernel that does both at once, launched so."""
    patch.setattr(triton_rows, "INTERPRETED_LAUNCH", launch)
    patch.setitem(triton_rows.LAUNCH, "forward_backward", launch)
    batch = Rows(logits[None], ids[None], None, torch.ones((), dtype=torch.float64), logits.shape[-1])
    g = on_device(torch.full((1, len(ids)), 0.7))
    stats = triton_rows.forward_backward(batch, Upstream(g, None, None, None, None), gradient[None])
    return [stats.logprobs, stats.entropy, stats.lse, gradient]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("phases", [(0, 0), (0, 3), (3, 3)], ids=["on a boundary", "gradient off it", "both off it"])
def test_blocks_kept_in_registers_and_prefetched_ones_have_the_same_bits(
    dtype: torch.dtype, blocks: int, phases: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets in kept blocks, between them, behind them; rows of fewer blocks, of any phase; over the logits or not."""
    plain = triton_rows.INTERPRETED_LAUNCH if INTERPRETED else triton_rows.LAUNCH["forward_backward"]
    plain = plain._replace(prefetch=0, kept=0)
    changed = plain._replace(prefetch=2, kept=2)
    block, vocab = plain.elements, blocks * plain.elements + 24
    ids = on_device(torch.tensor([0, min(block, vocab - 1), min(2 * block + 1, vocab - 1), vocab - 1]))
    values = on_device(peaked(4, vocab).to(dtype))

    def memory(phase: int) -> Tensor:
        return torch.full((phase + 4 * vocab,), math.nan, dtype=dtype, device=DEVICE)[phase:].view(4, vocab)

    logits = memory(phases[0]).copy_(values)
    expected = forward_backward(logits, ids, memory(phases[1]), plain, monkeypatch)
    same(forward_backward(logits, ids, memory(phases[1]), changed, monkeypatch), expected)
    if phases[0] == phases[1]:
        same(forward_backward(logits, ids, logits, changed, monkeypatch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("phase", [0, 3])
def test_capped_rows_in_one_launch_have_the_bits_of_two(dtype: torch.dtype, phase: int) -> None:
    """Over the logits or not, aligned or not."""
    launch = triton_rows.INTERPRETED_LAUNCH if INTERPRETED else triton_rows.LAUNCH["forward_backward"]
    vocab = 3 * launch.elements + 24
    ids = on_device(torch.tensor([0, launch.elements, 2 * launch.elements + 1, vocab - 1]))
    logits = torch.full((phase + 4 * vocab,), math.nan, dtype=dtype, device=DEVICE)[phase:].view(4, vocab)
    logits.copy_(on_device(peaked(4, vocab) * 8))
    temperature, tanh_scale = (torch.tensor(x, dtype=torch.float64) for x in (1 / 30, 1 / 30))
    batch = Rows(logits[None], ids[None], None, temperature, vocab, tanh_scale=tanh_scale)
    upstream = Upstream(on_device(torch.full((1, 4), 0.7)))
    stats, expected = triton_rows.forward(batch), torch.full_like(logits, math.nan)[None]
    triton_rows.backward(batch, stats, upstream, expected)
    for over in (False, True):
        gradient = logits[None] if over else torch.full_like(logits, math.nan)[None]
        found = triton_rows.forward_backward(batch, upstream, gradient)
        same([x[0] for x in (*found, gradient)], [x[0] for x in (*stats, expected)])


@pytest.mark.skipif(not INTERPRETED, reason="a GPU's own reciprocal is tested by all other tests")
def test_a_cap_with_the_least_accurate_reciprocals(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rcp.approx` may be off by a unit in the last place; a log-probability must still be good to 1e-6."""
    from reciprocal_kernel import off_by_a_unit

    from gspo_kernels.rows import triton_tanh

    generator = torch.Generator().manual_seed(0)
    logits = torch.full((24, 515), -1e4)
    logits[:, :2] = torch.rand(24, 1, generator=generator) * 40 + torch.rand(24, 2, generator=generator)
    logits[8:] = torch.rand(16, 515, generator=generator) * 60 - 30
    logits[16:, 7] = 1e4
    ids = torch.arange(24) % 2
    exact = token_logprobs(logits, ids, softcap=30.0, backend="triton")
    monkeypatch.setattr(triton_tanh._about_reciprocal, "rewrite", off_by_a_unit.rewrite)  # the interpreter's
    found = token_logprobs(logits, ids, softcap=30.0, backend="triton")
    assert not torch.equal(found.lse, exact.lse)
    expected = torch.log_softmax(30.0 * torch.tanh(logits.double() / 30.0), -1).gather(-1, ids[:, None])[:, 0]
    check_close("logprobs", found.logprobs, expected, 1e-6 * expected.abs().clamp(min=1.0))


# --- rounding -------------------------------------------------------------------------------------------------------


@by_dtype
def test_a_gradient_is_rounded_to_nearest(dtype: torch.dtype) -> None:
    """Each stored number is the truth, known to a few 1e-6, rounded once: cut digits are off by half a unit more."""
    batch = rows(peaked(4, 300).to(dtype))
    leaf = on_device(batch.logits.clone()).requires_grad_()
    out = token_logprobs(leaf, on_device(batch.token_ids), backend="triton")
    g = [1.0, -0.37, 2.9, -1.3]
    (gradient,) = torch.autograd.grad(out.logprobs, leaf, on_device(torch.tensor(g)))
    numbers = zip(batch.logits.tolist(), batch.token_ids.tolist(), g, strict=True)
    truth = torch.tensor([oracle.row_gradient(x, y, 1.0, k) for x, y, k in numbers], dtype=torch.float64)
    known = 4e-6
    lowest, highest = ((truth * (1 + s * known * truth.sign())).to(dtype).double() for s in (-1, 1))
    actual = gradient.cpu().double()
    wrong = (actual < lowest) | (actual > highest)
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} are not the nearest {dtype}"


@by_dtype
@pytest.mark.parametrize("factor", [1.5, 0.75, 1 / 3, -1.0, 1.0, 0.0, 2.0**-100])
def test_scaling_rounds_to_nearest_even(dtype: torch.dtype, factor: float) -> None:
    """A stored gradient times the loss's scale, rounded as torch does, ties (plenty by 1.5) to even; no subnormals."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-14, 14, (2, 3, 301), generator=generator)
    values = on_device((torch.randn(2, 3, 301, generator=generator) * 2.0**exponents).to(dtype))
    by = on_device(torch.tensor(factor))
    product = values.float() * by
    tiny = product.abs() < torch.finfo(torch.float32).tiny
    torch.ops.gspo_kernels.scale_(values, by, "triton")
    assert torch.equal(values, product.masked_fill(tiny, 0.0).to(dtype))


@by_dtype
def test_a_program_scales_several_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows by four programs: all of them are scaled, and once."""
    monkeypatch.setattr(triton_rows, "MOST_SCALE_PROGRAMS", 4)
    values = on_device(peaked(7, 301).to(dtype).view(7, 1, 301))
    product = (values.float() * 1.5).to(dtype)
    torch.ops.gspo_kernels.scale_(values, on_device(torch.tensor(1.5)), "triton")
    assert torch.equal(values, product)


# --- far from 0 -----------------------------------------------------------------------------------------------------

FAR_TEMPERATURES = (0.7, 1e-6, 1e6)


def far_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, up to the largest number of the dtype, and targets. In an odd vocabulary rows start anywhere."""
    vocab, top = 261, torch.finfo(dtype).max
    plain = peaked(1, vocab)[0]
    some, none = [3, 40, 100, 200, 255, 256, 259, 260], torch.full((vocab,), -math.inf)

    def but(base: Tensor, columns: list[int], value: float) -> Tensor:
        return base.clone().index_fill_(0, torch.tensor(columns), value)

    made = [
        (but(plain, some, top), 3), (but(plain, some, top), 7), (but(plain, [7], top), 7), (but(plain, [7], top), 8),
        (but(plain, [7], -top), 7), (but(plain, [7], -top), 8), (but(torch.full((vocab,), -top), [0, 260], top), 5),
        (torch.full((vocab,), -top), 9), (but(none, [7], top), 7), (but(none, [7], -top), 7), (but(none, [7], -top), 8),
        (but(but(none, [9], 3.0), [7], -top), 9),
    ]  # fmt: skip
    if dtype != torch.float16:
        made += [(but(plain, some, 1e30), 40), (but(plain, [17], 1e20), 17), (but(plain, [17], 1e20), 4)]
        made += [(but(torch.full((vocab,), -1e30), [4, 9, 260], -1e25), target) for target in (4, 5)]
    return torch.stack([row for row, _ in made]).to(dtype), torch.tensor([target for _, target in made])


def check_far(out: list[Tensor], logits: Tensor, ids: Tensor, temperatures: Tensor, g: tuple[float, ...]) -> None:
    """Against the truth, but for what the result's dtype cannot hold. Elsewhere the oracle has a nat of slack."""
    tol = TOLERANCES[logits.dtype]
    numbers = list(zip(logits.tolist(), ids.tolist(), temperatures.tolist(), strict=True))
    truth = [oracle.row_statistics(*row) for row in numbers]
    for name, actual, bound in zip(("logprob", "entropy", "lse"), out[:3], (1e-6, 1e-6, 2.0**-45), strict=True):
        expected = torch.tensor([getattr(row, name) for row in truth], dtype=torch.float64).to(actual.dtype).double()
        if name == "lse":  # of a rounded scale where rows are not far
            bound = torch.where(expected.abs() < 2.0**30, 2.0**-23, bound)
        check_close(name, actual, expected, bound * expected.abs() + (1e-6 if name == "entropy" else 2.0**-126))
    gradient = torch.tensor([oracle.row_gradient(*row, *g) for row in numbers], dtype=torch.float64)
    gradient = gradient.to(out[3].dtype).double()
    tiny = tol.tiny / temperatures[:, None].double().clamp(max=1.0) + torch.zeros_like(gradient)
    check_close("gradient", out[3], gradient, (2e-6 + 2 * tol.store) * gradient.abs() + tiny)


@by_dtype
@pytest.mark.parametrize("first", range(3))
def test_logits_up_to_the_largest_number(dtype: torch.dtype, first: int) -> None:
    """By log p from differences to the largest logit, and an lse that float64 alone can hold. A masked row is 0."""
    logits, ids = far_rows(dtype)
    temperatures = torch.tensor([FAR_TEMPERATURES[(first + i) % 3] for i in range(len(ids))])
    leaf, mask = on_device(logits).requires_grad_(), torch.ones(len(ids), dtype=torch.bool)
    mask[2] = False
    out = token_logprobs(
        leaf, on_device(ids), temperature=on_device(temperatures), mask=on_device(mask), backend="triton"
    )
    g = (0.7, -0.3, 0.2)
    (gradient,) = torch.autograd.grad(list(out), leaf, [torch.full_like(x, k) for x, k in zip(out, g, strict=True)])
    assert not any(bool(x[2].any()) for x in (*out, gradient))
    check_far([x.detach().cpu()[mask] for x in (*out, gradient)], logits[mask], ids[mask], temperatures[mask], g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_far_logits_in_one_launch_and_in_a_gradient_of_another_dtype(dtype: torch.dtype) -> None:
    logits, ids = far_rows(dtype)
    n, batch_ids = len(ids), on_device(ids)[None]
    temperature = torch.tensor(0.7, dtype=torch.float64)
    batch = Rows(on_device(logits)[None], batch_ids, None, temperature, logits.shape[-1])
    upstream = on_device(torch.full((1, n), 0.7))
    gradient = torch.full_like(batch.logits, math.nan)
    stats = triton_rows.forward_backward(batch, Upstream(upstream), gradient)
    temperatures = torch.full((n,), 0.7, dtype=torch.float64)
    check_far([x[0] for x in (*stats, gradient)], logits, ids, temperatures, (0.7,))
    if dtype == torch.float32:
        narrow = torch.full_like(gradient, math.nan, dtype=torch.bfloat16)
        flipped = batch._replace(logits=batch.logits.flip(1), row_indices=on_device(torch.arange(n)).flip(0))
        triton_rows.backward(flipped, stats, Upstream(upstream), narrow)
        assert torch.equal(narrow, gradient.bfloat16())


def test_far_logits_of_which_a_shard_has_the_largest() -> None:
    """A shard's kernel takes the statistics of the whole row; one without the largest logit writes zeros."""
    logits, ids = far_rows(torch.float32)
    logits, ids = logits[:2], ids[:2]
    out = everything(on_device(logits), on_device(ids), "triton")
    stats = [x[None] for x in out[:3]]
    stats[0] = torch.full_like(stats[0], -math.inf)  # of the column that stands for the target here
    g = [torch.full_like(stats[0], k) for k in (-0.3, 0.2 - 0.7)]
    found = []
    for shard in (logits[:, 41:100], logits[:, 100:]):
        gradient = torch.empty_like(on_device(shard))[None]
        local_ids = on_device(torch.ones_like(ids))[None]
        one = torch.ones((), dtype=torch.float64)
        rows_of_shard = Rows(on_device(shard.contiguous())[None], local_ids, None, one, shard.shape[-1])
        triton_rows.backward(rows_of_shard, RowStats(*stats), Upstream(None, *g), gradient)
        found.append(gradient[0])
    assert not bool(found[0].any())
    assert torch.equal(found[1], out[3][:, 100:])


@by_dtype
def test_rows_about_the_border_of_far_ones(dtype: torch.dtype) -> None:
    """Where lse turns from that of a rounded scale to the exact one, and where the gradient is of ties alone."""
    found = []
    for exponent in (28.5, 28.8, 29.0, 29.2, 29.5, 29.8, 30.0, 30.2) if dtype != torch.float16 else ():
        for temperature in (0.7, 1.3, 1e-6):
            largest = torch.tensor(2.0**exponent * temperature).to(dtype)
            row = torch.full((29,), float(largest) * 0.5).to(dtype)
            row[[3, 7, 28]] = largest
            found.append((row, temperature))
    for temperature in (1e-6, 1.1e-6) if dtype == torch.float16 else ():
        for largest in (500.0, 600.0, 800.0, 1100.0):
            found.append((torch.tensor([1.0, 2.0, largest, 3.0, largest], dtype=dtype), temperature))
    logits, temperatures = torch.stack([row for row, _ in found]), torch.tensor([t for _, t in found])
    ids = torch.full((len(found),), 3 if dtype != torch.float16 else 2)
    leaf = on_device(logits).requires_grad_()
    out = token_logprobs(leaf, on_device(ids), temperature=on_device(temperatures), backend="triton")
    g = (0.7, -0.3, 0.2)
    (gradient,) = torch.autograd.grad(list(out), leaf, [torch.full_like(x, k) for x, k in zip(out, g, strict=True)])
    check_far([x.detach().cpu() for x in (*out, gradient)], logits, ids, temperatures, g)


@by_objective
@on_and_off
def test_a_loss_of_far_logits_is_finite(objective: str, on_policy: bool) -> None:
    """Log-probabilities of -3e38 and -inf: loss, statistics and gradient are numbers."""
    top = torch.finfo(torch.float32).max
    logits = peaked(4, 21).view(2, 2, 21)
    logits[0, 0, 5], logits[0, 1, 6], logits[1, 0, 5] = -top, top, -math.inf
    leaf = on_device(logits).requires_grad_()
    old = None if on_policy else on_device(torch.full((2, 2), -2.0))
    ref = on_device(torch.full((2, 2), -1.0))
    loss, stats = PUBLIC[objective](
        leaf, on_device(torch.full((2, 2), 5)), on_device(torch.tensor([1.0, -1.0])), old, ref_logprobs=ref,
        beta=0.0 if on_policy else 0.1, entropy_coef=0.0 if on_policy else 0.01, backend="triton",
    )  # fmt: skip
    loss.backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and math.isfinite(float(loss.detach()))
    assert all(math.isfinite(float(getattr(stats, name))) for name in SCALARS)


# --- a NaN ------------------------------------------------------------------------------------------------------------


@by_objective
@pytest.mark.parametrize(
    ("where", "layout"),
    [("logits on-policy", "padded"), ("logits on-policy", "packed"), ("logits", "padded"), ("old_logprobs", "packed"),
     ("ref_logprobs", "padded")],
)  # fmt: skip
def test_nan_propagates_to_its_sequence_alone(objective: str, where: str, layout: str) -> None:
    """Or, where a token's term depends on that token alone, to its row.

    Sequences of 3, 1 and 2 tokens; one is masked, one has advantage 0.
    """
    generator = torch.Generator().manual_seed(0)
    packed, name = layout == "packed", where.split()[0]
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, False]])
    inside = mask | torch.tensor([[False, False, True], [False, False, False], [False, False, False]])

    def shaped(x: Tensor) -> Tensor:
        return on_device(x[inside] if packed else x)

    def gradient(with_nan: bool) -> tuple[float, Tensor]:
        generator.manual_seed(0)
        logits = torch.randn(3, 3, 21, generator=generator)
        old, ref = torch.full((3, 3), -2.5), torch.full((3, 3), -3.5)
        if with_nan:
            array = {"logits": logits, "old_logprobs": old, "ref_logprobs": ref}[name]
            array[0, 1], array[0, 2] = math.nan, math.nan  # the second is masked
        leaf = shaped(logits).requires_grad_()
        keywords: dict[str, Any] = {"mask": shaped(mask), "eps_low": 0.9, "eps_high": 9.0, "backend": "triton"}
        if packed:
            keywords["cu_seqlens"] = on_device(torch.tensor([0, 3, 4, 6]))
        if where == "ref_logprobs":
            keywords |= {"ref_logprobs": shaped(ref), "beta": 0.1}
        loss, _ = PUBLIC[objective](
            leaf, shaped(torch.full((3, 3), 4)), on_device(torch.tensor([0.0 if packed else 1.0, -1.0, 2.0])),
            None if where == "logits on-policy" else shaped(old), **keywords,
        )  # fmt: skip
        (found,) = torch.autograd.grad(loss * 3.0, leaf)
        return float(loss.detach()), found.cpu()

    loss, found = gradient(True)
    _, sound = gradient(False)
    bad = torch.zeros(3, 3, dtype=torch.bool)
    bad[0, 1] = True
    if CLASSES[objective].depends_on == "sequence":
        bad[0, 0] = True
    expected = sound.masked_fill((bad[inside] if packed else bad)[..., None], math.nan)
    assert math.isnan(loss)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


# --- a bad token ------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("bad", [-1, -100, 67, 2**40 + 3, -(2**62)])
def test_an_unchecked_token_makes_nan_of_its_own_row(
    dtype: torch.dtype, bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without GSPO_KERNELS_DEBUG nobody looks at the ids on a GPU: NaN in that row, and all else as it should be."""
    monkeypatch.delenv("GSPO_KERNELS_DEBUG", raising=False)
    if INTERPRETED:  # a CPU tensor is looked at
        monkeypatch.setattr("gspo_kernels.rows.operators.may_read", lambda tensor: False)
    batch = rows(peaked(4, 67).to(dtype))
    ids = batch.token_ids.clone()
    ids[2] = bad
    leaf = on_device(batch.logits.clone()).requires_grad_()
    out = token_logprobs(leaf, on_device(ids), backend="triton")
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), leaf)
    assert math.isnan(float(out.logprobs[2].detach()))
    others = torch.tensor([0, 1, 3])
    sound = rows(batch.logits[others], batch.token_ids[others])
    check_rows(*(x.cpu()[others] for x in out), sound.rows, TOLERANCES[dtype])
    check_gradient(gradient.cpu()[others], sound, [1.0] * 3)


@GPU
@by_objective
@by_layout
@on_and_off
def test_an_unchecked_token_shows_in_the_loss(
    objective: str, layout: str, on_policy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GSPO_KERNELS_DEBUG", raising=False)
    batch = ragged_batch(objective, seed=50, on_policy=on_policy)
    bad = int(batch.mask.nonzero()[0])
    batch.token_ids[bad] = 61
    args = arguments(batch, layout)
    loss, stats = PUBLIC[objective](args.logits, *args.rest, **args.keywords)
    assert math.isnan(float(loss.detach()))
    assert int(stats.logprobs.isnan().sum()) == 1


@by_objective
@on_and_off
def test_boundaries_that_leave_tokens_out_make_nan_of_all(
    objective: str, on_policy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boundaries that nobody checked: no memory that was never written may pass for a gradient."""
    monkeypatch.delenv("GSPO_KERNELS_DEBUG", raising=False)
    if INTERPRETED:  # a CPU tensor is looked at
        for module in ("base.layout", "losses.triton_stage", "rows.operators"):
            monkeypatch.setattr(f"gspo_kernels.{module}.may_read", lambda tensor: False)
    logits = on_device(torch.randn(7, 11, generator=torch.Generator().manual_seed(0))).requires_grad_()
    old = None if on_policy else on_device(torch.full((7,), -2.0))
    loss, _ = PUBLIC[objective](
        logits, on_device(torch.arange(7)), on_device(torch.tensor([1.0, 2.0])), old,
        cu_seqlens=on_device(torch.tensor([1, 3, 5])), eps_low=0.9, eps_high=9.0, backend="triton",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(gradient.isnan().all()) and math.isnan(float(loss.detach()))


@by_objective
def test_an_infinite_upstream_leaves_rows_without_a_gradient_alone(objective: str) -> None:
    """A loss scaler's overflow: inf * 0 is not to happen in rows that the loss does not use."""
    logits = on_device(torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss, _ = PUBLIC[objective](
        logits, on_device(torch.zeros(2, 3).long()), on_device(torch.tensor([1.0, 0.0])),
        on_device(torch.full((2, 3), -2.0)), eps_low=0.9, eps_high=9.0, backend="triton",
    )  # fmt: skip
    (loss * math.inf).backward()
    assert logits.grad is not None
    assert bool((logits.grad[1] == 0).all()) and not bool(logits.grad[0].isfinite().any())


def test_more_counts_than_one_access_takes() -> None:
    """The number of sequences divides a gradient; it is added up in the row kernels, 1,024 at a time."""
    logits, ids = on_device(peaked(2, 33)).view(1, 2, 33), on_device(torch.tensor([[3, 4]]))
    one = torch.ones((), dtype=torch.float64)
    batch = Rows(logits, ids, None, one, 33)
    stats = row_stats(batch, RowOptions(False, "triton"))
    upstream = on_device(torch.ones(1, 2))
    gradients = []
    for counts in (None, on_device(torch.ones(2500))):
        gradient = torch.empty_like(logits)
        row_gradient(batch, stats, Upstream(upstream, counts=counts), gradient, "triton")
        gradients.append(gradient.cpu())
    check_close("gradient", gradients[1] * 2500, gradients[0], 1e-6 * gradients[0].abs())


@pytest.mark.parametrize(
    ("hi", "lo"), [(2.0, -(2**-26)), (2.0, 2**-25), (-16.0, 2**-23), (1.0, -(2**-26)), (3.0, 2**-24), (-3.0, 2**-24)]
)
def test_a_float64_from_a_pair(hi: float, lo: float) -> None:
    """Below a power of two the last place is half as large."""
    pair = [on_device(torch.tensor([x], dtype=torch.float32)) for x in (hi, lo)]
    out = torch.empty(1, dtype=torch.int64, device=DEVICE)
    _float64_bits_kernel()[(1,)](*pair, out)
    assert float(out.view(torch.float64)) == hi + lo


# --- threads and devices --------------------------------------------------------------------------------------------


@on_and_off
def test_backward_from_another_thread(on_policy: bool) -> None:
    args = arguments(ragged_batch("gspo", seed=51, on_policy=on_policy), "packed")

    def loss() -> Tensor:
        return gspo_loss(args.logits, *args.rest, **args.keywords, backend="triton").loss

    (expected,) = torch.autograd.grad(loss(), args.logits)
    thread = threading.Thread(target=loss().backward)
    thread.start()
    thread.join()
    assert args.logits.grad is not None and torch.equal(args.logits.grad, expected)


@GPU
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@on_and_off
def test_a_device_that_is_not_the_current_one(on_policy: bool) -> None:
    args = arguments(ragged_batch("gspo", seed=52, on_policy=on_policy), "packed")
    gradients = []
    for device in ("cuda:0", "cuda:1"):
        leaf = args.logits.detach().to(device).requires_grad_()
        rest = [None if x is None else x.to(device) for x in args.rest]
        keywords = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in args.keywords.items()}
        with torch.cuda.device("cuda:0"):
            loss, _ = gspo_loss(leaf, *rest, **keywords)
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        assert leaf.grad is not None and leaf.grad.device == torch.device(device)
        gradients.append(leaf.grad.cpu())
    assert torch.equal(*gradients)


# --- what only a GPU can show -----------------------------------------------------------------------------------------


@GPU
def test_more_rows_and_sequences_than_a_grid_is_wide() -> None:
    """70,000: a grid's second and third dimension end at 65,535."""
    n = 70_000
    logits, ids = on_device(peaked(n, 3, peaks=1)), on_device(torch.arange(n) % 3)
    advantages, old = on_device(torch.linspace(-1, 1, n)), on_device(torch.full((n,), -1.0))
    for boundaries in (torch.arange(n + 1), torch.tensor([0, n])):
        found = []
        for backend in ("triton", "reference"):
            leaf = logits.clone().requires_grad_()
            cu_seqlens = on_device(boundaries)
            loss, _ = gspo_loss(
                leaf, ids, advantages[: len(boundaries) - 1], old, cu_seqlens=cu_seqlens, eps_low=0.9, eps_high=9.0,
                backend=backend,
            )  # fmt: skip
            loss.backward()
            found.append((loss.detach(), leaf.grad))
        (ours, gradient), (theirs, expected) = found
        assert gradient is not None and expected is not None
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5, abs=1e-7)
        check_close("gradient", gradient, expected, 1e-5 * expected.abs() + 1e-6 * expected.abs().max())


@GPU
@pytest.mark.plain_memory
def test_more_than_two_to_the_31_elements() -> None:
    """bf16, 14,400 rows of Qwen's vocabulary: the last rows lie beyond what 32 bits can count."""
    n, vocab = 14_400, 151_936
    if torch.cuda.mem_get_info(DEVICE)[0] < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(n, vocab, dtype=torch.bfloat16, device=DEVICE).normal_(0, 3, generator=generator)
    ids = torch.randint(vocab, (n,), generator=generator, device=DEVICE)
    logits.requires_grad_()
    out = token_logprobs(logits, ids, backend="triton")
    (gradient,) = torch.autograd.grad(out.logprobs.sum() - out.entropy.sum(), logits)
    for last in (slice(0, 1), slice(14_133, 14_135), slice(n - 2, n)):  # 2^31 lies in row 14,134
        batch = rows(logits.detach()[last].cpu(), ids[last].cpu())
        check_rows(*(x[last].detach().cpu() for x in out), batch.rows, TOLERANCES[torch.bfloat16])
        k = len(batch.mask)
        check_gradient(gradient[last], batch, [1.0] * k, [-1.0] * k)


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "off-policy": ({}, {}),
    "on-policy": ({"on_policy": True}, {}),
    "all": (
        {"ref": True, "weights": "token", "temperature": "token"},
        {"beta": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0},
    ),
}
by_call = pytest.mark.parametrize("call", CALLS)


def training_step(objective: str, args: Arguments, options: dict[str, Any]) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward as a function of nothing; the root gradient exists already."""
    root = torch.ones((), device=DEVICE)

    def work() -> tuple[Tensor, Tensor]:
        loss = PUBLIC[objective](args.logits, *args.rest, **args.keywords, **options).loss
        (gradient,) = torch.autograd.grad(loss, args.logits, root)
        return loss.detach(), gradient

    return work


@pytest.fixture
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GSPO_KERNELS_DEBUG", raising=False)


@pytest.fixture
def syncs_are_errors() -> Iterator[Callable[[], None]]:
    """To be called once everything is warm."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@GPU
@pytest.mark.plain_memory
@by_objective
@by_layout
@by_call
def test_nothing_waits_for_the_gpu(
    objective: str, layout: str, call: str, no_debug: None, syncs_are_errors: Callable[[], None]
) -> None:
    build, options = CALLS[call]
    args = arguments(ragged_batch(objective, seed=53, **build), layout)
    work = training_step(objective, args, options)
    expected = work()
    torch.cuda.synchronize()
    syncs_are_errors()
    found = work()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@GPU
@pytest.mark.plain_memory
@by_objective
@by_layout
@by_call
def test_cuda_graphs(objective: str, layout: str, call: str, no_debug: None) -> None:
    """Captured once, replayed with other numbers and other lengths: the bits of the eager call."""
    build, options = CALLS[call]
    args, other = (
        arguments(ragged_batch(objective, seed=seed, lengths=lengths, **build), layout)
        for seed, lengths in ((54, (4, 0, 3, 5)), (55, (2, 5, 1, 4)))
    )
    work = training_step(objective, args, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    expected = training_step(objective, other, options)()
    with torch.no_grad():
        args.logits.copy_(other.logits)
        pairs = [*zip(args.rest, other.rest, strict=True)]
        pairs += [(args.keywords[name], other.keywords[name]) for name in args.keywords]
        for mine, theirs in pairs:
            if isinstance(mine, Tensor):
                mine.copy_(theirs)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])


@GPU
@pytest.mark.plain_memory
@by_objective
@by_layout
@by_call
def test_launches(objective: str, layout: str, call: str, no_debug: None) -> None:
    """Rows, two for the token stage, gradient: four, copies and fills counted; no more on-policy."""
    build, options = CALLS[call]
    work = training_step(objective, arguments(ragged_batch(objective, seed=56, **build), layout), options)
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 2 <= len(launched) <= 4, launched


@GPU
@pytest.mark.plain_memory
@by_layout
@by_call
def test_kernels_are_compiled_once(layout: str, call: str, no_debug: None) -> None:
    """Triton recompiles for an integer of 1, and for multiples of 16, unless it is told not to specialise on them."""
    build, options = CALLS[call]

    def step(lengths: list[int], **changed: Any) -> None:
        args = arguments(ragged_batch("gspo", seed=sum(lengths), lengths=lengths, **build), layout)
        if "temperature" in changed and call != "all":
            args.keywords.pop("temperature")
        training_step("gspo", args, {**options, **changed})()

    step([3, 2])
    before = triton_stage.compiled_variants()
    assert before > 0
    for k in range(20):
        step([*range(k % 5), 1 + k, 16 * (k % 3)])
    step([1])
    for k in range(20):
        changed: dict[str, Any] = {"eps_low": 1e-4 * (k + 1), "eps_high": 2e-4 * k, "max_log_ratio": 1.0 + k}
        if call == "all":
            changed |= {"beta": 0.05 * (k + 1), "entropy_coef": 0.01 * (k + 1), "dual_clip": 1.5 + k}
        else:
            changed["temperature"] = 0.5 * (k + 1)
        step([3, 2], **changed)
    assert triton_stage.compiled_variants() == before


def test_vocabularies_of_many_blocks() -> None:
    """As long as this mode affords."""
    check_batch(rows(peaked(2, sized(200_003, 16 * 256 + 3)).bfloat16()), "triton", ["all"])
