"""Which token belongs to which sequence, for padded, packed and context-parallel batches alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .checks import may_read, watched
from .collectives import Ranks, gather, sum_over_ranks
from .devices import check_float64, sums_segments
from .operators import Operator


@dataclass(frozen=True)
class BatchShape:
    """The shapes, mask and boundaries of a checked batch."""

    tokens: torch.Size  # of the caller's token arrays
    sequences: int
    device: torch.device
    mask: Tensor | None  # bool, of shape `tokens`
    cu_seqlens: Tensor | None  # packed: sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]. None: padded
    ranks: Ranks | None = None  # that share the tokens of each sequence

    def per_token(self, name: str, values: Any, meaning: str) -> Tensor:
        """A caller's token array, checked."""
        array = self._array(name, values, meaning)
        checks.shape(name, array, self.tokens, f"{meaning}, one per token")
        return array

    def per_sequence(self, name: str, values: Any, meaning: str) -> Tensor:
        """A caller's sequence array, [S] or [S, 1], checked; as [S]."""
        array = self._array(name, values, meaning)
        if array.shape != (self.sequences, 1):
            checks.shape(name, array, (self.sequences,), f"{meaning}, one per sequence")
        return array.reshape(self.sequences)

    def per_either(self, name: str, values: Any, meaning: str) -> tuple[Tensor, bool]:
        """A caller's array with one number per token or per sequence, checked; whether it is per token."""
        array = self._array(name, values, meaning)
        if self.is_per_token(array):
            return array.reshape(self.tokens), True
        if array.shape not in ((self.sequences,), (self.sequences, 1)):
            packed = self.cu_seqlens is not None
            raise ValueError(
                f"{name}: expected shape {[self.sequences]} or {[self.sequences, 1]} ({meaning}, one per sequence), or "
                f"{list(self.tokens)}{f' or {[1, *self.tokens]}' if packed else ''} (one per token); got "
                f"{list(array.shape)}"
            )
        if array.shape == self.tokens and self._lengths_differ_from_1():
            count = self.sequences
            raise ValueError(
                f"{name}: expected a second dimension that says what the numbers belong to, because this packed batch "
                f"has {count} tokens and {count} sequences: {name}[None], of shape {[1, count]}, for one per token; "
                f"{name}[:, None], of shape {[count, 1]}, for one per sequence; got shape {[count]}"
            )
        return array.reshape(self.sequences), False

    def log_probabilities(self, name: str, values: Any, meaning: str) -> Tensor:
        """A caller's token array of log-probabilities, checked; their values too where that is free."""
        checks.digits(name, checks.tensor(name, values, meaning))
        array = self.per_token(name, values, meaning)
        checks.log_probabilities(name, array, self.mask)
        return array

    def is_per_token(self, values: Tensor) -> bool:
        """By its shape. Packed, [S] and [S, 1] are one per sequence, also where N is S; [1, N] is one per token.

        Padded [B, 1] with T = 1 counts as one per token: the numbers are the same, but ranks of a cp_group compare the
        kind.
        """
        if self.cu_seqlens is not None and values.ndim == 2:
            return values.shape == (1, *self.tokens) and values.shape != (self.sequences, 1)
        return values.shape == self.tokens and values.shape != (self.sequences,)

    def _lengths_differ_from_1(self) -> bool:
        """Whether not every sequence of a packed batch has one token; False where reading boundaries is not free."""
        boundaries = self.cu_seqlens
        if boundaries is None or not may_read(boundaries) or watched(boundaries):
            return False
        return not torch.equal(boundaries.long(), torch.arange(self.sequences + 1, device=boundaries.device))

    def layout(self, *, crosses: bool = True) -> Layout:
        """The same batch with its sums, means and counts in torch; `crosses` as in `Layout`."""
        if self.cu_seqlens is None:
            return PaddedLayout(self, crosses)
        return PackedLayout(self, self.cu_seqlens, crosses)

    def _array(self, name: str, values: Any, meaning: str) -> Tensor:
        array = checks.tensor(name, values, meaning).detach()
        checks.same_device(name, array, self.device)
        checks.numbers(name, array)
        return array


class Layout:
    """The sequences of a batch, as `Objective.terms` gets them: sums, means and counts that fit every batch.

    Token arrays are flat, [tokens]; sequence arrays are [sequences]. A padded batch is flattened row by row. Masked
    tokens are in no sum, mean, length or count: their values are selected away, so NaN and infinity do no harm.
    `sum`, `mean` and `spread` are differentiable. Padded and packed batches give the same numbers.

        mean = layout.mean(log_ratio)                          # [sequences]
        deviation = log_ratio - layout.spread(mean)            # [tokens]
        variance = layout.mean(deviation.square())             # [sequences]

    Under context parallelism a rank holds some tokens of each sequence, in any order, or none. Token arrays are the
    rank's own; sums, means, lengths and counts are those of all ranks, and the same on each. The first of them is one
    collective, and each further sum or mean is another.

    Sums and lengths are NaN if packed boundaries are wrong and could not be checked (on a GPU, unless debugging).

    Attributes:
        mask: [tokens] bool, where tokens count.
        shape: of the caller's token arrays, [B, T] or [N].
        sequences: how many sequences there are, those without a token included.
    """

    mask: Tensor
    shape: torch.Size
    sequences: int
    local_lengths: Tensor  # [sequences] float64, unmasked tokens of this rank

    # `crosses`: whether the gradient of a sum is summed over ranks too. False for a loss whose gradient by a sequence's
    # sum is known whole on every rank.

    def __init__(self, batch: BatchShape, crosses: bool) -> None:
        self.shape, self.sequences = batch.tokens, batch.sequences
        self.ranks, self._crosses = batch.ranks, crosses
        count, device = batch.tokens.numel(), batch.device
        given = batch.mask
        self.mask = torch.ones(count, dtype=torch.bool, device=device) if given is None else given.reshape(-1)
        self._masked = ~self.mask
        self.local_lengths = self.local_sum(torch.ones((), dtype=torch.float64, device=device).expand(count))
        self._lengths_of_ranks: Tensor | None = None  # [ranks, sequences]
        self._lengths = self.local_lengths if self.ranks is None else None
        self._weight_sums: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """[sequences] float64, how many unmasked tokens each has."""
        if self._lengths is None:
            self._gather_lengths()
        assert self._lengths is not None
        return self._lengths

    @property
    def num_tokens(self) -> Tensor:
        """0-d float64, how many tokens are unmasked."""
        return self.lengths.sum()

    @property
    def num_sequences(self) -> Tensor:
        """0-d float64, how many sequences have an unmasked token."""
        return self.lengths.clamp(max=1).sum()  # keeps NaN

    def select(self, values: Tensor) -> Tensor:
        """[tokens] -> [tokens], with 0 where masked, whatever the value there."""
        return values.masked_fill(self._masked, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """[tokens] -> [sequences], over unmasked tokens."""
        local = self.local_sum(values)
        return local if self.ranks is None else self._over_ranks(local)

    def mean(self, values: Tensor) -> Tensor:
        """[tokens] -> [sequences], over unmasked tokens; 0 for a sequence without any."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """[sequences] -> [tokens], a sequence's value at each of its unmasked tokens and 0 elsewhere."""
        return self.select(self._spread(values))

    def of_tokens(self, values: Tensor) -> Tensor:
        """A token array of the caller's shape as [tokens] in float64, 0 where masked."""
        return self.select(values.reshape(-1).double())

    def of_sequences(self, values: Tensor) -> Tensor:
        """A sequence array in float64, 0 for a sequence of which this rank has no unmasked token."""
        return torch.where(self.held, values.double(), 0.0)

    # ---- for the package: parts of a context-parallel batch

    @property
    def held(self) -> Tensor:
        """[sequences] bool, those of which this rank has an unmasked token; all of them if lengths are NaN."""
        return self.local_lengths != 0

    def lengths_on_host(self) -> list[int]:
        """`local_lengths`; waits for a GPU. Wrong boundaries that were not checked before are refused here."""
        lengths: list[float] = self.local_lengths.tolist()
        if any(length != length for length in lengths):
            raise ValueError(_WRONG_BOUNDARIES.format(tokens=self.mask.numel(), got="others"))
        return [int(length) for length in lengths]

    @property
    def longest_parts(self) -> Tensor:
        """[sequences] float64, the most unmasked tokens that any rank has of each; one collective with `lengths`."""
        if self._lengths_of_ranks is None:
            self._gather_lengths()
        assert self._lengths_of_ranks is not None
        return self._lengths_of_ranks.amax(0)

    def local_sum(self, values: Tensor) -> Tensor:
        """`sum` over the tokens of this rank."""
        return self._sum(self.select(values))

    def share(self) -> Tensor:
        """[sequences], the share of its tokens on this rank; the ranks' shares add up to 1, or 0 if it is empty."""
        return self.local_lengths / self.lengths.clamp(min=1)

    def add_weights(self, weights: Tensor) -> None:
        """Constants [tokens] that the first collective sums as well: call it before `sum`, `mean` and `lengths`."""
        self._weight_sums = self.local_sum(weights)

    @property
    def weight_sums(self) -> Tensor:
        """[sequences], the sums of what `add_weights` was given, over all ranks."""
        assert self.lengths is not None and self._weight_sums is not None
        return self._weight_sums

    def _gather_lengths(self) -> None:
        assert self.ranks is not None
        weights = [] if self._weight_sums is None else [self._weight_sums]
        of_ranks = gather(torch.stack([self.local_lengths, *weights]), self.ranks)  # [ranks, 1 or 2, sequences]
        self._lengths_of_ranks = of_ranks[:, 0]
        self._keep_constants(of_ranks.sum(0))

    def _over_ranks(self, local: Tensor) -> Tensor:
        assert self.ranks is not None
        if self._lengths is not None:
            return sum_over_ranks(local, self.ranks, crosses=self._crosses)
        weights = [] if self._weight_sums is None else [self._weight_sums]
        sums = sum_over_ranks(torch.stack([local, self.local_lengths, *weights]), self.ranks, crosses=self._crosses)
        self._keep_constants(sums[1:].detach())
        return sums[0]

    def _keep_constants(self, sums: Tensor) -> None:
        """Over all ranks: the lengths and, if there are weights, their sums."""
        self._lengths = sums[0]
        if self._weight_sums is not None:
            self._weight_sums = sums[1]

    def _sum(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def _spread(self, values: Tensor) -> Tensor:
        raise NotImplementedError


class PaddedLayout(Layout):
    """Token arrays [B, T]: a row is a sequence."""

    def _sum(self, values: Tensor) -> Tensor:
        return values.reshape(self.shape).sum(1)

    def _spread(self, values: Tensor) -> Tensor:
        return values[:, None].expand(self.shape).reshape(-1)


class PackedLayout(Layout):
    """Token arrays [N]: sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]."""

    def __init__(self, batch: BatchShape, cu_seqlens: Tensor, crosses: bool) -> None:
        self._segments = find_segments(cu_seqlens, batch.tokens[0])
        super().__init__(batch, crosses)

    def _sum(self, values: Tensor) -> Tensor:
        return segment_sum(values, self._segments) + self._segments.fault

    def _spread(self, values: Tensor) -> Tensor:
        return segment_spread(values, self._segments)


def batch_shape(
    token_shape: torch.Size, mask: Any, cu_seqlens: Any, device: torch.device, ranks: Ranks | None = None
) -> BatchShape:
    """The batch with token arrays of `token_shape` on `device`; checks `mask` and `cu_seqlens`."""
    check_float64(device)
    if mask is not None:
        checks.tensor("mask", mask, "True or 1 at the tokens that count")
        checks.shape("mask", mask, token_shape, "one per token")
        checks.same_device("mask", mask, device)
        mask = as_bool("mask", mask)
    if cu_seqlens is None:
        if len(token_shape) != 2:
            raise ValueError(
                "cu_seqlens: expected the boundaries of the packed sequences, [sequences + 1], because token arrays "
                f"have shape {list(token_shape)}; got None (padded: logits [B, T, V] and token arrays [B, T])"
            )
        return BatchShape(token_shape, token_shape[0], device, mask, None, ranks)
    checks.tensor("cu_seqlens", cu_seqlens, "boundaries of the packed sequences")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens: expected boundaries of the packed sequences in int32 or int64; got {cu_seqlens.dtype}"
        )
    checks.same_device("cu_seqlens", cu_seqlens, device)
    if len(token_shape) != 1:
        raise ValueError(
            f"cu_seqlens: expected None with a padded batch (token arrays {list(token_shape)}); packed token arrays "
            "have one dimension"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [sequences + 1]; got {list(cu_seqlens.shape)}")
    if cu_seqlens.shape[0] == 1 and token_shape[0] > 0:
        raise ValueError(
            f"cu_seqlens: expected boundaries that end at {token_shape[0]}, the number of tokens; got one entry, which "
            "is no sequence"
        )
    if may_read(cu_seqlens) and not watched(cu_seqlens):  # else the operators do
        check_boundaries(cu_seqlens, token_shape[0])
    return BatchShape(token_shape, cu_seqlens.shape[0] - 1, device, mask, cu_seqlens.detach(), ranks)


def as_bool(name: str, mask: Tensor) -> Tensor:
    """A caller's mask as bool. Numbers other than 0 and 1 are refused where reading is free, and are True elsewhere."""
    if mask.dtype == torch.bool:
        return mask
    mask = mask.detach()
    if mask.is_complex():
        raise TypeError(f"{name}: expected bool, or 0 and 1; got {mask.dtype}")
    counts = mask != 0
    if may_read(mask) and not watched(mask):
        others = mask[counts & (mask != 1)]
        if others.numel():
            additive = bool((others < 0).all()) and not bool((mask == 1).any())
            hint = (
                f". If it is an additive attention mask, 0 where a token counts, pass {name} == 0" if additive else ""
            )
            raise ValueError(
                f"{name}: expected True or 1 at the tokens that count, and False or 0 elsewhere; got "
                f"{others[0].item():g} among its numbers ({mask.dtype}){hint}"
            )
    return counts


_WRONG_BOUNDARIES = (
    "cu_seqlens: expected boundaries that start at 0, never decrease and end at {tokens}, the number of tokens; "
    "got {got}"
)


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Refuses wrong boundaries. Reads them: call it where `may_read` allows."""
    if bool(_are_wrong(cu_seqlens, tokens)):
        few = cu_seqlens.numel() <= 16
        got = cu_seqlens.tolist() if few else f"{int(cu_seqlens[0])} ... {int(cu_seqlens[-1])}"
        raise ValueError(_WRONG_BOUNDARIES.format(tokens=tokens, got=got))


def _are_wrong(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """0-d bool. Neighbours are compared, because their difference may overflow."""
    boundaries = cu_seqlens.to(torch.int64)
    return (boundaries[1:] < boundaries[:-1]).any() | (boundaries[0] != 0) | (boundaries[-1] != tokens)


# ---- sums over segments, in a fixed order: index_add would use float atomics on a GPU


class Segments(NamedTuple):
    """Checked boundaries of packed sequences."""

    boundaries: Tensor  # [sequences + 1] int64
    sequence_of: Tensor  # [tokens] int64, the sequence of each token
    fault: Tensor  # 0-d float64: 0, or NaN for wrong boundaries


def _segments(cu_seqlens: Tensor, tokens: int) -> Segments:
    """Wrong boundaries that may not be read are clamped and sorted, because the sums below index by them."""
    if may_read(cu_seqlens):
        check_boundaries(cu_seqlens, tokens)
    fault = torch.where(_are_wrong(cu_seqlens, tokens), torch.nan, torch.zeros_like(cu_seqlens[0], dtype=torch.float64))
    boundaries = cu_seqlens.to(torch.int64).clamp(0, tokens).cummax(0).values
    boundaries[0] = 0
    boundaries[-1] = tokens
    sequences = torch.arange(boundaries.numel() - 1, device=boundaries.device)
    return Segments(boundaries, sequences.repeat_interleave(boundaries.diff(), output_size=tokens), fault)


def _empty_segments(cu_seqlens: Tensor, tokens: int) -> Segments:
    return Segments(
        torch.empty_like(cu_seqlens, dtype=torch.int64),
        cu_seqlens.new_empty(tokens, dtype=torch.int64),
        cu_seqlens.new_empty((), dtype=torch.float64),
    )


find_segments = Operator("segments", _segments, fake=_empty_segments)


def _segment_sum(values: Tensor, segments: Segments) -> Tensor:
    boundaries = segments.boundaries
    if boundaries.numel() == 1:
        return values.new_zeros(0)
    if sums_segments(values.device):
        return _reduce(values, boundaries)
    return _reduce(values.cpu(), boundaries.cpu()).to(values.device)


def _reduce(values: Tensor, boundaries: Tensor) -> Tensor:
    return torch.segment_reduce(values.contiguous(), "sum", offsets=boundaries, initial=0.0, unsafe=True)


def _segment_spread(values: Tensor, segments: Segments) -> Tensor:
    return values.index_select(0, segments.sequence_of)


def _save_segments(ctx: Any, found: Tensor, values: Tensor, segments: Segments) -> None:
    ctx.save_for_backward(*segments)


# Each is the other's derivative.
segment_sum: Operator[Tensor] = Operator(
    "segment_sum",
    _segment_sum,
    fake=lambda values, segments: values.new_empty(segments.boundaries.shape[0] - 1),
    save=_save_segments,
    backward=lambda ctx, gradient: {"values": segment_spread(gradient, Segments(*ctx.saved_tensors))},
    operands=("values",),
)
segment_spread: Operator[Tensor] = Operator(
    "segment_spread",
    _segment_spread,
    fake=lambda values, segments: values.new_empty(segments.sequence_of.shape[0]),
    save=_save_segments,
    backward=lambda ctx, gradient: {"values": segment_sum(gradient, Segments(*ctx.saved_tensors))},
    operands=("values",),
)
