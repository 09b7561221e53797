"""examples/train_distributed.py: one process and two ranks under torchrun have equal learning curves.

Random numbers do not depend on the number of ranks, and in float64 rounding changes no sampled token and no clip
decision, so all curves are equal.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

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

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = str(EXAMPLES / "train_distributed.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
BRIEF = ("--quick", "--warmup-steps", "30", "--steps", "3")  # in each step some responses are clipped


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The example sets it."""


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The example with these arguments, in this process, which saves the imports of one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_distributed

    def called(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        train_distributed.main()

    return called


def test_two_ranks_learn_as_one_process_does(
    main: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test instead of three, because each worker of pytest-xdist would train the reference."""
    main(*BRIEF, "--output", str(tmp_path))
    one = json.loads((tmp_path / "single.json").read_text())
    expected = one["history"]
    assert len(set(expected["responses"])) == one["settings"]["steps"], "each step has responses of its own"
    assert all(fraction > 0 for fraction in expected["clip_fraction"]), "clip decisions are part of what is equal"
    for kind in ("data", "vocabulary"):
        command = [sys.executable, *TORCHRUN, SCRIPT, "--parallel", kind, *BRIEF, "--output", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        two = json.loads((tmp_path / f"{kind}.json").read_text())
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

    main("--compare", "--output", str(tmp_path))
    assert capsys.readouterr().out.count("reward: differs by 0 at most") == 2
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_parallel_without_ranks_is_refused(main: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main("--parallel", "data")
    said = capsys.readouterr().err
    assert "--parallel data: expected ranks" in said and "torchrun" in said
