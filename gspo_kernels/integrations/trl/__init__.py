"""GSPO, GSPO-token and GRPO in TRL's trainer: log-probabilities, entropies and loss from hidden states, by our kernels.

    from gspo_kernels.integrations.trl import GSPOConfig, GSPOTrainer       # in place of GRPOConfig, GRPOTrainer

They are computed where hidden states enter the model's LM head, within the model's own forward. There its weight is
whole, under DDP, FSDP2 and PEFT alike. docs/trl.md lists the models and the differences from TRL's numbers.
"""

import trl

from .version import check_version

check_version(trl.__version__, trl.GRPOTrainer, trl.GRPOConfig)

from .config import GSPOConfig  # noqa: E402 (after the check)
from .trainer import GSPOTrainer  # noqa: E402

__all__ = ["GSPOConfig", "GSPOTrainer"]
