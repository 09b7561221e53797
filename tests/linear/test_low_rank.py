"""`low_rank=(u, B)`: LoRA on the head. The truth is a head as wide as both together, whose logits exist.

The last columns of hidden states and of the head are passed as u and B (`with_low_rank`), so every check of losses from
hidden states applies as it is.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from batches import LAYOUTS, LINEAR, arguments
from checks import check_close
from linear import (
    Problem,
    Separate,
    check_same,
    chunk_of,
    from_hidden,
    from_logits,
    logits_of,
    problem,
    unmasked,
    with_low_rank,
    without_synchronization,
)
from modes import DEFAULT_MODE, NOT_INTERPRETED, on_device
from test_errors import check_message
from test_linear_buffers import NarrowProducts
from tolerances import TOLERANCES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gspo_kernels
from gspo_kernels import GSPO, linear_gspo_loss, linear_logits, linear_token_logprobs, token_logprobs
from gspo_kernels.base.layout import batch_shape
from gspo_kernels.linear import chunked_loss, head, head_term, operators, schedule
from gspo_kernels.linear.gradient_rows import ActiveCount
from gspo_kernels.linear.head import Head
from gspo_kernels.linear.head_term import HeadTerm
from gspo_kernels.linear.operators import linear_loss_operator
from gspo_kernels.linear.products import Products
from gspo_kernels.linear.types import HeadArguments, NeedsGrad, Operands
from gspo_kernels.losses.token_stage import token_inputs
from gspo_kernels.rows.arguments import row_arrays

RANK, WIDTH, VOCAB = 5, 24, 61
LENGTHS = (5, 1, 0, 7, 3)  # with chunks of 3 rows: several sequences fit, one, or none
PARTS = ("hidden", "weight", "u", "B")

pytestmark = NOT_INTERPRETED  # no kernel of rows takes part in it
in_default_mode = DEFAULT_MODE
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def given(objective: str = "gspo", **build: Any) -> Problem:
    return problem(objective, **{"seed": 121, "width": WIDTH + RANK, "lengths": LENGTHS, **build})


def loss_of(objective: str, frozen: tuple[str, ...] = ()) -> Callable[..., Any]:
    return with_low_rank(LINEAR[objective], RANK, frozen)


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["gspo", "grpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@by_layout
def test_the_loss_and_all_gradients(objective: str, dtype: torch.dtype, layout: str) -> None:
    """Masked rows are NaN in u too. In one chunk, and in chunks that longer sequences do not fit into."""
    p = given(objective, bias=True, dtype=dtype)
    truth = from_logits(p, layout, objective)
    for rows in (None, 3):
        found = from_hidden(p, layout, objective, rows=rows, function=loss_of(objective))
        check_same(found, truth, p, number=3e-6 if dtype == torch.float32 else 2 * TOLERANCES[dtype].store, stats=False)
        check_same(replace(found, hidden=None, weight=None, bias=None), truth, p)


def test_float64() -> None:
    p = given("gspo", bias=True, dtype=torch.float64)
    truth = from_logits(p, "packed", "gspo")
    found = from_hidden(p, "packed", "gspo", rows=3, function=partial(loss_of("gspo"), backend="reference"))
    check_same(found, truth, p, number=1e-12, stats=False)


@in_default_mode
@pytest.mark.parametrize("options", [{"softcap": 4.0, "logit_scale": 1.5}, {"entropy_coef": 0.05}], ids=str)
def test_with_other_options(options: dict[str, Any]) -> None:
    p = given(bias=True, temperature="token")
    truth = from_logits(p, "packed", "gspo", **options)
    for frozen in ((), ("weight", "B")):
        needs_grad = ["hidden"] if frozen else ["hidden", "weight", "bias"]
        function = loss_of("gspo", frozen)
        found = from_hidden(p, "packed", "gspo", rows=3, function=function, needs_grad=needs_grad, **options)
        check_same(found, truth, p, number=1.5e-5)


@in_default_mode
def test_every_set_of_frozen_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is frozen costs no product; the others have the same gradients."""
    multiplied: set[str] = set()

    def recording(name: str) -> None:
        original = getattr(Products, name)

        def product(self: Products, *rest: Any) -> Any:
            multiplied.add({WIDTH: "head", RANK: "low rank"}[self.weight.shape[1]] + " " + name)
            return original(self, *rest)

        monkeypatch.setattr(Products, name, product)

    recording("hidden_gradient")
    recording("weight_gradient")
    p = given(bias=True)
    truth = from_logits(p, "packed", "gspo")
    names = {
        "hidden": "head hidden_gradient", "weight": "head weight_gradient",
        "u": "low rank hidden_gradient", "B": "low rank weight_gradient",
    }  # fmt: skip
    subsets = itertools.chain(*(itertools.combinations(PARTS, count) for count in range(len(PARTS) + 1)))
    for i, frozen in enumerate(subsets):
        multiplied.clear()
        needs_grad = ["hidden", "weight", *["bias"] * (i % 2)]
        function = loss_of("gspo", frozen)
        found = from_hidden(p, "packed", "gspo", rows=3, function=function, needs_grad=needs_grad)
        assert multiplied == {names[part] for part in PARTS if part not in frozen}
        check_parts(found, truth, p, frozen)
        assert (found.bias is not None) == ("bias" in needs_grad)


def check_parts(found: Any, truth: Any, p: Problem, frozen: tuple[str, ...]) -> None:
    """Frozen columns have no gradient; with the expected one in its place, the whole is as without `frozen`."""
    for name, columns in (("hidden", ("hidden", "u")), ("weight", ("weight", "B"))):
        gradient = getattr(found, name)
        if set(columns) <= set(frozen):
            assert gradient is None
            continue
        for part, which in zip(columns, (slice(0, WIDTH), slice(WIDTH, None)), strict=True):
            if part in frozen:
                assert not bool(gradient[:, which].any())
                gradient[:, which] = getattr(truth, name)[:, which]
    check_same(found, truth, p)


@in_default_mode
def test_the_plan() -> None:
    """LoRA's usual case, a frozen head and a trained B: its gradient is a sum over rows, so no scale is deferred."""
    p = unmasked(given())
    for frozen, mode in (
        (("weight",), "recompute"), (("weight", "B"), "deferred_scale"), (("hidden", "weight", "B"), "deferred_scale"),
        (("hidden", "weight", "u", "B"), "statistics"),
    ):  # fmt: skip
        args = arguments(p.batch, "packed")
        hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        explain = with_low_rank(gspo_kernels.explain, RANK, frozen)
        said = explain(hidden, weight, *args.rest, **args.keywords, chunk_bytes=chunk_of(3, VOCAB))
        assert f"\n{mode}: " in said and f"a low-rank term of {RANK} columns" in said, said
        function = loss_of("gspo", frozen)
        work = from_hidden(p, "packed", "gspo", rows=3, function=function, eps_low=0.9, eps_high=9.0).stats.head
        assert (float(work.recomputed_rows) > 0) == (mode == "recompute")


@in_default_mode
def test_float32_adapters_of_a_bf16_head_are_not_rounded() -> None:
    """B moves by less than a step of bf16 between optimizer steps; under autocast, too."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator).bfloat16() for n in (9, VOCAB))
    u, b = (torch.randn(n, RANK, generator=generator) for n in (9, VOCAB))
    ids = torch.arange(9)
    exact = logits_of(hidden, weight, None) + u.double() @ b.double().t()
    expected = exact.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = linear_token_logprobs(hidden, weight, ids, low_rank=(u, b)).logprobs
        check_close("logprobs", found, expected, 3e-6 * (1 + expected.abs()))


@in_default_mode
def test_gradients_have_the_dtypes_of_their_operands_under_autocast() -> None:
    p = given(bias=True, dtype=torch.bfloat16)
    assert p.bias is not None
    p = replace(p, hidden=p.hidden.float(), weight=p.weight.float(), bias=p.bias.float())
    truth = from_logits(p, "packed", "gspo")
    with torch.autocast("cpu", torch.bfloat16):
        found = from_hidden(p, "packed", "gspo", rows=3, function=loss_of("gspo"))
    assert found.hidden is not None and found.hidden.dtype == torch.float32
    assert found.weight is not None and found.weight.dtype == torch.float32
    check_same(found, truth, p, number=2 * TOLERANCES[torch.bfloat16].store)


@pytest.mark.parametrize("on_policy", [True, False])
def test_nan_in_u(on_policy: bool) -> None:
    """Of one row: the gradients of u and hidden states are NaN in its whole sequence, and in no other."""
    p = given(on_policy=on_policy)
    (of_sequence,) = [list(rows) for rows in p.batch.sequences if len(rows) == 7]
    row = next(t for t in of_sequence if p.batch.mask[t])
    p.hidden[row, -1] = math.nan
    options = {} if on_policy else {"eps_low": 0.9, "eps_high": 9.0}
    found = from_hidden(
        p, "packed", "gspo", rows=3, function=loss_of("gspo", ("weight", "B")), needs_grad=["hidden"], **options
    )
    nan = torch.zeros(len(p.hidden), dtype=torch.bool)
    nan[of_sequence] = p.batch.mask[of_sequence]
    assert found.hidden is not None and torch.equal(found.hidden.isnan(), nan[:, None].expand_as(found.hidden))


@by_layout
def test_padding_rows_of_the_vocabulary(layout: str) -> None:
    """Rows of B from `vocab_size` on are NaN, and have a gradient of 0."""
    p = given()
    plain = from_hidden(p, layout, "gspo", rows=3, function=loss_of("gspo"))
    wide = replace(p, weight=torch.cat([p.weight, torch.full((4, WIDTH + RANK), math.nan)]))
    found = from_hidden(wide, layout, "gspo", rows=3, function=loss_of("gspo"), vocab_size=VOCAB)
    assert torch.equal(found.loss, plain.loss) and found.weight is not None and plain.weight is not None
    assert bool((found.weight[VOCAB:] == 0).all()) and torch.equal(found.weight[:VOCAB], plain.weight)


def test_token_logprobs_and_logits() -> None:
    """The same bits; and the gradient of all three statistics."""
    p = given(bias=True)
    kept = p.hidden[p.batch.mask]
    hidden, weight, bias = (on_device(x).clone().requires_grad_() for x in (kept, p.weight, p.bias))  # type: ignore[union-attr]
    ids = on_device(p.batch.token_ids[p.batch.mask])
    found = with_low_rank(partial(linear_token_logprobs, bias=bias, chunk_bytes=chunk_of(3, VOCAB)), RANK)(
        hidden, weight, ids
    )
    logits = with_low_rank(partial(linear_logits, bias=bias), RANK)(hidden, weight)
    for x, y in zip(found, token_logprobs(logits, ids), strict=True):
        assert torch.equal(x, y)
    (found.logprobs + 2 * found.entropy - 0.5 * found.lse).sum().backward()
    wide = [x.detach().cpu().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = token_logprobs(wide[0] @ wide[1].t() + wide[2], ids.cpu(), backend="reference")
    (expected.logprobs + 2 * expected.entropy - 0.5 * expected.lse).sum().backward()
    for x, y in zip((hidden, weight, bias), wide, strict=True):
        assert x.grad is not None and y.grad is not None
        check_close("gradient", x.grad.cpu(), y.grad, torch.full_like(y.grad, 1e-5 * float(y.grad.abs().max())))


@in_default_mode
def test_compiled() -> None:
    """Without a graph break; test_linear_operators.py has the fakes, which other backends need."""
    torch._dynamo.reset()
    p = given(bias=True)
    eager = from_hidden(p, "packed", "gspo", rows=3, function=loss_of("gspo"))
    compiled = torch.compile(loss_of("gspo"), fullgraph=True, backend="eager")
    found = from_hidden(p, "packed", "gspo", rows=3, function=compiled)
    assert torch.equal(found.loss, eager.loss)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(getattr(found, name), getattr(eager, name), rtol=1e-5, atol=1e-7)
    torch._dynamo.reset()


# --- as on a GPU ------------------------------------------------------------------------------------------------------


@in_default_mode
@pytest.mark.parametrize(
    ("dtype", "separate"),
    [(torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False)],
    ids=["bf16", "fp16", "bf16, in place"],
)
def test_gradients_of_logits_that_are_narrow(
    dtype: torch.dtype, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 beside float32 logits, and in fp16 times a power of two."""
    p = given(bias=True, dtype=dtype)
    truth = from_logits(p, "packed", "gspo")
    for module in (head, head_term):
        monkeypatch.setattr(module, "products", NarrowProducts)
    if separate:
        monkeypatch.setattr(operators, "Head", Separate)
    else:
        monkeypatch.setattr(schedule, "gradients_are_half_width", lambda device, dtype: True)
    for rows in (3, 6, None):
        found = from_hidden(p, "packed", "gspo", rows=rows, function=partial(loss_of("gspo"), backend="reference"))
        check_same(found, truth, p, number=2 * TOLERANCES[dtype].store)


@in_default_mode
@by_layout
def test_where_the_host_may_not_wait(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph masked and inactive rows are multiplied too; their u is NaN here, and 0 times NaN is NaN."""
    p = given(bias=True)
    truth = from_logits(p, layout, "gspo")
    monkeypatch.setattr(operators, "Head", Separate)
    without_synchronization(monkeypatch)
    monkeypatch.setattr(ActiveCount, "wait", lambda self: (self._rows, 0))
    for rows in (3, None):
        check_same(from_hidden(p, layout, "gspo", rows=rows, function=loss_of("gspo")), truth, p)


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most bytes of any memory that an operator of torch makes or writes, beside that of the operands."""

    def __init__(self, operands: Operands) -> None:
        super().__init__()
        self._operands = {x.untyped_storage().data_ptr() for x in operands if x is not None}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._operands:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


@in_default_mode
def test_nothing_as_large_as_the_head_is_made() -> None:
    """The body of the operator, with a frozen head; with a trained one its gradient is that large."""
    vocab, width, tokens = 300, 512, torch.Size([2, 6])
    operands = Operands(
        torch.randn(*tokens, width), torch.randn(vocab, width), None, torch.randn(*tokens, 4), torch.randn(vocab, 4)
    )
    batch = batch_shape(tokens, None, None, operands.hidden.device)
    names = [*inspect.signature(token_inputs).parameters][4:]
    options = {name: inspect.signature(gspo_kernels.policy_loss).parameters[name].default for name in names}
    inputs = token_inputs(batch, GSPO(), torch.ones(2), torch.full(tokens, -5.0), **options)
    arrays = row_arrays(torch.float32, torch.zeros(tokens, dtype=torch.int64), None, 1.0, 1.0, None)
    given = HeadArguments(*operands, *arrays, vocab, torch.float32, chunk_of(3, vocab), None, None)
    largest = {}
    for trained in (False, True):
        with Largest(operands) as found:
            of = linear_loss_operator.body(given, NeedsGrad(True, trained, False, True, True), inputs)
        largest[trained] = found.bytes
        assert of.low_rank_weight_gradient.shape == (vocab, 4) and bool(of.low_rank_weight_gradient.any())
    assert largest[False] < 4 * vocab * width <= largest[True]


# --- what is refused --------------------------------------------------------------------------------------------------

B, T, R, D = 2, 3, 2, 4
U_OK, B_OK = torch.zeros(B, T, R), torch.zeros(VOCAB, R)
WRONG: dict[str, tuple[Any, type[Exception], str, str]] = {
    "a tensor": (U_OK, TypeError, "low_rank: expected (u, B)", "2, 3, 2"),
    "text": ("ab", TypeError, "low_rank: expected (u, B)", "ab"),
    "three": ((U_OK, B_OK, 1.0), TypeError, "low_rank: expected (u, B)", "got 3 values: a tensor of shape [2, 3, 2]"),
    "neither": ((None, None), TypeError, "low_rank: expected (u, B)", "got 2 values: NoneType None"),
    "no u": ((None, B_OK), TypeError, "low_rank[0]: expected u", "None"),
    "no B": ((U_OK, None), TypeError, "low_rank[1]: expected B", "None"),
    "u of integers": ((U_OK.long(), B_OK), TypeError, "low_rank[0]: expected", "int64"),
    "B of integers": ((U_OK, B_OK.long()), TypeError, "low_rank[1]: expected", "int64"),
    "u flat": ((U_OK.flatten(0, 1), B_OK), ValueError, "low_rank[0]: expected [2, 3, r]", "6, 2"),
    "u without columns": ((U_OK[..., :0], B_OK[:, :0]), ValueError, "low_rank[0]: expected [2, 3, r]", "2, 3, 0"),
    "B transposed": ((U_OK, B_OK.t()), ValueError, f"low_rank[1]: expected shape [{VOCAB}, 2]", f"2, {VOCAB}"),
    "B of another rank": ((U_OK, B_OK[:, :1]), ValueError, f"low_rank[1]: expected shape [{VOCAB}, 2]", "1]"),
    "B elsewhere": ((U_OK, B_OK.to("meta")), ValueError, "low_rank[1]: expected a tensor on", "meta"),
    "u elsewhere": ((U_OK.to("meta"), B_OK), ValueError, "low_rank[0]: expected a tensor on", "meta"),
}


@in_default_mode
@pytest.mark.parametrize("case", WRONG)
def test_refusals(case: str) -> None:
    low_rank, kind, argument, came = WRONG[case]
    hidden, weight = torch.zeros(B, T, D), torch.zeros(VOCAB, D)
    ids = torch.zeros(B, T, dtype=torch.int64)
    for call in (
        lambda: linear_gspo_loss(hidden, weight, ids, torch.ones(B), low_rank=low_rank),
        lambda: linear_token_logprobs(hidden, weight, ids, low_rank=low_rank),
        lambda: linear_logits(hidden, weight, low_rank=low_rank),
        lambda: gspo_kernels.explain(hidden, weight, ids, torch.ones(B), low_rank=low_rank),
    ):
        with pytest.raises(kind) as error:
            call()
        check_message(error.value, argument, came)


@in_default_mode
def test_forward_mode_and_vmap_are_refused_by_name() -> None:
    hidden, weight, ids = torch.zeros(T, D), torch.zeros(VOCAB, D), torch.zeros(T, dtype=torch.int64)

    def logprobs(b: Tensor) -> Tensor:
        return linear_token_logprobs(hidden, weight, ids, low_rank=(U_OK[0], b)).logprobs

    with pytest.raises(RuntimeError, match=r"linear_token_logprobs: .*low_rank\[1\]"):
        torch.func.vmap(logprobs)(torch.zeros(2, VOCAB, R))
    with pytest.raises(RuntimeError, match=r"linear_token_logprobs: .*low_rank\[1\]"):
        torch.func.jvp(logprobs, (B_OK,), (B_OK,))


# --- faults -----------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def b_without_a_chunk(patch: Patch) -> None:
    original, calls = HeadTerm.add_gradients, []

    def add(self: HeadTerm, *rest: Any) -> None:
        needed = self._needs_weight
        if self.hidden.shape[1] == RANK:
            calls.append(1)
            self._needs_weight = needed and len(calls) != 2
        original(self, *rest)
        self._needs_weight = needed

    patch.setattr(HeadTerm, "add_gradients", add)


def u_lost_when_recomputed(patch: Patch) -> None:
    original = Head.load

    def load(self: Head, rows: Any, recompute: bool = False) -> None:
        terms = self._terms
        self._terms = terms[:1] if recompute else terms
        original(self, rows, recompute)
        self._terms = terms

    patch.setattr(Head, "load", load)


def u_replaces_the_head(patch: Patch) -> None:
    original = Products.logits
    patch.setattr(Products, "logits", lambda self, hidden, bias, out, add=False: original(self, hidden, bias, out))


def u_not_scaled(patch: Patch) -> None:
    original = HeadTerm.scale_hidden_gradient

    def scale(self: HeadTerm, *rest: Any) -> None:
        if self.hidden.shape[1] != RANK:
            original(self, *rest)

    patch.setattr(HeadTerm, "scale_hidden_gradient", scale)


def b_of_the_next_row(patch: Patch) -> None:
    original = Head._operands
    patch.setattr(Head, "_operands", lambda self, rows: [x.roll(i, 0) for i, x in enumerate(original(self, rows))])


def scale_deferred_for_b(patch: Patch) -> None:
    patch.setattr(head_term.WeightSums, "__init__", head_term.WeightSums.__init__)
    original = chunked_loss.plan_for
    patch.setattr(
        chunked_loss, "plan_for",
        lambda inputs, lengths, chunk, needs: original(inputs, lengths, chunk, needs._replace(low_rank_weight=False)),
    )  # fmt: skip


@in_default_mode
@pytest.mark.parametrize(
    ("mutant", "frozen"),
    [
        (b_without_a_chunk, ("weight",)), (u_lost_when_recomputed, ("weight",)), (u_replaces_the_head, ("weight",)),
        (u_not_scaled, ("weight", "B")), (b_of_the_next_row, ("weight",)), (scale_deferred_for_b, ("weight",)),
    ],
)  # fmt: skip
def test_a_fault_is_found(mutant: Callable[[Patch], None], frozen: tuple[str, ...], monkeypatch: Patch) -> None:
    p, wide = given(), dict[str, Any](eps_low=0.9, eps_high=9.0)  # no row is clipped
    truth = from_logits(p, "packed", "gspo", **wide)

    def check() -> None:
        found = from_hidden(p, "packed", "gspo", rows=3, function=loss_of("gspo", frozen), **wide)
        check_parts(found, truth, p, frozen)

    check()
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
