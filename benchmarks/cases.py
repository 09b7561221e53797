"""The one list of benchmark cases, and the inputs of each: seeded, off-policy, with sequences that clip.

A case starts from logits, or (where it has a width) from hidden states and a head. Its rows are laid out

- padded: [sequences, rows / sequences], all full;
- packed: ragged sequences one after another, by `LENGTHS`;
- ragged: padded, the shortest response a quarter of the longest, the rest masked.

Of the logits of a row a sampler may have kept a few columns. Rows without a coefficient are masked (no kernel reads
them), of a clipped sequence, or of a sequence whose advantage is 0 (the forward reads these once).
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace

import oracle
import torch
from torch import Tensor

from gspo_kernels import KeptTokens

from .sampled import DTYPES, SEED, Sampled, keeping, sample

ROWS = int(os.environ.get("GSPO_BENCH_ROWS", "2048"))
SMOKE_ROWS, SEQUENCES = 64, 8
LENGTHS = (3, 9, 5, 14, 8, 6, 12, 7)  # of packed sequences, in shares of 64
# What a ratio may fall short of 1, and exceed it.
EPSILONS = {k: (x.fields["eps_low"], x.fields["eps_high"]) for k, x in oracle.OBJECTIVES.items() if x.is_surrogate}


@dataclass(frozen=True)
class Work:
    name: str
    title: str
    gradient: bool = True
    objective: str = "gspo"  # grpo and ppo have a ratio per token
    on_policy: bool = False
    frozen_head: bool = False
    no_advantage: float = 0.0  # share of sequences whose advantage is zero
    clipped: float = 0.0  # share of the other sequences that are clipped
    inactive: float = 0.0  # masks take tails until this share of rows has a coefficient of zero
    far: bool = False  # log-ratios are 100 to 200 clip ranges: rounding cannot change which sequences are clipped
    spread: float = 0.6  # otherwise they are uniform within +-spread clip ranges
    outside: float = 1 / 12  # share of tokens far outside, where the ratio is per token
    kept: int = 0  # columns of a row that the sampler kept; 0: all

    @property
    def ratio_per_token(self) -> bool:
        return self.objective in ("grpo", "ppo")

    @property
    def one_read(self) -> bool:
        """A row's coefficient is known once it has been read, or before: the gradient needs no second read."""
        return self.gradient and (self.on_policy or self.ratio_per_token)

    def products(self, active: float = 1.0) -> float:
        """From hidden states: multiplications and additions needed, in units of rows x width x vocabulary."""
        return 2.0 + (2.0 if self.frozen_head else 4.0) * active if self.gradient else 2.0


@dataclass(frozen=True)
class Case:
    work: Work
    dtype: str
    vocab: int
    layout: str = "padded"
    sequences: int = SEQUENCES
    spare: int = 0  # rows of logits after each padded sequence that nothing reads, as after `logits[:, :-1]`
    rows: int = ROWS
    width: int = 0  # of the hidden states; 0: the case starts from logits

    @property
    def id(self) -> str:
        return f"{self.work.name}-{self.dtype}-{self.vocab}" + ("" if self.width else f"-{self.layout}")

    @property
    def from_logits(self) -> bool:
        return not self.width

    @property
    def unit(self) -> float:
        """rows x width x vocabulary."""
        return float(self.rows) * self.width * self.vocab


# ---- from logits: test_speed.py, compare.py, plot.py

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
    Work("kept_8", "loss and gradient, 8 columns of a row kept", kept=8),
)
# Cases that share logits stand together: the logits are built once and kept until others are needed.
CASES = tuple(
    Case(work, dtype, vocab, layout)
    for vocab in (32_000, 151_936)
    for dtype in DTYPES
    for layout in ("padded", "packed")
    for work in WORKS
    if work.name not in ("masked_60", "kept_8") or vocab == 151_936
)
# Of `--gate` and compare.py: the large vocabulary in one layout, and one small packed case for the work around the
# kernels. Not kept columns: a base before them has none.
GATE_ROWS = 256
GATE = tuple(c for c in CASES if c.vocab == 151_936 and c.layout == "padded" and not c.work.kept) + tuple(
    c for c in CASES if c.id == "forward_backward-bf16-32000-packed"
)
# Every work, dtype, vocabulary and layout at least once, with as few compilations as that takes.
SMOKE = tuple(
    Case(work, dtype, vocab, layout)
    for work, dtype, vocab, layout in zip(
        WORKS,
        ("fp32", "bf16", "bf16", "bf16", "fp32", "fp32"),
        (151_936, 151_936, 32_000, 151_936, 32_000, 32_000),
        ("packed", "padded", "packed", "padded", "padded", "packed"),
        strict=True,
    )
)

# ---- from hidden states: linear.py, gpu_linear.py
# A library that rounds its logits to bf16 has a ratio that is off by more than the clip range. `far` makes all of them
# compute the same gradient; linear_precision.py measures who decides rightly near the bounds.

DENSE = Work("dense", "loss and gradients", far=True)
INACTIVE = Work(
    "inactive",
    "loss and gradients, 45% of sequences of no advantage, 15% of the rest clipped",
    no_advantage=0.45,
    clipped=0.15,
    far=True,
)
FROZEN = Work("frozen_head", "loss and gradient of the hidden states alone", frozen_head=True, far=True)
FORWARD = Work("forward", "log-probabilities, no gradient", gradient=False, far=True)
LINEAR_WORKS = (DENSE, INACTIVE, FROZEN, FORWARD)
DENSE_1024 = replace(DENSE, name="dense_1024", title="loss and gradients of 1,024 rows")
LINEAR_VOCABS = (151_936, 32_000)


def linear_case(work: Work, dtype: str, vocab: int, rows: int = 2_048, width: int = 1_024) -> Case:
    return Case(work, dtype, vocab, sequences=64, rows=rows, width=width)


def linear_smoke(work: Work, dtype: str) -> Case:
    return linear_case(work, dtype, 600, 128, 32)


LINEAR_CASES = tuple(
    linear_case(work, dtype, vocab, 1_024 if work == DENSE_1024 else 2_048)
    for vocab in LINEAR_VOCABS
    for dtype in ("bf16", "fp32")
    for work in (*LINEAR_WORKS, DENSE_1024)
)
# Every work and dtype, with as few compilations as that takes.
LINEAR_SMOKE = tuple(
    linear_smoke(work, dtype)
    for dtype, works in (("bf16", (DENSE, FROZEN)), ("fp32", (INACTIVE, FORWARD)))
    for work in works
)

# ---- side by side: peers.py

GSPO = Work("gspo", "GSPO, a third of the responses outside the clip range", spread=1.5)
GRPO = Work("grpo", "GRPO, a third of the tokens outside the clip range", objective="grpo", spread=1.5, outside=0.0)
_RAGGED = functools.partial(Case, layout="ragged", sequences=16, rows=512)
_SMALL = functools.partial(Case, layout="ragged", sequences=4, rows=32)
PEER_CASES = (
    *(_RAGGED(GSPO, dtype, 151_936) for dtype in DTYPES),
    _RAGGED(GRPO, "fp32", 151_936),
    *(_RAGGED(GSPO, dtype, 151_936, width=896) for dtype in DTYPES),
)
PEER_SMOKE = (_SMALL(GSPO, "bf16", 1_000), _SMALL(GRPO, "fp32", 1_000), _SMALL(GSPO, "fp32", 1_000, width=32))
HARD_CASES = {"logits": _SMALL(GSPO, "fp32", 1_000), "hidden": _SMALL(GSPO, "fp32", 1_000, width=32)}


# ---- inputs


@dataclass(frozen=True, eq=False)
class Problem:
    """A case's inputs, as the losses take them, and what is known of the answer."""

    case: Case
    sampled: Sampled
    # Over `sampled.working`: logits [sequences, T, vocab] or [rows, vocab]; hidden and weight.
    leaves: tuple[Tensor, ...]
    token_ids: Tensor  # [sequences, T] or [rows], like every token array
    mask: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor  # [sequences]; [sequences, T] for an advantage per token
    cu_seqlens: Tensor | None
    sequence_of: Tensor  # [rows], the sequence that each row belongs to
    loss: float  # in float64
    coefficients: Tensor  # [rows] float64, dL/dlogprob
    kept: KeptTokens | None = None

    @property
    def logits(self) -> Tensor:
        return self.leaves[0]

    @property
    def rows(self) -> int:
        return self.case.rows

    @property
    def logits_bytes(self) -> int:
        return self.logits.numel() * self.logits.element_size()

    @property
    def active(self) -> float:
        """Share of rows with a coefficient."""
        return float((self.coefficients != 0).double().mean())

    @property
    def share(self) -> float:
        """Of a row's logits, those that are read."""
        return self.case.work.kept / self.case.vocab if self.case.work.kept else 1.0

    @property
    def read_once(self) -> float:
        """Passes over the logits in which every unmasked row is read once, kept columns alone."""
        return self.share * float(self.mask.double().mean())

    @property
    def visits(self) -> float:
        """Passes over the logits that arithmetic needs: masked and inactive rows are not visited, nor are columns that
        were not kept."""
        return self.read_once + (self.share * self.active if self.case.work.gradient else 0.0)

    @property
    def units(self) -> float:
        """Passes over the logits that must go through memory.

        The forward reads, the backward reads again (not where one read does, see `Work.one_read`) and writes.
        """
        if not self.case.work.gradient:
            return self.visits
        return (self.read_once if self.case.work.one_read else self.visits) + 1.0

    @property
    def flops(self) -> float:
        """Of the matrix products from hidden states, on rows with a coefficient alone where that is possible."""
        return self.case.work.products(self.active) * self.case.unit

    def exact_logits(self, rows: Tensor) -> Tensor:
        """[rows] -> [rows, vocab], in float64."""
        case = self.case
        spare = rows // (case.rows // case.sequences) * case.spare if case.spare else 0
        return self.sampled.pristine[0][rows + spare].double()

    def restore(self) -> None:
        """Undoes what a contestant wrote over the logits."""
        if self.case.from_logits:
            with torch.no_grad():
                self.sampled.working[0].copy_(self.sampled.pristine[0])

    def solved(self) -> Problem:
        """With the loss and the coefficients that the inputs have now, by tests/oracle.py."""
        rows: list[list[int]] = [[] for _ in self.advantages]
        for row, sequence in enumerate(self.sequence_of.tolist()):
            rows[sequence].append(row)
        advantages = self.advantages.double().tolist()
        if self.advantages.ndim == 1:
            advantages = [[advantage] * len(own) for advantage, own in zip(advantages, rows, strict=True)]
        found = oracle.evaluate(
            self.case.work.objective,
            rows,
            self.mask.flatten().tolist(),
            self.sampled.logprobs.tolist(),
            advantages,
            oracle.OBJECTIVES[self.case.work.objective].options(),
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs.double().flatten().tolist(),
        )
        coefficients = torch.tensor(found.d_logprobs, dtype=torch.float64, device=self.mask.device)
        return replace(self, loss=found.loss, coefficients=coefficients)


def build(case: Case, rows: int | None = None, device: str = "cpu") -> Problem:
    """`rows`: others than the case's own."""
    case = replace(case, rows=rows or case.rows)
    work, rows, sequences = case.work, case.rows, case.sequences
    least = SMOKE_ROWS if work.inactive or case.layout == "packed" else sequences
    if rows % sequences or rows < least:
        raise ValueError(f"rows: expected a multiple of {sequences}, at least {least}; got {rows}")
    sampled = sample(case.vocab, case.dtype, rows, case.width, sequences, case.spare, device)
    if work.kept:
        sampled = keeping(sampled, work.kept)
    generator = torch.Generator().manual_seed(SEED)

    packed, tokens = case.layout == "packed", rows // sequences
    shares = torch.tensor(LENGTHS) if packed else torch.ones(sequences, dtype=torch.int64)
    boundaries = torch.nn.functional.pad(shares.cumsum(0) * rows // shares.sum(), (1, 0))
    sequence_of = torch.arange(sequences).repeat_interleave(boundaries.diff())

    advantages = torch.linspace(-1.5, 1.5, sequences)[torch.randperm(sequences, generator=generator)]
    clipped, no_advantage = _inactive_sequences(work, sequences)
    advantages[no_advantage] = 0.0
    mask = torch.ones(rows, dtype=torch.bool)
    if work.inactive:
        mask = _masked_tails(sequence_of, round(work.inactive * rows), clipped + no_advantage)
    if case.layout == "ragged":
        lengths = torch.linspace(tokens // 4, tokens, sequences).round()[torch.randperm(sequences, generator=generator)]
        mask = (torch.arange(tokens) < lengths[:, None]).flatten()
    logprobs = sampled.logprobs.cpu()
    old = None
    if not work.on_policy:
        log_ratios = _log_ratios(work, logprobs, mask, sequence_of, advantages.double(), clipped, generator)
        old = (logprobs - log_ratios).float()

    shape = (rows,) if packed else (sequences, tokens)
    leaves: tuple[Tensor, ...]
    if case.from_logits:
        logits = sampled.working[0].view(*((rows,) if packed else (sequences, tokens + case.spare)), case.vocab)
        leaves = ((logits[:, :tokens] if case.spare else logits).detach().requires_grad_(),)
    else:
        hidden, weight = sampled.working
        leaves = (
            hidden.view(*shape, case.width).detach().requires_grad_(work.gradient),
            weight.detach().requires_grad_(work.gradient and not work.frozen_head),
        )
    problem = Problem(
        case=case,
        sampled=sampled,
        leaves=leaves,
        token_ids=sampled.token_ids.view(shape),
        mask=mask.to(device).view(shape),
        old_logprobs=None if old is None else old.to(device).view(shape),
        advantages=advantages.to(device),
        cu_seqlens=boundaries.to(device) if packed else None,
        sequence_of=sequence_of.to(device),
        loss=0.0,
        coefficients=torch.empty(0),
        kept=None if sampled.kept is None else kept_tokens(sampled.kept),
    )
    problem.restore()
    return problem.solved()


def kept_tokens(columns: Tensor) -> KeptTokens:
    """[rows, columns], as many for each row."""
    offsets = torch.arange(len(columns) + 1, device=columns.device) * columns.shape[1]
    return KeptTokens(columns.flatten(), offsets, every_row=True)


def _log_ratios(
    work: Work,
    logprobs: Tensor,
    mask: Tensor,
    sequence_of: Tensor,
    advantages: Tensor,
    clipped: list[int],
    generator: torch.Generator,
) -> Tensor:
    """[rows] in float64, drawn in units of the clip range: 1 and -1 are its bounds; no sequence is within 3% of one."""

    def uniform(size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    def of_ranges(ranges: Tensor) -> Tensor:
        low, high = EPSILONS[work.objective]
        return torch.where(ranges < 0, ranges * low, ranges * high)

    ranges = (2.0 * uniform(len(mask) if work.ratio_per_token else len(advantages)) - 1.0) * work.spread
    ranges = torch.where((ranges.abs() - 1.0).abs() < 0.07, ranges * 0.9, ranges)
    if work.ratio_per_token:
        ranges = torch.where(uniform(len(mask)) < work.outside, 2.5 * ranges.sign(), ranges)
        found = of_ranges(ranges)
        return torch.where(found < logprobs, of_ranges(ranges.abs()), found)  # no old log-probability is above 0
    if work.far:
        # On the side where min() takes the ratio.
        ranges = -advantages.sign() * 100.0 * (1.0 + uniform(len(advantages)))
    ranges[clipped] = advantages[clipped].sign() * (150.0 if work.far else 5.0)

    # The mean of a sequence is exact, its tokens have noise. A token of probability near 1 has a log-ratio near 0.
    uncertain = (logprobs / -0.2).clamp(max=1.0)
    share = uncertain / means(uncertain, mask, sequence_of, len(advantages)).clamp(min=1e-9)[sequence_of]
    noise = torch.randn(len(mask), generator=generator, dtype=torch.float64) * 0.02 * uncertain
    noise = noise - means(noise, mask, sequence_of, len(advantages))[sequence_of] * share
    return of_ranges(ranges)[sequence_of] * share + noise


def means(values: Tensor, mask: Tensor, sequence_of: Tensor, sequences: int) -> Tensor:
    """[rows] -> [sequences], over unmasked rows."""
    sums = torch.zeros(sequences, dtype=torch.float64).index_add_(0, sequence_of, values * mask)
    return sums / sequence_of[mask].bincount(minlength=sequences).clamp(min=1)


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
