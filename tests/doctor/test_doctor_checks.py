"""The doctor's checks pass on every backend of this mode, and catch backends that are wrong in ways that hide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modes import BACKENDS, DEFAULT_MODE, DEVICE, GPU, INTERPRETED
from torch import Tensor

from gspo_kernels.doctor import checks, speed
from gspo_kernels.doctor.findings import Check
from gspo_kernels.doctor.oracle import Sizes
from gspo_kernels.linear.products import Products
from gspo_kernels.rows import torch_rows
from gspo_kernels.rows.types import Rows, RowStats, TokenSlope, Upstream

CPU = torch.device("cpu")
HERE = torch.device(DEVICE)
DTYPES = ["fp32"] if INTERPRETED else list(checks.DTYPES)  # the interpreter takes seconds for each


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_pass(backend: str, dtype: str) -> None:
    found = checks.check(HERE, backend, dtype)
    assert found.passed and not found.raised, (found.raised, [each.detail for each in found.measures])
    assert {each.name for each in found.measures} == {
        *checks.SHOWN,
        "mean error of others",
        "zero rows",
        "loss from hidden",
    }
    assert all(each.passed and not each.detail for each in found.measures)


@GPU
def test_speed_on_a_gpu() -> None:
    found = speed.speed(HERE)
    assert not found.problem and len(found.timings) == 4 and all(0.0 < each.copy_share < 2.0 for each in found.timings)


def own_columns(rows: Rows) -> Tensor:
    ids = rows.token_ids.clamp(0, rows.vocab_size - 1)
    return torch.zeros(*ids.shape, rows.vocab_size, dtype=torch.bool).scatter_(-1, ids[..., None], True)


def columns_scaled(tail: float, token: float = 1.0) -> Callable[[pytest.MonkeyPatch], None]:
    """The gradient of the other columns, or of the token's, is off by a factor."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = torch_rows.backward

        def backward(rows: Rows, stats: RowStats, upstream: Upstream, gradient: Tensor) -> None:
            right(rows, stats, upstream, gradient)
            if rows.row_indices is None:
                columns = gradient[..., : rows.vocab_size]
                columns.copy_(columns.float() * torch.where(own_columns(rows), token, tail))

        patch.setattr(torch_rows, "backward", backward)

    return apply


def next_token(patch: pytest.MonkeyPatch) -> None:
    right = torch_rows.forward

    def forward(rows: Rows) -> RowStats:
        return right(rows._replace(token_ids=(rows.token_ids + 1) % rows.vocab_size))

    patch.setattr(torch_rows, "forward", forward)


def of_statistics(**wrong: Callable[[Tensor, Rows], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        right = torch_rows.forward

        def forward(rows: Rows) -> RowStats:
            stats = right(rows)
            for name, function in wrong.items():
                getattr(stats, name).copy_(function(getattr(stats, name), rows))
            return stats

        patch.setattr(torch_rows, "forward", forward)

    return apply


def masked_rows_written(patch: pytest.MonkeyPatch) -> None:
    right = torch_rows.backward

    def backward(rows: Rows, stats: RowStats, upstream: Upstream, gradient: Tensor) -> None:
        right(rows, stats, upstream, gradient)
        if rows.mask is not None:
            gradient[~rows.mask] = 1e-20

    patch.setattr(torch_rows, "backward", backward)


def one_pass_wrong(patch: pytest.MonkeyPatch) -> None:
    right = torch_rows.forward_backward

    def both(rows: Rows, upstream: Upstream, gradient: Tensor, slope: TokenSlope | None = None) -> RowStats:
        stats = right(rows, upstream, gradient, slope)
        gradient.mul_(1.02)
        return stats

    patch.setattr(torch_rows, "forward_backward", both)


def raises(patch: pytest.MonkeyPatch) -> None:
    def forward(rows: Rows) -> RowStats:
        raise RuntimeError("illegal memory access")

    patch.setattr(torch_rows, "forward", forward)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "others scaled": (of_statistics(lse=lambda x, rows: x - 1e-3), "mean error of others"),
    "others left out": (columns_scaled(0.0), "gradient of others"),
    "others of the wrong sign": (columns_scaled(-1.0), "gradient of others"),
    "token scaled": (columns_scaled(1.0, token=1.01), "gradient of token"),
    "next token": (next_token, "log-probability"),
    "NaN": (of_statistics(logprobs=lambda x, rows: x * torch.nan), "log-probability"),
    "entropy in bits": (of_statistics(entropy=lambda x, rows: x / 0.6931), "entropy"),
    "log-probabilities in bf16": (of_statistics(logprobs=lambda x, rows: x.bfloat16().float()), "log-probability"),
    "masked rows": (masked_rows_written, "zero rows"),
    "one pass": (one_pass_wrong, "mean error of others"),
    "raises": (raises, ""),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mutant", MUTANTS)
@DEFAULT_MODE
def test_a_wrong_backend_is_caught(mutant: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, name = MUTANTS[mutant]
    monkeypatch.setattr(checks, "SIZES", {"cpu": Sizes(vocab=1_003, head_vocab=131, width=16)})
    apply(monkeypatch)
    found = checks.check(CPU, "reference", dtype)
    assert not found.passed
    wrong = {each.name: each.detail for each in found.measures if not each.passed}
    if name:
        assert "got" in wrong[name], wrong
    else:
        assert found.raised == "RuntimeError: illegal memory access"


@DEFAULT_MODE
@pytest.mark.parametrize("operand", ["hidden", "head"])
def test_a_wrong_product_is_caught(operand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "hidden_gradient" if operand == "hidden" else "weight_gradient"
    right = getattr(Products, name)

    def wrong(self: Any, gradient: Tensor, *arguments: Any, **options: Any) -> Any:
        return right(self, gradient * 1.001, *arguments, **options)

    monkeypatch.setattr(Products, name, wrong)
    found = checks.check(CPU, "reference", "fp32")
    assert [each.name for each in found.measures if not each.passed] == [f"gradient of {operand}"]


def test_what_to_do_about_a_failure() -> None:
    def outcome(backend: str, passed: bool, raised: str = "") -> Check:
        return Check("cuda:0", backend, "bf16", passed, (), raised, "")

    triton, reference = outcome("triton", False), outcome("reference", True)
    said = [each.advice for each in checks.with_advice([triton, reference])]
    assert "pass backend='reference', which is right here" in said[0] and checks.ISSUES in said[0] and not said[1]
    (alone,) = checks.with_advice([triton])
    assert "backend=" not in alone.advice and checks.ISSUES in alone.advice
    (refused,) = checks.with_advice([outcome("native", False, "ValueError: GSPO_KERNELS_ISA: expected avx512")])
    assert refused.advice == "correct or unset the variable that the error names"
