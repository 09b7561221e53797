"""The columns that an engine's sampling filters keep, computed from logits by vLLM's rules, in vLLM's order.

    z = logits / temperature, in float32
    min-p   keeps z >= max z + log min_p
    top-k   of those, keeps z >= the k-th largest: all that equal it, so more than k columns at a tie
    top-p   of those, keeps a column if it and all before it, in ascending order, have more than 1 - p together, and
            always the last; of columns with equal z, the lower id comes later

This is what `apply_min_p` (`vllm/v1/worker/gpu/sample/min_p.py`) and `apply_top_k_top_p_pytorch`
(`vllm/v1/sample/ops/topk_topp_sampler.py`) of vLLM 0.32 do, except that the latter's sort is not stable: which of equal
columns top-p keeps is the accident of that sort. The rule here is that of vLLM's Triton kernel, which otherwise
differs at a tie of top-k alone: it keeps exactly k columns. docs/rollout.md says where SGLang differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import as_bool

BLOCK = 1 << 22  # logits that are filtered together, which bounds the memory of a call
LARGEST = 1024  # how many columns of a row are sorted; a row whose top-p set is larger is sorted whole
UNITS = 2.0**60  # probabilities are added as integers: such a sum does not depend on its order


class Filters(NamedTuple):
    """One number per row, [rows]. None: off for every row."""

    temperature: Tensor  # float32
    top_p: Tensor | None  # float32; 1 is off
    top_k: Tensor | None  # int64, from 1; the number of columns is off
    min_p: Tensor | None  # float32; 0 is off

    def at(self, rows: Tensor) -> Filters:
        temperature, *filters = self
        return Filters(temperature[rows], *(None if x is None else x[rows] for x in filters))


def kept_of_logits(
    logits: Any, *, top_p: Any, top_k: Any, min_p: Any, temperature: Any, mask: Any, vocab_size: Any
) -> tuple[Tensor, Tensor, bool]:
    """`token_ids`, `offsets` and `every_row` of the `KeptTokens` that `KeptTokens.from_logits` documents.

    Ids ascend in a row. A row has no entries if it is masked, if no filter takes a column from it, or if its largest
    logit is not finite.
    """
    checks.operand("logits", checks.tensor("logits", logits, "logits [.., vocabulary]"), "logits")
    if logits.ndim not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(
            f"logits: expected [sequences, tokens, vocabulary] or [tokens, vocabulary]; got {list(logits.shape)}"
        )
    columns = logits.shape[-1]
    if vocab_size is not None:
        columns = checks.whole("vocab_size", vocab_size, "how many columns are tokens", at_least=1)
        if columns > logits.shape[-1]:
            raise ValueError(
                f"vocab_size: expected at most {logits.shape[-1]}, the columns of the logits; got {columns}"
            )
    logits = logits.detach()[..., :columns]
    shape, device = logits.shape[:-1], logits.device
    filters = Filters(
        _reals("temperature", temperature, shape, device, "what the logits are divided by", at_least=1e-6, at_most=1e6),
        None if _is_off(top_p, 1.0) else _reals("top_p", top_p, shape, device, "a probability", above=0.0),
        None if _is_off(top_k, 0, -1) else _ranks(top_k, shape, device, columns),
        None if _is_off(min_p, 0.0) else _reals("min_p", min_p, shape, device, "a probability", at_least=0.0),
    )
    active = torch.ones(shape, dtype=torch.bool, device=device)
    if mask is not None:
        checks.shape("mask", checks.tensor("mask", mask, "True where a token counts"), shape, "one per row of logits")
        checks.same_device("mask", mask, device)
        active = as_bool("mask", mask)
    ids = [torch.zeros(0, dtype=torch.int32, device=device)]
    counts = torch.zeros(active.numel(), dtype=torch.int64, device=device)
    if any(x is not None for x in filters[1:]):
        for block, rows in _blocks(logits, active):
            kept = _kept(block, filters.at(rows))
            counts[rows] = kept.sum(-1)
            ids.append(kept.nonzero()[:, 1].to(torch.int32))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return torch.cat(ids), offsets, bool((counts[active.reshape(-1)] > 0).all())


def kept_of_mask(keep: Any) -> tuple[Tensor, Tensor]:
    """`token_ids` and `offsets` of the `KeptTokens` that `KeptTokens.from_mask` documents."""
    keep = as_bool("keep", checks.tensor("keep", keep, "True where a row keeps a column, [rows, vocabulary]"))
    if keep.ndim not in (2, 3):
        raise ValueError(
            f"keep: expected [rows, vocabulary] or [sequences, tokens, vocabulary]; got {list(keep.shape)}"
        )
    keep = keep.reshape(-1, keep.shape[-1])
    keep = keep & ~keep.all(-1, keepdim=True)
    return keep.nonzero()[:, 1].to(torch.int32), torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))


def _blocks(logits: Tensor, active: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Active rows, [some, columns], and their numbers. A view such as `logits[:, :-1]` is not copied whole."""
    if logits.ndim == 2:
        logits, active = logits[None], active[None]
    _, length, columns = logits.shape
    size = max(1, BLOCK // columns)
    for i, (part, which) in enumerate(zip(logits, active, strict=True)):
        rows = which.nonzero()[:, 0]
        for some in rows.split(size):
            yield part[some], some + i * length


def _kept(logits: Tensor, filters: Filters) -> Tensor:
    """bool [rows, columns], True for what the filters keep; a row that they leave as it is has none."""
    z = logits.float() / filters.temperature[:, None]
    there = z > -torch.inf
    largest = z.amax(-1, keepdim=True)
    keep = there
    if filters.min_p is not None:
        keep = keep & (z >= largest + filters.min_p[:, None].log())
    if filters.top_k is not None:
        keep = keep & (z >= _ranked(z, filters.top_k))  # of all columns: where min-p left fewer, all of them stay
    if filters.top_p is not None:
        nucleus = _nucleus(z.masked_fill(~keep, -torch.inf), filters.top_p)
        keep = keep & torch.where(filters.top_p[:, None] < 1.0, nucleus, True)
    changed = (keep != there).any(-1, keepdim=True)
    return keep & changed & largest.isfinite()


def _ranked(z: Tensor, k: Tensor) -> Tensor:
    """The k-th largest of each row, [rows, 1]; -inf where k is the number of columns."""
    off = k >= z.shape[-1]
    k = k.masked_fill(off, 1)
    values = z.topk(max(1, int(k.max())) if k.numel() else 1).values
    return values.gather(-1, k[:, None] - 1).masked_fill(off[:, None], -torch.inf)


def _nucleus(z: Tensor, p: Tensor, most: int = LARGEST) -> Tensor:
    """bool [rows, columns]: the columns that top-p keeps of each row."""
    probabilities = z.softmax(-1)
    total = (probabilities.sum(-1, keepdim=True, dtype=torch.float64) * UNITS).long()
    most = min(most, z.shape[-1])
    values, at = z.topk(most)  # of equal ones in any order: their probabilities are equal, too
    own = (probabilities.gather(-1, at).double() * UNITS).long()
    from_here_down = ((total - own.cumsum(-1) + own).double() / UNITS).float()
    count = (from_here_down > 1.0 - p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    least = values.gather(-1, count - 1)
    keep = z >= least
    surplus = keep.sum(-1, keepdim=True) - count  # equal to the least, and of higher id
    tied = (surplus > 0).nonzero()[:, 0]
    if tied.numel():
        equal = z[tied] == least[tied]
        keep[tied] &= ~equal | (equal.cumsum(-1) <= equal.sum(-1, keepdim=True) - surplus[tied])
    if most < z.shape[-1]:
        larger = ((count[:, 0] == most) & (p < 1.0)).nonzero()[:, 0]
        if larger.numel():
            keep[larger] = _nucleus(z[larger], p[larger], z.shape[-1])
    return keep


def _is_off(value: Any, *off: float) -> bool:
    """Whether it is None, or a number that turns the filter off."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value in off)


def _reals(
    name: str, value: Any, shape: torch.Size, device: torch.device, meaning: str, *,
    above: float = -math.inf, at_least: float = -math.inf, at_most: float = 1.0,
) -> Tensor:  # fmt: skip
    """A number, or a tensor of one per row, as float32 [rows]."""
    if not isinstance(value, Tensor):
        number = checks.number(name, value, meaning, above=above, at_least=at_least, at_most=at_most)
        return torch.full((shape.numel(),), number, dtype=torch.float32, device=device)
    checks.floats(name, checks.tensor(name, value, f"{meaning}, a number or one per row"))
    found = _rows(name, value, shape, device)
    if checks.may_read(found):
        good = (found > above) & (found >= at_least) & (found <= at_most)
        if not bool(good.all()):
            checks.number(
                name, float(found[~good][0]), f"{meaning} in each row", above=above, at_least=at_least, at_most=at_most
            )
    return found.float()


def _ranks(value: Any, shape: torch.Size, device: torch.device, columns: int) -> Tensor:
    """How many columns top-k keeps, int64 [rows]; 0 and -1, which turn it off, as the number of columns."""
    meaning = "how many columns are kept; 0 or -1: all"
    if isinstance(value, Tensor):
        checks.integers("top_k", checks.tensor("top_k", value, f"{meaning}; a number or one per row"), meaning)
        found = _rows("top_k", value, shape, device).long()
        if checks.may_read(found) and bool((found < -1).any()):
            raise ValueError(f"top_k: expected {meaning}; got {int(found.min())}")
    else:
        number = checks.whole("top_k", value, meaning, at_least=-1)
        found = torch.full((shape.numel(),), number, dtype=torch.int64, device=device)
    return torch.where(found > 0, found.clamp(max=columns), columns)


def _rows(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """One number per row, or one per sequence as [B, 1], as [rows]."""
    checks.same_device(name, value, device)
    if value.shape != shape and not (len(shape) == 2 and value.shape == (shape[0], 1)):
        raise ValueError(f"{name}: expected a number, or shape {list(shape)} (one per row); got {list(value.shape)}")
    return value.detach().expand(shape).reshape(-1)
