"""What the parts of a GPU run compute, as far as a CPU can test it: what is counted, swept, parsed and restored."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_kernels.rows import cuda_rows
from gspo_kernels.rows.triton_rows import LAUNCH, Launch

from . import gpu_counters as counters
from . import gpu_linear as linear
from . import gpu_meter as meter
from . import gpu_profile as profile
from . import gpu_sanitizer as sanitizer
from . import gpu_speed as speed
from . import gpu_variants as variants
from . import libraries
from .cases import DENSE, build, linear_smoke
from .contestants import BY_NAME as AT_HOME
from .gpu_parts import Absent, Context
from .linear import BY_NAME as LINEAR


class Counting(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def prepared(name: str) -> tuple[Callable[[], object], Tensor]:
    """A contestant that is ready to run, and a leaf."""
    if name.startswith("linear_"):
        of_hidden = build(linear_smoke(DENSE, "fp32"))
        return LINEAR[name.removeprefix("linear_")].prepare(of_hidden), of_hidden.leaves[0]
    problem = speed.build_on("cpu", "gspo", 16)
    return AT_HOME[name].prepare(problem), problem.logits


@pytest.mark.parametrize("name", ["ours", "ours_fresh", "eager", "linear_ours", "linear_eager"])
def test_no_call_makes_the_root_of_its_backward(name: str) -> None:
    """Without a given root `autograd.grad` fills a tensor of the loss's shape: a launch that no contestant needs."""
    run, leaf = prepared(name)
    with Counting() as counting:
        run()
    assert counting.counts["aten.ones_like"] == 0
    with Counting() as counting:
        torch.autograd.grad((leaf * 1.0).sum(), leaf)
    assert counting.counts["aten.ones_like"] == 1  # the operator that is counted


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context([], smoke=True, records=str(tmp_path / "records"))


def recorded(context: Context) -> dict[tuple[str, ...], Any]:
    lines = [json.loads(line) for line in Path(context.records).read_text().splitlines()]
    return {tuple(line["at"]): line["value"] for line in lines if "at" in line}


# ---- the meter


class Fake:
    """A GPU that notes what is queued, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, l2: int) -> None:
        self.queued: list[str] = []
        make_zeros, add_up = torch.zeros, torch.sum

        def sum_up(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.queued.append(f"read {values.numel() * values.element_size()} bytes")
            return add_up(values[:1], *args, **kwargs)

        class Event:
            def __init__(event, enable_timing: bool) -> None: ...
            def record(event) -> None:
                self.queued.append("event")

            def synchronize(event) -> None: ...
            def elapsed_time(event, end: Any) -> float:
                return 2.0

        monkeypatch.setattr(torch, "zeros", lambda *args, device, **kw: make_zeros(*args, **kw))
        monkeypatch.setattr(torch, "sum", sum_up)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queued.append("wait"), raising=False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        properties = type("Properties", (), {"L2_cache_size": l2})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(("l2", "swept"), [(50 << 20, 256 << 20), (126 << 20, 504 << 20)])
def test_l2_is_swept_by_reads_before_the_timed_call(l2: int, swept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Fake(monkeypatch, l2)
    assert meter.CudaMeter().timed(lambda: gpu.queued.append("call")) == 2e-3
    assert gpu.queued == [f"read {swept} bytes", "wait", "event", "call", "event"]


# ---- contestants


def test_out_of_memory_costs_one_contestant(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of eager torch at 32,768 rows: its error is recorded, and the contestants after it are measured."""

    def fail(problem: Any) -> Any:
        def run() -> Any:
            raise torch.cuda.OutOfMemoryError("tried to allocate 20 GiB")

        return run

    eager = dataclasses.replace(AT_HOME["eager"], prepare=fail)
    chosen = (speed.BY_NAME["ours"], eager, speed.BY_NAME["copy"])
    monkeypatch.setattr(speed, "CONTESTANTS", chosen)
    context.arguments = ["16", "gspo"]
    assert speed.speed(context)
    found = recorded(context)["cases", "gspo-16"]
    assert found["errors"] == {"eager": "out of memory"} and found["contestants"].keys() == {"ours", "copy"}


def test_this_package_and_the_copy_alone(context: Context) -> None:
    context.arguments = ["16", "forward:ours"]
    assert speed.speed(context)
    found = recorded(context)["cases", "forward-16"]
    assert found["contestants"].keys() == {"ours", "copy"} and {"eager", "liger", "trl"} <= found["absent"].keys()


# ---- profiles


def events(*names_and_times: tuple[str, float, float]) -> list[profile.Event]:
    return [profile.Event(*each) for each in names_and_times]


def test_a_profile_has_what_ran_between_the_waits() -> None:
    wait = "void at::cuda::(anonymous namespace)::spin_kernel(long)"
    found = profile.between_waits(
        events(
            ("reduce", 0, 1),
            (wait, 1, 3),
            ("forward_kernel", 3, 4),
            (wait, 4, 5),
            ("Memcpy DtoD", 5, 6),
            ("reduce", 6, 7),
            (wait, 7, 8),
            ("forward_kernel", 8, 10),
            (wait, 10, 11),
            ("Memcpy DtoD", 11, 12),
        )
    )
    assert [[(e.name, e.end - e.start) for e in call] for call in found] == [
        [("forward_kernel", 1)],
        [("forward_kernel", 2)],
    ]
    with pytest.raises(RuntimeError, match="shows 0 waits"):
        profile.between_waits([])


def test_summary_of_a_profile() -> None:
    problem = speed.build_on("cpu", "gspo", 16)
    size = problem.logits_bytes
    fill = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>(int)"
    )
    call = events(
        ("forward_kernel", 0.0, 1.0), ("sequence_kernel", 1.5, 1.6), ("batch_kernel", 1.6, 1.7), (fill, 1.7, 1.8),
        ("backward_kernel", 2.0, 4.0),
    )  # fmt: skip
    found = profile.summary([call, call, call], problem, 3.0, float(size))
    assert found["launches"] == 5 and found["span_seconds"] == 4.0
    assert found["gap_seconds"] == pytest.approx(0.7) and found["device_seconds"] == pytest.approx(3.3)
    by_name = {kernel["name"]: kernel for kernel in found["kernels"]}
    assert by_name["forward_kernel"]["share_of_copy"] == 1.0  # its own bytes in a second, as the copy
    assert by_name["backward_kernel"]["bytes"] == 2 * size and by_name["backward_kernel"]["share_of_copy"] == 1.0
    assert by_name["at::native::vectorized_elementwise_kernel FillFunctor"]["bytes"] is None
    assert found["share_of_copy"] == pytest.approx(3 / 4)


def test_bytes_of_kernels_follow_mask_and_coefficients() -> None:
    problem = speed.build_on("cpu", "gspo_inactive", 16)
    size, active = problem.logits_bytes, float((problem.coefficients != 0).double().mean())
    assert 0.0 < active < 1.0
    assert profile.bytes_of("forward_kernel", problem) == size
    assert profile.bytes_of("backward_kernel", problem) == (1.0 + active) * size
    assert profile.bytes_of("forward_backward_kernel", problem) == 2.0 * size
    assert profile.bytes_of("void gspo::gpu::one_read<__nv_bfloat16, 256>(gspo::gpu::OneRead)", problem) == 2.0 * size
    assert profile.bytes_of("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8>(float*)", problem) is None
    assert profile.bytes_of("Memcpy DtoD (Device -> Device)", problem) is None
    problem = speed.build_on("cpu", "gspo_kept_on_policy", 16)  # 8 of 100 columns
    assert profile.bytes_of("kept_forward_kernel", problem) == pytest.approx(0.08 * problem.logits_bytes)
    assert profile.bytes_of("kept_backward_kernel", problem) == pytest.approx(1.08 * problem.logits_bytes)
    assert problem.units == pytest.approx(1.08)


def test_profile_without_cupti_keeps_the_time_of_the_whole(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(profile, "_on_the_cpu", refuse)
    context.arguments = ["16", "gspo", "grpo_cuda"]
    assert profile.run(context)
    found = recorded(context)
    assert "INSUFFICIENT" in found["profile", "gspo"]["error"] and found["profile", "gspo"]["whole_seconds"] > 0
    assert "absent" in found["profile", "grpo_cuda"]


# ---- counters

_ROW = '"{}","4711","python3.12","{}","1","(128, 1, 1)","9.0","Command line profiler metrics","{}","{}","{}"'
CSV = "\n".join(
    [
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)",
        "a line of the process",
        '"ID","Process ID","Process Name","Kernel Name","Stream","Block Size","CC","Section Name","Metric Name",'
        '"Metric Unit","Metric Value"',
        _ROW.format(0, "forward_kernel", "dram__bytes_read.sum", "byte", "641,777,664"),
        _ROW.format(0, "forward_kernel", "gpu__time_duration.sum", "us", "230.50"),
        _ROW.format(0, "forward_kernel", "lts__t_sectors_op_read.sum", "sector", "20,000,000"),
        _ROW.format(0, "forward_kernel", "lts__t_sectors_op_read_lookup_hit.sum", "sector", "5,000,000"),
        _ROW.format(0, "forward_kernel", "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active", "%", "n/a"),
        _ROW.format(1, "forward_backward_kernel", "dram__bytes_read.sum", "Gbyte", "1.2"),
        _ROW.format(2, "forward_backward_kernel", "dram__bytes_read.sum", "Mbyte", "700"),
    ]
)


def test_counters_are_read_from_the_csv_of_ncu() -> None:
    found = counters.by_item(counters.parse(CSV.splitlines()))
    assert found["forward"] == {
        "dram__bytes_read.sum": 641_777_664,
        "gpu__time_duration.sum": pytest.approx(230.5e-6),
        "lts__t_sectors_op_read.sum": 20e6,
        "lts__t_sectors_op_read_lookup_hit.sum": 5e6,
    }
    assert found["forward_backward"] == {"dram__bytes_read.sum": 1.2e9}  # in the order of the launches
    assert found["forward_backward_fresh"] == {"dram__bytes_read.sum": 7e8}
    result = counters.derived(found["forward"])
    assert result["l2_hit_rate_of_reads"] == 0.25
    assert result["read_in_logits"] == pytest.approx(1.0, abs=1e-4)
    assert counters.parse(["==ERROR== nothing"]) == []


def test_an_unknown_metric_costs_itself_alone() -> None:
    said = '==ERROR== Failed to find metric lts__t_sectors_op_read.sum\n"0","lts__t_sector_hit_rate.pct"'
    left = counters.known(counters.METRICS, said)
    assert set(counters.METRICS) - set(left) == {"lts__t_sectors_op_read.sum"}  # and not those whose names go on
    assert counters.known(counters.METRICS, "Segmentation fault") == counters.METRICS[: counters.SURE]


NCU = """#!/usr/bin/env python3
import sys
words = sys.argv[1:]
assert words[words.index("--kernel-name") + 1].startswith("regex:") and words[-2:] == ["forward", "one_read"]
metrics = words[words.index("--metrics") + 1].split(",")
if "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active" in metrics:
    print("==ERROR== Failed to find metric sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active")
    sys.exit(1)
print('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"')
for i, kernel in enumerate(("forward_kernel", "one_read")):
    for name in metrics:
        print(f'"{i}","{kernel}","{name}","","1,000.5"')
"""


def on_a_gpu(context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ncu: str) -> Context:
    tool = tmp_path / "cuda" / "bin" / "ncu"
    tool.parent.mkdir(parents=True)
    tool.write_text(ncu)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    context.smoke = False
    return context


def test_ncu_is_tried_again_without_what_it_does_not_know(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_a_gpu(context, monkeypatch, tmp_path, NCU).arguments = ["forward", "one_read"]
    monkeypatch.setattr(cuda_rows, "_native", type("Native", (), {"cuda_one_read": None}))
    assert counters.run(context)
    found = recorded(context)
    left_out = set(counters.METRICS) - found["counters", "one_read"]["metrics"].keys()
    assert left_out == {"sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active"}


def test_kernels_that_were_not_built_are_absent(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_a_gpu(context, monkeypatch, tmp_path, NCU).arguments = ["forward", "one_read"]
    monkeypatch.setattr(cuda_rows, "_native", None)
    monkeypatch.setattr(counters, "_count", lambda context, tool, items: ({item: {} for item in items}, ""))
    assert counters.run(context)
    assert recorded(context)["counters", "one_read"] == {"absent": "CUDA C++, not built"}


def test_without_permission_or_ncu_counters_are_absent(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ncu = "#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'\nexit 1\n"
    on_a_gpu(context, monkeypatch, tmp_path, ncu).arguments = ["forward"]
    with pytest.raises(Absent, match="may not read"):
        counters.run(context)
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    with pytest.raises(Absent, match="neither on PATH"):
        counters.run(context)


# ---- variants


@pytest.fixture
def launches() -> Iterator[dict[str, Launch]]:
    before = dict(LAUNCH)
    yield before
    assert before == LAUNCH


@pytest.mark.parametrize("kernel", ["forward", "backward", "forward_backward"])
def test_variants_begin_with_the_package_s_own(kernel: str, launches: dict[str, Launch]) -> None:
    found = variants.launches_of(kernel)
    assert found[0] == launches[kernel] and len(found) >= 3
    names = list(variants.variants_of(kernel))
    assert len(names) == len(set(names)) <= variants.MOST


def test_a_variant_that_fails_costs_itself_alone(
    context: Context, launches: dict[str, Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a child process, or where it is timed; and afterwards the package has its own again."""
    own, second, *_ = variants.variants_of("forward_backward")
    tried = {f"forward_backward:{own}": "", f"forward_backward:{second}": "died"}
    monkeypatch.setattr(variants, "_tried_by_children", lambda context, kernels: tried)
    context.arguments = ["forward_backward", "one_read"]
    assert variants.run(context)
    found = recorded(context)
    measured = {at[-1]: value for at, value in found.items() if at[:3] == ("variants", "forward_backward", "tried")}
    assert measured[own].keys() == {"gspo_on_policy, ours", "gspo_on_policy, ours_fresh"}
    assert measured[own]["gspo_on_policy, ours"]["median"] > 0 and f"{own}, again" in measured
    assert measured[second] == {"error": "died"}
    assert found["variants", "forward_backward", "best"] == own
    assert "absent" in found["variants", "one_read"]


def test_children_try_each_variant(context: Context, launches: dict[str, Launch]) -> None:
    assert variants._tried_by_children(context, ["forward"]) == dict.fromkeys(
        (f"forward:{name}" for name in list(variants.variants_of("forward"))[: variants.SMOKE_MOST]), ""
    )


# ---- compute-sanitizer


@pytest.mark.parametrize("layout", sanitizer.LAYOUTS)
@pytest.mark.parametrize("dtype", sanitizer.DTYPES)
@pytest.mark.parametrize("vocab", sanitizer.VOCABS)
def test_whole_groups_around_each_row_are_allocated(layout: str, dtype: torch.dtype, vocab: int) -> None:
    """The kernels read groups of 16 bytes: those that hold a row's first and last column must be in the allocation."""
    logits = sanitizer.logits_of(layout, sanitizer.TOKENS, vocab, dtype, "cpu")
    assert logits.shape == (sanitizer.SEQUENCES, sanitizer.TOKENS, vocab) and logits.is_leaf
    memory = logits.untyped_storage()
    last = logits[-1, -1, -1]
    end = (last.storage_offset() + 1) * dtype.itemsize
    assert memory.nbytes() % 16 == 0 and memory.nbytes() >= end
    if layout == "whole":
        assert memory.nbytes() - end < 16
    if layout == "unaligned":
        assert logits.storage_offset() == 1


# ---- from hidden states


def test_chunks_and_rows_of_the_linear_part(context: Context) -> None:
    context.arguments = ["rows", "chunks_dense"]
    assert linear.run(context)
    found = recorded(context)
    for chunk_bytes in linear.SMOKE_CHUNK_BYTES:
        at = "linear", "chunks", "dense", str(chunk_bytes)
        assert found[at]["median"] > 0 and not found[at]["wrong"]
    assert found["linear", "rows", "forward and gradient, float32"]["bytes_per_second"] > 0


def test_profile_and_products_of_the_linear_part(context: Context) -> None:
    context.arguments = ["profile_dense", "products"]
    assert linear.run(context)
    found = recorded(context)
    profiled = found["linear", "profile", "dense"]
    assert "gspo_kernels::linear_loss" in {kernel["name"] for kernel in profiled["kernels"]}
    assert profiled["launches"] == sum(kernel["launches"] for kernel in profiled["kernels"])
    assert found["linear", "products", "logits, bf16"]["median"] > 0
    assert found["linear", "products", "weight_gradient, 8 rows"]["error"]  # a CPU has no bf16 product into float32


def test_cut_cross_entropy_takes_part_on_a_gpu_alone() -> None:
    names = {device: {contestant.name for contestant in linear.taking_part(device)} for device in ("cpu", "cuda")}
    assert names["cuda"] - names["cpu"] == {"cce"} and "compile" not in names["cuda"]


@pytest.mark.parametrize(("is_cuda", "impl"), [(True, "cce"), (False, "torch_compile")])
def test_cut_cross_entropy_runs_its_own_kernel_on_a_gpu(
    is_cuda: bool, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def function(hidden: Any, weight: Any, token_ids: Any, *, reduction: str, impl: str) -> Tensor:
        used.append((reduction, impl))
        return torch.ones(2)

    monkeypatch.setattr(libraries, "_find", lambda module, name: function)
    hidden: Any = type("Hidden", (), {"is_cuda": is_cuda})()
    assert libraries.cut_cross_entropy()(hidden, None, None).tolist() == [-1.0, -1.0]  # type: ignore[arg-type]
    assert used == [("none", impl)]
