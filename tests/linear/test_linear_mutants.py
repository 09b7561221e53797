"""Broken walks over the head: each must fail the checks that the suite makes, and the sound one must not.

A mutant replaces one method of the package by one with a single fault in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear import Separate, check_same, from_hidden, from_logits, problem
from modes import DEFAULT_MODE
from test_linear_plans import expected_work
from torch import Tensor

from gspo_kernels.linear import from_hidden as from_hidden_module
from gspo_kernels.linear import head, walk
from gspo_kernels.linear.head import Head
from gspo_kernels.linear.products import Products
from gspo_kernels.rows.types import Upstream

pytestmark = DEFAULT_MODE

Patch = pytest.MonkeyPatch
LENGTHS = (5, 1, 0, 7, 3, 1, 4, 2, 6, 3)  # with chunks of 3 rows: some fit together, some alone, some not


def check(frozen: bool = False, rows: int = 3, **setting: Any) -> None:
    """As `test_linear_logits.py` and `test_linear_plans.py` do: loss, stats, gradients, and the work."""
    build = {k: setting.pop(k) for k in ("temperature", "on_policy") if k in setting}
    p = problem("gspo", seed=110, bias=True, lengths=LENGTHS, **build)
    skip = setting.pop("skip", False)
    if skip:
        p.batch.advantages[0] = p.batch.advantages[4] = 0.0
    truth = from_logits(p, "packed", "gspo", **setting)
    given = {**setting, "skip_zero_advantage": True} if skip else setting
    wants = ["hidden"] if frozen else ["hidden", "weight", "bias"]
    found = from_hidden(p, "packed", "gspo", rows=rows, wants=wants, **given)
    check_same(found, truth, p, number=1.5e-5 if setting.get("entropy_coef") else 3e-6, stats=not skip)
    if not skip:
        work = tuple(int(x) for x in found.stats.head)
        assert work == expected_work(p, "gspo", rows, frozen, **setting), "the work"


def wrap(patch: Patch, where: Any, name: str, around: Callable[..., Any]) -> None:
    """`around(original, *arguments)` in the place of `where.name`."""
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
    def of(original: Any, self: Any, step: Any, stats: Any) -> Upstream:
        found: Upstream = original(self, step, stats)
        return found if found.logprobs is None else found._replace(logprobs=found.logprobs.roll(1))

    wrap(patch, walk.Coefficients, "of", of)


def coefficient_of_the_next_sequence(patch: Patch) -> None:
    def part(original: Any, self: Any, batch: Any, tokens: Any, sequences: slice) -> Any:
        found = original(self, batch, tokens, sequences)
        whole = self.advantages.roll(-1)[sequences]
        return replace(found, advantages=whole) if sequences != slice(None) else found

    wrap(patch, walk.TokenStage, "part", part)


def a_mean_over_the_chunk(patch: Patch) -> None:
    """The loss's normalizer is that of the batch."""

    def of(original: Any, self: Any, step: Any, stats: Any) -> Upstream:
        found: Upstream = original(self, step, stats)
        return found._replace(factor=torch.tensor(float(self._ends[-1]) / (step.stop - step.start)))

    wrap(patch, walk.Coefficients, "of", of)


def rows_not_compacted(patch: Patch) -> None:
    patch.setattr(Head, "_place", lambda self, order: self._places(self._span)[: len(order)])


def places_off_by_one(patch: Patch) -> None:
    def place(original: Any, self: Head, order: Tensor) -> Tensor:
        found: Tensor = (original(self, order) + 1) % len(self.asked.hidden)
        return found

    wrap(patch, Head, "_place", place)


def live_rows_off_by_one(patch: Patch) -> None:
    """Hidden states and their gradients, not the tokens that belong to them."""

    def places(original: Any, self: Head, span: Any) -> Tensor:
        found: Tensor = (original(self, span) - 1).clamp(min=0)
        return found

    wrap(patch, Head, "_places", places)


def masked_rows_taken(patch: Patch) -> None:
    wrap(patch, walk, "rows_asked", lambda original, arguments, mask: original(arguments, mask.logical_or(~mask)))


def head_gradient_replaced(patch: Patch) -> None:
    def product(
        original: Any, self: Products, gradient: Tensor, hidden: Tensor, out: Tensor, add: bool, *rest: float
    ) -> None:
        original(self, gradient, hidden, out, False, *rest)

    wrap(patch, Products, "weight_gradient", product)


def head_gradient_added_to_what_was_there(patch: Patch) -> None:
    """Fresh memory is NaN in this suite."""

    def product(
        original: Any, self: Products, gradient: Tensor, hidden: Tensor, out: Tensor, add: bool, *rest: float
    ) -> None:
        original(self, gradient, hidden, out, True, *rest)

    wrap(patch, Products, "weight_gradient", product)


def head_gradient_summed_in_bf16(patch: Patch) -> None:
    def product(
        original: Any, self: Products, gradient: Tensor, hidden: Tensor, out: Tensor, add: bool, *rest: float
    ) -> None:
        original(self, gradient, hidden, out, add, *rest)
        out.copy_(out.bfloat16())

    wrap(patch, Products, "weight_gradient", product)


def logits_rounded(patch: Patch) -> None:
    def logits(original: Any, self: Products, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        original(self, hidden, bias, out)
        out.copy_(out.bfloat16())

    wrap(patch, Products, "logits", logits)


def bias_lost(patch: Patch) -> None:
    wrap(patch, Products, "logits", lambda original, self, hidden, bias, out: original(self, hidden, None, out))


def bias_lost_the_second_time(patch: Patch) -> None:
    def load(original: Any, self: Head, span: Any, again: bool = False) -> None:
        kept = self._bias
        self._bias = None if again else kept
        original(self, span, again)
        self._bias = kept

    wrap(patch, Head, "load", load)


def bias_gradient_of_the_last_chunk(patch: Patch) -> None:
    def products(original: Any, self: Head) -> None:
        if self._pending is not None and self.wanted.bias:
            self._bias_gradient.zero_()
        original(self)

    wrap(patch, Head, "finish_products", products)


def other_rows_the_second_time(patch: Patch) -> None:
    def load(original: Any, self: Head, span: Any, again: bool = False) -> None:
        original(self, (span - 1).clamp(min=0) if again else span, again)
        self._span = span

    wrap(patch, Head, "load", load)


def temperature_of_other_rows(patch: Patch) -> None:
    def take_all(original: Any, self: Head, order: Tensor | None = None) -> Any:
        ids, mask, temperature = original(self, order)
        if order is not None and temperature.ndim:
            temperature = self._take(self.asked.temperature)[: len(order)]
        return ids, mask, temperature

    wrap(patch, Head, "_take_all", take_all)


def tokens_of_other_rows(patch: Patch) -> None:
    def take_all(original: Any, self: Head, order: Tensor | None = None) -> Any:
        ids, mask, temperature = original(self, order)
        return (ids if order is None else self._take(self.asked.token_ids)[: len(order)]), mask, temperature

    wrap(patch, Head, "_take_all", take_all)


def hidden_gradient_not_scaled(patch: Patch) -> None:
    patch.setattr(Head, "scale_hidden", lambda self, span, coefficients: None)


def pending_products_lost(patch: Patch) -> None:
    """Where gradients have memory of their own, the products of a chunk are left for the next one to start."""
    patch.setattr(walk, "Head", Separate)

    def load(original: Any, self: Head, span: Any, again: bool = False) -> None:
        self._pending = None
        original(self, span, again)

    wrap(patch, Head, "load", load)


def unscaled_with_an_entropy_bonus(patch: Patch) -> None:
    """A row's gradient is then no multiple of that of its log-probability."""
    wrap(
        patch,
        walk,
        "plan_of",
        lambda original, inputs, *rest: original(replace(inputs, entropy_coef=0.0), *rest),
    )


def sequences_cut(patch: Patch) -> None:
    wrap(patch, walk, "plan", lambda original, *given, **named: original(*given, **{**named, "together": "token"}))


def clipped_rows_multiplied(patch: Patch) -> None:
    """Zeros: only the work tells."""
    patch.setattr(Upstream, "some", lambda self: torch.ones_like(self.logprobs, dtype=torch.bool))


def fitting_sequences_computed_twice(patch: Patch) -> None:
    def twice(original: Any, *given: Any, **named: Any) -> Any:
        return [step._replace(way="two_phases") for step in original(*given, **named)]

    wrap(patch, walk, "plan", twice)


def skipped_sequences_not_counted(patch: Patch) -> None:
    wrap(
        patch, from_hidden_module, "_without_zero_advantage",
        lambda original, inputs: replace(original(inputs), normalizer=inputs.normalizer),
    )  # fmt: skip


def in_place_order_reversed(patch: Patch) -> None:
    """The rows are right, and some are read after they were written over."""
    patch.setattr(head, "_order_in_place", lambda active, count: active.nonzero()[:, 0].flip(0))


MUTANTS: dict[Callable[[Patch], None], dict[str, Any]] = {
    a_chunk_skipped: {},
    coefficient_of_the_next_row: {},
    coefficient_of_the_next_sequence: {},
    a_mean_over_the_chunk: {},
    rows_not_compacted: {"rows": 100},
    places_off_by_one: {},
    live_rows_off_by_one: {},
    masked_rows_taken: {},
    head_gradient_replaced: {},
    head_gradient_added_to_what_was_there: {},
    head_gradient_summed_in_bf16: {},
    logits_rounded: {},
    bias_lost: {},
    bias_lost_the_second_time: {},
    bias_gradient_of_the_last_chunk: {},
    other_rows_the_second_time: {},
    temperature_of_other_rows: {"temperature": "token", "rows": 100},
    tokens_of_other_rows: {"rows": 100},
    hidden_gradient_not_scaled: {"frozen": True},
    pending_products_lost: {},
    unscaled_with_an_entropy_bonus: {"frozen": True, "entropy_coef": 0.05},
    sequences_cut: {},
    clipped_rows_multiplied: {},
    fitting_sequences_computed_twice: {},
    skipped_sequences_not_counted: {"skip": True},
    in_place_order_reversed: {"rows": 100},
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_is_rejected_and_the_sound_walk_is_not(
    mutant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(**MUTANTS[mutant])
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check(**MUTANTS[mutant])
