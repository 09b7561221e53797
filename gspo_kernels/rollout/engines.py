"""What inference engines return, as packed arrays: the log-probabilities of a rollout, ready to be `old_logprobs`.

No engine is imported: their outputs are known by their fields, as objects or as JSON. Formats are those of vLLM
(`vllm/outputs.py`, `vllm/logprobs.py`, `vllm/entrypoints/openai/*/protocol.py`, as of 0.9 to 0.20) and of SGLang
(`docs/basic_usage/sampling_params.md`, `python/sglang/srt/managers/tokenizer_manager.py`, as of 0.4 and 0.5).
"""

from __future__ import annotations

import itertools
import numbers as abstract
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks

# What stands for minus infinity: vLLM's server writes -9999.0, SGLang the lowest float32; JSON has no infinity.
LOWEST = -9999.0
_HIGHEST_ID = 2**63 - 1  # of int64
_TOKEN = re.compile(r"token_id:(\d+)")


class PromptedRollouts(NamedTuple):
    """Prompts and responses one after the other, packed: row t of a causal model's logits predicts `token_ids[t]`."""

    input_ids: Tensor  # [P + N] int64, for the model: each prompt, then its response
    token_ids: Tensor  # [P + N] int64, `input_ids` rolled left by one; the last row of a sequence is masked
    old_logprobs: Tensor  # [P + N] float32, NaN where the mask is False
    mask: Tensor  # [P + N] bool, True where a token of a response is predicted
    cu_seqlens: Tensor  # [S + 1] int64


@dataclass(frozen=True)
class Rollouts:
    """N tokens of S responses, packed in the order in which the engine returned them."""

    token_ids: Tensor  # [N] int64, with the stop token if one was sampled: both engines return it
    old_logprobs: Tensor  # [N] float32, nats; NaN where the mask is False
    mask: Tensor  # [N] bool: whether the engine returned a log-probability. All True unless missing="mask"
    cu_seqlens: Tensor  # [S + 1] int64, response i is tokens cu_seqlens[i] to cu_seqlens[i + 1]
    finish_reasons: tuple[str, ...]  # of each response: "stop", "length" (cut off), "abort", ...
    group_ids: Tensor | None  # [S] int64, for `group_advantages`: equal prompts share one. None: prompts not known
    prompt_ids: Tensor | None  # [P] int64, the prompt of each response, packed
    prompt_cu_seqlens: Tensor | None  # [S + 1] int64

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
        # A token's place among all: its place among its kind, and how many of the other kind stand before it.
        at_prompt = torch.arange(of_prompt.numel(), device=prompts.device) + self.cu_seqlens[of_prompt]
        at_response = torch.arange(of_response.numel(), device=prompts.device) + self.prompt_cu_seqlens[of_response + 1]
        input_ids = self.token_ids.new_empty(at_prompt.numel() + at_response.numel())
        input_ids[at_prompt], input_ids[at_response] = self.prompt_ids, self.token_ids
        old_logprobs = torch.full_like(input_ids, torch.nan, dtype=torch.float32)
        old_logprobs[at_response - 1] = self.old_logprobs
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        mask[at_response - 1] = self.mask
        return PromptedRollouts(input_ids, input_ids.roll(-1), old_logprobs, mask, boundaries)


def from_vllm(
    outputs: Any, *, prompt_ids: Sequence[Sequence[int]] | None = None, missing: str = "refuse", device: Any = None
) -> Rollouts:
    """vLLM's outputs as packed arrays.

    Taken are, one or a sequence of them:

    - `RequestOutput`, as `LLM.generate` and `AsyncLLM` return it, for `SamplingParams(logprobs=0)` or more: the
      sampled token's log-probability is always among those returned. `CompletionOutput.logprobs` may be a list of
      `{token id: Logprob}` or `FlatLogprobs`;
    - responses of the server (`/v1/completions`, `/v1/chat/completions`, `/inference/v1/generate`), as parsed JSON or
      as the OpenAI client's objects, for requests with `logprobs` and `return_token_ids=True`, or
      `return_tokens_as_token_ids=True`.

    vLLM's default is `logprobs_mode="raw_logprobs"`: of the model's own logits, before penalties, temperature, top-k
    and top-p. Those belong to `temperature=1.0`. At another temperature start vLLM with
    `logprobs_mode="processed_logprobs"` and give the losses the same `temperature`; with top-k or top-p the processed
    ones are of the filtered distribution, which no loss here computes.

    Args:
        outputs: see above, of requests that have finished: no parts of a stream.
        prompt_ids: the prompt's token ids for each element of `outputs`; None: those that the engine returned, if any.
        missing: what to do where the sampled token has no log-probability: None, NaN, minus infinity, or -9999.0 and
            below, which a server writes for minus infinity. "refuse", or "mask": the token's mask is False. A token
            that was sampled has one, so it says that something is wrong: an engine's bug, or a filter that the
            sampling went by and the log-probability did not.
        device: of the arrays. None: the CPU.

    Raises:
        ValueError, TypeError: naming the place in `outputs`, what was expected and what came: log-probabilities not
            requested, another number of them than of tokens, values that are none (logits), unfinished requests.
    """
    return _packed(_of_vllm(_listed(outputs, ("outputs", "choices")), prompt_ids), missing, device)


def from_sglang(
    outputs: Any, *, prompt_ids: Sequence[Sequence[int]] | None = None, missing: str = "refuse", device: Any = None
) -> Rollouts:
    """SGLang's outputs as packed arrays.

    Taken are, one or a sequence of them: what `Engine.generate` and `POST /generate` return for `return_logprob=True`,
    `{"meta_info": {"output_token_logprobs": [(logprob, token id, text or None), ...], ...}, ...}`; and responses of
    `/v1/chat/completions` whose choices have such a `meta_info` (`return_meta_info=True`, `logprobs=True`). Its other
    OpenAI responses do not tell token ids and are refused.

    SGLang's log-probabilities are taken after penalties and after dividing by the temperature, so give the losses the
    same `temperature`; unless the server runs with SGLANG_RETURN_ORIGINAL_LOGPROB, then they belong to
    `temperature=1.0`. Top-k, top-p and min-p do not enter them (top-p did in older versions): sample without.

    Args:
        prompt_ids: the prompt's token ids for each element of `outputs`, of which SGLang makes one per response (with
            n > 1, the n responses to a prompt stand together). None: those in `input_token_logprobs`, which
            `logprob_start_len=0` asks for, if any.

    The other arguments, the result and the errors are those of `from_vllm`; here counts are also compared with
    `completion_tokens` and with `output_ids`, which catches responses that are shifted by one.
    """
    return _packed(_of_sglang(_listed(outputs, ("meta_info", "choices")), prompt_ids), missing, device)


# ---- of one response


class _Response(NamedTuple):
    where: str  # for error messages
    token_ids: list[int]
    logprobs: list[float]  # NaN where there is none
    finish_reason: str
    prompt: list[int] | None


def _of_vllm(requests: list[Any], prompts: Any) -> Iterator[_Response]:
    given = _prompts(prompts, len(requests))
    for k, request in enumerate(requests):
        where = f"outputs[{k}]"
        if (choices := _get(request, "choices")) is not None:
            yield from _of_openai(where, request, choices, given[k])
            continue
        completions = _get(request, "outputs")
        if not isinstance(completions, Sequence):
            raise TypeError(
                f"{where}: expected a RequestOutput, which has a list `outputs`, or a server's response, which has "
                f"`choices`; got {_described(request)}"
            )
        if _get(request, "finished") is False:
            raise ValueError(f"{where}.finished: expected a finished request, no part of a stream; got False")
        prompt = _same_prompt(where, _get(request, "prompt_token_ids"), given[k])
        for j, completion in enumerate(completions):
            place = f"{where}.outputs[{j}]"
            positions = _get(completion, "logprobs")
            if positions is None:
                raise ValueError(
                    f"{place}.logprobs: expected the sampled tokens' log-probabilities; got None: ask for them with "
                    "SamplingParams(logprobs=0)"
                )
            token_ids = _ids(f"{place}.token_ids", _get(completion, "token_ids"))
            if not hasattr(positions, "__len__") or isinstance(positions, (str, bytes, Mapping)):
                raise TypeError(
                    f"{place}.logprobs: expected a list of dicts, or FlatLogprobs; got {checks.describe(positions)}"
                )
            _same_count(f"{place}.logprobs", len(positions), len(token_ids))
            values = _sampled(place, token_ids, positions)
            yield _Response(place, token_ids, values, str(_get(completion, "finish_reason")), prompt)


def _sampled(where: str, token_ids: list[int], positions: Any) -> list[float]:
    """Each sampled token's among those of its position: a list of {token id: Logprob}, or FlatLogprobs."""
    starts, ends = _get(positions, "start_indices"), _get(positions, "end_indices")
    found: list[Any] = []
    if starts is not None and ends is not None:  # flat; its lists may be made anew each time that one asks
        candidates, values = list(_get(positions, "token_ids")), list(_get(positions, "logprobs"))
        for token, start, end in zip(token_ids, list(starts), list(ends), strict=True):
            at = next((j for j in range(start, end) if candidates[j] == token), None)
            found.append(None if at is None else values[at])
        return _logprobs(f"{where}.logprobs", found)
    for i, (token, position) in enumerate(zip(token_ids, positions, strict=True)):
        if position is not None and not isinstance(position, Mapping):
            raise TypeError(
                f"{where}.logprobs[{i}]: expected a dict of token id to Logprob; got {checks.describe(position)}"
            )
        entry = None if position is None else position.get(token, position.get(str(token)))  # JSON keys are strings
        found.append(_get(entry, "logprob"))
    return _logprobs(f"{where}.logprobs", found)


def _of_openai(where: str, response: Any, choices: Any, given: list[int] | None) -> Iterator[_Response]:
    """Choices of a completion (`token_logprobs`, `tokens`), of a chat or of a generate response (`content`)."""
    if str(_get(response, "object")).endswith("chunk"):
        raise ValueError(f"{where}.object: expected that of a whole response; got {_get(response, 'object')!r}")
    for j, choice in enumerate(_sequence(f"{where}.choices", choices, "choices")):
        place = f"{where}.choices[{j}]"
        reason = _get(choice, "finish_reason")
        if reason is None:
            raise ValueError(f"{place}.finish_reason: expected that of a whole response; got None, a part of a stream")
        logprobs = _get(choice, "logprobs")
        by_token, content = _get(logprobs, "token_logprobs"), _get(logprobs, "content")
        if by_token is None and content is None:
            raise ValueError(
                f"{place}.logprobs: expected `token_logprobs` or `content`; got {_described(logprobs)}: ask for them "
                "with logprobs=0 (completions) or logprobs=true (chat)"
            )
        if by_token is not None:
            origin, part = f"{place}.logprobs.token_logprobs", ""
            values, names = _sequence(origin, by_token, "log-probabilities"), list(_get(logprobs, "tokens") or [])
            if values and values[0] is None:
                raise ValueError(
                    f"{origin}: expected those of the response alone; got None first, as of a "
                    "prompt's first token: send echo=false"
                )
        else:
            origin, part = f"{place}.logprobs.content", ".logprob"
            content = _sequence(origin, content, "tokens with their log-probabilities")
            values, names = [_get(x, "logprob") for x in content], [_get(x, "token") for x in content]
        token_ids = _get(choice, "token_ids")
        if token_ids is None:
            named = [_TOKEN.fullmatch(str(name)) for name in names]
            token_ids = [int(match[1]) for match in named if match]
            if len(token_ids) != len(values):
                raise ValueError(
                    f"{place}.token_ids: expected the sampled tokens' ids, which their text does not tell; got none: "
                    "send return_token_ids=true, or return_tokens_as_token_ids=true"
                )
        token_ids = _ids(f"{place}.token_ids", token_ids)
        _same_count(f"{place}.logprobs", len(values), len(token_ids))
        prompt = _get(choice, "prompt_token_ids")  # of a completion; a chat has it once
        prompt = _same_prompt(place, _get(response, "prompt_token_ids") if prompt is None else prompt, given)
        yield _Response(place, token_ids, _logprobs(origin, values, part), str(reason), prompt)


def _of_sglang(outputs: list[Any], prompts: Any) -> Iterator[_Response]:
    given = _prompts(prompts, len(outputs))
    for k, output in enumerate(outputs):
        choices = _get(output, "choices")
        if choices is None:
            yield _of_meta_info(f"outputs[{k}]", output, None, given[k])
            continue
        for j, choice in enumerate(_sequence(f"outputs[{k}].choices", choices, "choices")):
            yield _of_meta_info(f"outputs[{k}].choices[{j}]", choice, _get(output, "prompt_token_ids"), given[k])


def _of_meta_info(where: str, output: Any, prompt: Any, given: list[int] | None) -> _Response:
    meta = _get(output, "meta_info")
    if meta is None:
        raise ValueError(
            f"{where}.meta_info: expected what /generate returns, or a chat's choice for return_meta_info=true, as "
            f"token ids are nowhere else; got {_described(output)}"
        )
    place = f"{where}.meta_info.output_token_logprobs"
    rows = _get(meta, "output_token_logprobs")
    if rows is None:
        raise ValueError(f"{place}: expected [(logprob, token id, text), ...]; got none: send return_logprob=true")
    reason = _get(meta, "finish_reason")
    if reason is None:
        raise ValueError(
            f"{where}.meta_info.finish_reason: expected that of a whole response; got None, a part of a stream"
        )
    rows = _rows(place, rows)
    token_ids, values = _ids(place, [row[1] for row in rows], "[1]"), _logprobs(place, [row[0] for row in rows], "[0]")
    if (count := _get(meta, "completion_tokens")) is not None:
        named = f"{where}.meta_info.completion_tokens"
        _same_count(place, len(rows), checks.whole(named, count, "how many tokens were sampled"))
    if (output_ids := _get(output, "output_ids")) is not None:
        output_ids = _ids(f"{where}.output_ids", output_ids)
        _same_count(place, len(rows), len(output_ids))
        if output_ids != token_ids:
            raise ValueError(
                f"{where}.output_ids: expected the token ids of meta_info.output_token_logprobs; got others"
            )
    prompt = _get(output, "prompt_token_ids") if prompt is None else prompt
    inputs = _get(meta, "input_token_logprobs")
    if prompt is None and inputs is not None:
        place = f"{where}.meta_info.input_token_logprobs"
        inputs = _rows(place, inputs)
        if inputs and len(inputs) == _get(meta, "prompt_tokens"):  # else it starts later
            prompt = _ids(place, [row[1] for row in inputs], "[1]")
    kind = str(_get(reason, "type") if isinstance(reason, Mapping) else reason)
    return _Response(where, token_ids, values, kind, _same_prompt(where, prompt, given))


# ---- of all


def _packed(responses: Iterator[_Response], missing: str, device: Any) -> Rollouts:
    checks.choice("missing", missing, ("refuse", "mask"))
    device = _device(device)
    found = list(responses)
    exact = torch.tensor([x for each in found for x in each.logprobs], dtype=torch.float64, device="cpu")
    positive, hint = exact > checks.HIGHEST_LOGPROB, "logits, then: see vLLM's logprobs_mode"
    _refuse(found, exact, positive, "a log-probability, at most 0", hint)
    mask = (exact > LOWEST) & ~positive
    if missing == "refuse":
        hint = 'as it was sampled, it has one: see from_vllm, or leave such tokens out with missing="mask"'
        _refuse(found, exact, ~mask, "the sampled token's log-probability", hint)
    prompts = [each.prompt for each in found if each.prompt is not None]
    if prompts and len(prompts) < len(found):
        without = next(each.where for each in found if each.prompt is None)
        raise ValueError(f"{without}: expected prompt token ids, as other responses have; got none. Pass prompt_ids=")
    known = len(prompts) == len(found)
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
    )


def _refuse(found: list[_Response], values: Tensor, wrong: Tensor, expected: str, hint: str) -> None:
    """At the first token that is wrong, if any."""
    for at in wrong.nonzero()[:1, 0].tolist():
        got = float(values[at])
        said = "none" if got != got else f"{got:g}"
        for each in found:
            if at < len(each.token_ids):
                raise ValueError(
                    f"{each.where}: expected {expected}, for its token {at} (id {each.token_ids[at]}); got {said}, and "
                    f"{int(wrong.sum())} such in all; {hint}"
                )
            at -= len(each.token_ids)


def _device(device: Any) -> torch.device:
    """The CPU if None, whatever torch's default is."""
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


def _get(of: Any, name: str) -> Any:
    """A field of an object, or of its JSON; None where there is none."""
    return of.get(name) if isinstance(of, Mapping) else getattr(of, name, None)


def _logprobs(where: str, values: list[Any], part: str = "") -> list[float]:
    """As Python's floats, NaN for None. One that is refused is named by `where`, its position and `part`."""
    kinds = set(map(type, values))
    if kinds <= {float}:
        return values
    unchecked: Iterable[int] = range(len(values))
    if not any(issubclass(kind, Tensor) for kind in kinds):  # of other types, the first tells for all
        unchecked = sorted(dict(zip(map(type, reversed(values)), reversed(range(len(values))), strict=True)).values())
    for i in unchecked:
        _check_logprob(f"{where}[{i}]{part}", values[i])
    return [float("nan") if x is None else float(x) for x in values]


def _check_logprob(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        checks.shape(name, checks.tensor(name, value, "a log-probability"), (), "one log-probability")
        checks.digits(name, value)
    elif value is not None and (isinstance(value, bool) or not isinstance(value, abstract.Real)):
        raise TypeError(f"{name}: expected a log-probability, a number; got {checks.describe(value)}")
    elif getattr(getattr(value, "dtype", None), "itemsize", 8) < 4:
        raise TypeError(
            f"{name}: expected a log-probability in float32 or float64, because near 1 a step of 16 bits is larger "
            f"than GSPO's clip range; got {checks.describe(value)}"
        )


def _ids(where: str, values: Any, part: str = "") -> list[int]:
    """As Python's ints, from 0 to the largest int64. One that is refused is named as by `_logprobs`."""
    if isinstance(values, Tensor) or (hasattr(values, "tolist") and hasattr(values, "dtype")):
        values = values.tolist()
    found: list[int] = _sequence(where, values, "token ids")
    kinds = set(map(type, found))
    try:
        if any(issubclass(kind, (bool, Tensor)) for kind in kinds):
            raise TypeError
        found = found if kinds <= {int} else list(map(operator.index, found))
    except TypeError:
        found = [checks.whole(f"{where}[{i}]{part}", x, "a token id") for i, x in enumerate(found)]
    if found and not (min(found) >= 0 and max(found) <= _HIGHEST_ID):
        at = next(i for i, x in enumerate(found) if not 0 <= x <= _HIGHEST_ID)
        raise ValueError(f"{where}[{at}]{part}: expected a token id, from 0 to 2**63 - 1; got {found[at]}")
    return found


def _rows(where: str, values: Any) -> list[Any]:
    """SGLang's (log-probability, token id, text)."""
    rows = _sequence(where, values, "(logprob, token id, text)")
    of_sequences = all(issubclass(kind, (tuple, list)) for kind in set(map(type, rows)))
    if not of_sequences or min(map(len, rows), default=2) < 2:
        at = next(i for i, row in enumerate(rows) if not isinstance(row, (tuple, list)) or len(row) < 2)
        raise TypeError(f"{where}[{at}]: expected (logprob, token id, text); got {checks.describe(rows[at])}")
    return rows


def _sequence(where: str, values: Any, meaning: str) -> list[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{where}: expected a sequence of {meaning}; got {_described(values)}")
    return list(values)


def _listed(outputs: Any, marks: tuple[str, ...]) -> list[Any]:
    """One output, or several."""
    if any(_get(outputs, mark) is not None for mark in marks):
        return [outputs]
    if isinstance(outputs, (str, bytes, Mapping)) or not isinstance(outputs, Iterable):
        raise TypeError(f"outputs: expected an engine's outputs, or a sequence of them; got {_described(outputs)}")
    return list(outputs)


def _prompts(prompts: Any, count: int) -> list[list[int] | None]:
    if prompts is None:
        return [None] * count
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompt_ids: expected a sequence of prompts; got {_described(prompts)}")
    if len(prompts) != count:
        raise ValueError(f"prompt_ids: expected one prompt for each of the {count} outputs; got {len(prompts)}")
    return [_ids(f"prompt_ids[{k}]", prompt) for k, prompt in enumerate(prompts)]


def _same_prompt(where: str, returned: Any, given: list[int] | None) -> list[int] | None:
    if returned is None:
        return given
    found = _ids(f"{where}.prompt_token_ids", returned)
    if given is not None and given != found:
        raise ValueError(
            f"prompt_ids: expected for {where} the prompt that the engine returned, of {len(found)} tokens; got "
            f"another, of {len(given)}"
        )
    return found


def _same_count(where: str, count: int, tokens: int) -> None:
    if count != tokens:
        raise ValueError(
            f"{where}: expected one for each of the {tokens} sampled tokens; got {count}, so it is not known which "
            "belongs to which"
        )


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, list(value)[:8])) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"
