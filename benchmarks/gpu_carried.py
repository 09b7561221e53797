"""What a GPU run may find in carried/, which git ignores: peers as wheels, a built extension, a Triton cache.

    make gpu-wheels                               carried/wheels/: peers, their imports, pytest-xdist; Python 3.12
    make gpu-carry                                carried/_native*.so: the extension with CUDA kernels; needs nvcc
    python -m benchmarks.gpu_carried cache [90]   carried/triton-cache.tar for a compute capability, without a GPU
    make gpu ARGS="--save-cache carried/triton-cache.tar"    the same file from a run on a GPU

All of it is optional. What does not load is not used, and the results say why.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .gpu_parts import REPOSITORY, Absent, Context

FOLDER = REPOSITORY / "carried"
WHEELS, CACHE, SOURCES = FOLDER / "wheels", FOLDER / "triton-cache.tar", FOLDER / "sources.sha256"
BUILD = REPOSITORY / "build" / "gpu"
MOST_BYTES = 16_000_000  # of a saved cache
_NEEDED = (".json", ".cubin", ".so")  # of an entry, to launch its kernel
PEERS = (
    "liger-kernel==0.8.5", "trl==1.16.0", "cut-cross-entropy==25.1.1", "datasets==5.2.0", "dill==0.4.1",
    "multiprocess==0.70.19", "pytest-xdist==3.8.0", "execnet==2.1.2",
)  # fmt: skip
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# Loads the extension alone, without torch, in a process that may crash.
_PROBE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("gspo_kernels._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(json.dumps(hasattr(native, "cuda_one_read")))
"""


def use(environment: dict[str, str]) -> dict[str, str]:
    """Unpacks what is carried, changes `environment` for the parts of the run, and says of each what was used."""
    found = {}
    for name, prepare in (
        ("wheels", _use_wheels),
        ("triton cache", _use_cache),
        ("extension", lambda _: use_extension()),
    ):
        try:
            found[name] = prepare(environment)
        except Exception as error:  # a damaged file loses only its own content
            found[name] = f"not used: {type(error).__name__}: {error}"[:300]
    return found


def _use_wheels(environment: dict[str, str]) -> str:
    wheels = sorted(WHEELS.glob("*.whl"))
    if not wheels:
        return "none"
    site = _folder("site")
    shutil.rmtree(site, ignore_errors=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [environment.get("PYTHONPATH")])])
    return ", ".join(wheel.name.split("-py")[0].removesuffix("-cp312") for wheel in wheels)


def _use_cache(environment: dict[str, str]) -> str:
    """Triton's cache is a folder of these runs, or TRITON_CACHE_DIR; carried entries are added."""
    folder = Path(environment.setdefault("TRITON_CACHE_DIR", str(_folder("triton"))))
    folder.mkdir(parents=True, exist_ok=True)
    if not CACHE.exists():
        return f"none; {sum(1 for _ in folder.iterdir())} entries from before"
    return f"{unpack_cache(CACHE, folder)} entries"


def unpack_cache(path: Path, folder: Path) -> int:
    """Returns the number of new entries. Triton stores the full paths of an entry's files: they are rewritten."""
    with tempfile.TemporaryDirectory(prefix="gspo-cache-", dir=folder) as name:
        with tarfile.open(path) as archive:
            archive.extractall(name, filter="data")
        count = 0
        for entry in sorted(Path(name).iterdir()):
            target = folder / entry.name
            for group in entry.glob("__grp__*.json"):
                content = json.loads(group.read_text())
                children = content.get("child_paths", {})
                content["child_paths"] = {child: str(target / child) for child in children}
                group.write_text(json.dumps(content))
            if not target.exists():
                os.replace(entry, target)
                count += 1
    return count


def save_cache(folder: Path, path: Path) -> str:
    """Compressed, without the stages of compilation that nothing reads. Beyond `MOST_BYTES` nothing is saved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in sorted(folder.glob("*")) if entry.is_dir()]
    with tarfile.open(path, "w:xz", preset=1) as archive:
        for file in (file for entry in entries for file in sorted(entry.iterdir()) if file.suffix in _NEEDED):
            archive.add(file, file.relative_to(folder))
    size = path.stat().st_size
    if size > MOST_BYTES:
        path.unlink()
        return f"Triton's cache is not saved: {size / 1e6:.1f} MB, {MOST_BYTES / 1e6:.0f} MB are allowed"
    return f"Triton's cache: {len(entries)} entries, {size / 1e6:.1f} MB in {path}"


def use_extension() -> str:
    """Installs the carried extension if it is of these sources and loads; says which extension is used."""
    target = installed()
    carried = FOLDER / target.name
    if not carried.exists():
        reason = "none for this Python"
    elif SOURCES.exists() and SOURCES.read_text().strip() != sources():
        reason = "the sources have changed since"
    else:
        reason = probe(carried)
    if not reason:
        beside = target.with_name(target.name + ".new")  # a process may have the old one loaded
        shutil.copyfile(carried, beside)
        os.replace(beside, target)
        return f"carried: {target.name}"
    there = probe(target) if target.exists() else "not built"
    return f"none: carried, {reason}; in place, {there}" if there else f"in place: {target.name}; carried, {reason}"


def installed() -> Path:
    """Where this Python looks for the extension: one for every Python, unless this one is free-threaded."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    suffix = next((suffix for suffix in suffixes if suffix.startswith(".abi3")), suffixes[0])
    return REPOSITORY / "gspo_kernels" / f"_native{suffix}"


def probe(path: Path) -> str:
    """Why an extension is of no use on a GPU; empty if it is."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE, str(path)], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "it hangs"
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return f"does not load: {said[-1] if said else f'exit code {done.returncode}'}"[:300]
    return "" if json.loads(done.stdout.splitlines()[-1]) else "has no CUDA kernels"


def sources() -> str:
    """A digest of what the extension is made of."""
    digest = hashlib.sha256()
    for path in [REPOSITORY / "setup.py", *sorted((REPOSITORY / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(str(path.relative_to(REPOSITORY)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def download() -> int:
    """The peers for Python 3.12 on Linux; without what they need, which comes with torch and transformers."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", "--dest", str(WHEELS)]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    return subprocess.run([*command, *PEERS]).returncode


def build() -> int:
    """The extension with this Python and its CUDA kernels, into the folder that is carried."""
    FOLDER.mkdir(exist_ok=True)
    out = BUILD / "extension"
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={out}", f"--build-temp={BUILD / 'objects'}"]
    environment = {**os.environ, "GSPO_KERNELS_CUDA": "1", "GSPO_KERNELS_REQUIRE_NATIVE": "1"}
    code = subprocess.run(command, cwd=REPOSITORY, env=environment).returncode
    if code == 0:
        built = out / "gspo_kernels" / installed().name
        shutil.copyfile(built, FOLDER / built.name)
        SOURCES.write_text(sources() + "\n")
        print(f"{FOLDER / built.name}: {probe(built) or 'loads, with the CUDA kernels'}")
    return code


def _folder(name: str) -> Path:
    """Below build/, or where that cannot be written a new one."""
    try:
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / name).mkdir(exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"gspo-gpu-{name}-"))
    return BUILD / name


# ---- the part of a run that builds the extension where none was carried

_EXPLAIN = """
import json, torch, gspo_kernels
print(json.dumps(gspo_kernels.explain(torch.zeros(1, 1, 8, dtype=torch.bfloat16, device="cuda")).splitlines()))
"""


def extension(context: Context) -> bool:
    """The GPU's Triton kernels do not need it; CUDA C++ does, and the tests that compare with the CPU."""
    if context.smoke:
        raise Absent("a smoke run uses the extension that is there")
    used = use_extension()
    context.put("part", "extension", value=used)
    context.say(used)
    if used.startswith(("in place", "carried")):
        return True
    context.at("building")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])}
    code = subprocess.run(command, cwd=REPOSITORY, env=environment).returncode
    path = installed()
    reason = probe(path) if path.exists() else "no extension was built"
    context.put("part", "extension", value=f"built: {reason or 'with the CUDA kernels'}")
    if code == 0 and not reason:
        done = subprocess.run([sys.executable, "-c", _EXPLAIN], cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode == 0:
            context.put("machine", "explain", value=json.loads(done.stdout.splitlines()[-1]))
    return code == 0 and not reason


# ---- a Triton cache without a GPU
#
# The key of Triton's cache has its release: use the GPU machine's. Kernels are compiled by the calls that launch them,
# the works of the profile, the launch variants and the tests of both runs, on CPU tensors. The driver below
# launches nothing, so that answers are garbage and most tests fail; their outcome is ignored.

CAPABILITY = "GSPO_WARM_CAPABILITY"


class NoLaunch:
    """Triton's launcher of a compiled kernel, which does not launch it."""

    def __init__(self, *_: Any) -> None:
        self.launch_cooperative_grid = self.launch_pdl = False
        self.global_scratch_size = self.profile_scratch_size = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


class NoDriver:
    """What Triton needs of a driver, for a GPU that is not there."""

    launcher_cls = NoLaunch

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 166_912, "max_num_regs": 65_536, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 64, 0, 1024  # module, function, registers, spills, most threads


def pretend(capability: int) -> None:
    """From now on Triton compiles for such a GPU, and accepts CPU tensors."""
    from triton.runtime.driver import driver

    from gspo_kernels.rows import cpu_rows, triton_rows

    driver.set_active(NoDriver(capability))
    reasons: Callable[[Any], list[str]] = triton_rows.unsupported_reasons
    triton_rows.unsupported_reasons = lambda logits: [r for r in reasons(logits) if "on the CPU" not in r]
    cpu_rows.unsupported_reasons = lambda logits: ["Triton's kernels are compiled now"]


def pytest_configure(config: Any) -> None:
    """This module is the tests' plugin: they behave as on a GPU, with tensors on the CPU."""
    import modes
    import torch

    modes.DEVICE = torch.device("cpu")
    pretend(int(os.environ[CAPABILITY]))


def compile_works() -> int:
    """Calls the works of the profile, then every launch variant; returns the number of the former."""
    from . import gpu_variants as variants
    from .contestants import ours
    from .gpu import KERNELS
    from .gpu_speed import WORKS, build_named

    def call(name: str, dtype: str, overwrite_logits: bool) -> None:
        ours(build_named("cpu", f"{name}-{dtype}-1000-16"), overwrite_logits, "triton")()

    calls = [(name, dtype, over) for name in WORKS for dtype in ("bf16", "fp32") for over in (True, False)]
    for each in calls:
        call(*each)
    for kernel in KERNELS:
        if kernel == "one_read":
            continue
        tried = variants.variants_of(kernel)
        for use in tried.values():
            use()
            call(variants.SHOWN_BY[kernel][0][0], "bf16", True)
        next(iter(tried.values()))()
    return len(calls)


def make_cache(capability: str = "90") -> int:
    from .gpu import MORE_TESTS, TESTS

    with tempfile.TemporaryDirectory(prefix="gspo-warm-") as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, CAPABILITY: capability}
        tests = [str(next((REPOSITORY / "tests").rglob(name))) for name in (*TESTS, *MORE_TESTS)]
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_carried", "-p", "no:cacheprovider", "--tb=no"]
        running = subprocess.Popen(
            [*command, "-k", "not reference", *tests],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "GSPO_KERNELS_TEST_DEVICE": "cuda",
                "PYTHONPATH": os.pathsep.join(str(REPOSITORY / at) for at in ("tests", "tests/support")),
            },
            stdout=subprocess.DEVNULL,
        )
        pretend(int(capability))
        compile_works()
        running.wait()
        print(save_cache(Path(folder), CACHE))
    return 0


def main(command: str = "", *arguments: str) -> int:
    commands: dict[str, Callable[..., int]] = {"wheels": download, "build": build, "cache": make_cache}
    if command not in commands:
        raise SystemExit(f"python -m benchmarks.gpu_carried: expected one of {', '.join(commands)}; got {command!r}")
    return commands[command](*arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
