"""Planned peaks against those that torch's profiler counts on a CPU, and against those of committed GPU runs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE

from benchmarks import planned
from benchmarks.gpu_page import committed
from benchmarks.planned import CASES, Case, estimate_of_gpu, prepare, small
from gspo_kernels.linear import chunked_loss, head, head_term
from gspo_kernels.linear.buffers import Buffers, buffers_for
from gspo_kernels.planning import from_hidden
from gspo_kernels.planning.from_logits import plain_torch
from gspo_kernels.rows import cpu_rows

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(bool(cpu_rows.unavailable_reason()), reason="plain torch takes memory for float64 numbers"),
]

SHORT, LONG = 0.98, 1.01  # planned / measured: what is held of a row is planned by a bound
SMALL = [small(case) for case in CASES if case.dtype == "fp32"]
SMALL += [replace(case, dtype=dtype) for case in SMALL for dtype in ("bf16", "fp16") if case.way in ("hidden", "kept")]
NARROW = replace(SMALL[4], title="a narrow vocabulary", vocab=256, chunk_rows=256)  # products take more than logits
SMALL.append(NARROW)


def peaks_of_tensors(runs: Mapping[str, Callable[[], Any]]) -> dict[str, int]:
    """The most bytes that torch's allocator held in each call beyond those before; what it returns is counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for name, run in runs.items():
            with torch.profiler.record_function(name):
                kept = run()
            del kept
    assert profile.profiler is not None
    events = list(profile.profiler.kineto_results.events())
    windows = {event.name(): (event.start_ns(), event.end_ns()) for event in events if event.name() in runs}
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")

    def peak(start: int, stop: int) -> int:
        return max(itertools.accumulate(bytes for at, bytes in changes if start <= at <= stop))

    return {name: peak(*windows[name]) for name in runs}


def ratios(cases: Sequence[Case]) -> dict[str, float]:
    """Planned / measured."""
    runs = {f"{case.title}, {case.dtype}": prepare(case) for case in cases}
    for run in runs.values():
        run()  # what is made once
    peaks = peaks_of_tensors(runs)
    return {name: case.estimate().peak / peak for case, (name, peak) in zip(cases, peaks.items(), strict=True)}


@pytest.fixture(autouse=True)
def of_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler does not see what the extension allocates."""
    monkeypatch.setattr(from_hidden, "workspace_bytes", lambda *sizes: 0)
    monkeypatch.setitem(os.environ, "KINETO_LOG_LEVEL", "5")


def test_peaks_are_as_planned() -> None:
    found = ratios(SMALL)
    assert len(found) == len(SMALL)
    assert {name: ratio for name, ratio in found.items() if not SHORT < ratio < LONG} == {}


def test_no_buffer_could_be_forgotten() -> None:
    """Each part of a peak is so large in some case that the comparison would fail without it."""
    of_case = [case.estimate() for case in SMALL]
    for part in {part for found in of_case for part, bytes in found.held.items() if bytes}:
        share = max(found.held.get(part, 0) / found.peak for found in of_case)
        assert share > 1 - SHORT / LONG or part == "rows", part


@pytest.mark.parametrize("mutant", ["a second chunk of logits", "products are kept", "scales in one part"])
def test_a_buffer_more_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = NARROW

    def two_chunks(*arguments: Any, **options: Any) -> Buffers:
        found = buffers_for(*arguments, **options)
        return found._replace(logits=2 * found.logits)

    if mutant == "a second chunk of logits":
        monkeypatch.setattr(head, "buffers_for", two_chunks)
    elif mutant == "products are kept":
        original = head_term.HeadTerm.add_gradients

        def keeping(self: Any, gradient: Any, indices: Any, *rest: Any) -> None:
            kept = gradient.new_empty(len(indices), self.hidden.shape[1])
            original(self, gradient, indices, *rest)
            del kept

        monkeypatch.setattr(head_term.HeadTerm, "add_gradients", keeping)
    else:
        case = next(case for case in SMALL if case.title == "the same, head frozen")
        original_scale = head.Head.scale_hidden

        def in_one_part(self: Any, rows: Any, coefficients: Any) -> None:
            kept = torch.empty(3, *self.rows.hidden.shape)
            original_scale(self, rows, coefficients)
            del kept

        monkeypatch.setattr(chunked_loss.Head, "scale_hidden", in_one_part)
    (found,) = ratios([case]).values()
    assert found < SHORT


def test_peaks_of_an_h100() -> None:
    """Of bf16 at N = 8,192, V = 151,936 and D = 4,096, with chunks of several sizes. An H200 ran an older package."""
    (content,) = [x for x in committed() if "H100" in x["machine"]["gpu"]]
    linear = content["linear"]
    for work, case in linear["cases"].items():
        assert estimate_of_gpu(case).peak == pytest.approx(case["contestants"]["ours"]["extra_bytes"], rel=0.005), work
        for bytes, found in linear["chunks"].get(work, {}).items():
            assert estimate_of_gpu(case, int(bytes)).peak == pytest.approx(found["extra_bytes"], rel=0.005), (
                work,
                bytes,
            )
    dense = linear["cases"]["dense"]
    eager = dense["contestants"]["eager"]["extra_bytes"]
    assert plain_torch(estimate_of_gpu(dense).shape).peak == pytest.approx(eager, rel=0.001)
    assert len(list(planned.of_gpus())) == 10
