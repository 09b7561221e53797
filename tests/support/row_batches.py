"""Rows alone, without a loss: peaked logits, and the check of every statistic and gradient of `token_logprobs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from batches import Batch, kept_tokens
from checks import check_close, check_gradient, check_no_subnormals, check_rows
from modes import on_device, sized
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels import token_logprobs


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
    leaf = on_device(batch.logits.clone()).requires_grad_()
    mask = None if bool(batch.mask.all()) else on_device(batch.mask)
    temperature = on_device(batch.temperature) if isinstance(batch.temperature, Tensor) else batch.temperature
    ids, options = on_device(batch.token_ids), {"logit_scale": batch.logit_scale, "softcap": batch.softcap}
    options |= {"temperature": temperature, "mask": mask, "backend": backend}
    if batch.kept is None:
        out = token_logprobs(leaf, ids, **options)
    else:
        out, _ = token_logprobs(leaf, ids, kept=kept_tokens(batch, "packed"), full_distribution=False, **options)
    assert (out.logprobs.dtype, out.entropy.dtype, out.lse.dtype) == (precise, precise, torch.float64)
    check_rows(out.logprobs, out.entropy, out.lse, batch.rows, tol)
    varied = on_device(torch.linspace(0.5, -1.5, len(leaf)).to(precise))  # no two rows, nor signs, alike
    for name in upstream or list(UPSTREAM):
        scales = UPSTREAM[name]
        g = [(varied * k).to(x.dtype) for k, x in zip(scales, (out.logprobs, out.entropy, out.lse), strict=True)]
        used = [(x, y) for k, x, y in zip(scales, (out.logprobs, out.entropy, out.lse), g, strict=True) if k]
        (gradient,) = torch.autograd.grad([x for x, _ in used], leaf, [y for _, y in used], retain_graph=True)
        check_gradient(gradient, batch, *(x.tolist() for x in g))
        check_no_subnormals(gradient)


# --- logits up to the largest finite number -----------------------------------------------------------------------

FAR = (0, 3, 5, 6)  # target columns: for each, some row of `far` has it above, below and among the largest


def far(dtype: torch.dtype, temperature: float, vocab: int) -> Tensor:
    """[9, vocab] logits, of which most are as far from 0 as there are finite numbers, or so far as to be all apart."""
    most = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64)
    columns = torch.arange(vocab)
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    logits[0] = torch.where(columns % 7 == 0, most, -most)  # ties
    logits[1, 5] = logits[2, 0] = most  # one huge
    logits[3:5] = -most
    logits[4, 3] = -0.99 * most
    logits[5] = torch.where(columns % 2 == 0, -most, most / 2)
    logits[5, [5, 6]] = most
    logits[6] = torch.where(columns % 3 == 0, most.clamp(max=1e9 * temperature), -5.0)
    logits[7] = 2e9 * temperature + 128 * temperature * (columns * 37 % 11)
    logits[8] = -logits[7]
    return logits.clamp(-most, most).to(dtype)


def check_far(
    logits: Tensor,
    target: int,
    temperature: float,
    found: Sequence[Tensor],
    gradient_of: Callable[[tuple[float, ...]], Tensor],
) -> None:
    """l, H, lse and the gradients for every kind of upstream, of rows with one target column, in float64."""
    tol = TOLERANCES[logits.dtype]
    z = logits.double()
    below = (z - z.amax(-1, keepdim=True)) / temperature
    logp = below - below.exp().sum(-1, keepdim=True).log()
    p = logp.exp()
    own, entropy = logp[:, target], -torch.where(p > 0, p * logp, 0.0).sum(-1)
    lse = z.amax(-1) / temperature + below.exp().sum(-1).log()
    logprobs, *_ = found
    for name, actual, expected in zip(("l", "H", "lse"), found, (own.to(logprobs.dtype), entropy, lse), strict=True):
        check_close(name, actual, expected, 2 * tol.number * (1 + expected.double().abs()))
    others = (torch.arange(z.shape[1]) != target).double()
    for name, scales in UPSTREAM.items():
        scale = 0.01 * min(temperature, 1.0)  # so that a gradient is no larger than fp16 can be
        g_l, g_h, g_lse = (k * scale for k in scales)
        through_entropy = torch.where(p > 0, p * (logp + entropy[:, None]), 0.0)
        share = torch.where(others == 0, -torch.expm1(logp), -p)
        expected = (g_l * share + g_lse * p - g_h * through_entropy) / temperature
        size = scale * p * (1 + logp.abs().clamp(max=200.0)) / temperature
        bound = 4 * tol.number * (size + expected.abs()) + tol.store * expected.abs() + tol.tiny
        check_close(f"gradient of {name}", gradient_of((g_l, g_h, g_lse)), expected, bound)


def check_far_rows(dtype: torch.dtype, temperature: float, backend: str, vocab: int) -> None:
    logits = far(dtype, temperature, vocab)
    for target in sized(FAR, FAR[1:3]):
        leaf, ids = on_device(logits.clone()).requires_grad_(), on_device(torch.full((len(logits),), target))
        out = token_logprobs(leaf, ids, temperature=temperature, backend=backend)

        def gradient_of(scales: tuple[float, ...], leaf: Tensor = leaf, out: Sequence[Tensor] = out) -> Tensor:
            g = [torch.full_like(x, k) for x, k in zip(out, scales, strict=True)]
            return torch.autograd.grad(list(out), leaf, g, retain_graph=True)[0]

        check_far(logits, target, temperature, [x.detach() for x in out], gradient_of)


def everything(logits: Tensor, ids: Tensor, backend: str) -> list[Tensor]:
    """l, H, lse and the gradient of a fixed mix of them; from and on the device, with strides and address as given."""
    leaf = logits if logits.requires_grad else logits.detach().requires_grad_()
    out = token_logprobs(leaf, ids, backend=backend)
    mix = 0.7 * out.logprobs.sum() - 0.3 * out.entropy.sum() + 0.2 * out.lse.sum()
    (gradient,) = torch.autograd.grad(mix, leaf)
    return [out.logprobs.detach(), out.entropy.detach(), out.lse.detach(), gradient]
