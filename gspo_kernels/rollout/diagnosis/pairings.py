"""Which old log-probability belongs to which row of the logits: the ways in which they are paired wrongly.

Each way is a `Pairing`: what the arrays would have to look like if they were wrong in this way. Token arrays are flat,
[N]; a padded batch has a sequence in each row. Nothing here reads logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

FARTHEST = 8  # tokens by which old log-probabilities are shifted
SENTINEL, LOWEST = -9999.0, -1e30  # vLLM's server and SGLang write this, and less than that, for minus infinity
PROBES = 64  # responses whose values are looked for in all of `old`
WIDTH = 16  # tokens of a response that are looked for
SEARCHED = 1 << 31  # comparisons in such a search


@dataclass(frozen=True, eq=False)
class Batch:
    """The caller's arrays, flat."""

    old: Tensor  # [N] float64, NaN where there is none
    mask: Tensor  # [N] bool
    boundaries: Tensor  # [S + 1] int64
    width: int | None  # of a padded batch; None: packed

    @cached_property
    def begin(self) -> Tensor:
        """[N], where each token's sequence begins."""
        return self.boundaries[self.sequence_of]

    @cached_property
    def end(self) -> Tensor:
        return self.boundaries[self.sequence_of + 1]

    @cached_property
    def sequence_of(self) -> Tensor:
        lengths = self.boundaries.diff()
        return torch.arange(lengths.numel(), device=self.old.device).repeat_interleave(lengths)

    @cached_property
    def filled(self) -> Tensor:
        """[N] bool: where there is an old log-probability other than 0, which arrays are often filled with."""
        return self.old.isfinite() & (self.old != 0)

    def per_sequence(self, values: Tensor) -> Tensor:
        """[N] float64 -> [S], sums. In a fixed order, on any device."""
        sums = torch.nn.functional.pad(values.cumsum(0), (1, 0))
        return sums[self.boundaries[1:]] - sums[self.boundaries[:-1]]

    def sides(self) -> str:
        return "dims=0" if self.width is None else "dims=1"


class Pairing(NamedTuple):
    """Row t is compared with the token `token_ids[t + shift]` and the value `old[source[t]]`, where `counted`."""

    name: str
    text: str
    fix: str
    shift: int  # of token ids
    source: Tensor  # [N] int64, -1: none
    counted: Tensor  # [N] bool
    of_mask: bool = False  # other tokens are counted than the mask says

    def old_of(self, old: Tensor) -> Tensor:
        return torch.where(self.source >= 0, old[self.source.clamp(min=0)], torch.nan)


def pairings(batch: Batch, has_logits: bool) -> Iterator[Pairing]:
    """All but `as_given` and `other_tokens`, the likelier ones first."""
    yield from _shifts(batch, has_logits)
    yield from _masks(batch)
    yield from _starts(batch)


def as_given(batch: Batch) -> Pairing:
    here = torch.arange(batch.old.numel(), device=batch.old.device)
    return Pairing("as_given", "the arrays as they are", "", 0, here, batch.mask)


def _moved(batch: Batch, by: int) -> Tensor:
    """[N]: t + by, or -1 where that is in another sequence."""
    there = torch.arange(batch.old.numel(), device=batch.old.device) + by
    return torch.where((there >= batch.begin) & (there < batch.end), there, -1)


def _tokens(by: int) -> str:
    return f"{abs(by)} {'token' if abs(by) == 1 else 'tokens'} {'late' if by > 0 else 'early'}"


def _shifts(batch: Batch, has_logits: bool) -> Iterator[Pairing]:
    dims = batch.sides()
    given = as_given(batch)
    row = "row t of the logits predicts token_ids[t]"
    targets = "next_token_targets(input_ids, mask), or rollouts.with_prompts(), shift all of them together"

    def both(by: int) -> Tensor:
        there = _moved(batch, by)
        return batch.mask & (there >= 0) & batch.mask[there.clamp(min=0)]

    for by in (1, -1):
        yield Pairing(
            "old_logprobs_shifted",
            f"old_logprobs are {_tokens(by)}",
            f"old_logprobs = old_logprobs.roll({-by}, {dims})  # {row}, and old_logprobs[t] is that token's; {targets}",
            0, _moved(batch, by), both(by),
        )  # fmt: skip
    for by in (1, -1) if has_logits else ():
        yield Pairing(
            "token_ids_shifted",
            f"token_ids are {_tokens(by)}",
            f"token_ids = token_ids.roll({-by}, {dims})  # {row}; {targets}",
            by, given.source, both(by),
        )  # fmt: skip
        cut = "logits[:, :-1] with token_ids[:, 1:], old_logprobs[:, 1:] and mask[:, 1:]"
        yield Pairing(
            "logits_shifted",
            f"token_ids and old_logprobs are both {_tokens(by)}: row t of the logits predicts token_ids[t {by:+d}]",
            (f"{cut}, or roll all three by -1" if by > 0 else "do not shift token_ids and old_logprobs a second time")
            + f"  # {row}; {targets}",
            by, _moved(batch, by), both(by),
        )  # fmt: skip
    for by in [sign * n for n in range(2, FARTHEST + 1) for sign in (1, -1)]:
        yield Pairing(
            "old_logprobs_shifted",
            f"old_logprobs are {_tokens(by)}",
            f"old_logprobs = old_logprobs.roll({-by}, {dims})  # {row}, and old_logprobs[t] is that token's",
            0, _moved(batch, by), both(by),
        )  # fmt: skip


def _masks(batch: Batch) -> Iterator[Pairing]:
    source, mask, filled = as_given(batch).source, batch.mask, batch.filled
    dims = batch.sides()
    for by in (1, -1):
        there = _moved(batch, by)
        yield Pairing(
            "mask_shifted",
            f"the mask is {_tokens(by)}",
            f"mask = mask.roll({-by}, {dims})  # mask[t] is about token_ids[t], which row t predicts; "
            "next_token_targets(input_ids, mask) shifts both",
            0, source, (there >= 0) & mask[there.clamp(min=0)], True,
        )  # fmt: skip
    none = mask & ~filled
    if not bool(none.any()):
        return
    yield Pairing(
        "mask_too_wide",
        f"the mask includes tokens without an old log-probability (NaN, infinite or 0: {int(none.sum())} of "
        f"{int(mask.sum())}), such as a prompt's or padding",
        "mask = response_mask  # of sampled tokens alone: not attention_mask, not that of prompt and response",
        0, source, mask & filled, True,
    )  # fmt: skip


def other_tokens(batch: Batch) -> Iterator[Pairing]:
    """Masks that leave out what they should select. They do not say why the selected tokens differ: tried last."""
    source, mask = as_given(batch).source, batch.mask
    yield Pairing(
        "mask_inverted", "the mask is inverted", "mask = ~mask.bool()  # True where a token counts",
        0, source, ~mask, True,
    )  # fmt: skip
    yield Pairing(
        "mask_of_other_tokens",
        "the mask selects other tokens than those with an old log-probability: that of the prompt?",
        "pass the mask of the response, shifted as token_ids are: True where token_ids[t] was sampled",
        0, source, batch.filled & ~mask, True,
    )  # fmt: skip


def _starts(batch: Batch) -> Iterator[Pairing]:
    """A response's values are together, but begin elsewhere than its mask does."""
    mask, filled = batch.mask, batch.filled
    one = batch.mask.double()
    before = batch.mask.long().cumsum(0) - batch.mask.long()  # masked tokens before each, of the batch
    first = batch.boundaries[:-1]
    count = batch.per_sequence(one).long()
    of = batch.sequence_of
    start = torch.nn.functional.pad(batch.mask.long().cumsum(0), (1, 0))[first]
    rank = before - start[of]  # of each masked token among its sequence's
    here = torch.arange(mask.numel(), device=mask.device)
    lowest = here.new_full(first.shape, mask.numel()).scatter_reduce(
        0, of, here.masked_fill(~filled, mask.numel()), "amin"
    )
    highest = here.new_full(first.shape, -1).scatter_reduce(0, of, here.masked_fill(~filled, -1), "amax")
    edge = "column 0" if batch.width is not None else "their sequence's first row"
    last = "the last column" if batch.width is not None else "their sequence's last row"
    if batch.width is None:
        fix = (
            "aligned = torch.zeros_like(old_logprobs); aligned[mask] = values  # of the responses, one after the other"
        )
    else:
        fix = (
            "aligned = torch.zeros_like(old_logprobs); aligned[mask] = old_logprobs[there]  # there: bool [B, T], "
            "where a response's values are now"
        )
    ways = [
        ("old_logprobs_at_the_start", f"old_logprobs of each response begin at {edge}, its mask does not",
         first[of] + rank),
        ("old_logprobs_at_the_end", f"old_logprobs of each response end at {last}, its mask does not",
         (batch.boundaries[1:] - count)[of] + rank),
        ("old_logprobs_elsewhere", "old_logprobs of each response begin in another place than its mask",
         lowest[of] + rank),
        ("old_logprobs_elsewhere", "old_logprobs of each response end in another place than its mask",
         (highest + 1 - count)[of] + rank),
    ]  # fmt: skip
    for name, text, source in ways:
        inside = mask & (source >= batch.begin) & (source < batch.end)
        if bool((source != here)[inside].any()):
            text += ": padding is on the other side, or the prompt is missing in one of them"
            yield Pairing(name, text, fix, 0, torch.where(inside, source, -1), mask)
    if batch.width is None:
        text = "old_logprobs are those of the responses one after the other, without room for the prompts"
        yield Pairing("old_logprobs_without_prompts", text, fix, 0, torch.where(mask, before, -1), mask)


def permutation(batch: Batch, new: Tensor) -> Pairing | None:
    """Each response's values, looked for in all of `old`: whether they are those of another response.

    new: [N] float64, log-probabilities of the trainer.
    """
    spans = list(_spans(batch, new))
    size = batch.old.numel()
    if len(spans) < 2 or size < WIDTH or PROBES * size * WIDTH > SEARCHED:
        return None
    values = torch.nn.functional.pad(torch.where(batch.old.isfinite(), batch.old, 1e3), (0, WIDTH - 1), value=1e3)
    windows = values.unfold(0, WIDTH, 1)  # [N, WIDTH]
    source = torch.full_like(batch.mask, -1, dtype=torch.int64)
    counted = torch.zeros_like(batch.mask)
    order, found = list[tuple[int, int]](), 0
    of = batch.sequence_of
    for sequence, begin, last in spans:
        width = min(WIDTH, last - begin)
        piece = new[begin : begin + width]
        distance = (windows[:, :width] - piece).abs().clamp(max=5.0).mean(1)
        best = int(distance.argmin())
        if not bool(piece.isfinite().all()) or float(distance[best]) > 0.25 * float(piece.abs().mean()):
            continue
        found += 1
        order.append((sequence, int(of[best])))
        there = torch.arange(begin, last, device=new.device) + best - begin
        source[begin:last] = torch.where(there < size, there, -1)
        counted[begin:last] = batch.mask[begin:last]
    if found < 0.8 * len(spans) or all(a == b for a, b in order):
        return None
    some = ", ".join(f"{a} has those of {b}" for a, b in [pair for pair in order if pair[0] != pair[1]][:4])
    text = f"old_logprobs are in another order of responses: number {some}"
    fix = (
        "put old_logprobs in the order of the logits, by an index that travels with each response  # engines return "
        "responses as they finish, and a balanced batch is sorted by length"
    )
    return Pairing("responses_permuted", text, fix, 0, source, counted)


def _spans(batch: Batch, new: Tensor) -> Iterator[tuple[int, int, int]]:
    """(sequence, begin, end) of responses that have enough to be told from others."""
    bounds = batch.boundaries.tolist()
    probed = 0
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        rows = batch.mask[a:b].nonzero()[:, 0]
        if rows.numel() < 4 or int((new[a:b][rows] < -0.1).sum()) < 3:
            continue
        yield i, a + int(rows[0]), a + int(rows[-1]) + 1
        probed += 1
        if probed == PROBES:
            return
