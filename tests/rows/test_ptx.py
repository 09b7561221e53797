"""The kernels' lines of PTX, carried out here: on a GPU they run, in Triton's interpreter they do not."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import pytest
import torch

triton_math = pytest.importorskip("gspo_kernels.rows.triton_math", reason="Triton is not installed")

WORD = 0xFFFFFFFF


def carry_out(code: str, results: int, arguments: list[int]) -> list[int]:
    """32-bit registers $0, $1, ... after the code: the results, from the arguments that follow them."""
    registers: dict[str, int] = {f"${results + k}": value for k, value in enumerate(arguments)}
    for statement in code.strip().strip("{}").split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        operation, operands = statement.split(None, 1)
        target, *sources = [x.strip() for x in operands.split(",")]
        values = [registers[x] if x in registers else int(x, 0) for x in sources]
        registers[target] = OPERATIONS[operation](*values)
    return [registers[f"${k}"] for k in range(results)]


def bf16(bits: int) -> float:
    found: float = struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return found


def of_bf16(choose: Callable[[float, float], float]) -> Callable[[int, int], int]:
    """max or min of both halves of two registers; NaN if one of them is."""

    def one(a: int, b: int) -> int:
        x, y = bf16(a), bf16(b)
        return 0x7FFF if x != x or y != y else a if choose(x, y) == x else b

    return lambda a, b: one(a & 0xFFFF, b & 0xFFFF) | one(a >> 16, b >> 16) << 16


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, n: a << n & WORD,
    "setp.ne.u32": lambda a, b: int(a != b),
    "selp.b32": lambda a, b, p: a if p else b,
    "selp.f32": lambda a, b, p: a if p else b,
    "shf.r.wrap.b32": lambda low, high, n: ((high << 32 | low) >> (n & 31)) & WORD,
    "max.NaN.bf16x2": of_bf16(max),
    "min.NaN.bf16x2": of_bf16(min),
}


def words(numbers: list[int], bits: int) -> list[int]:
    """Numbers of 16 or 32 bits as they lie in registers, the first in the low half."""
    if bits == 32:
        return numbers
    return [low | high << 16 for low, high in zip(numbers[::2], numbers[1::2], strict=True)]


@pytest.mark.parametrize("phase", range(8))
def test_columns_are_cut_out_of_two_accesses_of_16_bits(phase: int) -> None:
    columns = torch.randint(2**16, (16,), generator=torch.Generator().manual_seed(phase)).tolist()
    low, high = words(columns[:8], 16), words(columns[8:], 16)
    found = carry_out(triton_math.JOIN_16.value, 4, [*low, *high, *[phase] * 8])
    assert found == words(columns[phase : phase + 8], 16)


@pytest.mark.parametrize("phase", range(4))
def test_columns_are_cut_out_of_two_accesses_of_32_bits(phase: int) -> None:
    columns = torch.randint(2**32, (8,), generator=torch.Generator().manual_seed(phase)).tolist()
    found = carry_out(triton_math.JOIN_32.value, 4, [*columns, *[phase] * 4])
    assert found == columns[phase : phase + 4]


def test_every_bf16_is_widened() -> None:
    """As torch widens it; -inf, and what is lower than any logit, becomes a finite number that is."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    truth = bits.view(torch.bfloat16).float()
    found = torch.tensor(
        [x for k in range(0, 2**16, 2) for x in carry_out(triton_math.WIDEN_BF16.value, 2, [k | (k + 1) << 16])]
    )
    found = found.where(found < 2**31, found - 2**32).to(torch.int32).view(torch.float32)
    assert torch.equal(found.isnan(), truth.isnan())
    usual = truth > -9e19
    assert torch.equal(found[usual], truth[usual])
    low = ~usual & ~truth.isnan()
    assert bool((found[low] <= -9e19).all() and (found[low] > -1.1e20).all())


@pytest.mark.parametrize("bound", [0x447B, 0x3F01])
def test_every_bf16_is_brought_within_a_bound(bound: int) -> None:
    """From -bound to bound; NaN stays."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    truth = bits.view(torch.bfloat16).float().clamp(-bf16(bound), bf16(bound))
    most = bound | bound << 16
    words = [carry_out(triton_math.BOUND_BF16.value, 1, [k | (k + 1) << 16, most | 0x80008000, most])[0]
             for k in range(0, 2**16, 2)]  # fmt: skip
    found = torch.tensor([bf16(half) for word in words for half in (word & 0xFFFF, word >> 16)])
    assert torch.equal(found.isnan(), truth.isnan())
    assert torch.equal(found.nan_to_num(), truth.nan_to_num())


@pytest.mark.parametrize("code", ["WIDEN_BF16", "BOUND_BF16", "JOIN_16", "JOIN_32"])
def test_registers_are_declared(code: str) -> None:
    """ptxas would say so too; here it is said without it."""
    text: str = getattr(triton_math, code).value
    declared = set(re.findall(r"\w+", " ".join(re.findall(r"\.reg \.\w+ ([^;]*);", text))))
    used = set(re.findall(r"(?<![\w.$])[a-z]\w*(?=[,;])", re.sub(r"\.reg [^;]*;", "", text)))
    assert used == declared
