"""slime's hook in a rank: batches as slime has them, what they come to in plain float64, and the comparison.

Megatron's `mpu` is a stand-in (`stubbed_share`) or Megatron's own (`shares_over_megatron`).
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from checks import check_close, check_number
from megatron_ranks import GRIDS, model_parallel, with_driver
from ranks import grid
from torch import Tensor

from gspo_kernels.integrations import slime

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
    """Modules in the place of Megatron's and slime's."""
    core: Any = ModuleType("megatron.core")
    core.mpu = SimpleNamespace(
        get_tensor_model_parallel_group=lambda: groups[0], get_tensor_model_parallel_world_size=lambda: tp,
        get_context_parallel_group=lambda: groups[1], get_context_parallel_world_size=lambda: cp,
        get_context_parallel_rank=lambda: rank // tp,
    )  # fmt: skip
    return {"megatron": ModuleType("megatron"), "megatron.core": core, **slime_stand_in()}


def slime_stand_in() -> dict[str, Any]:
    utils: Any = ModuleType("slime.utils.ppo_utils")
    utils.compute_approx_kl = approx_kl
    modules = {name: ModuleType(name) for name in ("slime", "slime.utils")}
    return {**modules, "slime.utils.ppo_utils": utils}


Case = tuple[dict[str, Any], bool, list[int] | None]  # changed arguments, advantages per token, denominators


def given_of(rank: int, tp: int, cp: int, case: Case) -> tuple[Any, dict[str, Any], Tensor, list[tuple[int, int]]]:
    """slime's arguments, a rank's batch and logits, and the (sample, position) of each of their rows.

    Rows of padding are NaN.
    """
    (changes, by_token, denominators), (cp_rank, tp_rank) = case, divmod(rank, tp)
    batch, opt = whole(by_token, "rollout_top_p" in changes), args(**changes)
    rows, positions_of_rows = [], []
    for i, total in enumerate(batch["total_lengths"]):
        mine = positions(total, cp_rank, cp)
        padded = F.pad(batch["logits"][i], (0, 0, 0, 4 * cp), value=math.nan)
        rows.append(padded[torch.tensor(mine, dtype=torch.int64)])
        positions_of_rows += [(i, p) for p in mine]
    rows.append(torch.full((PADDING, VOCAB), math.nan))
    leaf = torch.cat(rows)[None].chunk(tp, -1)[tp_rank].clone()
    given = dict(batch)
    for name in ("advantages", "log_probs", "ref_log_probs"):
        given[name] = [response_part(i, x, cp_rank, cp) for i, x in enumerate(batch[name])]
    if denominators:
        given["rollout_mask_sums"] = [torch.tensor(n) for n in denominators]
    if changes.get("use_rollout_logprobs"):
        given["rollout_log_probs"] = given.pop("log_probs")
    return opt, given, leaf, positions_of_rows


def share(rank: int, tp: int, cp: int, case: Case) -> Found:
    """The hook's loss, log and gradient on a rank; the trainers' modules are those that are imported."""
    opt, given, leaf, positions_of_rows = given_of(rank, tp, cp, case)
    logits = leaf.requires_grad_() * 1
    loss, log = slime.policy_loss(opt, given, logits, reducer(whole(case[1]), rank // tp, cp, opt, case[2]))
    loss.backward()
    assert leaf.grad is not None
    needed = opt.recompute_loss_function or (opt.rollout_top_p != 1 and tp > 1)
    assert torch.equal(logits.detach(), leaf.grad) != needed, "written over, unless still needed"
    return {"loss": loss, "log": log, "gradient": leaf.grad[0], "positions_of_rows": positions_of_rows}


def stubbed_share(rank: int, tp: int, cp: int, case: Case) -> Found:
    with mock.patch.dict(sys.modules, stand_ins(tp, cp, grid(rank, tp, cp), rank)):
        return share(rank, tp, cp, case)


def shares_over_megatron(rank: int, cases: list[Case]) -> dict[Any, Any]:
    """By grid, of each case, (the hook's, slime's own) over Megatron's `mpu`. What is left of the ranks repeats it.

    Where slime is not installed, its KL estimator is a stand-in, and there is None of its own.
    """
    from drivers import slime as driver

    found: dict[Any, Any] = {"driver": with_driver(driver.step)}
    installed = find_spec("slime") is not None
    modules = contextlib.nullcontext() if installed else mock.patch.dict(sys.modules, slime_stand_in())
    with modules:
        for tp, cp in GRIDS:
            with model_parallel(tp, cp) as state:
                me = state.get_context_parallel_rank() * tp + state.get_tensor_model_parallel_rank()
                own = slime_itself if installed else lambda *unused: None
                found[tp, cp] = [(share(me, tp, cp, case), own(me, tp, cp, case)) for case in cases]
    return found


def slime_itself(rank: int, tp: int, cp: int, case: Case) -> Found:
    """The same of slime's own loss. Its package of Megatron's utilities starts accelerators: only the modules count."""
    import slime.backends as backends

    name = "slime.backends.megatron_utils"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [f"{backends.__path__[0]}/megatron_utils"]
        sys.modules[name] = package
    losses, parts = (importlib.import_module(f"{name}.{x}") for x in ("loss", "cp_utils"))
    opt, given, leaf, positions_of_rows = given_of(rank, tp, cp, case)
    vars(opt).update(
        dict.fromkeys(slime_options, False), log_probs_chunk_size=-1, custom_pg_loss_reducer_function_path=None,
        true_on_policy_mode=False, qkv_format="thd",
    )  # fmt: skip
    reduce = parts.get_sum_of_sample_mean(
        given["total_lengths"], given["response_lengths"], given["loss_masks"], given.get("rollout_mask_sums"),
        opt.calculate_per_token_loss,
    )  # fmt: skip
    leaf = leaf.nan_to_num().requires_grad_()  # its softmax reads rows of padding
    with torch.compiler.set_stance("force_eager"):  # torch 2.13's compile cache has other clip ranges' code
        loss, log = losses.policy_loss_function(opt, given, leaf * 1, reduce)
    loss.backward()
    assert leaf.grad is not None
    return {"loss": loss, "log": log, "gradient": leaf.grad[0], "positions_of_rows": positions_of_rows}


slime_options = tuple(name for name in slime.REFUSED if name != "custom_pg_loss_reducer_function_path")


# --- outside ----------------------------------------------------------------------------------------------------------

CASES: dict[str, Case] = {
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


def check_shares(found: list[Found], tp: int, cp: int, case: Case) -> None:
    """All ranks' results, in the order of ranks, against the whole batch in float64."""
    changes, by_token, denominators = case
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
