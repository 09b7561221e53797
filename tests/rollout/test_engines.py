"""vLLM's and SGLang's outputs as packed arrays, from fakes with the fields and the order of the engines' own.

vLLM's have the fields of its recorded outputs, which `test_recorded.py` checks. SGLang's follow `tokenizer_manager.py`
and `docs/basic_usage/sampling_params.md`. Neither engine is installed or imported.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import recorded
import torch
from modes import DEFAULT_MODE
from test_errors import check_message

from gspo_kernels import Rollouts, from_sglang, from_vllm, group_advantages, gspo_loss, rollout_mismatch

pytestmark = DEFAULT_MODE

# Prompt, sampled tokens (the last of the first is its stop token), their log-probabilities. Tokens repeat, one response
# is empty, and the sampled token is not always the likeliest.
PROMPTS = [[5, 6, 7], [8, 9]]
RESPONSES = [
    [([3, 3, 0], [-0.5, -1.25, -0.01]), ([4], [-7.5])],
    [([], []), ([2, 11, 2, 11, 2], [-2.0, -0.0, -1e-7, -3.5, -20.0])],
]
REASONS = [["stop", "length"], ["abort", "length"]]
FLAT = [(k, j) for k in range(2) for j in range(2)]


def top(token: int, logprob: float) -> list[tuple[int, float]]:
    """The sampled token, then the 2 likeliest, in vLLM's order; the sampled one twice if it is among them."""
    likely = [(token, logprob)] if logprob > -1 else [(90 + token, -0.3)]
    return [(token, logprob), *likely, (70, -4.0)]


def check(found: Rollouts, prompts: bool = True, device: str = "cpu") -> None:
    tokens = [t for k, j in FLAT for t in RESPONSES[k][j][0]]
    assert found.token_ids.dtype == found.cu_seqlens.dtype == torch.int64
    assert found.token_ids.tolist() == tokens
    assert found.cu_seqlens.tolist() == [0, 3, 4, 4, 9]
    assert found.old_logprobs.dtype == torch.float32 and found.old_logprobs.device.type == device
    expected = torch.tensor([x for k, j in FLAT for x in RESPONSES[k][j][1]], dtype=torch.float32)
    assert torch.equal(found.old_logprobs, expected)
    assert found.mask.dtype == torch.bool and bool(found.mask.all()) and found.mask.shape == (9,)
    assert found.finish_reasons == ("stop", "length", "abort", "length")
    if prompts:
        assert found.prompt_ids is not None and found.prompt_cu_seqlens is not None and found.group_ids is not None
        assert found.prompt_ids.tolist() == [5, 6, 7, 5, 6, 7, 8, 9, 8, 9]
        assert found.prompt_cu_seqlens.tolist() == [0, 3, 6, 8, 10]
        assert found.group_ids.tolist() == [0, 0, 1, 1]
    else:
        assert found.prompt_ids is found.prompt_cu_seqlens is found.group_ids is None


# --- vLLM, offline ----------------------------------------------------------------------------------------------------


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class FlatLogprobs:
    """As of vLLM 0.11 to 0.32, with `SamplingParams(flat_logprobs=True)`: lists for all positions, dicts on access."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def append_fast(self, slots: Sequence[tuple[int, float]]) -> None:
        self.start_indices.append(len(self.logprobs))
        self.token_ids += [token for token, _ in slots]
        self.logprobs += [x for _, x in slots]
        self.end_indices.append(len(self.logprobs))

    def __len__(self) -> int:
        return len(self.start_indices)

    def __getitem__(self, i: int) -> dict[int, Logprob]:
        return {self.token_ids[j]: Logprob(self.logprobs[j]) for j in range(self.start_indices[i], self.end_indices[i])}

    def __iter__(self) -> Iterator[dict[int, Logprob]]:
        return (self[i] for i in range(len(self)))


class ColumnLogprobs:
    """A container with the fields of FlatLogprobs that builds a new list at each read of one."""

    def __init__(self, flat: FlatLogprobs) -> None:
        self.flat, self.reads = flat, 0

    def __len__(self) -> int:
        return len(self.flat)

    def __getattr__(self, name: str) -> list[Any]:
        if name not in ("start_indices", "end_indices", "token_ids", "logprobs"):
            raise AttributeError(name)
        self.reads += 1
        return list(getattr(self.flat, name))


def as_dicts(token_ids: Sequence[int], logprobs: Sequence[float]) -> Any:
    return [
        {token: Logprob(x, rank, ".") for rank, (token, x) in enumerate(top(*pair))}
        for pair in zip(token_ids, logprobs, strict=True)
    ]


def as_flat(token_ids: Sequence[int], logprobs: Sequence[float]) -> Any:
    flat = FlatLogprobs()
    for pair in zip(token_ids, logprobs, strict=True):
        flat.append_fast(top(*pair))
    return flat


def as_columns(token_ids: Sequence[int], logprobs: Sequence[float]) -> Any:
    return ColumnLogprobs(as_flat(token_ids, logprobs))


def request_outputs(container: Callable[..., Any] = as_dicts) -> list[RequestOutput]:
    return [
        RequestOutput(
            str(k),
            None,
            list(prompt),
            None,
            [
                CompletionOutput(j, "..", tuple(tokens), sum(logprobs, 0.0), container(tokens, logprobs), REASONS[k][j])
                for j, (tokens, logprobs) in enumerate(RESPONSES[k])
            ],
            True,
        )
        for k, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("container", [as_dicts, as_flat, as_columns])
def test_request_outputs(container: Callable[..., Any]) -> None:
    check(from_vllm(request_outputs(container)))
    check(from_vllm(iter(request_outputs(container)), prompt_ids=PROMPTS))


def test_columns_are_asked_for_once() -> None:
    """Building a list of all positions for every position would be quadratic."""
    outputs = request_outputs(as_columns)
    from_vllm(outputs)
    assert all(completion.logprobs.reads <= 4 for output in outputs for completion in output.outputs)


def test_one_request_output_and_its_json() -> None:
    """In JSON, token ids that are keys become strings."""
    one = request_outputs()[0]
    found = from_vllm(one)
    assert found.cu_seqlens.tolist() == [0, 3, 4] and found.group_ids is not None and found.group_ids.tolist() == [0, 0]
    read = from_vllm(json.loads(json.dumps(one, default=vars)))
    assert torch.equal(read.old_logprobs, found.old_logprobs) and torch.equal(read.token_ids, found.token_ids)


def test_no_prompt_ids_no_groups() -> None:
    outputs = request_outputs()
    for output in outputs:
        output.prompt_token_ids = None
    check(from_vllm(outputs), prompts=False)
    check(from_vllm(outputs, prompt_ids=PROMPTS))


def test_equal_prompts_are_one_group_wherever_they_stand() -> None:
    """As SGLang recommends and TRL does, a prompt is sent n times, not once with n."""
    first, second = request_outputs()
    again = request_outputs()[0]
    found = from_vllm([first, second, again])
    assert found.group_ids is not None and found.group_ids.tolist() == [0, 0, 1, 1, 0, 0]
    advantages = group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), group_ids=found.group_ids)
    assert advantages[0] > 0 > advantages[5] and advantages[2] == 0


def test_nothing() -> None:
    for found in (from_vllm([]), from_sglang([])):
        assert found.token_ids.shape == found.old_logprobs.shape == (0,) and found.cu_seqlens.tolist() == [0]
        assert found.with_prompts().cu_seqlens.tolist() == [0]


# --- vLLM, server -----------------------------------------------------------------------------------------------------


def named(token: int, as_id: bool) -> str:
    return f"token_id:{token}" if as_id else "word"


def usage(k: int) -> dict[str, int]:
    return {"prompt_tokens": len(PROMPTS[k]), "completion_tokens": sum(len(tokens) for tokens, _ in RESPONSES[k])}


def from_recorded(name: str, k: int, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A response that vLLM's server sent, with other choices: their further fields are those that it had."""
    response = recorded.load(name)["outputs"][0]
    first = response["choices"][0]
    numbered = [
        first | {"index": j, "finish_reason": REASONS[k][j], "stop_reason": None} | choice
        for j, choice in enumerate(choices)
    ]
    return response | {"choices": numbered, "usage": usage(k)} | fields


def completion_json(k: int, ids: bool = True, as_ids: bool = False) -> dict[str, Any]:
    """POST /v1/completions with logprobs=0, n=2."""
    choices = [
        {
            "logprobs": {
                "text_offset": [0] * len(tokens),
                "token_logprobs": list(logprobs),
                "tokens": [named(t, as_ids) for t in tokens],
                "top_logprobs": [{named(t, as_ids): x} for t, x in zip(tokens, logprobs, strict=True)],
            },
            "token_ids": list(tokens) if ids else None,
            "prompt_token_ids": PROMPTS[k] if ids else None,
        }
        for tokens, logprobs in RESPONSES[k]
    ]
    return from_recorded("server_completions", k, choices)


def chat_json(k: int, ids: bool = True, as_ids: bool = False) -> dict[str, Any]:
    """POST /v1/chat/completions with logprobs=true, n=2."""
    choices = [
        {
            "logprobs": {
                "content": [
                    {"token": named(t, as_ids), "logprob": x, "bytes": [46], "top_logprobs": []}
                    for t, x in zip(tokens, logprobs, strict=True)
                ]
            },
            "token_ids": list(tokens) if ids else None,
        }
        for tokens, logprobs in RESPONSES[k]
    ]
    return from_recorded("server_chat", k, choices, prompt_token_ids=PROMPTS[k] if ids else None)


def generated_json(k: int, ids: bool = True) -> dict[str, Any]:
    """POST /inference/v1/generate with logprobs=0, n=2."""
    choices = [
        {
            "logprobs": {
                "content": [
                    {"token_id": t, "logprob": x, "rank": 1, "top_logprobs": []}
                    for t, x in zip(tokens, logprobs, strict=True)
                ]
            },
            "token_ids": list(tokens),
            "weight_versions": [{"version": "default", "start": 0, "end": len(tokens)}] if tokens else [],
        }
        for tokens, logprobs in RESPONSES[k]
    ]
    return from_recorded("server_generate", k, choices, prompt_token_ids=PROMPTS[k] if ids else None)


def as_objects(value: Any) -> Any:
    """As the OpenAI client returns it: unknown fields are attributes, too."""
    if isinstance(value, dict):
        return SimpleNamespace(**{name: as_objects(x) for name, x in value.items()})
    return [as_objects(x) for x in value] if isinstance(value, list) else value


@pytest.mark.parametrize("response", [completion_json, chat_json])
@pytest.mark.parametrize("read", [lambda x: json.loads(json.dumps(x)), as_objects], ids=["json", "objects"])
def test_server_responses(response: Callable[..., Any], read: Callable[[Any], Any]) -> None:
    check(from_vllm([read(response(k)) for k in range(2)]))
    check(from_vllm([read(response(k, ids=False, as_ids=True)) for k in range(2)]), prompts=False)
    check(from_vllm([read(response(k, as_ids=True)) for k in range(2)], prompt_ids=PROMPTS))


def test_the_generate_endpoint() -> None:
    check(from_vllm([generated_json(k) for k in range(2)]))
    check(from_vllm([generated_json(k, ids=False) for k in range(2)]), prompts=False)
    check(from_vllm([generated_json(k, ids=False) for k in range(2)], prompt_ids=PROMPTS))


# --- SGLang -----------------------------------------------------------------------------------------------------------


def generate_json(k: int, j: int, inputs: bool = False, output_ids: bool = True) -> dict[str, Any]:
    """One output of POST /generate with return_logprob=true; `inputs`: with logprob_start_len=0."""
    tokens, logprobs = RESPONSES[k][j]
    prompt: list[Any] = [(None, PROMPTS[k][0], None), *((-1.0, t, None) for t in PROMPTS[k][1:])]
    reason = {"type": REASONS[k][j], "matched": 0} if REASONS[k][j] == "stop" else {"type": REASONS[k][j], "length": 1}
    return {
        "text": "..",
        **({"output_ids": list(tokens)} if output_ids else {}),
        "meta_info": {
            "id": "a",
            "finish_reason": reason,
            "prompt_tokens": len(PROMPTS[k]),
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "input_token_logprobs": prompt if inputs else [],
            "output_token_logprobs": [(x, t, None) for t, x in zip(tokens, logprobs, strict=True)],
        },
    }


@pytest.mark.parametrize("output_ids", [True, False])
def test_generate(output_ids: bool) -> None:
    by_prompt = [prompt for prompt in PROMPTS for _ in range(2)]
    outputs = [generate_json(k, j, output_ids=output_ids) for k, j in FLAT]
    check(from_sglang(outputs), prompts=False)
    check(from_sglang(outputs, prompt_ids=by_prompt))
    read = json.loads(json.dumps([generate_json(k, j, inputs=True, output_ids=output_ids) for k, j in FLAT]))
    check(from_sglang(read))
    assert from_sglang(outputs[0]).cu_seqlens.tolist() == [0, 3]


def test_a_part_of_the_prompt_is_not_the_prompt() -> None:
    """With logprob_start_len > 0 fewer prompt tokens are returned."""
    output = generate_json(0, 0, inputs=True)
    del output["meta_info"]["input_token_logprobs"][0]
    assert from_sglang(output).prompt_ids is None


def test_a_chat_with_meta_info() -> None:
    responses = [
        {
            "object": "chat.completion",
            "choices": [{"index": j, "message": {}, **generate_json(k, j, output_ids=False)} for j in range(2)],
        }
        for k in range(2)
    ]
    check(from_sglang(responses), prompts=False)
    check(from_sglang(responses, prompt_ids=PROMPTS))


# --- values that are none ---------------------------------------------------------------------------------------------

ABSENT = [None, math.nan, -math.inf, -9999.0, -999999999.0, float(torch.finfo(torch.float32).min)]


def with_value(engine: str, value: Any) -> tuple[Callable[..., Rollouts], Any]:
    """An output whose second token of the first response has `value` as its log-probability."""
    if engine == "vllm":
        outputs = request_outputs()
        outputs[0].outputs[0].logprobs[1][3] = Logprob(value)
        outputs[0].outputs[0].cumulative_logprob = None
        return from_vllm, outputs
    if engine == "flat":
        outputs = request_outputs(as_flat)
        flat = outputs[0].outputs[0].logprobs
        flat.logprobs[flat.start_indices[1]] = value
        outputs[0].outputs[0].cumulative_logprob = None
        return from_vllm, outputs
    if engine == "server":
        response = completion_json(0)
        response["choices"][0]["logprobs"]["token_logprobs"][1] = value
        return from_vllm, [response, completion_json(1)]
    generated = [generate_json(k, j) for k, j in FLAT]
    generated[0]["meta_info"]["output_token_logprobs"][1] = (value, 3, None)
    return from_sglang, generated


@pytest.mark.parametrize("engine", ["vllm", "flat", "server", "sglang"])
@pytest.mark.parametrize("value", ABSENT, ids=str)
def test_an_absent_log_probability_is_refused_or_masked(engine: str, value: Any) -> None:
    convert, outputs = with_value(engine, value)
    with pytest.raises(ValueError) as error:
        convert(outputs)
    check_message(error.value, "outputs[0]", "none" if value is None or value != value else f"{value:g}")
    assert "token 1 (id 3)" in str(error.value) and 'missing="mask"' in str(error.value)
    found = convert(outputs, missing="mask")
    assert found.mask.tolist() == [True, False] + [True] * 7
    assert bool(found.old_logprobs[1].isnan()) and bool(found.old_logprobs[found.mask].isfinite().all())


@pytest.mark.parametrize("engine", ["vllm", "flat", "server", "sglang"])
def test_logits_are_refused(engine: str) -> None:
    """vLLM's logprobs_mode raw_logits and processed_logits return logits under the same name; refused in every mode."""
    for missing in ("refuse", "mask"):
        convert, outputs = with_value(engine, 17.25)
        with pytest.raises(ValueError) as error:
            convert(outputs, missing=missing)
        check_message(error.value, "outputs[0]", "17.25")
        assert "logprobs_mode" in str(error.value)


def test_a_probability_of_one_may_be_rounded_up() -> None:
    convert, outputs = with_value("sglang", 1.1920929e-07)
    assert float(convert(outputs).old_logprobs[1]) == pytest.approx(1.1920929e-07)


@pytest.mark.parametrize("container", [as_dicts, as_flat])
def test_the_sampled_token_is_not_among_those_of_its_position(container: Callable[..., Any]) -> None:
    outputs = request_outputs(container)
    outputs[0].outputs[0].token_ids = (3, 44, 0)
    with pytest.raises(ValueError, match=r"outputs\[0\]\.outputs\[0\].*token 1 \(id 44\).*none"):
        from_vllm(outputs)


# --- refusals ---------------------------------------------------------------------------------------------------------


def changed(of: Any, path: str, value: Any) -> Any:
    """`of` with another value at a path such as "0.outputs.1.logprobs"; ... removes it."""
    *before, last = path.split(".")
    target = of
    for name in before:
        target = (
            target[int(name)] if name.isdigit() else target[name] if isinstance(target, dict) else getattr(target, name)
        )
    if value is ...:
        del target[last]
    elif isinstance(target, dict):
        target[last] = value
    elif isinstance(target, list):
        target[int(last)] = value
    else:
        setattr(target, last, value)
    return of


def vllm_json(response: Callable[..., Any], **options: Any) -> list[Any]:
    return [response(k, **options) for k in range(2)]


def generated() -> list[Any]:
    return [generate_json(k, j) for k, j in FLAT]


OUTPUT_LOGPROBS = "3.meta_info.output_token_logprobs"
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str, str]] = {
    "not requested": (
        lambda: from_vllm(changed(request_outputs(), "1.outputs.1.logprobs", None)),
        ValueError, "outputs[1].outputs[1].logprobs", "None",
    ),
    "fewer than tokens": (
        lambda: from_vllm(changed(request_outputs(), "0.outputs.1.logprobs", [])),
        ValueError, "outputs[0].outputs[1].logprobs", "got 0",
    ),
    "flat, more than tokens": (
        lambda: from_vllm(changed(request_outputs(as_flat), "0.outputs.1.logprobs", as_flat([4, 4], [-1, -1]))),
        ValueError, "outputs[0].outputs[1].logprobs", "got 2",
    ),
    "not finished": (
        lambda: from_vllm(changed(request_outputs(), "0.finished", False)), ValueError, "outputs[0].finished", "False",
    ),
    "plain numbers": (
        lambda: from_vllm(changed(request_outputs(), "0.outputs.1.logprobs", [-1.0])),
        TypeError, "outputs[0].outputs[1].logprobs[0]", "float",
    ),
    "no token ids": (
        lambda: from_vllm(changed(request_outputs(), "0.outputs.0.token_ids", None)),
        TypeError, "outputs[0].outputs[0].token_ids", "None",
    ),
    "a pooling output": (
        lambda: from_vllm([SimpleNamespace(outputs=SimpleNamespace(data=torch.zeros(3)))]),
        TypeError, "outputs[0]", "SimpleNamespace",
    ),
    "a text": (lambda: from_vllm("text"), TypeError, "outputs", "str"),
    "another engine's": (lambda: from_vllm(generated()), TypeError, "outputs[0]", "meta_info"),
    "prompts of some": (
        lambda: from_vllm(changed(request_outputs(), "1.prompt_token_ids", None)),
        ValueError, "outputs[1].outputs[0]", "none",
    ),
    "too few prompts": (lambda: from_vllm(request_outputs(), prompt_ids=[[5]]), ValueError, "prompt_ids", "got 1"),
    "another prompt": (
        lambda: from_vllm(request_outputs(), prompt_ids=PROMPTS[::-1]), ValueError, "prompt_ids", "another",
    ),
    "a prompt as text": (
        lambda: from_vllm(request_outputs(), prompt_ids=["a", "b"]),  # type: ignore[list-item]
        TypeError, "prompt_ids[0]", "str",
    ),
    "missing": (lambda: from_vllm(request_outputs(), missing="zero"), ValueError, "missing", "zero"),
    "server: not requested": (
        lambda: from_vllm(changed(vllm_json(completion_json), "0.choices.1.logprobs", None)),
        ValueError, "outputs[0].choices[1].logprobs", "None",
    ),
    "chat: not requested": (
        lambda: from_vllm(changed(vllm_json(chat_json), "0.choices.1.logprobs", {"content": None})),
        ValueError, "outputs[0].choices[1].logprobs", "content",
    ),
    "server: text alone": (
        lambda: from_vllm(vllm_json(completion_json, ids=False)),
        ValueError, "outputs[0].choices[0].token_ids", "return_token_ids",
    ),
    "chat: text alone": (
        lambda: from_vllm(vllm_json(chat_json, ids=False)),
        ValueError, "outputs[0].choices[0].token_ids", "return_token_ids",
    ),
    "server: echo": (
        lambda: from_vllm(
            changed(vllm_json(completion_json), "0.choices.1.logprobs.token_logprobs", [None, -1.0, -1.0, -7.5])
        ),
        ValueError, "outputs[0].choices[1].logprobs.token_logprobs", "None",
    ),
    "server: more than tokens": (
        lambda: from_vllm(changed(vllm_json(completion_json), "0.choices.1.token_ids", [4, 0])),
        ValueError, "outputs[0].choices[1].logprobs", "got 1",
    ),
    "server: a part of a stream": (
        lambda: from_vllm(changed(vllm_json(completion_json), "0.choices.0.finish_reason", None)),
        ValueError, "outputs[0].choices[0].finish_reason", "None",
    ),
    "chat: a chunk": (
        lambda: from_vllm(changed(vllm_json(chat_json), "0.object", "chat.completion.chunk")),
        ValueError, "outputs[0].object", "chunk",
    ),
    "sglang: not requested": (
        lambda: from_sglang(changed(generated(), OUTPUT_LOGPROBS, ...)),
        ValueError, "outputs[3].meta_info.output_token_logprobs", "return_logprob",
    ),
    "sglang: one fewer than completion_tokens": (
        lambda: from_sglang(changed(generated(), "3.meta_info.completion_tokens", 6)),
        ValueError, "outputs[3].meta_info.output_token_logprobs", "got 5",
    ),
    "sglang: one fewer than output_ids": (
        lambda: from_sglang(
            changed(changed(generated(), "3.output_ids", [1] * 6), "3.meta_info.completion_tokens", ...)
        ),
        ValueError, "outputs[3].meta_info.output_token_logprobs", "got 5",
    ),
    "sglang: shifted by one": (
        lambda: from_sglang(changed(generated(), "3.output_ids", [11, 2, 11, 2, 0])),
        ValueError, "outputs[3].output_ids", "others",
    ),
    "sglang: a part of a stream": (
        lambda: from_sglang(changed(generated(), "0.meta_info.finish_reason", None)),
        ValueError, "outputs[0].meta_info.finish_reason", "None",
    ),
    "sglang: OpenAI without meta_info": (
        lambda: from_sglang(vllm_json(chat_json)), ValueError, "outputs[0].choices[0].meta_info", "logprobs",
    ),
    "a number for all log-probabilities": (
        lambda: from_vllm(changed(request_outputs(), "0.outputs.1.logprobs", -1.0)),
        TypeError, "outputs[0].outputs[1].logprobs", "-1.0",
    ),
    "server: choices": (
        lambda: from_vllm(changed(vllm_json(completion_json), "0.choices", 3)), TypeError, "outputs[0].choices", "int",
    ),
    "server: a number for all log-probabilities": (
        lambda: from_vllm(changed(vllm_json(completion_json), "0.choices.1.logprobs.token_logprobs", -1.0)),
        TypeError, "outputs[0].choices[1].logprobs.token_logprobs", "float",
    ),
    "sglang: a row of one": (
        lambda: from_sglang(changed(generated(), f"{OUTPUT_LOGPROBS}.2", (-0.5,))),
        TypeError, "outputs[3].meta_info.output_token_logprobs[2]", "(-0.5,)",
    ),
    "sglang: no row": (
        lambda: from_sglang(changed(generated(), f"{OUTPUT_LOGPROBS}.2", -0.5)),
        TypeError, "outputs[3].meta_info.output_token_logprobs[2]", "-0.5",
    ),
    "sglang: a number for all rows": (
        lambda: from_sglang(changed(generated(), OUTPUT_LOGPROBS, -0.5)),
        TypeError, "outputs[3].meta_info.output_token_logprobs", "float",
    ),
    "sglang: a count as text": (
        lambda: from_sglang(changed(generated(), "3.meta_info.completion_tokens", "x")),
        TypeError, "outputs[3].meta_info.completion_tokens", "'x'",
    ),
    "sglang: another engine's": (
        lambda: from_sglang(request_outputs()), ValueError, "outputs[0].meta_info", "RequestOutput",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    call, kind, argument, came = REFUSED[case]
    with pytest.raises(kind) as error:
        call()
    check_message(error.value, argument, came)


NO_TOKENS = [3.7, True, -1, 2**63, "3", None, np.float32(3), np.True_, torch.tensor(3)]


@pytest.mark.parametrize("value", NO_TOKENS, ids=repr)
def test_what_is_no_token_is_refused_where_it_stands(value: Any) -> None:
    """Token ids are never cast, whether of responses or of prompts, given or returned."""
    outputs = request_outputs()
    outputs[0].outputs[0].token_ids = [3, value, 0]
    prompted = changed(request_outputs(), "0.prompt_token_ids", [5, value, 7])
    server = changed(vllm_json(completion_json), "0.choices.0.token_ids.1", value)
    rows = changed(generated(), OUTPUT_LOGPROBS + ".1", (-0.5, value, None))
    inputs = [generate_json(k, j, inputs=True) for k, j in FLAT]
    changed(inputs, "0.meta_info.input_token_logprobs.1", (-0.5, value, None))
    for call, name in (
        (lambda: from_vllm(outputs), "outputs[0].outputs[0].token_ids[1]"),
        (lambda: from_vllm(prompted), "outputs[0].prompt_token_ids[1]"),
        (lambda: from_vllm(request_outputs(), prompt_ids=[[5, value], [8]]), "prompt_ids[0][1]"),
        (lambda: from_vllm(server), "outputs[0].choices[0].token_ids[1]"),
        (lambda: from_sglang(rows), "outputs[3].meta_info.output_token_logprobs[1][1]"),
        (lambda: from_sglang(inputs), "outputs[0].meta_info.input_token_logprobs[1][1]"),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert str(error.value).startswith(f"{name}: expected a token id")


@pytest.mark.parametrize(
    "value", [torch.tensor(-0.5).bfloat16(), torch.tensor(-0.5).half(), np.float16(-0.5), "-0.5", True], ids=repr
)
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("vllm", "outputs[0].outputs[0].logprobs[1]"), ("flat", "outputs[0].outputs[0].logprobs[1]"),
        ("server", "outputs[0].choices[0].logprobs.token_logprobs[1]"),
        ("sglang", "outputs[0].meta_info.output_token_logprobs[1][0]"),
    ],
)  # fmt: skip
def test_log_probabilities_of_other_dtypes_are_refused_where_they_stand(engine: str, name: str, value: Any) -> None:
    convert, outputs = with_value(engine, value)
    with pytest.raises(TypeError) as error:
        convert(outputs)
    assert str(error.value).startswith(f"{name}: expected ")


@pytest.mark.parametrize("value", [np.float32(-0.5), np.float64(-0.5), torch.tensor(-0.5), -1], ids=repr)
def test_log_probabilities_may_be_numbers_of_numpy_and_torch(value: Any) -> None:
    convert, outputs = with_value("vllm", value)
    assert float(convert(outputs).old_logprobs[1]) == float(value)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda x: array("q", x), lambda x: [np.int32(t) for t in x]])
def test_token_ids_may_be_arrays_of_integers(kind: Callable[[list[int]], Any]) -> None:
    outputs = request_outputs()
    for k, j in FLAT:
        if RESPONSES[k][j][0]:
            outputs[k].outputs[j].token_ids = kind(RESPONSES[k][j][0])
    check(from_vllm(outputs))


# --- on to the losses -------------------------------------------------------------------------------------------------


def test_with_prompts() -> None:
    found = from_vllm(request_outputs()).with_prompts()
    assert found.cu_seqlens.tolist() == [0, 6, 10, 12, 19]
    assert found.input_ids.tolist() == [5, 6, 7, 3, 3, 0, 5, 6, 7, 4, 8, 9, 8, 9, 2, 11, 2, 11, 2]
    predicted = [(t, int(found.token_ids[t])) for t in found.mask.nonzero()[:, 0].tolist()]
    assert predicted == [(2, 3), (3, 3), (4, 0), (8, 4), (13, 2), (14, 11), (15, 2), (16, 11), (17, 2)]
    assert torch.equal(found.old_logprobs[found.mask], from_vllm(request_outputs()).old_logprobs)
    assert bool(found.old_logprobs[~found.mask].isnan().all())


def test_with_prompts_keeps_the_mask() -> None:
    convert, outputs = with_value("vllm", None)
    found = convert(outputs, missing="mask").with_prompts()
    assert found.mask.nonzero()[:, 0].tolist() == [2, 4, 8, 13, 14, 15, 16, 17]


def test_with_prompts_needs_them() -> None:
    with pytest.raises(ValueError) as error:
        from_sglang(generated()).with_prompts()
    check_message(error.value, "prompt_ids", "None")
    outputs = generated()
    for output in outputs:
        del output["meta_info"]["prompt_tokens"]
    with pytest.raises(ValueError, match=r"prompt_ids.*at least one token"):
        from_sglang(outputs, prompt_ids=[[1], [], [1], [1]]).with_prompts()
    empty = from_sglang(outputs, prompt_ids=[[1], [1], [], [1]])  # the third response is empty
    assert empty.with_prompts().cu_seqlens.tolist() == [0, 4, 6, 6, 12]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_an_engine_samples_has_ratio_one(engine: str, temperature: float) -> None:
    """An engine samples from a table of logits at a temperature: for the loss all ratios are 1."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(12, 12, generator=generator) * 2
    logp = (table / temperature).log_softmax(-1)
    outputs: list[Any] = []
    for k in range(6):
        prompt, tokens, logprobs = [k, 2 * k % 12], [], []
        last = prompt[-1]
        for _ in range(1 + 3 * k):
            token = int(torch.multinomial(logp[last].exp(), 1, generator=generator))
            tokens.append(token)
            logprobs.append(float(logp[last, token]))
            last = token
        if engine == "vllm":
            completion = CompletionOutput(0, "", tokens, None, as_dicts(tokens, logprobs), "length")
            outputs.append(RequestOutput(str(k), None, prompt, None, [completion], True))
        else:
            rows = [(x, t, None) for t, x in zip(tokens, logprobs, strict=True)]
            meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": rows, "completion_tokens": len(rows)}
            outputs.append({"meta_info": meta})
    if engine == "vllm":
        rollouts = from_vllm(outputs)
    else:
        rollouts = from_sglang(outputs, prompt_ids=[[k, 2 * k % 12] for k in range(6)])
    batch = rollouts.with_prompts()
    token_ids, old_logprobs, mask, cu_seqlens = batch.token_ids, batch.old_logprobs, batch.mask, batch.cu_seqlens
    logits = table[batch.input_ids].requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    loss, stats = gspo_loss(
        logits, token_ids, advantages, old_logprobs, mask=mask, cu_seqlens=cu_seqlens, temperature=temperature
    )
    loss.backward()
    assert bool(loss.isfinite()) and logits.grad is not None and bool(logits.grad.isfinite().all())
    assert float(stats.num_tokens) == sum(1 + 3 * k for k in range(6)) and float(stats.clip_fraction) == 0.0
    assert float(stats.ratio_min) == pytest.approx(1, abs=1e-6) == float(stats.ratio_max)
    mismatch = rollout_mismatch(stats.logprobs, old_logprobs, advantages, mask=mask, cu_seqlens=cu_seqlens)
    assert abs(float(mismatch.kl_k1)) < 1e-6 and float(mismatch.flip_fraction) == 0.0
    if temperature != 1.0:  # what forgetting it would do
        _, wrong = gspo_loss(logits, token_ids, advantages, old_logprobs, mask=mask, cu_seqlens=cu_seqlens)
        assert abs(float(wrong.ratio_mean) - 1) > 0.01


def test_no_engine_is_imported() -> None:
    code = (
        "import sys, gspo_kernels; print([x for x in sys.modules if x.split('.')[0] in ('vllm', 'sglang', 'openai')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
