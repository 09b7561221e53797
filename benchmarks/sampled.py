"""What a case starts from: logits, or hidden states and a head; the sampled tokens, and what float64 says of them.

Logits are normal with one likelier column a row, the token that was sampled.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SEED = 20250725
BLOCK = 8_192  # columns of a head that are in float64 at a time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sampled:
    """What a loss starts from, the token sampled at each row, and what float64 says of it."""

    pristine: tuple[Tensor, ...]  # logits [rows and spare rows, vocab]; or hidden [rows, width], weight [vocab, width]
    working: tuple[Tensor, ...]  # the same; logits are in memory of their own that a contestant may overwrite
    token_ids: Tensor  # [rows]
    logprobs: Tensor  # [rows] float64
    lse: Tensor  # [rows] float64
    kept: Tensor | None = None  # [rows, columns] that the sampler kept, the token's first; None: all


@functools.lru_cache(maxsize=1)
def sample(vocab: int, dtype: str, rows: int, width: int, sequences: int, spare: int, device: str) -> Sampled:
    generator = torch.Generator(device).manual_seed(SEED)
    token_ids = torch.randint(vocab, (rows,), generator=generator, device=device)
    if width:
        weight = torch.randn(vocab, width, generator=generator, device=device).mul_(2.0 / math.sqrt(width))
        operands = tuple(x.to(DTYPES[dtype]) for x in (likely_hidden(weight, token_ids, generator), weight))
        logprobs, lse = exact_logprobs(operands[0], operands[1], token_ids)
        return Sampled(operands, operands, token_ids, logprobs, lse)
    pristine = torch.empty(rows + sequences * spare, vocab, dtype=DTYPES[dtype], device=device)
    logprobs, lse = torch.empty(2, rows, dtype=torch.float64, device=device)
    row_indices = torch.arange(rows, device=device)
    if spare:
        pristine.view(sequences, -1, vocab)[:, -spare:] = 0.0
        row_indices += row_indices // (rows // sequences) * spare
    for begin in range(0, rows, 64):  # in blocks, so that no float64 copy of the whole is made
        block = slice(begin, min(begin + 64, rows))
        size = block.stop - begin
        values = torch.randn(size, vocab, generator=generator, device=device) * 2.0
        likely = torch.rand(size, 1, generator=generator, device=device) * 11.0 + 4.0
        stored = values.scatter_(1, token_ids[block, None], likely).to(pristine.dtype)
        pristine[row_indices[block]] = stored
        exact = stored.double()
        lse[block] = exact.logsumexp(1)
        logprobs[block] = exact.gather(1, token_ids[block, None])[:, 0] - lse[block]
    return Sampled((pristine,), (pristine.clone(),), token_ids, logprobs, lse)


def keeping(sampled: Sampled, columns: int) -> Sampled:
    """Of logits: the distribution over so many columns of each row. They are anywhere in it, in any order."""
    (logits,), first = sampled.pristine, sampled.token_ids[:, None]
    (rows, vocab), device = logits.shape, logits.device
    if len(first) != rows:
        raise ValueError(f"rows: expected the {len(first)} of the tokens; got {rows}, some of them spare")
    generator, step = torch.Generator(device).manual_seed(SEED), vocab // columns
    inside = torch.randint(step, (rows, columns - 1), generator=generator, device=device)
    others = (first + inside + step * torch.arange(1, columns, device=device)) % vocab
    kept = torch.cat([first, others], 1)
    exact = logits.gather(1, kept).double()
    lse = exact.logsumexp(1)
    return replace(sampled, logprobs=exact[:, 0] - lse, lse=lse, kept=kept)


def likely_hidden(weight: Tensor, token_ids: Tensor, generator: torch.Generator) -> Tensor:
    """[rows, width]; logits of deviation 2, but for the sampled token's, which is likelier: up to p = 0.9."""
    (rows,), (vocab, width) = token_ids.shape, weight.shape
    likely = 4.0 + math.log(vocab) * torch.rand(rows, 1, generator=generator, device=weight.device)
    directions = weight[token_ids]
    hidden = torch.randn(rows, width, generator=generator, device=weight.device)
    return hidden.add_(directions * (likely / directions.square().sum(1, keepdim=True)))


def exact_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and logsumexps [rows], in float64."""
    exact = hidden.double()
    lse = torch.full((len(hidden),), -math.inf, dtype=torch.float64, device=hidden.device)
    for block in weight.split(BLOCK):
        lse = torch.logaddexp(lse, (exact @ block.double().T).logsumexp(1))
    return (exact * weight[token_ids].double()).sum(1) - lse, lse
