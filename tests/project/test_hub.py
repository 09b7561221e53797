"""The package as a kernel of the Hugging Face hub (hub/write.py): its rules, and builds loaded as it does."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE, KERNELS, on_device

import gspo_kernels

pytest.importorskip("tomllib", reason="hub/write.py reads TOML")
ROOT = Path(__file__).resolve().parents[2]


def loaded(name: str, path: Path) -> ModuleType:
    """As `kernels.get_kernel` loads a build: by its file, under its id."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def write() -> ModuleType:
    return loaded("hub_write", ROOT / "hub" / "write.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write: ModuleType) -> Path:
    target = tmp_path_factory.mktemp("hub")
    names = [path.name for path in write.write(target, "0123abc")]
    assert names == ["torch-cpu", "torch-cuda", "torch-rocm"]
    return target


@pytest.fixture(scope="module")
def builds(folder: Path) -> Iterator[list[ModuleType]]:
    """Two, side by side."""
    before = set(sys.modules)
    paths = [folder / "build" / f"torch-{backend}" for backend in ("cpu", "cuda")]
    yield [loaded(json.loads((path / "metadata.json").read_text())["id"], path / "__init__.py") for path in paths]
    for name in set(sys.modules) - before:
        if name.startswith("_gspo_kernels_"):
            del sys.modules[name]


@DEFAULT_MODE
def test_imports_are_relative_or_of_python_and_torch(folder: Path, write: ModuleType) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "typing_extensions"}  # torch depends on these
    paths = list((folder / "torch-ext" / "gspo_kernels").rglob("*.py"))
    assert len(paths) > 50
    for path in paths:
        text = path.read_text()
        assert not list(write.absolute_imports(text)), path
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.partition(".")[0] for name in names} <= allowed, path
    for text in ("import gspo_kernels.base", "from gspo_kernels import x", "import_module('gspo_kernels._native')"):
        assert list(write.absolute_imports(text))


@DEFAULT_MODE
def test_a_build_has_the_metadata_of_its_files(folder: Path) -> None:
    assert not list((folder / "torch-ext").rglob("_ops.py")), "kernel-builder writes it"
    for backend in ("cpu", "cuda", "rocm"):
        build = folder / "build" / f"torch-{backend}"
        found = json.loads((build / "metadata.json").read_text())
        assert (found["name"], found["id"]) == ("gspo-kernels", f"_gspo_kernels_{backend}_0123abc")
        assert found["backend"] == {"type": backend} and found["python-depends"] == []
        files = {path.relative_to(build).as_posix(): path for path in build.rglob("*.py")}
        assert found["digest"]["files"].keys() == files.keys() > {"__init__.py", "_ops.py", "rows/triton_rows.py"}
        for name, path in files.items():
            digest = base64.b64decode(found["digest"]["files"][name])
            assert digest == hashlib.sha256(path.read_bytes()).digest(), name


def namespaces() -> set[str]:
    names = {schema.name.partition("::")[0] for schema in torch._C._jit_get_all_schemas()}
    return {name for name in names if "gspo_kernels" in name}


def test_builds_have_operators_of_their_own(builds: list[ModuleType]) -> None:
    assert namespaces() >= {"gspo_kernels", *(build.__name__ for build in builds)}
    for build in builds:
        assert set(build.__all__) < set(gspo_kernels.__all__)
        assert build.gspo_loss is not gspo_kernels.gspo_loss
        inside = {Path(str(m.__file__)) for name, m in sys.modules.items() if name.startswith(f"{build.__name__}.")}
        assert len(inside) > 30 and all(path.is_relative_to(Path(str(build.__file__)).parent) for path in inside)


def test_a_build_computes_the_same_bits(builds: list[ModuleType]) -> None:
    """On plain torch, and where this mode has Triton, on Triton."""
    torch.manual_seed(0)
    logits, token_ids = on_device(torch.randn(2, 3, 37)), on_device(torch.randint(37, (2, 3)))
    old, advantages = on_device(torch.randn(2, 3) * 0.1 - 3), on_device(torch.tensor([1.0, -0.5]))

    def computed(package: Any) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        backend = "triton" if KERNELS == "triton" else "reference"
        loss = package.gspo_loss(leaf, token_ids, advantages, old, eps_low=0.5, eps_high=0.5, backend=backend).loss
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    expected = computed(gspo_kernels)
    assert (expected[1] != 0).any()
    for build in builds:
        assert all(torch.equal(mine, its) for mine, its in zip(computed(build), expected, strict=True))


@DEFAULT_MODE
def test_a_build_says_why_it_has_no_extension(builds: list[ModuleType]) -> None:
    assert "kernels of the Hugging Face hub have no C++ extension" in builds[0].explain(torch.zeros(1, 1, 2))


@DEFAULT_MODE
def test_a_rewrite_that_finds_nothing_is_an_error(write: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"base/operators\.py: expected .* once; got it 0 times"):
        write.adapted(Path("base/operators.py"), "x = 1\n")
    with pytest.raises(SystemExit, match=r"rows/x\.py: expected relative imports; got gspo_kernels\.base"):
        write.adapted(Path("rows/x.py"), "from gspo_kernels.base import checks\n")
