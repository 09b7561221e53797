"""`GSPOConfig`, and which of TRL's options `GSPOTrainer` supports."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from trl import GRPOConfig

from ... import GRPO, GSPO, GSPOToken
from ..reductions import OPTIONS

Normalizer = Callable[[Any, dict[str, Any], Tensor], Tensor | float]  # (trainer, micro-batch, loss mask)

# importance_sampling_level -> the objective, whose default clip range is that of GSPOConfig
LEVELS: dict[str, type[GSPO | GSPOToken | GRPO]] = {"sequence": GSPO, "sequence_token": GSPOToken, "token": GRPO}

# What is counted -> the normalizer of a micro-batch
NORMALIZERS: dict[str, Normalizer] = {
    "responses": lambda trainer, inputs, mask: trainer._per_step(inputs["num_sequences_in_batch"]),
    "tokens": lambda trainer, inputs, mask: trainer._per_step(inputs["num_items_in_batch"]),
    "local tokens": lambda trainer, inputs, mask: trainer._accumulated * mask.sum().clamp(min=1),
    "responses x length": lambda trainer, inputs, mask: (
        trainer._accumulated * float(len(mask) * trainer.max_completion_length)
    ),
}
LOSS_TYPES = tuple(OPTIONS["TRL"].values)

# Options of GRPOConfig -> the supported values
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "importance_sampling_level": tuple(LEVELS),
    "loss_type": LOSS_TYPES,
    "off_policy_mask_threshold": (None,),
    "use_liger_kernel": (False,),
    "cast_lm_head_to_fp32": (False,),  # here logits are always accumulated in fp32
    "torch_compile": (False,),  # would recompile at every step, because the head's job changes
}


@dataclass
class GSPOConfig(GRPOConfig):
    """`GRPOConfig` with the GSPO paper's defaults (arXiv 2507.18071), clip range included."""

    importance_sampling_level: str = field(
        default="sequence",
        metadata={"help": "The unit of a ratio: 'sequence' (GSPO), 'sequence_token' (GSPO-token) or 'token' (GRPO)."},
    )
    loss_type: str = field(default="grpo", metadata={"help": f"One of {', '.join(LOSS_TYPES)}; the paper's is grpo."})
    epsilon: float | None = field(
        default=None,
        metadata={"help": "Clip range below 1. None: 3e-4, and 4e-4 above ('token': 0.2 and 0.27)."},
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Clip range above 1. None: as below 1."})

    def __post_init__(self) -> None:
        if self.epsilon is None and self.importance_sampling_level in LEVELS:
            defaults = LEVELS[self.importance_sampling_level]()
            self.epsilon = defaults.eps_low
            self.epsilon_high = defaults.eps_high if self.epsilon_high is None else self.epsilon_high
        super().__post_init__()


def check_options(args: Any) -> None:
    """Raises a ValueError for values that this trainer does not support; warns about a range that never clips."""
    for name, supported in SUPPORTED.items():
        value = getattr(args, name)
        if value not in supported:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, supported))}; got {value!r}")
    highest = 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
    if args.delta is not None and args.delta <= highest:
        raise ValueError(
            f"delta: expected more than 1 + epsilon_high, {highest}, so that it bounds only ratios with "
            f"negative advantages; got {args.delta}"
        )
    if args.importance_sampling_level != "token" and args.epsilon >= 0.1:
        warnings.warn(
            f"epsilon: the ratio of a whole sequence hardly ever leaves a range of {args.epsilon}; the GSPO paper and "
            "GSPOConfig's defaults are 3e-4 and 4e-4",
            stacklevel=3,
        )
