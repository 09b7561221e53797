"""Kept sets in vLLM's and SGLang's outputs, and on to the losses. The fakes are those of test_engines.py.

Formats: vLLM 0.32, `vllm/outputs.py` and `vllm/entrypoints/scale_out/token_in_token_out/protocol.py`; SGLang 0.5.23,
`tokenizer_manager.py` and `sampling/sampling_mask.py`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from modes import DEFAULT_MODE
from test_engines import (
    FLAT,
    RESPONSES,
    CompletionOutput,
    RequestOutput,
    as_dicts,
    changed,
    chat_json,
    generate_json,
    request_outputs,
)
from test_errors import check_message
from torch import Tensor

from gspo_kernels import KeptTokens, Rollouts, from_sglang, from_vllm, gspo_loss

pytestmark = DEFAULT_MODE

# Of each response of test_engines.py: [3, 3, 0], [4], nothing, [2, 11, 2, 11, 2]. Ids in any order.
SETS = [[[[3, 8], [9, 3, 1], [6, 0]], [[4, 2]]], [[], [[2, 4], [7, 11], [2, 5], [11, 3], [1, 2, 90]]]]
EXPECTED = [kept for k, j in FLAT for kept in SETS[k][j]]


@dataclass
class SamplingMask:
    token_ids: list[list[int]]


def vllm_outputs(kind: Callable[[list[int]], Any] = list) -> list[Any]:
    """As with LLM(return_sampling_mask=True); a response without a token has None."""
    outputs = request_outputs()
    for k, j in FLAT:
        sets = [kind(kept) for kept in SETS[k][j]]
        outputs[k].outputs[j].sampling_mask = SamplingMask(sets) if sets else None
    return outputs


def vllm_json() -> list[Any]:
    """As POST /inference/v1/generate returns it."""
    responses = [chat_json(k, ids=True) for k in range(2)]
    for k, j in FLAT:
        responses[k]["choices"][j]["sampling_mask"] = SETS[k][j] or None
    return json.loads(json.dumps(responses))  # type: ignore[no-any-return]


def sglang_outputs(support: bool = False, alone: bool = False) -> list[Any]:
    """As with return_sampling_mask=True; `support`: sampling_logprobs_mode; `alone`: without return_logprob."""
    outputs = [generate_json(k, j) for k, j in FLAT]
    for output, (k, j) in zip(outputs, FLAT, strict=True):
        meta, tokens = output["meta_info"], RESPONSES[k][j][0]
        # Their own log-probabilities, -0.25 for the first token of a response, -0.5 for the second.
        values = [-0.25 * (i + 1) for i in range(len(tokens))]
        meta["output_token_sampling_mask"] = copy.deepcopy(SETS[k][j])
        meta["output_token_sampling_mask_length"] = len(tokens)
        meta["output_token_sampling_logprobs"] = values
        if support:
            meta["output_token_sampling_logprobs"] = [
                [x if token == t else -9.0 for token in kept]
                for x, t, kept in zip(values, tokens, SETS[k][j], strict=True)
            ]
        if alone:
            del meta["output_token_logprobs"], meta["input_token_logprobs"]
    return outputs


def check(found: Rollouts) -> None:
    assert found.kept is not None and found.kept.to_lists() == EXPECTED and found.kept.every_row
    assert found.kept.token_ids.dtype == torch.int32 and found.kept.device == found.token_ids.device


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: [np.int32(t) for t in x]])
def test_vllm(kind: Callable[[list[int]], Any]) -> None:
    check(from_vllm(vllm_outputs(kind)))


def test_vllm_server() -> None:
    check(from_vllm(vllm_json()))


@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_sglang(support: bool, alone: bool) -> None:
    """Old log-probabilities are those over the kept sets, not those over the vocabulary that may stand beside them."""
    found = from_sglang(sglang_outputs(support, alone))
    check(found)
    expected = [-0.25 * (i + 1) for k, j in FLAT for i in range(len(RESPONSES[k][j][0]))]
    assert found.old_logprobs.tolist() == expected
    assert found.token_ids.tolist() == [t for k, j in FLAT for t in RESPONSES[k][j][0]]


def test_without_sets() -> None:
    for found in (from_vllm(request_outputs()), from_sglang([generate_json(k, j) for k, j in FLAT])):
        assert found.kept is None
    assert from_vllm(request_outputs()).with_prompts().kept is None


def test_with_prompts() -> None:
    """The row before a token has its set; rows of prompts, and a sequence's last, have none."""
    found = from_vllm(vllm_outputs()).with_prompts()
    assert found.kept is not None and len(found.kept) == found.token_ids.numel()
    sets = found.kept.to_lists()
    assert [sets[t] for t in found.mask.nonzero()[:, 0].tolist()] == EXPECTED
    assert all(sets[t] is None for t in (~found.mask).nonzero()[:, 0].tolist())
    begin, end = found.cu_seqlens[1:3].tolist()
    assert found.kept[begin:end].to_lists() == [None, None, [4, 2], None], "a mini-batch: the second response"


def test_log_probabilities_of_another_distribution_are_seen() -> None:
    """A token that was alone in its set was certain. Of raw log-probabilities it seldom is."""
    outputs = changed(vllm_outputs(), "0.outputs.0.sampling_mask.token_ids.2", [0])
    with pytest.raises(ValueError, match=r"^outputs\[0\].outputs\[0\]: .* so 0 for its token 2, .*processed_logprobs"):
        from_vllm(outputs)


def test_a_masked_token_needs_no_set() -> None:
    """An engine that gives a token no log-probability may have it outside of its set, too."""
    outputs = vllm_outputs()
    outputs[0].outputs[0].logprobs[1][3].logprob = -math.inf
    outputs[0].outputs[0].sampling_mask.token_ids[1] = [9]
    found = from_vllm(outputs, missing="mask")
    assert found.mask.tolist()[:3] == [True, False, True] and found.kept is not None


MASK, META = "outputs[0].outputs[0].sampling_mask", "outputs[3].meta_info.output_token_sampling"
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str, str]] = {
    "one set too few": (
        lambda: from_vllm(changed(vllm_outputs(), "0.outputs.0.sampling_mask.token_ids", [[3], [3]])),
        ValueError, f"{MASK}.token_ids", "got 2",
    ),
    "of some responses": (
        lambda: from_vllm(changed(vllm_outputs(), "1.outputs.1.sampling_mask", None)),
        ValueError, "outputs[1].outputs[1]", "none",
    ),
    "without the sampled token": (
        lambda: from_vllm(changed(vllm_outputs(), "0.outputs.0.sampling_mask.token_ids.1", [9, 4])),
        ValueError, f"{MASK}.token_ids[1]", "2 others",
    ),
    "an empty set": (
        lambda: from_vllm(changed(vllm_outputs(), "0.outputs.0.sampling_mask.token_ids.1", [])),
        ValueError, f"{MASK}.token_ids[1]", "0 others",
    ),
    "an id twice": (
        lambda: from_vllm(changed(vllm_outputs(), "0.outputs.0.sampling_mask.token_ids.1", [3, 5, 9, 5])),
        ValueError, f"{MASK}.token_ids[1]", "id 5 twice",
    ),
    "an id that is none": (
        lambda: from_vllm(changed(vllm_outputs(), "0.outputs.0.sampling_mask.token_ids.1", [3, 2**31])),
        ValueError, f"{MASK}.token_ids[1]", "2147483648",
    ),
    "numbers that are no ids": (
        lambda: from_vllm(changed(vllm_outputs(), "0.outputs.0.sampling_mask.token_ids.1", [3, 4.0])),
        TypeError, f"{MASK}.token_ids[1][1]", "4.0",
    ),
    "no lists": (
        lambda: from_vllm(changed(vllm_outputs(), "0.outputs.0.sampling_mask.token_ids", [3, 3, 0])),
        TypeError, f"{MASK}.token_ids[0]", "int",
    ),
    "no sequence": (
        lambda: from_vllm(changed(vllm_json(), "1.choices.1.sampling_mask", 5)),
        TypeError, "outputs[1].choices[1].sampling_mask", "int",
    ),
    "sglang: one too many": (
        lambda: from_sglang(changed(sglang_outputs(), "3.meta_info.output_token_sampling_mask", [[2]] * 6)),
        ValueError, f"{META}_mask", "got 6",
    ),
    "sglang: without log-probabilities": (
        lambda: from_sglang(changed(sglang_outputs(), "3.meta_info.output_token_sampling_logprobs", ...)),
        ValueError, f"{META}_logprobs", "none",
    ),
    "sglang: too few log-probabilities": (
        lambda: from_sglang(changed(sglang_outputs(), "3.meta_info.output_token_sampling_logprobs", [-1.0])),
        ValueError, f"{META}_logprobs", "got 1",
    ),
    "sglang: log-probabilities of another set": (
        lambda: from_sglang(changed(sglang_outputs(True), "3.meta_info.output_token_sampling_logprobs.4", [-1.0])),
        ValueError, f"{META}_logprobs[4]", "got 1",
    ),
    "sglang: without the sampled token": (
        lambda: from_sglang(changed(sglang_outputs(True), "3.meta_info.output_token_sampling_mask.4", [1, 5, 90])),
        ValueError, "outputs[3]", "none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    call, kind, argument, came = REFUSED[case]
    with pytest.raises(kind) as error:
        call()
    check_message(error.value, argument, came)


# --- on to the losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("filters", [{"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.2}], ids=str)
def test_what_an_engine_samples_has_ratio_one(engine: str, filters: dict[str, Any]) -> None:
    """An engine filters and samples: before anything is learned, all ratios are 1 and nothing is clipped.

    Over the whole vocabulary the same log-probabilities look like those of another policy.
    """
    generator = torch.Generator().manual_seed(0)
    table, temperature = torch.randn(12, 12, generator=generator) * 2, 0.9
    sets = KeptTokens.from_logits(table, temperature=temperature, **filters)
    outputs = [sampled(engine, table / temperature, sets, [k, 2 * k % 12], 4 + 3 * k, generator) for k in range(6)]
    prompts = [[k, 2 * k % 12] for k in range(6)]
    rollouts = from_vllm(outputs) if engine == "vllm" else from_sglang(outputs, prompt_ids=prompts)
    batch = rollouts.with_prompts()
    assert batch.kept is not None
    logits = table[batch.input_ids].requires_grad_()
    options: dict[str, Any] = {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens, "temperature": temperature}
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    loss, stats = gspo_loss(logits, batch.token_ids, advantages, batch.old_logprobs, kept=batch.kept, **options)
    loss.backward()
    assert float(stats.clip_fraction) == 0.0 and float(stats.num_tokens) == sum(4 + 3 * k for k in range(6))
    assert float(stats.ratio_min) == pytest.approx(1, abs=1e-6) == float(stats.ratio_max)
    assert logits.grad is not None
    outside = [[v for v in range(12) if kept is not None and v not in kept] for kept in batch.kept.to_lists()]
    assert all(not logits.grad[t, columns].any() for t, columns in enumerate(outside))
    _, whole = gspo_loss(table[batch.input_ids], batch.token_ids, advantages, batch.old_logprobs, **options)
    assert float(whole.clip_fraction) >= 1 / 3 and float(whole.ratio_mean) < 0.95


def sampled(
    engine: str, scaled: Tensor, sets: KeptTokens, prompt: list[int], length: int, generator: torch.Generator
) -> Any:
    """A response of an engine whose logits after a token are a row of a table."""
    tokens, logprobs, supports, last = [], [], [], prompt[-1]
    for _ in range(length):
        support = torch.tensor(sets.to_lists()[last] or range(12))
        logp = scaled[last, support].log_softmax(-1)
        at = int(torch.multinomial(logp.exp(), 1, generator=generator))
        last = int(support[at])
        tokens.append(last)
        logprobs.append(float(logp[at]))
        supports.append(support.tolist())
    if engine == "vllm":
        completion = CompletionOutput(0, "", tokens, None, as_dicts(tokens, logprobs), "length")
        completion.sampling_mask = SamplingMask(supports)  # type: ignore[attr-defined]
        return RequestOutput("0", None, prompt, None, [completion], True)
    rows = [(-1.0, t, None) for t in tokens]
    return {
        "meta_info": {
            "finish_reason": {"type": "length"}, "completion_tokens": length, "output_token_logprobs": rows,
            "output_token_sampling_mask": supports, "output_token_sampling_logprobs": logprobs,
        }
    }  # fmt: skip
