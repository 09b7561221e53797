"""Generalized advantage estimation against the oracle's loop: the scan in torch, and the one in Triton."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import oracle
import pytest
import torch
from batches import from_padded, to_padded
from checks import check_close
from modes import DEFAULT_MODE, on_device, sized
from test_errors import check_message
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import gspo_kernels
from gspo_kernels.rollout import gae as module

LENGTHS = (9, 1, 0, 17, 8, 16, 3, 24, 5)  # around the interpreter's blocks of 8
FACTORS = [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.97, 0.0), (0.0, 0.5)]
by_layout = pytest.mark.parametrize("layout", ["padded", "packed"])


@dataclass(frozen=True)
class Case:
    lengths: Sequence[int]
    rewards: list[float]
    values: list[float]
    mask: list[bool]
    last_values: list[float]

    @property
    def sequences(self) -> list[range]:
        return [range(a, b) for a, b in itertools.pairwise([0, *itertools.accumulate(self.lengths)])]

    def expected(self, gamma: float, lam: float) -> tuple[list[float], list[float]]:
        return oracle.gae(self.rewards, self.values, self.sequences, self.mask, self.last_values, gamma, lam)


def case_of(lengths: Sequence[int] = LENGTHS, seed: int = 0, masked: float = 0.3) -> Case:
    """A prompt and gaps (tool output) are masked; the fifth sequence is all masked; every third is cut off."""
    rng = random.Random(seed)
    count, starts = sum(lengths), [0, *itertools.accumulate(lengths)]
    mask = [rng.random() >= masked for _ in range(count)]
    if len(lengths) > 4:
        mask[starts[4] : starts[5]] = [False] * lengths[4]

    def numbers(n: int, size: float) -> list[float]:
        return torch.tensor([rng.gauss(0, size) for _ in range(n)], dtype=torch.float32).tolist()

    last = [x if i % 3 == 0 else 0.0 for i, x in enumerate(numbers(len(lengths), 2.0))]
    return Case(lengths, numbers(count, 1.0), numbers(count, 3.0), mask, last)


def run(
    case: Case, layout: str, dtype: torch.dtype = torch.float32, rewards: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """Advantages and returns, [N] on the CPU; garbage wherever the mask is False."""
    garbage = itertools.cycle((math.nan, math.inf, -math.inf, 1e30))
    padded = layout == "padded"

    def tokens(values: Sequence[float]) -> Tensor:
        filled = [x if counts else next(garbage) for x, counts in zip(values, case.mask, strict=True)]
        return given(torch.tensor(filled, dtype=dtype), math.nan)

    def given(array: Tensor, fill: float) -> Tensor:
        return on_device(to_padded(array, case.lengths, fill) if padded else array)

    boundaries = on_device(torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32))
    found = gspo_kernels.gae(
        tokens(case.rewards) if rewards is None else on_device(rewards),
        tokens(case.values),
        mask=given(torch.tensor(case.mask, dtype=torch.bool), False),
        cu_seqlens=None if padded else boundaries,
        **{"last_values": on_device(torch.tensor(case.last_values, dtype=dtype)), **options},
    )
    results = []
    for x in found:
        assert x.dtype == dtype and not x.requires_grad
        inside, padding = from_padded(x.cpu(), case.lengths) if padded else (x.cpu(), x.new_zeros(1))
        assert bool((padding == 0).all())
        results.append(inside)
    return results


def check(case: Case, found: Sequence[Tensor], gamma: float, lam: float) -> None:
    """One rounding to the dtype, of numbers that are right in float64."""
    for name, actual, expected in zip(("advantages", "returns"), found, case.expected(gamma, lam), strict=True):
        truth = torch.tensor(expected, dtype=torch.float64)
        scale = max([abs(x) for x in (*case.values, *case.last_values)], default=1.0)
        digits = torch.finfo(actual.dtype).eps
        check_close(name, actual, truth, digits * truth.abs() + 1e-14 * scale * len(case.mask))


@by_layout
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_the_oracle(layout: str, factors: tuple[float, float], dtype: torch.dtype) -> None:
    case, (gamma, lam) = case_of(), factors
    check(case, run(case, layout, dtype, gamma=gamma, lam=lam), gamma, lam)


def test_padded_and_packed_are_the_same_bits() -> None:
    case = case_of(seed=1)
    for a, b in zip(run(case, "padded"), run(case, "packed"), strict=True):
        assert torch.equal(a, b)


@by_layout
def test_a_reward_per_sequence_is_given_at_its_last_unmasked_token(layout: str) -> None:
    case = case_of(seed=2)
    outcome = [float(i + 1) for i in range(len(case.lengths))]
    rewards = [0.0] * len(case.mask)
    for reward, rows in zip(outcome, case.sequences, strict=True):
        if counted := [t for t in rows if case.mask[t]]:
            rewards[counted[-1]] = reward
    case = replace(case, rewards=rewards)
    for dtype in (torch.float32, torch.int64):
        found = run(case, layout, rewards=torch.tensor(outcome).to(dtype), gamma=0.9)
        check(case, found, 0.9, 0.95)


def test_the_end_of_a_response_is_terminal_or_truncated() -> None:
    """By hand: gamma 0.5, lam 0.5, rewards 1 and 2, values 3 and 4; 8 is the value of the state after truncation."""
    rewards, values = (on_device(torch.tensor([x, x], dtype=torch.float32)) for x in ([1, 2], [3, 4]))
    last = on_device(torch.tensor([0.0, 8.0]))
    found = gspo_kernels.gae(rewards, values, gamma=0.5, lam=0.5, last_values=last)
    terminal, truncated = [2 - 4.0], [2 + 0.5 * 8 - 4.0]
    expected = [[1 + 0.5 * 4 - 3 + 0.25 * end[0], *end] for end in (terminal, truncated)]
    assert found.advantages.tolist() == expected
    assert torch.equal(found.returns, found.advantages + values)
    without = gspo_kernels.gae(rewards, values, gamma=0.5, lam=0.5)
    assert without.advantages.tolist() == [expected[0]] * 2, "terminal, where nothing else is said"


@by_layout
def test_masked_tokens_are_skipped_not_counted(layout: str) -> None:
    """The same numbers as without them."""
    case = case_of(seed=3)
    kept = [t for t in range(len(case.mask)) if case.mask[t]]
    lengths = [sum(case.mask[t] for t in rows) for rows in case.sequences]
    short = Case(lengths, [case.rewards[t] for t in kept], [case.values[t] for t in kept], [True] * len(kept),
                 case.last_values)  # fmt: skip
    for a, b in zip(run(case, layout, gamma=0.9), run(short, layout, gamma=0.9), strict=True):
        torch.testing.assert_close(a[kept], b, rtol=3e-7, atol=0)


@by_layout
@pytest.mark.parametrize("lam", [0.0, 0.95])
def test_nan_reaches_the_tokens_before_it_in_its_sequence_alone(layout: str, lam: float) -> None:
    case = case_of(masked=0.0)
    case = replace(case, mask=[True] * len(case.mask))
    at = case.sequences[3][5]
    case.values[at] = math.nan
    advantages, _ = run(case, layout, lam=lam)
    first = case.sequences[3][0] if lam else at - 1
    assert advantages.isnan().nonzero().flatten().tolist() == list(range(first, at + 1))


@by_layout
@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, 0.95), (0.9999, 0.9999)], ids=str)
def test_long_sequences_lose_no_digits(layout: str, factors: tuple[float, float]) -> None:
    """With lam = 1 a sum of 32,000 differences of values, which cancel to a return of 1."""
    case = case_of(sized((32_000, 700), (300, 40)), masked=0.1)
    case = replace(case, rewards=[x * 1e-3 for x in torch.tensor(case.rewards).tolist()],
                   values=torch.tensor([100 + x for x in case.values]).tolist())  # fmt: skip
    case = replace(case, rewards=torch.tensor(case.rewards).tolist())
    found = run(case, layout, gamma=factors[0], lam=factors[1])
    check(case, found, *factors)


@by_layout
def test_the_same_bits_each_time(layout: str) -> None:
    case = case_of(seed=4)
    first, second = run(case, layout), run(case, layout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("lengths", [(), (0, 0), (3,)])
@by_layout
def test_little_or_nothing(layout: str, lengths: tuple[int, ...]) -> None:
    case = replace(case_of(lengths), mask=[False] * sum(lengths))
    assert all(bool((x == 0).all()) for x in run(case, layout))


def test_constants_without_gradient_and_inputs_left_alone() -> None:
    values = on_device(torch.randn(2, 5)).requires_grad_()
    rewards, before = on_device(torch.randn(2, 5)), values.detach().clone()
    found = gspo_kernels.gae(rewards, values)
    assert not found.advantages.requires_grad and not found.returns.requires_grad
    assert torch.equal(values, before)


@DEFAULT_MODE
@pytest.mark.plain_memory
def test_under_torch_compile_new_lengths_and_factors_compile_nothing() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(gspo_kernels.gae, fullgraph=True, backend=counter)
    for length, lam in ((7, 0.95), (9, 0.9), (30, 0.5)):
        rewards, values = torch.randn(3, length), torch.randn(3, length)
        found, expected = compiled(rewards, values, lam=lam), gspo_kernels.gae(rewards, values, lam=lam)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counter.frame_count <= 2, "lengths and factors are inputs after the first change of them"


# --- refusals ---------------------------------------------------------------------------------------------------------

V = torch.zeros(2, 3)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "values in bf16": ({"values": V.bfloat16()}, TypeError, "values", "bfloat16"),
    "values of a model's output": ({"values": [[0.0]]}, TypeError, "values", "list"),
    "values with a last dimension of 1": ({"values": V[..., None]}, ValueError, "values", "[2, 3, 1]"),
    "rewards of another shape": ({"rewards": torch.zeros(3)}, ValueError, "rewards", "[3]"),
    "rewards in half precision": ({"rewards": V.half()}, TypeError, "rewards", "float16"),
    "a last value per token": ({"last_values": V}, ValueError, "last_values", "[2, 3]"),
    "gamma above 1": ({"gamma": 1.5}, ValueError, "gamma", "1.5"),
    "lam below 0": ({"lam": -0.1}, ValueError, "lam", "-0.1"),
    "packed without boundaries": ({"values": V[0], "rewards": V[0]}, ValueError, "cu_seqlens", "None"),
    "mask of another shape": ({"mask": torch.ones(2, 2)}, ValueError, "mask", "[2, 2]"),
}


@DEFAULT_MODE
@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, kind, argument, came = REFUSED[case]
    with pytest.raises(kind) as caught:
        gspo_kernels.gae(**{"rewards": V, "values": V, **change})
    check_message(caught.value, argument, came)


# --- mutants ----------------------------------------------------------------------------------------------------------


def forgets_the_next_value(inputs: Any, segments: Any) -> Any:
    return module._scan_in_torch(inputs._replace(last_values=None), segments)


def counts_masked_tokens(inputs: Any, segments: Any) -> Any:
    clean = [torch.where(inputs.mask, x, 0.0) for x in (inputs.rewards, inputs.values)]
    return module._scan_in_torch(inputs._replace(rewards=clean[0], values=clean[1], mask=None), segments)


def crosses_boundaries(inputs: Any, segments: Any) -> Any:
    whole = segments._replace(
        boundaries=segments.boundaries[[0, -1]], sequence_of=torch.zeros_like(segments.sequence_of)
    )
    return module._scan_in_torch(inputs, whole)


def in_float32(inputs: Any, segments: Any) -> Any:
    """The textbook's sum of temporal differences, in float32."""
    values, rewards = inputs.values.reshape(-1), inputs.rewards.reshape(-1)
    following = torch.cat([values[1:], values.new_zeros(1)])
    following[segments.boundaries[1:] - 1] = 0
    delta = rewards + following - values
    found = torch.zeros_like(values)
    for a, b in itertools.pairwise(segments.boundaries.tolist()):
        found[a:b] = delta[a:b].flip(0).cumsum(0).flip(0)
    return module.GaeOutput(found, found + values)


@DEFAULT_MODE
@pytest.mark.parametrize("mutant", [forgets_the_next_value, counts_masked_tokens, crosses_boundaries])
def test_mutants_are_rejected(mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_scan_in_triton", mutant)
    monkeypatch.setattr(module, "_runs_triton", lambda device: True)
    case = case_of()
    with pytest.raises(AssertionError):
        check(case, run(case, "packed", gamma=0.99, lam=0.9), 0.99, 0.9)


@DEFAULT_MODE
def test_a_sum_in_float32_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of((4000,), masked=0.0)
    case = replace(case, values=torch.tensor([100 + x for x in case.values]).tolist(), last_values=[0.0])
    check(case, run(case, "packed", gamma=1.0, lam=1.0), 1.0, 1.0)
    monkeypatch.setattr(module, "_scan_in_triton", in_float32)
    monkeypatch.setattr(module, "_runs_triton", lambda device: True)
    with pytest.raises(AssertionError):
        check(case, run(case, "packed", gamma=1.0, lam=1.0), 1.0, 1.0)


@DEFAULT_MODE
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_for_gpus(capability: int) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gspo_kernels.rollout.triton_gae import gae_kernel

    outcome = capability == 80  # one of the two ways to call it
    constants: dict[str, Any] = {"REWARDS_PER_TOKEN": not outcome, "BLOCK": module.LAUNCH.elements}
    constants |= dict.fromkeys(["mask", "last_values"] if outcome else [])
    types = {"mask": "*u8", "boundaries": "*i64", "gamma": "*fp64", "lam": "*fp64"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in gae_kernel.arg_names}
    source = ASTSource(fn=gae_kernel, signature=signature, constexprs=constants, attrs={})
    options = {"num_warps": module.LAUNCH.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"] and ".local" not in compiled.asm["ptx"]
