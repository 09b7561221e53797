"""In which order and how often rows are multiplied by the head: the planner alone, then `stats.head` of losses."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from batches import CLASSES, LAYOUTS, OBJECTIVES
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import Problem, check_same, chunk_of, from_hidden, from_logits, problem, rows_of_work
from modes import DEFAULT_MODE, NOT_INTERPRETED, ON_GPU, on_device

import gspo_kernels
from gspo_kernels import linear_policy_loss, policy_loss
from gspo_kernels.linear import schedule
from gspo_kernels.linear.schedule import ChunkSize, chunk_size, even_parts, plan

some_lengths = st.lists(st.integers(0, 90), max_size=12)
some_most = st.one_of(st.integers(1, 20), st.integers(60, 200))


# --- the planner ------------------------------------------------------------------------------------------------------


@DEFAULT_MODE
@settings(deadline=None, max_examples=150)
@given(
    some_lengths,
    some_most,
    st.sampled_from([1.0, 0.67]),
    st.sampled_from(["token", "sequence", "batch"]),
    st.booleans(),
    st.booleans(),
)
def test_every_row_once_and_in_chunks(
    lengths: list[int], most: int, share: float, depends_on: str, gradient: bool, deferred_scale: bool
) -> None:
    """Of every plan: rows in order and once; a step fits into a chunk, or its mode says what is done instead; the
    sequences of a step are those that have a row in it; rows whose coefficients depend on each other share a step."""
    default_rows = max(1, int(share * most))
    size = ChunkSize(most, default_rows)
    steps = plan(lengths, size, depends_on=depends_on, gradient=gradient, deferred_scale=deferred_scale)
    assert [t for step in steps for t in range(step.start, step.stop)] == list(range(sum(lengths)))
    ends = list(itertools.accumulate(lengths, initial=0))
    too_long = "deferred_scale" if deferred_scale else "recompute"
    for step in steps:
        assert step.start < step.stop
        assert step.mode in (("single_pass", too_long) if gradient else ("statistics",))
        rows = step.stop - step.start
        assert rows <= most or step.mode == too_long
        touched = [i for i, (a, b) in enumerate(itertools.pairwise(ends)) if a < step.stop and b > step.start]
        inside = [i for i in touched if lengths[i]]
        assert (min(inside), max(inside) + 1) == (step.first, step.last), "the first and the last have rows in it"
        assert rows <= default_rows or depends_on == "batch" or len(inside) == 1, "more than that only for one sequence"
        if gradient and depends_on == "sequence":
            assert ends[step.first] == step.start and ends[step.last] == step.stop, "a sequence is cut"
            if step.mode == too_long:
                assert step.last - step.first == 1 + sum(n == 0 for n in lengths[step.first : step.last]), "one alone"
    if gradient and depends_on == "batch" and steps:
        assert len(steps) == 1 and (sum(lengths) <= most) == (steps[0].mode == "single_pass")
    if gradient and depends_on == "token":
        assert {step.mode for step in steps} <= {"single_pass"}


@DEFAULT_MODE
@settings(deadline=None, max_examples=150)
@given(st.integers(0, 50), st.integers(0, 700), some_most)
def test_parts_are_equal_and_few(start: int, length: int, most: int) -> None:
    found = list(even_parts(start, start + length, most))
    assert [t for a, b in found for t in range(a, b)] == list(range(start, start + length))
    sizes = [b - a for a, b in found]
    assert all(0 < size <= most for size in sizes)
    assert len(found) <= -(-length // most), "no more parts than needed"
    assert all(size == sizes[0] for size in sizes[:-1]) and (not sizes or sizes[-1] <= sizes[0])


@DEFAULT_MODE
def test_parts_on_a_gpu_fill_whole_products() -> None:
    size = chunk_size(None, 151_936, torch.bfloat16, "cuda", gradient=True)
    parts = [(0, 2048), (2048, 4096), (4096, 5000)]
    assert list(size.parts(0, 5000)) == parts, "equal parts of 1,667 rows would be padded to 2,048 each"
    assert [(s.start, s.stop) for s in plan([5000], size, depends_on="token")] == parts


@DEFAULT_MODE
def test_neighbours_share_a_chunk_as_long_as_they_fit() -> None:
    steps = plan([3, 4, 2, 9, 1, 0, 5], ChunkSize(8, 8), depends_on="sequence")
    assert [(s.mode, s.start, s.stop) for s in steps] == [
        ("single_pass", 0, 7), ("single_pass", 7, 9), ("recompute", 9, 18), ("single_pass", 18, 24),
    ]  # fmt: skip
    assert [(s.first, s.last) for s in steps] == [(0, 2), (2, 3), (3, 4), (4, 7)]
    steps = plan([3, 4, 2, 9, 1, 0, 5], ChunkSize(9, 6), depends_on="sequence")
    assert [(s.mode, s.start, s.stop) for s in steps] == [
        ("single_pass", 0, 3), ("single_pass", 3, 9), ("single_pass", 9, 18), ("single_pass", 18, 24),
    ]  # fmt: skip


@DEFAULT_MODE
@pytest.mark.parametrize(
    ("chunk_bytes", "vocab", "dtype", "device", "rows"),
    [
        (400, 100, torch.float32, "cpu", 1),
        (799, 100, torch.float32, "cpu", 1),
        (1023, 100, torch.float32, "cuda", 1),  # a row begins on a multiple of 64 columns there
        (1024, 100, torch.float32, "cuda", 2),
        (800, 100, torch.float64, "cpu", 1),
        (63 * 400, 100, torch.float32, "cpu", 63),
        (100 * 400, 100, torch.float32, "cpu", 64),  # from 64 on in multiples of it
        (129 * 400, 100, torch.float32, "cpu", 128),
        (1100 * 512, 100, torch.bfloat16, "cuda", 1024),  # from 512 on in multiples of it there
        (500 * 512, 100, torch.bfloat16, "cuda", 500),
        (None, 151_936, torch.bfloat16, "cuda", 2048),
        (None, 1 << 20, torch.bfloat16, "cuda", 512),  # never fewer rows than one product
        (None, 1 << 20, torch.float32, "cpu", 64),
        (None, 1 << 30, torch.float32, "cpu", 1),  # a row larger than the default
    ],
)
def test_chunk_size(chunk_bytes: int | None, vocab: int, dtype: torch.dtype, device: str, rows: int) -> None:
    for gradient in (False, True):
        assert chunk_size(chunk_bytes, vocab, dtype, device, gradient)[:2] == (rows, rows)


@DEFAULT_MODE
@pytest.mark.parametrize(("held", "rows"), [(1, (1, 1)), (2, (2, 1)), (8, (8, 5)), (100, (64, 42)), (770, (768, 512))])
def test_chunk_size_where_gradients_stay(held: int, rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of one chunk, half as wide as logits, fit beside the logits of the next."""
    monkeypatch.setattr(schedule, "gradients_are_half_width", lambda device, dtype: True)
    assert chunk_size(held * 400, 100, torch.bfloat16, "cpu", gradient=True)[:2] == rows
    assert chunk_size(held * 400, 100, torch.bfloat16, "cpu", gradient=False)[:2] == (rows[0], rows[0])


# --- what a loss did --------------------------------------------------------------------------------------------------


def expected_work(p: Problem, objective: str, most: int, frozen: bool, **options: Any) -> tuple[int, int, int, int]:
    """forward, recomputed, backward rows and chunks, from the oracle's coefficients and the rule said in words."""
    truth = p.batch.expected(objective, **options)
    selected = [[t for t in rows if p.batch.mask[t]] for rows in p.batch.sequences]
    active = {t for t, (g, h) in enumerate(zip(truth.d_logprobs, truth.d_entropy, strict=True)) if g or h}
    total = sum(map(len, selected))
    kind = CLASSES[objective]
    on_policy = p.batch.old_logprobs is None and not options.get("beta") and not options.get("entropy_coef")
    known = on_policy and (kind.known_on_policy or not kind.uses_logprobs)
    if known or kind.depends_on == "token":  # a row needs no other
        return total, 0, len(active), -(-total // most)
    again = backward = chunks = held = 0
    for rows in selected:
        some = [t for t in rows if t in active]
        if len(rows) <= most:
            backward += len(some)
            if held and held + len(rows) > most:
                chunks, held = chunks + 1, 0
            held += len(rows)
            continue
        chunks, held = chunks + (held > 0), 0
        chunks += -(-len(rows) // most)
        if frozen and not options.get("entropy_coef"):
            backward += len(rows)  # before anybody knows which of them clip
        else:
            again, backward, chunks = again + len(some), backward + len(some), chunks - (-len(some) // most)
    return total, again, backward, chunks + (held > 0)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "on-policy": ({"on_policy": True}, {}),
    "on-policy with a bonus": ({"on_policy": True}, {"entropy_coef": 0.01}),
    "entropy": ({}, {"entropy_coef": 0.01}),
    "KL": ({"ref": True}, {"beta": 0.1}),
}


@NOT_INTERPRETED
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_rows_are_multiplied_as_often_as_needed(objective: str, option: str, frozen: bool) -> None:
    """Exactly: unmasked rows forward, active rows backward. Recomputed are only active rows of a sequence longer than a
    chunk, if the head is trained or there is an entropy bonus."""
    build, options = OPTIONS[option]
    p = problem(objective, seed=60, **build)
    needs_grad = ["hidden"] if frozen else ["hidden", "weight"]
    for rows in (1, 3, 6, 100):
        for layout in LAYOUTS:
            found = rows_of_work(from_hidden(p, layout, objective, rows=rows, needs_grad=needs_grad, **options).stats)
            expected = expected_work(p, objective, rows, frozen, **options)
            if ON_GPU:  # gradient rows come in multiples there
                found, expected = (found[0], found[2] >= 1, found[3]), (expected[0], True, expected[3])  # type: ignore[assignment]
            assert found == expected, (rows, layout)


@NOT_INTERPRETED
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_gradient_there_is_one_product(objective: str) -> None:
    p = problem(objective, seed=61)
    selected = int(p.batch.mask.sum())
    for rows, chunks in ((1, selected), (selected, 1), (100, 1)):
        found = from_hidden(p, "packed", objective, rows=rows, needs_grad=())
        assert rows_of_work(found.stats) == (selected, 0, 0, chunks)


@NOT_INTERPRETED
def test_the_work_is_part_of_what_is_logged() -> None:
    p = problem("gspo", seed=62)
    named = from_hidden(p, "padded", "gspo", rows=3).stats.as_dict("train/")
    for name in ("forward_rows", "recomputed_rows", "backward_rows", "chunks"):
        assert named[f"train/head_{name}"].shape == () and not named[f"train/head_{name}"].requires_grad
    assert from_logits(p, "padded", "gspo").stats.head is None


MODES = {
    "single_pass": {"rows": 100},
    "recompute": {"rows": 3},
    "deferred_scale": {"rows": 3, "frozen": True},
    "statistics": {"rows": 3, "grad": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_explain_tells_the_plan(mode: str) -> None:
    """The word, the rows left out, and the chunk; of the first line the kernels."""
    setting: dict[str, Any] = MODES[mode]
    p = problem("gspo", seed=63, lengths=(5, 1, 6))
    p.batch.mask[1:5] = True
    hidden = on_device(p.hidden).requires_grad_(setting.get("grad", True))
    weight = on_device(p.weight).requires_grad_(not setting.get("frozen", False) and setting.get("grad", True))
    ends = torch.tensor([0, *itertools.accumulate(p.batch.lengths)])
    ids, advantages, old, mask, ends = (
        on_device(x) for x in (p.batch.token_ids, p.batch.advantages, p.batch.old_logprobs, p.batch.mask, ends)
    )  # type: ignore[arg-type]
    text = gspo_kernels.explain(
        hidden, weight, ids, advantages, old, mask=mask, cu_seqlens=ends, chunk_bytes=chunk_of(setting["rows"], 61)
    )
    out = len(mask) - int(mask.sum())
    assert f"\n{mode}: " in text and f"{out} of {len(mask)} rows are left out" in text, text
    assert "skip_zero_advantage" not in text
    assert "chunks of up to" in gspo_kernels.explain(hidden, weight)


@pytest.mark.parametrize(
    ("positional", "named", "message"),
    [
        (4, {}, "every other argument by its name, each once; got 1 more"),
        (3, {"token_ids": torch.zeros(2, 3)}, "each once; got token_ids"),
        (0, {"bias": torch.zeros(2)}, r"bias: expected shape \[7\] .*; got \[2\]"),
        (0, {"weight": torch.zeros(7, 3)}, r"weight: expected \[V, 4\], .*; got \[7, 3\]"),
        (2, {"hidden": torch.zeros(1, 3, 4)}, r"token_ids: expected shape \[1, 3\] .*; got \[2, 3\]"),
    ],
)
def test_explain_refuses_what_a_loss_refuses(positional: int, named: dict[str, Any], message: str) -> None:
    hidden, weight = (
        named.pop(name, torch.zeros(shape)) for name, shape in (("hidden", (2, 3, 4)), ("weight", (7, 4)))
    )
    ids, numbers, mask = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2), torch.ones(2, 3, dtype=torch.bool)
    given = (ids, numbers, torch.zeros(2, 3), mask)[:positional]
    with pytest.raises((TypeError, ValueError), match=message):
        gspo_kernels.explain(
            *(on_device(x) for x in (hidden, weight, *given)), **{n: on_device(x) for n, x in named.items()}
        )


# --- objectives of one's own ------------------------------------------------------------------------------------------


class OverMean(gspo_kernels.Objective):
    """Ratios over their mean in the batch, which is what an objective is taken for that does not say what it needs."""

    def terms(self, tokens: gspo_kernels.TokenBatch) -> gspo_kernels.Terms:
        layout = tokens.layout
        ratio = torch.exp(tokens.log_ratio.clamp(max=tokens.max_log_ratio))
        mean = layout.sum(ratio).sum() / layout.num_tokens.clamp(min=1)
        return gspo_kernels.Terms(loss=-ratio / mean * tokens.advantages, log_ratio=tokens.log_ratio)


class OfSequence(gspo_kernels.Objective):
    """Advantages against the sequence's own mean ratio: whole sequences."""

    depends_on: ClassVar[str] = "sequence"

    def terms(self, tokens: gspo_kernels.TokenBatch) -> gspo_kernels.Terms:
        layout = tokens.layout
        ratio = torch.exp(tokens.log_ratio.clamp(max=tokens.max_log_ratio))
        return gspo_kernels.Terms(
            loss=-(ratio - layout.spread(layout.mean(ratio))) * tokens.advantages, log_ratio=tokens.log_ratio
        )


@NOT_INTERPRETED
@pytest.mark.parametrize("objective", [OverMean(), OfSequence()], ids=["batch", "sequence"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_objective_of_ones_own(objective: gspo_kernels.Objective, frozen: bool, layout: str) -> None:
    """At any chunk the loss and the gradients of the whole batch; what fits is computed once."""
    p = problem("grpo", seed=64, lengths=(5, 1, 0, 4, 3))
    truth = from_logits(p, layout, "grpo", function=partial(policy_loss, objective=objective))
    selected = int(p.batch.mask.sum())
    for rows in (1, 3, selected - 1, selected):
        found = from_hidden(
            p, layout, "grpo", rows=rows, function=partial(linear_policy_loss, objective=objective),
            needs_grad=["hidden"] if frozen else ["hidden", "weight"],
        )  # fmt: skip
        check_same(found, truth, p)
        _, again, _, chunks = rows_of_work(found.stats)
        if rows == selected:
            assert (again, chunks) == (0, 1)
        elif objective.depends_on == "batch":
            assert (again > 0) == (not frozen)
