"""What our NeMo-RL loss needs of NeMo-RL, which is not on PyPI: two enumerations, and the class that it extends, with
the attributes that NeMo-RL's class takes from its options. `ClippedPGLossFn.__call__` is asked for its metrics alone.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


DEFAULTS = {
    "disable_ppo_ratio": False, "token_level_loss": True, "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2, "ratio_clip_max": 0.2, "ratio_clip_c": None, "reference_policy_kl_penalty": 0.01,
    "reference_policy_kl_type": "k3", "kl_input_clamp_value": 20.0, "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False, "use_importance_sampling_correction": False, "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None, "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False, "force_on_policy_ratio": False, "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}  # fmt: skip


def config(**options: Any) -> SimpleNamespace:
    """ClippedPGLossConfig's fields."""
    assert options.keys() <= DEFAULTS.keys()
    return SimpleNamespace(**DEFAULTS | options)


class ClippedPGLossFn:
    input_type = LossInputType.LOGPROB

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        vars(self).update({name: getattr(cfg, name) for name in DEFAULTS})
        self.reference_policy_kl_penalty = 0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL
        self.metric_normalizations = {"loss": MetricNormalizer.TOKENS}

    def __call__(self, next_token_logprobs: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any:
        assert not torch.is_grad_enabled()
        return None, {"loss": 0.0, "num_valid_samples": data["sample_mask"].sum().item()}


def load() -> Any:
    """`gspo_kernels.integrations.nemo_rl`, on these classes where NeMo-RL is not installed."""
    interfaces: Any = ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType, interfaces.LossInputType = LossType, LossInputType
    interfaces.MetricNormalizer = MetricNormalizer
    functions: Any = ModuleType("nemo_rl.algorithms.loss.loss_functions")
    functions.ClippedPGLossFn = ClippedPGLossFn
    packages = [ModuleType(name) for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss")]
    with mock.patch.dict(sys.modules, {x.__name__: x for x in [*packages, interfaces, functions]}):
        from gspo_kernels.integrations import nemo_rl
    return nemo_rl
