"""Policy losses for verl, one for each objective, and engines that read the logits once.

verl 0.9 imports this module through the entry point `verl.plugins`, or because VERL_USE_EXTERNAL_MODULES or
`actor_rollout_ref.model.external_lib` names it. Importing it registers the losses with verl and changes nothing else
there. See docs/verl.md.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import re
import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

import gspo_kernels

from ..base import checks
from ..losses.from_logits import policy_loss_from_logprobs, token_logprobs
from ..losses.objectives import Objective
from ..losses.stats import Stats
from ._arrays import checked_count, dual_clipped, mask_of_padded, masked_mean
from .reductions import reduction_of

__all__ = ["log_probs_and_entropy", "policy_loss", "register"]

TESTED = "0.9."
ENGINE = "gspo_kernels"  # VERL_ENGINE_VENDOR with this value selects the engines below

LOGGED_BY_VERL = ("entropy", "ref_kl")  # stats left out of our metrics: verl adds and logs both terms itself

logger = logging.getLogger(__name__)


# --- the losses by name -----------------------------------------------------------------------------------------------

OBJECTIVES: list[type[Objective]] = [
    x
    for x in (getattr(gspo_kernels, name) for name in gspo_kernels.__all__)
    if isinstance(x, type) and issubclass(x, Objective) and x not in (Objective, gspo_kernels.TopEntropy)
]  # TopEntropy needs entropies, which verl passes to no loss


def losses() -> dict[str, Callable[[Any], Objective]]:
    """By `loss_mode`: what makes the objective from verl's ActorConfig.

    The name is the objective's in lower case and "_kernels": `gspo_token_kernels`. An objective that has a choice has
    one name for each: `dppo_tv_kernels`, `dppo_kl_kernels`.
    """
    found: dict[str, Callable[[Any], Objective]] = {}
    for kind in OBJECTIVES:
        name = re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind.__name__).lower()
        choices: dict[str, dict[str, str]] = {f"{name}_kernels": {}}
        for field, hint in typing.get_type_hints(kind).items():
            if typing.get_origin(hint) is Literal:
                choices = {f"{name}_{x}_kernels": {field: x} for x in typing.get_args(hint)}
        found |= {mode: functools.partial(objective_of, kind, **choice) for mode, choice in choices.items()}
    return found


def objective_of(kind: type[Objective], config: Any, **choices: str) -> Objective:
    """The objective with the numbers of verl's ActorConfig, from the fields that verl's own losses read."""

    def bound(name: str) -> float:
        value = getattr(config, name)
        meaning = "how far the clip range reaches"
        return checks.number(name, config.clip_ratio if value is None else value, meaning, at_least=0, or_infinite=True)

    def factor(name: str) -> float | None:
        value = getattr(config, name)
        return None if value is None else checks.number(name, value, "the largest ratio that counts", above=1.0)

    def beta() -> float:
        meaning = "DRO's weight of the squared log-ratio (0: GPG)"
        return checks.number("policy_loss.dro_beta", config.policy_loss.dro_beta, meaning, at_least=0.0)

    read: dict[str, Callable[[], float | None]] = {
        "eps_low": lambda: bound("clip_ratio_low"),
        "eps_high": lambda: bound("clip_ratio_high"),
        "delta_low": lambda: bound("clip_ratio_low"),
        "delta_high": lambda: bound("clip_ratio_high"),
        "dual_clip": lambda: factor("clip_ratio_c"),
        "max_ratio": lambda: factor("clip_ratio_c"),
        "tau_pos": lambda: config.tau_pos,
        "tau_neg": lambda: config.tau_neg,
        "penalty": beta,
    }
    given: dict[str, Any] = {x.name: read[x.name]() for x in dataclasses.fields(kind) if x.name not in choices}  # type: ignore[arg-type]
    return kind(**given, **choices)


LOSSES = losses()


def policy_loss(
    loss_mode: str,
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss that verl's `ppo_loss` calls, by keyword. Token arrays are [B, T]; one host sync, for the metrics.

    Args:
        loss_mode: an objective's name: `gspo_kernels`, `gspo_token_kernels`, `grpo_kernels`, `dppo_tv_kernels` ...
        loss_agg_mode: one of verl's five, for every objective.
        config: verl's ActorConfig. Read are `global_batch_info` and, as the objective has them, `clip_ratio_low` and
            `clip_ratio_high` (`clip_ratio` where they are None), `clip_ratio_c` (None: no dual clip and no truncation),
            `tau_pos`, `tau_neg` and `policy_loss.dro_beta`.
        rollout_is_weights: constant factors of the policy term.

    Returns: the loss, scaled as verl scales it, and its metrics.

    Raises: ValueError, TypeError: naming verl's argument, what was expected and what came.
    """
    if config is None:
        raise ValueError("config: expected verl's ActorConfig, which has the clip range; got None")
    checks.tensor("response_mask", response_mask, "True or 1 where a token counts, [B, T]")
    weights = {} if rollout_is_weights is None else {"rollout_is_weights": rollout_is_weights}
    mask = mask_of_padded(
        {"log_prob": log_prob, "old_log_prob": old_log_prob}, {"advantages": advantages, **weights},
        ("response_mask", response_mask),
    )  # fmt: skip
    objective = LOSSES[loss_mode](config)
    by_response = not objective.advantages_per_token
    aggregation, normalizer = scale(mask, loss_agg_mode, config.global_batch_info)
    advantages = advantages.detach()
    lowest = highest = advantages.new_zeros(mask.shape[0])
    if mask.shape[1]:
        lowest = torch.where(mask, advantages, torch.inf).amin(1)
        highest = torch.where(mask, advantages, -torch.inf).amax(1)
    loss, stats = policy_loss_from_logprobs(
        log_prob, highest if by_response else advantages, old_log_prob, objective=objective, mask=mask,
        importance_weights=rollout_is_weights, aggregation=aggregation, normalizer=normalizer,
    )  # fmt: skip
    found = metrics(objective, stats, advantages, old_log_prob, log_prob, mask)
    found["differing"] = (lowest < highest).sum()
    values = dict(zip(found, torch.stack([x.double() for x in found.values()]).tolist(), strict=True))
    if (differing := values.pop("differing")) and by_response:
        raise ValueError(
            "advantages: expected one value for all tokens of a response, as GSPO has one ratio for it; got "
            f"{differing:g} responses with several. For those, set policy_loss.loss_mode=gspo_token_kernels"
        )
    return loss, values


def scale(mask: Tensor, mode: str, info: Any) -> tuple[str, float | Tensor]:
    """(aggregation, normalizer) of verl's `loss_agg_mode`. verl averages gradients: the normalizer is count / dp_size.

    A count of 0 is passed on as a tensor: the loss is 0 where no token counts. Where tokens do count, a count of 0 is
    refused, or gives NaN where the mask cannot be read without a host sync.
    """
    aggregation, counted = reduction_of("verl", mode)
    dp_size = checks.whole("dp_size", info.get("dp_size", 1), "how many ranks average their gradients", at_least=1)
    of_tokens = aggregation == "token_mean"
    name = "batch_num_tokens" if of_tokens else "global_batch_size"
    count = 1 if counted == "one" else info.get(name)
    if count is None:
        if dp_size > 1:
            raise ValueError(
                f"{name}: expected the count of all ranks in config.global_batch_info, because dp_size is {dp_size}; "
                "got None"
            )
        count = (mask if of_tokens else mask.any(1)).sum(dtype=torch.float64)
    count = checked_count(name, count, mask)
    if counted == "responses x length":
        factor = info.get("loss_scale_factor")
        if factor is None:
            factor = max(mask.shape[1], 1)
        count = count * checks.number("loss_scale_factor", factor, "what sequences' sums are divided by", above=0.0)
    return aggregation, count / dp_size


@torch.no_grad()
def metrics(
    objective: Objective, stats: Stats, advantages: Tensor, old_log_prob: Tensor, log_prob: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """verl's three metrics, by token as verl has them for all losses, and our stats.

    `actor/pg_clipfrac_lower` is the share of tokens held at `clip_ratio_c`: by the dual clip, or by DPPO's truncation;
    `actor/pg_clipfrac` that of all others that are clipped.
    """
    low, high = (
        x if stats.ratio_of == "token" else x[:, None].expand(mask.shape)
        for x in (stats.clipped_low, stats.clipped_high)
    )
    held, most = dual_clipped(objective, high, advantages), getattr(objective, "max_ratio", None)
    if most is not None:
        held = (stats.log_ratio > math.log(most)) & ~low & ~high
    return {
        "actor/pg_clipfrac": masked_mean(((low | high) & ~held).double(), mask),
        "actor/ppo_kl": masked_mean((old_log_prob - log_prob).double().clamp(-20.0, 20.0), mask),
        "actor/pg_clipfrac_lower": masked_mean(held.double(), mask),
        **{f"actor/gspo_kernels/{name}": x for name, x in stats.as_dict().items() if name not in LOGGED_BY_VERL},
    }


# --- log-probabilities and entropies from logits ----------------------------------------------------------------------


def log_probs_and_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    tp_group: Any = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """verl's `logprobs_from_logits` and `entropy_from_logits` in one read of the logits; both differentiable, float32.

    With Megatron's `tp_group`, its `vocab_parallel_log_probs_from_logits` and `vocab_parallel_entropy`.

    Args:
        logits: [N, V] or [B, T, V], not yet divided by the temperature; with `tp_group`, this rank's columns. A DTensor
            that is sharded over the vocabulary is used as it is, not gathered.
        labels: the token that each row predicts.
        temperature: a number, or a tensor with one per row: float32, float64 or integers. Temperatures below 1e-6 are
            raised to it, as in verl, which has 0 at padding.
        mask: rows that are False are not read, and give 0.
        inplace_backward: the gradient overwrites the logits.
    """
    if isinstance(temperature, Tensor):
        checks.numbers("temperature", temperature)
        temperature = (temperature if temperature.is_floating_point() else temperature.double()).clamp(min=1e-6)
    found = token_logprobs(
        logits, labels, temperature=temperature, mask=mask, tp_group=tp_group, overwrite_logits=inplace_backward
    )
    return found.logprobs, found.entropy


def refuse(get: Any, *names: str) -> None:
    """Raises for options that these engines do not honour."""
    for name in names:
        if get(name):
            raise NotImplementedError(
                f"{name}: expected it off with VERL_ENGINE_VENDOR={ENGINE}; got {get(name)!r}. Unset one of the two"
            )


class LogProbsOfFSDP:
    """`FSDPEngineWithLMHead` with log-probabilities and entropies from `log_probs_and_entropy`."""

    def prepare_model_outputs(self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any) -> Any:
        from verl.utils import tensordict_utils

        def get(name: str, default: Any = False) -> Any:
            return tensordict_utils.get_non_tensor_data(micro_batch, name, default)

        refuse(get, "use_fused_kernels", "calculate_sum_pi_squared", "distillation_use_topk")
        logits, labels = output.logits, output_args["input_ids_rmpad_rolled"]
        if get("use_remove_padding", True):  # logits [1, N, V]
            mask, labels, temperature = None, labels[None], output_args["temperature_rmpad"][None]
        else:  # logits [B, T, V], padded on the right
            lengths = micro_batch["input_ids"].offsets().diff()
            mask = torch.arange(logits.shape[1], device=labels.device) < lengths[:, None]
            labels = labels.new_zeros(mask.shape).masked_scatter(mask, labels)
            temperature = output_args["temperature"][:, None].expand(mask.shape)
        if output_args.get("temperature_is_one", False):
            temperature = 1.0
        log_probs, entropy = log_probs_and_entropy(logits, labels, temperature, mask=mask, inplace_backward=True)
        # verl's path for fused kernels continues from log-probabilities, too.
        fused = micro_batch.clone(recurse=False)
        tensordict_utils.assign_non_tensor(fused, use_fused_kernels=True)
        found = SimpleNamespace(log_probs=log_probs, entropy=entropy)
        return super().prepare_model_outputs(found, output_args, fused, logits_processor_func)  # type: ignore[misc]


class LogProbsOfMegatron:
    """`MegatronEngineWithLMHead` with log-probabilities and entropies from `log_probs_and_entropy`."""

    def forward_step(self, *args: Any, **kwargs: Any) -> Any:
        refuse(lambda name: getattr(self.engine_config, name), "use_fused_kernels")  # type: ignore[attr-defined]
        return super().forward_step(*args, **kwargs)  # type: ignore[misc]

    def _lm_head_logits_processor(
        self, logits: Tensor, label: Tensor, temperature: Tensor, *, calculate_entropy: bool, **options: Any
    ) -> dict[str, Tensor]:
        from megatron.core import parallel_state

        refuse(options.get, "calculate_sum_pi_squared", "distillation_use_topk", "distillation_only")
        group = parallel_state.get_tensor_model_parallel_group()
        log_probs, entropy = log_probs_and_entropy(logits, label, temperature, tp_group=group, inplace_backward=True)
        return {"log_probs": log_probs, "entropy": entropy} if calculate_entropy else {"log_probs": log_probs}


# --- registration -----------------------------------------------------------------------------------------------------


def register_losses() -> None:
    from verl.trainer.ppo.core_algos import register_policy_loss

    for name in LOSSES:
        register_policy_loss(name)(functools.partial(policy_loss, name))


def register_engines() -> list[str]:
    """Registers engines for VERL_ENGINE_VENDOR=gspo_kernels beside verl's own, where those import; their backends."""
    from verl.workers import engine

    mixins: dict[str, tuple[type, list[str]]] = {
        "FSDPEngineWithLMHead": (LogProbsOfFSDP, ["fsdp", "fsdp2"]),
        "MegatronEngineWithLMHead": (LogProbsOfMegatron, ["megatron"]),
    }
    registered = []
    for name, (mixin, backends) in mixins.items():
        if (base := getattr(engine, name, None)) is not None:
            cls = type(f"GSPOKernels{name}", (mixin, base), {"__doc__": mixin.__doc__})
            engine.EngineRegistry.register("language_model", backends, device="cuda", vendor=ENGINE)(cls)
            registered += backends
    return registered


def register() -> None:
    """Registers all, and logs a warning that says so: verl logs nothing about a plugin that it loads, and a failure
    only at level DEBUG."""
    import verl

    try:
        register_losses()
        engines = register_engines() if os.environ.get("VERL_ENGINE_VENDOR") == ENGINE else []
    except Exception:
        logger.exception("gspo_kernels is NOT available in verl %s: its registration failed", verl.__version__)
        raise
    logger.warning(
        "gspo_kernels: registered the policy losses %s with verl %s; engines: %s",
        ", ".join(LOSSES), verl.__version__,
        ", ".join(engines) or "none (VERL_ENGINE_VENDOR is not gspo_kernels)",
    )  # fmt: skip
    if not verl.__version__.startswith(TESTED):
        logger.warning("gspo_kernels: tested with verl %sx; this is %s", TESTED, verl.__version__)


register()
