"""The one list of cases from hidden states, and the inputs of each: seeded, off-policy, the same work for everybody.

A peer that rounds its logits to bf16 has a ratio that is off by more than the clip range. So that all of them compute
the same gradient, no sequence is near a bound: the log-ratios are 0.03 to 0.06 away from 0 (the bounds are 0.0003 and
0.0004 away), towards the clip where a sequence is to be clipped, else away from it. `precision.py` asks who decides
rightly near the bounds.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import DTYPES, SEED, uncertainty
from ..exact import gspo

ROWS, SMOKE_ROWS = 2_048, 128
WIDTH, SMOKE_WIDTH = 1_024, 32
VOCABS, SMOKE_VOCAB = (32_000, 151_936), 600
_BLOCK = 8_192  # of the vocabulary, in float64


@dataclass(frozen=True)
class Work:
    name: str
    title: str
    gradient: bool = True
    frozen_head: bool = False
    sequences: int = 8
    no_advantage: float = 0.0  # share of sequences whose advantage is zero
    clipped: float = 0.0  # share of the other sequences that are clipped

    def products(self, active: float = 1.0) -> float:
        """Multiplications and additions that arithmetic needs, in units of rows x width x vocabulary."""
        return 2.0 + (2.0 if self.frozen_head else 4.0) * active if self.gradient else 2.0


DENSE = Work("dense", "loss and gradients")
INACTIVE = Work(
    "inactive",
    "loss and gradients, 45% of sequences of no advantage, 15% of the rest clipped",
    sequences=64,
    no_advantage=0.45,
    clipped=0.15,
)
FROZEN = Work("frozen_head", "loss and gradient of the hidden states alone", frozen_head=True)
FORWARD = Work("forward", "log-probabilities, no gradient", gradient=False)
WORKS = (DENSE, INACTIVE, FROZEN, FORWARD)


@dataclass(frozen=True)
class Case:
    work: Work
    dtype: str
    vocab: int
    rows: int = ROWS
    width: int = WIDTH

    @property
    def id(self) -> str:
        return f"{self.work.name}-{self.dtype}-{self.vocab}"

    @property
    def unit(self) -> float:
        """rows x width x vocabulary."""
        return float(self.rows) * self.width * self.vocab


# What goals stand on comes first, for the time that a run may take is limited.
CASES = tuple(Case(work, dtype, vocab) for vocab in reversed(VOCABS) for dtype in reversed(DTYPES) for work in WORKS)
# Every work and dtype, with as few compilations as that takes.
SMOKE = tuple(
    Case(work, dtype, SMOKE_VOCAB, SMOKE_ROWS, SMOKE_WIDTH)
    for dtype, works in (("bf16", (DENSE, FROZEN)), ("fp32", (INACTIVE, FORWARD)))
    for work in works
)


@dataclass(frozen=True)
class Inputs:
    """Hidden states and a head, a token sampled at each row, and what float64 says of them."""

    hidden: Tensor  # [rows, width]
    weight: Tensor  # [vocab, width]
    token_ids: Tensor  # [rows]
    logprobs: Tensor  # [rows] float64
    lse: Tensor  # [rows] float64


@dataclass(frozen=True, eq=False)
class Problem:
    """A case's inputs, as the losses take them, and what is known of the answer."""

    case: Case
    inputs: Inputs
    hidden: Tensor  # [sequences, T, width]: a leaf
    weight: Tensor  # [vocab, width]: a leaf
    token_ids: Tensor  # [sequences, T], like every token array
    mask: Tensor  # all of them count
    old_logprobs: Tensor
    advantages: Tensor  # [sequences]
    loss: float  # in float64
    coefficients: Tensor  # [rows] float64, dL/dlogprob

    @property
    def active(self) -> float:
        """Share of rows with a coefficient."""
        return float((self.coefficients != 0).double().mean())

    @property
    def flops(self) -> float:
        return self.case.work.products(self.active) * self.case.unit

    def restore(self) -> None:
        self.hidden.grad = self.weight.grad = None


def build(case: Case, device: str = "cpu") -> Problem:
    work, rows = case.work, case.rows
    sequences = work.sequences
    if rows % sequences:
        raise ValueError(f"rows: expected a multiple of {sequences}; got {rows}")
    inputs = sample(case.dtype, case.vocab, rows, case.width, device)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(sequences, generator=generator)
    no_advantage, rest = order.tensor_split([round(work.no_advantage * sequences)])
    clipped = rest[: round(work.clipped * len(rest))]
    advantages = torch.linspace(-1.5, 1.5, sequences)[torch.randperm(sequences, generator=generator)]
    advantages[no_advantage] = 0.0

    away = 0.03 + 0.03 * torch.rand(sequences, generator=generator, dtype=torch.float64)
    log_ratio = -advantages.sign().double() * away  # where min() takes the ratio, whatever the bounds are
    log_ratio[clipped] *= -1.0
    noise = torch.randn(sequences, rows // sequences, generator=generator, dtype=torch.float64) * 0.02
    uncertain = uncertainty(inputs.logprobs.cpu()).view(sequences, -1)
    share = uncertain / uncertain.mean(1, keepdim=True).clamp(min=1e-9)
    noise = noise - (noise * share).mean(1, keepdim=True)
    of_tokens = ((log_ratio[:, None] + noise) * share).reshape(-1).to(device)
    advantages = advantages.to(device)
    old = (inputs.logprobs - of_tokens).float()
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    sequence_of = torch.arange(sequences, device=device).repeat_interleave(rows // sequences)
    loss, coefficients = gspo(inputs.logprobs - old.double(), advantages.double(), mask, sequence_of)

    shape = (sequences, rows // sequences)
    return Problem(
        case=case,
        inputs=inputs,
        hidden=inputs.hidden.view(*shape, case.width).detach().requires_grad_(work.gradient),
        weight=inputs.weight.detach().requires_grad_(work.gradient and not work.frozen_head),
        token_ids=inputs.token_ids.view(shape),
        mask=mask.view(shape),
        old_logprobs=old.view(shape),
        advantages=advantages,
        loss=loss,
        coefficients=coefficients,
    )


@functools.lru_cache(maxsize=1)
def sample(dtype: str, vocab: int, rows: int, width: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(SEED)
    weight = torch.randn(vocab, width, generator=generator, device=device).mul_(2.0 / math.sqrt(width))
    token_ids = torch.randint(vocab, (rows,), generator=generator, device=device)
    hidden = likely_hidden(weight, token_ids, generator)
    hidden, weight = hidden.to(DTYPES[dtype]), weight.to(DTYPES[dtype])
    logprobs, lse = exact_logprobs(hidden, weight, token_ids)
    return Inputs(hidden, weight, token_ids, logprobs, lse)


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
    for block in weight.split(_BLOCK):
        lse = torch.logaddexp(lse, (exact @ block.double().T).logsumexp(1))
    return (exact * weight[token_ids].double()).sum(1) - lse, lse
