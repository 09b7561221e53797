"""verl's own worker with our loss: an actor update from its config to its parameters, against plain torch."""

from __future__ import annotations

import copy
import os
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
from verl.workers.engine import EngineRegistry
from verl.workers.utils.padding import no_padding_2_padding
from verl_cpu_platform import PlatformCPU

from gspo_kernels.integrations import verl as integration

ROOT = Path(__file__).parents[2]


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


def config_of(model: str, packed: bool) -> Any:
    found = copy.deepcopy(verl_worker.config())
    found.model.path, found.model.use_remove_padding = model, packed
    return found


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
@pytest.mark.parametrize(("packed", "vendor"), [(True, "gspo_kernels"), (False, "")])
def test_an_actor_update(packed: bool, vendor: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two optimizer steps of two micro-batches, with verl's engine and with ours."""
    monkeypatch.setenv("VERL_ENGINE_VENDOR", vendor)
    if ("cuda", "gspo_kernels") not in EngineRegistry._engines["language_model"]["fsdp2"]:
        integration.register_engines()
    worker = verl_worker.Worker(config_of(model, packed), "actor")
    worker.init_model()
    before = worker.parameters()
    arrays = verl_worker.batch()
    found = worker.compute_log_prob(verl_worker.tensordict(arrays, compute_loss=False))
    old = no_padding_2_padding(tu.get(found, "log_probs"), verl_worker.tensordict(arrays))
    metrics = verl_worker.update(worker, arrays, old)
    changes, clipped = reference(model, arrays, old, [range(4), range(4, 8)])
    check_update(before, worker.parameters(), changes)
    assert metrics["actor/gspo_kernels/clip_fraction"][0] == 0, "on-policy"
    # verl averages a metric over micro-batches: 2 responses in each of the second step's
    assert metrics["actor/gspo_kernels/clip_fraction"][1] == clipped[1] > 0


@pytest.mark.plain_memory
@pytest.mark.only_with_all
def test_two_workers_of_ray(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that verl starts with Ray find the loss by the package's entry point, and share an update."""
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    for name in ("VERL_USE_EXTERNAL_PLUGINS", "VERL_ENGINE_VENDOR"):
        monkeypatch.delenv(name, raising=False)
    variables = {
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu_platform", "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": variables})
    try:
        made = RayClassWithInitArgs(ray.remote(verl_worker.Worker), config_of(model, True), "actor")
        workers = RayWorkerGroup(RayResourcePool([2], use_gpu=False, max_colocate_count=1), made)
        workers.init_model()
        arrays, old = verl_worker.batch(), torch.full((8, verl_worker.WIDTH), -5.0)
        before = workers.parameters()
        metrics = verl_worker.update(workers, arrays, old)
        after = workers.parameters()
    finally:
        ray.shutdown()
    changes, _ = reference(model, arrays, old, [[0, 1, 4, 5], [2, 3, 6, 7]])  # each rank has its half of the batch
    assert metrics["actor/gspo_kernels/num_sequences"] == [2.0, 1.5], (
        "the mean over micro-batches; one response is empty"
    )
    for one, other in zip(before, after, strict=True):
        check_update(one, other, changes)
