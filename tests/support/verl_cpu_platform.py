"""A platform of verl for machines without an accelerator, by verl's own registry of platforms.

verl has platforms for CUDA, ROCm and NPUs. VERL_USE_EXTERNAL_MODULES=verl_cpu_platform and VERL_PLATFORM=cpu select
this one in every process; `verl.plugin.platform.set_platform` does in one that runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

if os.environ.get("VERL_PLATFORM") == "cpu":
    sys.modules.setdefault("megatron", None)  # type: ignore[arg-type]  # verl imports it for seconds, if it can
NOTHING = dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), 0)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """What verl asks of a device: nothing is measured, and nothing waits."""

    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        **{name: lambda *_, value=value: value for name, value in NOTHING.items()},
        is_available=lambda: False, empty_cache=lambda: None, synchronize=lambda *_: None, set_device=lambda _: None,
        mem_get_info=lambda *_: (0, 0), get_device_name=lambda *_: "CPU",
    )  # fmt: skip

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:  # verl passes it to Tensor.to
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None
