"""How verl loads the losses, and the versions that it is installed with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from modes import DEFAULT_MODE

pytestmark = DEFAULT_MODE


# --- how verl loads it ------------------------------------------------------------------------------------------------


def load(**environment: str) -> subprocess.CompletedProcess[str]:
    """A process that imports verl and prints the names of its losses."""
    code = "import verl; import verl.trainer.ppo.core_algos as c; print('losses:', *c.POLICY_LOSS_REGISTRY)"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True,
        text=True, check=False, timeout=1800, cwd=Path(__file__).parent,
    )  # fmt: skip


def test_loaded_as_an_external_module() -> None:
    found = load(VERL_USE_EXTERNAL_MODULES="gspo_kernels.integrations.verl", VERL_USE_EXTERNAL_PLUGINS="none")
    assert "gspo_kernels gspo_token_kernels" in found.stdout, found.stderr
    assert "registered the policy losses gspo_kernels and gspo_token_kernels with verl 0.9.1" in found.stderr


@pytest.mark.parametrize("broken", [False, True])
def test_loaded_as_a_plugin(tmp_path: Path, broken: bool) -> None:
    """By the entry point in pyproject.toml. verl swallows a plugin's exception; our log reports it."""
    root = Path(__file__).parents[2]
    text = (root / "pyproject.toml").read_text()
    assert '[project.entry-points."verl.plugins"]\ngspo_kernels = "gspo_kernels.integrations.verl"\n' in text
    folder = tmp_path / "gspo_kernels_plugin-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: gspo-kernels-plugin\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[verl.plugins]\ngspo_kernels = gspo_kernels.integrations.verl\n")
    if broken:  # a verl that has moved its registry
        code = "import sys; sys.modules['verl.trainer.ppo.core_algos'] = None\n"
        (tmp_path / "sitecustomize.py").write_text(code)
    found = load(PYTHONPATH=os.pathsep.join([str(tmp_path), str(root)]))
    if broken:
        assert "gspo_kernels is NOT available in verl 0.9.1: its registration failed" in found.stderr
        assert "Traceback" in found.stderr
        return
    assert "gspo_kernels gspo_token_kernels" in found.stdout, found.stderr
    assert found.stderr.count("registered the policy losses") == 1
