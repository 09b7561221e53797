"""Versions of this package, torch, Triton and the trainers, and where they come from."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import torch

import gspo_kernels

from ..rows import triton_rows
from .findings import Trainer, Versions

PACKAGE = "gspo-kernels"
# Packages that an integration of ours works with, by their names on the index.
TRAINERS = (
    "trl", "verl", "transformers", "vllm", "sglang", "megatron-core", "openrlhf", "skyrl", "areal", "ms-swift",
    "torchtitan", "nemo-rl", "prime-rl", "open-instruct", "slime", "deepspeed", "liger-kernel",
)  # fmt: skip


def versions() -> Versions:
    folder = Path(gspo_kernels.__file__).resolve().parent
    installation, commit = installation_of(folder)
    libc, libc_version = platform.libc_ver()
    return Versions(
        gspo_kernels=gspo_kernels.__version__,
        location=str(folder),
        installation=installation,
        commit=commit,
        python=platform.python_version(),
        torch=torch.__version__,
        torch_build=torch_build(),
        triton=triton_rows.version(),
        trainers=tuple(
            Trainer(name, version, _problem(name, version))
            for name in TRAINERS
            if (version := version_of(name)) is not None
        ),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        libc=f"{libc} {libc_version}" if libc else None,
    )


def torch_build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installation_of(folder: Path) -> tuple[str, str | None]:
    """How the package in this folder came there, and its commit."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        distribution, origin = importlib.metadata.distribution(PACKAGE), _origin()
        if Path(str(distribution.locate_file(folder.name))).resolve() == folder and not _is_source_tree(folder):
            return "installed", origin.get("vcs_info", {}).get("commit_id")
        if origin.get("dir_info", {}).get("editable") and _path_of(origin) == str(folder.parent):
            return "editable", commit_of(folder.parent)
    return "a source tree that is not installed", commit_of(folder.parent)


def source_of(installation: str, folder: Path) -> str:
    """What pip installs this package from, once more."""
    if installation != "installed":
        return f"--editable {shlex.quote(str(folder.parent))}"
    origin = _origin()
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{origin['url']}"
    return shlex.quote(_path_of(origin) or PACKAGE)


def _origin() -> dict[str, Any]:
    """Where pip found the installed package, if it was not on an index (PEP 610)."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found: dict[str, Any] = json.loads(
            importlib.metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}"
        )
        return found
    return {}


def _path_of(origin: dict[str, Any]) -> str:
    """A folder, or the address of an archive; empty if it came from an index."""
    address = str(origin.get("url", ""))
    return url2pathname(address.removeprefix("file://")) if address.startswith("file://") else address


def _is_source_tree(folder: Path) -> bool:
    return (folder.parent / "setup.py").exists()


def commit_of(folder: Path) -> str | None:
    """The commit that a tree stands on, "-dirty" if files differ from it; None outside a repository."""
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def _problem(name: str, version: str) -> str:
    """Why a trainer's version is not one that `gspo-kernels[name]` installs; empty where there is no such extra."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # torch does not need it
        return ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for text in importlib.metadata.requires(PACKAGE) or ():
            wanted = Requirement(text)
            of_extra = wanted.marker is not None and wanted.marker.evaluate({"extra": name})
            if wanted.name == name and of_extra and not wanted.specifier.contains(version, prereleases=True):
                return f"tested with {wanted.specifier}"
    return ""
