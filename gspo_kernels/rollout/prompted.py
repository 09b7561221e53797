"""Prompts and responses as one packed batch: what a causal model reads, and what the losses take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import checks
from ..rows.kept import KeptTokens
from .weight_versions import WeightVersions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


Batch = TypeVar("Batch", bound="DataclassInstance")


def moved(batch: Batch, device: Any) -> Batch:
    """All of its fields that have a device on this one."""
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    return replace(batch, **{name: value.to(device) for name, value in values.items() if hasattr(value, "to")})


@dataclass(frozen=True, eq=False)  # equal to itself alone: tensors have no truth value
class PromptedRollouts:
    """Each prompt followed by its response, packed: row t of a causal model's logits predicts `token_ids[t]`.

    `batch[chosen]` are the chosen responses: a slice, or int64 indices or a bool mask of [S], as for `advantages`:
    tensors, lists or numpy arrays.
    """

    input_ids: Tensor  # [P + N] int64, for the model: each prompt, then its response
    position_ids: Tensor  # [P + N] int64, for the model: 0, 1, ... from the start of each prompt
    token_ids: Tensor  # [P + N] int64, `input_ids` rolled left by one; the last row of a sequence is masked
    old_logprobs: Tensor  # [P + N] float32, NaN where the mask is False
    mask: Tensor  # [P + N] bool, True where a token of a response is predicted
    cu_seqlens: Tensor  # [S + 1] int64
    kept: KeptTokens | None = None  # of [P + N] rows, for `kept=`: row t keeps what `token_ids[t]` was drawn from
    weight_versions: WeightVersions | None = None  # of [P + N] rows: row t has what sampled `token_ids[t]`
    routed_experts: Tensor | None = None  # int16 [P + N, layers, k], of the router for `input_ids[t]`; -1: not returned

    def __len__(self) -> int:
        """The number of responses, S."""
        return self.cu_seqlens.numel() - 1

    def to(self, device: Any) -> PromptedRollouts:
        """On another device."""
        return moved(self, device)

    def __getitem__(self, chosen: Any) -> PromptedRollouts:
        device = self.cu_seqlens.device
        responses = self._responses(chosen)
        lengths = self.cu_seqlens.diff()[responses]
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        moved = (self.cu_seqlens[responses] - cu_seqlens[:-1]).repeat_interleave(lengths)
        rows = torch.arange(moved.numel(), device=device) + moved
        versions, experts = self.weight_versions, self.routed_experts
        return PromptedRollouts(
            self.input_ids[rows],
            self.position_ids[rows],
            self.token_ids[rows],
            self.old_logprobs[rows],
            self.mask[rows],
            cu_seqlens,
            None if self.kept is None else self.kept[rows],
            None if versions is None else WeightVersions(versions.labels, versions.of_tokens[rows]),
            None if experts is None else experts[rows],
        )

    def _responses(self, chosen: Any) -> Tensor:
        """The indices of the chosen responses, from 0."""
        count, device = len(self), self.cu_seqlens.device
        if isinstance(chosen, slice):
            return torch.tensor(range(count)[chosen], dtype=torch.int64, device=device)
        if isinstance(chosen, list) and not chosen:
            return torch.empty(0, dtype=torch.int64, device=device)
        if isinstance(chosen, list) or type(chosen).__module__ == "numpy":
            with suppress(TypeError, ValueError, RuntimeError):  # what is no array is refused below
                chosen = torch.as_tensor(chosen, device=device)
        if not isinstance(chosen, Tensor) or chosen.dtype not in (torch.bool, torch.int64, torch.int32):
            raise TypeError(
                "responses: expected a slice (batch[3:4] for one response), int64 indices or a bool mask; got "
                f"{checks.describe(chosen)}"
            )
        found: Tensor = chosen.to(device)
        if found.dtype == torch.bool:
            checks.shape("responses", found, (count,), "a mask over the responses")
            return found.nonzero()[:, 0]
        if found.ndim != 1:
            raise ValueError(f"responses: expected indices [chosen]; got shape {list(found.shape)}")
        if bool(((found < -count) | (found >= count)).any()):
            raise IndexError(f"responses: expected indices of the {count} responses; got {found.tolist()}")
        return found.long() % max(1, count)

    def mini_batches(
        self, count: int, *, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, PromptedRollouts]]:
        """`count` parts of consecutive responses (or of shuffled ones), and which responses each part has.

            for chosen, part in batch.mini_batches(4):
                loss, stats = gspo_loss(logits_of(part), part.token_ids, advantages[chosen], part.old_logprobs, ...)

        Sizes differ by at most one response. Fewer parts are returned where there are fewer responses than `count`.

        Args:
            count: of mini-batches; each is usually one optimizer step.
            shuffle: whether responses are drawn in random order, by `generator` (on the CPU), or torch's own.
        """
        count = checks.whole("count", count, "the number of mini-batches")
        if count < 1:
            raise ValueError(f"count: expected at least one mini-batch; got {count}")
        order = (
            torch.randperm(len(self), generator=generator, device="cpu")
            if shuffle
            else torch.arange(len(self), device="cpu")
        )
        for chosen in order.to(self.cu_seqlens.device).tensor_split(min(count, max(1, len(self)))):
            if chosen.numel():
                yield chosen, self[chosen]
