"""The kernels of csrc/cuda as threads of this machine: the program of gpu_on_host/ checks them against sums in double.

A thread sanitizer sees every race that the barriers of a GPU would have to prevent; it is asked about mutants, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from modes import DEFAULT_MODE

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++")

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler here"),
]


def build(folder: Path, *flags: str, mutate: tuple[str, str] | None = None) -> Path:
    """The program, of a copy of the sources in which `mutate` has been replaced."""
    for part in ("csrc", "tests/gpu_on_host"):
        shutil.copytree(ROOT / part, folder / part)
    kernels = folder / "csrc/cuda/rows.cuh"
    if mutate is not None:
        text = kernels.read_text()
        assert text.count(mutate[0]) == 1, "a mutant that is none"
        kernels.write_text(text.replace(*mutate))
    program, source = folder / "rows", folder / "tests/gpu_on_host/rows.cpp"
    flags = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DGSPO_ON_HOST", f"-I{source.parent}", *flags)
    command = [COMPILER, "-std=c++17", "-O1", "-g", "-pthread", *flags, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=300, env=environment)


def test_rows(tmp_path: Path) -> None:
    done = run(build(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "mutate",
    [
        ("    put(of_target, (span.phase + target) % Columns<T>::kWidth, minus_infinity(T{}));\n", ""),
        ("return held ? 0.0 : on_policy * (1.0 + deviation);", "return on_policy * (1.0 + deviation);"),
        (
            "sum.weighted += (shared.weighted[w] + shared.totals[w] * down) * by;",
            "sum.weighted += shared.weighted[w] * by;",
        ),
        ("if (threadIdx.x < 2) {\n      const int at_edge", "if (threadIdx.x < 1) {\n      const int at_edge"),
    ],
    ids=["the target in the sums", "no clip", "unshifted entropy", "no tail"],
)
def test_wrong_kernels_are_found(mutate: tuple[str, str], tmp_path: Path) -> None:
    done = run(build(tmp_path, mutate=mutate), "few")
    assert done.returncode != 0


@pytest.mark.parametrize(
    "mutate",
    [
        None,
        (
            "    publish(shared, sums, turn);\n    sync_cluster();\n",
            "    publish(shared, sums, turn);\n    __syncthreads();\n",
        ),
        ("    __syncthreads();  // before anybody writes to the room, or to `gradient`, again\n", ""),
        ("    __syncthreads();\n    const RowGradient gradient", "    const RowGradient gradient"),
        ("Partial of_blocks[2][kMostBlocks]", "Partial of_blocks[1][kMostBlocks]"),
    ],
    ids=["sound", "blocks do not wait", "no barrier at the end", "no barrier before the gradient", "one turn"],
)
def test_races(mutate: tuple[str, str] | None, tmp_path: Path) -> None:
    done = run(build(tmp_path, "-fsanitize=thread", mutate=mutate), "few")
    assert (done.returncode == 0) == (mutate is None), done.stdout + done.stderr
