"""How trainers reduce a loss over tokens and responses, by the values of their options: one table for all integrations.

A reduction is an aggregation of the losses here, and what its normalizer counts. The table on the page about migration
is made from this one.
"""

from __future__ import annotations

from typing import NamedTuple

from ..base import checks

__all__ = ["Reduction", "reduction_of"]

NORMALIZERS = {  # what a trainer divides by, over all micro-batches and ranks of an optimizer step unless said
    "tokens": "unmasked tokens",
    "responses": "responses",
    "prompts": "prompts",
    "responses x length": "responses, times a length that is set or the padded one",
    "local tokens": "unmasked tokens of the micro-batch",
    "local responses": "responses of the micro-batch",
    "one": "1: the sum",
}


class Reduction(NamedTuple):
    """How numbers per token become one loss."""

    aggregation: str  # of the losses here
    normalizer: str  # what the loss is divided by, in words: a key of NORMALIZERS


class Option(NamedTuple):
    """A trainer's option that selects the reduction."""

    name: str  # as the trainer's users write it
    values: dict[str, Reduction]


OPTIONS = {  # by the trainer's name
    "OpenRLHF": Option(
        "loss_agg_mode",
        {
            "token-mean": Reduction("token_mean", "tokens"),
            "seq-mean-token-mean": Reduction("sequence_mean", "responses"),
        },
    ),
    "SkyRL": Option(
        "loss_reduction",
        {
            "token_mean": Reduction("token_mean", "tokens"),
            "token_mean_legacy": Reduction("token_mean", "local tokens"),
            "sequence_mean": Reduction("sequence_mean", "responses"),
            "seq_mean_token_sum_norm": Reduction("sequence_sum", "responses x length"),
            "prompt_mean": Reduction("group_mean", "prompts"),
        },
    ),
    "ms-swift": Option(
        "loss_type",
        {
            "grpo": Reduction("sequence_mean", "local responses"),
            "sapo": Reduction("sequence_mean", "local responses"),
            "bnpo": Reduction("token_mean", "local tokens"),
            "dr_grpo": Reduction("token_mean", "responses x length"),
            "dapo": Reduction("token_mean", "tokens"),
            "cispo": Reduction("token_mean", "tokens"),
        },
    ),
    "NeMo-RL": Option(
        "token_level_loss",
        {"False": Reduction("sequence_mean", "responses"), "True": Reduction("token_mean", "tokens")},
    ),
    "open-instruct": Option("loss_denominator", {"token": Reduction("token_mean", "tokens")}),
    "slime": Option(
        "calculate_per_token_loss",
        {"False": Reduction("sequence_mean", "responses"), "True": Reduction("token_mean", "tokens")},
    ),
    "TRL": Option(
        "loss_type",
        {
            "grpo": Reduction("sequence_mean", "responses"),
            "dapo": Reduction("token_mean", "tokens"),
            "bnpo": Reduction("token_mean", "local tokens"),
            "dr_grpo": Reduction("token_mean", "responses x length"),
        },
    ),
    "verl": Option(
        "loss_agg_mode",
        {
            "token-mean": Reduction("token_mean", "tokens"),
            "token-sum": Reduction("token_mean", "one"),
            "seq-mean-token-mean": Reduction("sequence_mean", "responses"),
            "seq-mean-token-sum": Reduction("sequence_sum", "responses"),
            "seq-mean-token-sum-norm": Reduction("sequence_sum", "responses x length"),
        },
    ),
}


def reduction_of(trainer: str, value: str) -> Reduction:
    """The reduction that a trainer's option selects.

    Args:
        trainer: a key of `OPTIONS`, such as "verl".
        value: the option's value, as the trainer's users write it.

    Raises: ValueError: naming the trainer's option, its values and what came.
    """
    option = OPTIONS[trainer]
    checks.choice(option.name, value, tuple(option.values))
    return option.values[value]
