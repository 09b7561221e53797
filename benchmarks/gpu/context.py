"""What a part's `run` is given: its arguments, its time, and where to write what it finds."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .parts import RECORDS, SECONDS


class Absent(Exception):
    """There is nothing to run here, and why."""


@dataclass
class Context:
    """What a part's `run` is given."""

    arguments: list[str]
    smoke: bool
    began: float = field(default_factory=time.monotonic)
    seconds: float = field(default_factory=lambda: float(os.environ.get(SECONDS, "600")))
    records: str = field(default_factory=lambda: os.environ.get(RECORDS, os.devnull))

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def put(self, *at: str, value: Any) -> None:
        """Into the results file; `at` may begin with "part", which is this part's own entry."""
        self._write({"at": at, "value": value})

    def at(self, where: str) -> None:
        """What is about to run: named if it is the last thing that this process did."""
        self.put("part", "at", value=where)

    def finished(self, item: str) -> None:
        self._write({"finished": item})

    def say(self, line: str) -> None:
        """To the terminal and the log."""
        print(line, flush=True)
        self._write({"progress": line})

    def _write(self, record: dict[str, Any]) -> None:
        with Path(self.records).open("a") as file:
            file.write(json.dumps(record) + "\n")
