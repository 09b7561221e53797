"""verl's policy losses `gspo_kernels` and `gspo_token_kernels`, and engines that read the logits once.

verl 0.9 imports this module through the entry point `verl.plugins`, or because VERL_USE_EXTERNAL_MODULES or
`actor_rollout_ref.model.external_lib` names it. Importing it registers the losses with verl and changes nothing else
there. See docs/verl.md.
"""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import as_bool, batch_shape
from ..losses.clipped import GSPO, GSPOToken, clipped_surrogate
from ..losses.from_logits import policy_loss_from_logprobs, token_logprobs
from ..losses.reduction import check_count
from ..losses.stats import Stats
from .reductions import reduction_of

__all__ = ["gspo", "gspo_token", "log_probs_and_entropy", "register"]

TESTED = "0.9."
ENGINE = "gspo_kernels"  # VERL_ENGINE_VENDOR with this value selects the engines below

LOGGED_BY_VERL = ("entropy", "ref_kl")  # stats left out of our metrics: verl adds and logs both terms itself

logger = logging.getLogger(__name__)


# --- the losses -------------------------------------------------------------------------------------------------------


def gspo(**arguments: Any) -> tuple[Tensor, dict[str, float]]:
    """GSPO: one ratio, one clip and one advantage per response. The arguments are those of `policy_loss`."""
    return policy_loss(GSPO, **arguments)


def gspo_token(**arguments: Any) -> tuple[Tensor, dict[str, float]]:
    """GSPO-token: advantages and rollout weights may differ from token to token. Arguments as in `policy_loss`."""
    return policy_loss(GSPOToken, **arguments)


def policy_loss(
    kind: type[GSPO] | type[GSPOToken],
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
        config: verl's ActorConfig. Honoured are `clip_ratio_low` and `clip_ratio_high` (`clip_ratio` where they are
            None), `clip_ratio_c` (None: no dual clip) and `global_batch_info`.
        rollout_is_weights: constant factors of the policy term.

    Returns: the loss, scaled as verl scales it, and its metrics.

    Raises: ValueError, TypeError: naming verl's argument, what was expected and what came.
    """
    if config is None:
        raise ValueError("config: expected verl's ActorConfig, which has the clip range; got None")
    mask = _check_arrays(log_prob, old_log_prob, advantages, response_mask, rollout_is_weights)
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    objective = kind(low, high, config.clip_ratio_c)
    aggregation, normalizer = scale(mask, loss_agg_mode, config.global_batch_info)
    advantages = advantages.detach()
    lowest = highest = advantages.new_zeros(mask.shape[0])
    if mask.shape[1]:
        lowest = torch.where(mask, advantages, torch.inf).amin(1)
        highest = torch.where(mask, advantages, -torch.inf).amax(1)
    loss, stats = policy_loss_from_logprobs(
        log_prob, highest if kind is GSPO else advantages, old_log_prob, objective=objective, mask=mask,
        importance_weights=rollout_is_weights, aggregation=aggregation, normalizer=normalizer,
    )  # fmt: skip
    found = metrics(objective, stats, advantages, old_log_prob, log_prob, mask)
    found["differing"] = (lowest < highest).sum()
    values = dict(zip(found, torch.stack([x.double() for x in found.values()]).tolist(), strict=True))
    if (differing := values.pop("differing")) and kind is GSPO:
        raise ValueError(
            "advantages: expected one value for all tokens of a response, as GSPO has one ratio for it; got "
            f"{differing:g} responses with several. For those, set policy_loss.loss_mode=gspo_token_kernels"
        )
    return loss, values


def _check_arrays(log_prob: Any, old_log_prob: Any, advantages: Any, response_mask: Any, weights: Any) -> Tensor:
    """Checks that all arrays are [B, T], with errors that use verl's names; returns the mask as bool."""
    checks.tensor("log_prob", log_prob, "log-probabilities [B, T]")
    if log_prob.ndim != 2:
        raise ValueError(f"log_prob: expected shape [responses, tokens]; got {list(log_prob.shape)}")
    arrays: list[tuple[str, Any, str, Any]] = [
        ("old_log_prob", old_log_prob, "log-probabilities", checks.digits),
        ("advantages", advantages, "advantages", checks.numbers),
        ("response_mask", response_mask, "True or 1 where a token counts", None),
        ("rollout_is_weights", weights, "factors of the policy term", checks.numbers),
    ]
    checks.digits("log_prob", log_prob)
    for name, value, meaning, check_dtype in arrays:
        if name == "rollout_is_weights" and value is None:
            continue
        checks.tensor(name, value, f"{meaning} [B, T]")
        if check_dtype is not None:
            check_dtype(name, value)
        checks.shape(name, value, log_prob.shape, "that of log_prob, one per token")
        checks.same_device(name, value, log_prob.device)
    mask = as_bool("response_mask", response_mask)
    checks.log_probabilities("log_prob", log_prob, mask)
    checks.log_probabilities("old_log_prob", old_log_prob, mask)
    return mask


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
    elif isinstance(count, Tensor):
        checks.shape(name, count, (), "one global count")
    else:
        count = checks.number(name, count, "the count of all ranks", at_least=0.0)
        if count == 0:
            count = torch.zeros((), dtype=torch.float64, device=mask.device)
    check_count(count, batch_shape(mask.shape, mask, None, mask.device), name)
    if counted == "responses x length":
        factor = info.get("loss_scale_factor")
        if factor is None:
            factor = max(mask.shape[1], 1)
        count = count * checks.number("loss_scale_factor", factor, "what sequences' sums are divided by", above=0.0)
    return aggregation, count / dp_size


@torch.no_grad()
def metrics(
    objective: GSPO | GSPOToken, stats: Stats, advantages: Tensor, old_log_prob: Tensor, log_prob: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """verl's three metrics, by token as verl has them for all losses, and our stats."""
    log_ratio = stats.log_ratio if stats.ratio_of == "token" else stats.log_ratio[:, None].expand(mask.shape)
    signs = torch.where(mask, advantages, 0.0).double()
    terms = clipped_surrogate(
        log_ratio.double(), signs, eps_low=objective.eps_low, eps_high=objective.eps_high,
        dual_clip=objective.dual_clip, max_log_ratio=log_ratio.new_tensor(20.0),
    )  # fmt: skip
    assert terms.clipped_low is not None and terms.clipped_high is not None

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values.double(), 0.0).sum() / mask.sum().clamp(min=1)

    return {
        "actor/pg_clipfrac": mean(terms.clipped_low | (terms.clipped_high & (signs > 0))),
        "actor/ppo_kl": mean((old_log_prob - log_prob).clamp(-20.0, 20.0)),
        "actor/pg_clipfrac_lower": mean(terms.clipped_high & (signs < 0)),
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

    register_policy_loss("gspo_kernels")(gspo)
    register_policy_loss("gspo_token_kernels")(gspo_token)


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
        "gspo_kernels: registered the policy losses gspo_kernels and gspo_token_kernels with verl %s; engines: %s",
        verl.__version__, ", ".join(engines) or "none (VERL_ENGINE_VENDOR is not gspo_kernels)",
    )  # fmt: skip
    if not verl.__version__.startswith(TESTED):
        logger.warning("gspo_kernels: tested with verl %sx; this is %s", TESTED, verl.__version__)


register()
