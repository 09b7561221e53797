"""Advice is given where something is to be gained, with a command. Systems without /proc or sysconf work, too."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE

from gspo_kernels.doctor import advice, checks, command, machine, services, speed, text, versions
from gspo_kernels.doctor.findings import Gpu, Processor, Service, Variable, Versions
from gspo_kernels.rows import cpu_rows, cuda_rows, dispatch, triton_rows

pytestmark = DEFAULT_MODE
ROOT = Path(__file__).parents[2]

VERSIONS = Versions(
    "0.1.0", "~/gspo_kernels", "installed", None, "3.12.1", "2.13.0", "CUDA 13.0", "3.8.0", (), "Linux", None
)
PROCESSOR = Processor(
    "a processor", "x86_64", 64, 64, 32, 32, 1 << 38, ("AVX2", "AVX-512", "AVX512-BF16"), "AVX512", "avx512",
    "avx512bf16", "the widest that this processor has", "madvise", "",
)  # fmt: skip
H100 = Gpu("NVIDIA H100 80GB HBM3", "cuda:0", 8, 80 << 30, "9.0", "570.1")
BF16 = Service("cpu", "bf16", (), "", "the C++ extension multiplies bf16 with float32 sums (AVX512-BF16)", "")
CONVERTED = dataclasses.replace(BF16, products="bf16 operands are converted to float32 (there is no faster product)")

Change = Callable[[pytest.MonkeyPatch], None]


def given(
    patch: pytest.MonkeyPatch,
    *changes: Change,
    gpus: tuple[Gpu, ...] = (H100,),
    torch_: str = "2.13.0",
    build: str = "CUDA 13.0",
    products: Service = BF16,
    nvidia: bool = True,
    variables: dict[str, str] | None = None,
    **processor: Any,
) -> str:
    """The advice as text."""
    patch.setattr(cuda_rows, "is_built", lambda: True)
    patch.setattr(triton_rows, "unavailable_reason", lambda: "")
    patch.setattr(cpu_rows, "_unavailable_reason", "")
    patch.setattr(advice, "source_of", lambda installation, folder: "gspo-kernels")
    for change in changes:
        change(patch)
    found = advice.advice(
        dataclasses.replace(VERSIONS, torch=torch_, torch_build=build),
        dataclasses.replace(PROCESSOR, **processor),
        gpus,
        [Variable(name, value, "", "") for name, value in (variables or {}).items()],
        [products],
        nvidia,
    )
    return "\n".join(f"{each.gain}: {'; '.join(each.commands)}" for each in found)


def no_extension(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu_rows, "_unavailable_reason", "the C++ extension is not here")


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("shutil.which", lambda name: None)


def has_nvcc(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda_rows, "is_built", lambda: False)
    patch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


def no_nvcc(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(advice, "_NVCC", Path("/nonexistent/nvcc"))
    patch.setattr(cuda_rows, "is_built", lambda: False)
    patch.setattr("shutil.which", lambda name: None)


def old_triton(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton_rows, "unavailable_reason", lambda: "Triton is 3.1, these kernels need 3.3 or newer")


def interpreted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton_rows, "INTERPRETED", True)


CASES: dict[str, tuple[tuple[Change, ...], dict[str, Any], tuple[str, ...]]] = {
    "nothing": ((), {}, ()),
    "no GPU and nothing to gain": ((), {"gpus": (), "nvidia": False, "build": "CPU"}, ()),
    "no extension": ((no_extension,), {}, ("plain torch", "pip install --force-reinstall --no-deps")),
    "no compiler": ((no_extension, no_compiler), {}, ("g++", "pip install")),
    "old Triton": ((old_triton,), {}, ("these kernels need 3.3 or newer", "pip install --upgrade triton")),
    "old Triton and no GPU": ((old_triton,), {"gpus": (), "nvidia": False}, ()),
    "CUDA kernels": ((has_nvcc,), {}, ("nvcc is here", "GSPO_KERNELS_CUDA=1 pip install")),
    "CUDA kernels without nvcc": ((no_nvcc,), {}, ("cuda-downloads", "GSPO_KERNELS_CUDA=1 pip install")),
    "another GPU": ((no_nvcc,), {"gpus": (dataclasses.replace(H100, name="NVIDIA A100"),)}, ()),
    "one thread": (
        (), {"threads": 1, "variables": {"OMP_NUM_THREADS": "1"}},
        ("1 of 32 cores (OMP_NUM_THREADS=1)", "export OMP_NUM_THREADS=32"),
    ),
    "more threads than a quota": (
        (), {"threads": 32, "usable_cores": 4, "physical_cores": 4}, ("32 threads share 4 cores", "OMP_NUM_THREADS=4"),
    ),
    "huge pages": ((), {"huge_pages": "never"}, ("transparent huge pages", "echo madvise | sudo tee")),
    "narrow": ((), {"kernels": "avx2", "variables": {"GSPO_KERNELS_ISA": "avx2"}}, ("unset GSPO_KERNELS_ISA",)),
    "narrow processor": ((), {"kernels": "avx2", "instruction_sets": ("AVX2",)}, ()),
    "old compiler": ((), {"product_kernels": "avx512"}, ("GCC 10", "pip install")),
    "debugging": ((), {"variables": {"GSPO_KERNELS_DEBUG": "1"}}, ("unset GSPO_KERNELS_DEBUG",)),
    "interpreter": ((interpreted,), {}, ("unset TRITON_INTERPRET",)),
    "torch 2.6": ((), {"torch_": "2.6.0"}, ("older than 2.7", "pip install --upgrade torch")),
    "torch 2.9": ((), {"torch_": "2.9.1+cu128"}, ("with torch 2.10", "pip install --upgrade torch")),
    "torch 2.9 without a GPU": ((), {"torch_": "2.9.1", "gpus": (), "nvidia": False}, ()),
    "torch for the CPU": ((), {"gpus": (), "build": "CPU"}, ("torch is built for the CPU", "pip install")),
    "old driver": ((), {"gpus": ()}, ("the driver may be too old", "torch.cuda.init()")),
    "no units": ((), {"products": CONVERTED, "instruction_sets": ("AVX2",)}, ("no units for bf16", "float()")),
    "units that are not used": (
        (), {"products": CONVERTED, "variables": {"GSPO_KERNELS_CPU_PRODUCTS": "float32"}},
        ("unset GSPO_KERNELS_CPU_PRODUCTS",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_advice(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, options, expected = CASES[case]
    said = given(monkeypatch, *changes, **options)
    assert all(words in said for words in expected), said
    assert len(said.splitlines()) == bool(expected), said


def test_the_oldest_torch_is_that_of_the_metadata() -> None:
    oldest = ".".join(map(str, advice.OLDEST_TORCH))
    assert f'"torch>={oldest}' in (ROOT / "pyproject.toml").read_text()


# ---- systems


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as Windows: no /proc, no /sys, no affinity, no sysconf, no programs."""

    def refused(*arguments: Any, **options: Any) -> Any:
        raise OSError("not here")

    for name in ("_CPUINFO", "_HUGE_PAGES", "_QUOTA"):
        monkeypatch.setattr(machine, name, tmp_path / "none")
    for name in ("sched_getaffinity", "sysconf"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "run", refused)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    found = machine.processor()
    assert found.model and found.memory_bytes == 0 and found.instruction_sets == () and found.huge_pages is None
    assert found.usable_cores == found.physical_cores == found.cores == os.cpu_count()
    assert not machine.has_nvidia_driver() and versions.versions().libc is None
    assert versions.commit_of(ROOT) is None


def test_cores_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight threads of four cores; six of them are usable, and a quota of 2.5."""
    blocks = "\n\n".join(
        f"processor\t: {k}\nmodel name\t: Some CPU\nphysical id\t: 0\ncore id\t: {k // 2}\nflags\t: avx2 fma f16c"
        for k in range(8)
    )
    (tmp_path / "cpuinfo").write_text(blocks + "\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = machine.processor()
    assert (found.cores, found.usable_cores, found.physical_cores) == (8, 6, 3)
    assert found.model == "Some CPU" and found.instruction_sets == ("AVX2",)
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert (machine.processor().usable_cores, machine.processor().physical_cores) == (3, 3)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cores() == 6


def test_equal_gpus_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [("NVIDIA H100", 9, 0), ("NVIDIA L4", 8, 9), ("NVIDIA H100", 9, 0)]

    def properties(index: int) -> SimpleNamespace:
        name, major, minor = kinds[index]
        return SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 << 30)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(machine, "_output", lambda *command: "570.1\n570.1\n570.1\n")
    found = machine.gpus()
    assert [(gpu.name, gpu.device, gpu.count, gpu.capability, gpu.driver) for gpu in found] == [
        ("NVIDIA H100", "cuda:0", 2, "9.0", "570.1"),
        ("NVIDIA L4", "cuda:1", 1, "8.9", "570.1"),
    ]
    assert [str(device) for device in machine.devices(found)] == ["cpu", "cuda:0", "cuda:1"]


def test_a_gpu_that_does_not_work() -> None:
    """It is told, not raised: here one of a torch without CUDA."""
    device = torch.device("cuda:0")
    for found in (services.service(device, "fp32"), speed.speed(device)):
        assert found.problem
    (check,) = checks.with_advice(list(command._checked([device])))
    assert not check.passed and check.raised and "driver" in check.advice


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Apple's: the dispatcher says what to do, and nothing fails."""

    def refuse(device: torch.device) -> None:
        raise ValueError("expected tensors on a device with float64")

    monkeypatch.setattr(dispatch, "check_float64", refuse)
    found = services.service(torch.device("meta"), "bf16")
    assert found.problem == "expected tensors on a device with float64" and not found.backends
    assert list(command._checked([torch.device("meta")])) == []
    assert "nothing runs: expected tensors" in text.section("services", (found,), 100)


# ---- installations


@pytest.mark.parametrize("kind", ["installed", "editable", "a source tree that is not installed"])
def test_where_it_was_installed_from(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gspo_kernels"
    folder.mkdir()
    origin = '{"vcs_info": {"commit_id": "abc"}}' if kind == "installed" else "{}"
    if kind != "installed":
        (tmp_path / "setup.py").touch()
    if kind == "editable":
        origin = f'{{"url": "{tmp_path.as_uri()}", "dir_info": {{"editable": true}}}}'
    elsewhere = tmp_path if kind == "installed" else tmp_path / "site"
    distribution = SimpleNamespace(read_text=lambda name: origin, locate_file=lambda name: elsewhere / name)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: distribution)
    assert versions.installation_of(folder) == (kind, "abc" if kind == "installed" else None)


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ("", "gspo-kernels"),
        ('{"url": "file:///src/gspo%20kernels", "dir_info": {}}', "'/src/gspo kernels'"),
        ('{"url": "https://host/it.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}', "git+https://host/it.git"),
        ('{"url": "https://host/it.tar.gz", "archive_info": {}}', "https://host/it.tar.gz"),
    ],
)
def test_what_it_is_reinstalled_from(origin: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution = SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: distribution)
    assert versions.source_of("installed", Path("/site/gspo_kernels")) == source
    assert versions.source_of("editable", Path("/tree/gspo_kernels")) == "--editable /tree"


def test_a_trainer_outside_the_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("packaging")
    wanted = ["torch>=2.7", 'trl<1.17,>=1.14; extra == "trl"', 'transformers<5; extra == "trl"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    assert versions._problem("trl", "1.16.0") == "" == versions._problem("transformers", "6.0")
    assert versions._problem("trl", "1.17.0") == "tested with <1.17,>=1.14"
