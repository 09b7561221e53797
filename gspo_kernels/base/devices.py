"""What devices without kernels of this package lack; plain torch runs on them."""

from __future__ import annotations

import functools

import torch

_WITH_KERNELS = ("cpu", "cuda")


def check_float64(device: torch.device) -> None:
    """Raises ValueError on a device without float64, as Apple's MPS. Nothing is read."""
    if device.type not in (*_WITH_KERNELS, "meta") and not _has_float64(device):
        raise ValueError(
            f"expected tensors on a device with float64, in which log-ratios, sums and clips are computed; got tensors "
            f"on {device}, which has none. Move them to the CPU, where the C++ kernels run: autograd follows .cpu()"
        )


def sums_segments(device: torch.device) -> bool:
    """Whether torch has `segment_reduce` on this device."""
    return device.type in _WITH_KERNELS


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled; not every device has it."""
    known = device.type in _WITH_KERNELS or torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


@functools.cache
def _has_float64(device: torch.device) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True
