"""Outputs of SGLang as packed arrays: the log-probabilities of a rollout, ready to be `old_logprobs`.

SGLang is not imported: outputs are recognised by their fields, as objects or as JSON. Formats:
`docs/basic_usage/sampling_params.md` and `python/sglang/srt/managers/tokenizer_manager.py`, as of 0.4 and 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..base import checks
from .kept_sets import KeptSets, read_kept
from .parsing import (
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
from .weight_versions import Span, read_versions


def from_sglang(
    outputs: Any,
    *,
    prompt_ids: Sequence[Sequence[int]] | None = None,
    experts_shape: tuple[int, int] | None = None,
    missing: str = "refuse",
    device: Any = None,
) -> Rollouts:
    """SGLang's outputs as packed arrays.

    Accepted are one output or a sequence of outputs: what `Engine.generate` and `POST /generate` return for
    `return_logprob=True`, `{"meta_info": {"output_token_logprobs": [(logprob, token id, text or None), ...]}}`; and
    responses of `/v1/chat/completions` whose choices have such a `meta_info` (`return_meta_info=True`,
    `logprobs=True`). Other OpenAI responses of SGLang have no token ids and are refused.

    SGLang computes log-probabilities after penalties and after dividing by the temperature, so give the losses the same
    `temperature`; if the server runs with SGLANG_RETURN_ORIGINAL_LOGPROB, pass `temperature=1.0`. They do not include
    top-k, top-p and min-p (older versions included top-p). To sample with these filters, send
    `return_sampling_mask=True`: the result then has `kept`, and `old_logprobs` are `output_token_sampling_logprobs`,
    those of the distribution over the kept sets, in either `sampling_logprobs_mode`. `return_logprob` is not needed
    then, where the output has `output_ids`.

    Args:
        prompt_ids: the prompt's token ids for each element of `outputs`, of which SGLang returns one per response
            (with n > 1, the n responses to a prompt are adjacent). None: those in `input_token_logprobs`, which
            `logprob_start_len=0` requests, or `return_prompt_token_ids=True`, if any.
        experts_shape: (layers, k), the number of layers and of experts per token in `routed_experts`, which
            `return_routed_experts=True` returns without its shape. None: they are not read.

    The other arguments, the result and the errors are those of `from_vllm`. Token ids are also compared with
    `completion_tokens` and `output_ids`, which detects responses that are shifted by one.
    """
    if experts_shape is not None:
        if not isinstance(experts_shape, (tuple, list)) or len(experts_shape) != 2:
            raise TypeError(
                f"experts_shape: expected (layers, experts per token); got {checks.describe(experts_shape)}"
            )
        layers, k = (checks.whole("experts_shape", x, "(layers, experts per token)", at_least=1) for x in experts_shape)
        experts_shape = layers, k
    found = _responses(list_outputs(outputs, ("meta_info", "choices")), prompt_ids, experts_shape)
    return pack(found, missing, device)


Shape = tuple[int, int] | None


def _responses(outputs: list[Any], prompts: Any, shape: Shape) -> Iterator[Response]:
    given = read_prompts(prompts, len(outputs))
    for k, output in enumerate(outputs):
        choices, prompt = get(output, "choices"), only_prompt(k, given[k])
        if choices is None:
            yield _response(f"outputs[{k}]", output, None, prompt, shape)
            continue
        for j, choice in enumerate(read_list(f"outputs[{k}].choices", choices, "choices")):
            yield _response(f"outputs[{k}].choices[{j}]", choice, get(output, "prompt_token_ids"), prompt, shape)


def _response(where: str, output: Any, prompt: Any, given: list[int] | None, shape: Shape) -> Response:
    """One output or choice with `meta_info`; `prompt`: as its response has it, `given`: as the caller passed it."""
    meta = get(output, "meta_info")
    if meta is None:
        raise ValueError(
            f"{where}.meta_info: expected what /generate returns, or a chat's choice with return_meta_info=true, "
            f"because other responses have no token ids; got {describe(output)}"
        )
    reason = get(meta, "finish_reason")
    reason = get(reason, "type") if isinstance(reason, Mapping) else reason
    if reason is None:
        raise ValueError(
            f"{where}.meta_info.finish_reason: expected that of a whole response; got None, a part of a stream"
        )
    token_ids, logprobs = _tokens(where, output, meta)
    named = f"{where}.meta_info.output_token_sampling_mask"
    kept = read_kept(named, get(meta, "output_token_sampling_mask"), len(token_ids))
    if kept is not None:
        logprobs = _kept_logprobs(f"{where}.meta_info.output_token_sampling_logprobs", meta, token_ids, kept)
    prompt = get(output, "prompt_token_ids") if prompt is None else prompt
    inputs = get(meta, "input_token_logprobs")
    if prompt is None and inputs is not None:
        here = f"{where}.meta_info.input_token_logprobs"
        inputs = _rows(here, inputs)
        if inputs and len(inputs) == get(meta, "prompt_tokens"):  # otherwise they start later in the prompt
            prompt = read_ids(here, [token for _, token, *_ in inputs], "[1]")
    count = get(meta, "prompt_tokens")
    if prompt is None and given is not None and count is not None and count != len(given):
        raise ValueError(
            f"prompt_ids: expected for {where} the {count} tokens that its meta_info.prompt_tokens counts; got "
            f"{len(given)}"
        )
    prompt = agreed_prompt(where, prompt, given)
    named = f"{where}.meta_info.routed_experts"
    rows = None if shape is None else read_experts(named, get(meta, "routed_experts"), shape)
    experts = None if rows is None else RoutedExperts(named, rows)
    versions = _versions(where, meta, len(token_ids))
    return Response(where, token_ids, logprobs, str(reason), prompt, kept, versions, experts)


def _versions(where: str, meta: Any, tokens: int) -> list[Span] | None:
    """Spans; in older versions one label, of the weights with which the response ended."""
    spans, last = get(meta, "weight_versions"), get(meta, "weight_version")
    if spans is None and last is not None:
        spans = [{"version": last, "start": 0, "end": tokens}]
    return read_versions(f"{where}.meta_info.weight_versions", spans, tokens)


def _tokens(where: str, output: Any, meta: Any) -> tuple[list[int], list[float]]:
    """Token ids, with log-probabilities over the whole vocabulary: none where kept sets alone were requested."""
    here = f"{where}.meta_info.output_token_logprobs"
    rows, output_ids = get(meta, "output_token_logprobs"), get(output, "output_ids")
    if output_ids is not None:
        output_ids = read_ids(f"{where}.output_ids", output_ids)
    if rows is not None:
        rows = _rows(here, rows)
        token_ids = read_ids(here, [token for _, token, *_ in rows], "[1]")
    elif output_ids is not None and get(meta, "output_token_sampling_mask") is not None:
        here, rows, token_ids = f"{where}.output_ids", [], output_ids
    else:
        raise ValueError(f"{here}: expected [(logprob, token id, text), ...]; got none: send return_logprob=true")
    if (count := get(meta, "completion_tokens")) is not None:
        named = f"{where}.meta_info.completion_tokens"
        check_count(here, len(token_ids), checks.whole(named, count, "how many tokens were sampled"))
    if output_ids is not None:
        check_count(here, len(token_ids), len(output_ids))
        if output_ids != token_ids:
            raise ValueError(
                f"{where}.output_ids: expected the token ids of meta_info.output_token_logprobs; got others"
            )
    return token_ids, read_logprobs(here, [logprob for logprob, *_ in rows], "[0]")


def _kept_logprobs(where: str, meta: Any, token_ids: list[int], kept: KeptSets) -> list[float]:
    """The sampled tokens' log-probabilities over the kept sets: one a token, or one for each id of its set."""
    values = get(meta, "output_token_sampling_logprobs")
    if values is None:
        raise ValueError(f"{where}: expected the log-probabilities that come with output_token_sampling_mask; got none")
    values = read_list(where, values, "log-probabilities over the kept ids")
    check_count(where, len(values), len(token_ids))
    for i, (value, token, row) in enumerate(zip(values, token_ids, kept.rows, strict=True)):
        if isinstance(value, (list, tuple)):  # sampling_logprobs_mode="support"
            if len(value) != len(row):
                raise ValueError(f"{where}[{i}]: expected one for each of the {len(row)} kept ids; got {len(value)}")
            values[i] = value[row.index(token)] if token in row else None
    return read_logprobs(where, values)


def _rows(where: str, values: Any) -> list[Any]:
    """SGLang's rows (log-probability, token id, text)."""
    rows = read_list(where, values, "(logprob, token id, text)")
    of_sequences = all(issubclass(kind, (tuple, list)) for kind in set(map(type, rows)))
    if not of_sequences or min(map(len, rows), default=2) < 2:
        at = next(i for i, row in enumerate(rows) if not isinstance(row, (tuple, list)) or len(row) < 2)
        raise TypeError(f"{where}[{at}]: expected (logprob, token id, text); got {checks.describe(rows[at])}")
    return rows
