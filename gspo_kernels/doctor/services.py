"""Which backend serves a loss from logits, and what multiplies for a loss from hidden states, for every device."""

from __future__ import annotations

import contextlib

import torch

from ..linear.products import explain_products
from ..losses.clipped import GSPO
from ..losses.triton_stage import stage_reason
from ..rows import dispatch
from .findings import Backend, Service

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def service(device: torch.device, dtype: str) -> Service:
    """In the words of `explain`, of contiguous logits and GSPO."""
    stage = products = problem = ""
    backends: tuple[Backend, ...] = ()
    try:
        logits = torch.empty(1, 1, 16, dtype=DTYPES[dtype], device=device)
        found = dispatch.candidates(logits, None)
        backends = tuple(Backend(each.name, described(each), runs, reason) for each, runs, reason in found)
        stage = stage_reason(GSPO(), found[0].backend).partition(": ")[2]
        products = explain_products(device, DTYPES[dtype]).partition(": ")[2]
    except Exception as error:  # of a device without float64; of a setting that is refused; of a GPU that is broken
        problem = str(error)
    return Service(str(device), dtype, backends, stage, products, problem)


def described(backend: dispatch.Backend) -> str:
    try:
        return backend.describe()
    except (ValueError, AttributeError):  # told in the section about the processor
        return "C++"


def able(device: torch.device, dtype: str) -> list[dispatch.Backend]:
    """The backends that can take logits of this dtype on this device, whether or not they are the default."""
    logits = torch.empty(1, 1, 16, dtype=DTYPES[dtype], device=device)
    found = []
    for backend in dispatch.BACKENDS:
        with contextlib.suppress(ValueError):  # why, `service` tells
            found.append(dispatch.choose(logits, backend.name))
    return found
