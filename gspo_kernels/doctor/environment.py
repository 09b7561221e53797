"""The environment variables that are set and change something here, and the names that look like ours and are none.

docs/environment.md explains them; a test compares its table with `OURS`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable

import torch

from ..linear.cpu_products import VARIABLE, cpu_products
from ..rows import cpu_rows
from .findings import Variable

_BUILD = "read when the package is built"
_TESTS = "read by the tests"
_BENCHMARKS = "read by the benchmarks"

OURS = {
    "GSPO_KERNELS_DEBUG": "arguments on a GPU are checked by value, and each call waits for the GPU",
    "GSPO_KERNELS_ISA": "the instruction set of the C++ kernels",
    VARIABLE: "what multiplies hidden states and a head on a CPU",
    "TRITON_INTERPRET": "Triton kernels run in its interpreter on CPU tensors, thousands of times slower; for tests",
    "VERL_ENGINE_VENDOR": "gspo_kernels: verl's engines take log-probabilities and entropies from this package",
    "GSPO_KERNELS_REQUIRE_NATIVE": _BUILD,
    "GSPO_KERNELS_PURE": _BUILD,
    "GSPO_KERNELS_CUDA": _BUILD,
    "GSPO_CUDA_VARIANTS": _BUILD,
    "GSPO_KERNELS_SANITIZE": _BUILD,
    "ARCHFLAGS": _BUILD,
    "CUDA_HOME": _BUILD,
    "CUDA_PATH": _BUILD,
    "GSPO_KERNELS_TEST_DEVICE": _TESTS,
    "GSPO_KERNELS_TEST_ALL": _TESTS,
    "CXX": _TESTS,
    "GSPO_BENCH_ROWS": _BENCHMARKS,
    "GSPO_BENCH_COMMIT": _BENCHMARKS,
    "GSPO_BENCH_RECORDS": _BENCHMARKS,
    "GSPO_BENCH_SECONDS": _BENCHMARKS,
    "GSPO_WARM_CAPABILITY": _BENCHMARKS,
    "TRITON_CACHE_DIR": "where Triton keeps compiled kernels",
}
# Of others, those that decide how fast a loss is.
OTHERS = {
    "OMP_NUM_THREADS": "the number of threads of torch and of the C++ kernels",
    "MKL_NUM_THREADS": "the number of threads of torch's matrix products",
    "ATEN_CPU_CAPABILITY": "the instruction set of torch's own kernels",
    "CUDA_VISIBLE_DEVICES": "the GPUs that torch sees",
    "HIP_VISIBLE_DEVICES": "the GPUs that torch sees",
}
_PREFIX = "GSPO_"


def environment() -> tuple[Variable, ...]:
    known = {**OURS, **OTHERS}
    found = [
        Variable(name, os.environ[name], effect, _refused(name)) for name, effect in known.items() if name in os.environ
    ]
    for name in sorted(os.environ):
        if name.upper().startswith(_PREFIX) and name not in known:
            found.append(Variable(name, os.environ[name], "nothing reads it", _unknown(name)))
    return tuple(found)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.upper(), OURS, n=1, cutoff=0.8)
    return f"no variable has this name; {close[0]} has a similar one" if close else "no variable has this name"


def _refused(name: str) -> str:
    """What the reader of a variable says about its value; empty if it takes it."""
    readers: dict[str, Callable[[], object]] = {
        "GSPO_KERNELS_ISA": lambda: cpu_rows.unavailable_reason() or cpu_rows.instruction_set(),
        VARIABLE: lambda: [cpu_products(dtype) for dtype in (torch.float32, torch.bfloat16)],
    }
    try:
        readers.get(name, str)()
    except AttributeError:  # of an extension from another version
        return ""
    except ValueError as error:
        return str(error).removeprefix(f"{name}: ")
    return ""
