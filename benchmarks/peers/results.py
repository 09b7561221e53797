"""What a run leaves behind: one JSON with the machine, the versions, and all that is in the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..linear.peers import versions
from ..results import FOLDER, machine, rounded


def about(device: str) -> dict[str, Any]:
    name = {"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {}
    return {**machine(), **name, "packages": versions()}


def path_of(name: str) -> Path:
    return FOLDER / f"peers-{name}.json"


def save(name: str, found: dict[str, Any]) -> Path:
    path = path_of(name)
    path.write_text(json.dumps(rounded(found), indent=1) + "\n")
    return path


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
