"""Imports of the package go one way, in no circle, and no module is hidden by another object of its name."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gspo_kernels

PACKAGE = Path(gspo_kernels.__file__).parent
NAME = gspo_kernels.__name__
# What each folder may import besides itself.
ALLOWED = {
    "base": set[str](),
    "rows": {"base"},
    "losses": {"base", "rows"},
    "linear": {"base", "rows", "losses"},
    # A mismatch is told by the share of tokens that the objective would clip; what runs Triton is known by `rows`.
    "rollout": {"base", "rows", "losses"},
    "integrations": {"base", "rows", "losses", "linear", "rollout", "public"},
    # What `python -m gspo_kernels` runs: nobody else imports these.
    "doctor": {"base", "rows", "losses", "linear", "rollout", "public"},
    "planning": {"base", "rows", "losses", "linear", "rollout", "public"},
}
COMPILED = {"_native.__init__", "_cuda.__init__"}
PUBLIC = {"__init__", "__main__", "report"}  # all there is at the top level; imported by integrations alone


def modules() -> dict[str, Path]:
    """By name within the package: "report", "rows.types"; a folder's own is "rows.__init__"."""
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {".".join(relative.parts): path for relative, path in sorted(paths.items())}


def imported(module: str, tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Modules of the package that a module imports anywhere in its text, also in functions and for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == NAME]
            yield from (resolved(name.partition(".")[2], known) for name in names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                folder = module.split(".")[: -node.level]
                base = ".".join([*folder, *filter(None, [node.module])])
            elif (node.module or "").partition(".")[0] == NAME:
                base = (node.module or "").partition(".")[2]
            else:
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield inner if inner in known else resolved(base, known)


def resolved(name: str, known: set[str]) -> str:
    """A package is its `__init__`."""
    return name if name in known else f"{name}.__init__".strip(".")


def arrows() -> dict[str, set[str]]:
    found = modules()
    return {
        module: set(imported(module, ast.parse(path.read_text()), set(found))) - COMPILED
        for module, path in found.items()
    }


def folder_of(module: str) -> str:
    return "public" if module in PUBLIC else module.partition(".")[0]


def test_every_import_names_a_module() -> None:
    found = arrows()
    missing = {f"{module} imports {target}" for module, targets in found.items() for target in targets - found.keys()}
    assert not missing
    used = {"base.layout", "rows.arguments", "losses.token_stage"}
    assert used <= found["losses.from_logits"], "relative imports are read"


def test_every_module_is_in_a_folder() -> None:
    assert {folder_of(module) for module in modules()} == {"public", *ALLOWED}


def test_arrows_go_one_way() -> None:
    wrong = []
    for module, targets in arrows().items():
        folder = folder_of(module)
        if folder == "public":
            continue
        for target in targets:
            there = folder_of(target)
            if there not in {folder, *ALLOWED[folder]}:
                wrong.append(f"{module} ({folder}) imports {target} ({there})")
    assert not wrong, "\n".join(sorted(wrong))


def test_nobody_imports_integrations() -> None:
    """But the package itself, which exports what an integration offers without another library."""
    for module, targets in arrows().items():
        if folder_of(module) != "integrations":
            allowed = {"integrations.transformers"} if module == "__init__" else set()
            assert {target for target in targets if folder_of(target) == "integrations"} <= allowed, module


def test_no_import_cycle() -> None:
    try:
        list(TopologicalSorter(arrows()).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_no_module_is_hidden_by_a_name() -> None:
    """`import gspo_kernels.x` and `gspo_kernels.x` are one thing."""
    for info in pkgutil.walk_packages([str(PACKAGE)], prefix=f"{NAME}."):
        if info.name.startswith(f"{NAME}.integrations.") or info.name.endswith("__main__"):
            continue  # they need other libraries, and their folder imports none of them
        try:
            importlib.import_module(info.name)
        except ImportError as error:  # kernels, without Triton or the extension
            assert "triton" in str(error) or "_native" in info.name or "_cuda" in info.name, info.name
            continue
        parent, _, name = info.name.rpartition(".")
        assert getattr(sys.modules[parent], name) is sys.modules[info.name], f"{parent}.{name} is not the module"
