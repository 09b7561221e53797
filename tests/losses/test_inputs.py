"""Inputs that are refused where they can be read for free; where they cannot, one documented result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import LINEAR, PUBLIC
from modes import BACKENDS, DEFAULT_MODE, INTERPRETED, KERNELS, NOT_INTERPRETED, needs, on_device
from torch import Tensor

import gspo_kernels
from gspo_kernels import GRPO, GSPO, GSPOToken, global_count, policy_loss_from_logprobs
from gspo_kernels.base.checks import INTEGERS
from gspo_kernels.base.layout import find_segments

VOCAB, WIDTH = 7, 3


@pytest.fixture(autouse=True)
def checks_that_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPO_KERNELS_DEBUG", "1")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no check reads a value."""
    for module in ("base.checks", "base.layout", "losses.triton_stage", "rows.operators"):
        monkeypatch.setattr(f"gspo_kernels.{module}.may_read", lambda tensor: False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return on_device(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def from_logits(objective: str, tokens: int, advantages: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """The output of the loss of packed logits, and its gradient [tokens, vocabulary]."""
    logits = random(tokens, VOCAB).requires_grad_()
    ids = torch.arange(tokens, device=logits.device) % VOCAB
    old = logits.detach().log_softmax(-1).gather(1, ids[:, None])[:, 0] + 0.1 * random(tokens, seed=1)
    output = PUBLIC[objective](logits, ids, advantages, old, **options)
    output.loss.backward()
    assert logits.grad is not None
    return output, logits.grad


def from_hidden(objective: str, tokens: int, advantages: Tensor, **options: Any) -> tuple[Any, Tensor]:
    hidden = random(tokens, WIDTH).requires_grad_()
    ids = torch.arange(tokens, device=hidden.device) % VOCAB
    old = -1.5 + 0.1 * random(tokens, seed=1)
    output = LINEAR[objective](hidden, random(VOCAB, WIDTH, seed=2), ids, advantages, old, **options)
    output.loss.backward()
    assert hidden.grad is not None
    return output, hidden.grad


def from_logprobs(objective: str, tokens: int, advantages: Tensor, **options: Any) -> tuple[Any, Tensor]:
    logprobs = (-2.0 + 0.1 * random(tokens)).requires_grad_()
    of = {"gspo": GSPO(), "gspo_token": GSPOToken(), "grpo": GRPO()}[objective]
    old = logprobs.detach() + 0.1 * random(tokens, seed=1)
    output = policy_loss_from_logprobs(logprobs, advantages, old, objective=of, **options)
    output.loss.backward()
    assert logprobs.grad is not None
    return output, logprobs.grad[:, None]


FROM: dict[str, Callable[..., tuple[Any, Tensor]]] = {
    "logits": from_logits, "hidden": from_hidden, "logprobs": from_logprobs
}  # fmt: skip
by_entry = pytest.mark.parametrize("entry", FROM)


# --- boundaries -------------------------------------------------------------------------------------------------------

WRONG = {
    "wraps around": torch.tensor([0, 2**31 - 1, -(2**31), -1, 12], dtype=torch.int32),
    "wraps around in int64": torch.tensor([0, 2**63 - 1, -(2**63), -1, 12]),
    "decreases": torch.tensor([0, 8, 3, 12]),
    "past the end": torch.tensor([0, 5, 400_000_000]),
    "short": torch.tensor([0, 5, 9]),
    "negative start": torch.tensor([-400_000_000, 5, 12], dtype=torch.int32),
    "late start": torch.tensor([2, 5, 12]),
    "of nothing": torch.tensor([0, 0, 0]),
}


@by_entry
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_boundaries_are_refused(wrong: str, entry: str) -> None:
    boundaries = on_device(WRONG[wrong])
    with pytest.raises(ValueError, match=r"cu_seqlens: expected boundaries that start at 0, never .*; got \["):
        FROM[entry]("gspo", 12, random(len(boundaries) - 1), cu_seqlens=boundaries)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int8, torch.uint32], ids=str)
def test_boundaries_of_other_integers_are_refused(dtype: torch.dtype) -> None:
    boundaries = on_device(torch.tensor([0, 5, 12]).to(dtype))
    with pytest.raises(TypeError, match=rf"cu_seqlens: expected .* int32 or int64; got {dtype}"):
        from_logprobs("gspo", 12, random(2), cu_seqlens=boundaries)
    with pytest.raises(TypeError, match=rf"cu_seqlens: expected .* int32 or int64; got {dtype}"):
        global_count(on_device(torch.ones(12)), boundaries)


@DEFAULT_MODE
@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("wrong", WRONG)
def test_boundaries_that_nothing_has_read_do_no_harm(wrong: str) -> None:
    """What the sums trust is in range and never decreases; the loss is NaN, for any way of counting."""
    boundaries, sequence_of, fault = find_segments(WRONG[wrong], 12)
    assert boundaries[0] == 0 and boundaries[-1] == 12 and bool((boundaries.diff() >= 0).all())
    assert torch.equal(sequence_of.bincount(minlength=len(boundaries) - 1), boundaries.diff()) and fault.isnan()
    advantages = random(len(boundaries) - 1)
    for objective in ("gspo", "gspo_token", "grpo"):
        for options in ({}, {"aggregation": "sequence_sum", "normalizer": 2.0}, {"normalizer": torch.tensor(2.0)}):
            output, _ = from_logprobs(objective, 12, advantages, cu_seqlens=WRONG[wrong], **options)
            assert output.loss.isnan() and output.stats.num_sequences.isnan()
        for backend in BACKENDS:
            assert from_logits(objective, 12, advantages, cu_seqlens=WRONG[wrong], backend=backend)[0].loss.isnan()
        with pytest.raises(ValueError, match="cu_seqlens: expected boundaries"):  # lengths are read there anyway
            from_hidden(objective, 12, advantages, cu_seqlens=WRONG[wrong])
    assert global_count(torch.ones(12), WRONG[wrong]).isnan()
    of_sequences = gspo_kernels.rollout_weights(
        random(12), random(12), cu_seqlens=WRONG[wrong], level="sequence_mean"
    ).weights
    assert bool(of_sequences.isnan().all())
    mismatch = gspo_kernels.rollout_mismatch(random(12), random(12), cu_seqlens=WRONG[wrong])
    assert mismatch.sequence_ratio_mean.isnan() and mismatch.sequence_effective_fraction.isnan()


@pytest.mark.usefixtures("unread")
@needs("triton")
@pytest.mark.parametrize("wrong", ["wraps around", "decreases", "short", "of nothing"])
@pytest.mark.parametrize("objective", ["gspo", "grpo"])
def test_boundaries_that_triton_has_not_read_do_no_harm(wrong: str, objective: str) -> None:
    advantages = random(len(WRONG[wrong]) - 1)
    output, _ = from_logits(objective, 12, advantages, cu_seqlens=on_device(WRONG[wrong]), backend="triton")
    assert output.loss.isnan()


# --- one number per token, or per sequence, where there are as many of both -------------------------------------------

LENGTHS = [0, 2, 2, 3]  # boundaries of three sequences with three tokens


def test_weights_of_the_issue() -> None:
    """Packed, three tokens in sequences of 2, 0 and 1: GSPO with weights from other old log-probabilities."""
    logprobs = on_device(torch.tensor([-1.0, -2.0, -3.0]))
    weights = (logprobs - on_device(torch.tensor([-1.2, -1.5, -3.0]))).exp()
    advantages, boundaries = on_device(torch.tensor([1.0, 5.0, -1.0])), on_device(torch.tensor(LENGTHS))

    def loss(**options: Any) -> float:
        return float(policy_loss_from_logprobs(logprobs, advantages, logprobs, cu_seqlens=boundaries, **options).loss)

    assert loss(importance_weights=weights[None]) == pytest.approx(0.0430, abs=5e-5)
    assert loss(importance_weights=weights[:, None]) == pytest.approx(-0.1107, abs=5e-5)
    with pytest.raises(
        ValueError,
        match=r"importance_weights: .* 3 tokens and 3 sequences: importance_weights\[None\], "
        r".*importance_weights\[:, None\]",
    ):
        loss(importance_weights=weights)


@by_entry
@pytest.mark.parametrize("objective", ["gspo_token"] if INTERPRETED else ["gspo_token", "grpo"])
def test_a_second_dimension_says_what_an_array_belongs_to(objective: str, entry: str) -> None:
    """One per sequence gives what its number at each of its tokens gives; and the plain form is refused."""
    values, factors = random(3, seed=3), random(3, seed=4).abs()
    boundaries = on_device(torch.tensor(LENGTHS))
    mask = on_device(torch.tensor([True, True, True]))

    def found(advantages: Tensor, weights: Tensor) -> tuple[float, Tensor]:
        output, gradient = FROM[entry](
            objective, 3, advantages, importance_weights=weights, cu_seqlens=boundaries, mask=mask
        )
        return float(output.loss.detach()), gradient

    sequence_of = torch.tensor([0, 0, 2], device=values.device)
    for numbers, by_token in ((values[None], values[None]), (values[:, None], values[sequence_of][None])):
        for weights, weights_by_token in (
            (factors[None], factors[None]),
            (factors[:, None], factors[sequence_of][None]),
        ):
            one, other = found(numbers, weights), found(by_token, weights_by_token)
            assert one[0] == pytest.approx(other[0], rel=1e-6)
            torch.testing.assert_close(one[1], other[1])
    assert found(values[None], factors[None])[0] != pytest.approx(found(values[:, None], factors[:, None])[0], rel=1e-2)
    for name, given in (("advantages", (values, factors[None])), ("importance_weights", (values[None], factors))):
        with pytest.raises(
            ValueError, match=rf"{name}: .*{name}\[None\], of shape \[1, 3\].*\[3, 1\].*; got shape \[3\]"
        ):
            found(*given)


@NOT_INTERPRETED
def test_what_is_not_ambiguous_needs_no_second_dimension() -> None:
    values = random(3)
    ones = on_device(torch.tensor([0, 1, 2, 3], dtype=torch.int32))
    plain, _ = from_logits("grpo", 3, values, importance_weights=values.abs(), cu_seqlens=ones)
    said, _ = from_logits("grpo", 3, values[None], importance_weights=values.abs()[:, None], cu_seqlens=ones)
    assert torch.equal(plain.loss, said.loss), "a token each: both readings are the same"
    boundaries = on_device(torch.tensor(LENGTHS))
    plain, _ = from_logits("gspo", 3, values, cu_seqlens=boundaries)  # its advantages are one per sequence
    said, _ = from_logits("gspo", 3, values[:, None], cu_seqlens=boundaries)
    assert torch.equal(plain.loss, said.loss)
    with pytest.raises(ValueError, match=r"advantages: .*got \[1, 3\], one per token. For those, use gspo_token_loss"):
        from_logits("gspo", 3, values[None], cu_seqlens=boundaries)
    of_column = policy_loss_from_logprobs(
        random(2, 3) - 3, random(2, 1), objective=GRPO(), importance_weights=random(2, 1)
    )
    of_plain = policy_loss_from_logprobs(random(2, 3) - 3, random(2), objective=GRPO(), importance_weights=random(2))
    assert torch.equal(of_column.loss, of_plain.loss), "padded [B, 1] is one per sequence"


@DEFAULT_MODE
@pytest.mark.usefixtures("unread")
def test_where_nothing_is_read_a_plain_array_is_one_per_sequence() -> None:
    values, boundaries = random(3), torch.tensor(LENGTHS)
    for entry in FROM.values():
        plain, _ = entry("grpo", 3, values, importance_weights=values.abs(), cu_seqlens=boundaries)
        said, _ = entry("grpo", 3, values[:, None], importance_weights=values.abs()[:, None], cu_seqlens=boundaries)
        assert torch.equal(plain.loss, said.loss)


# --- masks ------------------------------------------------------------------------------------------------------------

MASKS = {
    "a weight": (torch.tensor([[1.0, 0.5, 0.0]]), r"got 0\.5"),
    "-1": (torch.tensor([[1, -1, 0]]), "got -1"),
    "NaN": (torch.tensor([[1.0, math.nan, 0.0]]), "got nan"),
    "ids": (torch.tensor([[0, 1, 2]], dtype=torch.uint8), "got 2"),
    "additive": (torch.tensor([[0.0, -math.inf, -math.inf]]), r"got -inf .* additive attention mask, .* == 0"),
    "additive, finite": (torch.full((1, 3), torch.finfo(torch.bfloat16).min).bfloat16(), "additive attention mask"),
}


@NOT_INTERPRETED
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_other_than_0_and_1_are_refused(kind: str) -> None:
    mask, came = MASKS[kind][0].expand(2, 3).contiguous(), MASKS[kind][1]
    mask, ids = on_device(mask), on_device(torch.zeros(2, 3, dtype=torch.int64))
    logits, logprobs, head = random(2, 3, VOCAB), -1 - random(2, 3).abs(), random(VOCAB, VOCAB)
    calls: dict[str, Callable[[], Any]] = {
        "policy_loss": lambda: gspo_kernels.grpo_loss(logits, ids, random(2), mask=mask),
        "token_logprobs": lambda: gspo_kernels.token_logprobs(logits, ids, mask=mask),
        "linear_policy_loss": lambda: gspo_kernels.linear_grpo_loss(logits, head, ids, random(2), mask=mask),
        "linear_token_logprobs": lambda: gspo_kernels.linear_token_logprobs(logits, head, ids, mask=mask),
        "policy_loss_from_logprobs": lambda: policy_loss_from_logprobs(logprobs, random(2), mask=mask),
        "next_token_targets": lambda: gspo_kernels.next_token_targets(ids, mask),
        "rollout_weights": lambda: gspo_kernels.rollout_weights(logprobs, logprobs, mask=mask),
        "rollout_mismatch": lambda: gspo_kernels.rollout_mismatch(logprobs, logprobs, mask=mask),
        "global_count": lambda: global_count(mask),
    }
    for name, refused in calls.items():
        with pytest.raises(ValueError, match="mask: expected True or 1 at .*" + came):
            raise AssertionError(f"{name} accepted {refused()}")


# --- normalizers ------------------------------------------------------------------------------------------------------

NO_COUNTS = [0.0, -4.0, math.nan, math.inf, -math.inf]


@NOT_INTERPRETED
@by_entry
@pytest.mark.parametrize("count", NO_COUNTS)
def test_normalizers_that_are_no_count_are_refused(count: float, entry: str) -> None:
    boundaries = on_device(torch.tensor([0, 5, 12]))
    with pytest.raises(ValueError, match=rf"normalizer: expected a global count .*; got a tensor of {count:g}"):
        FROM[entry]("gspo", 12, random(2), cu_seqlens=boundaries, normalizer=on_device(torch.tensor(count)))


@NOT_INTERPRETED
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
def test_normalizers_that_are_no_number_are_refused(dtype: torch.dtype) -> None:
    boundaries, normalizer = on_device(torch.tensor([0, 5, 12])), on_device(torch.ones((), dtype=dtype))
    with pytest.raises(TypeError, match=rf"normalizer: expected float32, float64 or an integer dtype; got {dtype}"):
        from_logprobs("gspo", 12, random(2), cu_seqlens=boundaries, normalizer=normalizer)


@by_entry
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_normalizer_of_any_integers_counts(dtype: torch.dtype, entry: str) -> None:
    boundaries, normalizer = on_device(torch.tensor([0, 5, 12])), on_device(torch.tensor(3).to(dtype))
    found, expected = (
        FROM[entry]("gspo", 12, random(2), cu_seqlens=boundaries, normalizer=count)[0].loss for count in (normalizer, 3)
    )
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("objective", ["gspo", "grpo"])
def test_a_normalizer_that_nothing_has_read_makes_nan(objective: str) -> None:
    """Of the loss and of each gradient that is not 0; those stay what they are. On every backend, from every input."""
    boundaries = on_device(torch.tensor([0, 5, 8, 12]))
    mask = on_device(torch.arange(12) % 4 != 1)
    advantages = on_device(torch.tensor([1.0, 0.0, -1.0]))  # the second sequence has no gradient
    counts = [0.0, math.nan] if INTERPRETED else NO_COUNTS
    for count in counts:
        for entry, backend in [("logits", b) for b in BACKENDS] + [("hidden", KERNELS), ("logprobs", None)]:
            options = {} if backend is None else {"backend": backend}
            given = {"cu_seqlens": boundaries, "mask": mask, "eps_low": 0.5, "eps_high": 0.5}
            if entry == "logprobs":
                given = {"cu_seqlens": boundaries, "mask": mask}
            _, expected = FROM[entry](objective, 12, advantages, **given, **options)
            normalizer = on_device(torch.tensor(count))
            output, gradient = FROM[entry](objective, 12, advantages, normalizer=normalizer, **given, **options)
            assert output.loss.isnan(), (count, entry, backend)
            flows = (expected != 0).any(1)
            assert bool(gradient[flows].isnan().all()) and bool((gradient[~flows] == 0).all()), (count, entry, backend)
            assert 0 < int(flows.sum()) < int(mask.sum()), "some tokens that count have no gradient"


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_global_count_of_nothing(backend: str) -> None:
    boundaries, mask = on_device(torch.tensor([0, 5, 12])), on_device(torch.zeros(12))
    given = {"cu_seqlens": boundaries, "mask": mask, "normalizer": global_count(mask, boundaries)}
    output, gradient = from_logits("gspo", 12, random(2), backend=backend, **given)
    assert float(output.loss.detach()) == 0.0 and bool((gradient == 0).all())
