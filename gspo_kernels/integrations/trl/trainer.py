"""`GSPOTrainer`: TRL's GRPOTrainer, with the loss computed at the LM head from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from ... import (
    LossOutput,
    Stats,
    global_count,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss_from_logprobs,
)
from ...linear.model_head import Found, head_tensors, run_at_head
from .._arrays import dual_clipped
from ..reductions import reduction_of
from .config import LEVELS, NORMALIZERS, GSPOConfig, check_options
from .entropy import add_bonus, has_entropy_options, tokens_that_count
from .images import NAMES as IMAGES
from .images import of_rows
from .models import check_model, check_router, head_without_adapter, transform_at_head
from .vllm import engine_given, generate_with_vllm

Inputs = dict[str, Any]  # TRL's micro-batch: completions [B, C], and prompts [B, P] before them
HeadJob = Callable[[Tensor, Tensor, dict[str, Any]], Found]  # of hidden states, mask, and a loss's other arguments


class GSPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with log-probabilities, entropies and loss from hidden states and the LM head.

    Takes the arguments of `GRPOTrainer`; `args` is a GSPOConfig or a GRPOConfig. An option that is not supported raises
    a ValueError with its name.

    Args:
        llm: a vLLM engine of the same model, for `use_vllm=True` and `vllm_mode="colocate"`: a `vllm.LLM` with
            `logprobs_mode="processed_logprobs"`, in this process. None: TRL starts one, and leaves its dtype to vLLM.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *others: Any,
        llm: Any = None,
        **options: Any,
    ) -> None:
        args = GSPOConfig("gspo") if args is None else args
        check_options(args)
        with head_without_adapter(model), engine_given(args, llm):
            super().__init__(model, reward_funcs, args, *others, **options)
        check_surroundings(self)
        generate_with_vllm(self, llm)
        for part in (self.model, self.ref_model):
            if part is not None:
                check_model(self.accelerator.unwrap_model(part), self.accelerator.device)
        if self.aux_loss_enabled:
            check_router(self.model)
        objective = LEVELS[self.importance_sampling_level]
        self._objective = objective(self.epsilon_low, self.epsilon_high, self.args.delta)

    # ---- TRL's methods

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
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities [B, C] and entropies [B, C] of the last C tokens, 0 where masked; the router's loss."""
        parts, aux_losses = list[tuple[Tensor, ...]](), list[Any]()
        size = batch_size or len(input_ids)
        for start in range(0, len(input_ids), size):
            rows = slice(start, min(start + size, len(input_ids)))
            inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows], **of_rows(images, rows)}
            mask = inputs["attention_mask"][:, -logits_to_keep:]
            found, aux_loss = self._at_head(model, inputs, mask, _logprobs, compute_aux_loss)
            parts.append(found.results)
            aux_losses.append(aux_loss)
        logprobs, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
        aux_loss = torch.stack(aux_losses).mean() if compute_aux_loss else None
        return logprobs, entropy if compute_entropy else None, aux_loss

    def _compute_loss(self, model: Any, inputs: Inputs) -> Tensor:
        mask = _loss_mask(inputs)
        of_model = {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            **of_rows({name: inputs.get(name) for name in IMAGES}, slice(0, len(mask))),
        }

        def loss_at_head(hidden: Tensor, mask: Tensor, head: dict[str, Any]) -> Found:
            loss, stats = linear_policy_loss(hidden, **head, **self._loss_options(inputs, mask))
            return Found((loss,), stats)

        job = _logprobs if has_entropy_options(self) else loss_at_head
        found, aux_loss = self._at_head(model, of_model, mask, job, self.aux_loss_enabled)
        if has_entropy_options(self):
            logprobs, entropy = found.results
            loss, stats = self._loss_of_logprobs(logprobs, entropy, inputs, mask)
        else:
            loss, stats = found.results[0], found.constants
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / self._accumulated
            self._metrics[self._mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        self._record(stats, inputs["advantages"], mask)
        return loss

    # ---- at the head

    def _at_head(self, model: Any, inputs: Inputs, mask: Tensor, job: HeadJob, router: bool) -> tuple[Found, Any]:
        """(what `job` returned for the hidden states that predict the last tokens, the router's loss).

        Args:
            inputs: the arguments of the model's forward.
            mask: [B, C], of the last C tokens.
        """
        causal_model = self.accelerator.unwrap_model(model)
        rows, count = mask.shape
        options: dict[str, Any] = {
            "token_ids": inputs["input_ids"][:, -count:],
            "temperature": self.temperature,
            **transform_at_head(causal_model.config),
        }

        def of_completions(hidden: Tensor, head: torch.nn.Module) -> Found:
            hidden = hidden.reshape(rows, -1, hidden.shape[-1])[:, -count - 1 : -1]
            return job(hidden, mask, {**options, **head_tensors(head, hidden, mask)})

        of_router = {"output_router_logits": True} if router else {}
        with self.accelerator.autocast():
            found, output = run_at_head(
                model, causal_model, of_completions, {**inputs, "use_cache": False, **of_router}
            )
        aux_loss = output.aux_loss if router else None
        if router and aux_loss is None:
            raise ValueError(
                "router_aux_loss_coef: expected 0.0, because the model returned no aux_loss with this config; got "
                f"{self.router_aux_loss_coef}"
            )
        return found, aux_loss

    def _loss_options(self, inputs: Inputs, mask: Tensor) -> dict[str, Any]:
        """The arguments of a loss that are a micro-batch's share of the step."""
        aggregation, counted = reduction_of("TRL", self.loss_type)
        return {
            "advantages": inputs["advantages"],
            "old_logprobs": inputs.get("old_per_token_logps"),
            "mask": mask,
            "objective": self._objective,
            "importance_weights": _weights(inputs),
            "ref_logprobs": inputs.get("ref_per_token_logps"),
            "beta": self.beta,
            "kl_weighting": "ratio" if self.args.use_bias_correction_kl else "none",
            "aggregation": aggregation,
            "normalizer": NORMALIZERS[counted](self, inputs, mask),
        }

    def _loss_of_logprobs(self, logprobs: Tensor, entropy: Tensor, inputs: Inputs, mask: Tensor) -> LossOutput:
        """The loss with TRL's options about entropy."""
        counted = tokens_that_count(self, entropy, mask)
        options = self._loss_options(inputs, mask)
        if self.top_entropy_quantile < 1.0:  # the policy term of all other tokens weighs 0
            weights = options["importance_weights"]
            weights = torch.ones_like(logprobs) if weights is None else weights.reshape(len(mask), -1)
            options["importance_weights"] = torch.where(counted, weights, 0.0)
        loss, stats = policy_loss_from_logprobs(logprobs, entropy=entropy.detach(), **options)
        if self._entropy_bonus_enabled:
            loss = add_bonus(self, loss, entropy, counted)
        return LossOutput(loss, stats)

    # ---- counts and metrics

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _accumulated(self) -> int:
        """Micro-batches per optimizer step."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _per_step(self, count: Tensor) -> Tensor:
        """A count over all ranks and the generation batch -> per rank and step, as gradients of ranks are averaged."""
        micro_batches = self.args.steps_per_generation if self.model.training else 1
        share: float = self._accumulated / (micro_batches * self.accelerator.num_processes)
        return count.double().clamp(min=1) * share

    @torch.no_grad()
    def _record(self, stats: Stats, advantages: Tensor, mask: Tensor) -> None:
        """Logs TRL's metrics, without masked tokens and without sequences that have no other tokens."""
        low, high, counted = stats.clipped_low, stats.clipped_high, mask != 0
        if stats.ratio_of == "sequence":
            low, high, counted = low[:, None], high[:, None], counted.any(dim=1, keepdim=True)
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages
        high = high & ~dual_clipped(self._objective, high, advantages)  # TRL does not count ratios above `delta`
        by_row = torch.stack([-low.sum(1), high.sum(1)], dim=1).float() / counted.sum(1, keepdim=True)  # NaN: empty row
        largest = self.accelerator.gather(by_row).nan_to_num(nan=-torch.inf).amax(dim=0)

        count = stats.num_tokens
        sums = [
            x.float()
            for x in (stats.entropy * count, stats.ref_kl * count, low.sum(), high.sum(), count, counted.sum())
        ]
        totals = self.accelerator.reduce(torch.stack(sums), reduction="sum")
        entropy, kl_sum, lows, highs, tokens, units, low_min, high_max = torch.cat([totals, largest]).tolist()
        tokens, units = max(tokens, 1), max(units, 1)
        found = {"kl": kl_sum / tokens} if self.beta != 0.0 else {}
        found |= {
            "entropy": entropy / tokens,
            "clip_ratio/low_mean": lows / units,
            "clip_ratio/high_mean": highs / units,
            "clip_ratio/region_mean": (lows + highs) / units,
            "clip_ratio/low_min": abs(low_min)
            if low_min > -torch.inf
            else torch.nan,  # as in TRL where all rows are empty
            "clip_ratio/high_max": high_max if high_max > -torch.inf else torch.nan,
        }
        for name, value in found.items():
            self._metrics[self._mode][name].append(value)


def _logprobs(hidden: Tensor, mask: Tensor, head: dict[str, Any]) -> Found:
    logprobs, entropy, _ = linear_token_logprobs(hidden, mask=mask, **head)
    return Found((logprobs, entropy))


def _loss_mask(inputs: Inputs) -> Tensor:
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _weights(inputs: Inputs) -> Tensor | None:
    """The correction for what vLLM sampled from: [B] or [B, C]."""
    weights: Tensor | None = inputs.get("importance_sampling_ratio")
    return weights[:, 0] if weights is not None and weights.shape[1] == 1 else weights


def check_surroundings(trainer: Any) -> None:
    """Raises a ValueError for torch.nn.DataParallel and FSDP1."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "n_gpu: expected one GPU per process, because torch.nn.DataParallel copies the model in each forward; got "
            f"{trainer.args.n_gpu}. Use `accelerate launch`, or CUDA_VISIBLE_DEVICES"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("fsdp_version: expected 2, in which a module's forward has whole parameters; got 1")
