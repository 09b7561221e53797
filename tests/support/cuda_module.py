"""The CUDA kernels for the suite: built into the extension where there is a GPU, else as threads of this machine.

The latter is the whole of csrc/cuda, launches and bindings included, on a stand-in for CUDA's runtime (gpu_on_host/).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "g++")
HERE = ROOT / "tests" / "support" / "gpu_on_host"
SOURCES = (HERE / "module.cpp", ROOT / "csrc/cuda/bindings.cpp", ROOT / "csrc/cuda/rows.cu")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-DGSPO_ON_HOST",
    "-DGSPO_VARIANTS",
    "-w",
)


@functools.cache
def on_host() -> ModuleType:
    """Built once for all processes of a run, and again when a source has changed."""
    parts = [*sorted((ROOT / "csrc").rglob("*.*")), *sorted(HERE.glob("*.*"))]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in parts if path.is_file())).hexdigest()[:16]
    folder = ROOT / "build" / "gpu_on_host"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{key}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in folder.glob("*.so"):
                old.unlink()
            includes = [f"-I{path}" for path in (HERE, sysconfig.get_paths()["include"])]
            objects = [str(folder / f"{source.stem}.o") for source in SOURCES]
            commands = [
                [COMPILER, *FLAGS, *includes, "-c", "-x", "c++", str(source), "-o", made]
                for source, made in zip(SOURCES, objects, strict=True)
            ]
            compilers = [subprocess.Popen(command) for command in commands]  # at once: other workers wait for it
            for compiler, command in zip(compilers, commands, strict=True):
                if compiler.wait():
                    raise subprocess.CalledProcessError(compiler.returncode, command)
            subprocess.run([COMPILER, "-shared", "-pthread", *objects, "-o", f"{target}.part"], check=True)
            Path(f"{target}.part").rename(target)
    specification = importlib.util.spec_from_file_location("gpu_on_host", target)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
