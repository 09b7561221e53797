"""What a run may bring along in carried/, which git ignores: peers as wheels, a built extension, a Triton cache.

    make gpu-wheels                   carried/wheels/: the peers, and what they import, for Python 3.12
    make gpu-carry PYTHON=python3.12  carried/_native*.so: the extension with the CUDA kernels; needs nvcc
    make gpu ARGS="--save-cache carried/triton-cache.tar"     what Triton has compiled, for the next run

All of it is optional. What does not load is left out, and the results say why.
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
from pathlib import Path
from typing import Any

from .parts import REPOSITORY

FOLDER = REPOSITORY / "carried"
WHEELS, CACHE, SOURCES = FOLDER / "wheels", FOLDER / "triton-cache.tar", FOLDER / "sources.sha256"
BUILD = REPOSITORY / "build" / "gpu"
MOST_BYTES = 14_000_000  # of a saved cache
_NEEDED = (".json", ".cubin", ".so")  # of an entry, to launch its kernel
PEERS = (
    "liger-kernel==0.8.5", "trl==1.16.0", "cut-cross-entropy==25.1.1", "datasets==5.2.0", "dill==0.4.1",
    "multiprocess==0.70.19",
)  # fmt: skip
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# The extension alone, without torch: a line of JSON, so that one that crashes is found out.
_PROBE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("gspo_kernels._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(json.dumps(hasattr(native, "cuda_one_read")))
"""


def use(environment: dict[str, str]) -> dict[str, str]:
    """Makes all that is carried ready, and says what became of each; `environment` is for the parts of the run."""
    found = {}
    for name, prepare in (("wheels", _use_wheels), ("triton cache", _use_cache)):
        try:
            found[name] = prepare(environment)
        except Exception as error:  # a damaged file costs what it holds
            found[name] = f"not used: {type(error).__name__}: {error}"[:300]
    try:
        found["extension"] = use_extension()
    except Exception as error:
        found["extension"] = f"not used: {type(error).__name__}: {error}"[:300]
    return found


def _use_wheels(environment: dict[str, str], folder: Path | None = None) -> str:
    wheels = sorted((folder or WHEELS).glob("*.whl"))
    if not wheels:
        return "none"
    site = _folder("site")
    shutil.rmtree(site, ignore_errors=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [environment.get("PYTHONPATH")])])
    return ", ".join(wheel.name.split("-py")[0].removesuffix("-cp312") for wheel in wheels)


def _use_cache(environment: dict[str, str], path: Path | None = None) -> str:
    """Triton's cache is a folder of these runs; one that is set already stays, and receives what is carried."""
    folder = Path(environment.setdefault("TRITON_CACHE_DIR", str(_folder("triton"))))
    folder.mkdir(parents=True, exist_ok=True)
    path = path or CACHE
    if not path.exists():
        return f"none; {sum(1 for _ in folder.iterdir())} entries from before"
    return f"{unpack_cache(path, folder)} entries"


def unpack_cache(path: Path, folder: Path) -> int:
    """Triton keeps the whole paths of an entry's files: they are brought to where the files are now."""
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
    """Compressed, without the stages of compilation that nothing reads. Beyond `MOST_BYTES` nothing is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    entries = [entry for entry in sorted(folder.iterdir()) if entry.is_dir()] if folder.is_dir() else []
    with tarfile.open(beside, "w:xz", preset=1) as archive:
        for entry in entries:
            archive.add(entry, entry.name, filter=_needed)
    size = beside.stat().st_size
    if size > MOST_BYTES:
        beside.unlink()
        return f"Triton's cache is not saved: {size / 1e6:.1f} MB, {MOST_BYTES / 1e6:.0f} MB are allowed"
    os.replace(beside, path)
    return f"Triton's cache: {len(entries)} entries, {size / 1e6:.1f} MB in {path}"


def _needed(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return member if member.isdir() or Path(member.name).suffix in _NEEDED else None


def use_extension() -> str:
    """The carried one if it is of these sources and loads with the CUDA kernels, else the one in place if that does."""
    target = installed()
    carried = FOLDER / target.name
    reason = _why_not(carried)
    if not reason:
        if not target.exists() or target.read_bytes() != carried.read_bytes():
            beside = target.with_name(target.name + ".new")
            shutil.copyfile(carried, beside)
            os.replace(beside, target)
        return f"carried: {target.name}"
    there = probe(target) if target.exists() else "not built"
    return f"none: carried, {reason}; in place, {there}" if there else f"in place: {target.name}; carried, {reason}"


def _why_not(carried: Path) -> str:
    if not carried.exists():
        return "none for this Python"
    if SOURCES.exists() and SOURCES.read_text().strip() != sources():
        return "the sources have changed since"
    return probe(carried)


def installed() -> Path:
    """Where this Python looks for the extension."""
    return REPOSITORY / "gspo_kernels" / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def probe(path: Path) -> str:
    """Why an extension is of no use on a GPU; empty if it is."""
    command = [sys.executable, "-c", _PROBE, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
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


def main(arguments: list[str]) -> int:
    known: dict[str, Any] = {"wheels": download, "build": build}
    if len(arguments) != 1 or arguments[0] not in known:
        raise SystemExit(f"python -m benchmarks.gpu.carried: expected one of {', '.join(known)}")
    code: int = known[arguments[0]]()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
