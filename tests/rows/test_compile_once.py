"""Arguments that vary from call to call do not trigger recompilation by Triton. Needs no GPU.

Every launch is taken to the point where Triton looks up whether it has compiled this before, for an imagined GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import LAYOUTS, OBJECTIVES, PUBLIC, WITH_TOKENS, arguments, ragged_batch
from modes import DEFAULT_MODE

from gspo_kernels.linear import triton_sparse
from gspo_kernels.linear.types import Entries
from gspo_kernels.rows import triton_rows

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = DEFAULT_MODE


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """(kernel, what it is compiled for) of every launch; nothing runs."""
    from triton.backends.compiler import GPUTarget

    found: set[tuple[str, str]] = set()

    def look_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        *_, binder = self.create_binder()
        _, specialization, others = binder(*args, **options)
        found.add((self.fn.__name__, f"{specialization} {others}"))

    device = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", device, raising=False)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", look_up)
    monkeypatch.setattr(triton_rows, "unsupported_reasons", lambda logits: [])
    yield found


def step(objective: str, layout: str, on_policy: bool, lengths: list[int], **options: Any) -> None:
    per_token = {name: options.pop(name) for name in ("weights", "by_token") if name in options}
    form = options.pop("kept", None)
    vocab = 17 + sum(lengths)
    batch = ragged_batch(
        objective, lengths=lengths, on_policy=on_policy, vocab=vocab, kept=form is not None, **per_token
    )
    if batch.kept is not None:
        tokens = batch.token_ids.tolist()
        batch.kept = [ids or [max(token, 0)] for ids, token in zip(batch.kept, tokens, strict=True)]
        if form == "some":
            batch.kept[batch.mask.tolist().index(True)] = None
    args = arguments(batch, layout)
    temperature = options.pop("temperature", 1.0)
    loss, _ = PUBLIC[objective](args.logits, *args.rest, **{**args.keywords, "temperature": temperature}, **options)
    loss.backward()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_one_compilation_serves_every_batch(
    objective: str, layout: str, on_policy: bool, lookups: set[tuple[str, str]]
) -> None:
    """Sizes of 1 and multiples of 16, which Triton likes to compile for, are among them; so are odd vocabularies."""
    step(objective, layout, on_policy, [3, 2])
    first = set(lookups)
    assert len(first) == 4, "four launches, four kernels"
    for k in range(20):
        step(objective, layout, on_policy, [k + 1, 2 * k % 17] if k % 2 else [k + 1], temperature=0.3 + 0.1 * k)
        options = {"eps_low": 1e-4 * (k + 1), "eps_high": 0.01 * k, "max_log_ratio": 1.0 + k, "normalizer": 1.0 + k}
        step(objective, layout, on_policy, [3, 2], **options)
    assert lookups == first


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_as_many_sequences_as_tokens_do_not_compile_again(
    objective: str, on_policy: bool, lookups: set[tuple[str, str]]
) -> None:
    """A second dimension says then what packed numbers belong to; kernels get them all in one dimension."""
    numbers: dict[str, Any] = {"weights": "token", "by_token": objective in WITH_TOKENS}
    step(objective, "packed", on_policy, [3, 2], **numbers)
    first = set(lookups)
    for lengths in ([1], [1, 1], [2, 0]):
        step(objective, "packed", on_policy, lengths, **numbers)
    step(objective, "packed", on_policy, [3, 2], weights="sequence")
    assert lookups == first


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_another_softcap_does_not_compile_again(on_policy: bool, lookups: set[tuple[str, str]]) -> None:
    step("gspo", "packed", on_policy, [3, 2], softcap=30.0)
    first = set(lookups)
    for cap in (1.0, 50.0, 7.3):
        step("gspo", "packed", on_policy, [3, 2], softcap=cap, logit_scale=0.1 * cap, temperature=cap)
    assert lookups == first
    step("gspo", "packed", on_policy, [3, 2])
    assert lookups != first, "without a cap the kernels are others"


@pytest.mark.parametrize(
    ("form", "on_policy", "launches"), [("some", False, 6), ("some", True, 5), ("every", False, 4)]
)
def test_other_kept_sets_do_not_compile_again(
    form: str, on_policy: bool, launches: int, lookups: set[tuple[str, str]]
) -> None:
    step("gspo", "packed", on_policy, [3, 2], kept=form)
    first = set(lookups)
    assert len(first) == launches
    for lengths in ([1], [13, 3], [7, 20]):
        step("gspo", "packed", on_policy, lengths, kept=form, temperature=0.1 * len(lengths))
    assert lookups == first


def test_other_sparse_heads_do_not_compile_again(lookups: set[tuple[str, str]]) -> None:
    """Rows of the head either start on 16-byte boundaries, all of them, or they do not."""

    def launch(rows: int, entries: int, vocab: int, depth: int, stride: int) -> None:
        def matrix(n: int) -> torch.Tensor:
            return torch.zeros(n * stride, dtype=torch.bfloat16).as_strided((n, depth), (stride, 1))

        ids = torch.zeros(entries, dtype=torch.int32)
        order = torch.zeros(entries, dtype=torch.int64)
        of = Entries(ids, torch.zeros(rows + 1, dtype=torch.int64), order, None)
        gradient, hidden, weight = torch.zeros(entries), matrix(rows), matrix(vocab)
        triton_sparse.kept_logits(hidden, weight, of, torch.bfloat16, gradient, False)
        triton_sparse.hidden_gradient(gradient, weight, of, torch.bfloat16, hidden)
        triton_sparse.weight_gradient(gradient, hidden, of, order, order, torch.bfloat16, weight)

    launch(3, 5, 7, 32, 32)
    first = set(lookups)
    assert {kernel for kernel, _ in first} == {f"{kernel}_kernel" for kernel in triton_sparse.LAUNCH}
    for case in ((1, 1, 1, 8, 8), (16, 64, 16, 16, 24), (1, 33, 2, 40, 4000)):
        launch(*case)
    assert lookups == first
    launch(3, 5, 7, 33, 33)
    assert len(lookups) == 2 * len(first)


def test_strides_beyond_32_bits_do_not_compile_again(lookups: set[tuple[str, str]]) -> None:
    """The stride of a packed batch is N V, of a padded one T V: both may cross 2^31 in the middle of a training."""
    from gspo_kernels.rows.types import Rows, Upstream

    one = torch.ones((), dtype=torch.float64)

    def launch(rows: int, stride: int, inner_stride: int) -> None:
        logits: Any = SimpleNamespace(  # strides that no memory of this machine has
            shape=torch.Size((rows, 3, 1000)), stride=lambda: (stride, inner_stride, 1), element_size=lambda: 2,
            dtype=torch.bfloat16, device=torch.device("cpu"), data_ptr=lambda: 0, numel=lambda: 3000 * rows,
        )  # fmt: skip
        batch = Rows(logits, torch.zeros(rows, 3, dtype=torch.int64), None, one, 1000)
        upstream = Upstream(torch.zeros(rows, 3), None, None, None, None)
        triton_rows.backward(batch, triton_rows.forward(batch), upstream, logits)
        triton_rows.forward_backward(batch, upstream, logits)
        triton_rows.scale(logits, torch.ones(1))
        ids, offsets = torch.zeros(rows, dtype=torch.int32), torch.zeros(3 * rows + 1, dtype=torch.int64)
        batch = batch._replace(kept_ids=ids, kept_offsets=offsets, kept_form="every")
        logits.new_empty = torch.empty
        triton_rows.backward(batch, triton_rows.forward(batch), upstream, logits)
        triton_rows.forward_backward(batch, upstream, logits)

    launch(2, 3000, 1000)
    first = set(lookups)
    assert {kernel for kernel, _ in first} == {f"{kernel}_kernel" for kernel in triton_rows.LAUNCH}
    for rows, stride, inner_stride in (
        (1, 3000, 1000),
        (1, 2**31 - 1, 1000),
        (2, 2**31 + 16, 2**31),
        (3, 2**33 + 1, 1),
    ):
        launch(rows, stride, inner_stride)
    assert lookups == first
