"""The host's own time for a loss and its backward: Python before, between and after the launches.

    python -m benchmarks.host             medians, in milliseconds
    python -m benchmarks.host --profile   where the time goes, by function

Below some thousand rows a GPU waits for the host. The Triton kernels do nothing here and the tensors are on the CPU, so
that any machine can measure. The time of Triton's own launcher and of the driver is to be added for each launch.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch

import gspo_kernels
from gspo_kernels.losses import triton_stage_kernels
from gspo_kernels.rows import triton_rows

LOSSES = ("gspo", "gspo_token", "grpo", "ppo")


class NoKernel:
    """Stands for a Triton kernel: `kernel[grid](...)` does nothing."""

    def __getitem__(self, grid: Any) -> NoKernel:
        return self

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        pass


@contextmanager
def without_launches() -> Iterator[None]:
    """CPU tensors are treated like a GPU's: Triton launches, which do nothing here, and no value is read."""
    names = [name for name in vars(triton_stage_kernels) if name.endswith("_kernel") and not name.startswith("_")]
    stage: Any = dict.fromkeys(names, NoKernel())
    with ExitStack() as patched:
        patched.enter_context(mock.patch.multiple(triton_stage_kernels, **stage))
        patched.enter_context(mock.patch.dict(triton_rows.kernels(), dict.fromkeys(triton_rows.LAUNCH, NoKernel())))
        for module in ("base.layout", "losses.triton_stage", "rows.operators"):
            patched.enter_context(mock.patch(f"gspo_kernels.{module}.may_read", lambda tensor: False))
        patched.enter_context(mock.patch.object(triton_rows, "INTERPRETED", True))
        yield


def step_of(name: str, on_policy: bool) -> Callable[[], None]:
    """Forward and backward of a padded batch with a mask; its sizes do not matter."""
    sequences, tokens, vocab = 8, 16, 64
    logits = torch.zeros(sequences, tokens, vocab, requires_grad=True)
    ids = torch.zeros(sequences, tokens, dtype=torch.int64)
    advantages, old = torch.ones(sequences), None if on_policy else torch.zeros(sequences, tokens)
    mask, root = torch.ones(sequences, tokens, dtype=torch.bool), torch.ones(())
    function = getattr(gspo_kernels, f"{name}_loss")

    def step() -> None:
        loss, _ = function(logits, ids, advantages, old, mask=mask, backend="triton")
        torch.autograd.grad(loss, logits, root)

    return step


def milliseconds(step: Callable[[], None], calls: int) -> list[float]:
    """Of each call, after some to warm up."""
    for _ in range(20):
        step()
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of the losses, launches left out.")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--profile", action="store_true", help="print the functions that take the time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with without_launches():
        print("milliseconds forward + backward, launches left out\n")
        print(f"{'loss':<12}{'policy':<8}{'median':>8}{'fastest':>9}")
        for name, on_policy in itertools.product(LOSSES, (False, True)):
            found = milliseconds(step_of(name, on_policy), options.calls)
            print(f"{name:<12}{'on' if on_policy else 'off':<8}{median(found):>8.3f}{min(found):>9.3f}")
        if options.profile:
            for on_policy in (False, True):
                step, profile = step_of("gspo", on_policy), cProfile.Profile()
                profile.runcall(milliseconds, step, options.calls)
                pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
