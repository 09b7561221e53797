"""What Nsight Compute counts in one launch of each row kernel: why a slow one is slow.

Items are `forward`, `backward`, `forward_backward` (gradient over the logits, and as `forward_backward_fresh` a fresh
one) and `one_read` (CUDA C++). One child process (`python -m benchmarks.gpu_counters <items>`) runs them all under ncu,
each twice: ncu counts the second call. Clocks are not fixed and caches not flushed, both as in training. Between its
passes ncu restores what the kernel wrote, which may leave a cache full of dirty lines: up to 8% of the logits here.

The hit rate of reads in the L2 cache, in place against fresh, says whether the second read of a row comes from memory.
"""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from glob import glob
from typing import Any

import torch

import gspo_kernels
from gspo_kernels.rows import cuda_rows

from .gpu_parts import REPOSITORY, Absent, Context

KERNELS = "regex:^(forward|backward|forward_backward)_kernel|one_read"
ROWS, SEQUENCES, VOCAB = 2_112, 16, 151_936  # 16 rows for each of 132 multiprocessors
SMOKE_ROWS, SMOKE_VOCAB = 32, 100
# Time, bytes and the share of memory's peak; hits in L2; occupancy; why warps stall; which pipes are busy.
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "lts__t_sectors_op_read.sum",
    "lts__t_sectors_op_read_lookup_hit.sum",
    "lts__t_sectors_srcunit_tex_op_read.sum",
    "lts__t_sectors_srcunit_tex_op_read_lookup_hit.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    "launch__occupancy_limit_warps",
    "launch__waves_per_multiprocessor",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
)
SURE = 4  # of them, which every release has
_LIMIT = 50.0  # seconds for ncu
_FORBIDDEN = "ERR_NVGPUCTRPERM"


def run(context: Context) -> bool:
    """Arguments: the items."""
    items = list(context.arguments)
    if "one_read" in items and not context.smoke and not hasattr(cuda_rows._native, "cuda_one_read"):
        items.remove("one_read")
        context.put("counters", "one_read", value={"absent": cuda_rows.describe()})
        context.finished("one_read")
    context.at(", ".join(items))
    if context.smoke:
        work(items, "cpu")
        found, reason = {item: dict[str, float]() for item in items}, ""
    else:
        tool = find_ncu()
        if tool is None:
            raise Absent("ncu is neither on PATH nor in the usual folders of CUDA")
        found, reason = _count(context, tool, items)
    for item in dict.fromkeys([*items, *found]):  # what comes along with an item is recorded, too
        result = derived(found[item]) if item in found else {"error": reason or "ncu shows no launch of this kernel"}
        context.put("counters", item, value=result)
        context.say(_line(item, result))
        context.finished(item)
    return all(item in found for item in items)


def find_ncu() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    patterns = [f"{home}/bin/ncu" for home in homes] + ["/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu"]
    there = [path for pattern in patterns for path in sorted(glob(pattern), reverse=True) if os.access(path, os.X_OK)]
    return shutil.which("ncu") or next(iter(there), None)


def _count(context: Context, tool: str, items: Sequence[str]) -> tuple[dict[str, dict[str, float]], str]:
    """Metrics by item; or {}, and the reason. A second try leaves out the metrics that ncu does not know."""
    metrics: tuple[str, ...] = METRICS
    reason = ""
    for _ in range(3):
        output = _run(tool, items, metrics, min(_LIMIT, context.left() - 2.0))
        print(output, flush=True)  # into the log
        if found := by_item(parse(output.splitlines())):
            return found, ""
        if _FORBIDDEN in output:
            raise Absent(f"ncu may not read this GPU's counters: {_FORBIDDEN}")
        reason = reason or reason_of(output)
        metrics, before = known(metrics, output), metrics
        if metrics == before or "No kernels were profiled" in output or context.left() < 15.0:
            break
    return {}, reason


def _run(tool: str, items: Sequence[str], metrics: Sequence[str], limit: float) -> str:
    command = [
        tool, "--csv", "--print-units", "base", "--clock-control", "none", "--cache-control", "none",
        "--target-processes", "application-only", "--profile-from-start", "off", "--kernel-name-base", "function",
        "--kernel-name", KERNELS, "--metrics", ",".join(metrics),
        sys.executable, "-m", "benchmarks.gpu_counters", *items,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit)
    except subprocess.TimeoutExpired as error:
        return f"==ERROR== not finished within {limit:.0f} s\n{(error.stdout or b'').decode(errors='replace')}"
    return done.stdout.decode(errors="replace")


def known(metrics: Sequence[str], output: str) -> tuple[str, ...]:
    """The metrics that ncu's errors do not name; if they name none, the `SURE` ones."""
    errors = "\n".join(line for line in output.splitlines() if line.startswith("==ERROR=="))
    fewer = tuple(name for name in metrics if not re.search(rf"\b{name.partition('.')[0]}\b", errors))
    return fewer if len(fewer) < len(metrics) else METRICS[:SURE]


def parse(lines: Iterable[str]) -> list[tuple[str, dict[str, float]]]:
    """Kernels in the order of their launches, each with its metrics.

    ncu's CSV has a header and one line a metric, among other lines of ncu and of the process.
    """
    rows = [line for line in lines if line.startswith('"')]
    headers = [i for i, line in enumerate(rows) if '"Metric Name"' in line]
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(rows[headers[-1] :]) if headers else ():
        name, value = row.get("Metric Name"), (row.get("Metric Value") or "").replace(",", "")
        kernel = found.setdefault(row.get("ID") or "", (row.get("Kernel Name") or "", {}))
        if name and re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", value, re.IGNORECASE):
            kernel[1][name] = float(value) * _SCALE.get(row.get("Metric Unit") or "", 1.0)
    return list(found.values())


def by_item(kernels: Iterable[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """`forward_backward` is launched twice: with its gradient over the logits, then with a fresh one."""
    found: dict[str, dict[str, float]] = {}
    for name, metrics in kernels:
        words = [word for word in ("one_read", "forward_backward", "backward", "forward") if word in name]
        if words and metrics:
            found[f"{words[0]}_fresh" if words[0] in found else words[0]] = metrics
    return found


# ncu chooses units by size; these are the ones of the metrics above.
_SCALE = {
    **{
        f"{prefix}{name}": 10.0 ** (3 * i)
        for i, prefix in enumerate(("", "K", "M", "G", "T"))
        for name in ("byte", "bytes")
    },
    **{"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0},
}


def derived(found: dict[str, float]) -> dict[str, Any]:
    """The metrics, and from them traffic in sizes of the logits, bytes per second and hits in L2."""
    result: dict[str, Any] = {"metrics": found, "rows": ROWS}
    logits_bytes = ROWS * VOCAB * 2
    for way in ("read", "write"):
        moved = found.get(f"dram__bytes_{way}.sum")
        if moved is not None:
            result[f"{way}_in_logits"] = moved / logits_bytes
    seconds = found.get("gpu__time_duration.sum")
    if seconds and "dram__bytes_read.sum" in found:
        moved = found["dram__bytes_read.sum"] + found.get("dram__bytes_write.sum", 0.0)
        result["bytes_per_second"] = moved / seconds
    for kind in ("op_read", "srcunit_tex_op_read"):  # of all units, without other L2 slices' where the second is known
        sectors, hits = (found.get(f"lts__t_sectors_{kind}{which}.sum") for which in ("", "_lookup_hit"))
        if sectors and hits is not None:
            result["l2_hit_rate_of_reads"] = hits / sectors
    return result


def reason_of(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line or "Error" in line]
    return (errors or lines or ["ncu said nothing"])[0][:300]


def _line(item: str, found: dict[str, Any]) -> str:
    if not found.get("metrics"):
        return f"{item}: {found.get('error', 'nothing was counted')[:200]}"
    seconds = found["metrics"].get("gpu__time_duration.sum", math.nan)
    said = {key: f"{value:.3g}" for key, value in found.items() if key not in ("metrics", "rows")}
    return f"{item}: {seconds * 1e3:.3f} ms, {said}"


# ---- the child process


def work(items: Sequence[str], device: str) -> None:
    """Losses that launch the kernels, on inputs that are quick to make; ncu watches each one's second call."""
    rows, vocab = (ROWS, VOCAB) if device == "cuda" else (SMOKE_ROWS, SMOKE_VOCAB)
    triton, cuda = ("triton", "cuda") if device == "cuda" else (None, None)
    shape = SEQUENCES, rows // SEQUENCES
    torch.manual_seed(0)
    pristine = torch.randn(*shape, vocab, device=device, dtype=torch.bfloat16)
    token_ids = torch.randint(vocab, shape, device=device)
    with torch.no_grad():  # what is off-policy is clipped nowhere: every row has a gradient
        old = gspo_kernels.token_logprobs(pristine, token_ids, backend=triton).logprobs
    advantages = torch.linspace(-1.5, 1.5, SEQUENCES, device=device)
    root = torch.ones((), device=device)

    def twice(loss: Callable[..., Any], on_policy: bool, overwrite: bool, backend: str | None) -> None:
        for watched in (False, True):
            logits = pristine.clone().requires_grad_()
            if watched and device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            old_logprobs = None if on_policy else old
            value = loss(logits, token_ids, advantages, old_logprobs, overwrite_logits=overwrite, backend=backend).loss
            torch.autograd.grad(value, logits, root)
            if watched and device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()

    if {"forward", "backward"} & set(items):
        twice(gspo_kernels.gspo_loss, on_policy=False, overwrite=True, backend=triton)
    if "forward_backward" in items:
        for overwrite in (True, False):
            twice(gspo_kernels.gspo_loss, on_policy=True, overwrite=overwrite, backend=triton)
    if "one_read" in items and not (device == "cuda" and cuda_rows.unsupported_reasons(pristine)):
        twice(gspo_kernels.grpo_loss, on_policy=False, overwrite=True, backend=cuda)


if __name__ == "__main__":
    work(sys.argv[1:], "cuda")
