"""Outputs of vLLM as packed arrays: the log-probabilities of a rollout, ready to be `old_logprobs`.

vLLM is not imported: outputs are recognised by their fields, as objects or as JSON. Formats: `vllm/outputs.py`,
`vllm/logprobs.py` and `vllm/entrypoints/openai/*/protocol.py`, as of 0.9 to 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..base import checks
from .kept_sets import read_kept
from .parsing import (
    LAST_PART,
    agreed_prompt,
    check_count,
    describe,
    get,
    list_outputs,
    only_prompt,
    read_ids,
    read_list,
    read_logprobs,
    read_prompts,
)
from .rollouts import Response, Rollouts, pack
from .routed_experts import RoutedExperts, read_experts
from .streams import refuse_chunk, refuse_count, refuse_part
from .weight_versions import read_versions

_TOKEN = re.compile(r"token_id:(\d+)")


def from_vllm(
    outputs: Any,
    *,
    prompt_ids: Sequence[Sequence[int] | Sequence[Sequence[int]]] | None = None,
    missing: str = "refuse",
    device: Any = None,
) -> Rollouts:
    """vLLM's outputs as packed arrays.

    Accepted are one output or a sequence of outputs, of these kinds:

    - `RequestOutput`, as `LLM.generate` and `AsyncLLM` return it, for `SamplingParams(logprobs=0)` or more: the
      sampled token's log-probability is always returned. `CompletionOutput.logprobs` may be a list of
      `{token id: Logprob}` or `FlatLogprobs`;
    - responses of the server (`/v1/completions`, `/v1/chat/completions`, `/inference/v1/generate`), as parsed JSON or
      as the OpenAI client's objects, for requests with `logprobs` and `return_token_ids=True`, or
      `return_tokens_as_token_ids=True`.

    vLLM's default, `logprobs_mode="raw_logprobs"`, gives log-probabilities of the model's own logits, before penalties,
    temperature, top-k and top-p: pass `temperature=1.0` to the losses. To sample at another temperature, start vLLM
    with `logprobs_mode="processed_logprobs"` and give the losses the same `temperature`. To sample with top-k, top-p or
    min-p, add `return_sampling_mask=True` (vLLM 0.28 and later; on the server, `/inference/v1/generate` returns it):
    the result then has `kept`, for the losses' `kept=`, and processed log-probabilities are those of the distribution
    over these sets. Without kept sets they belong to no distribution that a loss computes.

    `weight_versions` are kept, where the engine returned them, and so are `routed_experts`
    (`enable_return_routed_experts=True`) of responses whose prompt is known.

    Args:
        outputs: see above. Requests must have finished. Parts of a stream are refused, the last one too
            (`RequestOutputKind.DELTA`, a server's last chunk). With `RequestOutputKind.CUMULATIVE` and n > 1 the last
            part has only the responses that ended last: use `FINAL_ONLY`, which is what `LLM.generate` uses.
        prompt_ids: the prompt's token ids for each element of `outputs`; for a response of `/v1/completions` to several
            prompts the list of its prompts, in the request's order. None: those that the engine returned, if any.
        missing: what to do with a sampled token that has no log-probability: it is None, NaN, minus infinity, or at
            most -9999.0, which a server writes for minus infinity. "refuse" raises; "mask" sets the token's mask to
            False. Every sampled token has a log-probability, so a missing one means an engine's bug, or a sampling
            filter that the log-probabilities do not include.
        device: of the arrays. None: the CPU.

    Raises:
        ValueError, TypeError: naming the position in `outputs`, what was expected and what came: log-probabilities that
            were not requested, a count other than that of the tokens, values above 0 (logits), unfinished requests,
            parts of streams, and prompts that are not those of the responses.
    """
    return pack(_responses(list_outputs(outputs, ("outputs", "choices")), prompt_ids), missing, device)


def _responses(requests: list[Any], prompts: Any) -> Iterator[Response]:
    given = read_prompts(prompts, len(requests))
    for k, request in enumerate(requests):
        where = f"outputs[{k}]"
        if (choices := get(request, "choices")) is not None:
            yield from _server_responses(k, request, choices, given[k])
            continue
        completions = get(request, "outputs")
        if not isinstance(completions, Sequence):
            raise TypeError(
                f"{where}: expected a RequestOutput, which has a list `outputs`, or a server's response, which has "
                f"`choices`; got {describe(request)}"
            )
        if get(request, "finished") is False:
            raise ValueError(f"{where}.finished: expected a finished request, no part of a stream; got False")
        prompt = agreed_prompt(where, get(request, "prompt_token_ids"), only_prompt(k, given[k]))
        for j, completion in enumerate(completions):
            here = f"{where}.outputs[{j}]"
            reason = get(completion, "finish_reason")
            if reason is None:
                raise ValueError(f"{here}.finish_reason: expected that of a finished response; got None")
            positions = get(completion, "logprobs")
            if positions is None:
                raise ValueError(
                    f"{here}.logprobs: expected the sampled tokens' log-probabilities; got None: ask for them with "
                    "SamplingParams(logprobs=0)"
                )
            token_ids = read_ids(f"{here}.token_ids", get(completion, "token_ids"))
            if not hasattr(positions, "__len__") or isinstance(positions, (str, bytes, Mapping)):
                raise TypeError(
                    f"{here}.logprobs: expected a list of dicts, or FlatLogprobs; got {checks.describe(positions)}"
                )
            check_count(f"{here}.logprobs", len(positions), len(token_ids))
            values = _sampled_logprobs(here, token_ids, positions)
            refuse_part(here, get(completion, "cumulative_logprob"), values)
            masks = get(completion, "sampling_mask")
            named = f"{here}.sampling_mask"
            if masks is not None and (lists := get(masks, "token_ids")) is not None:
                masks, named = lists, f"{named}.token_ids"
            kept = read_kept(named, masks, len(token_ids))
            versions = read_versions(f"{here}.weight_versions", get(completion, "weight_versions"), len(token_ids))
            experts = _experts(here, completion, where, request)
            yield Response(here, token_ids, values, str(reason), prompt, kept, versions, experts)


def _experts(where: str, completion: Any, whole: str, request: Any) -> RoutedExperts | None:
    """`routed_experts` of a completion; in older versions those of its prompt are apart."""
    rows = read_experts(f"{where}.routed_experts", get(completion, "routed_experts"))
    before = read_experts(f"{whole}.prompt_routed_experts", get(request, "prompt_routed_experts"))
    if rows is None:
        return None if before is None else RoutedExperts(f"{whole}.prompt_routed_experts", before)
    if before is None:
        return RoutedExperts(f"{where}.routed_experts", rows)
    if before.shape[1:] != rows.shape[1:]:
        raise ValueError(
            f"{where}.routed_experts: expected {list(before.shape[1:])} experts for each token, as in "
            f"{whole}.prompt_routed_experts; got {list(rows.shape[1:])}"
        )
    return RoutedExperts(f"{where}.routed_experts", torch.cat((before, rows)))


def _sampled_logprobs(where: str, token_ids: list[int], positions: Any) -> list[float]:
    """The sampled token's log-probability at each position of a list of {token id: Logprob}, or of FlatLogprobs."""
    starts, ends = get(positions, "start_indices"), get(positions, "end_indices")
    found: list[Any] = []
    if starts is not None and ends is not None:  # read once: a container may build its lists at each access
        candidates, values = list(get(positions, "token_ids")), list(get(positions, "logprobs"))
        for token, start, end in zip(token_ids, list(starts), list(ends), strict=True):
            at = next((j for j in range(start, end) if candidates[j] == token), None)
            found.append(None if at is None else values[at])
        return read_logprobs(f"{where}.logprobs", found)
    for i, (token, position) in enumerate(zip(token_ids, positions, strict=True)):
        if position is not None and not isinstance(position, Mapping):
            raise TypeError(
                f"{where}.logprobs[{i}]: expected a dict of token id to Logprob; got {checks.describe(position)}"
            )
        entry = None if position is None else position.get(token, position.get(str(token)))  # JSON keys are strings
        found.append(get(entry, "logprob"))
    return read_logprobs(f"{where}.logprobs", found)


def _server_responses(k: int, response: Any, choices: Any, given: list[list[int]] | None) -> Iterator[Response]:
    """Choices of a completion (`token_logprobs`, `tokens`), or of a chat or generate response (`content`)."""
    where, tokens = f"outputs[{k}]", 0
    refuse_chunk(where, response)
    choices = read_list(f"{where}.choices", choices, "choices")
    prompts = _prompts_of_choices(k, response, choices, given)
    for j, choice in enumerate(choices):
        here = f"{where}.choices[{j}]"
        reason = get(choice, "finish_reason")
        if reason is None:
            raise ValueError(f"{here}.finish_reason: expected that of a whole response; got None, a part of a stream")
        logprobs = get(choice, "logprobs")
        by_token, content = get(logprobs, "token_logprobs"), get(logprobs, "content")
        if by_token is None and content is None:
            raise ValueError(
                f"{here}.logprobs: expected `token_logprobs` or `content`; got {describe(logprobs)}: ask for them "
                "with logprobs=0 (completions) or logprobs=true (chat)"
            )
        if by_token is not None:
            origin, part = f"{here}.logprobs.token_logprobs", ""
            if any(read_list(f"{here}.logprobs.text_offset", get(logprobs, "text_offset") or [], "numbers")[:1]):
                got = get(logprobs, "text_offset")[0]
                raise ValueError(f"{here}.logprobs.text_offset[0]: expected 0; got {got}: {LAST_PART}")
            values, names = read_list(origin, by_token, "log-probabilities"), list(get(logprobs, "tokens") or [])
            if values and values[0] is None:
                raise ValueError(
                    f"{origin}: expected those of the response alone; got None first, as of a "
                    "prompt's first token: send echo=false"
                )
        else:
            origin, part = f"{here}.logprobs.content", ".logprob"
            content = read_list(origin, content, "tokens with their log-probabilities")
            values, names = [get(x, "logprob") for x in content], [get(x, "token") for x in content]
        token_ids = get(choice, "token_ids")
        if token_ids is None:
            named = [_TOKEN.fullmatch(str(name)) for name in names]
            token_ids = [int(match[1]) for match in named if match]
            if len(token_ids) != len(values):
                raise ValueError(
                    f"{here}.token_ids: expected the sampled tokens' ids, which text does not determine; got none: "
                    "send return_token_ids=true, or return_tokens_as_token_ids=true"
                )
        token_ids = read_ids(f"{here}.token_ids", token_ids)
        check_count(f"{here}.logprobs", len(values), len(token_ids))
        prompt = get(choice, "prompt_token_ids")  # a completion's choice has it, a chat's response
        prompt = agreed_prompt(here, get(response, "prompt_token_ids") if prompt is None else prompt, prompts[j])
        kept = read_kept(f"{here}.sampling_mask", get(choice, "sampling_mask"), len(token_ids))
        versions = read_versions(f"{here}.weight_versions", get(choice, "weight_versions"), len(token_ids))
        experts = _experts(here, choice, where, response)
        tokens += len(token_ids)
        yield Response(
            here, token_ids, read_logprobs(origin, values, part), str(reason), prompt, kept, versions, experts
        )
    refuse_count(where, get(response, "usage"), tokens)


def _prompts_of_choices(
    k: int, response: Any, choices: list[Any], given: list[list[int]] | None
) -> Sequence[list[int] | None]:
    """The caller's prompt of each choice. Choices of several prompts are in the order of the prompts, n of each."""
    if given is None:
        return [None] * len(choices)
    total, count = get(get(response, "usage"), "prompt_tokens"), sum(map(len, given))
    if total is not None and total != count:
        raise ValueError(
            f"prompt_ids[{k}]: expected the {total} tokens that outputs[{k}].usage.prompt_tokens counts; got {count}. "
            "For a response to several prompts pass the list of its prompts"
        )
    if len(given) == 1:
        return given * len(choices)
    if any(get(get(choice, "logprobs"), "content") is not None for choice in choices):
        only_prompt(k, given)
    indices = [i if (index := get(choice, "index")) is None else index for i, choice in enumerate(choices)]
    if len(choices) % len(given) or sorted(indices) != list(range(len(choices))):
        raise ValueError(
            f"prompt_ids[{k}]: expected the prompts of outputs[{k}], whose choices are equally many of each; got "
            f"{len(given)} prompts for choices of index {indices}"
        )
    return [given[index // (len(choices) // len(given))] for index in indices]
