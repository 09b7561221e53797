"""Builds the one extension, `gspo_kernels._native`: C++17, without torch, in Python's stable ABI.

The same kernel source is compiled once per instruction set, each file with its own flags. Where ninja is installed it
runs the compiler, in parallel and only on changed files; otherwise a thread pool does. Where no compiler works, the
installation continues without the extension: the wheel is then pure Python (py3-none-any), `gspo_kernels` runs on plain
torch, and `explain()` says why. GSPO_KERNELS_REQUIRE_NATIVE=1 makes that an error. GSPO_KERNELS_PURE=1 makes the same
wheel where there is a compiler.

One wheel per platform serves every Python from 3.10 on (cp310-abi3), because csrc/python.h uses nothing but Python's
stable ABI. Calls take a third to a half of the time that they took with pybind11, which does not offer that ABI: for
two rows of 8 logits, `forward` takes 2.8 us instead of 9.1, `backward` 2.9 instead of 11.0, `kept_logits` 3.2 instead
of 5.8 (one core of an AMD EPYC). ctypes takes 5.0 us to pass 21 integers alone. nanobind has the stable ABI from Python
3.12 on. Free-threaded Python 3.13 and 3.14 have no stable ABI: for them the same sources become an extension of that
one Python.

Wheels are stripped. An extension that is built in place keeps its symbols, for debuggers and profilers.

Where CUDA's compiler is found (nvcc on PATH, or in CUDA_HOME), its kernels become part of the extension, with CUDA's
runtime linked into it. GSPO_KERNELS_CUDA=0 leaves them out, GSPO_KERNELS_CUDA=1 fails where they cannot be built.
GSPO_CUDA_VARIANTS=1 adds the variant of csrc/cuda/rows.cu that is compiled only for measurements, for sm_90 alone.

Why not scikit-build-core and CMake: a sketch with the same behaviour has 90 lines of CMake and 20 of TOML, which is
shorter, but not simpler. Where nvcc refuses the kernels, the C++ kernels must stay, and scikit-build-core can only
retry the whole build without CMake; so the sketch runs nvcc by hand at configure time, without incremental builds. And
every installation from source would need cmake and ninja.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

MACHINE = platform.machine().lower()
if sys.platform == "darwin":  # Python may be built for two processors; one compilation serves one
    MACHINE = os.environ.setdefault("ARCHFLAGS", f"-arch {MACHINE}").removeprefix("-arch").strip()
    if MACHINE not in ("arm64", "x86_64"):
        raise SystemExit(f"ARCHFLAGS: expected -arch arm64 or -arch x86_64; got {os.environ['ARCHFLAGS']!r}")
X86 = MACHINE in ("x86_64", "amd64")
SANITIZE = os.environ.get("GSPO_KERNELS_SANITIZE")  # "address,undefined": for `make sanitize`

STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-DPy_LIMITED_API=0x030A0000"] if STABLE_ABI else []
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]  # gcc, gcc, clang
BASELINE = (
    "csrc/bindings.cpp",
    "csrc/cpu/rows_baseline.cpp",
    "csrc/cpu/products.cpp",
    "csrc/cpu/products_baseline.cpp",
    "csrc/cpu/sparse.cpp",
    "csrc/cpu/sparse_baseline.cpp",
)
SOURCES: dict[str, list[str]] = {source: [] for source in BASELINE}
AVX512_BF16 = "-mavx512bf16"  # GCC 10 and Clang 9 know it; without it that file compiles to nothing
if X86:
    AVX2 = ["-mavx2", "-mfma", "-mf16c"]
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    SOURCES |= {f"csrc/cpu/{part}_avx2.cpp": AVX2 for part in ("rows", "products", "sparse")}
    SOURCES |= {f"csrc/cpu/{part}_avx512.cpp": AVX512 for part in ("rows", "products", "sparse")}
    SOURCES |= {"csrc/cpu/products_avx512bf16.cpp": [*AVX512, AVX512_BF16]}
LINK = ["-pthread"] + (["-ldl"] if sys.platform.startswith("linux") else [])
STRIP = ["-Wl,-S,-x"] if sys.platform == "darwin" else ["-s"]

CUDA = os.environ.get("GSPO_KERNELS_CUDA", "")
if CUDA not in ("", "0", "1"):
    raise SystemExit(f"GSPO_KERNELS_CUDA: expected 0 (leave the CUDA kernels out) or 1 (require them); got {CUDA!r}")
PURE = os.environ.get("GSPO_KERNELS_PURE", "")
if PURE not in ("", "0", "1"):
    raise SystemExit(f"GSPO_KERNELS_PURE: expected 1 (build without the extension) or 0; got {PURE!r}")
if PURE == "1" and (CUDA == "1" or os.environ.get("GSPO_KERNELS_REQUIRE_NATIVE")):
    raise SystemExit("GSPO_KERNELS_PURE=1 leaves out what GSPO_KERNELS_CUDA=1 or GSPO_KERNELS_REQUIRE_NATIVE requires")
ARCHITECTURES = ("80", "90", "100")  # one for each generation; newer GPUs compile the last one's PTX
VARIANTS = os.environ.get("GSPO_CUDA_VARIANTS", "")
if VARIANTS not in ("", "0", "1"):
    raise SystemExit(f"GSPO_CUDA_VARIANTS: expected 1 (compile the variants for measurements) or 0; got {VARIANTS!r}")
MEASURED_ON = "90"  # variants need clusters, and are compared on these GPUs
CUDA_SOURCES = {"csrc/bindings.cpp": ["-DGSPO_CUDA"], "csrc/cuda/bindings.cpp": []}
KERNELS = "csrc/cuda/rows.cu"
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
    LINK += [f"-fsanitize={SANITIZE}"]


class BuildExtension(build_ext):
    in_place = False  # the extension goes into the source tree; setuptools clears `inplace` while it builds

    def run(self) -> None:
        self.in_place = bool(self.inplace)
        super().run()

    def build_extension(self, extension: Extension) -> None:
        if PURE == "1":
            return self.make_pure(extension)
        try:
            self.compile_and_link(extension)
        except (OSError, subprocess.CalledProcessError, BaseError, CCompilerError) as error:
            if extension.optional and not self.editable_mode:
                self.make_pure(extension)
            raise CompileError(
                f"the C++ kernels could not be compiled ({error}). gspo_kernels will run on plain torch, many times "
                "slower. Install a C++17 compiler (GCC or Clang) and reinstall to change that"
            ) from error

    def copy_extensions_to_source(self) -> None:
        """And removes earlier builds, for this Python alone, which it would import instead."""
        super().copy_extensions_to_source()
        for extension in self.extensions:
            built = Path(self.get_ext_fullpath(extension.name))
            if built.exists():
                remove_builds(built, kept=built)

    def make_pure(self, extension: Extension) -> None:
        """Removes an earlier build's extension and the wheel's platform tag."""
        remove_builds(Path(self.get_ext_fullpath(extension.name)))
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            self.distribution.ext_modules = []
            wheel.root_is_pure = True

    def cxx_compiler(self) -> list[str]:
        """The command that compiles C++, without a file's arguments."""
        kind = self.compiler.compiler_type  # "msvc" on Windows: it takes other flags
        command = getattr(self.compiler, "compiler_so_cxx", None) or getattr(self.compiler, "compiler_so", None)
        if kind == "msvc" or not command:
            raise CompileError(f"GCC or Clang is needed; setuptools offers the compiler {kind!r}")
        if shutil.which(command[0]) is None:
            raise CompileError(f"there is no compiler: {command[0]!r} is not on PATH")
        return list(command)

    def compile_and_link(self, extension: Extension) -> None:
        # Editable installations from one tree share a folder, so that ninja recompiles only changed files.
        folder = Path("build", "editable") if self.editable_mode else Path(self.build_temp)
        objects = folder / ("sanitized" if SANITIZE else "release")
        compiler = self.cxx_compiler()
        objects.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in self.compiler.include_dirs]
        sources, kernels, link = SOURCES, {}, LINK
        nvcc = find_nvcc()
        if nvcc is not None:
            try:
                kernels, libraries = self.compile_cuda(nvcc, objects)
                sources, link = {**SOURCES, **CUDA_SOURCES}, LINK + libraries
            except (OSError, subprocess.CalledProcessError) as error:
                if CUDA == "1":
                    raise SystemExit(
                        f"GSPO_KERNELS_CUDA=1, but the CUDA kernels could not be compiled ({error})"
                    ) from error
                self.warn(f"the CUDA kernels could not be compiled ({error}): a GPU will run the Triton kernels alone")
        objects = objects / "with_cuda" if kernels else objects
        objects.mkdir(exist_ok=True)
        unknown = [] if not X86 or knows(compiler, AVX512_BF16) else [AVX512_BF16]
        commands = {}
        for source, flags in sources.items():
            own = [flag for flag in flags if flag not in unknown]
            target = objects / (source.replace("/", "_") + ".o")
            commands[target] = [*compiler, *includes, *FLAGS, *own, "-c", source]
        compile_all(commands, objects)
        path = Path(self.get_ext_fullpath(extension.name))
        remove_builds(path)  # setuptools would keep a newer file, also one that was linked with other options
        self.compiler.link_shared_object(
            [str(target) for target in (*commands, *kernels)],
            str(path),
            extra_postargs=link if self.in_place or SANITIZE else link + STRIP,
            target_lang="c++",
        )
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")

    def compile_cuda(self, nvcc: Path, folder: Path) -> tuple[dict[Path, list[str]], list[str]]:
        """Compiles the kernels; (commands by object file, libraries to link)."""
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        numbers = (MEASURED_ON,) if VARIANTS == "1" else ARCHITECTURES
        chosen = [number for number in numbers if f"sm_{number}" in known]
        if not chosen:
            raise OSError(f"{nvcc} compiles for none of sm_{', sm_'.join(numbers)}")
        code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
        code.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
        options = ["--options-file", "csrc/cuda/nvcc.options", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
        options += ["-DGSPO_VARIANTS"] if VARIANTS == "1" else []
        commands = {folder / "cuda_rows.o": [str(nvcc), *options, *code, "-c", KERNELS]}
        compile_all(commands, folder / "cuda")
        roots = (nvcc.resolve().parent.parent, *toolkit_of(nvcc))
        folders = (root / inside for root in roots for inside in ("lib64", "lib", "targets/x86_64-linux/lib"))
        runtime = next((path for each in folders if (path := each / "libcudart_static.a").exists()), None)
        if runtime is None:
            raise OSError(f"libcudart_static.a is not beside {nvcc}: CUDA's runtime library is not installed")
        # Its symbols are hidden, because torch has its own runtime, maybe of another release.
        return commands, [str(runtime), "-lrt", f"-Wl,--exclude-libs,{runtime.name}"]


def remove_builds(path: Path, kept: Path | None = None) -> None:
    """Removes all that this Python would import as this extension, such as an old _native.cpython-311-*.so."""
    module = path.name.partition(".")[0]
    for suffix in EXTENSION_SUFFIXES:  # the first one that exists is imported
        found = path.with_name(module + suffix)
        if found != kept:
            found.unlink(missing_ok=True)


def knows(compiler: list[str], flag: str) -> bool:
    command = [*compiler, flag, "-x", "c++", "-E", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def find_nvcc() -> Path | None:
    if CUDA == "0" or SANITIZE or not sys.platform.startswith("linux"):
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*(str(Path(home) / "bin") for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None and CUDA == "1":
        raise SystemExit("GSPO_KERNELS_CUDA=1, but nvcc is not on PATH nor in CUDA_HOME: install CUDA's toolkit")
    return None if found is None else Path(found)


def toolkit_of(nvcc: Path) -> list[Path]:
    """Where nvcc reports its toolkit: the nvcc on PATH may be a script."""
    output = subprocess.run([nvcc, "--dryrun", "-c", KERNELS], capture_output=True, text=True).stderr
    return [Path(line.split("TOP=")[1].strip()) for line in output.splitlines() if "TOP=" in line]


def compile_all(commands: dict[Path, list[str]], folder: Path) -> None:
    """Runs `command -o object` for each object file."""
    folder.mkdir(parents=True, exist_ok=True)
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
        Extension(
            "gspo_kernels._native",
            list(SOURCES),
            optional=not os.environ.get("GSPO_KERNELS_REQUIRE_NATIVE"),
            py_limited_api=STABLE_ABI,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
