"""What a loss from hidden states should take on a GPU, by plan: python -m benchmarks.gpu_model [--rows N]

A model, not a measurement. The products run at the speed of the bare products that a GPU has shown, all other memory is
moved at the speed of its copy, and nothing overlaps: both are from the committed results. Launches, waits and the lower
clock under load are left out. A table of docs/gpu.md is its output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gspo_kernels.linear.gradient_rows import CHUNKS_OF_GRADIENTS
from gspo_kernels.linear.products import PRODUCT_ROWS
from gspo_kernels.linear.schedule import chunk_size

from .gpu_page import committed
from .gpu_parts import table

ROWS, VOCAB, WIDTH = 8_192, 151_936, 4_096


@dataclass(frozen=True)
class Plan:
    """`mode`: of `gspo_kernels/linear/schedule.py`."""

    title: str
    mode: str
    trained: bool = False  # the head
    active: float = 1.0  # share of the rows
    measured: str = ""  # the case of the results


PLANS = (
    Plan("statistics: log-probabilities, no gradient", "statistics", measured="forward"),
    Plan("single_pass", "single_pass", trained=True, measured="dense"),
    Plan("single_pass, 47% of the rows active", "single_pass", trained=True, active=0.46875, measured="inactive"),
    Plan("single_pass, head frozen", "single_pass", measured="frozen_head"),
    Plan("deferred_scale: head frozen, sequences longer than a chunk", "deferred_scale"),
    Plan("recompute: sequences longer than a chunk", "recompute", trained=True),
    Plan("recompute, 47% of the rows active", "recompute", trained=True, active=0.46875),
)


@dataclass(frozen=True)
class Speed:
    name: str
    copy: float  # bytes a second, read plus written
    products: float  # floating-point operations a second

    @classmethod
    def of(cls, content: dict[str, Any]) -> Speed:
        dense = content["linear"]["cases"]["dense"]
        operations = 3 * 2 * dense["rows"] * dense["vocab"] * dense["width"]
        return cls(
            content["machine"]["gpu"].removeprefix("NVIDIA "),
            content["bandwidth"]["copy"]["bytes_per_second"],
            operations / dense["contestants"]["products"]["median"],
        )


@dataclass(frozen=True)
class Work:
    """Of one loss with bf16 operands. Bytes: 4 a logit, 2 a gradient of one, 4 a sum, 2 an operand and its gradient."""

    plan: Plan
    rows: int = ROWS
    vocab: int = VOCAB
    width: int = WIDTH

    @property
    def _gradient(self) -> bool:
        return self.plan.mode != "statistics"

    @property
    def _active(self) -> int:
        return round(self.rows * self.plan.active) if self._gradient else 0

    @property
    def _chunk_rows(self) -> int:
        """The rows of a chunk."""
        chunk = chunk_size(None, self.vocab, torch.bfloat16, "cuda", self._gradient)
        return min(chunk.max_rows, self.rows)

    @property
    def _gradient_rows(self) -> int:
        """The rows of a product with the gradients of logits, at most."""
        if not self._gradient:
            return 0
        return min(CHUNKS_OF_GRADIENTS * self._chunk_rows, self.rows) if self.plan.trained else self._chunk_rows

    def _products_of_the_head(self) -> int:
        """How many add to its gradient: gradients wait until those of a whole further chunk would not fit."""
        rows = self._active if self.plan.mode == "recompute" else self.rows
        chunks = -(-rows // self._chunk_rows)
        pending, count = 0.0, 1
        for _ in range(chunks):
            if pending + self._chunk_rows > self._gradient_rows:
                pending, count = 0.0, count + 1
            pending += self._active / chunks
        return count

    def products(self) -> float:
        """In products of all rows with the head."""
        again = self._active if self.plan.mode == "recompute" else 0
        of_gradients = (2 if self.plan.trained else 1) * self._active
        return (_padded(self.rows) + again + of_gradients) / self.rows

    def operations(self) -> float:
        return self.products() * 2 * self.rows * self.vocab * self.width

    def bytes_moved(self) -> float:
        """Beside the products."""
        head, hidden = self.vocab * self.width, self.rows * self.width
        moved = 4 * self.rows * self.vocab + 6 * self._active * self.vocab  # statistics; logits -> gradients
        if self._gradient:
            moved += (4 + 8 + 6) * hidden  # sums filled with 0, written at their rows, and rounded
        if self.plan.mode == "deferred_scale":
            moved += 16 * hidden  # gathered, scaled, and written back
        if self.plan.trained:
            additions = self._products_of_the_head() - 1  # each reads the sums once more
            moved += (4 * additions + 6) * head + 8 * hidden  # sums rounded at the end; hidden states gathered
        return moved

    def seconds(self, speed: Speed) -> float:
        return self.operations() / speed.products + self.bytes_moved() / speed.copy

    def operands(self) -> float:
        return 2.0 * (self.rows + self.vocab) * self.width

    def peak(self) -> float:
        """Bytes of memory beside the operands, what is returned included."""
        head, hidden = self.vocab * self.width, self.rows * self.width
        buffers = 4 * _padded(self._chunk_rows) * self.vocab + 2 * self._gradient_rows * self.vocab
        if not self._gradient:
            return buffers
        product = (4 + 2) * self._gradient_rows * self.width  # of hidden states, and those gathered
        sums = 4 * hidden + 4 * head * self.plan.trained
        return max(buffers + product + sums, 1.5 * sums)


def _padded(rows: int) -> int:
    return -(-rows // PRODUCT_ROWS["cuda"]) * PRODUCT_ROWS["cuda"]


def predictions(contents: Sequence[dict[str, Any]], rows: int = ROWS) -> str:
    """The table; measurements are beside predictions of the size that was measured."""
    speeds = [Speed.of(content) for content in contents]
    heads = ["predicted", "products", "GB", *(f"{speed.name}, ms" for speed in speeds)]
    if rows == ROWS:
        heads += [f"measured: {speed.name}" for speed in speeds]

    def row(plan: Plan) -> list[str]:
        work = Work(plan, rows)
        cells = [plan.title, f"{work.products():.2f}", f"{work.peak() / 1e9:.2f}"]
        cells += [f"{work.seconds(speed) * 1e3:.1f}" for speed in speeds]
        return cells + [_measured(content, plan) for content in contents] if rows == ROWS else cells

    return "\n".join(table(heads, [row(plan) for plan in PLANS]))


def _measured(content: dict[str, Any], plan: Plan) -> str:
    if not plan.measured:
        return ""
    found = content["linear"]["cases"][plan.measured]["contestants"]["ours"]
    return f"{found['median'] * 1e3:.1f} ms, {found['extra_bytes'] / 1e9:.2f} GB"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="of hidden states [N, 4096]; the head is [151936, 4096]")
    print(predictions(committed(), parser.parse_args(arguments).rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
