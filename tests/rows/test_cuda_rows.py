"""The CUDA kernel by way of the public losses, against the oracle: on a GPU, or as threads of this machine.

What the kernel's text can get wrong by itself is test_gpu_on_host.py's; here it is what Python hands to it, and the one
pass that a loss with a ratio per token takes only here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cuda_module
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from batches import LAYOUTS, OBJECTIVES, SHORT, arguments, edge_batch, ragged_batch, run
from checks import check_close, check_outcome, run_and_check
from linear import Identity
from modes import DEVICE, GPU, ON_GPU, TRITON_MODES, on_device
from test_losses import OPTIONS
from torch import Tensor

import gspo_kernels
from gspo_kernels import grpo_loss, gspo_loss
from gspo_kernels.losses import fused_loss
from gspo_kernels.losses.objectives import RowSlope
from gspo_kernels.rows import cuda_rows, dispatch
from gspo_kernels.rows.types import Rows, TokenSlope, Upstream

pytestmark = TRITON_MODES
NOT_ON_GPU = pytest.mark.skipif(ON_GPU, reason="asks the stand-in for CUDA's runtime, which a GPU does not need")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that has them, as the package sees it."""
    if ON_GPU:
        reasons = cuda_rows.unsupported_reasons(torch.empty(1, 1, 8, device=DEVICE))
        if reasons:
            pytest.skip(f"the CUDA kernels do not run here: {'; '.join(reasons)}")
        yield cuda_rows._native
        return
    module = cuda_module.on_host()
    monkeypatch.setattr(cuda_rows, "_native", module)
    forget()
    yield module
    module.set_machine()
    forget()


def forget() -> None:
    cuda_rows._unavailable_reason.cache_clear()
    dispatch._warn_once.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each launch of the kernel whether it computed slopes."""
    seen: list[bool] = []
    launch = cuda_rows.forward_backward

    def counted(rows: Any, upstream: Any, gradient: Tensor, slope: Any = None) -> Any:
        seen.append(slope is not None)
        return launch(rows, upstream, gradient, slope)

    monkeypatch.setattr(cuda_rows, "forward_backward", counted)
    return seen


CLIP_OPTIONS = [  # of the options: what a token's coefficient or clip depends on, and what takes the one pass away
    *("defaults", "token mean", "normalizer", "dual clip", "saturation", "sequence weights", "token weights"),
    *("temperature by token", "ref without beta", "k3", "entropy", "softcap"),
]
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_token_objective = pytest.mark.parametrize("objective", ["grpo", "ppo"])


@pytest.mark.parametrize(
    ("objective", "layout", "option"),
    [(("grpo", "ppo")[k % 2], LAYOUTS[k // 2 % len(LAYOUTS)], option) for k, option in enumerate(CLIP_OPTIONS)],
)
def test_a_ratio_per_token(objective: str, layout: str, option: str, launches: list[bool]) -> None:
    """In one pass, clipped by the kernel, unless a term needs the log-probabilities or entropies first."""
    build, options = OPTIONS[option]
    run_and_check(ragged_batch(objective, seed=31, **build), layout, objective, backend="cuda", **options)
    assert launches == ([] if "beta" in options or "entropy_coef" in options else [True])


@pytest.mark.parametrize("objective", OBJECTIVES)
@by_layout
@pytest.mark.parametrize("option", ["on-policy", "ref without beta, on-policy", "softcap, on-policy", "all, on-policy"])
def test_on_policy(objective: str, layout: str, option: str, launches: list[bool]) -> None:
    build, options = OPTIONS[option]
    run_and_check(ragged_batch(objective, seed=32, **build), layout, objective, backend="cuda", **options)
    assert launches == ([] if option.startswith("all") else [False])


@pytest.mark.parametrize("objective", ["gspo", "gspo_token"])
@by_layout
def test_a_ratio_per_sequence_is_left_to_triton(objective: str, layout: str, launches: list[bool]) -> None:
    run_and_check(ragged_batch(objective, seed=33), layout, objective, backend="cuda")
    assert launches == []


@by_token_objective
@by_layout
@pytest.mark.parametrize("option", ["defaults", "dual clip", "token weights", "normalizer, token mean"])
def test_advantages_by_token(objective: str, layout: str, option: str, launches: list[bool]) -> None:
    build, options = OPTIONS[option]
    batch = ragged_batch(objective, seed=34, by_token=True, **build)
    run_and_check(batch, layout, objective, backend="cuda", **options)
    assert launches == [True]


@pytest.mark.parametrize("weights", ["sequence", "token"])
@by_layout
def test_weights_below_zero(weights: str, layout: str) -> None:
    """The clip goes by the sign of the advantage, which the coefficient then has not."""
    batch = ragged_batch("grpo", seed=35, weights=weights)
    assert batch.weights is not None
    batch.weights = -batch.weights
    run_and_check(batch, layout, "grpo", backend="cuda")


@by_token_objective
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_dtypes_and_a_factor(objective: str, dtype: torch.dtype, on_policy: bool, launches: list[bool]) -> None:
    """A gradient that is there before its factor is rounded twice in bf16; in fp16 there is no such thing."""
    batch = ragged_batch(objective, seed=36, vocab=301, dtype=dtype, on_policy=on_policy)
    outcome = run(batch, "packed", objective, upstream=-2.5, backend="cuda")
    check_outcome(outcome, batch, objective, upstream=-2.5, roundings=2)
    assert launches == ([] if dtype is torch.float16 else [not on_policy])


def test_advantages_in_float64(launches: list[bool]) -> None:
    batch = ragged_batch("gspo", seed=43, lengths=SHORT, on_policy=True)
    batch.advantages = batch.advantages.double()
    run_and_check(batch, "padded", "gspo", backend="cuda")
    assert launches == [False]


def test_under_the_stage_in_torch(launches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an objective without a term in Triton. That stage takes two passes on a GPU: of Triton's rows."""
    monkeypatch.setattr(fused_loss, "unsupported_reason", lambda *_: "GSPO has no triton_term")
    batch = ragged_batch("gspo", seed=43, lengths=SHORT, on_policy=True)
    run_and_check(batch, "padded", "gspo", backend="cuda")
    assert launches == ([] if ON_GPU else [False])


@pytest.mark.parametrize("vocab", [1, 7, 64, 773, 2601])
@by_layout
def test_vocabularies(vocab: int, layout: str) -> None:
    """Of one block, and of a cluster; odd ones, whose rows begin anywhere."""
    batch = ragged_batch("grpo", seed=37, vocab=vocab, lengths=(3, 0, 2))
    run_and_check(batch, layout, "grpo", backend="cuda")


@pytest.mark.parametrize("side", ["low", "high"])
def test_on_the_edge_of_the_clip(side: str) -> None:
    """3e-8 from it, where a ratio in fp32 has no digits left."""
    run_and_check(edge_batch("gspo_token", side), "packed", "grpo", backend="cuda", eps_low=3e-4, eps_high=4e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_over_the_logits_with_padding_columns(dtype: torch.dtype) -> None:
    """The gradient is written over the logits of a view; columns beyond the vocabulary become zero."""
    batch = ragged_batch("grpo", seed=38, vocab=333, dtype=dtype, lengths=(3, 4, 2))
    args = arguments(batch, "padded")
    plain = args.logits.detach().clone().requires_grad_()
    grpo_loss(plain, *args.rest, **args.keywords, backend="cuda").loss.backward()
    wide = torch.full((*args.logits.shape[:-1], 345), 7.0, dtype=dtype, device=DEVICE)
    wide[..., :333] = args.logits.detach()
    memory = wide.requires_grad_() * 1
    out = grpo_loss(memory, *args.rest, **args.keywords, backend="cuda", vocab_size=333, overwrite_logits=True)
    out.loss.backward()
    assert torch.equal(memory.detach()[..., :333], plain.grad)
    assert bool((memory.detach()[..., 333:] == 0).all())


def test_a_second_backward_is_refused() -> None:
    args = arguments(ragged_batch("grpo", seed=39), "packed")
    loss = grpo_loss(args.logits, *args.rest, **args.keywords, backend="cuda").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="supports one backward pass"):
        loss.backward()


def test_the_same_bits_again() -> None:
    """Clusters share rows out as they get done, which no number depends on."""
    args = arguments(ragged_batch("grpo", seed=40, vocab=901, dtype=torch.bfloat16), "packed")
    found = []
    for _ in range(2):
        leaf = args.logits.detach().clone().requires_grad_()
        out = grpo_loss(leaf, *args.rest, **args.keywords, backend="cuda")
        out.loss.backward()
        assert leaf.grad is not None
        found.append((out.loss.detach(), out.stats.logprobs, leaf.grad))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@dataclasses.dataclass(frozen=True)
class NumpyBounds(gspo_kernels.GRPO):
    def row_slope(self) -> RowSlope:
        low, high = np.float32(-0.2), np.float32(0.27)
        return RowSlope([-math.inf, high], [low, np.float32(math.inf)], "drop")  # type: ignore[arg-type]


def test_bounds_may_be_numbers_of_numpy(launches: list[bool]) -> None:
    args = arguments(ragged_batch("grpo", seed=41), "packed")
    losses = [
        gspo_kernels.policy_loss(args.logits, *args.rest, **args.keywords, backend="cuda", objective=objective).loss
        for objective in (NumpyBounds(), gspo_kernels.GRPO())
    ]
    gradients = [torch.autograd.grad(loss, args.logits)[0] for loss in losses]
    torch.testing.assert_close(*gradients)
    assert launches == [True, True]


@pytest.mark.parametrize("bad", ["NaN", "all -inf"])
def test_a_row_without_a_distribution_is_not_hidden(bad: str) -> None:
    logits = on_device(torch.randn(3, 40))
    if bad == "NaN":
        logits[1, 5] = torch.nan
    else:
        logits[1] = -torch.inf
    ids, old = on_device(torch.tensor([1, 2, 3])), on_device(torch.full((3,), -3.0))
    leaf, boundaries = logits.requires_grad_(), on_device(torch.tensor([0, 2, 3]))
    out = grpo_loss(leaf, ids, on_device(torch.ones(2)), old, cu_seqlens=boundaries, backend="cuda")
    out.loss.backward()
    assert leaf.grad is not None and bool(out.loss.isnan())
    assert leaf.grad.isnan().all(1).tolist() == leaf.grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("masked", [False, True], ids=["no advantage", "masked"])
def test_a_nan_in_a_row_without_a_gradient(masked: bool, on_policy: bool) -> None:
    """Masked, it has no effect. In an active row it makes the loss and the row NaN, for any advantage."""
    logits = on_device(torch.randn(3, 40))
    logits[1, 5] = torch.nan
    ids, old = on_device(torch.tensor([1, 2, 3])), on_device(torch.full((3,), -3.0))
    leaf, boundaries = logits.requires_grad_(), on_device(torch.tensor([0, 1, 2, 3]))
    arguments = (leaf, ids, on_device(torch.tensor([1.0, 0.0, -1.0])), None if on_policy else old)
    mask = on_device(torch.tensor([True, not masked, True]))
    out = grpo_loss(*arguments, mask=mask, cu_seqlens=boundaries, backend="cuda", eps_low=9.0, eps_high=9.0)
    out.loss.backward()
    assert leaf.grad is not None and bool(out.loss.isnan()) is not masked
    assert bool((leaf.grad[1] == 0).all() if masked else leaf.grad[1].isnan().all())
    assert bool((leaf.grad[[0, 2]].isfinite() & (leaf.grad[[0, 2]] != 0)).all())


@pytest.mark.parametrize("objective", ["gspo", "grpo"])
def test_from_hidden_states(objective: str, launches: list[bool]) -> None:
    """Triton computes its rows, for every gradient."""
    for on_policy in (True, False):
        batch = ragged_batch(objective, seed=42, lengths=SHORT, on_policy=on_policy)
        function = Identity(objective)
        outcome = run(batch, "packed", objective, function=function, backend="cuda")
        check_outcome(outcome, batch, objective, roundings=2)
        function.check_gradients(outcome, batch)
    assert launches == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_where_autograd_calls_it(reentrant: bool, launches: list[bool]) -> None:
    """Under checkpointing the loss runs again in the backward; on a GPU that is another thread than the caller's."""
    args = arguments(ragged_batch("grpo", seed=44, vocab=901), "packed")

    def loss(logits: Tensor) -> Tensor:
        found: Tensor = grpo_loss(logits * 1.0, *args.rest, **args.keywords, backend="cuda").loss
        return found

    leaves = [args.logits.detach().clone().requires_grad_() for _ in range(2)]
    loss(leaves[0]).backward()
    torch.utils.checkpoint.checkpoint(loss, leaves[1], use_reentrant=reentrant).backward()
    assert launches == [True] * (2 if reentrant else 3)
    assert leaves[0].grad is not None and leaves[1].grad is not None and torch.equal(leaves[0].grad, leaves[1].grad)


@GPU
def test_it_respects_stream_and_device() -> None:
    args = arguments(ragged_batch("grpo", seed=41, vocab=5001), "packed")
    expected = args.logits.detach().clone().requires_grad_()
    grpo_loss(expected, *args.rest, **args.keywords, backend="cuda").loss.backward()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        leaf = args.logits.detach().clone().requires_grad_()
        grpo_loss(leaf, *args.rest, **args.keywords, backend="cuda").loss.backward()
    stream.synchronize()
    assert leaf.grad is not None and expected.grad is not None and torch.equal(leaf.grad, expected.grad)


# --- the slope of a row's loss, by the kernel alone -------------------------------------------------------------------

ALL = (-math.inf, math.inf)


class Slopes(NamedTuple):
    """An objective: its numbers for the kernel, and dL/dlogprob in float64 from the formula of its paper."""

    numbers: dict[str, Any]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]  # of log-ratios, advantages, and how far the policy has moved


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=20.0).exp()


def _grpo(r: Tensor, a: Tensor, _: Tensor) -> Tensor:
    w = _ratio(r)
    held = torch.where(a > 0, w > 1.27, (w < 0.8) | (w > 3.0)) | (r > 20.0)
    return torch.where(held, 0.0, -w * a)


def _dppo(r: Tensor, a: Tensor, moved: Tensor) -> Tensor:
    outside = torch.where(a > 0, moved > 0.1, moved < -0.05)
    return torch.where(outside, 0.0, -_ratio(r).clamp(max=4.0) * a)


_DPPO = {"positive": (-math.inf, 0.1), "negative": (-0.05, math.inf), "max_weight": 4.0}
SLOPES = {
    "GRPO": Slopes({"positive": (-math.inf, 0.27), "negative": (-0.2, 2.0)}, _grpo),
    "CISPO": Slopes(
        {"positive": (-0.3, 0.4), "negative": (-0.3, 0.4), "outside": "hold"},
        lambda r, a, _: -_ratio(r).clamp(0.7, 1.4) * a,
    ),
    "TOPR": Slopes(
        {"positive": (0.0, 0.0), "negative": (-1.0, 0.0), "outside": "hold"},
        lambda r, a, _: -torch.where(a > 0, 1.0, _ratio(r).clamp(max=1.0)) * a,
    ),
    "DRO": Slopes(
        {"positive": (0.0, 0.0), "negative": (0.0, 0.0), "outside": "hold", "penalty": 0.05},
        lambda r, a, _: -a + 0.05 * torch.where(r.abs() > 20.0, 0.0, r),
    ),
    "DPPO by TV": Slopes({**_DPPO, "measure": "tv"}, _dppo),
    "DPPO by KL": Slopes({**_DPPO, "measure": "kl"}, _dppo),
    "no bound": Slopes({}, lambda r, a, _: torch.where(r > 20.0, 0.0, -_ratio(r) * a)),
}


def _moved(measure: str, logprobs: Tensor, rollout: Tensor) -> Tensor:
    pi, mu = logprobs.exp(), rollout.exp()
    divergence = mu * (rollout - logprobs) + torch.log((1 - mu) / (1 - pi)) * (1 - mu)
    return pi - mu if measure == "tv" else torch.where(pi < mu, -divergence, divergence)


@pytest.mark.parametrize("rollouts", [False, True], ids=["old", "rollout"])
@pytest.mark.parametrize("name", SLOPES)
def test_the_slope_of_a_row(name: str, rollouts: bool, kernels: Any) -> None:
    """Against float64: ratios on both sides of all bounds, tokens of all probabilities, advantages of 0, -inf."""
    numbers, slope = SLOPES[name]
    numbers = {"positive": ALL, "negative": ALL, "outside": "drop", "measure": "ratio", **numbers}
    numbers = {"max_weight": math.inf, "penalty": 0.0, "max_log_ratio": 20.0, **numbers}
    steps = [0.0, 0.1, 0.3, 0.5, 1.7, 25.0, -0.15, -0.5, -30.0]
    step, shift, a = torch.tensor(list(itertools.product(steps, [0.0, 0.3, -0.3], [1.5, -1.5, 0.0]))).double().unbind(1)
    n, vocab = len(a), 45
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(n, vocab, generator=generator) * 2, torch.arange(n) * 5 % 7
    logits[:, 7] = -torch.inf
    logits[torch.arange(n), ids] += torch.tensor([0.0, 4.0, 8.0]).repeat_interleave(9)[torch.arange(n) % 27]
    logprobs = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    old = (logprobs - step).float().clamp(max=-1e-6)
    rollout = (logprobs.exp() + shift).clamp(1e-6, 1 - 1e-6).log().float() if rollouts else old
    weights, mask = torch.rand(n, generator=generator) + 0.5, torch.arange(n) % 11 != 4
    weights[::13] = 0.0

    of_kernel = (on_device(x[None]) for x in (old, a.float(), rollout))
    of_rows = TokenSlope(*of_kernel, **numbers)
    if not rollouts:
        of_rows = of_rows._replace(rollout_logprobs=None)
    rows = Rows(*(on_device(x[None]) for x in (logits, ids, mask)), torch.tensor(1.0, dtype=torch.float64), vocab)
    gradient = torch.empty_like(rows.logits)
    upstream = Upstream(on_device(weights[None]), counts=on_device(torch.full((2,), 2.0)))
    cuda_rows.forward_backward(rows, upstream, gradient, of_rows)

    slopes = slope(logprobs - old.double(), a, _moved(of_rows.measure, logprobs, rollout.double()))
    slopes = torch.where(mask & (weights != 0), slopes * weights / 4, 0.0)
    share = torch.nn.functional.one_hot(ids, vocab) - logits.double().softmax(-1)
    rounding = slopes.abs() + 0.1 * of_rows.penalty  # of the log-probabilities; a small log-ratio has it, too
    bound = 2e-6 * rounding * (1 + logprobs.abs())
    check_close("gradient", gradient[0], slopes[:, None] * share, bound[:, None])


@pytest.mark.parametrize("of", ["advantages", "old_logprobs", "rollout_logprobs"])
def test_a_nan_of_a_slope(of: str, kernels: Any) -> None:
    """Is not hidden by a slope that is dropped; a row without a weight does not see it."""
    logits, arrays = torch.zeros(1, 3, 4), {name: torch.full((1, 3), -9.0) for name in TokenSlope._fields[:3]}
    arrays[of][0, :2] = torch.nan
    rows = Rows(on_device(logits), on_device(torch.ones(1, 3, dtype=torch.int64)), None, torch.tensor(1.0).double(), 4)
    upstream = Upstream(on_device(torch.tensor([[1.0, 0.0, 1.0]])))
    arrays = {name: on_device(x) for name, x in arrays.items()}
    slope = TokenSlope(
        **arrays, max_log_ratio=20.0, positive=ALL, negative=(-0.1, 0.1), outside="drop", measure="tv", max_weight=5.0,
        penalty=0.0,
    )  # fmt: skip
    gradient = torch.empty_like(rows.logits)
    cuda_rows.forward_backward(rows, upstream, gradient, slope)
    first, *others = gradient[0]
    assert bool(first.isnan().all()) and all(bool((x == 0).all()) for x in others)


# --- which kernels run, and what is said where they cannot ------------------------------------------------------------

LOGITS = torch.zeros(1, 3, 16, device=DEVICE)


def a_loss(backend: str | None = "cuda") -> None:
    leaf = LOGITS.clone().requires_grad_()
    ids = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    gspo_loss(leaf, ids, torch.ones(1, device=DEVICE), backend=backend).loss.backward()


def test_unmeasured_hardware_runs_triton_and_explain_says_so(
    launches: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_rows, "FASTER_ON", frozenset())
    a_loss(None)
    assert launches == []
    first, *others = gspo_kernels.explain(LOGITS).splitlines()
    assert first.startswith("triton")
    assert any(line.startswith("cuda") and "not measured to be faster" in line for line in others)
    assert gspo_kernels.explain(LOGITS, backend="cuda").startswith("cuda (CUDA C++, ")


def test_where_it_was_measured_to_be_faster_it_is_the_default(
    launches: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = torch.cuda.get_device_name(DEVICE) if ON_GPU else "this machine's threads"
    monkeypatch.setattr(cuda_rows, "FASTER_ON", frozenset({name}))
    a_loss(None)
    assert launches == [False]
    assert gspo_kernels.explain(LOGITS).startswith("cuda")


def test_rows_off_a_boundary_run_by_triton_unless_it_is_named(
    launches: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row has the same bits in every batch: where V is odd, its address differs from batch to batch."""
    name = torch.cuda.get_device_name(DEVICE) if ON_GPU else "this machine's threads"
    monkeypatch.setattr(cuda_rows, "FASTER_ON", frozenset({name}))
    whole = torch.zeros(2, 4, 20, device=DEVICE)
    for logits in (whole, whole[:, :-1], whole[..., 4:]):
        assert gspo_kernels.explain(logits).startswith("cuda")
    for logits in (whole[..., 3:], torch.zeros(1, 1, 17, device=DEVICE), whole.bfloat16()):
        assert gspo_kernels.explain(logits).startswith("triton")
    lines = gspo_kernels.explain(whole[..., 3:]).splitlines()
    assert any(line.startswith("cuda") and "16-byte" in line for line in lines)
    assert launches == []


@NOT_ON_GPU
def test_a_failure_of_cuda_is_an_exception_with_its_words(kernels: Any) -> None:
    kernels.fail_next(function="cudaLaunchKernelEx", error=719)
    with pytest.raises(RuntimeError, match=r"one_read, float32: unspecified launch failure"):
        a_loss()
    assert kernels.last_error() == 0  # or the next caller, torch perhaps, would get the error
    a_loss()


@NOT_ON_GPU
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"driver": 12080}, "the driver is for CUDA 12.8 and the kernels were built with 13.0"),
        ({"driver": 0}, "there is no NVIDIA driver"),
    ],
)
def test_a_build_that_does_not_fit_the_driver(kernels: Any, settings: dict[str, int], said: str) -> None:
    kernels.set_machine(**settings)
    forget()
    assert said in gspo_kernels.explain(LOGITS)
    with pytest.raises(ValueError, match="backend: expected one that takes these logits; got 'cuda', but"):
        a_loss()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        a_loss(None)
        a_loss(None)
    assert sum(said in str(w.message) for w in caught) == 1


@NOT_ON_GPU
def test_a_gpu_that_the_build_has_no_code_for(kernels: Any) -> None:
    kernels.fail_next(function="cudaFuncGetAttributes", error=209)
    forget()
    assert "CUDA cannot load them: no kernel image is available" in gspo_kernels.explain(LOGITS)


@NOT_ON_GPU
def test_how_a_launch_is_laid_out(kernels: Any) -> None:
    """A cluster where there are any, and its row fits; else a block of its own for each multiprocessor."""
    ask = {"dtype": "bfloat16", "vocab": 1000, "rows": 10**6, "device": 0}
    assert kernels.cuda_layout(**ask)["resident"] and kernels.cuda_layout(**ask)["blocks"] == 8
    assert kernels.cuda_layout(**{**ask, "vocab": 3})["blocks"] == 2, "st.async needs another block in the cluster"
    kernels.set_machine(active_clusters=0)
    assert not kernels.cuda_layout(**{**ask, "vocab": 1002})["resident"]
    kernels.set_machine(major=8, minor=0)
    again = kernels.cuda_layout(**{**ask, "vocab": 1001})  # answers are kept for each vocabulary
    assert not again["resident"] and again["blocks"] == 1


@pytest.fixture
def variant(request: pytest.FixtureRequest, kernels: Any) -> Iterator[str]:
    """In use while the test runs. Skipped on a GPU whose build has only the default."""
    name: str = request.param
    if name not in kernels.cuda_variants():
        pytest.skip("built without GSPO_CUDA_VARIANTS=1")
    kernels.cuda_use_variant(name=name)
    yield name
    kernels.cuda_use_variant(name="default")


@pytest.mark.parametrize("variant", ["four blocks of 256"], indirect=True)
def test_variants(variant: str, launches: list[bool]) -> None:
    """Rows with clusters, clipped and masked, at addresses of every alignment."""
    batch = ragged_batch("grpo", seed=45, vocab=773, lengths=(3, 0, 2), dtype=torch.bfloat16)
    outcome = run(batch, "padded", "grpo", backend="cuda")
    check_outcome(outcome, batch, "grpo", roundings=2)
    assert launches == [True]


def test_variants_have_names(kernels: Any) -> None:
    assert kernels.cuda_variants()[0] == "default"
    with pytest.raises(ValueError, match=r"name: expected a variant of this build, 'default'.*; got 'fast'"):
        kernels.cuda_use_variant(name="fast")


@NOT_ON_GPU
def test_a_variant_has_its_own_layout(kernels: Any) -> None:
    ask = {"dtype": "bfloat16", "vocab": 1003, "rows": 10**6, "device": 0}
    default = kernels.cuda_layout(**ask)
    kernels.cuda_use_variant(name="four blocks of 256")
    other = kernels.cuda_layout(**ask)
    kernels.cuda_use_variant(name="default")
    assert (default["threads"], other["threads"]) == (96, 64)  # for 160, an odd number of warps, and 256
    assert kernels.cuda_layout(**ask) == default


@NOT_ON_GPU
def test_a_multiprocessor_prefers_shared_memory(kernels: Any) -> None:
    """Five slices of 38 KB are more than a driver might set apart."""
    run_and_check(ragged_batch("grpo", seed=46, vocab=1009, lengths=SHORT), "packed", "grpo", backend="cuda")
    launch = kernels.latest_launch()
    assert launch["cluster"] == 8 and launch["carveout"] == 100


def test_an_empty_array_has_no_ticket(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch without sequences passes an empty array; the kernel still needs a counter."""
    seen: list[dict[str, Any]] = []
    launch = kernels.cuda_one_read
    monkeypatch.setattr(kernels, "cuda_one_read", lambda **keywords: seen.append(keywords))
    logits = on_device(torch.randn(1, 2, 40))
    ids, mask = on_device(torch.tensor([[1, 2]])), None
    rows = Rows(logits, ids, mask, on_device(torch.tensor(1.0)), logits.shape[-1])
    empty, ones = on_device(torch.zeros(0)), on_device(torch.ones(1, 2))
    upstream, gradient = Upstream(ones, counts=empty, tickets=empty), torch.empty_like(logits)
    stats = cuda_rows.forward_backward(rows, upstream, gradient)
    assert seen[0]["tickets"] != 0 and seen[0]["count_size"] == 0
    monkeypatch.setattr(kernels, "cuda_one_read", launch)
    stats = cuda_rows.forward_backward(rows, upstream, gradient)
    truth = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(stats.logprobs, truth) and bool(gradient.isfinite().all())


def test_other_chunks_of_memory_than_the_rows_are_untouched() -> None:
    vocab, offset = 333, 5
    values = torch.randn(2, vocab).to(torch.bfloat16)
    guarded = torch.full((offset + 2 * vocab + 16,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    guarded[offset : offset + 2 * vocab] = on_device(values).flatten()
    memory = guarded.clone().requires_grad_() * 1
    logits = memory[offset : offset + 2 * vocab].view(1, 2, vocab)
    ids, old = on_device(torch.tensor([[3, 332]])), on_device(torch.full((1, 2), -6.0))
    out = grpo_loss(logits, ids, on_device(torch.ones(1)), old, backend="cuda", overwrite_logits=True)
    out.loss.backward()
    outside = torch.ones_like(guarded, dtype=torch.bool)
    outside[offset : offset + 2 * vocab] = False
    assert bool(memory.detach()[outside].isnan().all()) and not bool(memory.detach()[~outside].isnan().any())
