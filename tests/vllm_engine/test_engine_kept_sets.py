"""Top-p, top-k and min-p: the kept sets, from the trainer's logits and from the engine."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import second_runner
from server import Server, serve
from test_outputs import NOISE
from tiny import Tiny, check, completions, difference, facts, generate

from gspo_kernels import KeptTokens, from_vllm

pytestmark = pytest.mark.plain_memory

FILTERS = {
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "all": {"top_p": 0.9, "top_k": 12, "min_p": 0.02, "temperature": 0.7},
}


def sets_of(outputs: list[Any]) -> list[set[int]]:
    """The tokens whose log-probability is not minus infinity, of requests with `logprobs=-1`."""
    rows = (row for each in completions(outputs) for row in each.logprobs)
    return [{token for token, x in row.items() if x.logprob > -math.inf} for row in rows]


@pytest.mark.parametrize("filters", FILTERS)
def test_from_logits(tiny: Tiny, engines: Any, filters: str) -> None:
    """The engine's processed log-probabilities of all tokens are minus infinity outside of its kept sets."""
    options = FILTERS[filters]
    outputs = generate(engines(max_logprobs=-1), tiny.prompts, n=8, max_tokens=24, logprobs=-1, **options)
    rollouts = check(outputs)
    temperature = options.get("temperature", 1.0)
    assert difference(tiny, rollouts, temperature) > 0.01  # over the whole vocabulary
    engine = sets_of(outputs)
    assert tiny.sets(rollouts, **options) == engine and 1 < sum(map(len, engine)) / len(engine) < 30
    filtered = dataclasses.replace(rollouts, kept=KeptTokens.from_lists([sorted(row) for row in engine]))
    assert difference(tiny, filtered, temperature) < NOISE


def test_from_logits_of_another_precision(tiny: Tiny, engines: Any) -> None:
    """Of an engine in bfloat16 the trainer's logits give other sets in some rows, some without the sampled token."""
    engine = engines(max_logprobs=-1, dtype="bfloat16")
    outputs = generate(engine, tiny.prompts, n=8, max_tokens=24, logprobs=-1, **FILTERS["all"])
    rollouts = check(outputs)
    ours, theirs = tiny.sets(rollouts, **FILTERS["all"]), sets_of(outputs)
    assert 0.5 < sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours) < 1
    assert all(token in row for token, row in zip(rollouts.token_ids.tolist(), theirs, strict=True))


# --- the second model runner ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def returned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the program second_runner.py found, by request."""
    result = tmp_path_factory.mktemp("second_runner") / "result.json"
    command = [sys.executable, second_runner.__file__, str(result)]
    done = subprocess.run(command, env=os.environ | second_runner.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("request_of", second_runner.REQUESTS)
def test_returned_sets(returned: Any, record: Any, request_of: str) -> None:
    """Over the sets that the engine returns, processed log-probabilities are the trainer's."""
    found = returned[request_of]
    assert found["difference"] < NOISE < 1e-3 < found["unfiltered"]
    assert found["from_logits"] == (request_of in FILTERS)  # the others exclude columns that the logits do not
    if request_of == "all":
        record("offline_kept_sets_and_experts", found["outputs"], request=found["request"], **found["facts"])


def test_returned_experts(returned: Any) -> None:
    assert all(found["experts"] for found in returned.values())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = ["--return-sampling-mask", "--enable-return-routed-experts", "--enable-prefix-caching"]
    with serve(Tiny(experts=4), options, **second_runner.ENVIRONMENT) as running:
        yield running


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/v1/completions", "/v1/chat/completions"])
def test_the_server_returns_both(server: Server, record: Any, path: str) -> None:
    """/inference/v1/generate returns kept sets and routed experts. The others have experts alone."""
    own, filters = Tiny(experts=4), {"top_k": 12, "top_p": 0.9, "n": 2, "max_tokens": 6}
    if path == "/inference/v1/generate":
        parameters = {"logprobs": 0, "seed": 0, **filters}
        request = {"token_ids": own.prompts[0], "sampling_params": parameters, "return_token_ids": True}
    else:
        what = {"prompt": own.prompts[0]} if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}]}
        request = {"logprobs": True, "return_token_ids": True, **what, **filters}
    response = server.post(path, **request)
    rollouts = from_vllm(response)
    assert rollouts.routed_experts is not None
    assert second_runner.same_experts(rollouts.routed_experts, own.experts(rollouts))
    if path != "/inference/v1/generate":
        assert rollouts.kept is None and difference(own, rollouts) > 0.01
        return
    assert rollouts.kept is not None and difference(own, rollouts) < NOISE
    record("server_generate_kept_sets_and_experts", [response], request=request, **facts(own, rollouts))
