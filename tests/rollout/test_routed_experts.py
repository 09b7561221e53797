"""`routed_experts`: decoded from what vLLM and SGLang return, and placed beside the tokens that the routers read."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modes import DEFAULT_MODE
from test_engines import (
    FLAT,
    PROMPTS,
    RESPONSES,
    as_objects,
    chat_json,
    completion_json,
    generate_json,
    request_outputs,
)
from test_errors import check_message
from torch import Tensor

from gspo_kernels import from_sglang, from_vllm

pytestmark = DEFAULT_MODE

LAYERS, K = 2, 3
BY_PROMPT = [PROMPTS[k] for k, _ in FLAT]


def experts(k: int, j: int) -> np.ndarray[Any, Any]:
    """Of a response's prompt and tokens without the last: expert = 20 * row + 3 * layer + rank, some above 128."""
    rows = len(PROMPTS[k]) + len(RESPONSES[k][j][0]) - 1
    return np.arange(rows)[:, None, None] * 20 + np.arange(LAYERS)[:, None] * 3 + np.arange(K) + 5 * (2 * k + j)


def expected(skipped: int = 0) -> Tensor:
    """[P + N, layers, k]: -1 for the last token of each sequence, and for `skipped` prompt tokens."""
    parts = list[Tensor]()
    for k, j in FLAT:
        rows = torch.from_numpy(experts(k, j)).short()
        rows[:skipped] = -1
        parts += [rows, torch.full((1, LAYERS, K), -1, dtype=torch.int16)]
    return torch.cat(parts)


def npy(values: np.ndarray[Any, Any]) -> str:
    with io.BytesIO() as file:
        np.save(file, values)
        return base64.b64encode(file.getvalue()).decode()


def vllm_outputs(dtype: Any = np.uint8, skipped: int = 0) -> Any:
    outputs = request_outputs()
    for k, j in FLAT:
        outputs[k].outputs[j].routed_experts = experts(k, j)[skipped:].astype(dtype)  # type: ignore[attr-defined]
    return outputs


def server(response: Callable[..., Any], read: Callable[[Any], Any]) -> Any:
    outputs = [response(k) for k in range(2)]
    for k, j in FLAT:
        outputs[k]["choices"][j]["routed_experts"] = npy(experts(k, j).astype(np.uint16))
    return [read(output) for output in outputs]


def sglang_outputs(skipped: int = 0) -> Any:
    outputs = [generate_json(k, j) for k, j in FLAT]
    for output, (k, j) in zip(outputs, FLAT, strict=True):
        raw = experts(k, j)[skipped:].astype(np.int32).tobytes()
        output["meta_info"]["routed_experts"] = base64.b64encode(raw).decode()
    return outputs


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("skipped", [0, 2])
def test_vllm(dtype: Any, skipped: int) -> None:
    """`skipped`: SamplingParams(routed_experts_prompt_start=...)."""
    found = from_vllm(vllm_outputs(dtype, skipped)).routed_experts
    assert found is not None and found.dtype == torch.int16 and torch.equal(found, expected(skipped))


def test_vllm_with_those_of_the_prompt_apart() -> None:
    outputs = vllm_outputs()
    for k, j in FLAT:
        outputs[k].prompt_routed_experts = experts(k, j)[: len(PROMPTS[k])]
        outputs[k].outputs[j].routed_experts = experts(k, j)[len(PROMPTS[k]) :]
    for k in range(2):  # a request has one prompt, so both responses have its experts
        outputs[k].outputs = outputs[k].outputs[1:]
    found = from_vllm(outputs).routed_experts
    of_second = torch.cat([torch.ones(6), torch.zeros(4), torch.ones(2), torch.zeros(7)]).bool()
    assert found is not None and torch.equal(found, expected()[~of_second])


@pytest.mark.parametrize("response", [completion_json, chat_json])
def test_a_server(response: Callable[..., Any]) -> None:
    for read in (lambda x: json.loads(json.dumps(x)), as_objects):
        found = from_vllm(server(response, read)).routed_experts
        assert found is not None and torch.equal(found, expected())


def test_sglang() -> None:
    for skipped in (0, 1):
        found = from_sglang(sglang_outputs(skipped), prompt_ids=BY_PROMPT, experts_shape=(LAYERS, K))
        assert found.routed_experts is not None and torch.equal(found.routed_experts, expected(skipped))
    assert from_sglang(sglang_outputs(), prompt_ids=BY_PROMPT).routed_experts is None


def test_without_prompts_there_is_no_place_for_them() -> None:
    outputs = vllm_outputs()
    for output in outputs:
        output.prompt_token_ids = None
    assert from_vllm(outputs).routed_experts is None
    assert from_sglang(sglang_outputs(), experts_shape=(LAYERS, K)).routed_experts is None


def test_responses_without_experts() -> None:
    """As of a request that was aborted before it ran."""
    outputs = vllm_outputs()
    outputs[1].outputs[0].routed_experts = None
    truth = expected()
    truth[10:12] = -1
    found = from_vllm(outputs).routed_experts
    assert found is not None and torch.equal(found, truth)


def test_in_a_batch_they_stand_beside_the_tokens_that_were_read() -> None:
    batch = from_vllm(vllm_outputs()).with_prompts()
    assert batch.routed_experts is not None and torch.equal(batch.routed_experts, expected())
    last = batch.cu_seqlens[1:] - 1
    assert (batch.routed_experts < 0).flatten(1).all(1).nonzero()[:, 0].tolist() == last.tolist()
    part = batch[torch.tensor([3, 0])]
    assert part.routed_experts is not None and torch.equal(
        part.routed_experts, torch.cat([expected()[12:], expected()[:6]])
    )


def with_experts(value: Any) -> Callable[[], object]:
    def call() -> object:
        outputs = vllm_outputs()
        outputs[0].outputs[0].routed_experts = value
        return from_vllm(outputs)

    return call


def with_prompts_experts(value: Any) -> object:
    outputs = vllm_outputs()
    outputs[0].prompt_routed_experts = value
    return from_vllm(outputs)


def sglang_with(text: Any, shape: Any = (LAYERS, K)) -> Callable[[], object]:
    def call() -> object:
        outputs = sglang_outputs()
        outputs[0]["meta_info"]["routed_experts"] = text
        return from_sglang(outputs, prompt_ids=BY_PROMPT, experts_shape=shape)

    return call


RAW = base64.b64encode(bytes(4 * 5 * LAYERS * K)).decode()
HERE, META = "outputs[0].outputs[0].routed_experts", "outputs[0].meta_info.routed_experts"
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str, str]] = {
    "too many rows": (with_experts(np.zeros((6, LAYERS, K), int)), ValueError, HERE, "got 6"),
    "rows of the response missing": (with_experts(np.zeros((1, LAYERS, K), int)), ValueError, HERE, "got 1"),
    "other layers": (
        with_experts(np.zeros((5, 3, K), int)),
        ValueError,
        "outputs[0].outputs[1].routed_experts",
        "2, 3",
    ),
    "flat": (with_experts(np.zeros((5, 6), int)), ValueError, HERE, "[5, 6]"),
    "numbers that are none": (with_experts(np.zeros((5, LAYERS, K))), TypeError, HERE, "float64"),
    "a negative expert": (with_experts(np.full((5, LAYERS, K), -2)), ValueError, HERE, "-2"),
    "a large expert": (with_experts(np.full((5, LAYERS, K), 40000)), ValueError, HERE, "40000"),
    "ragged lists": (with_experts([[[0, 1, 2]], [[0, 1]]]), TypeError, HERE, "list"),
    "no base64": (with_experts("?"), ValueError, HERE, "none"),
    "no .npy": (with_experts("AAAA"), ValueError, HERE, "none"),
    "sglang: another k": (sglang_with(RAW, (LAYERS, 4)), ValueError, META, "30"),
    "sglang: part of a number": (sglang_with(base64.b64encode(bytes(7)).decode()), ValueError, META, "none"),
    "sglang: k of 0": (sglang_with("", (LAYERS, 0)), ValueError, "experts_shape", "0"),
    "other layers than the prompt's": (
        lambda: with_prompts_experts(np.zeros((3, 4, K), int)),
        ValueError,
        HERE,
        "[2, 3]",
    ),
    "sglang: an array of another k": (
        sglang_with(np.zeros((5, LAYERS, K), int), (LAYERS, 4)),
        ValueError,
        META,
        "[5, 2, 3]",
    ),
    "sglang: k alone": (sglang_with("", K), TypeError, "experts_shape", "3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_placed_is_refused(case: str) -> None:
    call, kind, argument, came = WRONG[case]
    with pytest.raises(kind) as error:
        call()
    check_message(error.value, argument, came)
