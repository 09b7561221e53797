"""The columns from which an engine sampled: top-p, top-k and min-p keep a few of each row's."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base import checks
from .kept_filter import kept_of_logits, kept_of_mask

HIGHEST_ID = (1 << 31) - 1


@dataclass(frozen=True, eq=False)  # equal to itself alone: tensors have no truth value
class KeptTokens:
    """The token ids that each row keeps, as a ragged array (CSR): row i keeps `token_ids[offsets[i]:offsets[i + 1]]`.

    Rows are those of the logits: [N] of a packed batch, B * T of a padded one, a sequence after the other. The ids of a
    row come in any order, once each, the sampled token among them. A row without entries keeps the whole vocabulary.

    A loss with `kept=` takes log-probability, entropy and gradient of the distribution over these columns alone: the
    one that was sampled from (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

    Args:
        token_ids: integers [entries], from 0 to 2^31 - 1; stored as int32.
        offsets: integers [rows + 1] from 0 to the number of entries, never decreasing; stored as int64.
        every_row: whether every row that a mask leaves has entries; not needed on the CPU, where that is read. On a GPU
            True saves work, and a row without entries is NaN (from hidden states its numbers are 0); None and False are
            ready for such rows. Over a `tp_group` all ranks say the same.

    Raises: ValueError, TypeError, on the CPU or under GSPO_KERNELS_DEBUG=1: offsets that decrease, negative ids, the
        same id twice in a row. Elsewhere nothing is read: such rows have no defined numbers.
    """

    token_ids: Tensor
    offsets: Tensor
    every_row: bool | None = None

    def __post_init__(self) -> None:
        ids, offsets = self.token_ids, self.offsets
        for name, value, meaning in (
            ("token_ids", ids, "the ids that rows keep, one row's after the other's"),
            ("offsets", offsets, "where each row's ids begin, and their number at the end"),
        ):
            checks.integers(name, checks.tensor(name, value, meaning), meaning)
            if value.ndim != 1:
                raise ValueError(f"{name}: expected one dimension ({meaning}); got shape {list(value.shape)}")
        checks.same_device("offsets", offsets, ids.device)
        if offsets.numel() == 0:
            raise ValueError("offsets: expected one number more than there are rows, the first one 0; got none")
        if self.every_row is not None:
            checks.flag("every_row", self.every_row, "whether every row has entries, or None")
        every = self.every_row
        if checks.may_read(ids) and not checks.watched(ids):
            _check(ids, offsets)
            if every is None:
                every = bool((offsets.long().diff() > 0).all())
        object.__setattr__(self, "token_ids", ids.detach().to(torch.int32).contiguous())
        object.__setattr__(self, "offsets", offsets.detach().to(torch.int64).contiguous())
        object.__setattr__(self, "every_row", every)

    @classmethod
    def _checked(cls, token_ids: Tensor, offsets: Tensor, every_row: bool | None) -> KeptTokens:
        """Of int32 ids and int64 offsets that need no check."""
        made = object.__new__(cls)
        for name, value in (("token_ids", token_ids), ("offsets", offsets), ("every_row", every_row)):
            object.__setattr__(made, name, value)
        return made

    @classmethod
    def from_lists(cls, rows: Sequence[Any], device: Any = None) -> KeptTokens:
        """From the ids of each row: a sequence of integers, or None for the whole vocabulary."""
        found = list(_ids_of_rows(rows))
        ids = torch.tensor(list(itertools.chain.from_iterable(found)), dtype=torch.int64, device="cpu")
        offsets = torch.tensor([0, *itertools.accumulate(map(len, found))], dtype=torch.int64, device="cpu")
        made = cls(ids, offsets)
        return made if device is None else made.to(device)

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        top_p: float | Tensor | None = None,
        top_k: int | Tensor | None = None,
        min_p: float | Tensor | None = None,
        temperature: float | Tensor = 1.0,
        mask: Tensor | None = None,
        vocab_size: int | None = None,
    ) -> KeptTokens:
        """What an engine's filters keep of these logits: vLLM's rules, in its order (`kept_filter`).

        For logits of your own sampler. Where an engine returns its sets, take those: another rounding of the logits
        moves columns across a filter's edge, and the sampled token may be one of them. A row that loses no column has
        no entries, nor has a row with NaN. Deterministic; memory for 4 million logits at a time. Waits for a GPU.

        Args:
            logits: [B, T, V] or [N, V], any float dtype, finished: after the model's own softcap and scale. Of all
                columns; a shard of the vocabulary does not tell what the others keep.
            top_p: above 0, at most 1. 1 or None: off.
            top_k: 0, -1 or None: off. Columns that equal the k-th largest are all kept.
            min_p: from 0 to 1, of the largest probability. 0 or None: off.
            temperature: what the logits are divided by first.
            mask: [B, T] or [N]: rows that are False are not read and have no entries. `every_row` is then about the
                others: on a GPU, give the losses no mask that is wider.
            vocab_size: columns from this one on are padding and never kept. None: all columns are tokens.

        Numbers, or tensors of one number per row ([B, T] or [N]) or per sequence ([B, 1]).
        """
        return cls._checked(
            *kept_of_logits(
                logits, top_p=top_p, top_k=top_k, min_p=min_p, temperature=temperature, mask=mask, vocab_size=vocab_size
            )
        )

    @classmethod
    def from_mask(cls, keep: Tensor) -> KeptTokens:
        """From a dense mask [rows, V] or [B, T, V]: bool, or 0 and 1. Waits for a GPU.

        A row that is all True, or all False, keeps the whole vocabulary.
        """
        return cls._checked(*kept_of_mask(keep), None)

    def to_lists(self) -> list[list[int] | None]:
        """The ids of each row; None where it keeps the whole vocabulary. Waits for a GPU."""
        ids, ends = self.token_ids.tolist(), self.offsets.tolist()
        return [ids[a:b] if b > a else None for a, b in itertools.pairwise(ends)]

    def __len__(self) -> int:
        """How many rows."""
        return int(self.offsets.shape[0]) - 1

    @property
    def counts(self) -> Tensor:
        """int64 [rows]: how many ids each row keeps; 0 for the whole vocabulary."""
        return self.offsets.diff()

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def to(self, device: Any, non_blocking: bool = False) -> KeptTokens:
        """On another device. Waits for none, where `non_blocking` is set and the memory is pinned."""
        ids, offsets = (x.to(device, non_blocking=non_blocking) for x in (self.token_ids, self.offsets))
        return self._checked(ids, offsets, self.every_row)

    def pin_memory(self) -> KeptTokens:
        return self._checked(self.token_ids.pin_memory(), self.offsets.pin_memory(), self.every_row)

    def scatter(self, rows: Tensor, length: int) -> KeptTokens:
        """These rows as rows number `rows` (ascending) of `length`, of which the others keep the whole vocabulary."""
        counts = torch.zeros(length, dtype=torch.int64, device=self.device).index_copy(0, rows, self.counts)
        return self._checked(self.token_ids, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), self.every_row)

    def __getitem__(self, rows: Any) -> KeptTokens:
        """Some rows, as those of a mini-batch: a slice with a step of 1, or int64 or bool numbers of rows.

        On a GPU this waits for the device: cut on the CPU, then move.
        """
        every = True if self.every_row else None
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"rows: expected a slice with a step of 1; got {rows}")
            offsets = self.offsets[start : max(start, stop) + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            return self._checked(self.token_ids[first:last], offsets - first, every)
        rows = checks.tensor("rows", rows, "a slice, or the numbers of rows")
        if rows.dtype == torch.bool:
            checks.shape("rows", rows, (len(self),), "one per row")
            rows = rows.nonzero()[:, 0]
        checks.integers("rows", rows, "numbers of rows")
        if rows.ndim != 1:
            raise ValueError(f"rows: expected one dimension, the numbers of rows; got shape {list(rows.shape)}")
        rows = rows.long()
        counts, starts = self.counts[rows], self.offsets[:-1][rows]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        at = torch.arange(int(offsets[-1]), device=self.device) + (starts - offsets[:-1]).repeat_interleave(counts)
        return self._checked(self.token_ids[at], offsets, every)

    @classmethod
    def cat(cls, parts: Iterable[KeptTokens]) -> KeptTokens:
        """The rows of all parts, one after the other."""
        parts = list(parts)
        if not parts or not all(isinstance(part, KeptTokens) for part in parts):
            raise TypeError(f"parts: expected KeptTokens, at least one; got {[type(part).__name__ for part in parts]}")
        sizes = [0, *itertools.accumulate(part.token_ids.shape[0] for part in parts)]
        ends = [part.offsets[1:] + size for part, size in zip(parts, sizes, strict=False)]
        known = [part.every_row for part in parts]
        every = True if all(known) else False if False in known else None
        ids = torch.cat([part.token_ids for part in parts])
        return cls._checked(ids, torch.cat([parts[0].offsets[:1], *ends]), every)


def _ids_of_rows(rows: Any) -> Iterator[list[int]]:
    if isinstance(rows, (str, bytes)) or not hasattr(rows, "__iter__"):
        raise TypeError(f"rows: expected the ids of each row, a sequence of lists; got {checks.describe(rows)}")
    for i, row in enumerate(rows):
        if row is None:
            yield []
            continue
        if hasattr(row, "tolist"):
            row = row.tolist()
        if isinstance(row, (str, bytes)) or not hasattr(row, "__iter__"):
            raise TypeError(f"rows[{i}]: expected a sequence of token ids, or None for all; got {checks.describe(row)}")
        yield [checks.whole(f"rows[{i}]", x, "a token id") for x in row]


def _check(ids: Tensor, offsets: Tensor) -> None:
    """Refuses ids and offsets of no ragged array. Reads them."""
    offsets = offsets.long()
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != ids.numel() or bool((offsets.diff() < 0).any()):
        down = (offsets.diff() < 0).nonzero()[:1, 0].tolist()
        got = f"a smaller one after row {down[0]}" if down else f"{first} first and {last} last"
        raise ValueError(
            f"offsets: expected numbers from 0 to {ids.numel()}, the number of token_ids, none smaller than the one "
            f"before; got {got}"
        )
    wide = ids.long()
    bad = ((wide < 0) | (wide > HIGHEST_ID)).nonzero()[:1, 0].tolist()
    row_of = torch.arange(offsets.numel() - 1, device=ids.device).repeat_interleave(offsets.diff())
    if bad:
        raise ValueError(
            f"token_ids: expected ids from 0 to 2**31 - 1; got {int(wide[bad[0]])} in row {int(row_of[bad[0]])}"
        )
    ordered, _ = (row_of * (HIGHEST_ID + 1) + wide).sort()
    twice = (ordered[1:] == ordered[:-1]).nonzero()[:1, 0].tolist()
    if twice:
        row, token = divmod(int(ordered[twice[0]]), HIGHEST_ID + 1)
        raise ValueError(f"token_ids: expected each id once in a row; got id {token} twice in row {row}")
