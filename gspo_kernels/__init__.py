"""Policy losses for reinforcement learning of language models, fused over vocabulary-sized logits."""

from .base.layout import Layout
from .integrations.transformers import LogitTransform, logit_transform_of
from .linear.from_hidden import (
    linear_grpo_loss,
    linear_gspo_loss,
    linear_gspo_token_loss,
    linear_logits,
    linear_policy_loss,
    linear_ppo_loss,
    linear_token_logprobs,
)
from .linear.value_head import linear_value_loss, linear_values
from .losses.clip_range import ClipRange, suggest_clip_range
from .losses.clipped import GMPO, GRPO, GSPO, PPO, SAPO, GSPOToken, clipped_surrogate
from .losses.from_logits import (
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    policy_loss,
    policy_loss_from_logprobs,
    ppo_loss,
    token_logprobs,
)
from .losses.from_rows import KeptLogprobs, TokenLogprobs
from .losses.objectives import Objective, Terms, TokenBatch
from .losses.reduction import global_count
from .losses.stats import HeadWork, Stats
from .losses.token_stage import LossOutput
from .losses.top_entropy import TopEntropy
from .losses.triton_term import TritonHold, TritonTerm
from .losses.value_loss import ValueLossOutput, ValueStats, value_loss
from .losses.weighted import CISPO, DPPO, DRO, TOPR, TOPRToken
from .report import explain
from .rollout.advantages import group_advantages, group_token_counts, whiten_advantages
from .rollout.correction import RolloutMismatch, RolloutWeights, RolloutWeightStats, rollout_mismatch, rollout_weights
from .rollout.diagnosis.diagnose import diagnose_mismatch
from .rollout.diagnosis.report import MismatchCandidate, MismatchDiagnosis
from .rollout.gae import GaeOutput, gae
from .rollout.prompted import PromptedRollouts
from .rollout.rollouts import Rollouts
from .rollout.sglang import from_sglang
from .rollout.vllm import from_vllm
from .rollout.weight_versions import WeightVersions
from .rows.arguments import next_token_targets
from .rows.kept import KeptTokens
from .rows.vocab_shard import VocabularyShard

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "DPPO",
    "DRO",
    "GMPO",
    "GRPO",
    "GSPO",
    "PPO",
    "SAPO",
    "TOPR",
    "ClipRange",
    "GSPOToken",
    "GaeOutput",
    "HeadWork",
    "KeptLogprobs",
    "KeptTokens",
    "Layout",
    "LogitTransform",
    "LossOutput",
    "MismatchCandidate",
    "MismatchDiagnosis",
    "Objective",
    "PromptedRollouts",
    "RolloutMismatch",
    "RolloutWeightStats",
    "RolloutWeights",
    "Rollouts",
    "Stats",
    "TOPRToken",
    "Terms",
    "TokenBatch",
    "TokenLogprobs",
    "TopEntropy",
    "TritonHold",
    "TritonTerm",
    "ValueLossOutput",
    "ValueStats",
    "VocabularyShard",
    "WeightVersions",
    "clipped_surrogate",
    "diagnose_mismatch",
    "explain",
    "from_sglang",
    "from_vllm",
    "gae",
    "global_count",
    "group_advantages",
    "group_token_counts",
    "grpo_loss",
    "gspo_loss",
    "gspo_token_loss",
    "linear_grpo_loss",
    "linear_gspo_loss",
    "linear_gspo_token_loss",
    "linear_logits",
    "linear_policy_loss",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "linear_value_loss",
    "linear_values",
    "logit_transform_of",
    "next_token_targets",
    "policy_loss",
    "policy_loss_from_logprobs",
    "ppo_loss",
    "rollout_mismatch",
    "rollout_weights",
    "suggest_clip_range",
    "token_logprobs",
    "value_loss",
    "whiten_advantages",
]
