"""The extension on its own: it needs no torch to load, and then brings threads of its own."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

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
        native.forward(
            dtype="float32", outer=1, inner=rows, vocab=vocab, logits=(ctypes.addressof(logits), 0, vocab),
            token_ids=ctypes.addressof(ids), mask=0, temperature=1.0, row_temperature=0, tanh_scale=0.0, row_indices=0,
            threads=4, logprobs=ctypes.addressof(logprobs), entropy=ctypes.addressof(entropy),
            lse=ctypes.addressof(lse),
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


# Of `scale`: no row, so that nothing is read.
NO_ROWS = {"dtype": "float32", "outer": 0, "inner": 0, "vocab": 1, "logits": (0, 0, 0), "factor": 2.0, "threads": 1}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, "dtype: expected float32, bfloat16 or float16, got 'int8'"),
        ({"dtype": 32}, TypeError, "dtype: expected a str; got int"),
        ({"outer": 1.0}, TypeError, "outer: expected an int; got float"),
        ({"outer": 2**64}, ValueError, "outer: expected an int of 64 bits"),
        ({"threads": 2**31}, ValueError, "threads: expected an int of 32 bits"),
        ({"factor": "2"}, TypeError, "factor: expected a float; got str"),
        ({"factor": 10**400}, ValueError, "factor: expected a float; got an int that is too large for one"),
        ({"logits": 0}, TypeError, "logits: expected a tuple (address, outer stride, inner stride); got int"),
        (
            {"logits": (0, 0)},
            TypeError,
            "logits: expected a tuple (address, outer stride, inner stride); got a tuple of 2",
        ),
        ({"logits": (None, 0, 0)}, TypeError, "logits, address: expected an address (an int); got NoneType"),
        ({"logits": (-1, 0, 0)}, ValueError, "logits, address: expected an address; got an int below 0"),
        ({"mask": 0}, TypeError, "unknown argument: mask"),
        ({f"no_{i}": 0 for i in range(64)}, TypeError, "too many arguments"),
    ],
    ids=lambda each: ", ".join(each)[:20] if isinstance(each, dict) else "",
)
def test_an_argument_of_another_kind_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    native.scale(**NO_ROWS)
    with pytest.raises(error, match=re.escape(message)):
        native.scale(**{**NO_ROWS, **changed})


def test_an_absent_argument_is_named() -> None:
    for name in NO_ROWS:
        with pytest.raises(TypeError, match=f"missing argument: {name}"):
            native.scale(**{other: value for other, value in NO_ROWS.items() if other != name})
    with pytest.raises(TypeError, match="arguments are passed by name"):
        native.scale(*NO_ROWS.values())
    with pytest.raises(TypeError, match="unknown argument: name"):
        native.instruction_set(name="avx2")


def test_other_python_threads_run_meanwhile() -> None:
    """With a switch interval of a minute, this thread gets the interpreter only if the kernel lets go of it."""
    rows, vocab = 256, 100_000
    logits, ids = torch.zeros(rows, vocab), torch.zeros(rows, dtype=torch.int64)
    out = torch.zeros(rows), torch.zeros(rows), torch.zeros(rows, dtype=torch.float64)
    begun, seen, done = threading.Event(), threading.Event(), False

    def work() -> None:
        nonlocal done
        forward = functools.partial(
            native.forward,
            dtype="float32", outer=1, inner=rows, vocab=vocab, logits=(logits.data_ptr(), 0, vocab),
            token_ids=ids.data_ptr(), mask=0, temperature=1.0, row_temperature=0, tanh_scale=0.0, row_indices=0,
            threads=1, logprobs=out[0].data_ptr(), entropy=out[1].data_ptr(), lse=out[2].data_ptr(),
        )  # fmt: skip
        begun.set()
        for _ in range(2000):  # until a busy machine has woken the other thread
            if seen.is_set():
                return
            forward()
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


def test_python_exits_while_a_daemon_thread_is_in_a_kernel() -> None:
    """Python then ends the thread inside the kernel's call: with C++ in the way, the process would abort."""
    done = run(
        """
        import ctypes, threading, time
        count = 1 << 20
        numbers = (ctypes.c_float * count)()
        begun = threading.Event()

        def work():
            begun.set()
            while True:
                native.scale(
                    dtype="float32", outer=1, inner=1, vocab=count, logits=(ctypes.addressof(numbers), 0, 0),
                    factor=0.5, threads=1,
                )

        threading.Thread(target=work, daemon=True).start()
        begun.wait()
        time.sleep(0.05)
        """
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="needs binutils")
def test_no_instruction_set_shares_a_function() -> None:
    """The linker takes one of the objects that define a weak symbol: an old processor might get AVX-512 code."""
    done = subprocess.run(["nm", "--demangle", native.__file__], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("this extension is stripped: it comes from a wheel")
    weak = [line for line in done.stdout.splitlines() if " W gspo" in line or " V gspo" in line]
    assert not weak, "\n".join(weak)
