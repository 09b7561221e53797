"""The last part of a stream is refused, and no whole response is: vLLM's output kinds and its server's chunks.

The fields are those of `vllm/v1/engine/output_processor.py` and of the servers' `completion_stream_generator`,
`chat_completion_stream_generator` and `generate_stream_generator`, 0.32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from modes import DEFAULT_MODE
from test_engines import (
    CompletionOutput,
    RequestOutput,
    as_columns,
    as_dicts,
    as_flat,
    as_objects,
    chat_json,
    check,
    completion_json,
    generate_json,
    named,
    request_outputs,
)
from test_errors import check_message

from gspo_kernels import from_sglang, from_vllm

pytestmark = DEFAULT_MODE

TOKENS, LOGPROBS = [3, 3, 0, 7], [-0.5, -1.25, -0.01, -2.0]


def delta(last: int, container: Callable[..., Any] = as_dicts, cumulative: float | None = sum(LOGPROBS)) -> Any:
    """The last part of a DELTA stream of four tokens, with its last `last` ones."""
    tokens, logprobs = TOKENS[len(TOKENS) - last :], LOGPROBS[len(TOKENS) - last :]
    completion = CompletionOutput(0, "..", tokens, cumulative, container(tokens, logprobs), "length")
    return RequestOutput("0", None, [5, 6], None, [completion], True)


@pytest.mark.parametrize("container", [as_dicts, as_flat, as_columns])
@pytest.mark.parametrize("last", [0, 1, 3])
def test_the_last_part_of_a_delta_stream_is_refused(last: int, container: Callable[..., Any]) -> None:
    """Also one without tokens, as an abort sends it."""
    with pytest.raises(ValueError) as error:
        from_vllm([delta(4, container), delta(last, container)])
    check_message(error.value, "outputs[1].outputs[0].cumulative_logprob", "-3.76")
    assert "RequestOutputKind.FINAL_ONLY" in str(error.value) and "CUMULATIVE" in str(error.value)


def test_the_last_part_is_refused_by_its_weight_versions() -> None:
    """Greedy samples may have log-probabilities of 0."""
    part = delta(1, cumulative=None)
    assert from_vllm(part).token_ids.tolist() == [7], "nothing tells"
    part.outputs[0].weight_versions = [{"version": "1", "start": 0, "end": 4}]
    with pytest.raises(
        ValueError, match=r"outputs\[0\]\.outputs\[0\]\.weight_versions: .*got spans of 4: the last part"
    ):
        from_vllm(part)


def test_the_last_part_is_refused_by_its_routed_experts() -> None:
    part = delta(1, cumulative=None)
    part.outputs[0].routed_experts = [[[0, 1]]] * 5
    with pytest.raises(
        ValueError, match=r"outputs\[0\]\.outputs\[0\]\.routed_experts: .*got 5: the last part of a str"
    ):
        from_vllm(part)


@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_the_sum_may_be_of_any_type(number: Any) -> None:
    assert len(from_vllm(delta(4, cumulative=number(sum(LOGPROBS)))).token_ids) == 4
    with pytest.raises(ValueError, match="cumulative_logprob"):
        from_vllm(delta(3, cumulative=number(sum(LOGPROBS))))


def test_responses_that_have_not_ended_are_refused() -> None:
    """By their reason, where the outputs do not say whether they are finished."""
    output = request_outputs()[1]
    output.outputs[1].finish_reason, output.finished = None, None  # type: ignore[assignment]
    with pytest.raises(ValueError) as error:
        from_vllm(output)
    check_message(error.value, "outputs[0].outputs[1].finish_reason", "None")
    running = generate_json(1, 1)
    running["meta_info"]["finish_reason"] = {}
    with pytest.raises(ValueError) as error:
        from_sglang(running)
    check_message(error.value, "outputs[0].meta_info.finish_reason", "None")


def test_whole_responses_are_not_refused() -> None:
    """Sums without the engine's, of minus infinity, rounded to float32; responses without tokens."""
    outputs = request_outputs()
    for output in outputs:
        for completion in output.outputs:
            completion.cumulative_logprob = None
    check(from_vllm(outputs))
    for output in outputs:
        for completion in output.outputs:
            del completion.cumulative_logprob  # older versions, and JSON that leaves it out
    check(from_vllm(outputs))

    long = [-1.0 - 1e-3 * (i % 7) for i in range(4000)]
    total = float(np.add.accumulate(np.array(long, np.float32))[-1])
    assert abs(total - sum(long)) > 1e-2
    completion = CompletionOutput(0, "", [3] * 4000, total, as_flat([3] * 4000, long), "length")
    assert len(from_vllm(RequestOutput("0", None, [5], None, [completion], True)).token_ids) == 4000

    none = CompletionOutput(0, "", [3, 4], float("-inf"), as_dicts([3, 4], [-1.0, float("-inf")]), "length")
    assert from_vllm(RequestOutput("0", None, [5], None, [none], True), missing="mask").mask.tolist() == [True, False]


# --- the server -------------------------------------------------------------------------------------------------------


def completion_chunk(last: int, usage: bool) -> dict[str, Any]:
    """The last chunk of /v1/completions; `usage`: with stream_options.continuous_usage_stats."""
    tokens, logprobs = TOKENS[-last:], LOGPROBS[-last:]
    chunk: dict[str, Any] = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "text": "..",
                "logprobs": {
                    "text_offset": [3 * (len(TOKENS) - last + i) for i in range(last)],
                    "token_logprobs": logprobs,
                    "tokens": [named(t, True) for t in tokens],
                    "top_logprobs": [{named(t, True): x} for t, x in zip(tokens, logprobs, strict=True)],
                },
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_token_ids": None,
                "token_ids": tokens,
            }
        ],
    }
    return chunk | ({"usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}} if usage else {})


def generate_chunk(last: int, usage: bool) -> dict[str, Any]:
    """The last chunk of /inference/v1/generate, which states each field."""
    chunk = completion_chunk(last, usage)
    for name in ("id", "object", "created", "model"):
        del chunk[name]
    tokens, logprobs = TOKENS[-last:], LOGPROBS[-last:]
    rows = [{"token_id": t, "logprob": x, "rank": 1, "top_logprobs": []} for t, x in zip(tokens, logprobs, strict=True)]
    chunk["choices"][0]["logprobs"] = {"content": rows}
    return {"request_id": "a", "usage": None, "output_mode": "tokens"} | chunk


def chat_chunk(last: int, usage: bool) -> dict[str, Any]:
    chunk = generate_chunk(last, usage) | {"object": "chat.completion.chunk"}
    chunk["choices"][0]["delta"] = {"content": ".."}
    return chunk


@pytest.mark.parametrize("read", [lambda x: json.loads(json.dumps(x)), as_objects], ids=["json", "objects"])
@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("chunk", [completion_chunk, generate_chunk, chat_chunk])
def test_the_last_chunk_of_a_servers_stream_is_refused(chunk: Any, usage: bool, read: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError) as error:
        from_vllm(read(chunk(1, usage)), prompt_ids=[[5, 6]])
    assert str(error.value).startswith("outputs[0].") and "stream=false" in str(error.value)


def test_a_chunk_is_refused_by_its_text_offset() -> None:
    """Also where its reader has added up the usage."""
    chunk = completion_chunk(1, True)
    chunk["usage"]["completion_tokens"] = 1
    with pytest.raises(ValueError) as error:
        from_vllm(chunk)
    check_message(error.value, "outputs[0].choices[0].logprobs.text_offset[0]", "9")


def test_a_removed_choice_is_named() -> None:
    response = completion_json(0)
    del response["choices"][0]
    with pytest.raises(ValueError) as error:
        from_vllm(response)
    check_message(error.value, "outputs[0].usage.completion_tokens", "4")
    assert "If choices were removed" in str(error.value)


def test_whole_responses_of_a_server_are_not_refused() -> None:
    """A stream of one chunk has all; /inference/v1/generate of older versions has no usage."""
    assert from_vllm(completion_chunk(4, True)).token_ids.tolist() == TOKENS
    responses = [chat_json(k) for k in range(2)]
    for response in responses:
        del response["usage"], response["object"]
    check(from_vllm(responses))


def test_the_last_chunk_of_sglangs_stream_is_refused() -> None:
    """With --incremental-streaming-output its arrays are cut, its count is not."""
    chunk = generate_json(1, 1)
    chunk["output_ids"] = chunk["output_ids"][-2:]
    chunk["meta_info"]["output_token_logprobs"] = chunk["meta_info"]["output_token_logprobs"][-2:]
    with pytest.raises(ValueError) as error:
        from_sglang(chunk)
    check_message(error.value, "outputs[0].meta_info.output_token_logprobs", "2")
