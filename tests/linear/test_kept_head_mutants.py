"""Faults in the sparse head: the suite's checks must reject each mutant, and accept the code without a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import LINEAR
from linear import check_same, from_hidden, from_logits, problem, with_low_rank
from modes import DEFAULT_MODE
from test_linear_mutants import LENGTHS, wrap
from torch import Tensor

from gspo_kernels.linear import kept_rows, sparse_head, torch_sparse
from gspo_kernels.linear.kept_rows import KeptRows
from gspo_kernels.linear.types import Entries

pytestmark = DEFAULT_MODE

Patch = pytest.MonkeyPatch


def check(rank: int | None = None) -> None:
    """As `test_kept_head.py` does."""
    p = problem("ppo", seed=92, lengths=LENGTHS, bias=rank is None, kept=True)
    function = LINEAR["ppo"] if rank is None else with_low_rank(LINEAR["ppo"], rank)
    found = from_hidden(p, "packed", "ppo", rows=3, function=function)
    check_same(found, from_logits(p, "packed", "ppo"), p)
    assert p.batch.kept is not None
    without = sum(ids is None and bool(m) for ids, m in zip(p.batch.kept, p.batch.mask, strict=True))
    assert int(found.stats.head.forward_rows) == without > 0


def product(patch: Patch, name: str, change: Callable[..., Any]) -> None:
    """`change(original, *arguments)` replaces a product of every backend."""
    original = getattr(torch_sparse, name)
    changed = {**vars(torch_sparse), name: lambda *given: change(original, *given)}
    patch.setattr(sparse_head, "sparse_products", lambda backend, *operands: SimpleNamespace(**changed))


def entries(patch: Patch, change: Callable[[Entries], Entries]) -> None:
    wrap(patch, sparse_head, "entries_of", lambda original, *given: change(original(*given)))


def rows_off_by_one(patch: Patch) -> None:
    entries(patch, lambda e: e._replace(rows=(e.rows - 1).clamp(min=0)))


def ids_off_by_one(patch: Patch) -> None:
    """Each entry has the column of the next one."""
    entries(patch, lambda e: e._replace(ids=e.ids.roll(-1)))


def no_gradient_of_the_last_entry(patch: Patch) -> None:
    def change(original: Any, gradient: Tensor, *rest: Any) -> None:
        last = rest[1].offsets[1:].clamp(min=1) - 1
        original(gradient.index_fill(0, last, 0.0), *rest)

    product(patch, "hidden_gradient", change)


def gradient_of_the_column_beside(patch: Patch) -> None:
    def change(original: Any, *given: Any) -> None:
        *others, destination, dtype, out = given
        original(*others, (destination + 1) % len(out), dtype, out)

    product(patch, "weight_gradient", change)


def a_column_has_its_last_entry_alone(patch: Patch) -> None:
    def change(original: Any, gradient: Tensor, hidden: Tensor, e: Entries, order: Tensor, *rest: Any) -> None:
        ids = e.ids[order]
        last = torch.cat([ids[1:] != ids[:-1], ids.new_ones(1, dtype=torch.bool)])
        original(gradient * torch.zeros_like(gradient).index_fill(0, order[last], 1.0), hidden, e, order, *rest)

    product(patch, "weight_gradient", change)


def weight_gradient_outside_of_the_sets(patch: Patch) -> None:
    def change(original: Any, *given: Any) -> None:
        original(*given)
        given[-1].add_(1e-6)

    product(patch, "weight_gradient", change)


def logits_in_bf16(patch: Patch) -> None:
    def change(original: Any, *given: Any) -> None:
        original(*given)
        given[-2].copy_(given[-2].bfloat16())

    product(patch, "kept_logits", change)


def low_rank_term_alone(patch: Patch) -> None:
    product(patch, "kept_logits", lambda original, *given: original(*given[:-1], False))


def bias_of_the_next_column(patch: Patch) -> None:
    wrap(patch, sparse_head, "matrices", lambda original, a: original(replace(a, bias=a.bias.roll(1))))


def rows_without_entries_forgotten(patch: Patch) -> None:
    def kept_and_full(original: Any, self: KeptRows, full: Any) -> Any:
        return self.kept_alone(), original(self, full)[1]

    wrap(patch, KeptRows, "kept_and_full", kept_and_full)


def gradients_of_the_full_head_alone(patch: Patch) -> None:
    def change(original: Any, arguments: Any, kept: Any, needs_grad: Any, gradient: Tensor, *rest: Any) -> Any:
        return original(arguments, kept, needs_grad, torch.zeros_like(gradient), *rest)

    wrap(patch, sparse_head, "write_gradients", change)


def rows_with_entries_in_the_full_head(patch: Patch) -> None:
    """The same numbers by more work."""
    patch.setattr(KeptRows, "without_entries", lambda self: self.arrays.mask)


def rows_without_entries_taken_for_some(patch: Patch) -> None:
    patch.setattr(kept_rows, "kept_form", lambda kept, mask: "every")


MUTANTS: dict[Callable[[Patch], None], dict[str, Any]] = {
    rows_off_by_one: {},
    ids_off_by_one: {},
    no_gradient_of_the_last_entry: {},
    gradient_of_the_column_beside: {},
    a_column_has_its_last_entry_alone: {},
    weight_gradient_outside_of_the_sets: {},
    logits_in_bf16: {},
    low_rank_term_alone: {"rank": 4},
    bias_of_the_next_column: {},
    rows_without_entries_forgotten: {},
    gradients_of_the_full_head_alone: {},
    rows_with_entries_in_the_full_head: {},
    rows_without_entries_taken_for_some: {},
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_is_rejected_and_the_code_without_a_fault_is_not(
    mutant: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    check(**MUTANTS[mutant])
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check(**MUTANTS[mutant])
