"""Fills the measured tables of docs/gpu.md and README.md from results: python -m benchmarks.gpu_page [results.json]

A page has a block between two marks; the rest of it is written by hand. Without arguments the script takes the
committed results, one file for each GPU. A test compares the pages with them. `everywhere` says whether CUDA
C++ should be the default on a GPU.
"""

from __future__ import annotations

import functools
import json
import operator
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpu import FOLDER, ONE_READ, ROWS
from .gpu_parts import REPOSITORY, table

Content = dict[str, Any]  # of a results file
Keys = tuple[str, ...]  # of keys in it
Measure = Callable[[Content], tuple[float, float | None]]  # seconds, share of the copy
MARKED = re.compile(r"(<!-- measured: begin\b[^\n]*\n).*?(\n<!-- measured: end -->)", re.DOTALL)
PASS = 8_192 * 151_936 * 2  # bytes of the logits
STAGES = 24 * 8_192 / PASS  # of statistics, old log-probabilities and mask in, gradients out: 24 bytes a row
UNMEASURED = "unmeasured"


# ---- where a measurement is in a results file


def of_work(work: str) -> Keys:
    return "cases", f"{work}-{ROWS}"


def of_one_read(work: str) -> Keys:
    return "one_read", "cases", f"{work}-bf16-151936-{ROWS}"


def _of_case(at: Keys, units: float = 0.0, contestant: str = "ours") -> Measure:
    """Seconds, and (for `units` passes over the logits) the share of the speed of a copy.

    The copy is the case's own, timed in turn with the others; where there is none that of the bandwidth part.
    """

    def measured(content: Content) -> tuple[float, float | None]:
        case = functools.reduce(operator.getitem, at, content)
        seconds, copy = case["contestants"][contestant]["median"], case["contestants"].get("copy")
        if not units:
            return seconds, None
        moved = case["logits_bytes"]
        rate = 2 * moved / copy["median"] if copy else content["bandwidth"]["copy"]["bytes_per_second"]
        return seconds, units * moved / seconds / rate

    return measured


def _of_kernel(item: str, word: str, other: str = "no other") -> Measure:
    """A profile's kernel that has `word` in its name, and not `other`."""

    def measured(content: Content) -> tuple[float, float | None]:
        for kernel in content["profile"][item]["kernels"]:
            if word in kernel["name"] and other not in kernel["name"]:
                return kernel["seconds"], kernel.get("share_of_copy")
        raise KeyError(word)

    return measured


@dataclass(frozen=True)
class Row:
    """A work or a kernel: the passes over the logits that it must make, a model's prediction, and its measurement."""

    name: str
    passes: float
    expected: tuple[str, str]  # milliseconds, floor / predicted: on an H100 at 3.0 TB/s, on an H200 at 4.3 TB/s
    measured: Measure  # KeyError if there is none


ONE, TWO, THREE = ("0.83 / 0.88-0.95", "0.58 / 0.63-0.70"), ("1.66", "1.16"), ("2.49 / 2.65-2.8", "1.74 / 1.87-2.0")
ON_POLICY, IN_CUDA = ("1.66 / 1.8-2.0", "1.16 / 1.45-1.65"), ("1.66 / 1.75-1.9", "1.16 / 1.30-1.5")
SMALL = ("< 0.05", "< 0.05")
WORKS = (
    Row("forward of GSPO, no gradient", 1, ONE, _of_case(of_work("forward"), 1)),
    Row("GSPO, off-policy", 3, THREE, _of_case(of_work("gspo"), 3)),
    Row("the same, 45% of no advantage, 15% of the rest clipped", 0, ("", ""), _of_case(of_work("gspo_inactive"))),
    Row("GSPO, on-policy, Triton", 2, ON_POLICY, _of_case(of_work("gspo_on_policy"), 2)),
    Row("GSPO, on-policy, CUDA C++", 2, IN_CUDA, _of_case(of_one_read("gspo_on_policy"), 2, "ours_cuda")),
    Row("GRPO, off-policy, Triton", 3, THREE, _of_case(of_work("grpo"), 3)),
    Row("GRPO, off-policy, CUDA C++", 2, TWO, _of_case(of_one_read("grpo"), 2, "ours_cuda")),
    Row("PPO, off-policy, Triton", 3, THREE, _of_case(of_one_read("ppo"), 3)),
    Row("PPO, off-policy, CUDA C++", 2, TWO, _of_case(of_one_read("ppo"), 2, "ours_cuda")),
    Row("GSPO from hidden states, D = 4,096", 0, ("38-39 / 44-48", "38.8 / 43-46"),
        _of_case(("linear", "cases", "dense"))),
)  # fmt: skip
KERNELS = (
    Row("`forward`: statistics of a row", 1, ONE, _of_kernel("gspo", "forward", "backward")),
    Row("`backward`: gradient, the logits read again", 2, ("1.66 / 1.75-1.9", "1.16 / 1.23-1.35"),
        _of_kernel("gspo", "backward", "forward")),
    Row("`forward_backward`: on-policy, one launch", 2, ON_POLICY, _of_kernel("gspo_on_policy", "forward_backward")),
    Row("`one_read`: CUDA C++, on-policy", 2, IN_CUDA, _of_kernel("gspo_on_policy_cuda", "one_read")),
    Row("`one_read`: CUDA C++, GRPO", 2, TWO, _of_kernel("grpo_cuda", "one_read")),
    Row("`sequence_kernel`, off-policy", STAGES, SMALL, _of_kernel("gspo", "sequence")),
    Row("`batch_kernel`, off-policy", STAGES, SMALL, _of_kernel("gspo", "batch")),
)  # fmt: skip


COMPARED = (  # in the README: a work, the passes that Triton takes, whether CUDA C++ has a kernel for it
    ("forward", "forward", 1, False),
    ("GSPO, off-policy", "gspo", 3, False),
    ("GSPO, on-policy", "gspo_on_policy", 2, True),
    ("GRPO, off-policy", "grpo", 3, True),
)


def tables(contents: Sequence[Content]) -> str:
    """For docs/gpu.md: works, kernels, and losses from hidden states."""
    lines = [*map(_about, contents), "", *_table("work", WORKS, contents), "", *_table("kernel", KERNELS, contents)]
    for content in contents:
        lines += ["", *_from_hidden_states(content)]
    return "\n".join(lines)


def summary(contents: Sequence[Content]) -> str:
    """For the README."""
    named = {"liger": "Liger", "trl": "TRL", "compile": "torch.compile", "eager": "torch"}
    rows = []
    for title, work, units, in_cuda in COMPARED:
        for content in contents:
            found = content.get("cases", {}).get(f"{work}-{ROWS}", {}).get("contestants", {})
            triton = _cell(_of_case(of_work(work), units), content, "{:.2f}", "")
            cuda = _cell(_of_case(of_one_read(work), 2, "ours_cuda"), content, "{:.2f}", "") if in_cuda else ""
            peers = [f"{found[peer]['median'] * 1e3:.2f}" if peer in found else "" for peer in named]
            rows.append([title, _gpu(content).split()[0], triton, cuda, *peers])
    about = "8,192 tokens, V = 151,936, bf16; milliseconds, and the share of a copy's speed on the same GPU:"
    return "\n".join([about, "", *table(["", "GPU", "Triton", "CUDA C++", *named.values()], rows, "---|---|")])


PAGES: dict[str, Callable[[Sequence[Content]], str]] = {"docs/gpu.md": tables, "README.md": summary}


def filled(page: str, block: str) -> str:
    """A page with its block replaced; a page without marks as it is."""
    return MARKED.sub(lambda marks: f"{marks[1]}{block}{marks[2]}", page, count=1)


def committed() -> list[Content]:
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("gpu-*.json"))]


def _table(head: str, rows: Sequence[Row], contents: Sequence[Content]) -> list[str]:
    def cells(row: Row) -> list[str]:
        gigabytes = row.passes * PASS / 1e9
        size = f"{gigabytes:.{2 if gigabytes > 0.01 else 4}f}" if gigabytes else ""
        return [row.name, size, *row.expected, *(_cell(row.measured, each, "{:.3f}", UNMEASURED) for each in contents)]

    heads = [head, "GB", "H100: floor / predicted, ms", "H200: floor / predicted, ms"]
    return table([*heads, *(f"{_gpu(content)}, ms" for content in contents)], map(cells, rows))


def _cell(measured: Measure, content: Content, form: str, missing: str) -> str:
    """Milliseconds, and the share of the copy."""
    try:
        seconds, share = measured(content)
    except (KeyError, TypeError, ZeroDivisionError):
        return missing
    return form.format(seconds * 1e3) + (f" ({share:.0%})" if share is not None else "")


def _from_hidden_states(content: Content) -> list[str]:
    """Times and peak memory of all contestants; then this package's for several chunk sizes."""
    linear = content.get("linear", {})
    cases, chunks = linear.get("cases", {}), linear.get("chunks", {})
    named = {
        "ours": "gspo-kernels", "products": "bare products", "trl": "TRL", "eager": "torch",
        "cce": "cut-cross-entropy", "liger": "Liger",
    }  # fmt: skip
    rows = [
        [case["title"], *(_time_and_memory(case["contestants"].get(name)) for name in named)] for case in cases.values()
    ]
    lines = table([f"from hidden states, {_gpu(content)}: ms, GB", *named.values()], rows)
    sizes = sorted({int(size) for work in chunks.values() for size in work})
    if sizes:
        rows = [
            [cases.get(work, {}).get("title", work), *(_time_and_memory(tried.get(str(size))) for size in sizes)]
            for work, tried in chunks.items()
        ]
        lines += ["", *table(["by the size of a chunk, MiB", *(str(size >> 20) for size in sizes)], rows)]
    contexts = linear.get("contexts", {}).values()
    if contexts:
        rows = [
            [f"{found['sequences']} of {found['length']:,} tokens", f"{found['seconds']:.2f}",
             f"{found['extra_bytes'] / 1e9:.2f}"]
            for found in contexts
        ]  # fmt: skip
        lines += ["", *table([f"long sequences, {_gpu(content)}", "s", "GB"], rows)]
    return lines


def _time_and_memory(found: Content | None) -> str:
    if found is None or "median" not in found:
        return "" if found is None else str(found.get("error", UNMEASURED))
    memory = f", {found['extra_bytes'] / 1e9:.2f}" if found.get("extra_bytes") else ""
    return f"{found['median'] * 1e3:.1f}{memory}" + (", wrong" if found.get("wrong") else "")


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
