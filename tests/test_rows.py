"""token_logprobs: each row's (l, H, lse) and their gradients against the oracle, and what a row may depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracle
from batches import Batch
from checks import (
    check_close,
    check_gradient,
    check_no_subnormals,
    check_rows,
)
from gspo_kernels import token_logprobs
from tolerances import TOLERANCES

COMBINATIONS = [
    ("native", torch.float32),
    ("native", torch.bfloat16),
    ("native", torch.float16),
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
    ("reference", torch.float16),
    ("reference", torch.float64),
]
by_combination = pytest.mark.parametrize(
    ("backend", "dtype"), COMBINATIONS, ids=[f"{b}-{str(d).removeprefix('torch.')}" for b, d in COMBINATIONS]
)
by_backend = pytest.mark.parametrize("backend", ["native", "reference"])

# 1 and 2: no tail. 7, 16, 127: less than, exactly, just under whole vectors. 511-513: about a block. 4099 and 50257:
# odd, so that every row starts at another alignment. 151936: Qwen's vocabulary.
VOCABULARIES = [1, 2, 7, 16, 127, 511, 512, 513, 1000, 4099]
LARGE_VOCABULARIES = [50257, 151936]


def peaked(n: int, vocab: int, seed: int = 0, peaks: int = 3) -> Tensor:
    """[n, vocab] logits with a few large ones a row, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=generator) * 2
    where = torch.randint(vocab, (n, peaks), generator=generator)
    return logits.scatter(-1, where, torch.rand(n, peaks, generator=generator) * 6 + 4)


def rows(logits: Tensor, token_ids: Tensor | None = None, temperature: float | Tensor = 1.0) -> Batch:
    n = len(logits)
    if token_ids is None:  # the largest, the first, the last column, and some others
        token_ids = torch.arange(n) * 7919 % logits.shape[-1]
        token_ids[0] = logits[0].float().nan_to_num().argmax()
        token_ids[-1] = logits.shape[-1] - 1
    mask = torch.ones(n, dtype=torch.bool)
    return Batch(logits, token_ids, mask, [n], torch.zeros(1), temperature=temperature)


UPSTREAM = {  # (dL/dl, dL/dH, dL/dlse): each alone, then together
    "logprobs": (1.0, 0.0, 0.0),
    "entropy": (0.0, 1.0, 0.0),
    "lse": (0.0, 0.0, 1.0),
    "all": (0.7, -0.3, 0.2),
}


def check_batch(batch: Batch, backend: str, upstream: list[str] | None = None) -> None:
    """Values, then the gradient for each kind of upstream, with its invariants."""
    tol = TOLERANCES[batch.logits.dtype]
    precise = torch.float64 if batch.logits.dtype is torch.float64 else torch.float32
    leaf = batch.logits.clone().requires_grad_()
    mask = None if bool(batch.mask.all()) else batch.mask
    out = token_logprobs(leaf, batch.token_ids, temperature=batch.temperature, mask=mask, backend=backend)
    assert (out.logprobs.dtype, out.entropy.dtype, out.lse.dtype) == (precise, precise, torch.float64)
    check_rows(out.logprobs, out.entropy, out.lse, batch.rows, tol)
    varied = torch.linspace(0.5, -1.5, len(leaf)).to(precise)  # no two rows, nor signs, alike
    for name in upstream or list(UPSTREAM):
        scales = UPSTREAM[name]
        g = [(varied * k).to(x.dtype) for k, x in zip(scales, (out.logprobs, out.entropy, out.lse), strict=True)]
        used = [(x, y) for k, x, y in zip(scales, (out.logprobs, out.entropy, out.lse), g, strict=True) if k]
        (gradient,) = torch.autograd.grad([x for x, _ in used], leaf, [y for _, y in used], retain_graph=True)
        check_gradient(gradient, batch, *(x.tolist() for x in g))
        check_no_subnormals(gradient)


@by_combination
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_values_and_gradients(backend: str, dtype: torch.dtype, vocab: int) -> None:
    check_batch(rows(peaked(6, vocab).to(dtype)), backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("native", torch.float32), ("native", torch.bfloat16), ("reference", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("vocab", LARGE_VOCABULARIES)
def test_large_vocabularies(backend: str, dtype: torch.dtype, vocab: int) -> None:
    check_batch(rows(peaked(2, vocab).to(dtype)), backend, ["all"])


@by_combination
@pytest.mark.parametrize("temperature", [0.1, 0.7, 2.0, "by token"])
def test_temperature(backend: str, dtype: torch.dtype, temperature: float | str) -> None:
    value = torch.tensor([0.1, 0.7, 1.0, 2.0, 1.3]) if isinstance(temperature, str) else temperature
    check_batch(rows(peaked(5, 300).to(dtype), temperature=value), backend)


@by_combination
@pytest.mark.parametrize("vocab", [7, 130, 1025])
def test_masked_rows_are_zero_and_never_read(backend: str, dtype: torch.dtype, vocab: int) -> None:
    batch = rows(peaked(6, vocab).to(dtype))
    batch.mask[[0, 3, 4]] = False
    batch.logits[0], batch.logits[3, 1], batch.logits[4] = math.nan, math.inf, -math.inf
    batch.token_ids[[0, 3, 4]] = torch.tensor([-100, 2**40, -1])
    check_batch(batch, backend)


# --- rows that break kernels --------------------------------------------------------------------------------------


@by_combination
@pytest.mark.parametrize("dead", ["first block", "last block", "all but the target", "every second", "none but a few"])
def test_minus_infinity_logits(backend: str, dtype: torch.dtype, dead: str) -> None:
    """exp(-inf - -inf) is NaN: a kernel whose first block is all -inf starts from a maximum of -inf."""
    logits = peaked(4, 5000)
    ids = torch.tensor([2500, 2501, 3000, 4094])
    keep = logits.gather(-1, ids[:, None])
    if dead == "first block":
        logits[:, :2300] = -math.inf
    elif dead == "last block":
        logits[:, 4095:] = -math.inf
    elif dead == "all but the target":
        logits[:] = -math.inf
    elif dead == "every second":
        logits[:, ::2] = -math.inf
    else:
        logits[:, torch.arange(5000) % 1000 != 999] = -math.inf
    logits.scatter_(-1, ids[:, None], keep)
    check_batch(rows(logits.to(dtype), ids), backend, ["all"])


@by_combination
@pytest.mark.parametrize("shift", [-200.0, -1e4, 1e4])
def test_shifted_logits(backend: str, dtype: torch.dtype, shift: float) -> None:
    """A running maximum that starts at 0, or an lse kept in fp32, shows here and nowhere else."""
    if dtype is torch.bfloat16 and abs(shift) > 1e3:
        logits = shift + peaked(5, 700).mul(64).round()  # bf16 steps by 64 at 1e4
    else:
        logits = peaked(5, 700) + shift
    check_batch(rows(logits.to(dtype)), backend)


@by_combination
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 1 - 1e-7, 1 - 1e-9])
def test_confident_targets(backend: str, dtype: torch.dtype, p: float) -> None:
    """1 - p and lse - z_y cancel: l and the target's gradient must keep their relative precision, in bf16 too."""
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids = torch.tensor([0, 17, 512, 999])
    rest = logits.double().scatter(-1, ids[:, None], -math.inf).logsumexp(-1)
    logits[torch.arange(4), ids] = (rest + math.log(p / (1 - p))).to(dtype)
    batch = rows(logits, ids)
    assert all(abs(row.logprob) < 2 * (1 - p) for row in batch.rows)
    check_batch(batch, backend)


@by_combination
def test_a_margin_of_twenty_nats(backend: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 50)
    logits[:, 20] = 20.0
    batch = rows(logits.to(dtype), torch.tensor([20, 3]))  # the sure token, and one it drowns
    assert batch.rows[0].entropy > 4e-9 and -1.1e-7 < batch.rows[0].logprob < -9e-8
    check_batch(batch, backend)


@by_combination
def test_two_equal_maxima_and_equal_logits(backend: str, dtype: torch.dtype) -> None:
    logits = torch.full((4, 257), -3.0)
    logits[1, [3, 200]] = 9.0
    logits[2, [3, 200]] = 9.0
    check_batch(rows(logits.to(dtype), torch.tensor([100, 3, 200, 256])), backend)


@by_combination
def test_rising_and_falling_rows(backend: str, dtype: torch.dtype) -> None:
    """The running maximum moves at every element, or never again after the first."""
    rise = torch.linspace(-40, 40, 4097)
    check_batch(rows(torch.stack([rise, rise.flip(0), rise.roll(2000)]).to(dtype)), backend, ["all"])


@by_combination
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 5, 1029])
def test_a_bad_logit_stays_in_its_row(backend: str, dtype: torch.dtype, bad: float, column: int) -> None:
    batch = rows(peaked(4, 1030).to(dtype), torch.tensor([3, 3, 3, 3]))
    leaf = batch.logits.clone()
    leaf[1, column] = bad
    leaf.requires_grad_()
    out = token_logprobs(leaf, batch.token_ids, backend=backend)
    assert not math.isfinite(float(out.logprobs[1])), "a bad logit in an unmasked row must show"
    (gradient,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaf)
    assert bool(gradient[1].isnan().any())
    others = torch.tensor([0, 2, 3])
    sound = rows(batch.logits[others], batch.token_ids[others])
    check_rows(out.logprobs[others], out.entropy[others], out.lse[others], sound.rows, TOLERANCES[dtype])
    check_gradient(gradient[others], sound, [1.0] * 3, [1.0] * 3)


@by_combination
def test_a_row_of_minus_infinity_is_not_hidden_and_stays_alone(backend: str, dtype: torch.dtype) -> None:
    batch = rows(peaked(3, 100).to(dtype))
    batch.logits[1] = -math.inf
    out = token_logprobs(batch.logits, batch.token_ids, backend=backend)
    assert not math.isfinite(float(out.logprobs[1]))
    others = torch.tensor([0, 2])
    sound = [batch.rows[0], batch.rows[2]]
    check_rows(out.logprobs[others], out.entropy[others], out.lse[others], sound, TOLERANCES[dtype])


@by_combination
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_zero_coefficients_is_exactly_zero(backend: str, dtype: torch.dtype, bad: float) -> None:
    """inf * 0 is NaN: a row that the loss does not use is selected away, whatever its logits are."""
    batch = rows(peaked(4, 300).to(dtype))
    leaf = batch.logits.clone()
    leaf[2] = bad
    leaf.requires_grad_()
    out = token_logprobs(leaf, batch.token_ids, backend=backend)
    g = torch.tensor([1.0, 0.0, 0.0, -2.0]).to(out.logprobs.dtype)
    (gradient,) = torch.autograd.grad(out.logprobs, leaf, g)
    check_gradient(gradient, batch, g.tolist())


@by_combination
def test_no_subnormal_gradients(backend: str, dtype: torch.dtype) -> None:
    """Logits from 0 down to -120 below the peak put p across the whole subnormal range of fp32."""
    logits = torch.linspace(-120, 0, 4001).repeat(3, 1)
    check_batch(rows(logits.to(dtype), torch.tensor([4000, 2000, 0])), backend, ["logprobs", "all"])


@by_combination
def test_tiny_coefficients(backend: str, dtype: torch.dtype) -> None:
    """1 / (64 sequences of 32k tokens) is subnormal in fp16: no coefficient may be held in the logits' dtype."""
    batch = rows(peaked(3, 40).to(dtype))
    leaf = batch.logits.clone().requires_grad_()
    out = token_logprobs(leaf, batch.token_ids, backend=backend)
    g = torch.full((3,), 1 / 2**21).to(out.logprobs.dtype)
    (gradient,) = torch.autograd.grad(out.logprobs, leaf, g)
    check_gradient(gradient, batch, g.tolist())


# --- layout, order, threads: what a row may not depend on -----------------------------------------------------------


def everything(logits: Tensor, ids: Tensor, backend: str) -> list[Tensor]:
    """l, H, lse and the gradient of a fixed mix of them."""
    leaf = logits if logits.requires_grad else logits.detach().requires_grad_()
    out = token_logprobs(leaf, ids, backend=backend)
    mix = 0.7 * out.logprobs.sum() - 0.3 * out.entropy.sum() + 0.2 * out.lse.sum()
    (gradient,) = torch.autograd.grad(mix, leaf)
    return [out.logprobs.detach(), out.entropy.detach(), out.lse.detach(), gradient]


def same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for name, x, y in zip(("logprobs", "entropy", "lse", "gradient"), a, b, strict=True):
        assert torch.equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} differ in bits"


@by_combination
@pytest.mark.parametrize("vocab", [61, 513, 4099])
def test_a_row_has_the_same_bits_wherever_it_stands(backend: str, dtype: torch.dtype, vocab: int) -> None:
    logits = peaked(12, vocab).to(dtype)
    ids = torch.arange(12) * 31 % vocab
    whole = everything(logits, ids, backend)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    same_bits(everything(logits[order], ids[order], backend), [x[order] for x in whole])
    for t in (0, 5, 11):
        same_bits(everything(logits[t : t + 1].clone(), ids[t : t + 1], backend), [x[t : t + 1] for x in whole])
    padded = [x.flatten(0, 1) for x in everything(logits.view(3, 4, vocab), ids.view(3, 4), backend)]
    same_bits(padded, whole)


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
    logits, ids = peaked(64, 3001).to(dtype), torch.arange(64)
    first = everything(logits, ids, backend)
    for _ in range(3):
        same_bits(everything(logits, ids, backend), first)


@by_combination
@pytest.mark.parametrize("view", ["[:, :-1]", "columns", "transposed rows", "every second row", "expanded"])
def test_views(backend: str, dtype: torch.dtype, view: str) -> None:
    base = peaked(24, 130).to(dtype).view(4, 6, 130)
    logits = {
        "[:, :-1]": lambda: base[:, :-1],
        "columns": lambda: base[..., 3:128],  # rows neither aligned nor next to one another
        "transposed rows": lambda: base.transpose(0, 1),
        "every second row": lambda: base[:, ::2],
        "expanded": lambda: base[:1].expand(4, 6, 130),
    }[view]()
    ids = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) % logits.shape[-1]
    same_bits(everything(logits, ids, backend), everything(logits.contiguous(), ids, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_vocabulary_that_is_not_the_last_stride(dtype: torch.dtype) -> None:
    """[9, 70] with columns 9 apart: the kernels decline and say why, the automatic choice gives right numbers."""
    logits, ids = peaked(70, 9).to(dtype).t(), torch.arange(9) * 7
    same_bits(everything(logits, ids, "reference"), everything(logits.contiguous(), ids, "reference"))
    with pytest.raises(ValueError, match=r"backend.*stride"):
        token_logprobs(logits, ids, backend="native")
    out = token_logprobs(logits, ids)
    check_rows(out.logprobs, out.entropy, out.lse, rows(logits, ids).rows, TOLERANCES[dtype])


@by_combination
@pytest.mark.parametrize("offset", range(8))
def test_any_address(backend: str, dtype: torch.dtype, offset: int) -> None:
    logits, ids = peaked(3, 333).to(dtype), torch.tensor([0, 332, 100])
    memory = torch.full((3 * 333 + 16,), math.nan, dtype=dtype)
    moved = memory[offset : offset + 999].view(3, 333).copy_(logits)
    same_bits(everything(moved, ids, backend), everything(logits, ids, backend))


@by_combination
def test_views_pass_their_gradient_to_the_base(backend: str, dtype: torch.dtype) -> None:
    base = peaked(12, 50).to(dtype).view(3, 4, 50).requires_grad_()
    ids = torch.arange(9).view(3, 3)
    token_logprobs(base[:, :-1], ids, backend=backend).logprobs.sum().backward()
    assert base.grad is not None and bool((base.grad[:, -1] == 0).all())
    check_gradient(base.grad[:, :-1].flatten(0, 1), rows(base.detach()[:, :-1].flatten(0, 1), ids.flatten()), [1.0] * 9)


@by_backend
@pytest.mark.plain_memory
def test_rows_more_than_two_to_the_31_elements_apart(backend: str) -> None:
    vocab = 1000
    memory = torch.empty(2**31 + 4 * vocab, dtype=torch.bfloat16)  # never touched but for two rows
    logits = memory.as_strided((2, vocab), (2**31 + vocab, 1), 5)
    logits.copy_(peaked(2, vocab))
    check_batch(rows(logits), backend)


@by_backend
def test_seventy_thousand_rows(backend: str) -> None:
    logits, ids = peaked(70_000, 3, peaks=1), torch.arange(70_000) % 3
    leaf = logits.clone().requires_grad_()
    out = token_logprobs(leaf, ids, backend=backend)
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
    leaf = torch.zeros(shape, requires_grad=True)
    out = token_logprobs(leaf, torch.zeros(shape[:-1], dtype=torch.int64), backend=backend)
    assert [x.shape for x in out] == [shape[:-1]] * 3
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert leaf.grad is not None and leaf.grad.shape == shape


# --- invariants and derivatives -------------------------------------------------------------------------------------


@by_combination
def test_a_constant_added_to_the_logits_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """On a grid where the addition itself is exact."""
    step, shift = (1.0, 128.0) if dtype is torch.bfloat16 else (1 / 16, 64.0)
    logits = (peaked(5, 400).clamp(-12, 12) / step).round() * step
    ids = torch.arange(5)
    here, there = (everything(x.to(dtype), ids, backend) for x in (logits, logits + shift))
    tol = TOLERANCES[dtype]
    check_close("logprobs", there[0], here[0].double(), 2 * tol.number * here[0].double().abs())
    check_close("entropy", there[1], here[1].double(), 2 * tol.number * (1 + here[1].double()))
    check_close("lse", there[2], here[2] + shift, 2 * tol.number * (1 + shift + here[2].abs()))
    size = here[3].double().abs()
    check_close("gradient", there[3], here[3].double(), (20 * tol.number + 2 * tol.store) * size + tol.tiny)


def test_gradcheck_of_the_reference() -> None:
    logits = peaked(4, 9).double().requires_grad_()
    ids, mask = torch.tensor([0, 8, 3, 3]), torch.tensor([True, True, False, True])
    for temperature in (0.7, torch.tensor([0.5, 1.0, 1.5, 2.0])):

        def outputs(x: Tensor, temperature: float | Tensor = temperature) -> tuple[Tensor, ...]:
            return tuple(token_logprobs(x, ids, temperature=temperature, mask=mask, backend="reference"))

        assert torch.autograd.gradcheck(outputs, logits)


@by_backend
def test_finite_differences_in_fp32(backend: str) -> None:
    """Along random directions; the step's own error is h^2 / 6 times a third derivative of order one."""
    generator = torch.Generator().manual_seed(5)
    logits, ids = peaked(3, 200), torch.tensor([0, 77, 199])
    whole = everything(logits.clone(), ids, backend)[3]

    def mix(x: Tensor) -> float:
        out = token_logprobs(x, ids, backend=backend)
        return float((0.7 * out.logprobs - 0.3 * out.entropy).double().sum() + 0.2 * out.lse.sum())

    h = 2.0**-7
    for _ in range(5):
        direction = torch.randn(3, 200, generator=generator)
        slope = (mix(logits + h * direction) - mix(logits - h * direction)) / (2 * h)
        assert slope == pytest.approx(float((whole * direction).double().sum()), abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@by_backend
def test_no_worse_than_torch_at_equal_precision(backend: str, dtype: torch.dtype) -> None:
    """The error of l, of the target column and of the tail, each against torch's log_softmax in the same dtype."""
    batch = rows(peaked(32, 3000).to(dtype))
    ours = batch.logits.clone().requires_grad_()
    torchs = batch.logits.clone().requires_grad_()
    logprobs = token_logprobs(ours, batch.token_ids, backend=backend).logprobs
    theirs = torchs.log_softmax(-1).gather(-1, batch.token_ids[:, None])[:, 0]
    logprobs.sum().backward()
    theirs.sum().backward()
    truth = torch.tensor([row.logprob for row in batch.rows]).double()
    slope = torch.tensor(
        [oracle.row_gradient(x.tolist(), int(y), 1.0, 1.0) for x, y in zip(batch.logits, batch.token_ids, strict=True)]
    ).double()
    at = torch.zeros_like(slope, dtype=torch.bool).scatter(-1, batch.token_ids[:, None], True)
    assert ours.grad is not None and torchs.grad is not None
    for name, mine, other, exact in (
        ("logprobs", logprobs.detach(), theirs.detach(), truth),
        ("target", ours.grad[at], torchs.grad[at], slope[at]),
        ("tail", ours.grad[~at], torchs.grad[~at], slope[~at]),
    ):
        error, bar = float((mine.double() - exact).norm()), float((other.double() - exact).norm())
        assert error <= bar, f"{name}: error {error}, torch's {bar}"


# --- autograd and memory --------------------------------------------------------------------------------------------


@by_combination
def test_no_grad_gives_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    logits, ids = peaked(5, 300).to(dtype), torch.arange(5)
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
    leaf = batch.logits.clone().requires_grad_()
    out = token_logprobs(leaf, batch.token_ids, backend=backend)
    strided = torch.arange(12.0).to(out.logprobs.dtype)[::2] - 3
    (gradient,) = torch.autograd.grad(out.logprobs, leaf, strided, retain_graph=True)
    check_gradient(gradient, batch, strided.tolist())
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), leaf, retain_graph=True)
    check_gradient(gradient, batch, [1.0] * 6)
    (gradient,) = torch.autograd.grad(out.logprobs, leaf, strided)
    check_gradient(gradient, batch, strided.tolist())  # a third backward still finds what the forward saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.plain_memory
def test_memory(dtype: torch.dtype) -> None:
    """Forward: O(N), on a strided view too, nothing in fp32. Backward: one gradient."""
    base = peaked(65, 8000).to(dtype).view(1, 65, 8000).requires_grad_()
    view = base.detach()[:, :-1].requires_grad_()
    ids = torch.zeros(1, 64, dtype=torch.int64)
    size = view.numel() * view.element_size()

    def allocated(work: object) -> int:
        assert callable(work)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    out = []
    assert allocated(lambda: out.append(token_logprobs(view, ids, backend="native"))) < size / 8
    assert allocated(lambda: out[0].logprobs.sum().backward()) < 1.2 * size
