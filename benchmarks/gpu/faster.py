"""On which GPUs CUDA C++ shall run unasked: where it is ahead of Triton, both ways, in every case of `one_read`.

`FASTER_ON` in gspo_kernels/rows/cuda_rows.py names them; tests/rows/test_faster_on.py holds the two together.
"""

from __future__ import annotations

from typing import Any

from .runs import ONE_READ

PAIRS = (("ours", "ours_cuda"), ("ours_fresh", "ours_cuda_fresh"))


def ratios(content: dict[str, Any]) -> dict[str, float]:
    """Triton's time / that of C++ in each case, of the way in which it is less; 0 where one of the four is missing."""
    found = {}
    for name, case in content.get("one_read", {}).get("cases", {}).items():
        times = {contestant: measured["median"] for contestant, measured in case["contestants"].items()}
        complete = all(name in times for pair in PAIRS for name in pair)
        found[name] = min(times[triton] / times[cuda] for triton, cuda in PAIRS) if complete else 0.0
    return found


def everywhere(content: dict[str, Any]) -> bool:
    """In all cases of the two runs. A part that broke off has left some out, or says so itself."""
    parts = [part for name, part in content.get("parts", {}).items() if name.partition("-")[0] == "one_read"]
    finished = bool(parts) and all(part["status"] == "ok" for part in parts)
    found = ratios(content)
    return finished and set(ONE_READ) <= found.keys() and min(found.values()) > 1.0


def lines(content: dict[str, Any]) -> list[str]:
    gpu, found = str((content.get("machine") or {}).get("gpu")), ratios(content)
    compared = {name: ratio for name, ratio in found.items() if ratio}
    if not compared:
        return ["CUDA C++ against Triton: not measured"]
    from gspo_kernels.rows.cuda_rows import FASTER_ON

    said = [f"CUDA C++ against Triton, {len(compared)} of {len(found)} cases of one read compared, the nearer way:"]
    said += [f"  {name:<36} {ratio:.3f}x{'' if ratio > 1.0 else '  behind'}" for name, ratio in compared.items()]
    named = gpu in FASTER_ON
    if everywhere(content) == named:
        return [
            *said,
            f"FASTER_ON has {gpu} rightly" if named else f"not ahead in every case, so not for {gpu} unasked",
        ]
    names = sorted(FASTER_ON ^ {gpu})
    value = "frozenset({" + ", ".join(f'"{name}"' for name in names) + "})" if names else "frozenset()"
    why = "no longer ahead in every case" if named else "ahead in every case"
    return [*said, f"{why}; gspo_kernels/rows/cuda_rows.py:", f"FASTER_ON: frozenset[str] = {value}"]
