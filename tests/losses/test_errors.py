"""What is refused, and how it is said: the argument's name, what was expected, what came; and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from batches import CLASSES, FIELDS, OBJECTIVES, PUBLIC
from modes import KERNELS, on_device
from torch import Tensor

import gspo_kernels

B, T, V = 2, 3, 5


@pytest.fixture(autouse=True)
def checks_that_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a value is only looked at, and waited for, under this flag."""
    monkeypatch.setenv("GSPO_KERNELS_DEBUG", "1")


def moved(given: dict[str, Any]) -> dict[str, Any]:
    """On the device, what can be."""
    return {name: on_device(x) if isinstance(x, Tensor) else x for name, x in given.items()}


def padded() -> dict[str, Any]:
    """Arguments on the CPU; `call` brings them to the device."""
    return {
        "logits": torch.arange(B * T * V).view(B, T, V).float(),
        "token_ids": torch.tensor([[0, 1, 2], [3, 4, 0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_logprobs": torch.full((B, T), -1.0),
        "mask": torch.tensor([[True, True, False], [True, True, True]]),
    }


def packed() -> dict[str, Any]:
    arrays = {name: x if name == "advantages" else x.flatten(0, 1) for name, x in padded().items()}
    return {**arrays, "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)}


def ids(*changes: tuple[int, int, int]) -> Tensor:
    x: Tensor = padded()["token_ids"]
    for row, column, value in changes:
        x[row, column] = value
    return x


Case = tuple[Callable[[], dict[str, Any]], dict[str, Any], type[Exception], str, str]  # ..., argument, what came

CASES: dict[str, Case] = {
    # logits
    "logits of integers": (padded, {"logits": torch.zeros(B, T, V).long()}, TypeError, "logits", "int64"),
    "logits of two dimensions": (padded, {"logits": torch.zeros(B * T, V)}, ValueError, "", "6"),
    "logits not a tensor": (padded, {"logits": [[0.0]]}, TypeError, "logits", "list"),
    "no vocabulary": (padded, {"logits": torch.zeros(B, T, 0)}, ValueError, "logits", "0"),
    # token_ids
    "token_ids too large": (padded, {"token_ids": ids((1, 2, V))}, ValueError, "token_ids", "5"),
    "token_ids negative": (padded, {"token_ids": ids((0, 1, -100))}, ValueError, "token_ids", "-100"),
    "token_ids huge": (padded, {"token_ids": ids((0, 0, 2**40))}, ValueError, "token_ids", "1.09951e+12|1099511627776"),
    "token_ids of floats": (padded, {"token_ids": torch.zeros(B, T)}, TypeError, "token_ids", "float32"),
    "token_ids of another shape": (padded, {"token_ids": torch.zeros(B, T + 1).long()}, ValueError, "token_ids", "4"),
    "token_ids transposed": (padded, {"token_ids": ids().t()}, ValueError, "token_ids", "3, 2"),
    "token_ids a list": (padded, {"token_ids": [[0]]}, TypeError, "token_ids", "list"),
    "packed token_ids too large": (
        packed,
        {"token_ids": torch.tensor([0, 9, 0, 0, 0, 0])},
        ValueError,
        "token_ids",
        "9",
    ),
    # advantages
    "advantages of another length": (padded, {"advantages": torch.ones(3)}, ValueError, "advantages", "3"),
    "advantages a row": (padded, {"advantages": torch.ones(1, B)}, ValueError, "advantages", "1, 2"),
    "advantages a number": (padded, {"advantages": 1.0}, TypeError, "advantages", "float"),
    "advantages with returns": (
        padded,
        {"advantages": gspo_kernels.GaeOutput(torch.ones(B, T), torch.ones(B, T))},
        TypeError,
        "advantages",
        "; pass its advantages",
    ),
    "advantages None": (padded, {"advantages": None}, TypeError, "advantages", "None"),
    "packed advantages": (packed, {"advantages": torch.ones(5)}, ValueError, "advantages", "5"),
    # token arrays
    "old_logprobs of another shape": (padded, {"old_logprobs": torch.ones(B)}, ValueError, "old_logprobs", "2"),
    "old_logprobs of the logits' shape": (
        padded,
        {"old_logprobs": torch.ones(B, T, V)},
        ValueError,
        "old_logprobs",
        "5",
    ),
    "old_logprobs a list": (padded, {"old_logprobs": [0.0]}, TypeError, "old_logprobs", "list"),
    "ref_logprobs of another shape": (padded, {"ref_logprobs": torch.ones(B, 2)}, ValueError, "ref_logprobs", "2, 2"),
    "weights of another shape": (padded, {"importance_weights": torch.ones(T)}, ValueError, "importance_weights", "3"),
    "mask of another shape": (padded, {"mask": torch.ones(B, 2).bool()}, ValueError, "mask", "2, 2"),
    "mask a list": (padded, {"mask": [True]}, TypeError, "mask", "list"),
    "mask complex": (padded, {"mask": torch.ones(B, T, dtype=torch.complex64)}, TypeError, "mask", "complex64"),
    # cu_seqlens
    "cu_seqlens missing": (packed, {"cu_seqlens": None}, ValueError, "cu_seqlens", "6|None"),
    "cu_seqlens with padded logits": (padded, {"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens", "2, 3"),
    "cu_seqlens not from 0": (packed, {"cu_seqlens": torch.tensor([1, 3, 6])}, ValueError, "cu_seqlens", "1, 3, 6"),
    "cu_seqlens decreasing": (
        packed,
        {"cu_seqlens": torch.tensor([0, 4, 3, 6]), "advantages": torch.ones(3)},
        ValueError,
        "cu_seqlens",
        "4, 3",
    ),
    "cu_seqlens too short": (packed, {"cu_seqlens": torch.tensor([0, 3, 5])}, ValueError, "cu_seqlens", "5"),
    "cu_seqlens too long": (packed, {"cu_seqlens": torch.tensor([0, 3, 7])}, ValueError, "cu_seqlens", "7"),
    "cu_seqlens float": (packed, {"cu_seqlens": torch.tensor([0.0, 3, 6])}, TypeError, "cu_seqlens", "float32"),
    "cu_seqlens a list": (packed, {"cu_seqlens": [0, 3, 6]}, TypeError, "cu_seqlens", "list"),
    "cu_seqlens empty": (packed, {"cu_seqlens": torch.zeros(0).int()}, ValueError, "cu_seqlens", "0"),
    "cu_seqlens of two dimensions": (packed, {"cu_seqlens": torch.zeros(1, 3).int()}, ValueError, "cu_seqlens", "1, 3"),
    # numbers
    "eps_low negative": (padded, {"eps_low": -0.1}, ValueError, "eps_low", "-0.1"),
    "eps_high negative": (padded, {"eps_high": -1e-4}, ValueError, "eps_high", "-0.0001"),
    "eps_low NaN": (padded, {"eps_low": math.nan}, ValueError, "eps_low", "nan"),
    "eps_high text": (padded, {"eps_high": "0.2"}, TypeError, "eps_high", "str"),
    "dual_clip negative": (padded, {"dual_clip": -3.0}, ValueError, "dual_clip", "-3"),
    "temperature zero": (padded, {"temperature": 0.0}, ValueError, "temperature", "0"),
    "temperature negative": (padded, {"temperature": -1.0}, ValueError, "temperature", "-1"),
    "temperature NaN": (padded, {"temperature": math.nan}, ValueError, "temperature", "nan"),
    "temperature text": (padded, {"temperature": "1"}, TypeError, "temperature", "str"),
    "temperature of another shape": (padded, {"temperature": torch.ones(B)}, ValueError, "temperature", "2"),
    "temperature by token, zero": (padded, {"temperature": torch.zeros(B, T)}, ValueError, "temperature", "0"),
    "temperature of integers": (padded, {"temperature": torch.ones(B, T).long()}, TypeError, "temperature", "int64"),
    "max_log_ratio negative": (padded, {"max_log_ratio": -1.0}, ValueError, "max_log_ratio", "-1"),
    "max_log_ratio infinite": (padded, {"max_log_ratio": math.inf}, ValueError, "max_log_ratio", "inf"),
    "group_tokens of parts": (
        padded,
        {"aggregation": "group_mean", "group_tokens": torch.ones(B)},
        ValueError,
        "group_tokens",
        "1 for sequence 0",
    ),
    "group_tokens that are group_ids": (
        padded,
        {"aggregation": "group_mean", "group_tokens": torch.zeros(B, dtype=torch.int64)},
        ValueError,
        "group_tokens",
        "0 for sequence 0",
    ),
    "beta NaN": (padded, {"beta": math.nan}, ValueError, "beta", "nan"),
    "beta without ref_logprobs": (padded, {"beta": 0.1}, ValueError, "ref_logprobs", "None"),
    "entropy_coef infinite": (padded, {"entropy_coef": math.inf}, ValueError, "entropy_coef", "inf"),
    "entropy_coef text": (padded, {"entropy_coef": "much"}, TypeError, "entropy_coef", "str"),
    "normalizer zero": (padded, {"normalizer": 0}, ValueError, "normalizer", "0"),
    "normalizer negative": (padded, {"normalizer": -4.0}, ValueError, "normalizer", "-4"),
    "normalizer a vector": (padded, {"normalizer": torch.ones(2)}, ValueError, "normalizer", "2"),
    "normalizer text": (padded, {"normalizer": "batch"}, TypeError, "normalizer", "str"),
    # choices
    "aggregation unknown": (padded, {"aggregation": "mean"}, ValueError, "aggregation", "mean"),
    "kl_estimator unknown": (padded, {"kl_estimator": "k4"}, ValueError, "kl_estimator", "k4"),
    "backend unknown": (padded, {"backend": "metal"}, ValueError, "backend", "metal"),
    "backend that cannot": (
        padded,
        {"backend": KERNELS, "logits": torch.zeros(B, T, V).double()},
        ValueError,
        "backend",
        "float64",
    ),
}


def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    given = moved(given)
    order = ("logits", "token_ids", "advantages", "old_logprobs")
    return function(*(given[name] for name in order), **{k: v for k, v in given.items() if k not in order})


def check_message(error: BaseException, argument: str, came: str) -> None:
    message = str(error)
    assert argument in message, f"does not name {argument}: {message}"
    assert "expected" in message, f"does not say what was expected: {message}"
    assert any(part in message for part in came.split("|")), f"does not say what came ({came}): {message}"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", CASES)
def test_losses_refuse(objective: str, case: str) -> None:
    base, change, kind, argument, came = CASES[case]
    if not change.keys() & FIELDS <= {each.name for each in fields(CLASSES[objective])}:
        pytest.skip("the objective has no such field")
    given = {**base(), **change}
    logits = given["logits"]
    before = None
    if isinstance(logits, Tensor) and logits.is_floating_point():
        before = on_device(logits.clone())
        given["logits"] = before.clone().requires_grad_() * 1  # not a leaf: it may be overwritten
    with pytest.raises(kind) as error:
        call(PUBLIC[objective], {**given, "overwrite_logits": before is not None})
    assert type(error.value) is kind
    check_message(error.value, argument, came)
    if before is not None:
        assert torch.equal(given["logits"], before), "the logits were written to before the error"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("base", [padded, packed], ids=["padded", "packed"])
def test_the_unchanged_call_is_accepted(objective: str, base: Callable[[], dict[str, Any]]) -> None:
    loss, _ = call(PUBLIC[objective], base())
    assert math.isfinite(float(loss))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_anything_is_fine_at_a_masked_position(objective: str) -> None:
    given = padded()
    loss, _ = call(PUBLIC[objective], given)
    for value in (-100, V, 2**40, -(2**62)):
        other, _ = call(PUBLIC[objective], {**given, "token_ids": ids((0, 2, value))})
        assert torch.equal(loss, other)
    for bad in (math.nan, math.inf, 0.0, -1.0):
        temperature = torch.ones(B, T)
        temperature[0, 2] = bad
        other, _ = call(PUBLIC[objective], {**given, "temperature": temperature})
        assert float(other) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.each_objective
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_engines_log_probabilities_are_refused_by_who_does_not_read_them(objective: str) -> None:
    given = {**padded(), "rollout_logprobs": padded()["old_logprobs"]}
    if CLASSES[objective].uses_rollout_logprobs:
        call(PUBLIC[objective], given)
        return
    with pytest.raises(ValueError, match="rollout_logprobs") as error:
        call(PUBLIC[objective], given)
    check_message(error.value, "rollout_logprobs", CLASSES[objective].__name__)


@pytest.mark.parametrize("base", [padded, packed], ids=["padded", "packed"])
def test_groups_and_their_mean_need_each_other(base: Callable[[], dict[str, Any]]) -> None:
    tokens = torch.full((B,), 6.0)
    call(gspo_kernels.gspo_loss, {**base(), "aggregation": "group_mean", "group_tokens": tokens})
    with pytest.raises(ValueError, match="group_tokens: expected None") as error:
        call(gspo_kernels.gspo_loss, {**base(), "group_tokens": tokens})
    check_message(error.value, "group_tokens", "sequence_mean")
    with pytest.raises(ValueError, match="group_tokens: expected how many") as error:
        call(gspo_kernels.gspo_loss, {**base(), "aggregation": "group_mean"})
    check_message(error.value, "group_tokens", "None")


@pytest.mark.parametrize("base", [padded, packed], ids=["padded", "packed"])
def test_gspo_names_gspo_token_for_advantages_by_token(base: Callable[[], dict[str, Any]]) -> None:
    given = base()
    with pytest.raises(ValueError, match="gspo_token_loss") as error:
        call(gspo_kernels.gspo_loss, {**given, "advantages": torch.ones(given["token_ids"].shape)})
    check_message(error.value, "advantages", "6" if base is packed else "2, 3")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("group", ["tp_group", "cp_group"])
def test_a_group_without_torch_distributed_is_refused(objective: str, group: str) -> None:
    """With it, see test_sharded_errors.py."""
    for value in (object(), "tp", 0):
        with pytest.raises(ValueError, match="see init_process_group") as error:
            call(PUBLIC[objective], {**padded(), group: value})
        check_message(error.value, f"{group}: expected None", "object object|got 'tp'|got 0")


def test_other_functions_refuse_a_group_without_torch_distributed() -> None:
    given = moved(padded())
    stats = gspo_kernels.gspo_loss(*(given[name] for name in ("logits", "token_ids", "advantages"))).stats
    mask, logprobs = given["mask"], given["old_logprobs"]
    calls: dict[str, Callable[[], object]] = {
        "tp_group": lambda: gspo_kernels.token_logprobs(given["logits"], given["token_ids"], tp_group=object()),
        "cp_group": lambda: gspo_kernels.policy_loss_from_logprobs(logprobs, given["advantages"], cp_group=object()),
        "group": lambda: stats.over(object()),
        "group: expected None": lambda: gspo_kernels.global_count(mask, group=object()),
        "cp_group: expected None": lambda: gspo_kernels.global_count(mask, cp_group=object()),
    }
    for argument, refused in calls.items():
        with pytest.raises(ValueError, match="see init_process_group") as error:
            refused()
        check_message(error.value, argument, "object object")
    with pytest.raises(TypeError, match="group: expected a process group"):
        stats.over(None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_start_without_a_group_is_refused(objective: str) -> None:
    with pytest.raises(ValueError, match="vocab_start: expected None without a tp_group") as error:
        call(PUBLIC[objective], {**padded(), "vocab_start": 0})
    check_message(error.value, "vocab_start", "got 0")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str)
def test_masks_of_any_real_dtype(objective: str, dtype: torch.dtype) -> None:
    given = padded()
    loss, _ = call(PUBLIC[objective], given)
    other, _ = call(PUBLIC[objective], {**given, "mask": given["mask"].to(dtype)})
    assert torch.equal(loss, other)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_cu_seqlens_of_both_widths(dtype: torch.dtype) -> None:
    given = packed()
    loss, _ = call(gspo_kernels.gspo_loss, given)
    other, _ = call(gspo_kernels.gspo_loss, {**given, "cu_seqlens": given["cu_seqlens"].to(dtype)})
    assert torch.equal(loss, other)


def test_no_sequence_for_some_rows_is_refused_by_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing reads the boundaries, and kernels would get arrays of no sequences."""
    monkeypatch.setattr("gspo_kernels.base.layout.may_read", lambda tensor: False)
    one_entry = {"cu_seqlens": torch.zeros(1, dtype=torch.int32), "advantages": torch.ones(0)}
    for old in (None, torch.full((6,), -1.0)):
        with pytest.raises(ValueError, match=r"cu_seqlens: expected boundaries that end at 6.*; got one entry"):
            call(gspo_kernels.gspo_loss, {**packed(), **one_entry, "old_logprobs": old})
    no_rows = {name: x if name in one_entry else x[:0] for name, x in packed().items()}
    loss, _ = call(gspo_kernels.gspo_loss, {**no_rows, **one_entry})
    assert float(loss) == 0.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_backend_that_cannot_run_says_why(objective: str) -> None:
    with pytest.raises(ValueError, match=rf"backend: .*'{KERNELS}'.*float64") as error:
        call(PUBLIC[objective], {**padded(), "logits": torch.zeros(B, T, V).double(), "backend": KERNELS})
    check_message(error.value, "backend", "float64")


# --- the other public functions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "argument", "came"),
    [
        ({"logits": torch.zeros(2, V).long()}, TypeError, "logits", "int64"),
        ({"token_ids": torch.tensor([0, V])}, ValueError, "token_ids", "5"),
        ({"token_ids": torch.tensor([-1, 0])}, ValueError, "token_ids", "-1"),
        ({"token_ids": torch.tensor([0])}, ValueError, "token_ids", "1"),
        ({"token_ids": torch.tensor([0.0, 1.0])}, TypeError, "token_ids", "float32"),
        ({"mask": torch.ones(3).bool()}, ValueError, "mask", "3"),
        ({"temperature": 0.0}, ValueError, "temperature", "0"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature", "-1"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature", "3"),
        ({"backend": "tpu"}, ValueError, "backend", "tpu"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_token_logprobs_refuses(change: dict[str, Any], kind: type[Exception], argument: str, came: str) -> None:
    given = {"logits": torch.zeros(2, V), "token_ids": torch.tensor([0, 1]), **change}
    with pytest.raises(kind) as error:
        gspo_kernels.token_logprobs(**moved(given))
    check_message(error.value, argument, came)


@pytest.mark.parametrize(
    ("keywords", "kind", "argument", "came"),
    [
        ({}, ValueError, "group_size", "None|neither"),
        ({"group_size": 2, "group_ids": torch.tensor([0, 0, 1, 1])}, ValueError, "group_ids", "both|2"),
        ({"group_size": 3}, ValueError, "group_size", "3"),
        ({"group_size": 0}, ValueError, "group_size", "0"),
        ({"group_size": 2.0}, TypeError, "group_size", "float"),
        ({"group_ids": torch.tensor([0, 1])}, ValueError, "group_ids", "2"),
        ({"group_ids": torch.zeros(4)}, TypeError, "group_ids", "float32"),
        ({"group_size": 2, "normalize": "max"}, ValueError, "normalize", "max"),
        ({"group_size": 2, "eps": -1.0}, ValueError, "eps", "-1"),
    ],
    ids=str,
)
def test_group_advantages_refuses(keywords: dict[str, Any], kind: type[Exception], argument: str, came: str) -> None:
    with pytest.raises(kind) as error:
        gspo_kernels.group_advantages(on_device(torch.arange(4.0)), **moved(keywords))
    check_message(error.value, argument, came)


@pytest.mark.parametrize(
    ("input_ids", "mask", "kind", "argument"),
    [
        (torch.zeros(4).long(), None, ValueError, "input_ids"),
        (torch.zeros(2, 4), None, TypeError, "input_ids"),
        (torch.zeros(2, 4).long(), torch.ones(2, 3).bool(), ValueError, "mask"),
    ],
    ids=["one dimension", "floats", "mask of another shape"],
)
def test_next_token_targets_refuses(
    input_ids: Tensor, mask: Tensor | None, kind: type[Exception], argument: str
) -> None:
    with pytest.raises(kind, match=argument):
        gspo_kernels.next_token_targets(input_ids, mask)
