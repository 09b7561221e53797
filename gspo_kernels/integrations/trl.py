"""GSPO, GSPO-token and GRPO in TRL's trainer: log-probabilities, entropies and loss from hidden states, by our kernels.

    from gspo_kernels.integrations.trl import GSPOConfig, GSPOTrainer       # in place of GRPOConfig, GRPOTrainer

The model's LM head computes them, in place of logits and within the model's own forward: there its weight is whole,
whether DDP, FSDP2 or PEFT is around it. Where TRL's numbers are not ours, docs/trl.md says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from .. import (
    GRPO,
    GSPO,
    GSPOToken,
    Objective,
    Stats,
    Terms,
    TokenBatch,
    TokenLogprobs,
    global_count,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss_from_logprobs,
)
from ..losses.objectives import at_most, within

__all__ = ["GSPOConfig", "GSPOTrainer"]

if not trl.__version__.startswith("1.16."):  # what is overridden is TRL's own affair, and changes
    raise ImportError(f"trl: expected 1.16, with which this was tested; got {trl.__version__}")

Inputs = dict[str, Any]  # TRL's micro-batch: completions [B, C], and prompts [B, P] before them
Normalizer = Callable[["GSPOTrainer", Inputs, Tensor], Tensor | float]

# importance_sampling_level -> objective, whose own clip range is GSPOConfig's default
_LEVELS: dict[str, type[GSPO | GSPOToken | GRPO]] = {"sequence": GSPO, "sequence_token": GSPOToken, "token": GRPO}

# loss_type -> aggregation, and the normalizer of a micro-batch with that mask
_LOSS_TYPES: dict[str, tuple[str, Normalizer]] = {
    "grpo": ("sequence_mean", lambda self, inputs, mask: self._per_step(inputs["num_sequences_in_batch"])),
    "dapo": ("token_mean", lambda self, inputs, mask: self._per_step(inputs["num_items_in_batch"])),
    "bnpo": ("token_mean", lambda self, inputs, mask: self._accumulated * mask.sum().clamp(min=1)),
    "dr_grpo": (
        "token_mean",
        lambda self, inputs, mask: self._accumulated * float(len(mask) * self.max_completion_length),
    ),
}

# Options of GRPOConfig -> the values that are honoured
_HONOURED: dict[str, tuple[Any, ...]] = {
    "importance_sampling_level": tuple(_LEVELS),
    "loss_type": tuple(_LOSS_TYPES),
    "entropy_coef": (0.0,),
    "use_adaptive_entropy": (False,),
    "top_entropy_quantile": (1.0,),
    "off_policy_mask_threshold": (None,),
    "use_liger_kernel": (False,),
    "cast_lm_head_to_fp32": (False,),  # logits are sums in fp32 here anyway
    "torch_compile": (False,),  # would compile at every step what the head is told to do
}

# Options of a model's config for something that happens to logits between head and softmax
_OF_LOGITS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass
class GSPOConfig(GRPOConfig):
    """`GRPOConfig` set up as in the GSPO paper (arXiv 2507.18071); its clip range too, where none is given."""

    importance_sampling_level: str = field(
        default="sequence",
        metadata={"help": "What has a ratio: 'sequence' (GSPO), 'sequence_token' (GSPO-token) or 'token' (GRPO)."},
    )
    loss_type: str = field(default="grpo", metadata={"help": f"One of {', '.join(_LOSS_TYPES)}; the paper's is grpo."})
    epsilon: float | None = field(
        default=None,
        metadata={"help": "Clip range below 1. None: 3e-4, and 4e-4 above ('token': 0.2 and 0.27)."},
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Clip range above 1. None: that below."})

    def __post_init__(self) -> None:
        if self.epsilon is None and self.importance_sampling_level in _LEVELS:
            usual = _LEVELS[self.importance_sampling_level]()
            self.epsilon = usual.eps_low
            self.epsilon_high = usual.eps_high if self.epsilon_high is None else self.epsilon_high
        super().__post_init__()


class GSPOTrainer(GRPOTrainer):
    """`GRPOTrainer`, but log-probabilities, entropies and loss come from hidden states and the LM head.

    Takes what `GRPOTrainer` takes, `args` a GSPOConfig or a GRPOConfig. Raises a ValueError that names the option if
    there is one that it does not honour.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **options: Any) -> None:
        args = GSPOConfig("gspo") if args is None else args
        _check_options(args)
        super().__init__(model, reward_funcs, args, *others, **options)
        _check_surroundings(self)
        for part in (self.model, self.ref_model):
            if part is not None:
                _Head.become(self.accelerator.unwrap_model(part))
        objective = _LEVELS[self.importance_sampling_level]
        self._objective = objective(self.epsilon_low, self.epsilon_high, self.args.delta)

    # ---- what TRL calls

    def _generate_and_score_completions(self, inputs: Any) -> Inputs:
        found: Inputs = super()._generate_and_score_completions(inputs)
        count = global_count(_loss_mask(found)).float()
        found["num_sequences_in_batch"] = self.accelerator.reduce(count, reduction="sum")  # num_items are tokens
        return found

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **of_images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the last C tokens, 0 where masked: log-probabilities [B, C] and entropies [B, C]; the router's loss."""
        for name, value in of_images.items():
            if value is not None:
                raise ValueError(f"{name}: expected None, as images are not supported; got {type(value).__name__}")
        parts, aux_losses = list[TokenLogprobs](), list[Any]()
        size = batch_size or len(input_ids)
        for ids, attended in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            tokens, mask = ids[:, -logits_to_keep:], attended[:, -logits_to_keep:]

            def job(hidden: Tensor, head: _Head, tokens: Tensor = tokens, mask: Tensor = mask) -> _Untouched:
                return _Untouched(self._logprobs(hidden, head, tokens, mask))

            found, aux_loss = self._at_head(model, ids, attended, logits_to_keep, job, compute_aux_loss)
            parts.append(found.value)
            aux_losses.append(aux_loss)
        logprobs = torch.cat([part.logprobs for part in parts])
        entropies = torch.cat([part.entropy for part in parts]) if compute_entropy else None
        return logprobs, entropies, torch.stack(aux_losses).mean() if compute_aux_loss else None

    def _compute_loss(self, model: Any, inputs: Inputs) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = _loss_mask(inputs)

        def job(hidden: Tensor, head: _Head) -> tuple[Tensor, _Untouched]:
            loss, stats, kl = self._loss(hidden, head, inputs, mask)
            return loss, _Untouched((stats, kl))

        found, aux_loss = self._at_head(model, ids, attended, mask.shape[1], job, self.aux_loss_enabled)
        loss: Tensor = found[0]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / self._accumulated
            self._metrics[self._mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        stats, kl = found[1].value
        self._record(stats, kl, inputs["advantages"], mask)
        return loss

    # ---- at the head

    def _at_head(
        self, model: Any, ids: Tensor, attended: Tensor, count: int, job: Callable[..., Any], router: bool
    ) -> tuple[Any, Any]:
        """What `job` makes of the head and of the hidden states that predict `count` last tokens; the router's loss."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        head.job = lambda hidden: job(hidden[:, -count - 1 : -1], head)
        of_router = {"output_router_logits": True} if router else {}
        try:
            with self.accelerator.autocast():
                output = model(
                    input_ids=ids, attention_mask=attended, logits_to_keep=count + 1, use_cache=False, **of_router
                )  # fmt: skip
        finally:
            head.job = None
        return output.logits, output.aux_loss if router else None

    def _logprobs(self, hidden: Tensor, head: _Head, tokens: Tensor, mask: Tensor) -> TokenLogprobs:
        return linear_token_logprobs(
            hidden, head.weight, tokens, bias=head.bias, mask=mask, temperature=self.temperature
        )

    def _loss(self, hidden: Tensor, head: _Head, inputs: Inputs, mask: Tensor) -> tuple[Tensor, Stats, Tensor]:
        """A micro-batch's share in the loss of a step; its stats; the mean of KL over its tokens."""
        tokens, advantages = inputs["completion_ids"], inputs["advantages"]
        old, ref = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")
        aggregation, normalizer = _LOSS_TYPES[self.loss_type]
        mean: dict[str, Any] = {"aggregation": aggregation, "normalizer": normalizer(self, inputs, mask), "mask": mask}
        policy: dict[str, Any] = {"objective": self._objective, "importance_weights": _weights(inputs), **mean}
        if self.beta == 0.0 or not self.args.use_bias_correction_kl:
            loss, stats = linear_policy_loss(
                hidden, head.weight, tokens, advantages, old, bias=head.bias, temperature=self.temperature,
                ref_logprobs=ref, beta=self.beta, **policy,
            )  # fmt: skip
            return loss, stats, stats.ref_kl
        logprobs, entropy, _ = self._logprobs(hidden, head, tokens, mask)
        old = logprobs.detach() if old is None else old
        loss, stats = policy_loss_from_logprobs(logprobs, advantages, old, entropy=entropy.detach(), **policy)
        kl = _WeightedKL(self._objective, inputs["ref_per_token_logps"].double() - old.double())
        term, _ = policy_loss_from_logprobs(logprobs, advantages, old, objective=kl, **mean)
        by_token, _ = policy_loss_from_logprobs(
            logprobs.detach(), advantages, old, objective=kl, mask=mask, aggregation="token_mean"
        )
        return loss + self.beta * term, stats, by_token

    # ---- counts and metrics

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _accumulated(self) -> int:
        """Micro-batches to an optimizer step."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _per_step(self, count: Tensor) -> Tensor:
        """A count over all ranks and the whole generation batch -> per rank, whose gradients are averaged, and step."""
        micro_batches = self.args.steps_per_generation if self.model.training else 1
        share: float = self._accumulated / (micro_batches * self.accelerator.num_processes)
        return count.double().clamp(min=1) * share

    @torch.no_grad()
    def _record(self, stats: Stats, kl: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """TRL's metrics; a masked token, and a sequence that has no others, is in none of them."""
        deviation, counted = torch.expm1(stats.log_ratio.double()), mask != 0
        if stats.ratio_of == "sequence":
            deviation, counted = deviation[:, None], counted.any(dim=1, keepdim=True)
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages
        low = counted & (advantages < 0) & (deviation < -self.epsilon_low)
        high = counted & (advantages > 0) & (deviation > self.epsilon_high)
        by_row = torch.stack([-low.sum(1), high.sum(1)], dim=1).float() / counted.sum(1, keepdim=True)  # NaN: empty row
        largest = self.accelerator.gather(by_row).nan_to_num(nan=-torch.inf).amax(dim=0)

        count = stats.num_tokens
        sums = [x.float() for x in (stats.entropy * count, kl * count, low.sum(), high.sum(), count, counted.sum())]
        totals = self.accelerator.reduce(torch.stack(sums), reduction="sum")
        entropy, kl_sum, lows, highs, tokens, units, low_min, high_max = torch.cat([totals, largest]).tolist()
        tokens, units = max(tokens, 1), max(units, 1)
        found = {"kl": kl_sum / tokens} if self.beta != 0.0 else {}
        found |= {
            "entropy": entropy / tokens,
            "clip_ratio/low_mean": lows / units,
            "clip_ratio/high_mean": highs / units,
            "clip_ratio/region_mean": (lows + highs) / units,
            "clip_ratio/low_min": abs(low_min) if low_min > -torch.inf else torch.nan,  # as TRL's, where all are empty
            "clip_ratio/high_max": high_max if high_max > -torch.inf else torch.nan,
        }
        for name, value in found.items():
            self._metrics[self._mode][name].append(value)


class _Head(torch.nn.Linear):
    """An LM head that does the job it has, or, without one, makes logits.

    It is the model's own, of another class, as `fully_shard` changes that of modules: parameters, name and hooks stay.
    """

    job: Callable[[Tensor], Any] | None = None

    @classmethod
    def become(cls, model: Any) -> None:
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        if type(head) is not torch.nn.Linear:
            raise ValueError(
                "model: expected an LM head that is a torch.nn.Linear, without adapter or quantization; got "
                f"{type(head).__name__}"
            )
        for name in _OF_LOGITS:
            value = getattr(config, name, None)
            if value not in (None, 1.0):
                raise ValueError(f"{name}: expected a model that leaves logits as its head makes them; got {value}")
        head.__class__ = cls

    def forward(self, hidden: Tensor) -> Any:
        return super().forward(hidden) if self.job is None else self.job(hidden)


class _Untouched:
    """Keeps its digits on the way out of the model: FSDP2 rounds the tensors that it finds in outputs to bf16."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class _WeightedKL(Objective):
    """KL(pi || ref) times the ratio, and the gradient of both: `use_bias_correction_kl` (arXiv 2512.02556).

    w_t (exp(d_t) - d_t - 1),   d_t = log pi_ref(y_t) - log pi(y_t),   w_t the ratio of the policy term at t
    """

    policy: Objective
    ref_minus_old: Tensor  # [B, C]

    depends_on: ClassVar[str] = "sequence"

    def terms(self, tokens: TokenBatch) -> Terms:
        log_ratio, layout, max_log_ratio = tokens.log_ratio, tokens.layout, tokens.max_log_ratio
        advantages = tokens.advantages if self.policy.advantages_per_token else layout.mean(tokens.advantages)
        log_weight = self.policy.terms(replace(tokens, advantages=advantages)).log_ratio
        log_weight = layout.spread(log_weight) if self.policy.ratio_of == "sequence" else log_weight
        d = within(layout.of_tokens(self.ref_minus_old) - log_ratio, max_log_ratio)
        return Terms(torch.exp(at_most(log_weight, max_log_ratio)) * (torch.expm1(d) - d), log_ratio)


def _loss_mask(inputs: Inputs) -> Tensor:
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _weights(inputs: Inputs) -> Tensor | None:
    """The correction for what vLLM sampled from: [B] or [B, C]."""
    weights: Tensor | None = inputs.get("importance_sampling_ratio")
    return weights[:, 0] if weights is not None and weights.shape[1] == 1 else weights


def _check_options(args: Any) -> None:
    for name, honoured in _HONOURED.items():
        value = getattr(args, name)
        if value not in honoured:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, honoured))}; got {value!r}")
    highest = 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
    if args.delta is not None and args.delta <= highest:
        raise ValueError(
            f"delta: expected more than 1 + epsilon_high, {highest}, to bound ratios of negative advantages alone; "
            f"got {args.delta}"
        )
    if args.importance_sampling_level != "token" and args.epsilon >= 0.1:
        warnings.warn(
            f"epsilon: {args.epsilon} is a range that the ratio of a whole sequence hardly ever leaves; the GSPO paper "
            "has 3e-4 and 4e-4, and so has GSPOConfig, where none is given",
            stacklevel=3,
        )


def _check_surroundings(trainer: Any) -> None:
    if trainer._is_vlm:
        raise ValueError("processing_class: expected a tokenizer, as images are not supported; got a processor")
    deepspeed, state = trainer.args.deepspeed_plugin, trainer.accelerator.state
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError("zero_stage: expected at most 2, or FSDP2, as ZeRO-3 has not been tested; got 3")
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("fsdp_version: expected 2, in which a module's forward has whole parameters; got 1")
