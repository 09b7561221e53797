"""NeMo-RL's clipped policy-gradient loss with the losses of this package. In nemo_rl/algorithms/grpo.py, one line:

    from gspo_kernels.integrations.nemo_rl import PolicyLossFn as ClippedPGLossFn

It has that class's arguments, options, attributes and metrics. See docs/nemo-rl.md.
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn
from torch import Tensor

from ..base.layout import as_bool
from ..losses.clipped import PPO, GSPOToken
from ..losses.from_logits import policy_loss_from_logprobs, token_logprobs
from ..losses.objectives import Objective
from ..losses.weighted import CISPO, DRO
from ..rollout.correction import rollout_weights
from ._arrays import renamed
from .reductions import reduction_of

__all__ = ["LogitPolicyLossFn", "PolicyLossFn"]


class PolicyLossFn(ClippedPGLossFn):
    """`ClippedPGLossFn` with another `__call__`.

    Honours all options of ClippedPGLossConfig but two: `positive_example_nll_weight` is refused, and
    `kl_output_clamp_value` bounds the logged KL term alone.

    Raises: ValueError, NotImplementedError: naming the option.
    """

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        super().__init__(cfg, use_fused_linear_logprobs=use_fused_linear_logprobs)
        if self.positive_example_nll_weight > 0:
            raise NotImplementedError(
                "positive_example_nll_weight: expected 0 with gspo_kernels' loss; got "
                f"{self.positive_example_nll_weight}. Set it to 0, or use NeMo-RL's ClippedPGLossFn"
            )
        if self.disable_ppo_ratio and self.ratio_clip_c is not None:
            raise ValueError(
                f"ratio_clip_c: expected null with disable_ppo_ratio, which leaves no ratio to bound; got "
                f"{self.ratio_clip_c}"
            )
        if self.truncated_importance_sampling_ratio is not None and self.truncated_importance_sampling_type is None:
            raise ValueError(
                "truncated_importance_sampling_type: expected 'tis', 'icepop' or 'seq-mask-tis', because "
                f"truncated_importance_sampling_ratio is {self.truncated_importance_sampling_ratio}; got null"
            )
        for name in ("clip_fraction", "clip_fraction_low", "clip_fraction_high"):
            self.metric_normalizations[name] = MetricNormalizer.TOKENS

    @property
    def objective(self) -> Objective:
        """Of the package: GSPO-token, PPO, CISPO or the policy gradient without a ratio."""
        low, high = self.ratio_clip_min, self.ratio_clip_max
        if self.disable_ppo_ratio and not self.force_on_policy_ratio:  # NeMo-RL's order
            return DRO(0.0)
        with renamed(eps_low="ratio_clip_min", eps_high="ratio_clip_max", dual_clip="ratio_clip_c"):
            if self.use_cispo:
                return CISPO(low, high)
            kind = GSPOToken if self.sequence_level_importance_ratios else PPO
            return kind(low, high, self.ratio_clip_c)

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """This micro-batch's share of the loss of the step. The host syncs are those of NeMo-RL's metrics, and one.

        Args:
            next_token_logprobs: [B, S - 1] float32, differentiable; the first is that of `data["input_ids"][:, 1]`.
            data: arrays [B, S] whose first column is not read: `token_mask`, `advantages`, `prev_logprobs` (not read
                with `force_on_policy_ratio`), `generation_logprobs`, and `reference_policy_logprobs` if there is a KL
                penalty; `sample_mask` [B]. Masks are 0 and 1.
            global_valid_seqs, global_valid_toks: of all ranks and micro-batches of the step, 0-d.

        Returns: the loss, and NeMo-RL's metrics with `clip_fraction`, `clip_fraction_low` and `clip_fraction_high`,
            shares of `global_valid_toks`, beside them.
        """
        mask = token_mask_of(data)
        logprobs = next_token_logprobs
        prev = None if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        generation = data["generation_logprobs"][:, 1:]
        by_token = self.loss_type == LossType.TOKEN_LEVEL
        reduction = reduction_of("NeMo-RL", str(by_token))
        options: dict[str, Any] = {
            "mask": mask, "aggregation": reduction.aggregation,
            "normalizer": {"tokens": global_valid_toks, "responses": global_valid_seqs}[reduction.normalizer],
        }  # fmt: skip
        weights = None
        if self.use_importance_sampling_correction:
            weights = self.correction(logprobs.detach() if prev is None else prev, generation, mask)
        loss, stats = policy_loss_from_logprobs(
            logprobs, data["advantages"][:, 1:], prev, objective=self.objective, importance_weights=weights, **options
        )
        if self.reference_policy_kl_penalty != 0:
            loss = loss + self.kl_term(logprobs, data, generation, options)

        with torch.no_grad():
            found = torch.stack([stats.clip_fraction, stats.clip_fraction_low, stats.clip_fraction_high])
            found = found * stats.num_tokens / torch.as_tensor(global_valid_toks).clamp(min=1)
            value, *shares = torch.cat([loss.detach().double()[None], found.double()]).tolist()
            _, metrics = super().__call__(
                next_token_logprobs=logprobs, data=data, global_valid_seqs=global_valid_seqs,
                global_valid_toks=global_valid_toks,
            )  # fmt: skip
        names = ("clip_fraction", "clip_fraction_low", "clip_fraction_high")
        return loss, {**metrics, "loss": value, **dict(zip(names, shares, strict=True))}

    def correction(self, prev: Tensor, generation: Tensor, mask: Tensor) -> Tensor:
        """Factors of the policy term, from the engine's policy to the trainer's: [B, S - 1], or [B] for GSPO."""
        level = "sequence_sum" if self.sequence_level_importance_ratios else "token"
        upper, kind = self.truncated_importance_sampling_ratio, self.truncated_importance_sampling_type
        lower = self.truncated_importance_sampling_ratio_min
        if upper is None or kind == "seq-mask-tis":
            weights = rollout_weights(prev, generation, mask=mask, level=level, upper=None).weights
            if upper is None:
                return weights
            kept = rollout_weights(
                prev, generation, mask=mask, level="sequence_mean", mode="mask", lower=lower, upper=upper
            ).weights
            return torch.where((kept > 0)[:, None], weights, 0.0)
        mode = {"tis": "truncate", "icepop": "mask"}[kind]
        return rollout_weights(prev, generation, mask=mask, level=level, mode=mode, lower=lower, upper=upper).weights

    def kl_term(self, logprobs: Tensor, data: Any, generation: Tensor, options: dict[str, Any]) -> Tensor:
        """The KL penalty, with the gradient through the sampling probability (arXiv 2506.09477).

        A ratio to `logprobs` themselves is 1, and has that gradient; with `use_on_policy_kl_approximation` the ratio is
        to the engine's. A difference of log-probabilities beyond `kl_input_clamp_value` is held there, and has no
        gradient.
        """
        logprobs, ref = data.get("curr_logprobs_unfiltered", logprobs), data["reference_policy_logprobs"][:, 1:]
        if (most := self.kl_input_clamp_value) is not None:
            current = logprobs.detach()
            far = (ref - current).abs() > most
            logprobs = torch.where(far, current, logprobs)
            ref = torch.where(far, current + (ref - current).clamp(-most, most), ref)
        found, _ = policy_loss_from_logprobs(
            logprobs, torch.zeros_like(logprobs), generation if self.use_on_policy_kl_approximation else None,
            objective=PPO(), ref_logprobs=ref, beta=self.reference_policy_kl_penalty,
            kl_estimator=self.reference_policy_kl_type, kl_weighting="ratio", **options,
        )  # fmt: skip
        return found


class LogitPolicyLossFn(PolicyLossFn):
    """The same from logits [B, S, V], which NeMo-RL hands over as they are: masked rows are not read, and no float32
    copy is made. Logits may be a DTensor that is sharded over the vocabulary.

    Not for Megatron's tensor and context parallelism: NeMo-RL passes their groups to its own functions alone.
    """

    input_type = LossInputType.LOGIT

    def __call__(
        self, logits: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """As in `PolicyLossFn`, but for `logits` [B, S, V], divided by the temperature."""
        token_ids = data["input_ids"][:, 1:]
        if logits.shape[:2] != data["input_ids"].shape:
            raise ValueError(
                f"logits: expected shape {[*data['input_ids'].shape, 'V']}, one row per token of input_ids; got "
                f"{list(logits.shape)}. Context parallelism needs PolicyLossFn"
            )
        logprobs = token_logprobs(logits[:, :-1], token_ids, mask=token_mask_of(data)).logprobs
        return super().__call__(logprobs, data, global_valid_seqs, global_valid_toks)


def token_mask_of(data: Any) -> Tensor:
    """[B, S - 1] bool: the tokens of samples that count."""
    return as_bool("token_mask", data["token_mask"][:, 1:]) & as_bool("sample_mask", data["sample_mask"])[:, None]
