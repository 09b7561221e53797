"""Stand-ins for trainers that are not on PyPI: the few classes that our losses take from them, with their fields; and
for modules that a trainer imports on its way to a function that does not need them.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from drivers._stubs import stubs
from torch import Tensor


@contextmanager
def modules(contents: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """What can be imported meanwhile, by its module's name. The packages above it are empty if they are missing."""
    added = {}
    before = {name: sys.modules[name] for name in contents if name in sys.modules}
    for name, content in contents.items():
        if find_spec(name.partition(".")[0]) is None:
            added |= {x: ModuleType(x) for x in (name[:i] for i, letter in enumerate(name) if letter == ".")}
        added[name] = ModuleType(name)
        vars(added[name]).update(content)
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
        sys.modules.update(before)


# --- prime-rl 559b44772e47, src/prime_rl/trainer/rl/loss.py -----------------------------------------------------------


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


def with_prime_rl() -> AbstractContextManager[None]:
    return modules({"prime_rl.trainer.rl.loss": {"LossOutputs": LossOutputs}})


# --- NeMo-RL 7ea279abfbeb, nemo_rl/algorithms/loss --------------------------------------------------------------------


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


CLIPPED_PG_LOSS = {
    "disable_ppo_ratio": False, "token_level_loss": True, "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2, "ratio_clip_max": 0.2, "ratio_clip_c": None, "reference_policy_kl_penalty": 0.01,
    "reference_policy_kl_type": "k3", "kl_input_clamp_value": 20.0, "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False, "use_importance_sampling_correction": False, "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None, "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False, "force_on_policy_ratio": False, "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}  # fmt: skip


def clipped_pg_loss_config(**options: Any) -> SimpleNamespace:
    """ClippedPGLossConfig with its defaults."""
    assert options.keys() <= CLIPPED_PG_LOSS.keys()
    return SimpleNamespace(**CLIPPED_PG_LOSS | options)


class ClippedPGLossFn:
    """With the attributes that NeMo-RL's class takes from its options, and one of its metrics."""

    input_type = LossInputType.LOGPROB

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        vars(self).update({name: getattr(cfg, name) for name in CLIPPED_PG_LOSS})
        self.reference_policy_kl_penalty = 0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL
        self.metric_normalizations = {"loss": MetricNormalizer.TOKENS}

    def __call__(self, next_token_logprobs: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any:
        assert not torch.is_grad_enabled()  # asked for metrics alone
        return None, {"num_valid_samples": data["sample_mask"].sum().item()}


def nemo_rl_losses() -> Any:
    """The module `gspo_kernels.integrations.nemo_rl`."""
    names = {"LossType": LossType, "LossInputType": LossInputType, "MetricNormalizer": MetricNormalizer}
    contents = {
        "nemo_rl.algorithms.loss.interfaces": names,
        "nemo_rl.algorithms.loss.loss_functions": {"ClippedPGLossFn": ClippedPGLossFn},
    }
    with modules(contents):
        from gspo_kernels.integrations import nemo_rl
    return nemo_rl


# --- torchtitan: what its RL package imports for its actors, its generator, its renderers and its loggers ------------


class Actor:
    pass


@contextmanager
def with_torchtitan() -> Iterator[None]:
    models = "torchtitan.experiments.rl.models"
    contents = {
        "monarch.actor": {"Actor": Actor, "concurrent_endpoint": lambda method: method, "current_rank": None},
        "torch.utils.tensorboard": {"SummaryWriter": None},
        f"{models}.vllm_registry": {"register_to_vllm": None},
        f"{models}.vllm_wrapper": {"VLLMModelWrapper": None},
    }
    with modules(contents), stubs("renderers", "torchstore"):
        yield
