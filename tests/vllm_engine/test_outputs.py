"""Outputs of `LLM.generate`: what `from_vllm` reads is what the trainer computes for the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import Tiny, check, completions, difference, facts, generate

from gspo_kernels import from_vllm, gspo_loss

pytestmark = pytest.mark.plain_memory

NOISE = 1e-5  # nats per token, the largest mean difference of float32


@pytest.mark.parametrize("flat", [False, True], ids=["dictionaries", "flat"])
@pytest.mark.parametrize("logprobs", [0, 5])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("prompt_logprobs", [None, 2])
def test_log_probabilities(tiny: Tiny, engines: Any, flat: bool, logprobs: int, n: int, prompt_logprobs: Any) -> None:
    asked = {"flat_logprobs": flat, "logprobs": logprobs, "n": n, "prompt_logprobs": prompt_logprobs}
    outputs = generate(engines(), tiny.prompts, max_tokens=24, **asked)
    assert type(outputs[0].outputs[0].logprobs).__name__ == ("FlatLogprobs" if flat else "list")
    rollouts = check(outputs)
    assert difference(tiny, rollouts) < NOISE
    assert rollouts.group_ids is not None and rollouts.group_ids.tolist() == [k for k in range(3) for _ in range(n)]
    assert difference(tiny, check(outputs, prompts=tiny.prompts)) < NOISE


@pytest.mark.parametrize("flat", [False, True], ids=["dictionaries", "flat"])
def test_recorded(tiny: Tiny, engines: Any, record: Callable[..., None], flat: bool) -> None:
    request = {"n": 2, "max_tokens": 6, "logprobs": 2, "prompt_logprobs": 0, "flat_logprobs": flat}
    outputs = generate(engines(), tiny.prompts[:2], **request)
    record("offline_flat" if flat else "offline_dictionaries", outputs, request=request, **facts(tiny, check(outputs)))


def test_ratios_are_one(tiny: Tiny, engines: Any) -> None:
    """Before the first update GSPO clips nothing, though its range begins 3e-4 from 1."""
    batch = check(generate(engines(), tiny.prompts, n=4, max_tokens=64)).with_prompts()
    advantages = torch.tensor([1.0, -1.0]).repeat(6)
    options = {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens}
    _, stats = gspo_loss(tiny.logits(batch), batch.token_ids, advantages, batch.old_logprobs, **options)
    assert float(stats.clip_fraction) == 0
    assert float(stats.ratio_min) == pytest.approx(1, abs=1e-5) == float(stats.ratio_max)


# --- how a response ends ----------------------------------------------------------------------------------------------

DOUBLED = [2 * letter for letter in "abcdefghijklmnopqrstuvwxyz"]  # two tokens each


@pytest.mark.parametrize("included", [False, True])
def test_stop_strings(tiny: Tiny, engines: Any, record: Callable[..., None], included: bool) -> None:
    """The text may end before the stop string. The tokens never do, and each has its log-probability."""
    request = {"n": 8, "max_tokens": 48, "stop": DOUBLED, "include_stop_str_in_output": included}
    outputs = generate(engines(), tiny.prompts, **request)
    rollouts = check(outputs)
    stopped = [x for x in completions(outputs) if x.stop_reason in DOUBLED]
    assert stopped and all(x.finish_reason == "stop" for x in stopped)
    for each in stopped:
        assert tiny.tokenizer.decode(each.token_ids).endswith(each.stop_reason)
        assert each.text.endswith(each.stop_reason) == included
    assert difference(tiny, rollouts) < NOISE
    if not included:
        short = generate(engines(), tiny.prompts[:1], **(request | {"n": 3, "max_tokens": 12}))
        record("offline_stop_strings", short, request=request, **facts(tiny, check(short)))


def test_stop_token_ids(tiny: Tiny, engines: Any) -> None:
    """The stop token is a token of the response, as the end of a sequence is."""
    vowels = [tiny.tokenizer.convert_tokens_to_ids(x) for x in "aeiou"]
    outputs = generate(engines(), tiny.prompts, n=8, max_tokens=12, stop_token_ids=vowels)
    rollouts, each = check(outputs), completions(outputs)
    assert {x.token_ids[-1] for x in each if x.finish_reason == "stop"} & set(vowels)
    assert all(x.token_ids[-1] in (*vowels, tiny.tokenizer.eos_token_id) for x in each if x.finish_reason == "stop")
    assert not set(vowels) & {t for x in each for t in x.token_ids[:-1]}
    assert difference(tiny, rollouts) < NOISE


def test_the_end_of_a_sequence_and_truncation(tiny: Tiny, engines: Any) -> None:
    outputs = generate(engines(), tiny.prompts, n=8, max_tokens=24)
    rollouts, each = check(outputs), completions(outputs)
    assert set(rollouts.finish_reasons) == {"stop", "length"}
    for x in each:
        assert (x.token_ids[-1] == tiny.tokenizer.eos_token_id) == (x.finish_reason == "stop")
        assert (len(x.token_ids) == 24) == (x.finish_reason == "length") or x.finish_reason == "stop"
    assert difference(tiny, rollouts) < NOISE


def test_a_response_of_one_token(tiny: Tiny, engines: Any) -> None:
    outputs = generate(engines(), tiny.prompts, n=2, max_tokens=1)
    rollouts = check(outputs)
    assert rollouts.cu_seqlens.tolist() == list(range(7)) and difference(tiny, rollouts) < NOISE


# --- which distribution -----------------------------------------------------------------------------------------------

RAW, PROCESSED = "raw_logprobs", "processed_logprobs"


@pytest.mark.parametrize("mode", [RAW, PROCESSED])
@pytest.mark.parametrize("sampling", [0.6, 1.0, 1.5])
def test_temperature(tiny: Tiny, engines: Any, mode: str, sampling: float) -> None:
    """docs/rollout.md: raw log-probabilities belong to temperature 1, processed ones to the sampling's."""
    rollouts = check(generate(engines(logprobs_mode=mode), tiny.prompts, n=8, max_tokens=24, temperature=sampling))
    right, wrong = (sampling, 1.0) if mode == PROCESSED else (1.0, sampling)
    assert difference(tiny, rollouts, right) < NOISE
    if sampling != 1:
        assert difference(tiny, rollouts, wrong) > 0.1


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_logits_are_refused(tiny: Tiny, engines: Any, mode: str) -> None:
    outputs = generate(engines(logprobs_mode=mode), tiny.prompts, n=2, max_tokens=8)
    with pytest.raises(ValueError, match="logprobs_mode"):
        from_vllm(outputs)


CHANGED = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "logit_bias": {"logit_bias": {5: 2.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(1, 20))},
    "min_tokens": {"min_tokens": 20},  # the end of a sequence is impossible before
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_changes_the_distribution(tiny: Tiny, engines: Any, change: str) -> None:
    """Processed log-probabilities include penalties and biases, which no loss computes. Raw ones hide them."""
    request = {"n": 8, "max_tokens": 24, **CHANGED[change]}
    raw = check(generate(engines(logprobs_mode=RAW), tiny.prompts, **request))
    processed = check(generate(engines(), tiny.prompts, **request))
    assert difference(tiny, raw) < NOISE
    assert difference(tiny, processed) > 1e-3


def test_bfloat16(tiny: Tiny, engines: Any) -> None:
    """An engine in bfloat16 differs by hundreds of times float32's noise, more than GSPO's clip range, 3e-4."""
    rollouts = check(generate(engines(dtype="bfloat16"), tiny.prompts, n=8, max_tokens=24))
    assert 1e-3 < difference(tiny, rollouts) < 0.1


def test_not_requested(tiny: Tiny, engines: Any) -> None:
    outputs = generate(engines(), tiny.prompts[:1], logprobs=None, max_tokens=2)
    with pytest.raises(ValueError, match=r"SamplingParams\(logprobs=0\)"):
        from_vllm(outputs)
