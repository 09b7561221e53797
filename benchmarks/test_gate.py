"""`--gate` from a shell: a loss that does its work three times fails the comparison, an unchanged one passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from . import gate
from .race import Outcome
from .results import REPOSITORY

CASE = "forward-bf16-151936-padded-ours"
SLOW = """
    import gspo_kernels

    fast = gspo_kernels.gspo_loss


    def slow(*arguments, **options):
        for _ in range(2):
            fast(*arguments, **options)
        return fast(*arguments, **options)


    gspo_kernels.gspo_loss = slow
"""


class Shell:
    """`pytest benchmarks --gate` in a process of its own, with a storage of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "slow.py").write_text(textwrap.dedent(SLOW))

    def __call__(self, *arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "benchmarks", "--gate", "-k", CASE, "-p", "no:cacheprovider"]
        storage = self.folder / "storage"
        done = subprocess.run(
            [*command, f"--benchmark-storage={storage}", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([".", str(self.folder)]), "GSPO_BENCH_ROWS": "64"},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def saved(self) -> list[Path]:
        return sorted((self.folder / "storage").rglob("*.json"))


def test_a_slower_loss_fails_the_gate(tmp_path: Path) -> None:
    shell, compare = Shell(tmp_path), ("--benchmark-compare", "--benchmark-compare-fail=median:50%")
    code, printed = shell("--benchmark-save=before")
    assert code == 0, printed
    (path,) = shell.saved()
    content = json.loads(path.read_text())
    assert content["machine_info"]["rows"] == 64
    assert [each["name"] for each in content["benchmarks"]] == [f"test_speed[{CASE}]"]

    code, printed = shell(*compare)
    assert code == 0 and "SLOWER" not in printed, printed

    code, printed = shell(*compare, "-p", "slow")
    assert code == 1, printed
    assert "SLOWER: median by more than 50%" in printed and "Traceback" not in printed, printed


def test_figures_that_do_not_compare_are_refused(pytestconfig: pytest.Config) -> None:
    now = {"unit": gate.MULTIPLES, "rows": 256, "cpu": "AMD EPYC", "threads": 2, "torch": "2.13.0"}
    for key, then in (("rows", 64), ("threads", 1), ("cpu", "Xeon"), ("unit", gate.SECONDS)):
        saved = {"machine_info": {**now, key: then}}
        with pytest.raises(pytest.UsageError, match=f"of the same {key}: .* got {then!r} in the saved run"):
            gate.pytest_benchmark_compare_machine_info(pytestconfig, now, saved)
    with pytest.raises(pytest.UsageError, match="same unit"):  # saved by another project's benchmarks
        gate.pytest_benchmark_compare_machine_info(pytestconfig, now, {"machine_info": {}})


def test_multiples_pair_the_rounds() -> None:
    assert gate.multiples(Outcome([1.0, 6.0]), Outcome([2.0, 3.0])) == [0.5, 2.0]
