"""Builds the one extension, `gspo_kernels._native`: pybind11 and C++17, without torch.

The same kernel source is compiled once per instruction set, each file with its own flags. Where ninja is installed it
runs the compiler, in parallel and only on what changed; otherwise a thread pool does. Where no compiler works, the
installation goes on without the extension: `gspo_kernels` then runs on plain torch and `explain()` says why.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = os.environ.get("GSPO_KERNELS_SANITIZE")  # "address,undefined": for `make sanitize`

FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]  # of gcc, of gcc, of clang
SOURCES = {"csrc/bindings.cpp": [], "csrc/cpu/rows_baseline.cpp": []}
if X86:
    SOURCES["csrc/cpu/rows_avx2.cpp"] = ["-mavx2", "-mfma", "-mf16c"]
    SOURCES["csrc/cpu/rows_avx512.cpp"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
LINK = ["-pthread"] + (["-ldl"] if sys.platform.startswith("linux") else [])
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
    LINK += [f"-fsanitize={SANITIZE}"]


class BuildExtension(build_ext):
    def build_extension(self, extension: Extension) -> None:
        objects = Path(self.build_temp) / ("sanitized" if SANITIZE else "release")
        objects.mkdir(parents=True, exist_ok=True)
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        includes = [f"-I{path}" for path in [get_include(), *self.compiler.include_dirs]]
        commands = {
            objects / f"{Path(source).stem}.o": [*compiler, *includes, *FLAGS, *flags, "-c", source]
            for source, flags in SOURCES.items()
        }
        try:
            compile_all(commands, objects)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"the C++ kernels could not be compiled ({error}). gspo_kernels will run on plain torch, many times "
                "slower. Install a C++17 compiler and reinstall to change that"
            ) from error
        self.compiler.link_shared_object(
            [str(target) for target in commands],
            self.get_ext_fullpath(extension.name),
            extra_postargs=LINK,
            target_lang="c++",
        )


def compile_all(commands: dict[Path, list[str]], folder: Path) -> None:
    """Runs `command -o object` for each object file."""
    ninja = shutil.which("ninja")
    if ninja is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda item: subprocess.run([*item[1], "-o", str(item[0])], check=True), commands.items()))
        return
    rule = "rule compile\n  command = $arguments -MMD -MF $out.d -o $out\n  depfile = $out.d\n  deps = gcc\n\n"
    builds = (
        f"build {target}: compile {command[-1]}\n  arguments = {shlex.join(command)}\n"
        for target, command in commands.items()
    )
    script = folder / "build.ninja"
    script.write_text(f"builddir = {folder}\n{rule}" + "".join(builds))
    subprocess.run([ninja, "-f", str(script)], check=True)


setup(
    ext_modules=[
        Extension("gspo_kernels._native", list(SOURCES), optional=not os.environ.get("GSPO_KERNELS_REQUIRE_NATIVE"))
    ],
    cmdclass={"build_ext": BuildExtension},
)
