"""The extension on its own: it needs no torch to load, and then brings threads of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from modes import needs

CPU_SOURCES = Path(__file__).resolve().parents[2] / "csrc/cpu"
COMPILER = os.environ.get("CXX", "g++")
native = pytest.importorskip("gspo_kernels._native", reason="the C++ extension is not built")
pytestmark = needs("native")


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `script` in a fresh interpreter that has `native` loaded from its file, and no torch."""
    prelude = f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("_native", {native.__file__!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        assert "torch" not in sys.modules
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_threads_without_torch() -> None:
    """Equal logits: every log-probability is -log V. Four threads on eight rows, none of them torch's."""
    done = run(
        """
        import ctypes, math
        rows, vocab = 8, 70001
        logits, ids = (ctypes.c_float * (rows * vocab))(), (ctypes.c_int64 * rows)(*range(rows))
        logprobs, entropy, lse = (ctypes.c_float * rows)(), (ctypes.c_float * rows)(), (ctypes.c_double * rows)()
        assert not native.shares_threads_with_torch()
        native.Rows(
            dtype="float32", logits=ctypes.addressof(logits), outer=1, inner=rows, vocab=vocab, outer_stride=0,
            inner_stride=vocab, token_ids=ctypes.addressof(ids), threads=4,
        ).forward(
            logprobs=ctypes.addressof(logprobs), entropy=ctypes.addressof(entropy), lse=ctypes.addressof(lse)
        )
        for row in range(rows):
            assert math.isclose(logprobs[row], -math.log(vocab), rel_tol=1e-6), logprobs[row]
            assert math.isclose(entropy[row], math.log(vocab), rel_tol=1e-6), entropy[row]
            assert math.isclose(lse[row], math.log(vocab), rel_tol=1e-6), lse[row]
        """
    )
    assert done.returncode == 0, done.stderr


def test_torch_lends_its_threads() -> None:
    assert native.shares_threads_with_torch()


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler here")
@pytest.mark.parametrize("threads_of", ["its own", "OpenMP"])
def test_an_exception_on_any_thread_is_thrown_to_the_caller(threads_of: str, tmp_path: Path) -> None:
    """Such as bad_alloc, a MemoryError in Python; thrown out of a thread it would end the process."""
    source, program = tmp_path / "throws.cpp", tmp_path / "throws"
    source.write_text(
        """
        #include <atomic>
        #include <chrono>
        #include <cstring>
        #include <new>
        #include "parallel.h"

        int main(int, char** arguments) {
          const bool openmp = std::strcmp(arguments[1], "OpenMP") == 0;
          if ((gspo::openmp_of_process() != nullptr) != openmp) return 2;
          for (int64_t bad = 0; bad < 8; ++bad) {
            std::atomic<int> begun{0};
            try {
              gspo::parallel_for(1 << 20, 1, 4, [&](int64_t begin, int64_t) {
                ++begun;
                if (begin == bad) throw std::bad_alloc();
                std::this_thread::sleep_for(std::chrono::microseconds(100));
              });
              return 3;
            } catch (const std::bad_alloc&) {
            }
            if (begun > 1 << 16) return 4;  // the rest was not begun
          }
        }
        """
    )
    flags = ["-fopenmp", "-Wl,--no-as-needed"] if threads_of == "OpenMP" else ["-pthread"]
    command = [COMPILER, "-std=c++17", "-O1", *flags, f"-I{CPU_SOURCES}", source, "-o", program, "-ldl"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program, threads_of], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_instruction_set_can_be_named() -> None:
    assert run("print(native.instruction_set())", GSPO_KERNELS_ISA="baseline").stdout.strip() == "baseline"


def test_unknown_instruction_set_is_refused() -> None:
    done = run("native.instruction_set()", GSPO_KERNELS_ISA="mmx")
    assert "ValueError: GSPO_KERNELS_ISA: expected avx512, avx2 or baseline" in done.stderr
    assert "got 'mmx'" in done.stderr


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16, got 'int8'"):
        native.Rows(dtype="int8", logits=0, outer=0, inner=0, vocab=1, outer_stride=0, inner_stride=0)


def test_other_python_threads_run_meanwhile() -> None:
    """With a switch interval of a minute, this thread gets the interpreter only if the kernel lets go of it."""
    rows, vocab = 256, 100_000
    logits, ids = torch.zeros(rows, vocab), torch.zeros(rows, dtype=torch.int64)
    out = torch.zeros(rows), torch.zeros(rows), torch.zeros(rows, dtype=torch.float64)
    begun, seen, done = threading.Event(), threading.Event(), False

    def work() -> None:
        nonlocal done
        kernels = native.Rows(
            dtype="float32", logits=logits.data_ptr(), outer=1, inner=rows, vocab=vocab, outer_stride=0,
            inner_stride=vocab, token_ids=ids.data_ptr(),
        )  # fmt: skip
        begun.set()
        for _ in range(2000):  # until a busy machine has woken the other thread
            if seen.is_set():
                return
            kernels.forward(logprobs=out[0].data_ptr(), entropy=out[1].data_ptr(), lse=out[2].data_ptr())
        done = True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        ran_meanwhile = not done
        seen.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert ran_meanwhile


@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="needs binutils")
def test_no_instruction_set_shares_a_function() -> None:
    """The linker takes one of the objects that define a weak symbol: an old processor might get AVX-512 code."""
    done = subprocess.run(["nm", "--demangle", native.__file__], capture_output=True, text=True, check=True)
    weak = [line for line in done.stdout.splitlines() if " W gspo" in line or " V gspo" in line]
    assert not weak, "\n".join(weak)
