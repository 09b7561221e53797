"""What the scheduler does to a request changes none of its log-probabilities; a stale prefix cache does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_outputs import NOISE
from tiny import Tiny, check, difference, facts, generate, start_engine

pytestmark = pytest.mark.plain_memory


def counter(engine: Any, name: str) -> int:
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == f"vllm:{name}")


def test_preemption(tiny: Tiny, engines: Any, record: Any) -> None:
    """3 responses of 2 blocks each in 4 blocks: requests lose their cache, and compute it again."""
    engine = engines(max_length=64, num_gpu_blocks_override=5, disable_log_stats=False)
    before, request = counter(engine, "num_preemptions"), {"n": 3, "max_tokens": 32, "ignore_eos": True}
    outputs = generate(engine, tiny.prompts[:1], **request)
    assert counter(engine, "num_preemptions") > before
    rollouts = check(outputs)
    assert difference(tiny, rollouts) < NOISE
    record("offline_preempted", outputs, request=request, **facts(tiny, rollouts))


def test_chunked_prefill(tiny: Tiny, engines: Any) -> None:
    """Prompts of 100 tokens, of which a step computes 32 at most, beside responses that are under way."""
    engine = engines(enable_chunked_prefill=True, max_num_batched_tokens=32, max_num_seqs=4)
    prompts = tiny.encode([PROMPT, *("xyz"[k] + PROMPT for k in range(3))])
    # A request with a seed of its own fails here: vLLM 0.32 rewinds its generator, which a CPU's does not support.
    assert difference(tiny, check(generate(engine, prompts, n=2, max_tokens=24, seed=None))) < NOISE


PROMPT = "the same again and again. " * 4  # three blocks and more


def test_prefix_cache(tiny: Tiny, engines: Any) -> None:
    engine = engines(enable_prefix_caching=True)
    prompts = tiny.encode([PROMPT])
    first, second = (generate(engine, prompts, max_tokens=24) for _ in range(2))
    assert first[0].num_cached_tokens < 96 <= second[0].num_cached_tokens
    assert difference(tiny, check(first)) < NOISE and difference(tiny, check(second)) < NOISE


def test_a_prefix_cache_of_older_weights() -> None:
    """New weights on keys and values of the old ones: wrong without a word, until the cache is reset."""
    own = Tiny()
    engine = start_engine(own, enable_prefix_caching=True)
    prompts = own.encode([PROMPT])
    generate(engine, prompts, max_tokens=2)
    with torch.no_grad():
        for weights in own.model.parameters():
            weights.mul_(1.1)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(own.model.state_dict().items())})
    stale = generate(engine, prompts, n=4, max_tokens=24)
    assert stale[0].num_cached_tokens >= 96 and difference(own, check(stale)) > 1e-3
    engine.push(own.model)
    fresh = generate(engine, prompts, n=4, max_tokens=24)
    assert difference(own, check(fresh)) < NOISE
