"""verl's own worker with our loss: an actor update from its config to its parameters, against plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import verl_worker
from torch import Tensor
from transformers import AutoModelForCausalLM
from verl.plugin.platform import get_platform, set_platform
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding
from verl.workers.engine import EngineRegistry
from verl_cpu_platform import PlatformCPU

from gspo_kernels.integrations import verl as integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return verl_worker.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = get_platform()
    set_platform(PlatformCPU())
    for name, value in verl_worker.environment().items():
        monkeypatch.setenv(name, value)
    yield
    set_platform(before)


def reference(model: str, arrays: dict[str, Tensor], old: Tensor, mini_batches: Any) -> tuple[dict[str, Tensor], Any]:
    """(changes of the parameters, the share of clipped ratios)."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = {name: x.clone() for name, x in plain.state_dict().items()}
    clipped = verl_worker.plain_update(plain, arrays, old, mini_batches)
    return {name: x - before[name] for name, x in plain.state_dict().items()}, clipped


def check_update(before: dict[str, Tensor], after: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    assert set(before) == set(changes)
    for name, change in changes.items():
        largest = float(change.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(after[name] - before[name], change, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.plain_memory
@pytest.mark.usefixtures("on_a_cpu", "group_of_one")
@pytest.mark.parametrize(("packed", "vendor"), [(True, "gspo_kernels"), (False, "gspo_kernels"), (True, "")])
def test_an_actor_update(packed: bool, vendor: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two optimizer steps of two micro-batches, with verl's engine and with ours."""
    monkeypatch.setenv("VERL_ENGINE_VENDOR", vendor)
    if ("cuda", "gspo_kernels") not in EngineRegistry._engines["language_model"]["fsdp2"]:
        integration.register_engines()
    config = verl_worker.config_of(model, f"actor_rollout_ref.model.use_remove_padding={packed}")
    worker = verl_worker.Worker(config, "actor")
    worker.init_model()
    before = worker.parameters()
    arrays = verl_worker.batch()
    found = worker.compute_log_prob(verl_worker.tensordict(arrays, compute_loss=False))
    old = no_padding_2_padding(tu.get(found, "log_probs"), verl_worker.tensordict(arrays))
    print(verl_worker.update(worker, arrays, old))
    changes, clipped = reference(model, arrays, old, [range(4), range(4, 8)])
    print(clipped, {n: (float(c.abs().max()), float((worker.parameters()[n]-before[n]-c).abs().max())) for n, c in changes.items()})
    check_update(before, worker.parameters(), changes)
