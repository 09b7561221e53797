"""What to install or change to get more from this machine, with the commands. Nothing where nothing is to be gained."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import gspo_kernels

from ..rows import cpu_rows, cuda_rows, triton_rows
from .findings import Advice, Gpu, Processor, Service, Variable, Versions
from .versions import PACKAGE, source_of

OLDEST_TORCH = (2, 7)  # as in pyproject.toml
_FLOAT32_SUMS = (2, 10)  # from this release on torch adds products of bf16 to a float32 matrix on a GPU
_NVCC = Path("/usr/local/cuda/bin/nvcc")  # where setup.py looks for it, too
_WIDEST = {"avx512": "AVX-512", "avx2": "AVX2"}  # the kernels for an instruction set, and the name of the latter
_COMPILER = {
    "linux": "apt-get install g++   # or dnf install gcc-c++, apk add g++",
    "darwin": "xcode-select --install",
}


def advice(
    versions: Versions,
    processor: Processor,
    gpus: Sequence[Gpu],
    environment: Sequence[Variable],
    services: Sequence[Service],
    nvidia_driver: bool,
) -> tuple[Advice, ...]:
    """`nvidia_driver`: whether NVIDIA's driver finds a GPU, also one that torch cannot use."""
    source = source_of(versions.installation, Path(gspo_kernels.__file__).resolve().parent)
    return (
        *_of_torch(versions, gpus, nvidia_driver),
        *_of_triton(gpus),
        *_of_extension(processor, source),
        *_of_cuda_kernels(gpus, source),
        *_of_settings(processor, gpus, environment),
        *_of_threads(processor, environment),
        *_of_products(processor, services, environment),
    )


def _reinstall(source: str) -> str:
    """`source`: what pip installs the package from."""
    if source == PACKAGE:
        return f"pip install --force-reinstall --no-deps --no-binary {PACKAGE} {PACKAGE}"
    return f"pip install --force-reinstall --no-deps {source}"


def _of_torch(versions: Versions, gpus: Sequence[Gpu], nvidia_driver: bool) -> Iterator[Advice]:
    numbers = _numbers(versions.torch)
    if numbers < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield Advice(f"torch {versions.torch} is older than {oldest}, the oldest that works", (_upgrade("torch"),))
    elif gpus and numbers < _FLOAT32_SUMS:
        newer = ".".join(map(str, _FLOAT32_SUMS))
        yield Advice(
            f"losses from bf16 hidden states are faster on a GPU with torch {newer}, which adds products to a float32 "
            "matrix",
            (_upgrade("torch"),),
        )
    if nvidia_driver and not gpus:
        if versions.torch_build == "CPU":
            yield Advice(
                "this machine has an NVIDIA GPU, but torch is built for the CPU",
                ("pip install --force-reinstall torch   # the build for CUDA; see https://pytorch.org/get-started",),
            )
        else:
            yield Advice(
                f"this machine has an NVIDIA GPU, but torch, built for {versions.torch_build}, cannot use it: the "
                "driver may be too old, or CUDA_VISIBLE_DEVICES may hide the GPU",
                ("python -c 'import torch; torch.cuda.init()'   # says why",),
            )


def _of_triton(gpus: Sequence[Gpu]) -> Iterator[Advice]:
    reason = triton_rows.unavailable_reason()
    if gpus and reason:
        package = "pytorch-triton-rocm" if torch.version.hip else "triton"
        yield Advice(f"losses on a GPU run on plain torch: {reason}", (_upgrade(package),))


def _of_extension(processor: Processor, source: str) -> Iterator[Advice]:
    reason = cpu_rows.unavailable_reason()
    if reason and sys.platform != "win32":  # the kernels need GCC or Clang
        has_compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
        compiler = () if has_compiler else (_COMPILER.get(sys.platform, _COMPILER["linux"]),)
        commands = (*compiler, _reinstall(source))
        yield Advice(
            "losses on the CPU run on plain torch, many times slower, because the C++ extension is missing", commands
        )
    elif "another version" in processor.problem:
        yield Advice("the C++ extension does not fit this package", (_reinstall(source),))
    units = "AVX512-BF16"
    if processor.product_kernels == "avx512" and units in processor.instruction_sets:
        yield Advice(
            f"this processor multiplies bf16 ({units}), but the extension was compiled by a compiler that cannot: GCC "
            "10 and Clang 9 can",
            (_reinstall(source),),
        )


def _of_cuda_kernels(gpus: Sequence[Gpu], source: str) -> Iterator[Advice]:
    faster = [gpu.name for gpu in gpus if gpu.name in cuda_rows.FASTER_ON]
    if not faster or cuda_rows.is_built():
        return
    gain = f"on an {faster[0]} the CUDA kernels are faster than Triton for on-policy losses and ratios per token"
    build = f"GSPO_KERNELS_CUDA=1 {_reinstall(source)}"
    if shutil.which("nvcc") or _NVCC.exists():
        yield Advice(f"{gain}; nvcc is here, but they were not built", (build,))
    else:
        toolkit = "install CUDA's toolkit: https://developer.nvidia.com/cuda-downloads"
        yield Advice(f"{gain}; building them needs nvcc", (toolkit, build))


def _of_settings(processor: Processor, gpus: Sequence[Gpu], environment: Sequence[Variable]) -> Iterator[Advice]:
    values = {each.name: each.value for each in environment}
    widest = next((kernels for kernels, name in _WIDEST.items() if name in processor.instruction_sets), None)
    if processor.kernels is not None and "GSPO_KERNELS_ISA" in values and widest not in (None, processor.kernels):
        yield Advice(
            f"this processor has {widest}, but the C++ kernels run {processor.kernels}", ("unset GSPO_KERNELS_ISA",)
        )
    if gpus and values.get("GSPO_KERNELS_DEBUG", "0") not in ("", "0"):
        yield Advice("every call on a GPU waits for its checks", ("unset GSPO_KERNELS_DEBUG",))
    if triton_rows.INTERPRETED:
        yield Advice("Triton kernels run in the interpreter, which is for tests", ("unset TRITON_INTERPRET",))
    if processor.kernels is not None and processor.huge_pages == "never":
        yield Advice(
            "new gradients on the CPU cost a page fault for every 4 KiB: transparent huge pages are switched off",
            ("echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",),
        )


def _of_threads(processor: Processor, environment: Sequence[Variable]) -> Iterator[Advice]:
    set_by = [each for each in environment if each.name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    cores = processor.physical_cores
    if processor.threads < cores:
        because = f" ({set_by[0].name}={set_by[0].value})" if set_by else ""
        yield Advice(
            f"torch and the C++ kernels use {processor.threads} of {cores} cores{because}",
            (f"export OMP_NUM_THREADS={cores}   # of one process; torchrun sets 1",),
        )
    elif processor.threads > processor.usable_cores:
        yield Advice(
            f"{processor.threads} threads share {processor.usable_cores} cores, and wait for each other",
            (f"export OMP_NUM_THREADS={cores}",),
        )


def _of_products(
    processor: Processor, services: Sequence[Service], environment: Sequence[Variable]
) -> Iterator[Advice]:
    """Where bf16 is multiplied as float32 although something here is faster."""
    values = {each.name: each.value for each in environment}
    chosen = values.get("GSPO_KERNELS_CPU_PRODUCTS", "")
    units = {"AVX512-BF16", "AMX-BF16"} & set(processor.instruction_sets)
    converted = [each for each in services if each.dtype == "bf16" and "converted to float32" in each.products]
    for each in converted:
        if each.device == "cpu" and chosen == "float32" and processor.kernels is not None:
            yield Advice(
                "bf16 hidden states and heads are converted to float32 for each product on the CPU",
                ("unset GSPO_KERNELS_CPU_PRODUCTS",),
            )
        elif each.device == "cpu" and processor.kernels is not None and not units:
            yield Advice(
                "this processor has no units for bf16 (AVX512-BF16 or AMX): a bf16 head is converted to float32 for "
                "each product, and a float32 head is not, at twice the memory",
                ("model.lm_head.float()   # if losses from hidden states are computed on this CPU",),
            )


def _upgrade(package: str) -> str:
    return f"pip install --upgrade {package}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
