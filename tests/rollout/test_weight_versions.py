"""`weight_versions`: which weights sampled each token, from vLLM's spans and SGLang's, on to a batch and its masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from test_engines import FLAT, RESPONSES, as_objects, chat_json, generate_json, request_outputs
from test_errors import check_message

from gspo_kernels import Rollouts, from_sglang, from_vllm, rollout_mismatch

pytestmark = DEFAULT_MODE


@dataclass
class WeightVersionSpan:
    version: str
    start: int
    end: int


# Of the four responses, of 3, 1, 0 and 5 tokens.
SPANS = [[("7", 0, 2), ("8", 2, 3)], [("7", 0, 1)], [], [("6", 0, 1), ("8", 1, 1), ("8", 1, 5)]]


def check(found: Rollouts) -> None:
    versions = found.weight_versions
    assert versions is not None and versions.labels == ("7", "8", "6")
    assert versions.of_tokens.dtype == torch.int64
    assert versions.of_tokens.tolist() == [0, 0, 1, 0, 2, 1, 1, 1, 1]


def vllm_outputs() -> Any:
    outputs = request_outputs()
    for (k, j), spans in zip(FLAT, SPANS, strict=True):
        outputs[k].outputs[j].weight_versions = [WeightVersionSpan(*span) for span in spans]  # type: ignore[attr-defined]
    return outputs


def spans_json(spans: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in spans]


def generate_outputs() -> Any:
    """/inference/v1/generate."""
    outputs = [chat_json(k) for k in range(2)]
    for (k, j), spans in zip(FLAT, SPANS, strict=True):
        outputs[k]["choices"][j]["weight_versions"] = spans_json(spans)
    return outputs


def sglang_outputs() -> Any:
    outputs = [generate_json(k, j) for k, j in FLAT]
    for output, spans in zip(outputs, SPANS, strict=True):
        output["meta_info"] |= {"weight_versions": spans_json(spans), "weight_version": "9"}
    return outputs


def test_of_each_engine() -> None:
    check(from_vllm(vllm_outputs()))
    check(from_vllm(json.loads(json.dumps(generate_outputs()))))
    check(from_vllm([as_objects(output) for output in generate_outputs()]))
    check(from_sglang(sglang_outputs()))


def test_one_label_for_a_response_of_an_older_sglang() -> None:
    outputs = [generate_json(k, j) for k, j in FLAT]
    for output, label in zip(outputs, ("a", "b", "c", "a"), strict=True):
        output["meta_info"]["weight_version"] = label
    found = from_sglang(outputs).weight_versions
    assert found is not None and found.labels == ("a", "b"), "the third response has no tokens"
    assert found.of_tokens.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_responses_without_versions() -> None:
    assert from_vllm(request_outputs()).weight_versions is None
    outputs = vllm_outputs()
    outputs[0].outputs[0].weight_versions = None
    found = from_vllm(outputs).weight_versions
    assert found is not None and found.labels == ("7", "6", "8")
    assert found.of_tokens.tolist() == [-1, -1, -1, 0, 1, 2, 2, 2, 2]


def test_statistics_by_version() -> None:
    """In a batch with prompts a row has the version that sampled the token it predicts."""
    batch = from_vllm(vllm_outputs()).with_prompts()
    masks = batch.weight_versions.masks(batch.mask)  # type: ignore[union-attr]
    assert {label: batch.token_ids[mask].tolist() for label, mask in masks.items()} == {
        "7": [3, 3, 4], "8": [0, 11, 2, 11, 2], "6": [2],
    }  # fmt: skip
    assert torch.equal(sum(mask.long() for mask in masks.values()), batch.mask.long())  # type: ignore[arg-type]
    moved = batch.old_logprobs.nan_to_num() - 0.25 * masks["8"]
    by_version = {
        label: rollout_mismatch(moved, batch.old_logprobs, mask=mask, cu_seqlens=batch.cu_seqlens).kl_k1
        for label, mask in masks.items()
    }
    assert [float(by_version[label]) for label in "678"] == pytest.approx([0, 0, 0.25])
    part = batch[1:]
    assert part.weight_versions is not None and part.weight_versions.labels == ("7", "8", "6")
    assert {x: int(mask.sum()) for x, mask in part.weight_versions.masks(part.mask).items()} == {"7": 1, "8": 4, "6": 1}


WRONG: dict[str, tuple[Any, type[Exception], str, str]] = {
    "a gap": ([("7", 0, 1), ("8", 2, 3)], ValueError, "weight_versions[1]", "2 to 3"),
    "an overlap": ([("7", 0, 2), ("8", 1, 3)], ValueError, "weight_versions[1]", "1 to 3"),
    "backwards": ([("7", 0, 2), ("8", 2, 1)], ValueError, "weight_versions[1]", "2 to 1"),
    "a late start": ([("7", 1, 3)], ValueError, "weight_versions[0]", "1 to 3"),
    "too few": ([("7", 0, 2)], ValueError, "weight_versions", "spans of 2"),
    "too many": ([("7", 0, 4)], ValueError, "weight_versions", "spans of 4"),
    "no number": ([("7", 0, 3.0)], TypeError, "weight_versions[0].end", "3.0"),
    "no version": ([(None, 0, 3)], TypeError, "weight_versions[0]", "WeightVersionSpan"),
    "labels alone": (["7", "8", "8"], TypeError, "weight_versions[0]", "str"),
}


@pytest.mark.parametrize("case", WRONG)
def test_spans_that_do_not_cover_the_tokens_are_refused(case: str) -> None:
    spans, kind, argument, came = WRONG[case]
    outputs = vllm_outputs()
    outputs[0].outputs[0].weight_versions = [x if isinstance(x, str) else WeightVersionSpan(*x) for x in spans]
    with pytest.raises(kind) as error:
        from_vllm(outputs)
    check_message(error.value, f"outputs[0].outputs[0].{argument}", came)


@pytest.mark.parametrize("outputs", [vllm_outputs, sglang_outputs])
def test_the_device_is_the_callers(outputs: Callable[[], Any]) -> None:
    convert = from_vllm if outputs is vllm_outputs else from_sglang
    found = convert(outputs(), device="meta")
    assert found.weight_versions is not None and found.weight_versions.of_tokens.device.type == "meta"
    assert len(RESPONSES) == 2
