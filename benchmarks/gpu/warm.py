"""Compiles on a machine without a GPU what the runs launch on one: python -m benchmarks.gpu.warm [capability, 90]

Triton's cache is keyed by its release, so that must be the GPU machine's. What is compiled goes to
carried/triton-cache.tar, which the runs unpack. Kernels are compiled through the very calls that launch them: the works
of the profile, the launch variants, and the tests of the first run, on CPU tensors. A driver that launches nothing
stands in for the GPU's, so that answers are garbage, and the tests fail; nobody looks at them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import carried
from .parts import REPOSITORY
from .runs import KERNELS, TESTS

CAPABILITY = "GSPO_WARM_CAPABILITY"


class NoLaunch:
    """Triton's launcher of a compiled kernel, which does not launch it."""

    def __init__(self, *_: Any) -> None:
        self.launch_cooperative_grid = self.launch_pdl = False
        self.global_scratch_size = self.profile_scratch_size = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


class NoDriver:
    """What Triton asks a driver for, of a GPU that is not there."""

    launcher_cls = NoLaunch

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 166_912, "max_num_regs": 65_536, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 64, 0, 1024  # module, function, registers, spills, most threads


def pretend(capability: int) -> None:
    """Triton compiles for such a GPU from now on, and takes tensors of the CPU for its own."""
    from triton.runtime.driver import driver

    from gspo_kernels.rows import cpu_rows, triton_rows

    driver.set_active(NoDriver(capability))
    reasons: Callable[[Any], list[str]] = triton_rows.unsupported_reasons
    triton_rows.unsupported_reasons = lambda logits: [r for r in reasons(logits) if "on the CPU" not in r]
    cpu_rows.unsupported_reasons = lambda logits: ["Triton's kernels are compiled now"]


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest: the tests take themselves to be on a GPU, and their tensors stay on the CPU."""
    import modes
    import torch

    modes.DEVICE = torch.device("cpu")
    pretend(int(os.environ[CAPABILITY]))


def compile_works() -> int:
    """The works of the profile, then every launch variant; how many calls."""
    from ..cases import Case, build
    from ..contestants import ours
    from . import variants, works

    def call(name: str, dtype: str, overwrite_logits: bool) -> None:
        case = Case(works.BY_NAME[name], dtype, 1_000, "padded", sequences=8, spare=1)
        ours(build(case, 16), overwrite_logits, "triton")()

    calls = [(name, dtype, over) for name in works.BY_NAME for dtype in ("bf16", "fp32") for over in (True, False)]
    for each in calls:
        call(*each)
    for kernel in KERNELS:
        if kernel == "one_read":
            continue
        tried = variants.variants_of(kernel)
        for use in tried.values():
            use()
            call(variants.SHOWN_BY[kernel][0][0], "bf16", True)
        next(iter(tried.values()))()
    return len(calls)


def main(arguments: list[str]) -> int:
    capability = int(arguments[0]) if arguments else 90
    with tempfile.TemporaryDirectory(prefix="gspo-warm-") as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, CAPABILITY: str(capability)}
        tests = [str(next((REPOSITORY / "tests").rglob(name))) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.warm", "-p", "no:cacheprovider", "--tb=no"]
        running = subprocess.Popen(
            [*command, "-k", "not reference", *tests],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "GSPO_KERNELS_TEST_DEVICE": "cuda",
                "PYTHONPATH": os.pathsep.join(str(REPOSITORY / at) for at in ("tests", "tests/support")),
            },
            stdout=subprocess.DEVNULL,
        )
        pretend(capability)
        compile_works()
        running.wait()
        print(carried.save_cache(Path(folder), carried.CACHE))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
