"""The one list of benchmark cases, and the inputs of each: seeded, off-policy, with sequences that clip.

A batch has eight sequences. Padded: [8, rows / 8], all full. Packed: ragged, by `LENGTHS`. Logits are normal with one
likelier column a row, the token that was sampled. Which rows have a coefficient:

- `forward`, `forward_backward`, `on_policy`: every row;
- `masked_60`: the tails of all sequences are masked, as prompts and padding are, 60% of all rows; nothing reads them;
- `inactive_60`: sequence 1 is clipped, sequence 3 has advantage 0, and the tails of the other six are masked until
  exactly 60% of all rows have a coefficient of zero. Those of sequences 1 and 3 are still read once, by the forward.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = int(os.environ.get("GSPO_BENCH_ROWS", "2048"))
SMOKE_ROWS = 64
SEQUENCES = 8
LENGTHS = (3, 9, 5, 14, 8, 6, 12, 7)  # of packed sequences, in shares of 64
CLIPPED, NO_ADVANTAGE = 1, 3
EPS_LOW, EPS_HIGH = 3e-4, 4e-4
SEED = 20250725

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    name: str
    title: str
    gradient: bool = True
    on_policy: bool = False
    inactive: float = 0.0  # share of rows whose coefficient is zero
    some_unmasked: bool = False  # two sequences of them by a clip and by an advantage of zero, not by the mask


WORKS = (
    Work("forward", "loss alone", gradient=False),
    Work("forward_backward", "loss and gradient"),
    Work("on_policy", "loss and gradient, on-policy", on_policy=True),
    Work("masked_60", "loss and gradient, 60% of rows masked", inactive=0.6),
    Work("inactive_60", "loss and gradient, 60% masked, clipped or of no advantage", inactive=0.6, some_unmasked=True),
)


@dataclass(frozen=True)
class Case:
    work: Work
    dtype: str
    vocab: int
    layout: str

    @property
    def id(self) -> str:
        return f"{self.work.name}-{self.dtype}-{self.vocab}-{self.layout}"


# Cases that share logits stand together: they are built once and kept until others are asked for.
CASES = tuple(
    Case(work, dtype, vocab, layout)
    for vocab in (32_000, 151_936)
    for dtype in DTYPES
    for layout in ("padded", "packed")
    for work in WORKS
    if work.name != "masked_60" or vocab == 151_936
)

# Every work, dtype, vocabulary and layout at least once, with as few compilations as that takes.
SMOKE = tuple(
    Case(work, dtype, vocab, layout)
    for work, dtype, vocab, layout in zip(
        WORKS,
        ("fp32", "bf16", "bf16", "bf16", "fp32"),
        (151_936, 151_936, 32_000, 151_936, 32_000),
        ("packed", "padded", "packed", "padded", "padded"),
        strict=True,
    )
)


@dataclass(frozen=True)
class Sampled:
    """Logits, the token sampled from each row, and what float64 says of it."""

    pristine: Tensor  # [rows, vocab]
    working: Tensor  # the same, in memory that a contestant may overwrite
    token_ids: Tensor  # [rows]
    logprobs: Tensor  # [rows] float64
    lse: Tensor  # [rows] float64


@dataclass(frozen=True)
class Problem:
    """A case's inputs, as the losses take them, and what is known of the answer."""

    case: Case
    rows: int
    sampled: Sampled
    logits: Tensor  # [8, T, vocab] or [rows, vocab]: a leaf over `sampled.working`
    token_ids: Tensor  # [8, T] or [rows], like every token array
    mask: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor  # [8]
    cu_seqlens: Tensor | None
    sequence_of: Tensor  # [rows], the sequence that each row belongs to
    loss: float  # in float64
    coefficients: Tensor  # [rows] float64, dL/dlogprob

    @property
    def logits_bytes(self) -> int:
        return self.logits.numel() * self.logits.element_size()

    @property
    def visits(self) -> float:
        """Passes over the logits that arithmetic needs: one is all rows; masked and inactive ones are not visited."""
        unmasked, active = float(self.mask.double().mean()), float((self.coefficients != 0).double().mean())
        return unmasked + active if self.case.work.gradient else unmasked

    @property
    def units(self) -> float:
        """Passes over the logits that must go through memory.

        The forward reads, the backward reads again (not on-policy: the coefficient is known, one read does) and writes.
        """
        if not self.case.work.gradient:
            return self.visits
        return (float(self.mask.double().mean()) if self.case.work.on_policy else self.visits) + 1.0

    def restore(self) -> None:
        """Undoes what a contestant wrote over the logits."""
        with torch.no_grad():
            self.sampled.working.copy_(self.sampled.pristine)


def build(case: Case, rows: int = ROWS) -> Problem:
    if rows % SEQUENCES or rows < SMOKE_ROWS:
        raise ValueError(f"GSPO_BENCH_ROWS: expected a multiple of {SEQUENCES}, at least {SMOKE_ROWS}; got {rows}")
    sampled = sample(case.vocab, case.dtype, rows)
    sampled.working.copy_(sampled.pristine)
    generator = torch.Generator().manual_seed(SEED)

    shares = torch.ones(SEQUENCES, dtype=torch.int64) if case.layout == "padded" else torch.tensor(LENGTHS)
    boundaries = torch.nn.functional.pad(shares.cumsum(0) * rows // shares.sum(), (1, 0))
    sequence_of = torch.arange(SEQUENCES).repeat_interleave(boundaries.diff())

    advantages = torch.linspace(-1.5, 1.5, SEQUENCES)[torch.randperm(SEQUENCES, generator=generator)]
    mask = torch.ones(rows, dtype=torch.bool)
    without_mask: tuple[int, ...] = ()
    if case.work.some_unmasked:
        advantages[CLIPPED], advantages[NO_ADVANTAGE] = 1.0, 0.0
        without_mask = (CLIPPED, NO_ADVANTAGE)
    if case.work.inactive:
        mask = _masked_tails(sequence_of, round(case.work.inactive * rows), without_mask)

    log_ratio = (torch.rand(SEQUENCES, generator=generator, dtype=torch.float64) - 0.5) * 4e-4  # inside the window
    if case.work.some_unmasked:
        log_ratio[CLIPPED] = 2e-3
    noise = torch.randn(rows, generator=generator, dtype=torch.float64) * 0.02
    noise = noise - _means(noise, mask, sequence_of)[sequence_of]
    old = (sampled.logprobs - log_ratio[sequence_of] - noise).float()

    on_policy = case.work.on_policy
    of_tokens = (sampled.logprobs - (sampled.logprobs if on_policy else old.double())) * mask
    loss, coefficients = _gspo(of_tokens, advantages.double(), mask, sequence_of)

    shape = (SEQUENCES, rows // SEQUENCES) if case.layout == "padded" else (rows,)
    return Problem(
        case=case,
        rows=rows,
        sampled=sampled,
        logits=sampled.working.view(*shape, case.vocab).detach().requires_grad_(),
        token_ids=sampled.token_ids.view(shape),
        mask=mask.view(shape),
        old_logprobs=None if on_policy else old.view(shape),
        advantages=advantages,
        cu_seqlens=None if case.layout == "padded" else boundaries,
        sequence_of=sequence_of,
        loss=loss,
        coefficients=coefficients,
    )


@functools.lru_cache(maxsize=1)
def sample(vocab: int, dtype: str, rows: int) -> Sampled:
    generator = torch.Generator().manual_seed(SEED)
    token_ids = torch.randint(vocab, (rows,), generator=generator)
    pristine = torch.empty(rows, vocab, dtype=DTYPES[dtype])
    logprobs, lse = torch.empty(2, rows, dtype=torch.float64)
    for begin in range(0, rows, 64):  # in blocks, so that no float64 copy of the whole is made
        block = slice(begin, min(begin + 64, rows))
        values = torch.randn(block.stop - begin, vocab, generator=generator) * 2.0
        likely = torch.rand(block.stop - begin, 1, generator=generator) * 11.0 + 4.0
        values.scatter_(1, token_ids[block, None], likely)
        pristine[block] = values.to(pristine.dtype)
        exact = pristine[block].double()
        lse[block] = exact.logsumexp(1)
        logprobs[block] = exact.gather(1, token_ids[block, None])[:, 0] - lse[block]
    return Sampled(pristine, pristine.clone(), token_ids, logprobs, lse)


def _masked_tails(sequence_of: Tensor, inactive: int, without_mask: tuple[int, ...]) -> Tensor:
    """A mask that takes the ends of the other sequences, alike, until with `without_mask` it is `inactive` rows."""
    lengths = sequence_of.bincount(minlength=SEQUENCES)
    candidates = [i for i in range(SEQUENCES) if i not in without_mask]
    missing = inactive - int(lengths[list(without_mask)].sum())
    available = int(lengths[candidates].sum())
    ends = lengths.cumsum(0)
    mask = torch.ones_like(sequence_of, dtype=torch.bool)
    seen = 0
    for i in candidates:
        before, seen = seen, seen + int(lengths[i])
        tail = missing * seen // available - missing * before // available
        mask[int(ends[i]) - tail : int(ends[i])] = False
    return mask


def _means(values: Tensor, mask: Tensor, sequence_of: Tensor) -> Tensor:
    """[rows] -> [8], over unmasked rows."""
    sums = torch.zeros(SEQUENCES, dtype=torch.float64).index_add_(0, sequence_of, values * mask)
    return sums / sequence_of[mask].bincount(minlength=SEQUENCES)


def _gspo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, sequence_of: Tensor) -> tuple[float, Tensor]:
    """GSPO (arXiv 2507.18071) in float64: the loss, and its derivative by each row's log-probability."""
    ratio = _means(log_ratio, mask, sequence_of).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * advantages).mean()
    clipped = ((advantages > 0) & (ratio > 1 + EPS_HIGH)) | ((advantages < 0) & (ratio < 1 - EPS_LOW))
    lengths = sequence_of[mask].bincount(minlength=SEQUENCES)
    of_sequences = torch.where(clipped, 0.0, -ratio * advantages / (SEQUENCES * lengths))
    return float(loss), torch.where(mask, of_sequences[sequence_of], 0.0)
