"""examples/train_distributed.py as users run it: one process and two ranks under torchrun have equal learning curves.

Random numbers do not depend on the number of ranks, and in float64 rounding changes no sampled token and no clip
decision, so all curves are equal. Half a minute on two idle cores, most of it imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from modes import DEFAULT_MODE

DEMO = ("transformers", "tokenizers", "matplotlib", "tqdm")
pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # of this process, which computes nothing
    pytest.mark.skipif(any(find_spec(name) is None for name in DEMO), reason="needs the demo's packages: make demo"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"),
]

SCRIPT = str(Path(__file__).parents[2] / "examples" / "train_distributed.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=1800)


def trained(path: Path, *arguments: str) -> Any:
    """The content of the JSON file `path` after a quick run."""
    found = run(*arguments, "--quick", "--output", str(path.parent))
    assert found.returncode == 0, found.stderr
    return json.loads(path.read_text())


def test_two_ranks_learn_as_one_process_does(tmp_path: Path) -> None:
    """One test instead of three, because each worker of pytest-xdist would train the reference."""
    one = trained(tmp_path / "single.json", SCRIPT)
    expected = one["history"]
    assert len(set(expected["responses"])) == one["settings"]["steps"], "each step has responses of its own"
    assert all(fraction > 0 for fraction in expected["clip_fraction"]), "clip decisions are part of what is equal"
    for kind in ("data", "vocabulary"):
        two = trained(tmp_path / f"{kind}.json", *TORCHRUN, SCRIPT, "--parallel", kind)
        assert (one["ranks"], two["ranks"]) == (1, 2)
        assert one["settings"] == two["settings"]
        found = two["history"]
        for name in ("responses", "reward", "response_length", "held_out_step", "held_out_accuracy"):
            assert found[name] == expected[name], f"{kind}: {name}"
        assert found["clip_fraction"] == pytest.approx(expected["clip_fraction"], abs=1e-6), kind
        # Adam and clipping hide a gradient's size from the curves: a normalizer that is off by a factor is seen here.
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-9), kind
        # Replicas: parameters and last gradients of the body under a sharded head.
        assert two["replicas_differ_by"] == 0.0, kind

    compared = run(SCRIPT, "--compare", "--output", str(tmp_path))
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count("reward: differs by 0 at most") == 2
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_parallel_without_ranks_is_refused() -> None:
    found = run(SCRIPT, "--parallel", "data")
    assert found.returncode == 2
    assert "--parallel data: expected ranks" in found.stderr and "torchrun" in found.stderr
