"""A policy loss for slime's custom-loss hook, on Megatron's logits: packed, sharded over vocabulary and context.

    --loss-type custom_loss --custom-loss-function-path gspo_kernels.integrations.slime.policy_loss

It replaces slime's own policy loss and takes the same arguments. slime gathers every response over the context-parallel
ranks twice; this loss sends two or three numbers per response instead. See docs/slime.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import as_bool
from ..losses.clipped import GRPO, GSPOToken
from ..losses.from_logits import policy_loss_from_logprobs, token_logprobs
from ..losses.from_rows import KeptLogprobs
from ..rows.kept import KeptTokens
from ._arrays import dual_clipped, renamed
from .reductions import reduction_of

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
    """The loss of one micro-batch. Without kept sets (`rollout_top_p` 1) there is no host sync, with them one.

    Args:
        args: slime's arguments. `advantage_estimator` "gspo" selects GSPO-token, which equals GSPO where all tokens of
            a response have one advantage; any other estimator selects a ratio and a clip per token. Honours `eps_clip`,
            `eps_clip_high`, `eps_clip_c`, `entropy_coef`, `use_kl_loss`, `rollout_temperature`, `use_rollout_logprobs`
            and `calculate_per_token_loss`. The gradient overwrites the logits unless `recompute_loss_function` is set.
        batch: slime's lists, one entry per sample. `advantages` and the log-probabilities hold this rank's tokens; the
            other lists hold whole samples.
        logits: [1, T, V / tp] of this rank, not yet divided by the temperature.
        sum_of_sample_mean: slime's reduction, applied to the entropy, the KL term and the logged values.

    Returns:
        This rank's share of the sum over samples of their means (over tokens, with `calculate_per_token_loss`), and
        the same sums for slime's log.
    """
    from megatron.core import mpu

    refuse(args)
    tp_group = mpu.get_tensor_model_parallel_group() if mpu.get_tensor_model_parallel_world_size() > 1 else None
    cp_size, cp_rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    cp_group = mpu.get_context_parallel_group() if cp_size > 1 else None
    rows = response_rows(batch, logits, cp_rank, cp_size)

    mask = as_bool("loss_masks", rows.scatter(rows.mask))
    advantages = rows.scatter(_checked(batch, "advantages", checks.numbers))
    old_name = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
    has_old = args.use_rollout_logprobs or batch.get(old_name)
    old_logprobs = rows.scatter(_checked(batch, old_name, checks.digits)) if has_old else None
    high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    kind = GSPOToken if args.advantage_estimator == "gspo" else GRPO
    with renamed(eps_low="eps_clip", eps_high="eps_clip_high", dual_clip="eps_clip_c"):
        objective = kind(args.eps_clip, high, args.eps_clip_c)

    by_token = args.calculate_per_token_loss
    kept = kept_tokens(batch, rows) if getattr(args, "rollout_top_p", 1.0) != 1.0 else None
    # Two distributions over a shard of the vocabulary have two gradients, which cannot both be written over the logits.
    overwrite = not args.recompute_loss_function and (kept is None or tp_group is None)
    found = token_logprobs(
        logits[0], rows.scatter(rows.token_ids, torch.int64), mask=mask, temperature=args.rollout_temperature,
        kept=kept, tp_group=tp_group, overwrite_logits=overwrite,
    )  # fmt: skip
    if isinstance(found, KeptLogprobs):
        assert found.full is not None
        logprobs, entropy = found.kept.logprobs, found.full.entropy  # slime's entropy is of the whole vocabulary
    else:
        logprobs, entropy = found.logprobs, found.entropy
    pg_loss, stats = policy_loss_from_logprobs(
        logprobs, advantages[None], old_logprobs, objective=objective, mask=mask, cu_seqlens=rows.cu_seqlens,
        importance_weights=None if by_token else rows.scatter(shares(batch, rows.counts))[None],
        aggregation=reduction_of("slime", str(bool(by_token))).aggregation, normalizer=1.0, cp_group=cp_group,
    )  # fmt: skip

    entropy_loss = sum_of_sample_mean(entropy[rows.indices])
    loss = pg_loss - args.entropy_coef * entropy_loss
    dual = dual_clipped(objective, stats.clipped_high, advantages)  # not counted by slime
    clipped = stats.clipped_low | (stats.clipped_high & ~dual)
    log = {
        "pg_loss": pg_loss,
        "entropy_loss": entropy_loss,
        "pg_clipfrac": sum_of_sample_mean(clipped.float()[rows.indices]),
        "ppo_kl": sum_of_sample_mean(-stats.log_ratio[rows.indices]),
    }
    if args.use_kl_loss:
        from slime.utils.ppo_utils import compute_approx_kl

        new, ref = logprobs[rows.indices], torch.cat(_checked(batch, "ref_log_probs", checks.digits))
        log["kl_loss"] = sum_of_sample_mean(compute_approx_kl(new, ref, kl_loss_type=args.kl_loss_type))
        loss = loss + args.kl_loss_coef * log["kl_loss"]
    return loss, {name: x.detach().clone() for name, x in {"loss": loss, **log}.items()}


class ResponseRows(NamedTuple):
    """The rows of this rank's logits that predict a response, sample after sample; the other rows are masked."""

    cu_seqlens: Tensor  # [samples + 2]: boundaries of the samples' rows; the last sequence is padding
    indices: Tensor  # [R]: the rows that predict a response's tokens
    counts: list[int]  # how many of them each sample has
    token_ids: list[Tensor]  # what they predict
    mask: list[Tensor]  # slime's loss masks for them
    length: int  # T, the number of rows of the logits
    pieces: list[list[tuple[int, int]]]  # of each sample: the tokens of its response, begin to end

    def scatter(self, values: list[Tensor], at_least: torch.dtype = torch.float32) -> Tensor:
        """[T]: `values` at these rows, 0 elsewhere, in a dtype that holds them and `at_least`: float64 stays."""
        dtype = reduce(torch.promote_types, (x.dtype for x in values), at_least)
        found = torch.zeros(self.length, dtype=dtype, device=self.indices.device)
        return found.index_copy(0, self.indices, torch.cat([found[:0], *values]).to(dtype))


def response_rows(batch: Any, logits: Tensor, cp_rank: int, cp_size: int) -> ResponseRows:
    """The response rows of a packed batch [1, T, V / tp] on one context-parallel rank."""
    length, device = logits.shape[1], logits.device
    ends, indices, token_ids, mask, counts, parts = [0], [], [], [], [], []
    for tokens, loss_mask, total, response in zip(
        batch["unconcat_tokens"], batch["loss_masks"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        sample_rows, pieces = rows_of(total, response, cp_rank, cp_size)
        first = total - response - 1  # this position predicts the response's first token
        indices += [torch.arange(row, row + end - begin, device="cpu") + ends[-1] for begin, end, row in pieces]
        token_ids += [tokens[begin + 1 : end + 1] for begin, end, _ in pieces]
        mask += [loss_mask[begin - first : end - first] for begin, end, _ in pieces]
        counts.append(sum(end - begin for begin, end, _ in pieces))
        parts.append([(begin - first, end - first) for begin, end, _ in pieces])
        ends.append(ends[-1] + sample_rows)
    no_rows = torch.zeros(0, dtype=torch.int64, device="cpu")
    return ResponseRows(
        torch.tensor([*ends, length], device="cpu").to(device, non_blocking=True),
        torch.cat([no_rows, *indices]).to(device, non_blocking=True),
        counts, token_ids, mask, length, parts,
    )  # fmt: skip


def kept_tokens(batch: Any, rows: ResponseRows) -> KeptTokens:
    """What `--rollout-top-p` kept for each row, [T]. As in slime, the sampled token is kept in any case.

    The engine samples with another kernel than the one that lists the set, so a token at its edge may be missing. To
    see which, this copies the token ids to the host.
    """
    nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
    sets, sizes = [nothing], [nothing]
    for i, pieces in enumerate(rows.pieces):
        ids, offsets = (_listed(batch, f"rollout_top_p_token_{name}", i) for name in ("ids", "offsets"))
        response = int(batch["response_lengths"][i])
        if offsets.shape != (response + 1,):
            raise ValueError(
                f'batch["rollout_top_p_token_offsets"][{i}]: expected {response + 1} numbers, one more than the '
                f"response has tokens; got {offsets.numel()}"
            )
        for begin, end in pieces:
            sets.append(ids[int(offsets[begin]) : int(offsets[end])])
            sizes.append(offsets[begin : end + 1].diff())
    ids, counts = torch.cat(sets), torch.cat(sizes)
    tokens = torch.cat([nothing, *(x.to("cpu", torch.int64) for x in rows.token_ids)])
    row = torch.arange(tokens.numel(), device="cpu").repeat_interleave(counts)
    missing = torch.ones_like(tokens, dtype=torch.bool)
    missing[row[ids == tokens[row]]] = False
    order = torch.cat([row, missing.nonzero()[:, 0]]).argsort(stable=True)
    offsets = torch.nn.functional.pad((counts + missing).cumsum(0), (1, 0))
    kept = KeptTokens(torch.cat([ids, tokens[missing]])[order], offsets, every_row=True)
    return kept.to(rows.indices.device, non_blocking=True).scatter(rows.indices, rows.length)


def _listed(batch: Any, name: str, sample: int) -> Tensor:
    """slime's ragged arrays are lists, or int32 tensors on the CPU."""
    if batch.get(name) is None:
        raise ValueError(f'batch["{name}"]: expected what --rollout-top-p kept, because it is not 1; got None')
    return torch.as_tensor(batch[name][sample], dtype=torch.int64, device="cpu")


def rows_of(total: int, response: int, cp_rank: int, cp_size: int) -> tuple[int, list[tuple[int, int, int]]]:
    """(number of rows that this rank holds of a sample, the pieces of them that predict its response).

    Megatron pads a sample to 2 cp_size equal parts. Rank r holds part r from the front and part r from the back. A
    piece (begin, end, row) is positions begin to end of the sample; position begin is this rank's row `row`.
    """
    parts = [0] if cp_size == 1 else [cp_rank, 2 * cp_size - 1 - cp_rank]
    width = total if cp_size == 1 else -(-total // (2 * cp_size))
    pieces = []
    for i, part in enumerate(parts):
        begin, end = max(part * width, total - response - 1), min((part + 1) * width, total - 1)
        if begin < end:
            pieces.append((begin, end, begin - part * width + i * width))
    return len(parts) * width, pieces


def _checked(batch: Any, name: str, check_dtype: Callable[[str, Tensor], None]) -> list[Tensor]:
    """One array per sample. Rounded ones are refused here, because one common dtype would hide the rounding."""
    found: list[Tensor] = batch[name]
    for values in found:
        check_dtype(f'batch["{name}"]', values)
    return found


def shares(batch: Any, counts: list[int]) -> list[Tensor]:
    """For each response row, the sample's token count over that of its rollout, which may have several samples."""
    masks = batch["loss_masks"]
    sums = batch.get("rollout_mask_sums") or [mask.sum() for mask in masks]

    def share(mask: Tensor, whole: Any) -> Tensor:
        return mask.sum() / torch.as_tensor(whole, dtype=torch.float64, device=mask.device).clamp(min=1)

    return [share(mask, whole).expand(count) for mask, whole, count in zip(masks, sums, counts, strict=True)]


def refuse(args: Any) -> None:
    """Raises for options that this loss does not honour."""
    for name in REFUSED:
        if getattr(args, name, None):
            raise NotImplementedError(f"{name}: expected it off with this loss; got {getattr(args, name)!r}")
    if args.advantage_estimator == "cispo":
        raise NotImplementedError("advantage_estimator: expected one whose loss clips ratios; got 'cispo'")
