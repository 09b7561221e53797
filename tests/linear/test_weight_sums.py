"""The gradient of a bf16 head on a CPU: sums in 24 bits, rounded to bf16 once."""

from __future__ import annotations

import math

import pytest
import torch
from batches import arguments
from linear import Gradients, check_same, chunk_of, from_hidden, from_logits, problem
from modes import DEFAULT_MODE
from tolerances import TOLERANCES
from torch import Tensor

import gspo_kernels
from gspo_kernels.linear import weight_sums
from gspo_kernels.linear.products import products
from gspo_kernels.linear.schedule import chunk_size
from gspo_kernels.linear.weight_sums import Sums, WeightSums, empty_sums, rounded, to_float32
from gspo_kernels.rows import cpu_rows

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(bool(cpu_rows.unavailable_reason()), reason="the sums are made by the C++ extension"),
]

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 2.0**-149, 3e38, 1 / 3, 1 + 2.0**-15]


def made(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * torch.exp2(torch.randint(-30, 30, (size,), generator=generator))
    values[: len(SPECIAL)] = torch.tensor(SPECIAL)[:size]
    return values


def empty(size: int) -> Sums:
    return empty_sums(torch.empty(size, 1, dtype=torch.bfloat16), torch.float32)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32).long() & 0xFFFFFFFF


def check_rounded_to_24_bits(found: Tensor, exact: Tensor) -> None:
    """To one of the two neighbours of 24 bits, and to the number itself where it has 24 bits."""
    nan = exact.isnan()
    assert torch.equal(found.isnan(), nan)
    x, y = bits(exact[~nan]), bits(found[~nan])
    below = x & ~0xFF
    assert bool(((y == below) | ((y == below + 0x100) & (x != below))).all())


@pytest.mark.parametrize("size", [1, 3, 17, 100, 40_001])
def test_a_sum_is_rounded_to_a_neighbour(size: int) -> None:
    """Each addition; in the first pass nothing is read, neither from memory that holds NaN."""
    sums = empty(size)
    sums.high.fill_(math.nan)
    for number in range(4):
        product = made(size, seed=number).roll(number)
        before = to_float32(sums)[:, 0]
        cpu_rows.add_to_sums(*sums, product, 0, number)
        check_rounded_to_24_bits(to_float32(sums)[:, 0], before + product if number else product)


@pytest.mark.parametrize("pattern", [-1, 0x7FFFFFFF, 0x7FC00000, -0x400000])
def test_any_nan_stays_nan(pattern: int) -> None:
    """Memory that nobody initialized often holds ones: the largest NaN, from which a carry would make 0."""
    size = 300
    product = torch.full((size,), pattern, dtype=torch.int32).view(torch.float32)
    sums = empty(size)
    for number in range(2):
        cpu_rows.add_to_sums(*sums, product, 0, number)
        assert bool(to_float32(sums).isnan().all())
    assert bool(rounded(sums).isnan().all())


def test_a_part_of_the_sums_has_the_bits_that_it_has_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """For blocks of any size, and for one thread and several."""
    size = 70_000
    whole, parts = empty(size), empty(size)
    for number in range(3):
        product = made(size, seed=number)
        cpu_rows.add_to_sums(*whole, product, 0, number)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        for start, stop in ((0, 5), (5, 40_000), (40_000, size)):
            cpu_rows.add_to_sums(*parts, product[start:stop], start, number)
        monkeypatch.undo()
    for x, y in zip(whole, parts, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_thousands_of_small_products_are_not_lost() -> None:
    """Each is far below the last bit of the sum: rounded to nearest, or down, 2% of the sum would be missing."""
    size, count = 4096, 3000
    generator = torch.Generator().manual_seed(5)
    first = 1.0 + torch.rand(size, generator=generator)
    small = torch.rand(size, generator=generator) * first * 2.0**-17
    sums = empty(size)
    cpu_rows.add_to_sums(*sums, first, 0, 0)
    for number in range(1, count):
        cpu_rows.add_to_sums(*sums, small, 0, number)
    exact = first.double() + (count - 1) * small.double()
    error = to_float32(sums)[:, 0].double() / exact - 1.0
    assert float(error.abs().max()) < 2.0**-10 and abs(float(error.mean())) < 2.0**-14
    assert float(((count - 1) * small / first).mean()) > 0.01


@pytest.mark.parametrize("factor", [1.0, -0.3, 1024.0, 1 / 3])
def test_the_sums_are_rounded_to_bf16_once(factor: float) -> None:
    """After the multiplication, to nearest, ties to even; as torch does, and as a compiler that traces it."""
    size = 40_001
    sums = empty(size)
    product = made(size, seed=7)
    product[100:200] = 1.0 + torch.arange(100) * 2.0**-7 + 2.0**-8  # ties
    cpu_rows.add_to_sums(*sums, product, 0, 0)
    high, values = sums.high.clone(), to_float32(sums)
    expected = (values * factor).bfloat16()
    found = rounded(sums, torch.tensor(factor))
    assert found.data_ptr() == sums.high.data_ptr(), "in place"
    assert torch.equal(found.nan_to_num(-7.0), expected.nan_to_num(-7.0))
    assert torch.equal(found.isnan(), values.isnan())
    truncated, twice = (high.float() * factor).bfloat16(), (values.bfloat16().float() * factor).bfloat16()
    assert float((truncated != expected).float().mean()) > 0.1, "the low bits matter"
    assert math.log2(abs(factor)) % 1 == 0 or float((twice != expected).float().mean()) > 0.1, "so does rounding once"


def test_padding_is_zero() -> None:
    """Rows of the head that are not in the vocabulary, and all of them where no row has a gradient."""
    weight = torch.empty(5, 3, dtype=torch.bfloat16)
    for count in (0, 1):
        sums = WeightSums(weight, 4, torch.float32)
        for _ in range(count):
            for columns, out, add in sums.blocks():
                assert not add
                out.fill_(1.0 + columns.start)
        found = to_float32(sums.finished())
        assert bool((found[4:] == 0).all()) and bool((found[:4] == float(count)).all())


def gradients(rows: int | None, upstream: float = 1.0) -> tuple[Gradients, Gradients]:
    """Of a bf16 head with 500 rows, and the truth."""
    p = problem("gspo", seed=301, dtype=torch.bfloat16, lengths=(100, 150, 1, 49, 200))
    found = from_hidden(p, "packed", "gspo", rows=rows, needs_grad=["weight"], upstream=upstream)
    return found, from_logits(p, "packed", "gspo", upstream=upstream)


def test_of_hundreds_of_chunks() -> None:
    """One row each: within a step of bf16 of the truth, as for one chunk."""
    for rows in (1, None):
        found, truth = gradients(rows)
        assert found.weight is not None and truth.weight is not None and found.weight.dtype == torch.bfloat16
        step = TOLERANCES[torch.bfloat16].store
        error = (found.weight.double() - truth.weight).abs() / truth.weight.abs().amax(1, keepdim=True)
        assert float(error.max()) < 1.5 * step
        assert float((error > 0.1 * step).float().mean()) < 0.9, "most of it is rounding to bf16"


@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_gradients_as_from_float32_sums(upstream: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Almost all to the bit. A second rounding, or sums in fewer bits, would change a quarter of them."""
    found, truth = gradients(3, upstream)
    p = problem("gspo", seed=301, dtype=torch.bfloat16, lengths=(100, 150, 1, 49, 200))
    check_same(found, truth, p, number=2 * TOLERANCES[torch.bfloat16].store, upstream=upstream)
    monkeypatch.setattr(weight_sums, "in_24_bits", lambda device, dtype, sum_dtype: False)
    exact, _ = gradients(3, upstream)
    assert found.weight is not None and exact.weight is not None
    assert float((found.weight != exact.weight).float().mean()) < 0.05


def test_float64_hidden_states_and_a_head_in_bf16() -> None:
    """Products and sums are float64; the gradient of the head is rounded to bf16 once."""
    p = problem("gspo", seed=303, dtype=torch.bfloat16)
    args = arguments(p.batch, "packed")
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        hidden, weight = p.hidden.double(), p.weight.detach().to(dtype).requires_grad_()
        gspo_kernels.linear_gspo_loss(hidden, weight, *args.rest, **args.keywords).loss.backward()
        assert weight.grad is not None and weight.grad.dtype == dtype
        found.append(weight.grad)
    assert torch.equal(found[0], found[1].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_large_vocabulary(dtype: torch.dtype) -> None:
    """V = 151,936, D = 1,024, N = 2,048, beside the returned gradients: 0.35 GB in fp32, 0.5 GB in bf16."""
    vocab, width, count = 151_936, 1024, 2048
    of = products(torch.empty(20_000, width, dtype=dtype), dtype)
    rows = chunk_size(None, vocab, dtype, "cpu", gradient=True).max_rows
    workspace = 20 << 20  # of MKL, for two threads
    chunk = (rows + of.max_padding) * vocab * of.sum_dtype.itemsize
    sums = empty_sums(torch.empty(1, 1, dtype=dtype), of.sum_dtype)
    of_head = sum(x.numel() * x.dtype.itemsize for x in sums) - dtype.itemsize  # bytes of a number
    of_hidden = count * width * (of.sum_dtype.itemsize - dtype.itemsize)
    total = chunk + vocab * width * of_head + of_hidden + of.converted_bytes
    assert rows >= 448
    assert total + workspace < (0.35e9 if dtype == torch.float32 else 0.5e9)


@pytest.mark.plain_memory  # deterministic fills slow compilers down
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_backward_rounds_the_same_sums(backend: str) -> None:
    """Of a loss, and of log-probabilities: to the bit."""
    p = problem("gspo", seed=302, dtype=torch.bfloat16)
    args = arguments(p.batch, "packed")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return gspo_kernels.linear_gspo_loss(
            hidden, weight, *args.rest, **args.keywords, chunk_bytes=chunk_of(3, 61)
        ).loss

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        ids, mask = args.rest[0], args.keywords["mask"]
        return gspo_kernels.linear_token_logprobs(
            hidden, weight, ids, mask=mask, chunk_bytes=chunk_of(3, 61)
        ).logprobs.sum()

    for work in (loss, logprobs) if backend == "aot_eager" else (loss,):
        torch._dynamo.reset()
        found = []
        for function in (work, torch.compile(work, fullgraph=True, backend=backend)):
            hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
            found.append(torch.autograd.grad(function(hidden, weight) * 0.3, [hidden, weight]))
        assert found[0][1].dtype == torch.bfloat16
        assert torch.equal(found[0][1], found[1][1])
