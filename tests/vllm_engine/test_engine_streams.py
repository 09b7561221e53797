"""Outputs that come in parts: whole ones are read, parts are refused. Aborted responses have the tokens so far."""

from __future__ import annotations

import asyncio
import copy
from functools import reduce
from typing import Any

import pytest
from test_outputs import NOISE
from tiny import Tiny, check, difference, facts, start_async, steps

from gspo_kernels import from_vllm

pytestmark = pytest.mark.plain_memory

REQUEST = {"max_tokens": 6, "ignore_eos": True}


@pytest.mark.parametrize("n", [1, 2])
def test_final_only(tiny: Tiny, engines: Any, n: int) -> None:
    outputs = steps(engines(), tiny.prompts, kind="FINAL_ONLY", n=n, **REQUEST)
    assert len(outputs) == 3 and difference(tiny, check(outputs)) < NOISE


def test_cumulative(tiny: Tiny, engines: Any, record: Any) -> None:
    """Each part has all tokens so far; the last one is the whole response."""
    parts = steps(engines(), tiny.prompts[:1], kind="CUMULATIVE", **REQUEST)
    assert [len(x.outputs[0].token_ids) for x in parts] == [1, 2, 3, 4, 5, 6]
    for part in parts[:-1]:
        with pytest.raises(ValueError, match=r"finished.*part of a stream"):
            from_vllm(part)
    rollouts = check(parts[-1:])
    assert rollouts.cu_seqlens.tolist() == [0, 6] and difference(tiny, rollouts) < NOISE
    record("offline_cumulative_parts", parts, request=REQUEST, refused=list(range(5)), whole=[5])


@pytest.mark.parametrize("flat", [False, True], ids=["dictionaries", "flat"])
@pytest.mark.parametrize("n", [1, 2])
def test_parts(tiny: Tiny, engines: Any, record: Any, flat: bool, n: int) -> None:
    """Each part has the newest tokens alone. All are refused, the last one too, which says that it has finished."""
    parts = steps(engines(), tiny.prompts[:1], kind="DELTA", flat_logprobs=flat, n=n, **REQUEST)
    assert len(parts) == 6 * n and all(len(x.outputs[0].token_ids) == 1 for x in parts) and parts[-1].finished
    for part in parts:
        with pytest.raises(ValueError, match="part"):
            from_vllm(part)
    if n == 1 and not flat:
        record("offline_delta_parts", parts, request=REQUEST, refused=list(range(6)))


@pytest.mark.parametrize("flat", [False, True], ids=["dictionaries", "flat"])
@pytest.mark.parametrize("n", [1, 2])
def test_joined_parts(tiny: Tiny, engines: Any, flat: bool, n: int) -> None:
    """vLLM's own `RequestOutput.add` makes a whole response of parts."""
    parts = steps(engines(), tiny.prompts[:1], kind="DELTA", flat_logprobs=flat, n=n, **REQUEST)

    def joined(whole: Any, part: Any) -> Any:
        whole.add(part, aggregate=True)
        return whole

    rollouts = check([reduce(joined, copy.deepcopy(parts))])
    assert rollouts.cu_seqlens.tolist() == [6 * k for k in range(n + 1)] and difference(tiny, rollouts) < NOISE


def test_aborted(tiny: Tiny, record: Any) -> None:
    """Requests that are aborted after 3 tokens or more, and one that was never scheduled, whose response is empty."""
    outputs = asyncio.run(abort_all(tiny))
    rollouts = check(outputs)
    assert set(rollouts.finish_reasons) == {"abort"}
    lengths = rollouts.cu_seqlens.diff().tolist()
    assert min(lengths[:2]) >= 3 and lengths[2] == 0
    assert difference(tiny, rollouts) < NOISE
    record("offline_aborted", outputs, request={"max_tokens": 400}, **facts(tiny, rollouts))


async def abort_all(tiny: Tiny) -> list[Any]:
    """Two requests run, a third waits."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = start_async(tiny, max_num_seqs=2)
    parameters = SamplingParams(max_tokens=400, logprobs=0, seed=0, ignore_eos=True)
    latest: dict[int, Any] = {}

    async def follow(k: int) -> None:
        """Until it is aborted; the last output of a request has all its tokens."""
        asked = parameters.clone()
        asked.output_kind = RequestOutputKind.CUMULATIVE
        async for output in engine.generate({"prompt_token_ids": tiny.prompts[k]}, asked, str(k)):
            latest[k] = output

    try:
        tasks = [asyncio.create_task(follow(k)) for k in range(3)]
        while any(k not in latest or len(latest[k].outputs[0].token_ids) < 3 for k in (0, 1)):
            await asyncio.sleep(0.001)
        await engine.abort([str(k) for k in range(3)])
        await asyncio.gather(*tasks)
    finally:
        engine.shutdown()
    return [latest[k] for k in range(3)]
