"""The one list of benchmark cases, and the inputs of each: seeded, off-policy, with sequences that clip.

A batch has eight sequences (on a GPU more, see `gpu_speed.py`). Padded: [8, rows / 8], all full. Packed: ragged, by
`LENGTHS`. Logits are normal with one likelier column a row, the token that was sampled. Which rows have a coefficient:

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

from .exact import LOSSES, means

ROWS = int(os.environ.get("GSPO_BENCH_ROWS", "2048"))
SMOKE_ROWS = 64
SEQUENCES = 8
LENGTHS = (3, 9, 5, 14, 8, 6, 12, 7)  # of packed sequences, in shares of 64
SEED = 20250725

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    name: str
    title: str
    gradient: bool = True
    objective: str = "gspo"  # or "grpo", "ppo": a ratio per token
    on_policy: bool = False
    no_advantage: float = 0.0  # share of sequences whose advantage is zero
    clipped: float = 0.0  # share of the other sequences that are clipped
    inactive: float = 0.0  # masks take tails until this share of rows has a coefficient of zero

    @property
    def one_read(self) -> bool:
        """A row's coefficient is known once it has been read, or before: the gradient needs no second read."""
        return self.gradient and (self.on_policy or self.ratio_per_token)

    @property
    def ratio_per_token(self) -> bool:
        return self.objective in ("grpo", "ppo")


WORKS = (
    Work("forward", "loss alone", gradient=False),
    Work("forward_backward", "loss and gradient"),
    Work("on_policy", "loss and gradient, on-policy", on_policy=True),
    Work("masked_60", "loss and gradient, 60% of rows masked", inactive=0.6),
    Work(
        "inactive_60",
        "loss and gradient, 60% masked, clipped or of no advantage",
        no_advantage=1 / 8,
        clipped=1 / 7,
        inactive=0.6,
    ),
)


@dataclass(frozen=True)
class Case:
    work: Work
    dtype: str
    vocab: int
    layout: str
    sequences: int = SEQUENCES
    spare: int = 0  # rows of logits after each padded sequence that nothing reads, as after `logits[:, :-1]`

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

    pristine: Tensor  # [rows and spare rows, vocab]
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
    logits: Tensor  # [sequences, T, vocab] or [rows, vocab]: a leaf over `sampled.working`
    token_ids: Tensor  # [sequences, T] or [rows], like every token array
    mask: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor  # [sequences]
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

        The forward reads, the backward reads again (not where one read does, see `Work.one_read`) and writes.
        """
        if not self.case.work.gradient:
            return self.visits
        return (float(self.mask.double().mean()) if self.case.work.one_read else self.visits) + 1.0

    def exact_logits(self, rows: Tensor) -> Tensor:
        """[rows] -> [rows, vocab], in float64."""
        case = self.case
        spare = rows // (self.rows // case.sequences) * case.spare if case.spare else 0
        return self.sampled.pristine[rows + spare].double()

    def restore(self) -> None:
        """Undoes what a contestant wrote over the logits."""
        with torch.no_grad():
            self.sampled.working.copy_(self.sampled.pristine)


def build(case: Case, rows: int = ROWS, device: str = "cpu") -> Problem:
    sequences, work = case.sequences, case.work
    least = SMOKE_ROWS if work.inactive or case.layout == "packed" else sequences
    if rows % sequences or rows < least:
        raise ValueError(f"rows: expected a multiple of {sequences}, at least {least}; got {rows}")
    sampled = sample(case.vocab, case.dtype, rows, sequences, case.spare, device)
    sampled.working.copy_(sampled.pristine)
    generator = torch.Generator().manual_seed(SEED)

    shares = torch.ones(sequences, dtype=torch.int64) if case.layout == "padded" else torch.tensor(LENGTHS)
    boundaries = torch.nn.functional.pad(shares.cumsum(0) * rows // shares.sum(), (1, 0))
    sequence_of = torch.arange(sequences).repeat_interleave(boundaries.diff())

    advantages = torch.linspace(-1.5, 1.5, sequences)[torch.randperm(sequences, generator=generator)]
    mask = torch.ones(rows, dtype=torch.bool)
    clipped, no_advantage = _inactive_sequences(work, sequences)
    advantages[clipped], advantages[no_advantage] = 1.0, 0.0
    if work.inactive:
        mask = _masked_tails(sequence_of, round(work.inactive * rows), clipped + no_advantage)

    log_ratio = (torch.rand(sequences, generator=generator, dtype=torch.float64) - 0.5) * 4e-4  # inside the window
    log_ratio[clipped] = 2e-3
    logprobs = sampled.logprobs
    noise = torch.randn(rows, generator=generator, dtype=torch.float64) * 0.02
    if work.ratio_per_token:  # one token in twelve far outside, the others far inside
        outside = torch.rand(rows, generator=generator) < 1 / 12
        noise = torch.where(outside, noise + 0.5 * noise.sign(), noise)
        noise = torch.where(noise < logprobs.cpu(), -noise, noise)  # no old log-probability is above 0
    else:
        uncertain = uncertainty(logprobs.cpu())
        excess = means(noise * uncertain, mask, sequence_of, sequences)
        excess = excess / means(uncertain, mask, sequence_of, sequences).clamp(min=1e-9)
        noise = (noise - excess[sequence_of]) * uncertain
    noise, log_ratio, advantages, mask, sequence_of, boundaries = (
        x.to(device) for x in (noise, log_ratio, advantages, mask, sequence_of, boundaries)
    )
    old = (logprobs - log_ratio[sequence_of] - noise).float()
    of_tokens = (logprobs - (logprobs if work.on_policy else old.double())) * mask
    loss, coefficients = LOSSES[work.objective](of_tokens, advantages.double(), mask, sequence_of)

    shape = (sequences, rows // sequences) if case.layout == "padded" else (rows,)
    padded = (sequences, rows // sequences + case.spare) if case.layout == "padded" else (rows,)
    logits = sampled.working.view(*padded, case.vocab)
    return Problem(
        case=case,
        rows=rows,
        sampled=sampled,
        logits=(logits[:, : shape[1]] if case.spare else logits).detach().requires_grad_(),
        token_ids=sampled.token_ids.view(shape),
        mask=mask.view(shape),
        old_logprobs=None if work.on_policy else old.view(shape),
        advantages=advantages,
        cu_seqlens=None if case.layout == "padded" else boundaries,
        sequence_of=sequence_of,
        loss=loss,
        coefficients=coefficients,
    )


def uncertainty(logprobs: Tensor) -> Tensor:
    """From 0 to 1, what log-ratios are multiplied by: a token that is nearly certain was hardly likelier before."""
    return (logprobs / -0.2).clamp(max=1.0)


@functools.lru_cache(maxsize=1)
def sample(vocab: int, dtype: str, rows: int, sequences: int, spare: int, device: str) -> Sampled:
    generator = torch.Generator(device).manual_seed(SEED)
    token_ids = torch.randint(vocab, (rows,), generator=generator, device=device)
    pristine = torch.empty(rows + sequences * spare, vocab, dtype=DTYPES[dtype], device=device)
    logprobs, lse = torch.empty(2, rows, dtype=torch.float64, device=device)
    places = torch.arange(rows, device=device)
    if spare:
        pristine.view(sequences, -1, vocab)[:, -spare:] = 0.0
        places += places // (rows // sequences) * spare
    for begin in range(0, rows, 64):  # in blocks, so that no float64 copy of the whole is made
        block = slice(begin, min(begin + 64, rows))
        size = block.stop - begin
        values = torch.randn(size, vocab, generator=generator, device=device) * 2.0
        likely = torch.rand(size, 1, generator=generator, device=device) * 11.0 + 4.0
        values.scatter_(1, token_ids[block, None], likely)
        stored = values.to(pristine.dtype)
        pristine[places[block]] = stored
        exact = stored.double()
        lse[block] = exact.logsumexp(1)
        logprobs[block] = exact.gather(1, token_ids[block, None])[:, 0] - lse[block]
    return Sampled(pristine, pristine.clone(), token_ids, logprobs, lse)


def _inactive_sequences(work: Work, sequences: int) -> tuple[list[int], list[int]]:
    """Those that are clipped and those of no advantage, every other one first, so that active ones stand between."""
    order = [*range(1, sequences, 2), *range(0, sequences, 2)]
    no_advantage = round(work.no_advantage * sequences)
    clipped = round(work.clipped * (sequences - no_advantage))
    return order[:clipped], order[clipped : clipped + no_advantage]


def _masked_tails(sequence_of: Tensor, inactive: int, without_mask: list[int]) -> Tensor:
    """A mask that takes the ends of the other sequences, alike, until with `without_mask` it is `inactive` rows."""
    lengths = sequence_of.bincount()
    candidates = [i for i in range(len(lengths)) if i not in without_mask]
    missing = inactive - int(lengths[without_mask].sum())
    available = int(lengths[candidates].sum())
    ends = lengths.cumsum(0)
    mask = torch.ones_like(sequence_of, dtype=torch.bool)
    seen = 0
    for i in candidates:
        before, seen = seen, seen + int(lengths[i])
        tail = missing * seen // available - missing * before // available
        mask[int(ends[i]) - tail : int(ends[i])] = False
    return mask
