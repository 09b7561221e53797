"""A loss inside a training step: overwritten logits, several losses, checkpointing, accumulation, autocast, threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import oracle
import pytest
import torch
from batches import CLASSES, LAYOUTS, OBJECTIVES, PUBLIC, SHORT, arguments, flat, ragged_batch, run, to_padded
from checks import check_close, check_gradient, check_number, slack_by_row
from modes import BACKENDS, DEFAULT_MODE, DEVICE, INTERPRETED, ON_GPU, by_backend, on_device
from tolerances import TOLERANCES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gspo_kernels
from gspo_kernels import gspo_loss, policy_loss, policy_loss_from_logprobs, token_logprobs
from gspo_kernels.rows import triton_rows

by_objective = pytest.mark.parametrize("objective", OBJECTIVES)
on_and_off = pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])


@dataclass
class Step:
    """A loss at the end of a small model: x -> logits = x * 1 -> loss. x [N, V] is the leaf. All on the device."""

    x: Tensor
    logits: Tensor
    loss: Callable[..., Tensor]


def step(objective: str = "gspo", on_policy: bool = False, dtype: torch.dtype = torch.float32, seed: int = 20) -> Step:
    args = arguments(ragged_batch(objective, seed=seed, dtype=dtype, on_policy=on_policy, lengths=SHORT), "packed")
    x = args.logits

    def loss(logits: Tensor, **options: Any) -> Tensor:
        out: Tensor = PUBLIC[objective](logits, *args.rest, **args.keywords, **options)[0]
        return out

    return Step(x, x * 1, loss)


def gradient_of(s: Step, loss: Tensor, **keywords: Any) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, s.x, **keywords)
    return gradient


# --- overwrite_logits -------------------------------------------------------------------------------------------------


@by_objective
@by_backend
@on_and_off
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_overwriting_gives_the_same_gradient(objective: str, backend: str, on_policy: bool, dtype: torch.dtype) -> None:
    fresh, over = step(objective, on_policy, dtype), step(objective, on_policy, dtype)
    kept = gradient_of(fresh, fresh.loss(fresh.logits, backend=backend) * 3)
    version, address = over.logits._version, over.logits.data_ptr()
    loss = over.loss(over.logits, backend=backend, overwrite_logits=True)
    if not on_policy:
        assert torch.equal(over.logits.nan_to_num(), fresh.logits.nan_to_num()), "only the backward may write"
    assert torch.equal(gradient_of(over, loss * 3), kept)
    assert over.logits._version > version, "autograd cannot know that the logits changed"
    assert over.logits.data_ptr() == address and torch.equal(over.logits, kept), "the gradient went elsewhere"


@by_backend
@on_and_off
@pytest.mark.parametrize("view", ["itself", "squeezed", "flattened"])
def test_overwriting_a_view_hands_over_its_memory(backend: str, on_policy: bool, view: str) -> None:
    """Of a packed batch models return [1, N, V]. A view that was written to passes gradients on by its own operator."""
    made = on_device(torch.randn(1, 8, 300, generator=torch.Generator().manual_seed(5))).requires_grad_() * 1
    assert made.grad_fn is not None
    passed, seen = [], []
    made.grad_fn.register_prehook(lambda gradients: passed.append(gradients[0]))
    logits = {"itself": made, "squeezed": made.squeeze(0), "flattened": made.view(-1, 300)}[view]
    logits.register_hook(lambda gradient: seen.append(gradient))
    ids = on_device(torch.arange(8)) if logits.ndim == 2 else on_device(torch.arange(8)[None])
    ends = on_device(torch.tensor([0, 8], dtype=torch.int32)) if logits.ndim == 2 else None
    old = None if on_policy else on_device(torch.full(ids.shape, -6.0))
    out = gspo_loss(
        logits,
        ids,
        on_device(torch.ones(1)),
        old,
        cu_seqlens=ends,
        overwrite_logits=True,
        backend=backend,
        eps_high=9.0,
    )
    out.loss.backward()
    assert passed[0].data_ptr() == made.data_ptr() and bool(passed[0].any()), "the gradient went elsewhere"
    assert seen[0].data_ptr() == made.data_ptr(), "a hook of the view"


@by_objective
@by_backend
@on_and_off
def test_without_overwriting_the_logits_stay(objective: str, backend: str, on_policy: bool) -> None:
    s = step(objective, on_policy)
    before, version = s.logits.detach().clone(), s.logits._version
    gradient_of(s, s.loss(s.logits, backend=backend))
    assert torch.equal(s.logits.nan_to_num(), before.nan_to_num()) and s.logits._version == version


@by_backend
@on_and_off
def test_a_second_backward_is_refused_rather_than_wrong(backend: str, on_policy: bool) -> None:
    s = step(on_policy=on_policy)
    loss = s.loss(s.logits, backend=backend, overwrite_logits=True)
    gradient_of(s, loss, retain_graph=True)
    with pytest.raises(RuntimeError):
        gradient_of(s, loss)


@by_backend
@on_and_off
def test_an_upstream_operation_that_saved_its_output_is_not_fooled(backend: str, on_policy: bool) -> None:
    """exp keeps its result for its own backward: with the gradient written over it, autograd must stop."""
    s = step(on_policy=on_policy)
    leaf = torch.rand_like(s.x).requires_grad_()
    loss = s.loss(leaf.exp(), backend=backend, overwrite_logits=True)
    with pytest.raises(RuntimeError, match=r"inplace|in-place"):
        loss.backward()


@by_backend
def test_overwritten_logits_are_refused_by_another_loss_on_them(backend: str) -> None:
    s = step()
    first, second = (s.loss(s.logits, backend=backend, overwrite_logits=flag) for flag in (True, False))
    gradient_of(s, first, retain_graph=True)
    with pytest.raises(RuntimeError):
        gradient_of(s, second)


@by_backend
@on_and_off
@pytest.mark.parametrize("grad", ["no_grad", "detached", "inference_mode"])
def test_nothing_is_overwritten_where_no_gradient_is_wanted(backend: str, on_policy: bool, grad: str) -> None:
    s = step(on_policy=on_policy)
    logits = s.logits.detach().clone()
    before = logits.clone()
    if grad == "detached":
        loss = s.loss(logits, backend=backend, overwrite_logits=True)
    else:
        with torch.no_grad() if grad == "no_grad" else torch.inference_mode():
            loss = s.loss(logits.requires_grad_(), backend=backend, overwrite_logits=True)
    assert not loss.requires_grad and torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert torch.equal(loss, s.loss(s.logits, backend=backend).detach())


@by_backend
@on_and_off
def test_overwriting_a_view_writes_nothing_beside_it(backend: str, on_policy: bool) -> None:
    """logits[:, :-1], and a slice of the vocabulary: the last token and the columns left out stay as they are."""
    base = on_device(torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))).requires_grad_()
    ids, advantages = on_device(torch.tensor([[0, 3, 7], [1, 1, 2]])), on_device(torch.tensor([1.0, -1.0]))
    old = None if on_policy else on_device(torch.full((2, 3), -2.0))
    gradients = []
    for overwrite in (False, True):
        logits = base * 1
        before = logits.detach().clone()
        loss, _ = gspo_kernels.gspo_loss(
            logits[:, :-1, 1:], ids, advantages, old, overwrite_logits=overwrite, backend=backend
        )
        gradients.append(torch.autograd.grad(loss, base)[0])
        assert torch.equal(logits[:, -1], before[:, -1]) and torch.equal(logits[..., 0], before[..., 0])
    assert torch.equal(*gradients)


@by_backend
@on_and_off
def test_overlapping_logits_are_not_overwritten(backend: str, on_policy: bool) -> None:
    logits = (torch.zeros(1, 5, requires_grad=True, device=DEVICE) * 1).expand(4, 5)
    ids, advantages, cu_seqlens = (on_device(x) for x in (torch.arange(4), torch.ones(1), torch.tensor([0, 4])))
    old = None if on_policy else on_device(torch.full((4,), -2.0))
    with pytest.raises(ValueError, match=r"overwrite_logits: expected"):
        gspo_kernels.gspo_loss(
            logits, ids, advantages, old, cu_seqlens=cu_seqlens, overwrite_logits=True, backend=backend
        )


@by_backend
def test_one_pass_marks_overwritten_logits_at_once(backend: str) -> None:
    """Another loss on the same logits may walk backward first: it must be refused then already."""
    if ON_GPU and backend == "reference":
        pytest.skip("takes two passes on a GPU")
    s = step(on_policy=True)
    version = s.logits._version
    s.loss(s.logits, backend=backend, overwrite_logits=True)
    assert s.logits._version > version


# --- several uses of one graph ----------------------------------------------------------------------------------------


@by_backend
@pytest.mark.parametrize("together", [True, False])
def test_two_losses_on_one_logits(backend: str, together: bool) -> None:
    s, other = step("gspo"), step("grpo")
    alone = gradient_of(s, s.loss(s.logits, backend=backend), retain_graph=True)
    second = gradient_of(s, other.loss(s.logits, backend=backend) * 2, retain_graph=True)
    s.x.grad = None
    losses = s.loss(s.logits, backend=backend), other.loss(s.logits, backend=backend) * 2
    if together:
        (losses[0] + losses[1]).backward()
    else:
        losses[0].backward(retain_graph=True)
        losses[1].backward()
    assert s.x.grad is not None
    check_close("gradient", s.x.grad, alone + second, 1e-6 * (alone.abs() + second.abs()))


@by_backend
def test_retained_graphs_give_the_same_gradient_again(backend: str) -> None:
    s = step()
    loss = s.loss(s.logits, backend=backend)
    first = gradient_of(s, loss, retain_graph=True)
    assert torch.equal(gradient_of(s, loss), first)


@by_backend
def test_a_second_backward_on_policy_is_right_or_refused(backend: str) -> None:
    """The gradient was made by the forward and is handed out once."""
    s = step(on_policy=True)
    loss = s.loss(s.logits, backend=backend)
    first = gradient_of(s, loss * 0.5, retain_graph=True).clone()
    try:
        second = gradient_of(s, loss * 0.5)
    except RuntimeError:
        return
    assert torch.equal(first, second)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


@by_backend
@on_and_off
def test_no_gradient_of_the_loss_gives_none_of_the_logits(backend: str, on_policy: bool) -> None:
    """Autograd passes None on where a later function has no gradient."""
    s = step(on_policy=on_policy)
    loss: Tensor = _NoGradient.apply(s.loss(s.logits, backend=backend))
    ids = torch.zeros(s.x.shape[0], dtype=torch.int64, device=DEVICE)
    logprobs: Tensor = _NoGradient.apply(token_logprobs(s.logits, ids, backend=backend).logprobs)
    for value in (loss, logprobs.sum()):
        (gradient,) = torch.autograd.grad(value, s.logits, allow_unused=True)
        assert gradient is None or (backend != "triton" and not gradient.any()), "the stage in torch fills zeros"


@by_backend
@on_and_off
def test_accumulated_gradients(backend: str, on_policy: bool) -> None:
    """Two micro-batches into one leaf: the second backward may not touch what the first handed out."""
    one, two = step(on_policy=on_policy, seed=21), step(on_policy=on_policy, seed=22)
    parts = [gradient_of(s, s.loss(s.logits, backend=backend) * k) for s, k in ((one, 1.0), (two, -0.5))]
    leaf = one.x.detach().clone().requires_grad_()
    for s, k in ((one, 1.0), (two, -0.5)):
        (s.loss(_with_gradient_to(leaf, s.x.detach()), backend=backend) * k).backward()
    assert leaf.grad is not None
    check_close("gradient", leaf.grad, parts[0] + parts[1], 1e-6 * (parts[0].abs() + parts[1].abs()))


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _with_gradient_to(leaf: Tensor, value: Tensor) -> Tensor:
    """`value`, whose gradient goes to `leaf`."""
    out: Tensor = _Straight.apply(leaf, value)
    return out


@by_backend
@on_and_off
def test_a_leaf_that_is_the_logits(backend: str, on_policy: bool) -> None:
    s = step(on_policy=on_policy)
    expected = gradient_of(s, s.loss(s.logits, backend=backend))
    for times in (1, 2):
        s.loss(s.x, backend=backend).backward()
        assert s.x.grad is not None
        check_close("gradient", s.x.grad, times * expected, 1e-6 * times * expected.abs())


@by_backend
@on_and_off
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(backend: str, on_policy: bool, use_reentrant: bool) -> None:
    s = step(on_policy=on_policy)
    plain = gradient_of(s, s.loss(s.logits, backend=backend))
    loss = checkpoint(lambda x: s.loss(x * 1, backend=backend), s.x, use_reentrant=use_reentrant)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert s.x.grad is not None and torch.equal(s.x.grad, plain)


@by_backend
@on_and_off
def test_a_second_derivative_is_refused_rather_than_wrong(backend: str, on_policy: bool) -> None:
    s = step(on_policy=on_policy)
    (gradient,) = torch.autograd.grad(s.loss(s.x, backend=backend), s.x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.nan_to_num().square().sum(), s.x)


@by_backend
@on_and_off
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend: str, on_policy: bool, dtype: torch.dtype) -> None:
    s = step(on_policy=on_policy, dtype=dtype)
    outside = s.loss(s.logits, backend=backend)
    plain = gradient_of(s, outside)
    t = step(on_policy=on_policy, dtype=dtype)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = t.loss(t.logits, backend=backend)
    assert torch.equal(inside, outside) and torch.equal(gradient_of(t, inside), plain)


@by_backend
@on_and_off
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(backend: str, on_policy: bool, dtype: torch.dtype) -> None:
    """Trainers set it to bf16 while they build a model, and some forget to set it back."""
    batch = ragged_batch(
        "gspo", seed=27, lengths=SHORT, ref=True, weights="token", temperature="token", on_policy=on_policy
    )
    options: dict[str, Any] = {"backend": backend, "beta": 0.1, "entropy_coef": 0.01}
    usual = run(batch, "packed", "gspo", **options)
    torch.set_default_dtype(dtype)
    try:
        other = run(batch, "packed", "gspo", **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(other.loss, usual.loss) and torch.equal(other.gradient, usual.gradient)
    assert other.loss.dtype == other.stats.ratio_mean.dtype == torch.float32


@pytest.mark.parametrize("objective", ["gspo", "grpo"])
@by_backend
@on_and_off
def test_the_default_device_does_not_matter(objective: str, backend: str, on_policy: bool) -> None:
    """Hyper-parameters are read on the host: were they made on a GPU, each call would wait for it."""
    s = step(objective, on_policy=on_policy)
    expected = gradient_of(s, s.loss(s.logits, backend=backend), retain_graph=True)
    with torch.device("meta"):
        loss = s.loss(s.logits, backend=backend)
        assert torch.equal(gradient_of(s, loss), expected)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs one kernel at a time")
@by_backend
def test_many_threads_at_once(backend: str) -> None:
    """A trainer's threads may call at the same time; nothing is shared."""

    def work(seed: int) -> tuple[Tensor, Tensor]:
        outcome = run(ragged_batch("gspo", seed=seed, vocab=300), "packed", "gspo", backend=backend)
        return outcome.loss, outcome.gradient

    alone = [work(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for together, by_itself in zip(pool.map(work, range(6)), alone, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(together, by_itself, strict=True))


# --- log-probabilities that are given, objectives of one's own --------------------------------------------------------


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if hasattr(gspo_kernels, f"{name}_loss")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_policy_loss_is_what_the_named_losses_call(objective: str, layout: str) -> None:
    batch = ragged_batch(objective, seed=23, lengths=SHORT, eps_low=0.1, eps_high=0.15)
    named = run(batch, layout, objective, eps_low=0.1, eps_high=0.15, dual_clip=3.0)
    general = run(batch, layout, objective, function=partial(policy_loss, objective=CLASSES[objective](0.1, 0.15, 3.0)))
    assert torch.equal(named.loss, general.loss) and torch.equal(named.gradient, general.gradient)


@pytest.mark.each_objective
@by_objective
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_from_logprobs(objective: str, layout: str, dtype: torch.dtype) -> None:
    """Given the very log-probs, nothing of the vocabulary's rounding is left: the loss alone, to 1e-6 (fp64: 1e-12)."""
    batch = ragged_batch(objective, seed=24, lengths=SHORT, ref=True, weights="token", dtype=dtype)
    args = arguments(batch, layout)

    def lay(x: Tensor) -> Tensor:
        return to_padded(x, batch.lengths, math.nan, batch.padding) if layout == "padded" else x

    logprobs, entropy = (
        on_device(lay(torch.tensor(x, dtype=dtype))).requires_grad_()
        for x in ([row.logprob for row in batch.rows], [row.entropy for row in batch.rows])
    )
    options: dict[str, Any] = {"beta": 0.1, "entropy_coef": 0.02, "max_log_ratio": 15.0}
    args.keywords.pop("temperature")
    _, advantages, old = args.rest
    loss, stats = policy_loss_from_logprobs(
        logprobs, advantages, old, objective=CLASSES[objective](), entropy=entropy, **args.keywords, **options
    )
    loss.backward()
    assert logprobs.grad is not None and entropy.grad is not None and loss.dtype == dtype
    given = flat(logprobs.detach(), batch, layout).double().tolist()
    expected = batch.expected(objective, logprobs=given, **options)
    tol = TOLERANCES[dtype]
    check_number("loss", float(loss.detach()), expected.loss, tol.number * expected.loss_size)
    size = torch.tensor(expected.d_logprobs_size, dtype=torch.float64)
    actual = flat(logprobs.grad, batch, layout)
    check_close("dL/dl", actual, torch.tensor(expected.d_logprobs, dtype=torch.float64), tol.number * size)
    g = torch.tensor(expected.d_entropy, dtype=torch.float64)
    check_close("dL/dH", flat(entropy.grad, batch, layout), g, tol.number * g.abs())
    assert float(stats.clip_fraction) == pytest.approx(expected.stats["clip_fraction"])


@pytest.mark.parametrize("objective", ["gspo", "gspo_token"])
@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("distance", [1e-4, 1e-3])
def test_the_edge_of_the_window_to_a_ten_thousandth(objective: str, side: str, distance: float) -> None:
    """1 + 4e-4 in fp32 is off by 5e-8, more than 1e-4 of the window: what must be clipped is the deviation s - 1.

    So is log-ratio > eps in place of s > 1 + eps: for 4e-4 it is off by 8e-8.
    """
    sign = 1.0 if side == "high" else -1.0
    edge = math.log1p(4e-4) if side == "high" else math.log1p(-3e-4)
    log_ratio = edge * torch.tensor([1 - distance, 1 + distance], dtype=torch.float64)
    old = torch.tensor([-1e-3, -1e-3])
    logprobs = on_device((old.double() + log_ratio).float()).requires_grad_()
    advantages, old, cu_seqlens = (on_device(x) for x in (torch.full((2,), sign), old, torch.tensor([0, 1, 2])))
    loss, stats = policy_loss_from_logprobs(
        logprobs, advantages, old, objective=CLASSES[objective](), cu_seqlens=cu_seqlens
    )
    loss.backward()
    assert logprobs.grad is not None
    ratio = (logprobs.detach().double() - old.double()).exp()
    assert logprobs.grad[1] == 0 and float(stats.clip_fraction) == 0.5
    assert float(logprobs.grad[0]) == pytest.approx(float(-0.5 * sign * ratio[0]), rel=1e-6)


@pytest.mark.parametrize("objective", [name for name in CLASSES if oracle.OBJECTIVES[name].is_surrogate])
def test_a_log_ratio_on_the_bound_is_not_saturated(objective: str) -> None:
    """Exactly 20 still has its gradient; the next number above has none, and is counted."""
    logprobs = torch.zeros(2, requires_grad=True, device=DEVICE)
    given = -torch.ones(2), torch.tensor([-20.0, -20.000002]), torch.tensor([0, 1, 2])
    advantages, old, cu_seqlens = (on_device(x) for x in given)
    loss, stats = policy_loss_from_logprobs(
        logprobs, advantages, old, objective=CLASSES[objective](), cu_seqlens=cu_seqlens
    )
    loss.backward()
    assert logprobs.grad is not None and float(stats.saturated_fraction) == 0.5
    assert logprobs.grad.tolist() == [pytest.approx(math.exp(20) / 2, rel=1e-6), 0.0]


class Reinforce(gspo_kernels.Objective):
    """-A l: what a user may write in a few lines. Its gradient at a token is -A, whatever the ratio.

    n / n is 0 / 0 where masked: what an objective says there is selected away.
    """

    aggregation: ClassVar[str] = "token_mean"
    depends_on: ClassVar[str] = "token"

    def terms(self, tokens: gspo_kernels.TokenBatch) -> gspo_kernels.Terms:
        n = tokens.layout.spread(tokens.layout.lengths)
        return gspo_kernels.Terms(loss=-tokens.advantages * tokens.log_ratio * n / n, log_ratio=tokens.log_ratio)


@pytest.mark.parametrize("layout", LAYOUTS)
@by_backend
@on_and_off
def test_an_objective_of_ones_own(layout: str, backend: str, on_policy: bool) -> None:
    batch = ragged_batch("grpo", seed=25, on_policy=on_policy)
    outcome = run(batch, layout, "grpo", function=partial(policy_loss, objective=Reinforce()), backend=backend)
    n = int(batch.mask.sum())
    a = [x[0] if x else 0.0 for x in batch.spread(batch.advantages, False)]
    of_row = [a[i] for i, rows in enumerate(batch.sequences) for _ in rows]
    slope = [-x / n if m else 0.0 for x, m in zip(of_row, batch.mask.tolist(), strict=True)]
    check_gradient(outcome.gradient, batch, slope)
    old = [row.logprob for row in batch.rows] if batch.old_logprobs is None else batch.old_logprobs.tolist()
    parts = [g * (row.logprob - o) for g, row, o in zip(slope, batch.rows, old, strict=True) if g]
    slack = max(slack_by_row(batch, TOLERANCES[torch.float32]))
    check_number("loss", float(outcome.loss), math.fsum(parts), slack * sum(abs(g) for g in slope))
    assert float(outcome.stats.clip_fraction) == 0 and float(outcome.stats.num_tokens) == n


def test_an_objective_that_is_none_is_refused() -> None:
    s = arguments(ragged_batch("gspo"), "packed")
    with pytest.raises(TypeError, match="objective: expected"):
        policy_loss(s.logits, *s.rest, **s.keywords, objective="gspo")  # type: ignore[arg-type]


def test_old_logprobs_from_the_same_kernel_give_a_ratio_of_exactly_one() -> None:
    """What token_logprobs returned a moment ago is what the loss finds now: no noise of its own enters the window."""
    batch = ragged_batch("gspo", seed=26, dtype=torch.bfloat16)
    with torch.no_grad():
        logits, ids, mask = (on_device(x) for x in (batch.logits, batch.token_ids, batch.mask))
        batch.old_logprobs = token_logprobs(logits, ids, mask=mask).logprobs.cpu()
    for layout in LAYOUTS:
        outcome = run(batch, layout, "gspo")
        assert [float(x) for x in (outcome.stats.ratio_min, outcome.stats.ratio_max)] == [1.0, 1.0]


@by_backend
def test_explain_names_what_runs_and_why(backend: str) -> None:
    text = gspo_kernels.explain(torch.zeros(2, 3, device=DEVICE), backend=backend)
    assert text.splitlines()[0].startswith(backend) and all(name in text for name in BACKENDS)
    assert "float64" in gspo_kernels.explain(torch.zeros(2, 3, dtype=torch.float64, device=DEVICE))


@DEFAULT_MODE
@pytest.mark.parametrize(
    ("version", "dtype", "reason"),
    [
        ("3.8.0", torch.float32, "triton (Triton 3.8.0): logits are on the CPU, these kernels run on a GPU"),
        ("3.8.0", torch.float64, "logits are torch.float64, these kernels take float32, bfloat16 and float16"),
        ("3.3.1", torch.float32, "Triton is 3.3.1, these kernels need 3.4 or newer: install torch 2.8 or newer"),
        (None, torch.float32, "triton (Triton, not installed): Triton is not installed; torch for CUDA or ROCm"),
    ],
    ids=str,
)
def test_explain_says_why_triton_cannot_serve(
    version: str | None, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_rows, "_VERSION", version)
    logits = torch.zeros(2, 3, dtype=dtype)
    assert any(reason in line for line in gspo_kernels.explain(logits).splitlines() if line.startswith("triton"))
    with pytest.raises(ValueError, match=r"backend: expected one that takes these logits; got 'triton'"):
        token_logprobs(logits, torch.zeros(2, dtype=torch.int64), backend="triton")


def test_explain_refuses_what_a_loss_refuses() -> None:
    with pytest.raises(TypeError, match=r"^weights: expected the arguments of a loss; got a name that no loss has"):
        gspo_kernels.explain(torch.zeros(2, 3), weights=torch.ones(2))
    with pytest.raises(TypeError, match=r"^logits: expected logits .*; got torch.float8_e5m2. Dequantize them first"):
        gspo_kernels.explain(torch.zeros(2, 3).to(torch.float8_e5m2))


def test_the_kernels_of_this_mode_are_the_default_choice() -> None:
    """Otherwise every test that names no backend would be about another one."""
    assert gspo_kernels.explain(torch.zeros(2, 3, device=DEVICE)).startswith(BACKENDS[0])


def test_the_oracle_covers_the_classes() -> None:
    assert set(CLASSES) == set(oracle.OBJECTIVES)
