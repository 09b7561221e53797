"""token_logprobs: each row's (l, H, lse) and their gradients against the oracle, on the rows that break kernels."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from checks import check_close, check_gradient, check_rows
from modes import BACKENDS, COMBINATIONS, DTYPES, by_backend, by_combination, needs, on_device, sized
from row_batches import UPSTREAM, check_batch, check_far, check_far_rows, everything, far, peaked, rows
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels import grpo_loss, linear_token_logprobs, token_logprobs
from gspo_kernels.base.collectives import Ranks
from gspo_kernels.rows import dispatch, vocab_shard
from gspo_kernels.rows.types import Rows, RowStats, Upstream

# 1 and 2: no tail. 7, 16, 127: less than, exactly, just under whole vectors. 511-513: about a block. 4099 and 50257:
# odd, so that every row starts at another alignment. 151936: Qwen's vocabulary. Interpreted, a block has 256 columns:
# 255-257 are about one, 773 is three and a tail, 2051 eight.
VOCABULARIES = sized([1, 2, 7, 16, 127, 511, 512, 513, 1000, 4099], [1, 2, 7, 16, 127, 255, 256, 257, 773])
LARGE_VOCABULARIES = sized([50257, 151936], [2051])


@by_combination
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_values_and_gradients(backend: str, dtype: torch.dtype, vocab: int) -> None:
    check_batch(rows(peaked(6, vocab).to(dtype)), backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [x for x in COMBINATIONS if x[1] is torch.bfloat16 or x == (BACKENDS[0], torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("vocab", LARGE_VOCABULARIES)
def test_large_vocabularies(backend: str, dtype: torch.dtype, vocab: int) -> None:
    check_batch(rows(peaked(2, vocab).to(dtype)), backend, ["all"])


@by_combination
@pytest.mark.parametrize("temperature", [0.1, 0.7, 2.0, "by token"])
def test_temperature(backend: str, dtype: torch.dtype, temperature: float | str) -> None:
    value = torch.tensor([0.1, 0.7, 1.0, 2.0, 1.3]) if isinstance(temperature, str) else temperature
    check_batch(rows(peaked(5, 300).to(dtype), temperature=value), backend)


@by_combination
@pytest.mark.parametrize("vocab", [7, 130, sized(1025, 517)])
def test_masked_rows_are_zero_and_never_read(backend: str, dtype: torch.dtype, vocab: int) -> None:
    batch = rows(peaked(6, vocab).to(dtype))
    batch.mask[[0, 3, 4]] = False
    batch.logits[0], batch.logits[3, 1], batch.logits[4] = math.nan, math.inf, -math.inf
    batch.token_ids[[0, 3, 4]] = torch.tensor([-100, 2**40, -1])
    check_batch(batch, backend)


# --- rows that break kernels --------------------------------------------------------------------------------------


@by_combination
@pytest.mark.parametrize("dead", ["first block", "last block", "all but the target", "every second", "none but a few"])
def test_minus_infinity_logits(backend: str, dtype: torch.dtype, dead: str) -> None:
    """exp(-inf - -inf) is NaN: a kernel whose first block is all -inf starts from a maximum of -inf."""
    vocab, first, last, ids = sized(
        (5000, 2300, 4095, torch.tensor([2500, 2501, 3000, 4094])),
        (1250, 575, 1023, torch.tensor([625, 626, 768, 1022])),
    )
    logits = peaked(4, vocab)
    keep = logits.gather(-1, ids[:, None])
    if dead == "first block":
        logits[:, :first] = -math.inf
    elif dead == "last block":
        logits[:, last:] = -math.inf
    elif dead == "all but the target":
        logits[:] = -math.inf
    elif dead == "every second":
        logits[:, ::2] = -math.inf
    else:
        logits[:, torch.arange(vocab) % (vocab // 5) != vocab // 5 - 1] = -math.inf
    logits.scatter_(-1, ids[:, None], keep)
    check_batch(rows(logits.to(dtype), ids), backend, ["all"])


@by_combination
@pytest.mark.parametrize("shift", [-200.0, -1e4, 1e4])
def test_shifted_logits(backend: str, dtype: torch.dtype, shift: float) -> None:
    """A running maximum that starts at 0, or an lse kept in fp32, shows here and nowhere else."""
    if dtype is torch.bfloat16 and abs(shift) > 1e3:
        logits = shift + peaked(5, 700).mul(64).round()  # bf16 steps by 64 at 1e4
    else:
        logits = peaked(5, 700) + shift
    check_batch(rows(logits.to(dtype)), backend)


@by_backend
@pytest.mark.parametrize("shift", [-1e4, -200.0, 1e4])
def test_shifted_and_sure(backend: str, shift: float) -> None:
    """Where the target outweighs all others, lse is the target's logit: its rounding, too, must be accounted for."""
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(1)) + shift
    logits[:, 17] = shift + torch.tensor([9.0, 10.3, 12.7, 20.1])
    check_batch(rows(logits, torch.full((4,), 17)), backend)


@by_backend
@pytest.mark.parametrize("margin", [25.0, 30.0, 40.0])
def test_the_target_of_a_very_sure_row(backend: str, margin: float) -> None:
    """1 - p of 1e-10 to 1e-17: its gradient comes from the log-probability, which has the digits, not from lse."""
    logits = torch.zeros(1, 50)
    logits[0, 20] = margin
    leaf = on_device(logits).requires_grad_()
    out = token_logprobs(leaf, on_device(torch.tensor([20])), backend=backend)
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), leaf)
    truth = oracle.row_gradient(logits[0].tolist(), 20, 1.0, 1.0)[20]
    assert float(gradient[0, 20]) == pytest.approx(truth, rel=1e-6, abs=0.0)


@by_backend
@pytest.mark.parametrize(("margin", "temperature"), [(14.0, 0.5), (13.7, 0.5), (10.3, 1.3), (9.1, 0.7)])
@pytest.mark.parametrize("vocab", [5, 700])
def test_the_entropy_where_another_token_is_sure(backend: str, vocab: int, margin: float, temperature: float) -> None:
    """Of the tokens beside the target one has nearly all: the entropy is what the rounding of its exponent would be."""
    logits = torch.zeros(3, vocab)
    logits[[0, 1, 2], [4, 0, vocab - 1]] = margin
    batch = rows(logits, torch.tensor([0, vocab - 1, 3]), temperature=temperature)
    check_batch(batch, backend)
    entropy = token_logprobs(
        on_device(logits), on_device(batch.token_ids), temperature=temperature, backend=backend
    ).entropy
    expected = torch.tensor([row.entropy for row in batch.rows], dtype=torch.float64)
    bound = 0.01 * expected if backend == "native" else torch.full_like(expected, 1e-6)
    check_close("entropy", entropy, expected, bound)


@by_backend
def test_far_logits(backend: str) -> None:
    """As far from 0 as logits of 64 nats' spacing can be."""
    logits = torch.tensor([[0.0, -64, -128, 0, -64]] * 2) - 5e8
    ids = torch.tensor([0, 2])
    out = token_logprobs(on_device(logits), on_device(ids), backend=backend)
    truth = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    check_close("logprobs", out.logprobs.cpu(), truth, 1e-6 * truth.abs())


@by_combination
@pytest.mark.parametrize("temperature", [1e-6, 0.7, 1e6])
def test_the_largest_logits(backend: str, dtype: torch.dtype, temperature: float) -> None:
    """log p comes from differences to the row's maximum; beside it lse has no digits left."""
    check_far_rows(dtype, temperature, backend, sized(1500, 300))


@by_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_of_huge_logits_in_a_loss(backend: str, dtype: torch.dtype) -> None:
    """With an entropy bonus, whose gradient is 0 there; on-policy, in one pass, and from statistics that were kept."""
    for coefficient in (0.0, 0.1):
        leaf = on_device(torch.full((1, 2, 8), 1e30, dtype=dtype)).requires_grad_()
        ids, advantages = on_device(torch.tensor([[0, 5]])), on_device(torch.tensor([1.0]))
        out = grpo_loss(leaf, ids, advantages, entropy_coef=coefficient, backend=backend)
        out.loss.backward()
        assert float(out.loss.detach()) == pytest.approx(-1.0 - coefficient * math.log(8), rel=1e-6)
        expected = (0.125 - torch.nn.functional.one_hot(ids.cpu(), 8).double()) / 2
        assert leaf.grad is not None
        check_close("gradient", leaf.grad, expected, 2e-6 * expected.abs())


@by_backend
def test_huge_logits_from_hidden_states(backend: str) -> None:
    weight = torch.tensor([[1e19], [1e19], [-1e19], [1e18]])
    hidden = torch.tensor([[3e19], [-3e19], [1e-19]])
    ids = torch.tensor([1, 2, 0])
    leaf = on_device(hidden.clone()).requires_grad_()
    out = linear_token_logprobs(leaf, on_device(weight), on_device(ids), backend=backend)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    exact = hidden.double().requires_grad_()
    logp = (exact @ weight.double().T).log_softmax(-1)
    own, entropy = logp.gather(1, ids[:, None])[:, 0], -torch.where(logp > -80, logp.exp() * logp, 0.0).sum(-1)
    (own.sum() + entropy.sum()).backward()
    assert leaf.grad is not None and exact.grad is not None
    check_close("logprobs", out.logprobs, own, 1e-6 * (1 + own.abs()))
    check_close("entropy", out.entropy, entropy, 1e-6 * (1 + entropy))
    check_close("gradient", leaf.grad, exact.grad, 1e-6 * exact.grad.abs() + 1e13)  # of sums of 1e19


class Shards:
    """Rows of which ranks have columns, the ranks one after the other in this process."""

    def __init__(self, logits: Tensor, ends: list[int], target: int, temperature: float, backend: str) -> None:
        self.temperature = torch.tensor(temperature, dtype=torch.float64)
        self.parts = [on_device(logits[None, :, a:b].contiguous()) for a, b in itertools.pairwise(ends)]
        self.kernels = dispatch.choose(self.parts[0], backend)
        ids = on_device(torch.full((1, len(logits)), target))
        self.shards = [
            vocab_shard.VocabShard(Ranks("tp_group", len(self.parts), rank, ""), a, b - a, logits.shape[1])
            for rank, (a, b) in enumerate(itertools.pairwise(ends))
        ]
        whole = [Rows(part, ids, None, self.temperature, logits.shape[1]) for part in self.parts]
        local = [shard.local(rows) for shard, rows in zip(self.shards, whole, strict=True)]
        self.owns, self.rows = zip(*local, strict=True)
        self.local = [self.kernels.forward(rows) for rows in self.rows]

    def gathered(self, *_: object) -> tuple[Tensor, ...]:
        """What each rank sends; stands for the collective."""
        sent = [
            (stats.lse, stats.entropy.double(), torch.where(owns, stats.logprobs, vocab_shard._ELSEWHERE).double())
            for stats, owns in zip(self.local, self.owns, strict=True)
        ]
        return tuple(torch.stack(x) for x in zip(*sent, strict=True))

    def merged(self) -> RowStats:
        return vocab_shard.merged(self.local[0], self.owns[0], None, self.shards[0], self.local[0].logprobs.dtype)

    def gradient_of(self, scales: tuple[float, ...]) -> Tensor:
        stats, found = self.merged(), []
        for part, owns, of_rank in zip(self.parts, self.owns, self.rows, strict=True):
            upstream = Upstream(*(torch.full_like(x, k) for x, k in zip(stats, scales, strict=True)))
            stats_here, upstream_here = vocab_shard.of_this_rank(stats, upstream, owns, of_rank, self.kernels)
            found.append(torch.empty_like(part))
            self.kernels.backward(of_rank, stats_here, upstream_here, found[-1])
        return torch.cat(found, -1)[0]


@by_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-6, 0.7])
def test_the_largest_logits_of_shards(
    backend: str, dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers that two or three ranks send distinguish ties of the same logit."""
    logits = far(dtype, temperature, 300)
    for ends, target in [([0, 6, 7, 300], 6), ([0, 4, 300], 0), *sized([([0, 4, 300], 5), ([0, 6, 7, 300], 5)], [])]:
        shards = Shards(logits, ends, target, temperature, backend)
        monkeypatch.setattr(vocab_shard, "_gathered", shards.gathered)
        check_far(logits, target, temperature, [x[0] for x in shards.merged()], shards.gradient_of)


@by_backend
def test_a_margin_of_seventy_six_nats(backend: str) -> None:
    """log2(e) / temperature rounded to float32 is off by 1e-8: times the margin, that is all that a 1e-6 allows."""
    check_batch(rows(torch.tensor([[-30.0, 8.0], [8.0, -34.0]]), torch.tensor([1, 0]), temperature=0.5), backend)


@by_combination
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 1 - 1e-7, 1 - 1e-9])
def test_confident_targets(backend: str, dtype: torch.dtype, p: float) -> None:
    """1 - p and lse - z_y cancel: l and the target's gradient must keep their relative precision, in bf16 too."""
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids = torch.tensor([0, 17, 512, 999])
    rest = logits.double().scatter(-1, ids[:, None], -math.inf).logsumexp(-1)
    logits[torch.arange(4), ids] = (rest + math.log(p / (1 - p))).to(dtype)
    batch = rows(logits, ids)
    assert all(abs(row.logprob) < 2 * (1 - p) for row in batch.rows)
    check_batch(batch, backend)


@by_combination
def test_a_margin_of_twenty_nats(backend: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 50)
    logits[:, 20] = 20.0
    batch = rows(logits.to(dtype), torch.tensor([20, 3]))  # the sure token, and one it drowns
    assert batch.rows[0].entropy > 4e-9 and -1.1e-7 < batch.rows[0].logprob < -9e-8
    check_batch(batch, backend)


@by_combination
def test_two_equal_maxima_and_equal_logits(backend: str, dtype: torch.dtype) -> None:
    logits = torch.full((4, 257), -3.0)
    logits[1, [3, 200]] = 9.0
    logits[2, [3, 200]] = 9.0
    check_batch(rows(logits.to(dtype), torch.tensor([100, 3, 200, 256])), backend)


@by_combination
def test_rising_and_falling_rows(backend: str, dtype: torch.dtype) -> None:
    """The running maximum moves at every element, or never again after the first."""
    vocab = sized(4097, 1025)
    rise = torch.linspace(-40, 40, vocab)
    check_batch(rows(torch.stack([rise, rise.flip(0), rise.roll(vocab // 2)]).to(dtype)), backend, ["all"])


@by_combination
@pytest.mark.parametrize("jump", [6.0, 300.0, 3e4])
def test_a_late_jump(backend: str, dtype: torch.dtype, jump: float) -> None:
    """The largest logit exceeds all earlier ones by a little, by more than 2^127, and by more than a product allows."""
    vocab = sized(4099, 773)
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(5))
    logits[:, vocab // 2] += jump
    logits[1, vocab // 2 + 3] = -math.inf
    logits[2, : vocab // 4 : 2] = -math.inf
    logits[3, -1] = -math.inf
    check_batch(rows(logits.to(dtype), torch.full((4,), 11)), backend)


@by_combination
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 3, 5, 1029])  # 3: the target
def test_a_bad_logit_stays_in_its_row(backend: str, dtype: torch.dtype, bad: float, column: int) -> None:
    batch = rows(peaked(4, 1030).to(dtype), torch.tensor([3, 3, 3, 3]))
    leaf = on_device(batch.logits.clone())
    leaf[1, column] = bad
    leaf.requires_grad_()
    out = token_logprobs(leaf, on_device(batch.token_ids), backend=backend)
    assert not math.isfinite(float(out.logprobs[1])), "a bad logit in an unmasked row must show"
    (gradient,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaf)
    assert bool(gradient[1].isnan().any())
    others = torch.tensor([0, 2, 3])
    sound = rows(batch.logits[others], batch.token_ids[others])
    check_rows(*(x.cpu()[others] for x in out), sound.rows, TOLERANCES[dtype])
    check_gradient(gradient.cpu()[others], sound, [1.0] * 3, [1.0] * 3)


@by_combination
@pytest.mark.parametrize("column", [0, 5, 599, sized(4000, 1000)])
def test_a_nan_among_minus_infinities_is_not_hidden(backend: str, dtype: torch.dtype, column: int) -> None:
    """Where a maximum is looked for, NaN compares false: a block of -inf must not be passed over on its account."""
    dead = sized(4100, 1050)
    logits = peaked(3, dead + 100)
    logits[:, :dead] = -math.inf
    logits[1, column] = math.nan
    out = token_logprobs(on_device(logits.to(dtype)), on_device(torch.full((3,), dead + 50)), backend=backend)
    assert [math.isnan(x) for x in out.logprobs.tolist()] == [False, True, False]
    assert [math.isnan(x) for x in out.entropy.tolist()] == [False, True, False]


@by_combination
def test_a_target_of_minus_infinity(backend: str, dtype: torch.dtype) -> None:
    """l = -inf is the truth; the row's entropy and gradient are those of the tokens that are left."""
    logits = peaked(3, 600)
    logits[1, 17] = -math.inf
    batch = rows(logits.to(dtype), torch.tensor([17, 17, 17]))
    assert batch.rows[1].logprob == -math.inf
    check_batch(batch, backend)


@by_combination
@pytest.mark.parametrize("vocab", [1, 100, sized(2100, 600)])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_a_row_of_minus_infinity_is_not_hidden_and_stays_alone(
    backend: str, dtype: torch.dtype, vocab: int, upstream: str
) -> None:
    """lse = -inf is the truth, and how a part of the vocabulary says that it has no logit; all else is no number."""
    batch = rows(peaked(3, vocab).to(dtype), temperature=0.7)
    batch.logits[1] = -math.inf
    leaf = on_device(batch.logits.clone()).requires_grad_()
    out = token_logprobs(leaf, on_device(batch.token_ids), temperature=0.7, backend=backend)
    check_rows(*out, batch.rows, TOLERANCES[dtype])
    assert batch.rows[1].lse == out.lse.tolist()[1] == -math.inf, "any number is within a bound of inf"

    scales = UPSTREAM[upstream]
    used = [(x, torch.full_like(x, k)) for k, x in zip(scales, out, strict=True) if k]
    (gradient,) = torch.autograd.grad([x for x, _ in used], leaf, [g for _, g in used])
    assert bool(gradient[1].isnan().all())
    others = torch.tensor([0, 2])
    sound = rows(batch.logits[others], batch.token_ids[others], temperature=0.7)
    check_gradient(gradient.cpu()[others], sound, *([k, k] for k in scales))


@by_combination
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 17, sized(2099, 599)])  # 17: the target
def test_a_bad_logit_and_nothing_else(backend: str, dtype: torch.dtype, bad: float, column: int) -> None:
    """Among -inf alone: lse is then no number, either."""
    logits = peaked(2, sized(2100, 600)).to(dtype)
    logits[1] = -math.inf
    logits[1, column] = bad
    batch = rows(logits, torch.tensor([17, 17]))
    assert math.isnan(batch.rows[1].lse)
    out = token_logprobs(on_device(logits), on_device(batch.token_ids), backend=backend)
    check_rows(*out, batch.rows, TOLERANCES[dtype])


@by_backend
def test_a_row_of_minus_infinity_in_a_loss(backend: str) -> None:
    """On-policy, statistics and gradient are of one call."""
    logits = peaked(3, 100).to(torch.bfloat16)
    logits[1] = -math.inf
    leaf, ids = on_device(logits).requires_grad_(), on_device(torch.tensor([1, 2, 3]))
    boundaries = on_device(torch.tensor([0, 2, 3]))
    out = grpo_loss(leaf, ids, on_device(torch.ones(2)), cu_seqlens=boundaries, backend=backend)
    out.loss.backward()
    assert leaf.grad is not None and bool(out.loss.isnan())
    assert leaf.grad.isnan().all(1).tolist() == leaf.grad.isnan().any(1).tolist() == [False, True, False]


@by_combination
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_zero_coefficients_is_exactly_zero(backend: str, dtype: torch.dtype, bad: float) -> None:
    """inf * 0 is NaN: a row that the loss does not use is selected away, for any logits."""
    batch = rows(peaked(4, 300).to(dtype))
    leaf = on_device(batch.logits.clone())
    leaf[2] = bad
    leaf.requires_grad_()
    out = token_logprobs(leaf, on_device(batch.token_ids), backend=backend)
    g = on_device(torch.tensor([1.0, 0.0, 0.0, -2.0])).to(out.logprobs.dtype)
    (gradient,) = torch.autograd.grad(out.logprobs, leaf, g)
    check_gradient(gradient, batch, g.tolist())


@by_combination
def test_no_subnormal_gradients(backend: str, dtype: torch.dtype) -> None:
    """Logits from 0 down to -120 below the peak put p across the whole subnormal range of fp32."""
    vocab = sized(4001, 1001)
    logits = torch.linspace(-120, 0, vocab).repeat(3, 1)
    check_batch(rows(logits.to(dtype), torch.tensor([vocab - 1, vocab // 4, 0])), backend, ["logprobs", "entropy"])


@by_combination
def test_tiny_coefficients(backend: str, dtype: torch.dtype) -> None:
    """1 / (64 sequences of 32k tokens) is subnormal in fp16: no coefficient may be held in the logits' dtype."""
    batch = rows(peaked(3, 40).to(dtype))
    leaf = on_device(batch.logits.clone()).requires_grad_()
    out = token_logprobs(leaf, on_device(batch.token_ids), backend=backend)
    g = on_device(torch.full((3,), 1 / 2**21)).to(out.logprobs.dtype)
    (gradient,) = torch.autograd.grad(out.logprobs, leaf, g)
    check_gradient(gradient, batch, g.tolist())


# --- invariants and derivatives -------------------------------------------------------------------------------------


@by_combination
def test_a_constant_added_to_the_logits_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """On a grid where the addition itself is exact."""
    step, shift = (1.0, 128.0) if dtype is torch.bfloat16 else (1 / 16, 64.0)
    logits = (peaked(5, 400).clamp(-12, 12) / step).round() * step
    ids = on_device(torch.arange(5))
    here, there = (everything(on_device(x.to(dtype)), ids, backend) for x in (logits, logits + shift))
    tol = TOLERANCES[dtype]
    check_close("logprobs", there[0], here[0].double(), 2 * tol.number * here[0].double().abs())
    check_close("entropy", there[1], here[1].double(), 2 * tol.number * (1 + here[1].double()))
    check_close("lse", there[2], here[2] + shift, 2 * tol.number * (1 + shift + here[2].abs()))
    size = here[3].double().abs()
    check_close("gradient", there[3], here[3].double(), (20 * tol.number + 2 * tol.store) * size + tol.tiny)


@needs("reference")
def test_gradcheck_of_the_reference() -> None:
    logits = on_device(peaked(4, 9).double()).requires_grad_()
    ids, mask = on_device(torch.tensor([0, 8, 3, 3])), on_device(torch.tensor([True, True, False, True]))
    for temperature in (0.7, on_device(torch.tensor([0.5, 1.0, 1.5, 2.0]))):

        def outputs(x: Tensor, temperature: float | Tensor = temperature) -> tuple[Tensor, ...]:
            return tuple(token_logprobs(x, ids, temperature=temperature, mask=mask, backend="reference"))

        assert torch.autograd.gradcheck(outputs, logits)


@by_backend
def test_finite_differences_in_fp32(backend: str) -> None:
    """Along random directions; the step's own error is h^2 / 6 times a third derivative of order one."""
    generator = torch.Generator().manual_seed(5)
    logits, ids = on_device(peaked(3, 200)), on_device(torch.tensor([0, 77, 199]))
    whole = everything(logits.clone(), ids, backend)[3]

    def mix(x: Tensor) -> float:
        out = token_logprobs(x, ids, backend=backend)
        return float((0.7 * out.logprobs - 0.3 * out.entropy).double().sum() + 0.2 * out.lse.sum())

    h = 2.0**-7
    for _ in range(5):
        direction = on_device(torch.randn(3, 200, generator=generator))
        slope = (mix(logits + h * direction) - mix(logits - h * direction)) / (2 * h)
        assert slope == pytest.approx(float((whole * direction).double().sum()), abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@by_backend
def test_no_worse_than_torch_at_equal_precision(backend: str, dtype: torch.dtype) -> None:
    """The error of l, of the target column and of the tail, each against torch's log_softmax in the same dtype."""
    batch = rows(peaked(*sized((32, 3000), (16, 1500))).to(dtype))
    ours, torchs = (on_device(batch.logits.clone()).requires_grad_() for _ in range(2))
    ids = on_device(batch.token_ids)
    logprobs = token_logprobs(ours, ids, backend=backend).logprobs
    theirs = torchs.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    logprobs.sum().backward()
    theirs.sum().backward()
    truth = torch.tensor([row.logprob for row in batch.rows], dtype=torch.float64)
    slope = torch.tensor(
        [oracle.row_gradient(x.tolist(), int(y), 1.0, 1.0) for x, y in zip(batch.logits, batch.token_ids, strict=True)],
        dtype=torch.float64,
    )
    at = torch.zeros_like(slope, dtype=torch.bool).scatter(-1, batch.token_ids[:, None], True)
    assert ours.grad is not None and torchs.grad is not None
    for name, mine, other, exact in (
        ("logprobs", logprobs.detach().cpu(), theirs.detach().cpu(), truth),
        ("target", ours.grad.cpu()[at], torchs.grad.cpu()[at], slope[at]),
        ("tail", ours.grad.cpu()[~at], torchs.grad.cpu()[~at], slope[~at]),
    ):
        error, bar = float((mine.double() - exact).norm()), float((other.double() - exact).norm())
        assert error <= bar, f"{name}: error {error}, torch's {bar}"
