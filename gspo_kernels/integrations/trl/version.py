"""Which versions of TRL the trainer works with: those that have what it overrides and reads."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import warnings
from typing import Any

TESTED = ((1, 14), (1, 16))  # from, to

METHODS = (
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
    "get_high_entropy_mask",
)
OPTIONS = (
    "importance_sampling_level", "delta", "use_bias_correction_kl", "steps_per_generation", "entropy_coef",
    "use_adaptive_entropy", "top_entropy_quantile", "off_policy_mask_threshold", "router_aux_loss_coef",
)  # fmt: skip
ATTRIBUTES = ("_entropy_bonus_enabled", "_last_world_entropy", "_entropy_window_stats", "aux_loss_enabled")


def check_version(version: str, trainer: Any, config: Any) -> None:
    """Raises an ImportError if TRL's classes lack something; warns about a version with which this was not tested."""
    fields = {field.name for field in dataclasses.fields(config)}
    source = inspect.getsource(sys.modules[trainer.__module__])
    lacking = [name for name in METHODS if not hasattr(trainer, name)]
    lacking += [name for name in OPTIONS if name not in fields] + [name for name in ATTRIBUTES if name not in source]
    first, last = (".".join(map(str, part)) for part in TESTED)
    if lacking:
        raise ImportError(
            f"trl: expected {first} to {last}, in which GRPOTrainer and GRPOConfig have {', '.join(lacking)}; got "
            f"{version}"
        )
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if not TESTED[0] <= numbers <= TESTED[1]:
        warnings.warn(
            f"trl: GSPOTrainer overrides private methods of TRL and was tested with {first} to {last}; got {version}, "
            "which has these methods too",
            stacklevel=3,
        )
