"""Writes the package as a kernel of the Hugging Face hub (https://huggingface.co/docs/kernels), from its own sources.

    python hub/write.py [--output build/hub]

The hub loads a folder under a name of its own, maybe two versions side by side. So its rules are: imports relative,
operators in a namespace of that build, and no module but those of Python, of torch (with Triton), and of the kernel.
This takes the losses from logits and from hidden states, on Triton and plain torch; the C++ extension, rollouts and
integrations stay out. Two things are rewritten: the namespace of operators, and absolute imports of the extension.

The output has two forms:

- the source of kernel-builder, which needs Nix: build.toml, flake.nix, CARD.md, tests, torch-ext/gspo_kernels;
- what it builds from that, for `kernels.get_local_kernel` and for an upload without Nix: build/torch-<backend>.

The hub asks for Python 3.9. This package needs 3.10 (`X | Y` in the annotations that operators read, `zip(strict=)`),
and so do the hub's own library, from kernels 0.17 on, and torch from 2.9 on: no user of the hub has less.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:
    raise SystemExit("hub/write.py: expected Python 3.11 or newer, which reads build.toml; got an older one") from None

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "gspo_kernels"
PARTS = ("base", "rows", "losses", "linear", "report")  # folders and modules
COPIED = ("build.toml", "flake.nix", "CARD.md", "tests")
OPERATORS = "base/operators.py"
NAMESPACE = 'f"gspo_kernels::{name}"'
AFTER_IMPORT = "from .scalars import run_time_list\n"
OPS = '''"""The namespace of this build's operators."""

import torch

_OPS_NAME = "{id}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python hub/write.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "hub", metavar="FOLDER")
    folder = parser.parse_args(arguments).output
    for variant in write(folder):
        print(f"wrote {variant}")
    print(f"try it: kernels.get_local_kernel(pathlib.Path({str(folder)!r}))")


def write(folder: Path, unique_id: str | None = None) -> list[Path]:
    """Both forms; the folders of the second. `unique_id`: of this build, by default that of the commit's files."""
    for generated in ("torch-ext", "build", "tests"):
        shutil.rmtree(folder / generated, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        copy(ROOT / "hub" / name, folder / name)
    copy(ROOT / "LICENSE", folder / "LICENSE")
    source = folder / "torch-ext" / PACKAGE
    write_source(source)
    with (ROOT / "hub" / "build.toml").open("rb") as file:
        general = tomllib.load(file)["general"]
    variants = [write_variant(folder, source, general, each, unique_id or tree_id()) for each in general["backends"]]
    copy(ROOT / "hub" / "CARD.md", folder / "build" / "CARD.md")  # the hub's README.md
    return variants


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


def write_source(target: Path) -> None:
    for part in PARTS:
        found = ROOT / PACKAGE / part
        for path in sorted(found.rglob("*.py")) if found.is_dir() else [found.with_suffix(".py")]:
            relative = path.relative_to(ROOT / PACKAGE)
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            (target / relative).write_text(adapted(relative, path.read_text()))
    (target / "__init__.py").write_text(public_names())


def adapted(relative: Path, text: str) -> str:
    """A module's text by the hub's rules."""
    up = "." * len(relative.parts)
    text = re.sub(rf"\bimport {PACKAGE}\.(\w+) as (\w+)", rf"from {up} import \1 as \2", text)
    text = re.sub(rf'import_module\("{PACKAGE}\.(\w+)"\)', rf'import_module("{up}\1", __package__)', text)
    if relative.as_posix() == OPERATORS:
        for old, new in (
            (NAMESPACE, "add_op_namespace_prefix(name)"),
            (AFTER_IMPORT, f"from .._ops import add_op_namespace_prefix\n{AFTER_IMPORT}"),
        ):
            if text.count(old) != 1:
                raise SystemExit(
                    f"{OPERATORS}: expected {old!r} once; got it {text.count(old)} times: fix hub/write.py"
                )
            text = text.replace(old, new)
    if wrong := sorted(set(absolute_imports(text))):
        raise SystemExit(f"{relative}: expected relative imports; got {', '.join(wrong)}: fix hub/write.py")
    return text


def absolute_imports(text: str) -> Iterator[str]:
    """Names of the package in imports, also as a string that is imported."""
    for node in ast.walk(ast.parse(text)):
        names: list[Any] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        yield from (name for name in names if str(name).partition(".")[0] == PACKAGE)


def public_names() -> str:
    """The text of `__init__.py`: of the package's public names those that these parts define."""
    sys.path.insert(0, str(ROOT))
    import gspo_kernels as package

    modules: dict[str, list[str]] = {}
    for name in package.__all__:
        module = getattr(package, name).__module__.removeprefix(f"{PACKAGE}.")
        if module.partition(".")[0] in PARTS:
            modules.setdefault(module, []).append(name)
    lines = [f'"""{(package.__doc__ or "").strip()}"""', ""]
    for module, names in sorted(modules.items()):
        lines += [f"from .{module} import (", *(f"    {name}," for name in names), ")"]
    names = sorted(name for each in modules.values() for name in each)
    lines += ["", f'__version__ = "{package.__version__}"', ""]
    return "\n".join([*lines, "__all__ = [", *(f'    "{name}",' for name in names), "]", ""])


def write_variant(folder: Path, source: Path, general: dict[str, Any], backend: str, unique_id: str) -> Path:
    """As kernel-builder does, without its provenance."""
    identity = f"_{PACKAGE}_{backend}_{unique_id}"
    target = folder / "build" / f"torch-{backend}"
    shutil.copytree(source, target)
    (target / "_ops.py").write_text(OPS.format(id=identity))
    files = sorted(path for path in target.rglob("*") if path.is_file())
    metadata = {
        "name": general["name"],
        "id": identity,
        "version": general["version"],
        "license": general["license"],
        "upstream": general["upstream"],
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {p.relative_to(target).as_posix(): digest(p) for p in files}},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2))
    return target


def digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def tree_id() -> str:
    """Seven digits that name the files of this commit, and whether they have been changed since."""
    try:
        tree, changed = git("rev-parse", "HEAD^{tree}"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"hub/write.py: expected a git repository, whose commit names the build; got {error}"
        ) from None
    return tree[:7] + ("_dirty" if changed else "")


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
