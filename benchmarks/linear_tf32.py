"""What TF32 does to GSPO's clip decisions, simulated on a CPU: python -m benchmarks.linear_tf32 [--smoke]

A GPU that may use TF32 multiplies float32 operands with 10 of their 23 explicit bits, and adds in float32. Here the
operands of the same problems as in `linear_precision.py`, in float32, lose these bits before a float32 product: rounded
to nearest, or cut off. Takes half a minute. The rows are those of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import linear_precision as precision
from .gpu_parts import table

_LOST = 13  # bits


def exact(operand: Tensor) -> Tensor:
    return operand


def cut_off(operand: Tensor) -> Tensor:
    return (operand.view(torch.int32) & -(1 << _LOST)).view(torch.float32)


def to_nearest(operand: Tensor) -> Tensor:
    """Ties away from 0, as the instruction that converts to TF32 does."""
    return cut_off((operand.view(torch.int32) + (1 << _LOST - 1)).view(torch.float32))


ROUNDINGS = {"float32": exact, "TF32, operands rounded": to_nearest, "TF32, bits cut off": cut_off}


def measure(smoke: bool) -> list[list[str]]:
    """A row of the table for each rounding."""
    moves, width, vocab = (
        (precision.SMOKE_MOVES, precision.SMOKE_WIDTH, precision.SMOKE_VOCAB)
        if smoke
        else (precision.MOVES, precision.WIDTH, precision.VOCAB)
    )
    found = []
    problems = [precision.build(length, move, width, vocab, torch.float32) for length, move in moves.items()]
    for name, rounding in ROUNDINGS.items():
        of_lengths = [precision.judge(problem, _logprobs(rounding)) for problem in problems]
        errors = ", ".join(f"{x['log_ratio_error']:.1e}" for x in of_lengths)
        wrong = ", ".join(str(x["wrong"]) for x in of_lengths)
        found.append([name, f"{max(x['rms'] for x in of_lengths):.1e}", errors, wrong])
    return found


def _logprobs(rounding: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        head = rounding(weight).T
        parts = zip(hidden.flatten(0, 1).split(1024), token_ids.flatten().split(1024), strict=True)
        found = [-torch.nn.functional.cross_entropy(rounding(x) @ head, ids, reduction="none") for x, ids in parts]
        return torch.cat(found).view(token_ids.shape)

    return logprobs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear_tf32", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    rows = measure(parser.parse_args(arguments).smoke)
    heads = ["error of a log-probability (rms)", "of log s, at 32, 128, 512 tokens"]
    print(*table(["float32 operands", *heads, f"wrong clips of {precision.SEQUENCES}"], rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
