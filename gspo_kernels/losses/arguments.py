"""What ranks compare of sequences: context-parallel ranks share them, tensor-parallel ranks have the same ones."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..base.agreement import Agreement, fingerprint
from .token_stage import TokenInputs


def agree_on_sequences(agreement: Agreement, inputs: TokenInputs) -> None:
    """All ranks have the same sequences and options; all of a tensor-parallel group the same numbers too."""
    if not agreement.active:
        return
    objective, normalizer = inputs.objective, inputs.normalizer
    kind = type(objective)
    ours = kind.__module__.startswith(f"{__package__}.")  # the repr of another class may show an address
    arrays = {
        "advantages": (inputs.advantages, inputs.advantages_per_token),
        "old_logprobs": (inputs.old_logprobs, True),
        "ref_logprobs": (inputs.ref_logprobs, True),
        "rollout_logprobs": (inputs.rollout_logprobs, True),
        "group_tokens": (inputs.group_tokens, False),
        "importance_weights": (inputs.importance_weights, inputs.importance_weights_per_token),
    }
    options: dict[str, Any] = {
        "cu_seqlens (how many sequences, or rows of a padded batch)": inputs.batch.sequences,
        "objective": repr(objective) if ours else f"{kind.__module__}.{kind.__qualname__}",
        "aggregation": inputs.aggregation,
        "normalizer": None if normalizer is None else float(normalizer),
        "kl_estimator": inputs.kl_estimator,
        "kl_weighting": inputs.kl_weighting,
        "beta": inputs.beta,
        "entropy_coef": inputs.entropy_coef,
        "max_log_ratio": inputs.max_log_ratio,
        **{name: _kind(values, per_token) for name, (values, per_token) in arrays.items()},
    }
    agreement.same(options)
    layout = inputs.batch.layout()
    held, counted = layout.held, layout.mask
    same = {"cu_seqlens, mask (how long each sequence is)": fingerprint(layout.local_lengths)}
    for name, (values, per_token) in arrays.items():
        shown, by_sequence = "None", []
        if values is not None:
            shown = fingerprint(values, counted if per_token else held)
            if not per_token:
                compared = torch.ones_like(held) if name == "group_tokens" else held  # every rank counts all groups
                by_sequence = [x if does else None for x, does in zip(values.tolist(), compared.tolist(), strict=True)]
        same[f"{name} (where tokens count)"] = shown
        agreement.compare("cp_group", f"{name} (by sequence)", by_sequence, partial(_check_held, name))
    agreement.same(same, over="tp_group")


def _kind(values: Tensor | None, per_token: bool) -> str:
    return "None" if values is None else "one per token" if per_token else "one per sequence"


def _check_held(name: str, group: str, numbers: dict[int, list[float | None]]) -> None:
    """Refuses different numbers for one sequence; None where a rank has no token of it, and may have any number."""
    for i, of_sequence in enumerate(zip(*numbers.values(), strict=True)):
        held = {rank: x for rank, x in zip(numbers, of_sequence, strict=True) if x is not None}
        if len({"nan" if math.isnan(x) else x for x in held.values()}) > 1:
            listed = ", ".join(f"{x:g} on rank {rank}" for rank, x in held.items())
            which = "" if name.startswith("group_tokens") else " that has tokens of it"
            raise ValueError(
                f"{name}: expected the same number for a sequence on every rank of {group}{which}; got, for sequence "
                f"{i}, {listed}"
            )
