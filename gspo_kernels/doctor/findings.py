"""What the doctor found: one value, of which both the text and the JSON are made.

Every field has a meaning for a person who reads a bug report; `SCHEMA` grows when one of them is renamed or removed.
"""

from __future__ import annotations

import dataclasses
import getpass
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Trainer:
    name: str  # of the package
    version: str
    problem: str  # why this version is not among those that the integration is tested with; empty if it is


@dataclass(frozen=True)
class Versions:
    gspo_kernels: str
    location: str  # the folder that it was imported from
    installation: str  # "installed", "editable", "a source tree that is not installed"
    commit: str | None  # with "-dirty" if files differ from it; None outside a repository
    python: str
    torch: str
    torch_build: str  # "CPU", "CUDA 12.8", "ROCm 6.4"
    triton: str | None
    trainers: tuple[Trainer, ...]  # those that are installed and have an integration
    system: str
    libc: str | None


@dataclass(frozen=True)
class Processor:
    model: str
    architecture: str
    cores: int  # as the system counts them
    usable_cores: int  # of these, what this process may use: its affinity, and a container's quota
    physical_cores: int  # of the usable ones, without the second thread of a core
    threads: int  # that torch and the kernels use
    memory_bytes: int  # 0: unknown
    instruction_sets: tuple[str, ...]  # of the wide ones, what the processor reports; empty: unknown
    torch_capability: str  # what torch's own kernels use
    kernels: str | None  # the instruction set of the C++ kernels; None without them
    product_kernels: str | None  # the same for products of hidden states and a head
    chosen_by: str  # why `kernels` is what it is
    huge_pages: str | None  # Linux's setting for transparent huge pages: "always", "madvise" or "never"
    problem: str  # why the C++ kernels do not run; empty if they do


@dataclass(frozen=True)
class Gpu:
    name: str
    device: str  # the first of its kind: "cuda:0"
    count: int
    memory_bytes: int
    capability: str  # "9.0"; of an AMD GPU its architecture, "gfx942"
    driver: str | None


@dataclass(frozen=True)
class Variable:
    name: str
    value: str
    effect: str
    problem: str  # an unknown name, or a value that is refused; empty: neither


@dataclass(frozen=True)
class Backend:
    name: str
    description: str
    runs: bool
    reason: str  # why, or why not


@dataclass(frozen=True)
class Service:
    """What runs for one dtype on one device, in the words of `gspo_kernels.explain`."""

    device: str
    dtype: str
    backends: tuple[Backend, ...]  # the one that runs first
    token_stage: str
    products: str  # of a loss from hidden states: what multiplies
    problem: str  # why nothing runs; empty if something does


@dataclass(frozen=True)
class Measure:
    name: str
    error: float | None  # relative to the number's own size; None: not a finite number
    allowed: float
    detail: str  # of an error beyond what is allowed: where, what came, what was expected

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.allowed


@dataclass(frozen=True)
class Check:
    """One backend on one device, with one dtype, against float64."""

    device: str
    backend: str
    dtype: str
    passed: bool
    measures: tuple[Measure, ...]
    raised: str  # the exception of a backend that raised one; empty if none did
    advice: str  # what to do about a failure


@dataclass(frozen=True)
class Timing:
    dtype: str
    work: str  # "forward", or "forward and backward"
    backend: str
    rows: int
    seconds: float
    bytes_per_second: float  # of the bytes that have to move: logits read, and gradients written
    copy_bytes_per_second: float  # of a copy of the same logits, measured in the same rounds
    copy_share: float  # of the former in the latter


@dataclass(frozen=True)
class Speed:
    device: str
    vocab: int
    timings: tuple[Timing, ...]
    problem: str  # why it was not measured; empty if it was


@dataclass(frozen=True)
class Advice:
    gain: str  # what would be better
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    schema: int
    versions: Versions
    processor: Processor
    gpus: tuple[Gpu, ...]
    environment: tuple[Variable, ...]
    services: tuple[Service, ...]
    checks: tuple[Check, ...]
    speed: tuple[Speed, ...]
    advice: tuple[Advice, ...]
    passed: bool


def as_json(value: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: six digits of each number, and None in place of numbers that JSON does not know."""

    def plain(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: plain(each) for key, each in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(each) for each in x]
        if isinstance(x, float):
            return float(f"{x:.6g}") if math.isfinite(x) else None
        return x

    found: dict[str, Any] = plain(dataclasses.asdict(value))
    return found


def without_names(value: Any) -> Any:
    """The same dataclass, tuple or text without the home folder, and without the user's and machine's names in paths.

    What a shell expands stands in place of them, so that commands can still be pasted.
    """
    if isinstance(value, str):
        return _without_names(value)
    if isinstance(value, tuple):
        return tuple(map(without_names, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: without_names(each) for name, each in fields.items()})
    return value


def _without_names(text: str) -> str:
    for folder in _homes():
        text = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w-])", "~", text)
    for name, replacement in ((_user(), "$USER"), (platform.node(), "$HOSTNAME")):
        if name:
            text = re.sub(rf"(?<=[/\\]){re.escape(name)}(?![\w.-])", replacement, text)
    return text


def _homes() -> set[str]:
    try:
        home = Path.home()
    except RuntimeError:  # a user without one, as in some containers
        return set()
    return {str(home), str(home.resolve())} - {"/"}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # or without a name
        return ""
