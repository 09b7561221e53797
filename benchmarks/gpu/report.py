"""The results file, whole at any moment: every change is written beside it and then renamed over it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# How to read the numbers; stored with them.
MEANINGS = {
    "units": "passes over the logits that must go through memory; token-level and on-policy losses need no second read"
    "; a contestant's: as many as its way takes; Triton's kernels read twice for a ratio per token, off-policy",
    "floor_seconds": "time to move a case's `units` at the bandwidth of a device-to-device copy",
    "times_floor": "median / the same time for the contestant's own `units`",
    "median, min, max": "seconds on the device's clock, the host running ahead of it as it does in training",
    "idle_median": "seconds by the host's clock from an idle device to an idle device, launches and Python included",
    "extra_bytes": "peak of allocated device memory beyond the inputs, a fresh gradient included",
    "first_call_seconds": "of a contestant that compiles, on a cache that may be warm",
    "launches": "kernels on the device in one call",
    "one_read": "cases in which CUDA C++ (ours_cuda) has a kernel of its own, beside Triton (ours)",
    "linear": "cases from hidden states; flop_per_s: operations that arithmetic needs / median, wrong answers too",
}


class Report:
    def __init__(self, path: Path, content: dict[str, Any] | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = {"meanings": MEANINGS, **(content or {})}

    def put(self, at: Sequence[str], value: Any) -> None:
        """Sets content[at[0]][at[1]]...; `save` makes it last."""
        *path, last = at
        place = self.content
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value

    def get(self, *at: str) -> Any:
        place: Any = self.content
        for key in at:
            place = place.get(key) if isinstance(place, dict) else None
        return place

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".json.new")
        beside.write_text(json.dumps(rounded(self.content), indent=1) + "\n")
        os.replace(beside, self.path)


def rounded(value: Any) -> Any:
    """Six significant digits: the file is read by people too. Infinities become text, which JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
