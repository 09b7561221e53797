"""Fixtures of the trainers' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_trainers import Build, save_model, trainer_of


@pytest.fixture(scope="session")
def trl_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small models, by kind."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind) for kind in ("qwen3", "tied", "moe")}


@pytest.fixture
def one_thread(threads: None) -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture
def build(trl_models: dict[str, str], tmp_path: Path) -> Build:
    """A trainer of class `cls` on the model `kind`."""

    def make(cls: Any, kind: str = "qwen3", config: Any = None, **options: Any) -> Any:
        return trainer_of(cls, trl_models[kind], tmp_path, config, **options)

    return make
