"""What a loss from hidden states should take on a GPU, by plan: python -m benchmarks.gpu_model [--rows N]

A model, not a measurement. The products run at the speed of the bare products that a GPU has shown, all other memory is
moved at the speed of its copy, and nothing overlaps: both are from the committed results. Launches, waits and the lower
clock under load are left out. A table of docs/gpu.md is its output.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gspo_kernels.planning.estimate import Estimate
from gspo_kernels.planning.from_hidden import from_hidden
from gspo_kernels.planning.head_walk import Pass
from gspo_kernels.planning.shape import Batch, Shape, even_batch

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
    """Of one loss with bf16 operands; rows, products and memory are those of `gspo_kernels/planning`."""

    plan: Plan
    rows: int = ROWS
    vocab: int = VOCAB
    width: int = WIDTH

    @functools.cached_property
    def shape(self) -> Shape:
        long = self.plan.mode in ("deferred_scale", "recompute")
        gradient = self.plan.mode != "statistics"
        batch = batch_of(self.rows, 2 if long else 64, self.plan.active)
        if long:  # of responses that are active in part
            batch = even_batch(self.rows, 2, active=self.plan.active)
        return Shape(
            batch._replace(mask=gradient), self.vocab, self.width, torch.bfloat16, "cuda",
            frozen_head=not self.plan.trained, gradient=gradient,
        )  # fmt: skip

    @functools.cached_property
    def estimate(self) -> Estimate:
        return from_hidden(self.shape)

    def bytes_moved(self) -> float:
        """Beside the products. 4 a logit, 2 a gradient of one, 4 a sum, 2 an operand and its gradient."""
        found, active = Pass(self.shape), self.estimate.head.backward
        head, hidden = self.vocab * self.width, self.rows * self.width
        moved = 4 * self.rows * self.vocab + 6 * active * self.vocab  # statistics; logits -> gradients
        if self.shape.gradient:
            moved += (4 + 8 + 6) * hidden  # sums filled with 0, written at their rows, and rounded
        if found.scaled:
            moved += 16 * hidden  # gathered, scaled, and written back
        if self.plan.trained:
            additions = found.additions - 1  # each reads the sums once more
            moved += (4 * additions + 6) * head + 8 * hidden  # sums rounded at the end; hidden states gathered
        return moved

    def seconds(self, speed: Speed) -> float:
        return self.estimate.operations / speed.products + self.bytes_moved() / speed.copy


def batch_of(rows: int, sequences: int, active: float) -> Batch:
    """Responses of one length, which are active or not, evenly mixed."""
    lengths = even_batch(rows, sequences).lengths
    return Batch(rows, lengths, tuple(n * (int((i + 1) * active) - int(i * active)) for i, n in enumerate(lengths)))


def predictions(contents: Sequence[dict[str, Any]], rows: int = ROWS) -> str:
    """The table; measurements are beside predictions of the size that was measured."""
    speeds = [Speed.of(content) for content in contents]
    heads = ["predicted", "products", "GB", *(f"{speed.name}, ms" for speed in speeds)]
    if rows == ROWS:
        heads += [f"measured: {speed.name}" for speed in speeds]

    def row(plan: Plan) -> list[str]:
        work = Work(plan, rows)
        cells = [plan.title, f"{work.estimate.products:.2f}", f"{work.estimate.peak / 1e9:.2f}"]
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
