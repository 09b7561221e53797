"""The three modes of the suite: the same tests on other kernels.

    pytest                                     C++ kernels and reference, CPU tensors
    TRITON_INTERPRET=1 pytest                  Triton kernels, CPU tensors, run by Triton's interpreter: no GPU needed
    GSPO_KERNELS_TEST_DEVICE=cuda pytest       Triton kernels and reference, CUDA tensors

Batches and the oracle's truth are CPU tensors in every mode. `on_device` brings what the package is given to where it
runs; `checks.py` brings results back.

A product of parameters is thinned to a part that still holds every pair of their values (`every_pair`). An objective
counts there by its attributes (`batches.attributes_of`): what is right for one that reads log-probabilities, in one
layout, with one backend, is right for all such. Of each attribute there is at least one objective (`batches.KINDS`).
The mathematics of a loss are its own. Where a test is about them, it is marked `each_objective`: each is met at least
once; or `every_objective`: each meets every other value. The whole product runs on a GPU, and with `pytest --all`.

The interpreter walks a kernel in numpy: a row costs it milliseconds where the C++ kernels take microseconds. There

- an objective counts by two attributes, what has a ratio and whether it reads log-probabilities; all others are met
  once, and three times instead of with every value;
- what is long only for the sake of length is shorter, and still crosses a kernel's block boundaries (`sized`);
- what runs no Triton kernel is skipped, for the default mode has it (`needs`, `DEFAULT_MODE`, `NOT_INTERPRETED`).

Tolerances are the same everywhere.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Collection, Hashable, Sequence
from typing import TypeVar

import pytest
import torch
from torch import Tensor

Anything = TypeVar("Anything")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it
DEVICE = torch.device(os.environ.get("GSPO_KERNELS_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
WHOLE = ON_GPU or os.environ.get("GSPO_KERNELS_TEST_ALL") == "1"  # --all, which sets it: nothing is thinned
if ON_GPU and INTERPRETED:
    raise RuntimeError("TRITON_INTERPRET and GSPO_KERNELS_TEST_DEVICE: expected one of them, for they are two modes")

BACKENDS = ["triton"] if INTERPRETED else ["triton", "reference"] if ON_GPU else ["native", "reference"]
KERNELS = BACKENDS[0]  # the kernels this mode is about, and the choice where no backend is named

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # what kernels take
COMBINATIONS = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES]
if "reference" in BACKENDS:
    COMBINATIONS.append(("reference", torch.float64))

by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_combination = pytest.mark.parametrize(
    ("backend", "dtype"), COMBINATIONS, ids=[f"{b}-{str(d).removeprefix('torch.')}" for b, d in COMBINATIONS]
)


def needs(backend: str) -> pytest.MarkDecorator:
    """For a test about one backend."""
    return pytest.mark.skipif(backend not in BACKENDS, reason=f"this mode does not run the {backend} backend")


DEFAULT_MODE = pytest.mark.skipif(
    INTERPRETED or ON_GPU, reason="runs on CPU tensors and no kernel of this mode: the default mode has it"
)
NOT_INTERPRETED = pytest.mark.skipif(INTERPRETED, reason="runs no Triton kernel: the default mode has it")
TRITON_MODES = pytest.mark.skipif(KERNELS != "triton", reason="needs TRITON_INTERPRET=1, or a GPU")
GPU = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: GSPO_KERNELS_TEST_DEVICE=cuda")


def on_device(values: Tensor) -> Tensor:
    return values.to(DEVICE)


def sized(usual: Anything, interpreted: Anything) -> Anything:
    """`usual`, but in the interpreter something smaller that serves the same purpose."""
    return interpreted if INTERPRETED else usual


def every_pair(points: Sequence[Sequence[Collection[Hashable]]]) -> list[int]:
    """Which of `points` to keep, so that any two values that stand together in one still stand together in one kept.

    A point has for each parameter of a test a value, or several that it stands for: those are not paired with each
    other. Most faults are of one value, or of two together. Greedy and always the same: the point with the most pairs
    not seen so far, the first of equals.
    """
    bits = dict[frozenset[tuple[int, Hashable]], int]()  # of each pair, and of each value, one
    pairs = []
    for point in points:
        named = [[(parameter, value) for value in values] for parameter, values in enumerate(point)]
        found = [pair for a, b in itertools.combinations(named, 2) for pair in itertools.product(a, b)]
        found += [(value,) for values in named for value in values]  # type: ignore[misc]
        pairs.append(functools.reduce(int.__or__, (bits.setdefault(frozenset(x), 1 << len(bits)) for x in found), 0))
    kept, missing = [], (1 << len(bits)) - 1
    while missing:
        best = max(range(len(points)), key=lambda k: (pairs[k] & missing).bit_count())
        kept.append(best)
        missing &= ~pairs[best]
    return sorted(kept)
