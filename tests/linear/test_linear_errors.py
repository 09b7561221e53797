"""What a loss from hidden states refuses, and how: the argument's name, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from batches import CLASSES, FIELDS, LINEAR, OBJECTIVES
from linear import chunk_of
from modes import DEFAULT_MODE, DEVICE, KERNELS, on_device, sized
from test_errors import check_message, moved

import gspo_kernels
from gspo_kernels import DRO, linear_logits, linear_policy_loss, linear_token_logprobs

B, T, V, D = 2, 3, 5, 4


@pytest.fixture(autouse=True)
def checks_that_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a value is only looked at, and waited for, under this flag."""
    monkeypatch.setenv("GSPO_KERNELS_DEBUG", "1")


def padded() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(B, T, D, generator=generator),
        "weight": torch.randn(V, D, generator=generator),
        "token_ids": torch.tensor([[0, 1, 2], [3, 4, 0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_logprobs": torch.full((B, T), -1.0),
        "mask": torch.tensor([[True, True, False], [True, True, True]]),
    }


def packed() -> dict[str, Any]:
    whole = ("weight", "advantages")
    arrays = {name: x if name in whole else x.flatten(0, 1) for name, x in padded().items()}
    return {**arrays, "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)}


ROW = chunk_of(1, V) or 0  # bytes

Case = tuple[dict[str, Any], type[Exception], str, str]  # change, error, argument, what came

OF_HEAD: dict[str, Case] = {  # of the losses and of linear_token_logprobs alike
    "hidden of integers": ({"hidden": torch.zeros(B, T, D).long()}, TypeError, "hidden", "int64"),
    "hidden of one dimension": ({"hidden": torch.zeros(D)}, ValueError, "hidden", "4"),
    "hidden of four dimensions": ({"hidden": torch.zeros(1, B, T, D)}, ValueError, "hidden", "1, 2, 3, 4"),
    "hidden not a tensor": ({"hidden": [[0.0]]}, TypeError, "hidden", "list"),
    "hidden complex": ({"hidden": torch.zeros(B, T, D, dtype=torch.complex64)}, TypeError, "hidden", "complex64"),
    "weight of another width": ({"weight": torch.zeros(V, D + 1)}, ValueError, "weight", "5, 5"),
    "weight transposed": ({"weight": torch.zeros(D, V)}, ValueError, "weight", "4, 5"),
    "weight of one dimension": ({"weight": torch.zeros(V)}, ValueError, "weight", "5"),
    "weight without a row": ({"weight": torch.zeros(0, D)}, ValueError, "weight", "0, 4"),
    "weight of integers": ({"weight": torch.zeros(V, D).long()}, TypeError, "weight", "int64"),
    "weight None": ({"weight": None}, TypeError, "weight", "None"),
    "bias of another length": ({"bias": torch.zeros(V + 1)}, ValueError, "bias", "6"),
    "bias of two dimensions": ({"bias": torch.zeros(1, V)}, ValueError, "bias", "1, 5"),
    "bias of integers": ({"bias": torch.zeros(V).long()}, TypeError, "bias", "int64"),
    "bias a number": ({"bias": 0.0}, TypeError, "bias", "float"),
    "token_ids of another shape": ({"token_ids": torch.zeros(B, T + 1).long()}, ValueError, "token_ids", "2, 4"),
    "token_ids flat": ({"token_ids": torch.zeros(B * T).long()}, ValueError, "token_ids", "6"),
    "token_ids of floats": ({"token_ids": torch.zeros(B, T)}, TypeError, "token_ids", "float32"),
    "token_ids a list": ({"token_ids": [[0]]}, TypeError, "token_ids", "list"),
    "token_ids too large": ({"token_ids": torch.tensor([[0, V, 0], [0, 0, 0]])}, ValueError, "token_ids", "5"),
    "token_ids negative": ({"token_ids": torch.tensor([[0, 0, 0], [0, -100, 0]])}, ValueError, "token_ids", "-100"),
    "token_ids of the padding": ({"vocab_size": 4}, ValueError, "token_ids", "4"),
    "vocab_size too large": ({"vocab_size": V + 1}, ValueError, "vocab_size", "6"),
    "vocab_size zero": ({"vocab_size": 0}, ValueError, "vocab_size", "0"),
    "vocab_size a float": ({"vocab_size": 5.0}, TypeError, "vocab_size", "5.0"),
    "chunk_bytes zero": ({"chunk_bytes": 0}, ValueError, "chunk_bytes", "0"),
    "chunk_bytes negative": ({"chunk_bytes": -1}, ValueError, "chunk_bytes", "-1"),
    "chunk_bytes less than a row": ({"chunk_bytes": ROW - 1}, ValueError, "chunk_bytes", str(ROW - 1)),
    "chunk_bytes a float": ({"chunk_bytes": 1e6}, TypeError, "chunk_bytes", "1000000.0"),
    "chunk_bytes a bool": ({"chunk_bytes": True}, TypeError, "chunk_bytes", "True"),
    "chunk_bytes text": ({"chunk_bytes": "1 GiB"}, TypeError, "chunk_bytes", "1 GiB"),
    "temperature zero": ({"temperature": 0.0}, ValueError, "temperature", "0"),
    "temperature of another shape": ({"temperature": torch.ones(B)}, ValueError, "temperature", "2"),
    "mask of another shape": ({"mask": torch.ones(B, 2).bool()}, ValueError, "mask", "2, 2"),
    "backend unknown": ({"backend": "metal"}, ValueError, "backend", "metal"),
    "backend that cannot": (
        {"backend": KERNELS, "weight": torch.zeros(V, D).double()}, ValueError, "backend", "float64",
    ),
}  # fmt: skip

OF_LOSS: dict[str, Case] = {
    "advantages of another length": ({"advantages": torch.ones(3)}, ValueError, "advantages", "3"),
    "old_logprobs of the hidden states' shape": (
        {"old_logprobs": torch.ones(B, T, D)}, ValueError, "old_logprobs", "2, 3, 4",
    ),
    "cu_seqlens with padded ones": ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens", "2, 3"),
    "eps_low negative": ({"eps_low": -0.1}, ValueError, "eps_low", "-0.1"),
    "beta without ref_logprobs": ({"beta": 0.1}, ValueError, "ref_logprobs", "None"),
    "normalizer zero": ({"normalizer": 0}, ValueError, "normalizer", "0"),
    "aggregation unknown": ({"aggregation": "mean"}, ValueError, "aggregation", "mean"),
    "skipping, with a KL term": (
        {"skip_zero_advantage": True, "beta": 0.1, "ref_logprobs": -torch.ones(B, T)}, ValueError,
        "skip_zero_advantage", "beta 0.1",
    ),
    "skipping, with an entropy bonus": (
        {"skip_zero_advantage": True, "entropy_coef": 0.01}, ValueError, "skip_zero_advantage", "entropy_coef 0.01",
    ),
}  # fmt: skip


def call(function: Callable[..., Any], given: dict[str, Any], order: tuple[str, ...]) -> Any:
    given = moved(given)
    return function(*(given[name] for name in order), **{k: v for k, v in given.items() if k not in order})


def loss(objective: str, given: dict[str, Any]) -> Any:
    return call(LINEAR[objective], given, ("hidden", "weight", "token_ids", "advantages", "old_logprobs"))


def logprobs(given: dict[str, Any]) -> Any:
    rest = {k: v for k, v in given.items() if k not in ("advantages", "old_logprobs", "cu_seqlens")}
    return call(linear_token_logprobs, rest, ("hidden", "weight", "token_ids"))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", [*OF_HEAD, *OF_LOSS])
def test_losses_refuse(objective: str, case: str) -> None:
    change, kind, argument, came = {**OF_HEAD, **OF_LOSS}[case]
    if not change.keys() & FIELDS <= {each.name for each in fields(CLASSES[objective])}:
        pytest.skip("the objective has no such field")
    with pytest.raises(kind) as error:
        loss(objective, {**padded(), **change})
    assert type(error.value) is kind
    check_message(error.value, argument, came)


@pytest.mark.parametrize("case", OF_HEAD)
def test_token_logprobs_refuses(case: str) -> None:
    change, kind, argument, came = OF_HEAD[case]
    with pytest.raises(kind) as error:
        logprobs({**padded(), **change})
    assert type(error.value) is kind
    check_message(error.value, argument, came)


@pytest.mark.parametrize("case", [case for case in OF_HEAD if case.startswith(("hidden", "weight", "bias", "vocab"))])
def test_logits_refuse(case: str) -> None:
    change, kind, argument, came = OF_HEAD[case]
    given = {name: x for name, x in {**padded(), **change}.items() if name in ("hidden", "weight", "bias", *change)}
    with pytest.raises(kind) as error:
        call(linear_logits, given, ("hidden", "weight"))
    assert type(error.value) is kind
    check_message(error.value, argument, came)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("base", [padded, packed], ids=["padded", "packed"])
def test_the_unchanged_call_is_accepted(objective: str, base: Callable[[], dict[str, Any]]) -> None:
    """With exactly one row of logits, too."""
    whole, _ = loss(objective, base())
    chunked, _ = loss(objective, {**base(), "chunk_bytes": ROW})
    assert math.isfinite(float(whole)) and float(chunked) == pytest.approx(float(whole), rel=1e-6)


def test_a_row_is_larger_in_float64() -> None:
    wide = {"hidden": torch.zeros(B, T, D).double(), "backend": "reference"}
    with pytest.raises(ValueError, match=f"chunk_bytes: expected at least {2 * ROW}"):
        loss("gspo", {**padded(), **wide, "chunk_bytes": ROW})
    loss("gspo", {**padded(), **wide, "chunk_bytes": 2 * ROW})


@DEFAULT_MODE
def test_a_chunk_holds_the_vocabulary_and_not_its_padding() -> None:
    loss("gspo", {**padded(), "token_ids": torch.zeros(B, T).long(), "vocab_size": 3, "chunk_bytes": 12})


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("group", ["tp_group", "cp_group"])
def test_a_group_without_torch_distributed_is_refused(objective: str, group: str) -> None:
    """With it, see test_sharded_errors.py."""
    with pytest.raises(ValueError, match="see init_process_group") as error:
        loss(objective, {**padded(), group: object()})
    check_message(error.value, f"{group}: expected None", "object object")


def test_token_logprobs_refuses_a_group_without_torch_distributed() -> None:
    with pytest.raises(ValueError, match="see init_process_group") as error:
        logprobs({**padded(), "tp_group": object()})
    check_message(error.value, "tp_group: expected None", "object object")


@pytest.mark.parametrize("function", [logprobs, lambda given: loss("gspo", given)], ids=["logprobs", "loss"])
def test_a_start_without_a_group_is_refused(function: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(ValueError, match="vocab_start: expected None without a tp_group") as error:
        function({**padded(), "vocab_start": 0})
    check_message(error.value, "vocab_start", "got 0")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_anything_is_fine_at_a_masked_position(objective: str) -> None:
    expected, _ = loss(objective, padded())
    for value in sized((-100, V, 2**40, -(2**62)), (-100,)):
        given = padded()
        given["token_ids"][0, 2] = value
        given["hidden"][0, 2] = math.nan
        assert torch.equal(loss(objective, given)[0], expected)


@pytest.mark.parametrize("base", [padded, packed], ids=["padded", "packed"])
def test_gspo_names_gspo_token_for_advantages_by_token(base: Callable[[], dict[str, Any]]) -> None:
    given = base()
    with pytest.raises(ValueError, match="gspo_token_loss"):
        loss("gspo", {**given, "advantages": torch.ones(given["token_ids"].shape)})


def test_an_objective_that_is_none_is_refused() -> None:
    given = padded()
    with pytest.raises(TypeError, match="objective: expected"):
        gspo_kernels.linear_policy_loss(
            *(on_device(given[name]) for name in ("hidden", "weight", "token_ids", "advantages")),
            objective="gspo",  # type: ignore[arg-type]
        )


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs two devices")
@pytest.mark.parametrize("name", ["weight", "bias", "token_ids"])
def test_operands_on_two_devices(name: str) -> None:
    given = {**moved(padded()), "bias": torch.zeros(V, device=DEVICE)}
    given[name] = given[name].cpu()
    first = [given.pop(k) for k in ("hidden", "weight", "token_ids", "advantages")]
    with pytest.raises(ValueError, match=f"{name}: expected"):
        LINEAR["gspo"](*first, **given)


def test_sequences_that_an_objective_penalizes_are_not_skipped() -> None:
    """DRO's penalty does not depend on advantages."""
    given = padded() | {"skip_zero_advantage": True, "objective": DRO()}
    with pytest.raises(ValueError, match=r"^skip_zero_advantage: .* got DRO, whose needs_advantage is False"):
        call(linear_policy_loss, given, ("hidden", "weight", "token_ids", "advantages", "old_logprobs"))
