"""One of the processes that run the tests: python -m benchmarks.gpu.shard RECORDS FOLDER FILES...

All processes collect the same tests, and take the next few of them in turn: whoever creates a file with their number in
FOLDER has them. Neighbours stand together, because they compile the same kernels.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from .suite import BROKEN, HANGS_AFTER
from .worker import die_with_parent

TAKEN = 8  # tests at a time


class Shard:
    """A pytest plugin. On a GPU the tests of the torch reference are left out: the CPU has them."""

    def __init__(self, records: Path, folder: Path, on_gpu: bool) -> None:
        self._records, self._folder, self._on_gpu = records.open("a"), folder, on_gpu

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self._on_gpu:
            left = [item for item in items if "reference" in item.name.partition("[")[2]]
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write("collected", files=Counter(item.nodeid.partition("::")[0] for item in session.items))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            reason = _last_line(report.longrepr)
            missing = "ModuleNotFoundError" in reason
            self._write("needs" if missing else "failed", test=report.nodeid or "tests", reason=reason)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for first in range(0, len(session.items), TAKEN):
            if not self._take(first):
                continue
            items: list[Any] = [*session.items[first : first + TAKEN], None]
            for item, following in pairwise(items):
                self._write("starts", test=item.nodeid)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                self._write("ended")
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._write("failed", test=report.nodeid, reason=_last_line(report.longrepr))
            if self._on_gpu and _context_is_broken():
                self._write("ended")
                sys.stdout.flush()
                os._exit(BROKEN)
        elif report.when == "call" or report.skipped:
            self._write("outcome", test=report.nodeid, outcome=report.outcome, seconds=report.duration)

    def _take(self, number: int) -> bool:
        try:
            os.close(os.open(self._folder / f"taken-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _write(self, kind: str, **record: Any) -> None:
        self._records.write(json.dumps({"kind": kind, **record}) + "\n")
        self._records.flush()


def _context_is_broken() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _last_line(longrepr: Any) -> str:
    lines = [line for line in str(longrepr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E ")]
    return (errors or lines or [""])[-1][:300]


def main(arguments: list[str]) -> int:
    die_with_parent()
    records, folder, *files = arguments
    on_gpu = os.environ.get("GSPO_KERNELS_TEST_DEVICE", "") == "cuda"
    options = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    options += ["--continue-on-collection-errors", "-o", f"faulthandler_timeout={HANGS_AFTER - 5:.0f}"]
    code = pytest.main([*files, *options], plugins=[Shard(Path(records), Path(folder), on_gpu)])
    # Failed tests are recorded; an error of pytest itself is the process's own.
    return 0 if code in (0, 1, 2, 5) else int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
