"""slime's hook over real processes, on logits as Megatron has them, against plain float64 on the whole batch."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.nn.functional as F
from checks import check_close, check_number
from modes import DEFAULT_MODE
from ranks import grid
from torch import Tensor

from gspo_kernels.integrations import slime

pytestmark = DEFAULT_MODE

VOCAB = 48
TEMPERATURE = 0.8
# (prompt, response): one that fits into a half of a rank, one whose response lies on one rank alone, one token, none.
SAMPLES = [(3, 14), (11, 3), (2, 7), (5, 1), (1, 9), (4, 0), (6, 12)]
PADDING = 5  # rows beyond the last sample
Found = dict[str, Any]


def args(**changes: Any) -> SimpleNamespace:
    found = {
        "advantage_estimator": "gspo", "eps_clip": 3e-4, "eps_clip_high": 4e-4, "eps_clip_c": 3.0, "entropy_coef": 0.01,
        "use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3", "rollout_temperature": TEMPERATURE,
        "rollout_top_p": 1.0, "use_rollout_logprobs": False, "calculate_per_token_loss": False,
        "recompute_loss_function": False,
    }  # fmt: skip
    return SimpleNamespace(**(found | changes))


# --- the whole batch --------------------------------------------------------------------------------------------------


def whole(by_token: bool = False, kept: bool = False) -> dict[str, Any]:
    """Samples before they are sharded: a response's arrays are [response], logits [total, VOCAB].

    `kept`: with the sets of --rollout-top-p 0.9. Some lack the sampled token, some have none but it, or none at all.
    """
    g = torch.Generator().manual_seed(3)
    batch: dict[str, Any] = {
        "total_lengths": [p + r for p, r in SAMPLES],
        "response_lengths": [r for _, r in SAMPLES],
        "unconcat_tokens": [torch.randint(VOCAB, (p + r,), generator=g) for p, r in SAMPLES],
        "loss_masks": [(torch.rand(r, generator=g) < 0.8).long() for _, r in SAMPLES],
        "logits": [torch.randn(p + r, VOCAB, generator=g) * 3 for p, r in SAMPLES],
        "advantages": [],
        "log_probs": [],
        "ref_log_probs": [],
    }
    batch["loss_masks"][0][0] = 1
    batch["loss_masks"][4][:] = 0
    if kept:
        sizes = [torch.randint(4, (r,), generator=g) ** 2 for _, r in SAMPLES]
        sets = [[torch.randperm(VOCAB, generator=g)[: int(n)] for n in some] for some in sizes]
        batch["rollout_top_p_token_ids"] = [torch.cat([torch.zeros(0), *some]).int() for some in sets]
        batch["rollout_top_p_token_offsets"] = [
            torch.tensor([0, *itertools.accumulate(map(len, some))], dtype=torch.int32) for some in sets
        ]
    offsets = [2e-4, 6e-4, -6e-4, 1.5, -2e-4, 0.0, 5e-4]  # of a sample's mean log-ratio: in and out of the clip range
    for i, (prompt, response) in enumerate(SAMPLES):
        rows = torch.log_softmax(over_kept(batch, i, batch["logits"][i].double() / TEMPERATURE), -1)
        new = rows.gather(1, batch["unconcat_tokens"][i][prompt:, None])[:, 0]
        counted = batch["loss_masks"][i].bool()
        noise = torch.randn(response, generator=g, dtype=torch.float64) * 0.05
        noise -= noise[counted].mean() if counted.any() else 0
        old = new - noise - offsets[i]
        batch["log_probs"].append((old.clamp(max=0) if kept else old).float())  # a set of one has 0
        batch["ref_log_probs"].append((new + torch.randn(response, generator=g) * 0.2).float())
        advantage = torch.randn(response if by_token else 1, generator=g).expand(response)
        batch["advantages"].append(advantage.clone() if i != 3 else -advantage.abs())
    return batch


def over_kept(batch: dict[str, Any], i: int, z: Tensor) -> Tensor:
    """The rows that predict a response, -inf but for the columns that are kept; the sampled token always is."""
    prompt, response = SAMPLES[i]
    z = z[prompt - 1 : prompt + response - 1]
    if "rollout_top_p_token_ids" not in batch:
        return z
    ids, offsets = batch["rollout_top_p_token_ids"][i].long(), batch["rollout_top_p_token_offsets"][i].tolist()
    keep = F.one_hot(batch["unconcat_tokens"][i][prompt:], VOCAB).bool()
    for t in range(response):
        keep[t, ids[offsets[t] : offsets[t + 1]]] = True
    return z.masked_fill(~keep, -math.inf)


def plain(batch: dict[str, Any], opt: SimpleNamespace, denominators: list[int] | None) -> Found:
    """The loss, the log and the gradient in float64, sample by sample."""
    leaves = [x.double().requires_grad_() for x in batch["logits"]]
    sums = dict.fromkeys(("pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl", "kl_loss"), torch.zeros(()))
    for i, (prompt, response) in enumerate(SAMPLES):
        z = leaves[i] / TEMPERATURE
        logp = torch.log_softmax(z, -1)[prompt - 1 : prompt + response - 1]  # slime's entropy is of all columns
        mask = batch["loss_masks"][i].double()
        new = torch.log_softmax(over_kept(batch, i, z), -1).gather(1, batch["unconcat_tokens"][i][prompt:, None])[:, 0]
        r = new - batch["log_probs"][i].double()
        log_s = r
        if opt.advantage_estimator == "gspo":
            log_s = (r * mask).sum().detach() / mask.sum().clamp(min=1) + r - r.detach()
        s, a = log_s.exp(), batch["advantages"][i].double()
        clipped = s.clamp(1 - opt.eps_clip, 1 + opt.eps_clip_high)
        policy = torch.maximum(-s * a, -clipped * a)
        if opt.eps_clip_c is not None:
            policy = torch.where(a < 0, torch.minimum(policy, -opt.eps_clip_c * a), policy)
        d = batch["ref_log_probs"][i].double() - new
        found = {
            "pg_loss": policy, "entropy_loss": -(logp.exp() * logp).sum(-1), "ppo_kl": -log_s,
            "pg_clipfrac": ((s * a) > (clipped * a)).double(), "kl_loss": torch.expm1(d) - d,
        }  # fmt: skip
        count = 1 if opt.calculate_per_token_loss else max(denominators[i] if denominators else int(mask.sum()), 1)
        for name, x in found.items():
            sums[name] = sums[name] + (x * mask).sum() / count
    loss = sums["pg_loss"] - opt.entropy_coef * sums["entropy_loss"]
    if opt.use_kl_loss:
        loss = loss + opt.kl_loss_coef * sums["kl_loss"]
    loss.backward()
    log = {name: x.detach() for name, x in sums.items()}
    return {"loss": loss.detach(), "log": log, "gradient": [x.grad for x in leaves]}


# --- in a rank --------------------------------------------------------------------------------------------------------


def positions(total: int, cp_rank: int, cp: int) -> list[int]:
    """The positions of a sample on a rank, in order; those from `total` on are Megatron's padding."""
    if cp == 1:
        return list(range(total))
    width = math.ceil(total / (2 * cp))
    return [p for half in (cp_rank, 2 * cp - 1 - cp_rank) for p in range(half * width, (half + 1) * width)]


def response_part(sample: int, values: Tensor, cp_rank: int, cp: int) -> Tensor:
    prompt, response = SAMPLES[sample]
    mine = [
        p - prompt + 1 for p in positions(prompt + response, cp_rank, cp) if prompt - 1 <= p < prompt + response - 1
    ]
    return values[torch.tensor(mine, dtype=torch.int64)]


def reducer(batch: dict[str, Any], cp_rank: int, cp: int, opt: Any, denominators: Any) -> Callable[[Tensor], Tensor]:
    masks = [response_part(i, mask, cp_rank, cp) for i, mask in enumerate(batch["loss_masks"])]
    counts = denominators or [int(mask.sum()) for mask in batch["loss_masks"]]

    def sum_of_sample_mean(x: Tensor) -> Tensor:
        parts = x.split([len(mask) for mask in masks])
        over = [1] * len(masks) if opt.calculate_per_token_loss else [max(n, 1) for n in counts]
        return torch.stack([(part * mask).sum() / n for part, mask, n in zip(parts, masks, over, strict=True)]).sum()

    return sum_of_sample_mean


def approx_kl(new: Tensor, ref: Tensor, kl_loss_type: str) -> Tensor:
    assert kl_loss_type == "k3"
    return torch.expm1(ref - new) - (ref - new)


def stand_ins(tp: int, cp: int, groups: Any, rank: int) -> dict[str, Any]:
    core: Any = ModuleType("megatron.core")
    core.mpu = SimpleNamespace(
        get_tensor_model_parallel_group=lambda: groups[0], get_tensor_model_parallel_world_size=lambda: tp,
        get_context_parallel_group=lambda: groups[1], get_context_parallel_world_size=lambda: cp,
        get_context_parallel_rank=lambda: rank // tp,
    )  # fmt: skip
    utils: Any = ModuleType("slime.utils.ppo_utils")
    utils.compute_approx_kl = approx_kl
    names = ("megatron", "slime", "slime.utils")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    return modules | {"megatron.core": core, "slime.utils.ppo_utils": utils}


def share(
    rank: int, tp: int, cp: int, changes: dict[str, Any], by_token: bool, denominators: list[int] | None
) -> Found:
    """The hook's loss, log and gradient on a rank, with each row's (sample, position); rows of padding are NaN."""
    cp_rank, tp_rank = divmod(rank, tp)
    batch, opt = whole(by_token, "rollout_top_p" in changes), args(**changes)
    rows, positions_of_rows = [], []
    for i, total in enumerate(batch["total_lengths"]):
        mine = positions(total, cp_rank, cp)
        padded = F.pad(batch["logits"][i], (0, 0, 0, 4 * cp), value=math.nan)
        rows.append(padded[torch.tensor(mine, dtype=torch.int64)])
        positions_of_rows += [(i, p) for p in mine]
    rows.append(torch.full((PADDING, VOCAB), math.nan))
    leaf = torch.cat(rows)[None].chunk(tp, -1)[tp_rank].clone().requires_grad_()
    given = dict(batch)
    for name in ("advantages", "log_probs", "ref_log_probs"):
        given[name] = [response_part(i, x, cp_rank, cp) for i, x in enumerate(batch[name])]
    if denominators:
        given["rollout_mask_sums"] = [torch.tensor(n) for n in denominators]
    if changes.get("use_rollout_logprobs"):
        given["rollout_log_probs"] = given.pop("log_probs")
    with mock.patch.dict(sys.modules, stand_ins(tp, cp, grid(rank, tp, cp), rank)):
        logits = leaf * 1
        loss, log = slime.policy_loss(opt, given, logits, reducer(batch, cp_rank, cp, opt, denominators))
        loss.backward()
    assert leaf.grad is not None
    needed = opt.recompute_loss_function or (opt.rollout_top_p != 1 and tp > 1)
    assert torch.equal(logits.detach(), leaf.grad) != needed, "written over, unless still needed"
    return {"loss": loss, "log": log, "gradient": leaf.grad[0], "positions_of_rows": positions_of_rows}


CASES: dict[str, tuple[dict[str, Any], bool, list[int] | None]] = {
    "gspo": ({}, False, None),
    "gspo, advantages per token": ({}, True, None),
    "gspo, per token loss, no dual clip": ({"calculate_per_token_loss": True, "eps_clip_c": None}, False, None),
    "gspo, rollouts of several samples": ({"use_rollout_logprobs": True}, False, [16, 16, 5, 1, 0, 0, 11]),
    "grpo": (
        {"advantage_estimator": "grpo", "eps_clip": 0.02, "eps_clip_high": 0.03, "use_kl_loss": False},
        True,
        None,
    ),
    "gspo, recomputed": ({"recompute_loss_function": True}, False, None),
    "gspo, kept sets": ({"rollout_top_p": 0.9}, False, None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("tp", "cp"), [pytest.param(t, c, marks=ranks.mark) for t, c in [(1, 1), (2, 1), (1, 2), (2, 2)]]
)
def test_shares_of_all_ranks_are_the_whole(tp: int, cp: int, case: str) -> None:
    changes, by_token, denominators = CASES[case]
    found = ranks.run(tp * cp, share, tp, cp, changes, by_token, denominators)
    batch, opt = whole(by_token, "rollout_top_p" in changes), args(**changes)
    reference = plain(batch, opt, denominators)
    first = found[::tp]
    size = sum(abs(float(x)) for x in reference["log"].values())
    # Means, or sums over all tokens: each token's number is good to 1e-6, and AVX2 rounds otherwise than AVX-512.
    terms = sum(int(mask.sum()) for mask in batch["loss_masks"]) if opt.calculate_per_token_loss else 1
    check_number("loss", sum(float(one["loss"]) for one in first), float(reference["loss"]), 1e-6 * size)
    for name, x in reference["log"].items():
        if name == "kl_loss" and not opt.use_kl_loss:
            assert all(name not in one["log"] for one in first)
            continue
        check_number(name, sum(float(one["log"][name]) for one in first), float(x), 1e-6 * (terms + abs(float(x))))
    assert 0 < float(reference["log"]["pg_clipfrac"]) < len(SAMPLES) or opt.calculate_per_token_loss
    for c, t in itertools.product(range(cp), range(tp)):
        one = found[c * tp + t]
        assert torch.equal(one["loss"], found[c * tp]["loss"]), "the ranks of a tp group agree"
        width = VOCAB // tp
        for row, (sample, position) in enumerate(one["positions_of_rows"]):
            gradient = one["gradient"][row].double()
            if position >= batch["total_lengths"][sample]:
                assert bool((gradient == 0).all()), "a row of padding"
                continue
            expected = reference["gradient"][sample][position, t * width : (t + 1) * width]
            if bool((reference["gradient"][sample][position] == 0).all()):
                assert bool((gradient == 0).all()), "a row that no response has"
                continue
            # Each column by its own size, p, or 1 - p of the token. Log-probabilities near -10 have 1e-6 in float32,
            # which is what KL, weighed by 0.1, takes a difference of.
            z = batch["logits"][sample].double() / TEMPERATURE
            at = position - SAMPLES[sample][0] + 1  # its number in the response
            whole_row, kept_row = (torch.softmax(x, -1) for x in (z[position], over_kept(batch, sample, z)[at]))
            own = torch.maximum(whole_row, kept_row)
            token = int(batch["unconcat_tokens"][sample][position + 1])
            own[token] = 1 - whole_row[token]
            coefficient = reference["gradient"][sample][position, token].abs() / own[token]
            slack = own[t * width : (t + 1) * width] * (2e-7 + 5e-6 * coefficient) + 3e-6 * expected.abs()
            check_close(f"sample {sample}, row {position}", gradient, expected, slack)
        assert bool((one["gradient"][len(one["positions_of_rows"]) :] == 0).all()), "rows beyond the last sample"


def test_on_policy_without_old_log_probs() -> None:
    """slime has none where the policy is the one that sampled: all ratios are 1, and nothing is clipped."""
    batch = {k: x for k, x in whole().items() if k != "log_probs"}
    leaf = F.pad(torch.cat(batch["logits"]), (0, 0, 0, PADDING))[None].requires_grad_()
    opt = args(use_kl_loss=False, entropy_coef=0.0, recompute_loss_function=True)
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)):
        loss, log = slime.policy_loss(opt, batch, leaf, reducer(batch, 0, 1, opt, None))
    reference = sum(
        -(a * m).sum() / m.sum().clamp(min=1) for a, m in zip(batch["advantages"], batch["loss_masks"], strict=True)
    )
    check_number("loss", float(loss.detach()), float(reference), 1e-6)
    assert float(log["pg_clipfrac"]) == 0 and float(log["ppo_kl"]) == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [*((name, True) for name in slime.REFUSED), ("advantage_estimator", "cispo")],
)
def test_refusals_name_the_option(option: str, value: Any) -> None:
    refused = pytest.raises(NotImplementedError, match=rf"^{option}: expected")
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)), refused:
        slime.policy_loss(args(**{option: value}), whole(), torch.zeros(1, 1, VOCAB), torch.sum)


def hook(batch: dict[str, Any]) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    """The hook on one rank, with all terms."""
    opt = args(recompute_loss_function=True, rollout_top_p=0.9 if "rollout_top_p_token_ids" in batch else 1.0)
    leaf = F.pad(torch.cat(batch["logits"]), (0, 0, 0, PADDING))[None]
    return partial(slime.policy_loss, opt, batch, leaf, reducer(batch, 0, 1, opt, None))


def test_kept_sets_are_needed_and_fit() -> None:
    opt = args(rollout_top_p=0.9)
    short = whole(kept=True)
    short["rollout_top_p_token_offsets"][1] = short["rollout_top_p_token_offsets"][1][:-1]
    for batch, name in ((whole(), "ids"), (short, r'offsets"\]\[1\]')):
        refused = pytest.raises(ValueError, match=rf'^batch\["rollout_top_p_token_{name}.*expected')
        with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)), refused:
            slime.policy_loss(opt, batch, F.pad(torch.cat(batch["logits"]), (0, 0, 0, PADDING))[None], torch.sum)


@pytest.mark.parametrize("name", ["advantages", "log_probs", "ref_log_probs"])
def test_rounded_arrays_are_refused(name: str) -> None:
    """The hook casts all samples to one dtype, which must not hide that they were rounded before."""
    batch = whole()
    batch[name] = [x.bfloat16() for x in batch[name]]
    refused = pytest.raises(TypeError, match=rf'^batch\["{name}"\]: expected float32')
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)), refused as error:
        hook(batch)()
    assert "cast_forward_inputs=False" in str(error.value)


def test_float64_arrays_keep_their_digits() -> None:
    """Advantages and log-probabilities reach the loss unrounded; one sample in float64 makes all float64."""
    batch = whole()
    batch["advantages"][0] = batch["advantages"][0].double() + 1e-12
    batch["log_probs"] = [x.double() - 1e-12 for x in batch["log_probs"]]
    spy = mock.patch.object(slime, "policy_loss_from_logprobs", wraps=slime.policy_loss_from_logprobs)
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)), spy as loss:
        hook(batch)()
    _, advantages, old_logprobs = loss.call_args.args
    rows = [first + prompt - 1 + i for first, prompt, response in starts() for i in range(response)]
    assert torch.equal(advantages[0, rows], torch.cat([x.double() for x in batch["advantages"]]))
    assert torch.equal(old_logprobs[rows], torch.cat(batch["log_probs"]))


def starts() -> list[tuple[int, int, int]]:
    """(first row, prompt, response) of each sample on one rank."""
    ends = itertools.accumulate((p + r for p, r in SAMPLES), initial=0)
    return [(first, p, r) for first, (p, r) in zip(ends, SAMPLES, strict=False)]


@pytest.mark.parametrize("kept", [False, True])
def test_the_default_device_does_not_matter(kept: bool) -> None:
    loss_of = hook(whole(kept=kept))
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)):
        loss, log = loss_of()
        with torch.device("meta"):
            other, _ = loss_of()
    assert torch.equal(other, loss) and all(bool(x.isfinite()) for x in log.values())
