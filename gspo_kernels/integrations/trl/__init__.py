"""GSPO, GSPO-token and GRPO in TRL's trainer: log-probabilities, entropies and loss from hidden states, by our kernels.

    from gspo_kernels.integrations.trl import GSPOConfig, GSPOTrainer       # in place of GRPOConfig, GRPOTrainer

The model's LM head computes them instead of logits, within the model's own forward. There its weight is whole, under
DDP, FSDP2 and PEFT alike. docs/trl.md lists the differences from TRL's numbers.
"""

import trl

if not trl.__version__.startswith("1.16."):  # the trainer overrides private methods of TRL, which change
    raise ImportError(f"trl: expected 1.16, with which this was tested; got {trl.__version__}")

from .config import GSPOConfig
from .trainer import GSPOTrainer

__all__ = ["GSPOConfig", "GSPOTrainer"]
