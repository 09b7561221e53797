"""Releases: one version, pinned tools, workflows, and what `make dist` accepts in a wheel."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from modes import DEFAULT_MODE

import gspo_kernels

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

pytestmark = DEFAULT_MODE


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    text = (ROOT / "pyproject.toml").read_text()
    content: dict[str, Any] = pytest.importorskip("tomllib").loads(text)  # from Python 3.11 on
    return content


@pytest.fixture(scope="module")
def dist() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dist", ROOT / ".ci" / "dist.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_the_version_is_in_one_place(project: dict[str, Any]) -> None:
    """The build reads it without importing the package: torch is not there."""
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gspo_kernels.__version__"}
    statements = ast.parse((ROOT / "gspo_kernels" / "__init__.py").read_text()).body
    values = [each.value for each in statements if isinstance(each, ast.Assign) and names(each) == ["__version__"]]
    assert [ast.literal_eval(value) for value in values] == [gspo_kernels.__version__]


def names(statement: ast.Assign) -> list[str]:
    return [target.id for target in statement.targets if isinstance(target, ast.Name)]


def test_pages_state_the_versions_of_the_metadata(project: dict[str, Any]) -> None:
    classifiers = project["project"]["classifiers"]
    pythons = [each.split(" :: ")[2] for each in classifiers if re.search(r":: Python :: 3\.\d+$", each)]
    assert project["project"]["requires-python"] == f">={pythons[0]}"
    (torch,) = (each for each in project["project"]["dependencies"] if each.startswith("torch"))
    for page in ("README.md", "docs/index.md", "docs/install.md"):
        text = " ".join((ROOT / page).read_text().split())
        said = re.search(r"Python (3\.\d+) to (3\.\d+) and torch (2\.\d+)", text)
        assert said is not None, page
        assert said.groups() == (pythons[0], pythons[-1], torch.removeprefix("torch>=")), page


def test_what_make_installs_is_pinned(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    for extra in ("test", "bench", "demo", "docs", "dist"):
        assert {distribution(each) for each in extras[extra]} - pinned() == set(), extra


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normal(line.split("==")[0]) for line in lines if "==" in line}


def distribution(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return normal(found[0])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- workflows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_pinned_code_and_may_only_read(workflow: Path) -> None:
    text = workflow.read_text()
    assert re.search(r"^permissions:\n  contents: read\n", text, flags=re.MULTILINE)
    actions = re.findall(r"uses: (\S+)", text)
    assert actions and [each for each in actions if not re.search(r"@(v\d+|release/v\d+|[0-9a-f]{40})$", each)] == []
    newest = r"--no-deps --upgrade \w+$" if workflow.name == "versions.yml" else "$^"  # which tries what is not pinned
    installed = [each for each in re.findall(r"pip install (.*)", text) if not re.match(newest, each)]
    assert all(arguments.startswith("--constraint constraints.txt ") for arguments in installed), installed
    requirements = {normal(name) for arguments in installed for name in arguments.split()[2:]}
    assert requirements - pinned() == set()


def test_only_a_tag_publishes() -> None:
    text = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    jobs = re.split(r"^  (?=\w+:\n)", text.partition("\njobs:\n")[2], flags=re.MULTILINE)
    (publishing,) = (job for job in jobs if "id-token" in job or "pypi-publish" in job)
    assert "    if: github.event_name == 'push' && startsWith(github.ref, 'refs/tags/v')\n" in publishing
    assert "      name: pypi\n" in publishing and "    needs: check\n" in publishing


# --- the build --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"GSPO_KERNELS_PURE": "yes"}, r"GSPO_KERNELS_PURE: expected 1 .* or 0; got 'yes'"),
        ({"GSPO_KERNELS_PURE": "1", "GSPO_KERNELS_CUDA": "1"}, "leaves out what GSPO_KERNELS_CUDA=1"),
        ({"GSPO_KERNELS_PURE": "1", "GSPO_KERNELS_REQUIRE_NATIVE": "1"}, "or GSPO_KERNELS_REQUIRE_NATIVE requires"),
    ],
)
def test_contradictory_settings_of_the_build(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    for name in ("GSPO_KERNELS_PURE", "GSPO_KERNELS_CUDA", "GSPO_KERNELS_REQUIRE_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(ROOT / "setup.py"))


PACKAGE = {"gspo_kernels/__init__.py", "gspo_kernels/py.typed"}
LICENCE = "gspo_kernels-1.0.dist-info/licenses/LICENSE"
EXTENSION = "gspo_kernels/_native.abi3.so"


@pytest.mark.parametrize(
    ("tag", "files", "message"),
    [
        ("py3-none-any", PACKAGE | {LICENCE}, None),
        ("cp310-cp310-macosx_11_0_arm64", PACKAGE | {LICENCE, EXTENSION}, None),
        ("py3-none-any", PACKAGE, "lacks gspo_kernels-1.0.dist-info/licenses/LICENSE"),
        (
            "py3-none-any",
            PACKAGE | {LICENCE, "tests/test_losses.py"},
            "not have the same files .*: tests/test_losses",
        ),
        ("py3-none-any", {"gspo_kernels/__init__.py", LICENCE}, "not have the same files .*: gspo_kernels/py.typed"),
        ("py3-none-any", PACKAGE | {LICENCE, EXTENSION}, r"has the extensions \['gspo_kernels/_native.abi3.so'\]"),
        ("cp310-cp310-macosx_11_0_arm64", PACKAGE | {LICENCE}, r"has the extensions \[\]"),
        ("cp310-cp310-macosx_11_0_arm64", PACKAGE | {LICENCE, EXTENSION, "gspo_kernels.libs/libgomp.so"}, "libgomp.so"),
        ("cp310-cp310-linux_x86_64", PACKAGE | {LICENCE, EXTENSION, "large"}, "takes .* bytes, more than 9"),
    ],
)
def test_what_may_be_in_a_wheel(
    tag: str,
    files: set[str],
    message: str | None,
    dist: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wheel = tmp_path / f"gspo_kernels-1.0-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for name in files - {"large"}:
            packed.writestr(name, "ten bytes.")
    monkeypatch.setattr(dist, "WORK", tmp_path)
    monkeypatch.setattr(dist, "LARGEST_EXTENSION", 9 if "large" in files else 10)
    monkeypatch.setattr(dist, "unstripped", lambda extension: [])
    if message is None:
        dist.check_wheel(wheel, PACKAGE, "1.0")
        return
    with pytest.raises(dist.Failure, match=message):
        dist.check_wheel(wheel, PACKAGE, "1.0")


def test_a_tag_is_that_of_the_version(dist: ModuleType, tmp_path: Path) -> None:
    sdist = tmp_path / "gspo_kernels-1.0.tar.gz"
    with pytest.raises(dist.Failure, match=r"refs/tags/v1\.1 is not the tag of 1\.0"):
        dist.check([sdist], ref="refs/tags/v1.1")
