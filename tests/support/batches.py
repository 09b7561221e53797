"""A ragged batch, its two layouts, what the oracle says of it and what the package says of it.

Inputs are made so that the answer matters: a few large logits a row, lengths from 0 to 7, log-ratios a few per cent of
the clip window to either side of its edges for both signs of the advantage, and garbage wherever the mask is False.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import modes
import oracle
import torch
from modes import every_pair, on_device, sized
from torch import Tensor

import gspo_kernels

CLASSES: dict[str, Any] = {  # by the oracle's names: GSPOToken is gspo_token
    re.sub("(?<!^)(?=[A-Z][a-z])", "_", name).lower(): getattr(gspo_kernels, name)
    for name in gspo_kernels.__all__
    if isinstance(getattr(gspo_kernels, name), type)
    and issubclass(getattr(gspo_kernels, name), gspo_kernels.Objective)
    and name not in ("Objective", "TopEntropy")  # which is none by itself
}
PACKAGE = list(CLASSES)
# Objectives of no package: tests/objectives/mine.py has a class and, from the same formula, its entry in the oracle.
for each in sorted(Path(oracle.__file__).parent.glob("objectives/*.py")):
    own = importlib.import_module(f"objectives.{each.stem}")
    oracle.OBJECTIVES[each.stem], CLASSES[each.stem] = own.TRUTH, own.CLASS
OBJECTIVES = list(oracle.OBJECTIVES)


@functools.cache
def attributes_of(objective: str) -> tuple[tuple[str, Any], ...]:
    """What decides which code of the package an objective passes through. A new one's are these, too."""
    kind = CLASSES[objective]
    names = (
        "ratio_of", "advantages_per_token", "depends_on", "uses_logprobs", "known_on_policy", "uses_rollout_logprobs",
        "by_sequence_alone", "sequence_value",
    )  # fmt: skip
    has = {
        "a term": kind.triton_term is not None,
        "a hold": kind.triton_hold is not None,
        "a slope": kind().row_slope() is not None,
    }
    return (*((name, getattr(kind, name)) for name in names), *has.items())


# The fewest that have every attribute among them. With --all and on a GPU: all.
KINDS = OBJECTIVES if modes.WHOLE else [OBJECTIVES[k] for k in every_pair([[attributes_of(x)] for x in OBJECTIVES])]


def pairs_of(axes: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """A value of each axis, any two of which meet. OBJECTIVES are one: each is met, its attributes meet the others."""
    sizes = [range(len(axis)) for axis in axes]
    rng = random.Random(0)
    points = [[rng.choice(size) for size in sizes] for _ in range(500)]  # so many that every pair is there
    if math.prod(map(len, axes)) <= len(points):
        points = [list(point) for point in itertools.product(*sizes)]
    at = next(k for k, axis in enumerate(axes) if axis is OBJECTIVES)
    values: list[list[Any]] = [[[i] for i in point] for point in points]
    for point in values:
        if not modes.WHOLE:
            point[at] = attributes_of(OBJECTIVES[point[at][0]])
    kept = every_pair(values)
    for i in sizes[at]:
        if all(points[k][at] != i for k in kept):
            kept.append(next(k for k in (*range(i * 7, len(points)), *range(i * 7)) if points[k][at] == i))
    return [[axis[i] for axis, i in zip(axes, points[k], strict=True)] for k in kept]


WITH_TOKENS = [name for name in OBJECTIVES if CLASSES[name].advantages_per_token]
FIELDS = {each.name for kind in CLASSES.values() for each in fields(kind)}  # eps_low, dual_clip, ...


def public_loss(objective: str, linear: bool) -> Callable[..., Any]:
    """The objective's named loss. Without one: `policy_loss`, with what options are fields of the objective."""
    prefix, kind = "linear_" if linear else "", CLASSES[objective]
    named = getattr(gspo_kernels, f"{prefix}{objective}_loss", None)
    if named is not None:
        return named  # type: ignore[no-any-return]
    general = getattr(gspo_kernels, f"{prefix}policy_loss")
    names = {each.name for each in fields(kind)}

    def loss(*arguments: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in FIELDS & options.keys()}
        own = {name: value for name, value in given.items() if name in names}
        return general(*arguments, objective=kind(**own), **options)

    return loss


PUBLIC = {objective: public_loss(objective, False) for objective in OBJECTIVES}
LINEAR = {objective: public_loss(objective, True) for objective in OBJECTIVES}  # the same from hidden states
LAYOUTS = ["padded", "packed"]

# One entry a sequence, cycled: (multiple of the log clip edge, or "far", and the sign of the advantage).
PLAN: list[tuple[float | str, int]] = [
    (+1.05, +1),  # just above the window, A > 0: clipped
    (-1.05, -1),  # just below the window, A < 0: clipped
    (+0.95, +1),  # just inside
    (+1.05, -1),  # outside on the side that A does not penalise: not clipped
    (-0.95, -1),
    ("far", -1),  # exp 2 = 7.4: dual clip, saturation
    (-1.05, +1),
    (0.02, +1),  # next to its middle, where TOPR decides
    ("far", +1),
    (+1.05, 0),  # outside, but no advantage: nothing clips and nothing flows
    (0.3, -1),
]
LENGTHS = sized((5, 1, 0, 7, 3, 1, 4, 2, 6, 3, 4, 2, 1), (2, 1, 0, 3, 1, 1, 2, 1, 1, 1, 1, 1))
SHORT = sized(LENGTHS, (2, 0, 1, 3))  # for what is about anything but the loss, and calls it many times
ROUNDED_UP = 5e-4  # how far above 0 a log-probability may be here: half of what is refused
ALL_MASKED = 8  # this sequence of LENGTHS has rows but no unmasked one


@dataclass
class Batch:
    logits: Tensor  # [N, V]
    token_ids: Tensor  # [N]
    mask: Tensor  # [N]
    lengths: list[int]  # [S], rows a sequence, masked ones included
    advantages: Tensor  # [S], or [N] where by_token
    old_logprobs: Tensor | None = None  # [N]
    ref_logprobs: Tensor | None = None  # [N]
    rollout_logprobs: Tensor | None = None  # [N]
    group_tokens: Tensor | None = None  # [S]
    weights: Tensor | None = None  # [S], or [N] where weights_by_token
    temperature: float | Tensor = 1.0  # or [N]
    logit_scale: float = 1.0
    softcap: float | None = None
    kept: list[list[int] | None] | None = None  # [N], the columns of each row; None: all
    by_token: bool = False
    weights_by_token: bool = False
    padding: int = 1  # columns beyond the longest sequence, in the padded layout

    @property
    def sequences(self) -> list[range]:
        ends = list(itertools.accumulate(self.lengths, initial=0))
        return [range(a, b) for a, b in itertools.pairwise(ends)]

    def temperature_of(self, row: int) -> float:
        return float(self.temperature[row]) if isinstance(self.temperature, Tensor) else self.temperature

    def logits_of(self, row: int) -> list[float]:
        """As the temperature divides them: scaled and capped; -inf where a column is not kept."""
        logits = oracle.of_model(self.logits[row].tolist(), self.logit_scale, self.softcap)
        return oracle.of_kept(logits, None if self.kept is None else self.kept[row])

    @functools.cached_property
    def rows(self) -> list[oracle.Row]:
        """The oracle's statistics; zeros where masked."""
        return [
            oracle.row_statistics(self.logits_of(t), int(self.token_ids[t]), self.temperature_of(t))
            if self.mask[t]
            else oracle.Row(0.0, 0.0, 0.0)
            for t in range(len(self.mask))
        ]

    def spread(self, values: Tensor, by_token: bool) -> list[list[float]]:
        """values by sequence or by token, as one number for every row of every sequence."""
        if by_token:
            return [[float(values[t]) for t in rows] for rows in self.sequences]
        return [[float(values[i])] * len(rows) for i, rows in enumerate(self.sequences)]

    def expected(self, objective: str, logprobs: Sequence[float] | None = None, **options: Any) -> oracle.Result:
        opt = oracle.OBJECTIVES[objective].options(**options)
        return oracle.evaluate(
            objective,
            self.sequences,
            self.mask.tolist(),
            [row.logprob for row in self.rows] if logprobs is None else logprobs,
            self.spread(self.advantages, self.by_token),
            opt,
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs.tolist(),
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs.tolist(),
            rollout_logprobs=None if self.rollout_logprobs is None else self.rollout_logprobs.tolist(),
            group_tokens=None if self.group_tokens is None else self.group_tokens.tolist(),
            weights=None if self.weights is None else self.spread(self.weights, self.weights_by_token),
            entropy=[row.entropy for row in self.rows],
        )

    def split(self, at: int) -> tuple[Batch, Batch]:
        """Two batches: the sequences before and from `at`."""
        first, rest = range(at), range(at, len(self.lengths))
        return tuple(self.of(x, [self.sequences[i] for i in x]) for x in (first, rest))  # type: ignore[return-value]

    def of(self, sequences: Sequence[int], rows: Sequence[Sequence[int]]) -> Batch:
        """These sequences, and of each of them these rows. A group stays as large as it was."""
        row_indices = torch.tensor([t for of in rows for t in of], dtype=torch.int64)
        sequence_indices = torch.tensor(list(sequences), dtype=torch.int64)
        by_sequence = {"group_tokens"}
        by_sequence |= set() if self.by_token else {"advantages"}
        by_sequence |= set() if self.weights_by_token else {"weights"}

        def cut(name: str, x: Any) -> Any:
            return x[sequence_indices if name in by_sequence else row_indices] if isinstance(x, Tensor) else x

        found = {each.name: cut(each.name, getattr(self, each.name)) for each in fields(self)}
        kept = None if self.kept is None else [self.kept[t] for t in row_indices.tolist()]
        return Batch(**{**found, "kept": kept, "lengths": [len(of) for of in rows]})


def ragged_batch(
    objective: str = "gspo",
    *,
    seed: int = 0,
    vocab: int = 61,
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] = LENGTHS,
    on_policy: bool = False,
    by_token: bool = False,
    ref: bool = False,
    rollout: bool = False,
    groups: bool = False,
    weights: str | None = None,
    temperature: float | str = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kept: bool = False,
    eps_low: float | None = None,
    eps_high: float | None = None,
    logits: Tensor | None = None,
) -> Batch:
    """`logits` [N, V]: these instead of random ones, with random tokens.

    `rollout`: those of the engine, which are not the old policy's, for objectives that read them.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    n, s = sum(lengths), len(lengths)
    truth = oracle.OBJECTIVES[objective]
    edge_low, edge_high = truth.edges(eps_low, eps_high)
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    given = logits is not None
    if logits is None:
        logits = torch.randn(n, vocab, generator=generator) * 1.5
    vocab = logits.shape[-1]
    token_ids = torch.randint(vocab, (n,), generator=generator)
    for t in range(0 if given else n):
        peaks = rng.sample(range(vocab), min(3, vocab))
        for v in peaks:
            logits[t, v] += rng.uniform(3, 8)
        if rng.random() < 0.6:
            token_ids[t] = peaks[0]
    mask = torch.tensor([rng.random() < 0.8 for _ in range(n)], dtype=torch.bool)
    ends = list(itertools.accumulate(lengths, initial=0))
    for i, length in enumerate(lengths):
        if length and s == len(LENGTHS):
            mask[ends[i]] = True  # no accidental empty sequence: they are placed on purpose
            if i == ALL_MASKED:
                mask[ends[i] : ends[i + 1]] = False

    def log_ratio(k: float | str) -> float:
        return 2.0 if k == "far" else float(k) * (edge_high if float(k) > 0 else -edge_low)

    wanted = torch.zeros(n, dtype=torch.float64)  # [N] log-ratios
    signs = []
    for i in range(s):
        k, sign = PLAN[i % len(PLAN)]
        signs.append(sign)
        unmasked = [t for t in range(ends[i], ends[i + 1]) if mask[t]]
        noise = [rng.gauss(0, 0.3) for _ in unmasked]
        for j, t in enumerate(unmasked):
            if truth.of_tokens:  # each token its own place about the window
                wanted[t] = log_ratio(PLAN[(i + j) % len(PLAN)][0])
            else:  # the mean over the sequence lands on its place
                wanted[t] = log_ratio(k) + noise[j] - sum(noise) / len(noise)

    sign_of = torch.tensor(signs, dtype=wide)
    if by_token:
        sign_of = torch.tensor([rng.choice([-1.0, 0.0, 1.0, 1.0, -1.0]) for _ in range(n)], dtype=wide)
    magnitude = torch.rand(len(sign_of), generator=generator) * 1.5 + 0.5
    batch = Batch(logits.to(dtype), token_ids, mask, list(lengths), sign_of * magnitude.to(wide), by_token=by_token)
    batch.logit_scale, batch.softcap = logit_scale, softcap
    batch.kept = kept_sets(batch, rng) if kept else None
    if temperature == "token":
        batch.temperature = torch.rand(n, generator=generator) * 1.5 + 0.5
    else:
        batch.temperature = float(temperature)
    if weights is not None:
        batch.weights_by_token = weights == "token"
        batch.weights = torch.rand(n if batch.weights_by_token else s, generator=generator) * 2 + 0.1
    if not on_policy:
        per_sequence = not truth.of_tokens
        make_possible(batch, wanted, batch.sequences if per_sequence else [range(t, t + 1) for t in range(n)])
    logprobs = torch.tensor([row.logprob for row in batch.rows], dtype=torch.float64)
    if not on_policy:
        batch.old_logprobs = (logprobs - wanted).to(wide)
    if ref:
        noise_of_ref = torch.randn(n, generator=generator, dtype=torch.float64) * 0.5
        batch.ref_logprobs = (logprobs + noise_of_ref).clamp(max=0.0).to(wide)
    if rollout and CLASSES[objective].uses_rollout_logprobs:
        apart = torch.randn(n, generator=generator, dtype=torch.float64) * 0.3
        batch.rollout_logprobs = (logprobs - wanted + apart).clamp(max=0.0).to(wide)
    if groups:
        batch.group_tokens = tokens_of_groups(batch, range(s))
    put_garbage(batch)
    return batch


def kept_sets(batch: Batch, rng: random.Random) -> list[list[int] | None]:
    """For each row its token alone, all columns (said and unsaid), or some; the likely ones more often than others."""
    found: list[list[int] | None] = []
    vocab = batch.logits.shape[-1]
    for t, token in enumerate(batch.token_ids.tolist()):
        kind = rng.choice(["one", "all", "unsaid", *["some"] * 4])
        count = {"one": 1, "all": vocab, "some": rng.randint(2, max(2, min(vocab, 12)))}.get(kind, 0)
        by_size = batch.logits[t].float().argsort(descending=True).tolist()
        half = by_size[: count // 2]
        ids = list(dict.fromkeys([token, *half, *rng.sample(range(vocab), vocab)]))[:count]
        rng.shuffle(ids)
        found.append(ids or None)
    return found


def tokens_of_groups(batch: Batch, sequences: Sequence[int]) -> Tensor:
    """[S], of groups that have these of the sequences."""
    counts = [float(batch.mask[list(rows)].sum()) for rows in batch.sequences]
    group_of = [i // 4 for i in range(len(counts))]
    total = [sum(counts[j] for j in sequences if group_of[j] == group) for group in group_of]
    return torch.tensor(total, dtype=torch.float64)


def make_possible(batch: Batch, wanted: Tensor, units: Sequence[range]) -> None:
    """No old log-probability, `logprob - wanted`, may be above 0 but for rounding; the mean over a unit stays.

    What is too much for one token of a unit is left to the others. Where it is too much for all, tokens that are nearly
    certain are replaced by the least likely ones.
    """
    for unit in units:
        kept = [t for t in unit if batch.mask[t]]
        total = float(wanted[kept].sum())
        for t in sorted(kept, key=lambda t: -batch.rows[t].logprob):
            if total >= sum(batch.rows[u].logprob - ROUNDED_UP for u in kept):
                break
            columns = None if batch.kept is None else batch.kept[t]
            logits = batch.logits[t].double()
            least_likely = min(columns or range(len(logits)), key=lambda v: float(logits[v]))
            batch.token_ids[t] = least_likely
            row = batch.logits_of(t), int(batch.token_ids[t]), batch.temperature_of(t)
            batch.rows[t] = oracle.row_statistics(*row)
        least = torch.tensor([batch.rows[t].logprob - ROUNDED_UP for t in kept], dtype=torch.float64)
        found = torch.maximum(wanted[kept], least)
        slack, excess = found - least, float(found.sum()) - total
        if excess > 0.0:
            found -= slack * min(excess / max(float(slack.sum()), 1e-30), 1.0)
        wanted[kept] = found


def edge_batch(objective: str, side: str) -> Batch:
    """Four sequences with ratios 1e-4 and 3e-4 of the window inside and outside its edge: as little as 3e-8 from it.

    The tokens are nearly certain, so their log-probs have digits to spare: what is tried is the ratio and its clip.
    """
    steps = torch.tensor([-3e-4, -1e-4, 1e-4, 3e-4], dtype=torch.float64).repeat_interleave(2)
    sign = 1.0 if side == "high" else -1.0
    edge = math.log1p(4e-4) if side == "high" else math.log1p(-3e-4)
    logits = torch.zeros(8, 33)
    logits[:, 7] = 14.0 + torch.arange(8) / 8
    mask = torch.ones(8, dtype=torch.bool)
    batch = Batch(logits, torch.full((8,), 7), mask, [2] * 4, torch.full((4,), sign))
    logprobs = torch.tensor([row.logprob for row in batch.rows], dtype=torch.float64)
    batch.old_logprobs = (logprobs - edge * (1 + steps)).float()
    active = [g != 0 for g in batch.expected(objective).d_logprobs]
    assert active == [True] * 4 + [False] * 4, "two sequences in and two out"
    return batch


def put_garbage(batch: Batch) -> None:
    """What a trainer leaves at masked positions, and worse."""
    out = ~batch.mask
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -300.0])
    vocab = batch.logits.shape[-1]
    batch.logits[out] = junk.to(batch.logits.dtype).repeat(vocab // 5 + 1)[:vocab]
    batch.token_ids[out] = -100
    for values, by_token in (
        (batch.advantages, batch.by_token),
        (batch.old_logprobs, True),
        (batch.ref_logprobs, True),
        (batch.rollout_logprobs, True),
        (batch.weights, batch.weights_by_token),
    ):
        if values is not None and by_token:
            values[out] = junk.to(values.dtype).repeat(len(out) // 5 + 1)[: int(out.sum())]


# --- the two layouts ----------------------------------------------------------------------------------------------


def to_padded(values: Tensor, lengths: Sequence[int], fill: float, padding: int = 1) -> Tensor:
    """[N, ...] -> [B, T, ...]; T is `padding` more than the longest sequence."""
    width = max(lengths, default=0) + padding
    padded = torch.full((len(lengths), width, *values.shape[1:]), fill, dtype=values.dtype)
    start = 0
    for i, length in enumerate(lengths):
        padded[i, :length] = values[start : start + length]
        start += length
    return padded


def from_padded(values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[B, T, ...] -> ([N, ...], the padding [*, ...])."""
    inside = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
    for i, length in enumerate(lengths):
        inside[i, :length] = True
    return values[inside], values[~inside]


@dataclass
class Arguments:
    """One call's arguments, on the device; `logits` is a leaf that wants its gradient."""

    logits: Tensor
    rest: tuple[Any, ...]  # token_ids, advantages, old_logprobs
    keywords: dict[str, Any]


def arguments(batch: Batch, layout: str) -> Arguments:
    def lay(values: Any, fill: float, by_token: bool = True) -> Any:
        if not isinstance(values, Tensor):
            return values
        if layout == "padded" and by_token:
            return on_device(to_padded(values, batch.lengths, fill, batch.padding))
        return on_device(values.clone())

    def either(values: Any, fill: float, by_token: bool) -> Any:
        """Where as many tokens as sequences are packed, a second dimension says which."""
        if isinstance(values, Tensor) and layout == "packed" and len(batch.mask) == len(batch.lengths):
            values = values[None] if by_token else values[:, None]
        return lay(values, fill, by_token)

    keywords = {
        "mask": lay(batch.mask, False),
        "ref_logprobs": lay(batch.ref_logprobs, math.nan),
        "importance_weights": either(batch.weights, math.inf, batch.weights_by_token),
        "temperature": lay(batch.temperature, 1.0),
    }
    if batch.logit_scale != 1.0:
        keywords["logit_scale"] = batch.logit_scale
    if batch.softcap is not None:
        keywords["softcap"] = batch.softcap
    if batch.kept is not None:
        keywords["kept"] = kept_tokens(batch, layout)
    if batch.rollout_logprobs is not None:
        keywords["rollout_logprobs"] = lay(batch.rollout_logprobs, math.nan)
    if batch.group_tokens is not None:
        keywords["group_tokens"] = lay(batch.group_tokens, math.nan, False)
    if layout == "packed":
        boundaries = torch.tensor([0, *itertools.accumulate(batch.lengths)], dtype=torch.int32)
        keywords["cu_seqlens"] = on_device(boundaries)
    rest = (
        lay(batch.token_ids, -100),
        either(batch.advantages, math.nan, batch.by_token),
        lay(batch.old_logprobs, math.nan),
    )
    return Arguments(lay(batch.logits, math.nan).requires_grad_(), rest, keywords)


def kept_tokens(batch: Batch, layout: str) -> gspo_kernels.KeptTokens:
    """Of a padded batch, rows of the padding keep all columns."""
    assert batch.kept is not None
    by_row: list[list[int] | None] = list(batch.kept)
    if layout == "padded":
        width = max(batch.lengths, default=0) + batch.padding
        by_row = [batch.kept[t] if t is not None else None for rows in batch.sequences for t in padded_to(rows, width)]
    return gspo_kernels.KeptTokens.from_lists(by_row, device=modes.DEVICE)


def padded_to(rows: range, width: int) -> list[int | None]:
    return [*rows, *[None] * (width - len(rows))]


@dataclass
class Outcome:
    """What came back, on the CPU; only `stats` is as it was given."""

    loss: Tensor
    stats: Any
    gradient: Tensor  # [N, V], in the dtype of the logits
    padding_gradient: Tensor  # [*, V], empty when packed
    logprobs: Tensor  # [N]
    log_ratio: Tensor  # [S] or [N]
    clipped: Tensor  # bool [S, 2] or [N, 2]: at the lower bound, at the upper one


def flat(values: Tensor, batch: Batch, layout: str) -> Tensor:
    return from_padded(values, batch.lengths)[0] if layout == "padded" else values


def run(
    batch: Batch,
    layout: str,
    objective: str,
    *,
    function: Callable[..., Any] | None = None,
    upstream: float = 1.0,
    **options: Any,
) -> Outcome:
    """The public loss function and its backward, with everything brought back to flat rows."""
    args = arguments(batch, layout)
    loss, stats = (function or PUBLIC[objective])(args.logits, *args.rest, **args.keywords, **options)
    (loss * upstream).backward()
    assert args.logits.grad is not None
    gradient = args.logits.grad.cpu()
    padding = gradient.flatten(0, -2)[:0]
    if layout == "padded":
        gradient, padding = from_padded(gradient, batch.lengths)
    log_ratio, clipped = of_units(stats, batch, layout, oracle.OBJECTIVES[objective].per_sequence)
    logprobs = flat(stats.logprobs.cpu(), batch, layout)
    return Outcome(loss.detach().cpu(), stats, gradient, padding, logprobs, log_ratio, clipped)


def of_units(stats: Any, batch: Batch, layout: str, by_sequence: bool) -> tuple[Tensor, Tensor]:
    """(log-ratios [S] or [N], what is clipped [S, 2] or [N, 2]), on the CPU."""
    found = [x.cpu() for x in (stats.log_ratio, stats.clipped_low, stats.clipped_high)]
    log_ratio, low, high = found if by_sequence else [flat(x, batch, layout) for x in found]
    return log_ratio, torch.stack([low, high], dim=-1)
