"""Losses from hidden states against the oracle: with the identity for a head, to the bounds of losses from logits."""

from __future__ import annotations

import itertools
from typing import Any

import modes
import oracle
import pytest
import torch
from batches import (
    FIELDS,
    KINDS,
    LAYOUTS,
    LENGTHS,
    LINEAR,
    OBJECTIVES,
    PACKAGE,
    SHORT,
    WITH_TOKENS,
    Batch,
    ragged_batch,
    run,
)
from checks import check_outcome
from linear import Identity
from modes import DTYPES, by_backend, by_combination, sized
from test_losses import OPTIONS

import gspo_kernels

# A chunk of one row; of three, where some sequences fit and some do not; and of everything.
CHUNKS = [1, 3, None]
by_chunk = pytest.mark.parametrize("rows", CHUNKS, ids=lambda rows: f"{rows} rows" if rows else "one chunk")

# Fields of an objective are no matter of the head, and nor are those that change a number per token alone.
NO_MATTER = {"k1", "k2", "weighted k1", "weighted k2", "weighted KL without beta", "sequence mean", "temperature"}
TERMS = [
    name
    for name, (_, options) in OPTIONS.items()
    if modes.WHOLE or (name not in NO_MATTER and not options.keys() & FIELDS - {"eps_low", "dual_clip"})
]
FEW = ["defaults", "on-policy", "all"]  # of the options, in the interpreter
ROWS = sized(LENGTHS, SHORT)  # a chunk of three is one sequence of the short ones
TWO = sized(KINDS, ["gspo", "ppo"])


def run_and_check(batch: Batch, layout: str, objective: str, rows: int | None, frozen: bool, **options: Any) -> None:
    """bf16 and fp16 may be rounded twice: as an operand of the products, and when the gradient is returned."""
    function = Identity(objective, rows, frozen)
    backend, upstream = options.pop("backend", None), options.pop("upstream", 1.0)
    outcome = run(batch, layout, objective, function=function, upstream=upstream, backend=backend, **options)
    check_outcome(outcome, batch, objective, upstream=upstream, roundings=2, **options)
    function.check_gradients(outcome, batch)


def points() -> list[Any]:
    """Every objective with every option and chunk; layouts and a frozen head go round, each pair of values met."""
    found = []
    for i, objective in enumerate(OBJECTIVES):
        for j, option in enumerate(sized(TERMS, FEW)):
            for k, rows in enumerate(CHUNKS):
                frozen, layout = bool((i + j + k) % 2), LAYOUTS[(i + j // 2 + (k > 0)) % 2]
                values = objective, option, rows, layout, frozen
                name = f"{objective}-{option}-{rows or 'all'} rows-{layout}-{'frozen' if frozen else 'trained'}"
                found.append(pytest.param(*values, id=name))
    return found


@pytest.mark.each_objective
@pytest.mark.parametrize(("objective", "option", "rows", "layout", "frozen"), points())
def test_against_the_oracle(objective: str, option: str, rows: int | None, layout: str, frozen: bool) -> None:
    build, options = OPTIONS[option]
    run_and_check(ragged_batch(objective, seed=1, lengths=ROWS, **build), layout, objective, rows, frozen, **options)


def test_the_points_hold_every_pair() -> None:
    """What goes round in step would leave holes."""
    taken = [point.values for point in points()]
    for a, b in itertools.combinations(range(5), 2):
        seen = {(point[a], point[b]) for point in taken}
        everything = set(itertools.product({point[a] for point in taken}, {point[b] for point in taken}))
        assert seen == everything, everything - seen


@pytest.mark.parametrize("objective", TWO)
@by_combination
@pytest.mark.parametrize(("option", "rows", "layout"), [("defaults", 3, "padded"), ("all", 1, "packed")])
def test_dtypes(objective: str, backend: str, dtype: torch.dtype, option: str, rows: int | None, layout: str) -> None:
    """bf16 and fp16 operands change how gradients are stored, and no statistic; float64 goes through in float64."""
    build, options = OPTIONS[option]
    batch = ragged_batch(objective, seed=2, lengths=ROWS, dtype=dtype, **build)
    run_and_check(batch, layout, objective, rows, False, backend=backend, upstream=-2.5, **options)


@pytest.mark.parametrize("objective", ["gspo", "ppo"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("scale", "on_policy"), [(2.0**14, False), (1 / 3, True)])
def test_a_scaled_loss(objective: str, dtype: torch.dtype, frozen: bool, scale: float, on_policy: bool) -> None:
    """Loss scaling is what makes fp16 training work: gradients are complete before the scale is known, and in fp32."""
    batch = ragged_batch(objective, seed=16, lengths=ROWS, vocab=sized(300, 61), dtype=dtype, on_policy=on_policy)
    run_and_check(batch, "packed", objective, 3, frozen, upstream=scale)


@pytest.mark.parametrize("objective", [name for name in TWO if name in WITH_TOKENS])
@by_chunk
@pytest.mark.parametrize(
    ("option", "layout"),
    [("defaults", "padded"), ("token mean", "packed"), ("dual clip", "packed"), ("on-policy", "padded"),
     ("all", "packed")],
)  # fmt: skip
def test_advantages_by_token(objective: str, rows: int | None, layout: str, option: str) -> None:
    build, options = OPTIONS[option]
    batch = ragged_batch(objective, seed=3, lengths=ROWS, by_token=True, **build)
    run_and_check(batch, layout, objective, rows, option == "dual clip", **options)


@pytest.mark.parametrize("objective", TWO)
@by_backend
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_large_odd_vocabulary(objective: str, backend: str, frozen: bool) -> None:
    """Several blocks of the row kernels, and a row's stride that is not its length."""
    batch = ragged_batch(objective, seed=4, vocab=sized(1031, 773), lengths=(3, 0, 2, 1, 2))
    run_and_check(batch, "packed", objective, 2, frozen, backend=backend)


def test_every_exported_linear_loss_has_an_oracle() -> None:
    """Every objective with a public loss from hidden states is tested from hidden states."""
    exported = {
        name.removesuffix("_loss").removeprefix("linear_")
        for name in gspo_kernels.__all__
        if name.endswith("_loss")
        and name.startswith("linear_")
        and name not in ("linear_policy_loss", "linear_value_loss")
    }
    assert exported <= set(PACKAGE) <= set(oracle.OBJECTIVES) == set(LINEAR)  # a named loss is optional
