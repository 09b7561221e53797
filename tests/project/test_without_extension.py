"""A build makes one extension for every Python.

Without a compiler the installation continues with a warning, and the same losses run on plain torch.

Messages are correct: where the extension was looked for, and which copy of the package has it.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import textwrap
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from modes import needs

from gspo_kernels.rows.extension import why_missing

pytestmark = needs("native")

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = EXTENSION_SUFFIXES[0]  # of this Python alone
EVERY_PYTHON = next((suffix for suffix in EXTENSION_SUFFIXES if suffix.startswith(".abi3")), SUFFIX)
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "GSPO_KERNELS_CUDA": "0"}


def environment(**more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("GSPO_KERNELS_REQUIRE_NATIVE", "PYTHONPATH")}
    return {**inherited, **more}


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("compiler", ["absent", "of Windows"])
def test_a_build_without_a_compiler(tmp_path: Path, required: bool, compiler: str) -> None:
    """It continues with one warning that says why. Windows' compiler takes other flags and is refused."""
    done = subprocess.run(
        [
            sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp",
            *(["--compiler=msvc"] if compiler == "of Windows" else []),
        ],
        cwd=ROOT,
        env=environment(**NO_COMPILER, **({"GSPO_KERNELS_REQUIRE_NATIVE": "1"} if required else {})),
        capture_output=True,
        text=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert (done.returncode != 0) is required, said
    assert "the C++ kernels could not be compiled" in said
    why = "'msvc'" if compiler == "of Windows" else "'/nonexistent/c++' is not on PATH"
    assert said.count(why) == 1, said
    assert "Install a C++17 compiler (GCC or Clang) and reinstall" in said
    assert required or "Traceback" not in said
    assert not list(tmp_path.rglob("*.so"))


def copy_sources(folder: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("gspo_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__py*"))


@pytest.mark.parametrize("command", [["bdist_wheel"], ["build_ext", "--inplace"]], ids=lambda each: each[0])
def test_one_extension_for_every_python(command: list[str], tmp_path: Path) -> None:
    """It replaces what an earlier version built for one Python, which would be imported first.

    A stand-in for the compiler writes empty files; the test looks at the commands.
    """
    copy_sources(tmp_path)
    old = tmp_path / "gspo_kernels" / f"_native{SUFFIX}"
    old.touch()
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho "$@" >> commands\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n')
    compiler.chmod(0o755)
    compilers = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), str(compiler))
    done = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=tmp_path,
        env=environment(GSPO_KERNELS_CUDA="0", GSPO_KERNELS_REQUIRE_NATIVE="1", **compilers),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    link = (tmp_path / "commands").read_text().splitlines()[-1].split()
    assert link[link.index("-o") + 1].endswith(f"_native{EVERY_PYTHON}")
    stripped = {"-s", "-Wl,-S,-x"} & set(link)
    if command[0] == "build_ext":
        assert [path.name for path in old.parent.glob("*.so")] == [f"_native{EVERY_PYTHON}"]
        assert not stripped, "symbols are needed here"
        return
    (wheel,) = (tmp_path / "dist").iterdir()
    assert stripped and (EVERY_PYTHON == SUFFIX or "-cp310-abi3-" in wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if "_native" in name]
    assert names == [f"gspo_kernels/_native{EVERY_PYTHON}"]


def test_a_wheel_without_the_extension_is_pure(tmp_path: Path) -> None:
    """It fits every Python and platform, and does not contain an earlier build's extension."""
    copy_sources(tmp_path)
    script = f"""
        import sys
        from pathlib import Path
        from setuptools import build_meta
        from setuptools.dist import Distribution
        build = Distribution().get_command_obj("build")
        build.ensure_finalized()
        folder = Path(build.build_platlib, "gspo_kernels")
        folder.mkdir(parents=True)
        for suffix in ("{SUFFIX}", "{EVERY_PYTHON}"):
            Path(folder, "_native" + suffix).write_text("of an earlier build")
        build_meta.build_wheel("wheels")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=environment(**NO_COMPILER),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        said = packed.read(metadata).decode()
    assert "gspo_kernels/__init__.py" in names and not [name for name in names if "_native" in name], names
    assert "Root-Is-Purelib: true" in said and "Tag: py3-none-any" in said


def test_losses_run_on_plain_torch_and_say_so_once(tmp_path: Path) -> None:
    """Imported from a source tree that has no extension, while an installed copy has one."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "gspo_kernels", tree / "gspo_kernels", ignore=ignored)
    (tree / "setup.py").touch()
    (site / "gspo_kernels").mkdir(parents=True)
    (site / "gspo_kernels" / f"_native{EVERY_PYTHON}").touch()
    script = """
        import sys, warnings
        editable = [found for found in sys.meta_path if getattr(found, "__name__", "") == "_EditableFinder"]
        sys.meta_path[:] = [each for each in sys.meta_path if each not in editable]  # it would find another tree's
        import torch, gspo_kernels

        logits, ids = torch.randn(2, 3, 11, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
        told = gspo_kernels.explain(logits, ids)
        assert told.startswith("reference (plain torch): runs"), told
        assert told.count("the C++ extension is not in") == 1, told
        assert "the copy installed in" in told and "run Python from another directory" in told, told
        assert "compiler" not in told, told
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
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tree,
        env=environment(PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


EVERYWHERE = ["rows_baseline", "products", "products_baseline", "sparse", "sparse_baseline"]
OF_X86 = [f"{part}_{isa}" for part in ("rows", "products", "sparse") for isa in ("avx2", "avx512")]
X86 = [*EVERYWHERE, *OF_X86, "products_avx512bf16"]


@pytest.mark.parametrize(
    ("machine", "archflags", "sources"),
    [
        ("arm64", None, EVERYWHERE),
        ("x86_64", None, X86),
        ("arm64", "-arch x86_64", X86),
        ("arm64", "-arch arm64 -arch x86_64", None),
    ],
)
def test_flags_on_macos(
    machine: str, archflags: str | None, sources: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build is for one processor, also where Python was built for two; arm64 gets no x86 flags."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("ARCHFLAGS", archflags or "")  # setup.py sets it: restored after the test
    if archflags is None:
        monkeypatch.delenv("ARCHFLAGS")
    if sources is None:
        with pytest.raises(SystemExit, match=r"^ARCHFLAGS: expected -arch arm64 or -arch x86_64"):
            runpy.run_path(str(ROOT / "setup.py"))
        return
    found = runpy.run_path(str(ROOT / "setup.py"))
    assert found["SOURCES"].keys() == {"csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in sources)}
    assert os.environ["ARCHFLAGS"] == (archflags or f"-arch {machine}")
    flags = [flag for of_file in found["SOURCES"].values() for flag in of_file]
    assert any(flag.startswith("-mavx") for flag in flags) == (sources is X86)
    assert found["LINK"] == ["-pthread"] and found["find_nvcc"]() is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_a_flag_that_the_compiler_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a flag is left out: an old compiler builds the other kernels."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    knows = runpy.run_path(str(ROOT / "setup.py"))["knows"]
    assert knows(["g++"], "-O2") and not knows(["g++"], "-mavx512bf17")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "reinstall with a C++17 compiler (GCC or Clang) present"),
        (["setup.py"], "a source tree; compile it there: pip install --editable"),
        (["gspo_kernels/_native.cpython-37m-x86_64-linux-gnu.so"], "which has _native.cpython-37m-x86_64-linux-gnu.so"),
        ([f"gspo_kernels/_native{EVERY_PYTHON}"], "does not load (GLIBCXX_3.4.99 not found); reinstall gspo_kernels"),
    ],
    ids=["installed without", "source tree", "of another Python", "does not load"],
)
def test_why_the_extension_is_missing(
    tmp_path: Path, files: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "gspo_kernels").mkdir()
    for name in files:
        (tmp_path / name).touch()
    said = why_missing(ImportError("GLIBCXX_3.4.99 not found"), tmp_path / "gspo_kernels")
    assert expected in said and str(tmp_path / "gspo_kernels") in said
