"""Responses of an inference engine as packed arrays, whichever engine they come from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..rows.kept import KeptTokens
from .kept_sets import KeptSets, kept_rows
from .parsing import LOWEST
from .prompted import PromptedRollouts, moved
from .routed_experts import RoutedExperts, check_rows, experts_of_tokens
from .weight_versions import Span, WeightVersions, versions_of_tokens

# Why a response ended: of vLLM "stop", "length", "abort", "repetition", "error" and a chat's "tool_calls"; of SGLang
# "stop", "length" and "abort"; "content_filter" and "function_call" are OpenAI's.
REASONS = ("stop", "length", "abort", "repetition", "error", "tool_calls", "content_filter", "function_call")


@dataclass(frozen=True, eq=False)  # equal to itself alone: tensors have no truth value
class Rollouts:
    """N tokens of S responses, packed in the order in which the engine returned them."""

    token_ids: Tensor  # [N] int64, including the stop token if one was sampled: both engines return it
    old_logprobs: Tensor  # [N] float32, nats; NaN where the mask is False
    mask: Tensor  # [N] bool: whether the engine returned a log-probability. All True unless missing="mask"
    cu_seqlens: Tensor  # [S + 1] int64: response i is tokens cu_seqlens[i] to cu_seqlens[i + 1]
    finish_reasons: tuple[str, ...]  # one per response: "stop", "length" (cut off), "abort", ...
    group_ids: Tensor | None  # [S] int64, for `group_advantages`: equal for equal prompts. None: prompts not known
    prompt_ids: Tensor | None  # [P] int64, the prompt of each response, packed
    prompt_cu_seqlens: Tensor | None  # [S + 1] int64
    kept: KeptTokens | None = None  # of N rows: the ids from which each token was drawn. None: not returned
    weight_versions: WeightVersions | None = None  # of N tokens. None: not returned
    # int16 [P + N, layers, k], each prompt's, then its response's; -1 where not returned, as of a last token, which no
    # router has read. None: not returned, or prompts not known
    routed_experts: Tensor | None = None

    def to(self, device: Any) -> Rollouts:
        """On another device."""
        return moved(self, device)

    def ended_by(self, *reasons: str) -> Tensor:
        """Which responses ended for one of these `finish_reasons`: bool [S], for `batch[...]` and `rewards[...]`.

        `~rollouts.ended_by("abort")` are the responses that were not cut off by an abort, `rollouts.ended_by("stop")`
        those that ended by themselves.

        Raises: ValueError for a reason that no engine gives.
        """
        for reason in reasons:
            checks.choice("reasons", reason, tuple(dict.fromkeys((*REASONS, *self.finish_reasons))))
        found = [reason in reasons for reason in self.finish_reasons]
        return torch.tensor(found, dtype=torch.bool, device=self.cu_seqlens.device)

    def with_prompts(self) -> PromptedRollouts:
        """Targets for a causal model that reads prompt and response, shifted as `next_token_targets` does.

        Raises: ValueError where prompts are not known, or one is empty: nothing predicts the first token then.
        """
        if self.prompt_ids is None or self.prompt_cu_seqlens is None:
            raise ValueError(
                "prompt_ids: expected the prompt of each response; got None: the engine did not return them, pass "
                "prompt_ids= to the converter"
            )
        prompts, responses = self.prompt_cu_seqlens.diff(), self.cu_seqlens.diff()
        if bool(((prompts == 0) & (responses > 0)).any()):
            raise ValueError("prompt_ids: expected prompts of at least one token, which predicts a response's first")
        boundaries = self.cu_seqlens + self.prompt_cu_seqlens
        of_prompt, of_response = (
            torch.arange(n.numel(), device=n.device).repeat_interleave(n) for n in (prompts, responses)
        )
        # A token's index in input_ids: its index among its own kind, plus the tokens of the other kind before it.
        at_prompt = torch.arange(of_prompt.numel(), device=prompts.device) + self.cu_seqlens[of_prompt]
        at_response = torch.arange(of_response.numel(), device=prompts.device) + self.prompt_cu_seqlens[of_response + 1]
        input_ids = self.token_ids.new_empty(at_prompt.numel() + at_response.numel())
        input_ids[at_prompt], input_ids[at_response] = self.prompt_ids, self.token_ids
        old_logprobs = torch.full_like(input_ids, torch.nan, dtype=torch.float32)
        old_logprobs[at_response - 1] = self.old_logprobs
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        mask[at_response - 1] = self.mask
        position_ids = torch.arange(input_ids.numel(), device=input_ids.device)
        position_ids -= boundaries[:-1].repeat_interleave(boundaries.diff())
        kept = None if self.kept is None else self.kept.scatter(at_response - 1, input_ids.numel())
        versions = self.weight_versions
        if versions is not None:
            of_rows = torch.full_like(input_ids, -1)
            of_rows[at_response - 1] = versions.of_tokens
            versions = WeightVersions(versions.labels, of_rows)
        return PromptedRollouts(
            input_ids, position_ids, input_ids.roll(-1), old_logprobs, mask, boundaries, kept, versions,
            self.routed_experts,
        )  # fmt: skip


class Response(NamedTuple):
    """One response as read from an engine's output."""

    where: str  # its position in `outputs`, for error messages
    token_ids: list[int]
    logprobs: list[float]  # NaN where there is none
    finish_reason: str
    prompt: list[int] | None
    kept: KeptSets | None = None
    versions: list[Span] | None = None  # of the weights, one after the other over all tokens
    experts: RoutedExperts | None = None


def pack(responses: Iterator[Response], missing: str, device: Any) -> Rollouts:
    """The responses as packed arrays, after checking their log-probabilities and prompts."""
    checks.choice("missing", missing, ("refuse", "mask"))
    device = _device(device)
    found = list(responses)
    exact = torch.tensor([x for each in found for x in each.logprobs], dtype=torch.float64, device="cpu")
    positive, hint = exact > checks.HIGHEST_LOGPROB, "such values are logits: see vLLM's logprobs_mode"
    _refuse(found, exact, positive, "a log-probability, at most 0", hint)
    mask = (exact > LOWEST) & ~positive
    if missing == "refuse":
        hint = 'every sampled token has one: see from_vllm, or mask such tokens with missing="mask"'
        _refuse(found, exact, ~mask, "the sampled token's log-probability", hint)
    prompts = [each.prompt for each in found if each.prompt is not None]
    if prompts and len(prompts) < len(found):
        without = next(each.where for each in found if each.prompt is None)
        raise ValueError(f"{without}: expected prompt token ids, as other responses have; got none. Pass prompt_ids=")
    known = len(prompts) == len(found)
    kept = kept_rows([(each.where, each.token_ids, each.kept) for each in found], mask.tolist(), exact.tolist())
    for each in found:
        if each.experts is not None and each.prompt is not None:
            check_rows(each.experts, len(each.prompt), len(each.token_ids))
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    return Rollouts(
        token_ids=_integers([x for each in found for x in each.token_ids], device),
        old_logprobs=torch.where(mask, exact, torch.nan).float().to(device),
        mask=mask.to(device),
        cu_seqlens=_boundaries([len(each.token_ids) for each in found], device),
        finish_reasons=tuple(each.finish_reason for each in found),
        group_ids=_integers([numbers[tuple(prompt)] for prompt in prompts], device) if known else None,
        prompt_ids=_integers([x for prompt in prompts for x in prompt], device) if known else None,
        prompt_cu_seqlens=_boundaries([len(prompt) for prompt in prompts], device) if known else None,
        kept=None if kept is None else _kept_tokens(kept).to(device),
        weight_versions=versions_of_tokens([(len(each.token_ids), each.versions) for each in found], device),
        routed_experts=experts_of_tokens(
            [(len(each.prompt or ()), len(each.token_ids), each.experts) for each in found], device
        )
        if known
        else None,
    )


def _kept_tokens(rows: list[list[int]]) -> KeptTokens:
    cpu = torch.device("cpu")
    return KeptTokens(_integers(list(itertools.chain.from_iterable(rows)), cpu), _boundaries(list(map(len, rows)), cpu))


def _refuse(found: list[Response], values: Tensor, wrong: Tensor, expected: str, hint: str) -> None:
    """Raises for the first token that `wrong` marks, if any."""
    for at in wrong.nonzero()[:1, 0].tolist():
        got = float(values[at])
        said = "none" if got != got else f"{got:g}"
        for each in found:
            if at < len(each.token_ids):
                raise ValueError(
                    f"{each.where}: expected {expected}, for its token {at} (id {each.token_ids[at]}); got {said}, and "
                    f"{int(wrong.sum())} such tokens in total; {hint}"
                )
            at -= len(each.token_ids)


def _device(device: Any) -> torch.device:
    """None is the CPU, whatever torch's default device is."""
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"device: expected a torch.device, or None for the CPU; got {checks.describe(device)}"
        ) from error


def _integers(values: list[int], device: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _boundaries(lengths: list[int], device: Any) -> Tensor:
    return _integers([0, *itertools.accumulate(lengths)], device)
