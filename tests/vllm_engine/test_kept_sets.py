"""Top-p, top-k and min-p: the kept sets, from the trainer's logits and from the engine."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import second_runner
from test_outputs import NOISE
from tiny import Tiny, check, completions, difference, generate

from gspo_kernels import KeptTokens

pytestmark = pytest.mark.plain_memory

FILTERS = {
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "all": {"top_p": 0.9, "top_k": 12, "min_p": 0.02, "temperature": 0.7},
}


@pytest.mark.parametrize("filters", FILTERS)
def test_from_logits(tiny: Tiny, engines: Any, filters: str) -> None:
    """The engine's processed log-probabilities of all tokens are minus infinity outside of its kept sets."""
    options = FILTERS[filters]
    outputs = generate(engines(max_logprobs=-1), tiny.prompts, n=8, max_tokens=24, logprobs=-1, **options)
    rollouts = check(outputs)
    temperature = options.get("temperature", 1.0)
    assert difference(tiny, rollouts, temperature) > 0.01  # over the whole vocabulary
    engine = [
        {token for token, x in row.items() if x.logprob > -math.inf}
        for each in completions(outputs)
        for row in each.logprobs
    ]
    assert tiny.sets(rollouts, **options) == engine and 1 < sum(map(len, engine)) / len(engine) < 30
    filtered = dataclasses.replace(rollouts, kept=KeptTokens.from_lists([sorted(row) for row in engine]))
    assert difference(tiny, filtered, temperature) < NOISE


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
    assert found["difference"] < NOISE < 0.01 < found["unfiltered"]
    assert found["from_logits"] == (request_of != "min_tokens")  # the end of a sequence is missing there
    if request_of == "all":
        record("offline_kept_sets_and_experts", found["outputs"], request=found["request"], **found["facts"])


def test_returned_experts(returned: Any) -> None:
    assert all(found["experts"] for found in returned.values())
