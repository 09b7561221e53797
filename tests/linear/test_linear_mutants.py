"""Faults in the hidden-state path: the suite's checks must reject each mutant, and accept the code without a fault.

A mutant replaces one function or method of the package by one with a single fault in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear import Separate, check_same, from_hidden, from_logits, problem
from modes import DEFAULT_MODE
from test_linear_plans import expected_work
from torch import Tensor

from gspo_kernels.linear import chunked_loss, head, operators
from gspo_kernels.linear import from_hidden as from_hidden_module
from gspo_kernels.linear.head import Head
from gspo_kernels.linear.products import Products
from gspo_kernels.linear.types import HeadArguments
from gspo_kernels.linear.weight_sums import WeightSums
from gspo_kernels.rows.types import Upstream

pytestmark = DEFAULT_MODE

Patch = pytest.MonkeyPatch
LENGTHS = (5, 1, 0, 7, 3, 1, 4, 2, 6, 3)  # with chunks of 3 rows: several fit, one fits, or none


def check(frozen: bool = False, rows: int = 3, **setting: Any) -> None:
    """As `test_linear_logits.py` and `test_linear_plans.py` do: loss, stats, gradients, and the work."""
    build = {k: setting.pop(k) for k in ("temperature", "on_policy") if k in setting}
    p = problem("gspo", seed=110, bias=True, lengths=LENGTHS, **build)
    skip = setting.pop("skip", False)
    if skip:
        p.batch.advantages[0] = p.batch.advantages[4] = 0.0
    truth = from_logits(p, "packed", "gspo", **setting)
    given = {**setting, "skip_zero_advantage": True} if skip else setting
    needs_grad = ["hidden"] if frozen else ["hidden", "weight", "bias"]
    found = from_hidden(p, "packed", "gspo", rows=rows, needs_grad=needs_grad, **given)
    check_same(found, truth, p, number=1.5e-5 if setting.get("entropy_coef") else 3e-6, stats=not skip)
    if not skip:
        work = tuple(int(x) for x in found.stats.head)
        assert work == expected_work(p, "gspo", rows, frozen, **setting), "the work"


def wrap(patch: Patch, where: Any, name: str, around: Callable[..., Any]) -> None:
    """`around(original, *arguments)` replaces `where.name`."""
    original = getattr(where, name)
    patch.setattr(where, name, lambda *given, **named: around(original, *given, **named))


def a_chunk_skipped(patch: Patch) -> None:
    calls = []

    def backward(original: Any, self: Head, stats: Any, upstream: Upstream) -> None:
        calls.append(1)
        if len(calls) != 3:
            original(self, stats, upstream)

    wrap(patch, Head, "backward", backward)


def coefficient_of_the_next_row(patch: Patch) -> None:
    def of_step(original: Any, self: Any, step: Any, stats: Any) -> Upstream:
        found: Upstream = original(self, step, stats)
        return found if found.logprobs is None else found._replace(logprobs=found.logprobs.roll(1))

    wrap(patch, chunked_loss.Coefficients, "of_step", of_step)


def coefficient_of_the_next_sequence(patch: Patch) -> None:
    def part(original: Any, self: Any, batch: Any, tokens: Any, sequences: slice) -> Any:
        found = original(self, batch, tokens, sequences)
        whole = self.advantages.roll(-1)[sequences]
        return replace(found, advantages=whole) if sequences != slice(None) else found

    wrap(patch, chunked_loss.TokenStage, "part", part)


def a_mean_over_the_chunk(patch: Patch) -> None:
    """The loss's normalizer is that of the batch."""

    def of_step(original: Any, self: Any, step: Any, stats: Any) -> Upstream:
        found: Upstream = original(self, step, stats)
        return found._replace(factor=torch.tensor(float(self._ends[-1]) / (step.stop - step.start)))

    wrap(patch, chunked_loss.Coefficients, "of_step", of_step)


def rows_not_compacted(patch: Patch) -> None:
    patch.setattr(Head, "_active_indices", lambda self, order: self._hidden_indices(self._range)[: len(order)])


def active_rows_off_by_one(patch: Patch) -> None:
    def indices(original: Any, self: Head, order: Tensor) -> Tensor:
        found: Tensor = (original(self, order) + 1) % len(self.rows.hidden)
        return found

    wrap(patch, Head, "_active_indices", indices)


def selected_rows_off_by_one(patch: Patch) -> None:
    """Hidden states and their gradients, not the tokens that belong to them."""

    def indices(original: Any, self: Head, rows: Any) -> Tensor:
        found: Tensor = (original(self, rows) - 1).clamp(min=0)
        return found

    wrap(patch, Head, "_hidden_indices", indices)


def masked_rows_selected(patch: Patch) -> None:
    def select(original: Any, arguments: HeadArguments) -> Any:
        assert arguments.mask is not None
        return original(replace(arguments, mask=torch.ones_like(arguments.mask)))

    wrap(patch, operators, "select_rows", select)


def head_gradient_replaced(patch: Patch) -> None:
    wrap(patch, WeightSums, "blocks", lambda original, self: ((*block[:2], False) for block in original(self)))


def head_gradient_added_to_what_was_there(patch: Patch) -> None:
    """Fresh memory is NaN in this suite."""
    wrap(patch, WeightSums, "blocks", lambda original, self: ((*block[:2], True) for block in original(self)))


def head_gradient_summed_in_bf16(patch: Patch) -> None:
    def blocks(original: Any, self: WeightSums) -> Iterator[tuple[slice, Tensor, bool]]:
        for columns, out, add in original(self):
            yield columns, out, add
            out.copy_(out.bfloat16())

    wrap(patch, WeightSums, "blocks", blocks)


def logits_rounded(patch: Patch) -> None:
    def logits(original: Any, self: Products, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        original(self, hidden, bias, out)
        out.copy_(out.bfloat16())

    wrap(patch, Products, "logits", logits)


def bias_lost(patch: Patch) -> None:
    wrap(patch, Products, "logits", lambda original, self, hidden, bias, out: original(self, hidden, None, out))


def bias_lost_when_recomputed(patch: Patch) -> None:
    def load(original: Any, self: Head, rows: Any, recompute: bool = False) -> None:
        bias = self._bias
        self._bias = None if recompute else bias
        original(self, rows, recompute)
        self._bias = bias

    wrap(patch, Head, "load", load)


def bias_gradient_of_the_last_chunk(patch: Patch) -> None:
    def products(original: Any, self: Head) -> None:
        if self._pending is not None and self.needs_grad.bias:
            self._bias_gradient.zero_()
        original(self)

    wrap(patch, Head, "finish_products", products)


def other_rows_recomputed(patch: Patch) -> None:
    def load(original: Any, self: Head, rows: Any, recompute: bool = False) -> None:
        original(self, (rows - 1).clamp(min=0) if recompute else rows, recompute)
        self._range = rows

    wrap(patch, Head, "load", load)


def temperature_of_other_rows(patch: Patch) -> None:
    def row_arrays(original: Any, self: Head, order: Tensor | None = None) -> Any:
        ids, mask, temperature = original(self, order)
        if order is not None and temperature.ndim:
            temperature = self._of_chunk(self.rows.temperature)[: len(order)]
        return ids, mask, temperature

    wrap(patch, Head, "_row_arrays", row_arrays)


def tokens_of_other_rows(patch: Patch) -> None:
    def row_arrays(original: Any, self: Head, order: Tensor | None = None) -> Any:
        ids, mask, temperature = original(self, order)
        return (ids if order is None else self._of_chunk(self.rows.token_ids)[: len(order)]), mask, temperature

    wrap(patch, Head, "_row_arrays", row_arrays)


def hidden_gradient_not_scaled(patch: Patch) -> None:
    patch.setattr(Head, "scale_hidden", lambda self, rows, coefficients: None)


def pending_products_lost(patch: Patch) -> None:
    """Where gradients have a buffer of their own, `load` of the next chunk runs the products of the last one."""
    patch.setattr(operators, "Head", Separate)

    def load(original: Any, self: Head, rows: Any, recompute: bool = False) -> None:
        self._pending = None
        original(self, rows, recompute)

    wrap(patch, Head, "load", load)


def scale_deferred_with_an_entropy_bonus(patch: Patch) -> None:
    """A row's gradient is then no multiple of the gradient of its log-probability."""
    wrap(
        patch,
        chunked_loss,
        "plan_for",
        lambda original, inputs, *rest: original(inputs._replace(entropy_coef=0.0), *rest),
    )


def sequences_cut(patch: Patch) -> None:
    def plan(original: Any, *given: Any, **named: Any) -> Any:
        return original(*given, **{**named, "depends_on": "token"})

    wrap(patch, chunked_loss, "plan", plan)


def clipped_rows_multiplied(patch: Patch) -> None:
    """By zeros: only the count of work changes."""
    patch.setattr(Upstream, "some", lambda self: torch.ones_like(self.logprobs, dtype=torch.bool))


def fitting_sequences_computed_twice(patch: Patch) -> None:
    def twice(original: Any, *given: Any, **named: Any) -> Any:
        return [step._replace(mode="recompute") for step in original(*given, **named)]

    wrap(patch, chunked_loss, "plan", twice)


def skipped_sequences_not_counted(patch: Patch) -> None:
    wrap(
        patch, from_hidden_module, "without_zero_advantage",
        lambda original, inputs: original(inputs)._replace(normalizer=inputs.normalizer),
    )  # fmt: skip


def in_place_order_reversed(patch: Patch) -> None:
    """The rows are right, but some are read after they were overwritten."""
    patch.setattr(head, "order_in_place", lambda active, count: active.nonzero()[:, 0].flip(0))


MUTANTS: dict[Callable[[Patch], None], dict[str, Any]] = {
    a_chunk_skipped: {},
    coefficient_of_the_next_row: {},
    coefficient_of_the_next_sequence: {},
    a_mean_over_the_chunk: {},
    rows_not_compacted: {"rows": 100},
    active_rows_off_by_one: {},
    selected_rows_off_by_one: {},
    masked_rows_selected: {},
    head_gradient_replaced: {},
    head_gradient_added_to_what_was_there: {},
    head_gradient_summed_in_bf16: {},
    logits_rounded: {},
    bias_lost: {},
    bias_lost_when_recomputed: {},
    bias_gradient_of_the_last_chunk: {},
    other_rows_recomputed: {},
    temperature_of_other_rows: {"temperature": "token", "rows": 100},
    tokens_of_other_rows: {"rows": 100},
    hidden_gradient_not_scaled: {"frozen": True},
    pending_products_lost: {},
    scale_deferred_with_an_entropy_bonus: {"frozen": True, "entropy_coef": 0.05},
    sequences_cut: {},
    clipped_rows_multiplied: {},
    fitting_sequences_computed_twice: {},
    skipped_sequences_not_counted: {"skip": True},
    in_place_order_reversed: {"rows": 100},
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_is_rejected_and_the_code_without_a_fault_is_not(
    mutant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(**MUTANTS[mutant])
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check(**MUTANTS[mutant])
