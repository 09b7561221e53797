"""Fills the measured tables of docs/gpu.md and README.md from results: python -m benchmarks.gpu_page [results.json]

A page has a block between two marks; the rest of it is written by hand. Without arguments the script takes the
committed results, one file for each GPU. A test compares the pages with them. `everywhere` says whether CUDA
C++ should be the default on a GPU.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpu import FOLDER, ONE_READ, ROWS
from .gpu_parts import REPOSITORY

Content = dict[str, Any]  # of a results file
MARKED = re.compile(r"(<!-- measured: begin\b[^\n]*\n).*?(\n<!-- measured: end -->)", re.DOTALL)
PASS = 8_192 * 151_936 * 2  # bytes of the logits
STAGES = 24 * 8_192 / PASS  # of statistics, old log-probabilities and mask in, gradients out: 24 bytes a row
UNMEASURED = "unmeasured"


# ---- where a measurement is in a results file


def of_work(work: str) -> Callable[[Content], Content]:
    return lambda content: content["cases"][f"{work}-{ROWS}"]


def of_one_read(work: str) -> Callable[[Content], Content]:
    return lambda content: content["one_read"]["cases"][f"{work}-bf16-151936-{ROWS}"]


def of_linear(work: str) -> Callable[[Content], Content]:
    return lambda content: content["linear"]["cases"][work]


def share_of_copy(content: Content, case: Content, seconds: float, units: float) -> float:
    """The copy is the case's own, timed in turn with the others; where there is none that of the bandwidth part."""
    moved: float = case["logits_bytes"]
    copy = case["contestants"].get("copy")
    rate: float = 2 * moved / copy["median"] if copy else content["bandwidth"]["copy"]["bytes_per_second"]
    return units * moved / seconds / rate


@dataclass(frozen=True)
class Row:
    """A work or a kernel: what it must move, what a model of it predicts, and where its measurement is."""

    name: str
    passes: float
    floors: tuple[str, str]  # milliseconds on an H100 at 3.0 TB/s, on an H200 at 4.3 TB/s
    predicted: tuple[str, str]
    measured: Callable[[Content], tuple[float, float | None]]  # seconds, share of the copy; KeyError if there is none


def _of_case(case_of: Callable[[Content], Content], units: float, contestant: str = "ours") -> Any:
    def measured(content: Content) -> tuple[float, float | None]:
        case = case_of(content)
        seconds = case["contestants"][contestant]["median"]
        return seconds, share_of_copy(content, case, seconds, units)

    return measured


def _time_alone(case_of: Callable[[Content], Content]) -> Any:
    def measured(content: Content) -> tuple[float, float | None]:
        return case_of(content)["contestants"]["ours"]["median"], None

    return measured


def _of_kernel(item: str, word: str, *others: str) -> Any:
    """A profile's kernel that has `word` in its name, and none of `others`."""

    def measured(content: Content) -> tuple[float, float | None]:
        for kernel in content["profile"][item]["kernels"]:
            if word in kernel["name"] and not any(other in kernel["name"] for other in others):
                return kernel["seconds"], kernel.get("share_of_copy")
        raise KeyError(word)

    return measured


TWO, THREE = ("1.66", "1.16"), ("2.49", "1.74")
WORKS = (
    Row("forward of GSPO, no gradient", 1, ("0.83", "0.58"), ("0.88-0.95", "0.63-0.70"),
        _of_case(of_work("forward"), 1)),
    Row("GSPO, off-policy", 3, THREE, ("2.65-2.8", "1.87-2.0"), _of_case(of_work("gspo"), 3)),
    Row("the same, 45% of no advantage, 15% of the rest clipped", 0, ("", ""), ("", ""),
        _time_alone(of_work("gspo_inactive"))),
    Row("GSPO, on-policy, Triton", 2, TWO, ("1.8-2.0", "1.45-1.65"), _of_case(of_work("gspo_on_policy"), 2)),
    Row("GSPO, on-policy, CUDA C++", 2, TWO, ("1.75-1.9", "1.30-1.5"),
        _of_case(of_one_read("gspo_on_policy"), 2, "ours_cuda")),
    Row("GRPO, off-policy, Triton", 3, THREE, ("2.65-2.8", "1.87-2.0"), _of_case(of_work("grpo"), 3)),
    Row("GRPO, off-policy, CUDA C++", 2, TWO, ("", ""), _of_case(of_one_read("grpo"), 2, "ours_cuda")),
    Row("PPO, off-policy, Triton", 3, THREE, ("2.65-2.8", "1.87-2.0"), _of_case(of_one_read("ppo"), 3)),
    Row("PPO, off-policy, CUDA C++", 2, TWO, ("", ""), _of_case(of_one_read("ppo"), 2, "ours_cuda")),
    Row("GSPO from hidden states, D = 4,096", 0, ("38-39", "38.8"), ("44-48", "43-46"),
        _time_alone(of_linear("dense"))),
)  # fmt: skip
KERNELS = (
    Row("`forward`: statistics of a row", 1, ("0.83", "0.58"), ("0.88-0.95", "0.63-0.70"),
        _of_kernel("gspo", "forward", "backward")),
    Row("`backward`: gradient, the logits read again", 2, TWO, ("1.75-1.9", "1.23-1.35"),
        _of_kernel("gspo", "backward", "forward")),
    Row("`forward_backward`: on-policy, one launch", 2, TWO, ("1.8-2.0", "1.45-1.65"),
        _of_kernel("gspo_on_policy", "forward_backward")),
    Row("`one_read`: CUDA C++, on-policy", 2, TWO, ("1.75-1.9", "1.30-1.5"),
        _of_kernel("gspo_on_policy_cuda", "one_read")),
    Row("`one_read`: CUDA C++, GRPO", 2, TWO, ("", ""), _of_kernel("grpo_cuda", "one_read")),
    Row("`sequence_kernel`, off-policy", STAGES, ("", ""), ("< 0.05", "< 0.05"), _of_kernel("gspo", "sequence")),
    Row("`batch_kernel`, off-policy", STAGES, ("", ""), ("< 0.05", "< 0.05"), _of_kernel("gspo", "batch")),
)  # fmt: skip


COMPARED = (  # in the README: a work, the passes that Triton takes, whether CUDA C++ has a kernel for it
    ("forward", "forward", 1, False),
    ("GSPO, off-policy", "gspo", 3, False),
    ("GSPO, on-policy", "gspo_on_policy", 2, True),
    ("GRPO, off-policy", "grpo", 3, True),
)


def tables(contents: Sequence[Content]) -> str:
    """For docs/gpu.md: works, kernels, and losses from hidden states."""
    lines = [_about(content) for content in contents]
    if not contents:
        lines.append("**No GPU time is known yet**: no results are committed. The predictions are of models.")
    lines += ["", *_table("work", WORKS, contents), "", *_table("kernel", KERNELS, contents)]
    for content in contents:
        lines += ["", *_from_hidden_states(content)]
    return "\n".join(lines)


def summary(contents: Sequence[Content]) -> str:
    """For the README."""
    if not contents:
        return (
            "**GPU times have not been measured yet**: no GPU was at hand, nothing here has run on one. `make gpu`\n"
            "measures them and writes `benchmarks/results/gpu-<name>.json`."
        )
    named = {"liger": "Liger", "trl": "TRL", "compile": "torch.compile", "eager": "torch"}
    lines = [
        "8,192 tokens, V = 151,936, bf16; milliseconds, and the share of a copy's speed on the same GPU:",
        "",
        f"| | GPU | Triton | CUDA C++ | {' | '.join(named.values())} |",
        f"|---|---|{'--:|' * (2 + len(named))}",
    ]
    for title, work, units, one_read in COMPARED:
        for content in contents:
            cells = _own(content, work, units, one_read)
            times = content.get("cases", {}).get(f"{work}-{ROWS}", {}).get("contestants", {})
            cells += [f"{times[peer]['median'] * 1e3:.2f}" if peer in times else "" for peer in named]
            lines.append(f"| {title} | {_gpu(content).split()[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _own(content: Content, work: str, units: float, one_read: bool) -> list[str]:
    """Times of this package's two backends, each with its share of a copy."""
    cells = []
    for case_of, name, passes in ((of_work(work), "ours", units), (of_one_read(work), "ours_cuda", 2)):
        found = _measured(Row("", 0, ("", ""), ("", ""), _of_case(case_of, passes, name)), content)
        seconds, share = found if name == "ours" or one_read else (None, None)
        cells.append("" if seconds is None else f"{seconds * 1e3:.2f} ({share:.0%})")
    return cells


PAGES: dict[str, Callable[[Sequence[Content]], str]] = {"docs/gpu.md": tables, "README.md": summary}


def filled(page: str, block: str) -> str:
    """A page with its block replaced; a page without marks as it is."""
    return MARKED.sub(lambda marks: f"{marks[1]}{block}{marks[2]}", page, count=1)


def committed() -> list[Content]:
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("gpu-*.json"))]


def _table(head: str, rows: Sequence[Row], contents: Sequence[Content]) -> list[str]:
    gpus = [_gpu(content) for content in contents] or ["a GPU"]
    titles = [head, "GB", "H100: floor / predicted, ms", "H200: floor / predicted, ms", *(f"{g}, ms" for g in gpus)]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'--:|' * (len(titles) - 1)}"]
    for row in rows:
        gigabytes = row.passes * PASS / 1e9
        cells = [row.name, f"{gigabytes:.{2 if gigabytes > 0.01 else 4}f}" if gigabytes else ""]
        cells += [" / ".join(filter(None, pair)) for pair in zip(row.floors, row.predicted, strict=True)]
        for content in contents or [{}]:
            seconds, share = _measured(row, content)
            text = UNMEASURED if seconds is None else f"{seconds * 1e3:.3f}"
            cells.append(text + (f" ({share:.0%})" if share is not None else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _from_hidden_states(content: Content) -> list[str]:
    """Times and peak memory of all contestants; then this package's for several chunk sizes."""
    linear = content.get("linear", {})
    named = {
        "ours": "gspo-kernels", "products": "bare products", "trl": "TRL", "eager": "torch",
        "cce": "cut-cross-entropy", "liger": "Liger",
    }  # fmt: skip
    lines = [f"| from hidden states, {_gpu(content)}: ms, GB | {' | '.join(named.values())} |"]
    lines.append(f"|---|{'--:|' * len(named)}")
    for case in linear.get("cases", {}).values():
        found = case["contestants"]
        cells = [_time_and_memory(found[name]) if name in found else "" for name in named]
        lines.append(f"| {case['title']} | {' | '.join(cells)} |")
    sizes = sorted({int(size) for work in linear.get("chunks", {}).values() for size in work})
    if sizes:
        lines += ["", f"| by the size of a chunk, MiB | {' | '.join(str(size >> 20) for size in sizes)} |"]
        lines.append(f"|---|{'--:|' * len(sizes)}")
        for work, tried in linear["chunks"].items():
            cells = [_time_and_memory(tried[str(size)]) if str(size) in tried else "" for size in sizes]
            title = linear.get("cases", {}).get(work, {}).get("title", work)
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _time_and_memory(found: Content) -> str:
    if "median" not in found:
        return str(found.get("error", UNMEASURED))
    memory = f", {found['extra_bytes'] / 1e9:.2f}" if found.get("extra_bytes") else ""
    return f"{found['median'] * 1e3:.1f}{memory}" + (", wrong" if found.get("wrong") else "")


def _measured(row: Row, content: Content) -> tuple[float | None, float | None]:
    try:
        return row.measured(content)
    except (KeyError, TypeError, ZeroDivisionError):
        return None, None


def _about(content: Content) -> str:
    about = content.get("machine") or {}
    copy = content.get("bandwidth", {}).get("copy", {}).get("bytes_per_second")
    speed = f"{copy / 1e12:.2f} TB/s" if copy else UNMEASURED
    triton = (about.get("packages") or {}).get("triton")
    return (
        f"{_gpu(content)}, torch {about.get('torch')}, Triton {triton}, commit {about.get('commit')}, "
        f"{about.get('date')}; a copy: {speed}, read and written."
    )


def _gpu(content: Content) -> str:
    return str((content.get("machine") or {}).get("gpu")).removeprefix("NVIDIA ")


# ---- where CUDA C++ should be the default

PAIRS = (("ours", "ours_cuda"), ("ours_fresh", "ours_cuda_fresh"))


def ratios(content: Content) -> dict[str, float]:
    """Triton's time / that of C++ in each case: the smaller ratio of in place and fresh; 0 where a time is missing."""
    found = {}
    for name, case in content.get("one_read", {}).get("cases", {}).items():
        times = {contestant: measured["median"] for contestant, measured in case["contestants"].items()}
        complete = all(name in times for pair in PAIRS for name in pair)
        found[name] = min(times[triton] / times[cuda] for triton, cuda in PAIRS) if complete else 0.0
    return found


def everywhere(content: Content) -> bool:
    """Whether CUDA C++ is ahead in all cases, and both runs' parts have finished."""
    parts = [part for name, part in content.get("parts", {}).items() if name.partition("-")[0] == "one_read"]
    finished = bool(parts) and all(part["status"] == "ok" for part in parts)
    found = ratios(content)
    return finished and set(ONE_READ) <= found.keys() and min(found.values()) > 1.0


def ahead(content: Content) -> str:
    """For the end of a run. tests/rows/test_faster_on.py compares the package's `FASTER_ON` with committed results."""
    found = [ratio for ratio in ratios(content).values() if ratio]
    if not found:
        return "CUDA C++ against Triton: not measured"
    count = f"{sum(ratio > 1.0 for ratio in found)} of {len(found)} cases"
    return (
        f"CUDA C++ is ahead of Triton in {count}; Triton's time is {min(found):.3f} to {max(found):.3f} times its time"
    )


def main(arguments: Sequence[str]) -> int:
    contents = [json.loads(Path(name).read_text()) for name in arguments] or committed()
    for name, block in PAGES.items():
        path = REPOSITORY / name
        before = path.read_text()
        after = filled(before, block(contents))
        if after != before:
            path.write_text(after)
        print(f"{name}: {'written' if after != before else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
