"""Optional fields of `Rows`: a backend that does not honour one refuses it by name, or is not chosen."""

from __future__ import annotations

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor

from gspo_kernels.rows import cpu_rows, dispatch, torch_rows
from gspo_kernels.rows.types import OPTIONAL_FIELDS, Rows


def choose(rows: Rows, backend: str | None) -> dispatch.Backend:
    return dispatch.choose(rows.logits, backend, rows.fields_set())


pytestmark = DEFAULT_MODE
LOGITS = torch.zeros(1, 3, 5)
ROWS = Rows(LOGITS, torch.zeros(1, 3, dtype=torch.int64), None, torch.ones((), dtype=torch.float64), 5)


@pytest.fixture
def only_torch_honours(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Rows with a field that plain torch alone computes with."""
    for backend in dispatch.BACKENDS:
        monkeypatch.setattr(backend, "honours", frozenset({"row_indices"} if backend is torch_rows else ()))
    dispatch._warn_once.cache_clear()
    return ROWS._replace(row_indices=torch.arange(3))


def test_a_field_that_a_backend_does_not_honour_is_refused_by_name(only_torch_honours: Rows) -> None:
    expected = r"backend: expected .* got 'native', but .*it does not support row_indices; 'reference' does"
    with pytest.raises(ValueError, match=expected):
        choose(only_torch_honours, "native")
    assert choose(only_torch_honours, "reference") is torch_rows


@pytest.mark.skipif(bool(cpu_rows.unavailable_reason()), reason="the C++ extension is not built")
def test_a_backend_that_does_not_honour_a_field_is_not_chosen(only_torch_honours: Rows) -> None:
    assert choose(ROWS, None) is cpu_rows
    with pytest.warns(UserWarning, match="plain torch, many times slower: 'native' does not support row_indices"):
        assert choose(only_torch_honours, None) is torch_rows
    lines = dispatch.compare(LOGITS, None, only_torch_honours.fields_set()).splitlines()
    assert lines[0].startswith("reference")
    assert any(line.startswith("native") and "does not support row_indices" in line for line in lines)


def test_the_warning_of_a_slow_default_is_no_graph_break(only_torch_honours: Rows) -> None:
    """Where there is no extension, the first loss may be a compiled one, with fullgraph=True."""

    def name(logits: Tensor) -> tuple[str, Tensor]:
        return dispatch.choose(logits, None, only_torch_honours.fields_set()).name, logits + 1.0

    with pytest.warns(UserWarning, match="plain torch, many times slower"):
        assert torch.compile(name, backend="eager", fullgraph=True)(LOGITS)[0] == "reference"


def test_backends_honour_fields_that_exist() -> None:
    for backend in dispatch.BACKENDS:
        assert backend.honours <= set(OPTIONAL_FIELDS), backend.name
