"""Rows alone, without a loss: peaked logits, and the check of every statistic and gradient of `token_logprobs`."""

from __future__ import annotations

import torch
from batches import Batch
from checks import check_gradient, check_no_subnormals, check_rows
from modes import on_device
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
    out = token_logprobs(leaf, on_device(batch.token_ids), temperature=temperature, mask=mask, backend=backend)
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


def everything(logits: Tensor, ids: Tensor, backend: str) -> list[Tensor]:
    """l, H, lse and the gradient of a fixed mix of them; from and on the device, with strides and address as given."""
    leaf = logits if logits.requires_grad else logits.detach().requires_grad_()
    out = token_logprobs(leaf, ids, backend=backend)
    mix = 0.7 * out.logprobs.sum() - 0.3 * out.entropy.sum() + 0.2 * out.lse.sum()
    (gradient,) = torch.autograd.grad(mix, leaf)
    return [out.logprobs.detach(), out.entropy.detach(), out.lse.detach(), gradient]
