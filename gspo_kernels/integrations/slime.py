"""A loss for slime's hook on Megatron's logits as they are: packed, sharded over vocabulary and context.

    --loss-type custom_loss --custom-loss-function-path gspo_kernels.integrations.slime.policy_loss

In the place of slime's own policy loss, with its arguments. Where that gathers every response over the context-parallel
ranks, twice, this sends two or three numbers a response. See docs/slime.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layout import as_bool
from ..losses.from_logits import policy_loss_from_logprobs, token_logprobs
from ..losses.objectives import GRPO, GSPOToken, clipped_surrogate

__all__ = ["policy_loss"]

REFUSED = (
    "allgather_cp",
    "custom_pg_loss_reducer_function_path",
    "get_mismatch_metrics",
    "use_opsm",
    "use_score_centering",
    "use_tis",
    "use_unbiased_kl",
)


def policy_loss(
    args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one micro-batch; no host sync.

    Args:
        args: slime's. `advantage_estimator` "gspo": GSPO-token, which is GSPO where a response has one advantage;
            any other: a ratio and a clip per token. Honours `eps_clip`, `eps_clip_high`, `eps_clip_c`, `entropy_coef`,
            `use_kl_loss`, `rollout_temperature`, `use_rollout_logprobs`, `calculate_per_token_loss` and
            `recompute_loss_function`, without which the gradient is written over the logits.
        batch: slime's lists, one entry a sample. `advantages` and log-probabilities are this rank's, the others whole.
        logits: [1, T, V / tp] of this rank, not yet divided by the temperature.
        sum_of_sample_mean: slime's reduction, of entropy, KL and what is logged.

    Returns: the sum over samples of their means (over tokens, with `calculate_per_token_loss`), this rank's share; and
        the same sums for slime's log.
    """
    from megatron.core import mpu

    refuse(args)
    tp_group = mpu.get_tensor_model_parallel_group() if mpu.get_tensor_model_parallel_world_size() > 1 else None
    cp_size, cp_rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    cp_group = mpu.get_context_parallel_group() if cp_size > 1 else None

    count, device = logits.shape[1], logits.device
    ends, rows, token_ids, mask, counts = [0], [], [], [], []
    for tokens, loss_mask, total, response in zip(
        batch["unconcat_tokens"], batch["loss_masks"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        length, pieces = rows_of(total, response, cp_rank, cp_size)
        first = total - response - 1  # this position predicts the response's first token
        rows += [torch.arange(row, row + end - begin, device="cpu") + ends[-1] for begin, end, row in pieces]
        token_ids += [tokens[begin + 1 : end + 1] for begin, end, _ in pieces]
        mask += [loss_mask[begin - first : end - first] for begin, end, _ in pieces]
        counts.append(sum(end - begin for begin, end, _ in pieces))
        ends.append(ends[-1] + length)
    boundaries = torch.tensor([*ends, count], device="cpu").to(device, non_blocking=True)  # the last is padding
    of_responses = torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *rows]).to(device, non_blocking=True)

    def place(values: list[Tensor], dtype: torch.dtype) -> Tensor:
        """[T], from what is there for the rows of responses."""
        found = torch.zeros(count, dtype=dtype, device=device)
        return found.index_copy(0, of_responses, torch.cat([found[:0], *values]).to(dtype))

    counted = as_bool("loss_masks", place(mask, torch.float32))
    of_old = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
    old = _log_probs(batch, of_old) if args.use_rollout_logprobs or batch.get(of_old) else None
    high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    kind = GSPOToken if args.advantage_estimator == "gspo" else GRPO
    objective = kind(args.eps_clip, high, args.eps_clip_c)
    for values in batch["advantages"]:
        checks.numbers('batch["advantages"]', values)  # before all are brought into one dtype
    advantages = place(batch["advantages"], torch.float32)

    by_token = args.calculate_per_token_loss
    logprobs, entropy, _ = token_logprobs(
        logits[0], place(token_ids, torch.int64), mask=counted, temperature=args.rollout_temperature,
        tp_group=tp_group, overwrite_logits=not args.recompute_loss_function,
    )  # fmt: skip
    pg_loss, stats = policy_loss_from_logprobs(
        logprobs, advantages[None], place(old, torch.float32) if old else None, objective=objective, mask=counted,
        cu_seqlens=boundaries,
        importance_weights=None if by_token else place(shares(batch, counts), torch.float64)[None],
        aggregation="token_mean" if by_token else "sequence_mean", normalizer=1.0, cp_group=cp_group,
    )  # fmt: skip

    entropy_loss = sum_of_sample_mean(entropy[of_responses])
    loss = pg_loss - args.entropy_coef * entropy_loss
    terms = clipped_surrogate(
        stats.log_ratio.double(), advantages.double(), eps_low=objective.eps_low, eps_high=objective.eps_high,
        dual_clip=None, max_log_ratio=stats.log_ratio.new_tensor(20.0),
    )  # fmt: skip
    assert terms.clipped_low is not None and terms.clipped_high is not None
    log = {
        "pg_loss": pg_loss,
        "entropy_loss": entropy_loss,
        "pg_clipfrac": sum_of_sample_mean((terms.clipped_low | terms.clipped_high).float()[of_responses]),
        "ppo_kl": sum_of_sample_mean(-stats.log_ratio[of_responses]),
    }
    if args.use_kl_loss:
        from slime.utils.ppo_utils import compute_approx_kl

        new, ref = logprobs[of_responses], torch.cat(_log_probs(batch, "ref_log_probs"))
        log["kl_loss"] = sum_of_sample_mean(compute_approx_kl(new, ref, kl_loss_type=args.kl_loss_type))
        loss = loss + args.kl_loss_coef * log["kl_loss"]
    return loss, {name: x.detach().clone() for name, x in {"loss": loss, **log}.items()}


def _log_probs(batch: Any, name: str) -> list[Tensor]:
    """Of each sample: refused where they have been rounded, before all are brought into one dtype."""
    found: list[Tensor] = batch[name]
    for values in found:
        checks.digits(f'batch["{name}"]', values)
    return found


def rows_of(total: int, response: int, cp_rank: int, cp_size: int) -> tuple[int, list[tuple[int, int, int]]]:
    """(how many rows this rank has of a sample, which of them predict its response).

    Megatron pads a sample to 2 cp_size equal parts, of which a rank has the r-th from the front and the r-th from the
    back. A piece (begin, end, row): positions begin to end of the sample, of which the first is this row.
    """
    halves = [0] if cp_size == 1 else [cp_rank, 2 * cp_size - 1 - cp_rank]
    width = total if cp_size == 1 else -(-total // (2 * cp_size))
    pieces = []
    for place, half in enumerate(halves):
        begin, end = max(half * width, total - response - 1), min((half + 1) * width, total - 1)
        if begin < end:
            pieces.append((begin, end, begin - half * width + place * width))
    return len(halves) * width, pieces


def shares(batch: Any, counts: list[int]) -> list[Tensor]:
    """For each row of a response, its length over that of its rollout, which may have several samples: slime's mean."""
    masks = batch["loss_masks"]
    sums = batch.get("rollout_mask_sums") or [mask.sum() for mask in masks]

    def share(mask: Tensor, whole: Any) -> Tensor:
        return mask.sum() / torch.as_tensor(whole, dtype=torch.float64, device=mask.device).clamp(min=1)

    return [share(mask, whole).expand(count) for mask, whole, count in zip(masks, sums, counts, strict=True)]


def refuse(args: Any) -> None:
    for name in REFUSED:
        if getattr(args, name, None):
            raise NotImplementedError(f"{name}: expected it off with this loss; got {getattr(args, name)!r}")
    if getattr(args, "rollout_top_p", 1.0) != 1.0:
        raise NotImplementedError(
            f"rollout_top_p: expected 1.0, as this loss normalises over the whole vocabulary; got {args.rollout_top_p}"
        )
    if args.advantage_estimator == "cispo":
        raise NotImplementedError("advantage_estimator: expected one whose loss clips ratios; got 'cispo'")
