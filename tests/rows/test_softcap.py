"""Capped and scaled logits, on every backend: z = c tanh(s x / c) / temperature, and its gradient by x."""

from __future__ import annotations

import math

import pytest
import torch
from batches import Batch
from checks import check_close, check_gradient, check_rows
from modes import by_backend, by_combination, on_device, sized
from row_batches import check_batch, peaked, rows
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels import gspo_loss, linear_token_logprobs, token_logprobs


def capped(batch: Batch, softcap: float | None, logit_scale: float = 1.0) -> Batch:
    batch.softcap, batch.logit_scale = softcap, logit_scale
    return batch


@by_combination
@pytest.mark.parametrize("vocab", sized([1, 2, 7, 127, 513, 4099], [1, 7, 257, 773]))
def test_values_and_gradients(backend: str, dtype: torch.dtype, vocab: int) -> None:
    """Logits on both sides of where tanh is computed in another way (1/2), and far into the cap."""
    check_batch(capped(rows((peaked(6, vocab) * 1.5).to(dtype)), 7.0), backend)


@by_combination
@pytest.mark.parametrize(("softcap", "logit_scale"), [(30.0, 0.25), (2.0, 3.0), (500.0, 1.0), (None, 0.0625)])
@pytest.mark.parametrize("temperature", [0.7, "by token"])
def test_options(
    backend: str, dtype: torch.dtype, softcap: float | None, logit_scale: float, temperature: float | str
) -> None:
    value = torch.tensor([0.5, 0.7, 1.0, 2.0, 1.3]) if isinstance(temperature, str) else temperature
    check_batch(capped(rows(peaked(5, 300).to(dtype), temperature=value), softcap, logit_scale), backend)


def wide_logits(n: int, vocab: int) -> dict[str, Tensor]:
    """From -1e4 to 1e4 in several ways: [n, vocab] each."""
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(n, vocab, generator=generator) * 2 - 1
    sign = uniform.sign()
    steps = torch.linspace(-60.0, 60.0, n * vocab).view(n, vocab)
    crossing = torch.randn(n, vocab, generator=generator)
    crossing[:, ::7] = 30 * math.atanh(0.5) + uniform[:, ::7] * 1e-3
    two = torch.full((n, vocab), -1e4)
    two[:, 0] = torch.linspace(16.5, 40.0, n)
    two[:, 1] = two[:, 0] + uniform[:, 1]
    return {
        "two alike": two,
        "uniform": uniform * 1e4,
        "every size": sign * 10 ** (uniform.abs() * 8 - 4),
        "dense": steps[:, torch.randperm(vocab, generator=generator)],
        "largest at one half": crossing,
        "half of them": torch.where(uniform > 0, 1e4, crossing),
    }


@by_backend
@pytest.mark.parametrize("kind", wide_logits(1, 8))
def test_the_window_of_gspo(backend: str, kind: str) -> None:
    """A log-probability within 1e-6 of float64, relative where it is beyond 1, at a cap of 30."""
    logits = wide_logits(sized(64, 8), sized(1001, 515))[kind]
    ids = torch.arange(len(logits)) * 7919 % (2 if kind == "two alike" else 515)
    found = token_logprobs(on_device(logits), on_device(ids), softcap=30.0, backend=backend).logprobs
    z = 30.0 * torch.tanh(logits.double() / 30.0)
    expected = torch.log_softmax(z, -1).gather(-1, ids[:, None])[:, 0]
    check_close("logprobs", found, expected, 1e-6 * expected.abs().clamp(min=1.0))


def test_one_float32_is_not_enough_for_a_tanh() -> None:
    """What the test above would reject."""
    with pytest.raises(AssertionError, match="logprobs: "):
        logits = wide_logits(64, 515)["two alike"]
        z, rounded = (30.0 * torch.tanh(x / 30.0).double() for x in (logits.double(), logits))
        expected = torch.log_softmax(z, -1)
        check_close("logprobs", torch.log_softmax(rounded, -1), expected, 1e-6 * expected.abs().clamp(min=1.0))


@by_combination
@pytest.mark.parametrize("softcap", [3.0, 30.0])
def test_infinite_logits_are_at_the_cap(backend: str, dtype: torch.dtype, softcap: float) -> None:
    """A cap makes a finite logit of -inf: a column is only left out by `vocab_size`."""
    logits = peaked(6, 75)
    logits[0, 5:9] = -math.inf
    logits[1] = -math.inf
    logits[2, 3] = math.inf
    logits[3, :40] = -math.inf
    logits[4, 74] = math.inf
    check_batch(capped(rows(logits.to(dtype)), softcap), backend)


@by_combination
@pytest.mark.parametrize("column", [0, 40, 298])
def test_a_nan_is_not_hidden_and_stays_in_its_row(backend: str, dtype: torch.dtype, column: int) -> None:
    logits = peaked(3, 299).to(dtype)
    logits[1, column] = math.nan
    leaf, ids = on_device(logits).requires_grad_(), on_device(torch.tensor([4, 5, 6]))
    out = token_logprobs(leaf, ids, softcap=5.0, backend=backend)
    (gradient,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaf)
    for values in (*out, gradient.float().sum(-1)):
        assert values.isnan().tolist() == [False, True, False]


@by_combination
def test_sure_rows(backend: str, dtype: torch.dtype) -> None:
    """The target's probability, or another's, is nearly 1: what is left of it keeps its digits."""
    logits = peaked(8, 200) * 0.3
    logits[torch.arange(8), torch.tensor([3, 9, 199, 0, 50, 60, 70, 80])] = torch.linspace(20.0, 90.0, 8)
    ids = torch.tensor([3, 9, 199, 0, 51, 61, 71, 81])
    check_batch(capped(rows(logits.to(dtype), ids), 30.0), backend)


@by_backend
def test_a_strided_padded_vocabulary_at_odd_addresses(backend: str) -> None:
    """Columns beyond `vocab_size` are not read: a cap would make finite logits of what lies there."""
    memory = torch.full((5, 311), math.nan)
    memory[:, 1:300] = peaked(5, 299) * 2
    batch = capped(rows(memory[:, 1:300].clone()), 6.0)
    leaf = on_device(memory).requires_grad_()
    out = token_logprobs(leaf[:, 1:], on_device(batch.token_ids), softcap=6.0, vocab_size=299, backend=backend)
    check_rows(out.logprobs, out.entropy, out.lse, batch.rows, TOLERANCES[torch.float32])
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), leaf)
    check_gradient(gradient[:, 1:300], batch, [1.0] * 5)
    assert bool((gradient[:, 300:] == 0).all()) and bool((gradient[:, 0] == 0).all())


@by_backend
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_gradient_over_the_logits(backend: str, on_policy: bool) -> None:
    logits, ids = peaked(6, 515) * 2, torch.arange(6) * 80
    old = torch.log_softmax(5 * torch.tanh(logits / 5), -1).gather(-1, ids[:, None])[:, 0].clamp(max=0.0)
    gradients = []
    for overwrite in (False, True):
        leaf = on_device(logits.clone()).requires_grad_()
        loss, _ = gspo_loss(
            leaf * 1.0, on_device(ids), on_device(torch.tensor([1.0, -2.0])), None if on_policy else on_device(old),
            cu_seqlens=on_device(torch.tensor([0, 2, 6])), softcap=5.0, overwrite_logits=overwrite, backend=backend,
        )  # fmt: skip
        loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@by_backend
def test_from_hidden_states(backend: str) -> None:
    """Logits of a head with a bias, capped chunk by chunk, and their gradient through the products."""
    generator = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(9, 16, generator=generator), torch.randn(75, 16, generator=generator)
    bias, ids = torch.randn(75, generator=generator), torch.arange(9) * 8
    operands = [on_device(x).requires_grad_() for x in (hidden, head, bias)]
    out = linear_token_logprobs(
        operands[0], operands[1], on_device(ids), bias=operands[2], logit_scale=0.5, softcap=3.0,
        chunk_bytes=4 * 75 * 4, backend=backend,
    )  # fmt: skip
    gradients = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), operands)
    truth = [x.double().requires_grad_() for x in (hidden, head, bias)]
    z = 3.0 * torch.tanh(0.5 * (truth[0] @ truth[1].T + truth[2]) / 3.0)
    logp = torch.log_softmax(z, -1)
    logprobs, entropy = logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    check_close("logprobs", out.logprobs, logprobs, 2e-6 * logprobs.detach().abs().clamp(min=1.0))
    for actual, expected in zip(gradients, torch.autograd.grad(logprobs.sum() + entropy.sum(), truth), strict=True):
        check_close("gradient", actual, expected, 1e-5 * expected.abs().amax().expand_as(expected))
