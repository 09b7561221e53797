"""No compiler, no extension: installation goes on and says so, and the same losses run on plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from modes import needs

pytestmark = needs("native")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("required", [False, True])
def test_a_build_without_a_compiler(tmp_path: Path, required: bool) -> None:
    environment = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "GSPO_KERNELS_CUDA": "0"}
    environment.pop("GSPO_KERNELS_REQUIRE_NATIVE", None)
    if required:
        environment["GSPO_KERNELS_REQUIRE_NATIVE"] = "1"
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert (done.returncode != 0) is required, said
    assert "the C++ kernels could not be compiled" in said
    assert "Install a C++17 compiler and reinstall" in said
    assert not list(tmp_path.rglob("*.so"))


def test_losses_run_on_plain_torch_and_say_so_once() -> None:
    script = """
        import sys, warnings
        sys.modules["gspo_kernels._native"] = None  # importing it now fails, as if it had not been built
        import torch, gspo_kernels

        logits, ids = torch.randn(2, 3, 11, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
        told = gspo_kernels.explain(logits, ids)
        assert told.startswith("reference (plain torch): runs"), told
        assert "the C++ extension was not built" in told and "C++17 compiler" in told, told
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                gspo_kernels.gspo_loss(logits, ids, torch.ones(2)).loss.backward()
        ours = [w for w in caught if "plain torch, many times slower" in str(w.message)]
        assert len(ours) == 1, caught
        assert (logits.grad != 0).all()
        try:
            gspo_kernels.gspo_loss(logits, ids, torch.ones(2), backend="native")
        except ValueError as error:
            assert "backend: expected one that takes these logits; got 'native', but the C++ extension" in str(error)
        else:
            raise AssertionError("the missing backend was accepted")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
