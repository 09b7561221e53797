"""Uninitialised memory is NaN: what a kernel forgets to write, or reads before writing, cannot pass by luck."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("batches", "checks", "row_batches")


@pytest.fixture(autouse=True)
def nan_filled_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty, empty_like, new_empty and resize_ give NaN (integers: the largest).

    The C++ kernels write into tensors made this way. A test marked `plain_memory` runs without it.
    """
    if request.node.get_closest_marker("plain_memory"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """The thread count is put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "plain_memory: torch.empty stays uninitialised")
