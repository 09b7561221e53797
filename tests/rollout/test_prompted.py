"""`PromptedRollouts`: parts of a batch, mini-batches, and the packed call of a transformers model."""

from __future__ import annotations

import copy
import dataclasses
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from modes import DEFAULT_MODE
from test_engines import FLAT, PROMPTS, RESPONSES, generate_json, request_outputs
from test_errors import check_message
from test_routed_experts import vllm_outputs as with_experts
from test_weight_versions import SPANS, WeightVersionSpan
from torch import Tensor

from gspo_kernels import (
    KeptTokens,
    PromptedRollouts,
    WeightVersions,
    from_sglang,
    from_vllm,
    gspo_loss,
    token_logprobs,
)

pytestmark = DEFAULT_MODE


def full_batch() -> PromptedRollouts:
    """Four responses, the third one empty, with all that an engine may return."""
    outputs = with_experts()
    for (k, j), spans in zip(FLAT, SPANS, strict=True):
        completion = outputs[k].outputs[j]
        completion.weight_versions = [WeightVersionSpan(*span) for span in spans]
        completion.sampling_mask = [[token, 90 + i] for i, token in enumerate(completion.token_ids)]
    return from_vllm(outputs).with_prompts()


def rows_of(batch: PromptedRollouts, i: int) -> dict[str, Any]:
    """All of response i, as values."""
    begin, end = batch.cu_seqlens[i : i + 2].tolist()
    versions, kept, experts = batch.weight_versions, batch.kept, batch.routed_experts
    assert versions is not None and kept is not None and experts is not None
    return {
        "input_ids": batch.input_ids[begin:end].tolist(),
        "position_ids": batch.position_ids[begin:end].tolist(),
        "targets": batch.token_ids[begin:end][batch.mask[begin:end]].tolist(),
        "old_logprobs": batch.old_logprobs[begin:end][batch.mask[begin:end]].tolist(),
        "mask": batch.mask[begin:end].tolist(),
        "kept": [sorted(kept[t : t + 1].token_ids.tolist()) for t in range(begin, end)],
        "versions": [versions.labels[x] if x >= 0 else None for x in versions.of_tokens[begin:end].tolist()],
        "experts": experts[begin:end].tolist(),
    }


@pytest.mark.parametrize(
    ("chosen", "responses"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        (slice(4, 9), []),
        ([3, 0], [3, 0]),
        ([-1, -1], [3, 3]),
        ([], []),
        (torch.tensor([2], dtype=torch.int32), [2]),
        (torch.tensor([True, False, True, True]), [0, 2, 3]),
        ([False, False, True, False], [2]),
        (np.array([2, 0]), [2, 0]),
        (np.array([True, False, False, True]), [0, 3]),
        (torch.zeros(4, dtype=torch.bool), []),
    ],
    ids=str,
)
def test_chosen_responses_have_all_that_is_theirs(chosen: Any, responses: list[int]) -> None:
    batch = full_batch()
    part = batch[chosen]
    assert len(part) == len(responses) and part.cu_seqlens[0] == 0
    assert part.cu_seqlens[-1] == len(part.input_ids) == len(part.mask)
    for i, response in enumerate(responses):
        assert rows_of(part, i) == rows_of(batch, response)


def test_all_fields_move_to_a_device() -> None:
    """As of a batch that another process made."""
    for batch in (full_batch(), from_vllm(with_experts())):
        there = copy.deepcopy(batch).to("meta")
        for each in dataclasses.fields(batch):
            was, now = getattr(batch, each.name), getattr(there, each.name)
            assert type(now) is type(was)
            if isinstance(was, WeightVersions):
                assert now.labels == was.labels and now.of_tokens.device.type == "meta"
            elif hasattr(was, "device"):
                assert now.device.type == "meta" and was.device.type == "cpu"
            else:
                assert now == was
    assert rows_of(full_batch().to("cpu"), 3) == rows_of(full_batch(), 3)


def test_positions_start_again_with_each_prompt() -> None:
    batch = full_batch()
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5, 6]
    assert rows_of(batch, 2)["targets"] == [] and rows_of(batch, 0)["kept"][2:5] == [[3, 90], [3, 91], [0, 92]]


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (1, TypeError, "int 1"),
    "a mask that is too short": (torch.tensor([True]), ValueError, "[1]"),
    "a mask over tokens": (torch.ones(19, dtype=torch.bool), ValueError, "[19]"),
    "beyond the end": ([0, 4], IndexError, "[0, 4]"),
    "beyond the beginning": ([-5], IndexError, "[-5]"),
    "floats": (torch.tensor([0.0]), TypeError, "float32"),
    "a matrix": (torch.tensor([[0]]), ValueError, "[1, 1]"),
    "text": (["stop"], TypeError, "'stop'"),
    "nothing": ([None], TypeError, "None"),
    "lists": ([[0], [1, 2]], TypeError, "[1, 2]"),
    "numpy's floats": (np.array([0.5]), TypeError, "float64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_chooses_no_responses_is_refused(case: str) -> None:
    chosen, kind, came = WRONG[case]
    with pytest.raises(kind) as error:
        full_batch()[chosen]
    check_message(error.value, "responses", came)


@pytest.mark.parametrize("count", [1, 2, 3, 10**15])
def test_mini_batches_have_each_response_once(count: int) -> None:
    batch = full_batch()
    for shuffle in (False, True):
        parts = list(batch.mini_batches(count, shuffle=shuffle, generator=torch.Generator().manual_seed(3)))
        order = [i for chosen, _ in parts for i in chosen.tolist()]
        assert sorted(order) == [0, 1, 2, 3] and (order != [0, 1, 2, 3]) == shuffle
        assert len(parts) == min(count, 4)
        assert max(len(part) for _, part in parts) - min(len(part) for _, part in parts) <= 1
        for chosen, part in parts:
            assert [rows_of(part, i) for i in range(len(part))] == [rows_of(batch, i) for i in chosen.tolist()]


@pytest.mark.parametrize(("count", "kind"), [(0, ValueError), (True, TypeError), (1.5, TypeError)])
def test_mini_batches_are_counted(count: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind) as error:
        list(full_batch().mini_batches(count))
    check_message(error.value, "count", str(count))


def test_the_gradients_of_mini_batches_add_up_to_the_batchs() -> None:
    """With the responses' advantages and the whole batch's count."""
    batch = full_batch()
    table = torch.randn(100, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.25])

    def gradient(part: PromptedRollouts, advantages: Tensor) -> Tensor:
        loss, _ = gspo_loss(
            table[part.input_ids], part.token_ids, advantages, part.old_logprobs, mask=part.mask,
            cu_seqlens=part.cu_seqlens, kept=part.kept, eps_low=9.0, eps_high=1e9, normalizer=3,
        )  # fmt: skip
        return torch.autograd.grad(loss, table)[0]

    parts = batch.mini_batches(2, shuffle=True, generator=torch.Generator().manual_seed(3))
    added = sum(gradient(part, advantages[chosen]) for chosen, part in parts)
    torch.testing.assert_close(added, gradient(batch, advantages))


# --- how responses ended ----------------------------------------------------------------------------------------------


def test_responses_are_chosen_by_how_they_ended() -> None:
    rollouts = from_vllm(request_outputs())
    assert rollouts.finish_reasons == ("stop", "length", "abort", "length")
    whole = ~rollouts.ended_by("abort")
    assert whole.dtype == torch.bool and whole.tolist() == [True, True, False, True]
    assert rollouts.with_prompts()[whole].cu_seqlens.tolist() == [0, 6, 10, 17]
    assert rollouts.ended_by("stop").tolist() == [True, False, False, False]
    assert rollouts.ended_by("stop", "length").tolist() == [True, True, False, True]
    assert rollouts.ended_by("repetition").tolist() == [False] * 4 and rollouts.ended_by().tolist() == [False] * 4
    with pytest.raises(ValueError) as error:
        rollouts.ended_by("aborted")
    check_message(error.value, "reasons", "'aborted'")
    sglang = [generate_json(k, j) for k, j in FLAT]
    sglang[0]["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted", "status_code": None}
    assert from_sglang(sglang).ended_by("abort").tolist() == [True, False, True, False]


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers: make demo")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_call_of_transformers_is_that_of_each_sequence_alone(attention: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, attn_implementation=attention,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    batch = full_batch()

    @torch.no_grad()
    def logits_of(part: PromptedRollouts) -> Tensor:
        logits: Tensor = model(
            input_ids=part.input_ids[None], position_ids=part.position_ids[None], use_cache=False
        ).logits[0]
        return logits

    packed = logits_of(batch)
    for i, ((k, j), (begin, end)) in enumerate(zip(FLAT, batch.cu_seqlens.unfold(0, 2, 1).tolist(), strict=True)):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([PROMPTS[k] + RESPONSES[k][j][0]]), use_cache=False).logits[0]
        torch.testing.assert_close(packed[begin:end], alone)
        torch.testing.assert_close(logits_of(batch[i : i + 1]), alone)
    with torch.no_grad():  # without positions each response would read those before it
        wrong = model(input_ids=batch.input_ids[None], use_cache=False).logits[0]
    assert (wrong[6:] - packed[6:]).abs().max() > 1e-2
    logprobs = token_logprobs(packed, batch.token_ids, mask=batch.mask).logprobs
    assert logprobs[batch.mask].shape == (9,) and isinstance(batch.kept, KeptTokens)
