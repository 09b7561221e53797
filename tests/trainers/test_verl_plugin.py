"""How verl loads the losses (Ray's workers do in test_verl_worker.py), and the versions that it is installed with."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import verl
from modes import DEFAULT_MODE
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gspo_kernels.integrations import verl as integration

pytestmark = DEFAULT_MODE

ROOT = Path(__file__).parents[2]
VERL = verl.__version__


# --- versions ---------------------------------------------------------------------------------------------------------


def required_by(name: str, extras: tuple[str, ...] = ()) -> list[Requirement]:
    found = [Requirement(x) for x in requires(name) or []]
    return [x for x in found if x.marker is None or any(x.marker.evaluate({"extra": e}) for e in (*extras, ""))]


def test_versions_are_what_pip_resolves_for_the_extras() -> None:
    """Of [verl] and of [trl,verl]: every installed package satisfies what verl and TRL require, and so on."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    extras = [line.split('"')[1::2] for line in lines if line.startswith(("verl = [", "trl = ["))]
    waiting, seen, wrong = [Requirement(x) for extra in extras for x in extra], set[str](), []
    while waiting:
        wanted = waiting.pop()
        try:
            found = version(wanted.name)
        except PackageNotFoundError:  # what these tests do not use
            continue
        is_own = wanted.name == "setuptools"  # that came with the environment
        if not is_own and not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted}: {found} is installed")
        if canonicalize_name(wanted.name) not in seen:
            seen.add(canonicalize_name(wanted.name))
            waiting += required_by(wanted.name, tuple(wanted.extras))
    assert not wrong
    assert {
        "verl",
        "trl",
        "transformers",
        "tensordict",
        "ray",
        "numpy",
        "torch",
        "tokenizers",
        "huggingface-hub",
    } <= seen


@pytest.mark.parametrize(("found", "warned"), [("0.9.1", False), ("0.9.7", False), ("0.10.0", True)])
def test_other_versions_are_warned_about(found: str, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(verl, "__version__", found)
    # At the source: other trainers, imported in this process, change how records travel.
    monkeypatch.setattr(integration.logger, "warning", lambda text, *values: messages.append(text % values))
    importlib.reload(integration)
    assert any("tested with verl 0.9." in x for x in messages) is warned


# --- how verl loads it ------------------------------------------------------------------------------------------------


def load(**environment: str) -> subprocess.CompletedProcess[str]:
    """A process that imports verl and prints the names of its losses."""
    code = "import verl; import verl.trainer.ppo.core_algos as c; print('losses:', *c.POLICY_LOSS_REGISTRY)"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True,
        text=True, check=False, timeout=1800, cwd=Path(__file__).parent,
    )  # fmt: skip


def test_loaded_as_an_external_module() -> None:
    found = load(VERL_USE_EXTERNAL_MODULES="gspo_kernels.integrations.verl", VERL_USE_EXTERNAL_PLUGINS="none")
    assert set(integration.LOSSES) <= set(found.stdout.split()), found.stderr
    assert f"registered the policy losses {', '.join(integration.LOSSES)} with verl {VERL}" in found.stderr


def test_a_plugin_that_fails_is_logged(tmp_path: Path) -> None:
    """By the entry point in pyproject.toml, in a verl that has moved its registry. verl swallows the exception."""
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."verl.plugins"]\ngspo_kernels = "gspo_kernels.integrations.verl"\n' in text
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['verl.trainer.ppo.core_algos'] = None\n")
    folder = tmp_path / "gspo_kernels_plugin-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: gspo-kernels-plugin\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[verl.plugins]\ngspo_kernels = gspo_kernels.integrations.verl\n")
    found = load(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert f"gspo_kernels is NOT available in verl {VERL}: its registration failed" in found.stderr
    assert "Traceback" in found.stderr
