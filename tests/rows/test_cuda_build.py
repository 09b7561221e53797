"""Installing with, without and in spite of CUDA's compiler: what is built, and what is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from modes import needs

pytestmark = needs("native")

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={folder}/lib", f"--build-temp={folder}/temp"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GSPO_KERNELS_", "GSPO_CUDA_"))}
    return subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True)


def an_nvcc(folder: Path, script: str) -> str:
    """A PATH on which nvcc is this shell script."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"{path.parent}{os.pathsep}{os.environ['PATH']}"


def test_kernels_that_nvcc_refuses_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    """A stand-in for the host's compiler writes empty files; the test looks at the commands."""
    path = an_nvcc(
        tmp_path, 'test "$1" = --list-gpu-code && echo sm_80 && exit 0\necho "unsupported GNU version" >&2; exit 1'
    )
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n')
    compiler.chmod(0o755)
    done = build(tmp_path, PATH=path, CC=str(compiler), CXX=str(compiler), LDSHARED=str(compiler))
    assert done.returncode == 0, done.stderr
    assert "unsupported GNU version" in done.stdout + done.stderr
    assert "the CUDA kernels could not be compiled" in done.stderr
    assert "a GPU will run the Triton kernels alone" in done.stderr
    assert list(tmp_path.glob("lib/gspo_kernels/_native*.so")) and "GSPO_CUDA" not in done.stdout


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('test "$1" = --list-gpu-code && echo sm_80 && exit 0\nexit 1', "the CUDA kernels could not be compiled"),
        ('test "$1" = --list-gpu-code && echo sm_70', "compiles for none of sm_80, sm_90, sm_100"),
    ],
)
def test_required_kernels_that_nvcc_refuses_end_the_installation(tmp_path: Path, script: str, said: str) -> None:
    done = build(tmp_path, PATH=an_nvcc(tmp_path, script), GSPO_KERNELS_CUDA="1")
    assert done.returncode != 0
    assert "GSPO_KERNELS_CUDA=1, but" in done.stderr and said in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_setting_that_is_none(tmp_path: Path) -> None:
    done = build(tmp_path, GSPO_KERNELS_CUDA="yes")
    assert done.returncode != 0 and "GSPO_KERNELS_CUDA: expected 0" in done.stderr


@pytest.mark.parametrize("variants", ["", "1"])
def test_variants_are_compiled_only_by_request(variants: str, tmp_path: Path) -> None:
    """And for one architecture, so that the build takes no longer than a minute or two."""
    path = an_nvcc(tmp_path, 'test "$1" = --list-gpu-code && echo sm_80 sm_90 sm_100 && exit 0\necho "$@" >&2; exit 1')
    done = build(tmp_path, PATH=path, GSPO_KERNELS_CUDA="1", GSPO_CUDA_VARIANTS=variants)
    said = done.stdout + done.stderr
    assert ("-DGSPO_VARIANTS" in said) is (variants == "1")
    assert "code=sm_90" in said and ("code=sm_80" in said) is (variants != "1")


@pytest.mark.skipif(
    NVCC is None or os.environ.get("GSPO_KERNELS_CUDA") == "0", reason="no nvcc here, or it is not used"
)
def test_the_extension_of_this_run_has_them() -> None:
    """`make test` has built it where nvcc is; without a driver it loads all the same, and says what is missing."""
    import gspo_kernels._native as native

    assert hasattr(native, "cuda_one_read")
    assert native.cuda_unavailable_reason(device=0) in ("", "there is no NVIDIA driver")
    assert native.cuda_variants()[0] == "default"
